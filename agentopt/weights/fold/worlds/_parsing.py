"""Reads rule theories: the sentences of `rules` in both styles, and English in the manner of ProofWriter.

A statement is a fact ("Ada is brave.", "The cat does not chase the dog."), a conditional in either order ("If something
chases the dog and it is not red then it is cold.", "Ada is calm if Boris is brave."), or a general sentence ("All red,
cold things are round.", "Nice people are kind.", "Everyone who is red is cold."). A rule is about at most one unnamed
subject ("someone", "something", "x"), taken up by "they" or "it". Attributes are single words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from agentopt.errors import UserError
from agentopt.weights.fold.worlds._logic import ANY, IS, Clause, Literal, Theory, World
from agentopt.weights.fold.worlds._names import third

_OPEN = frozenset({"someone", "something", "somebody", "anyone", "anything", "everyone", "everything", "x"})
_AGAIN = frozenset({"they", "it", "he", "she"})
_GLUE = frozenset({"is", "are", "do", "does", "not", "if", "then", "and", "all", "every"})
RESERVED = _OPEN | _AGAIN | _GLUE
"""Words that no name or attribute may be, or a sentence would be read as another statement than it was meant as."""
_WORD = r"[A-Za-z][\w-]*"
_COPULA = re.compile(rf"(?P<subject>.+?) (?:is|are) (?P<not>not )?(?P<quality>{_WORD})", re.IGNORECASE)
_VERB = re.compile(
    rf"(?P<subject>.+?) (?P<not>(?:does |do )?not )?(?P<verb>{_WORD}) (?P<object>the (?:{_WORD} )?{_WORD}|{_WORD})",
    re.IGNORECASE,
)
_IF = re.compile(r"if (?P<body>.+?),? then (?P<head>.+)", re.IGNORECASE)
_AFTER = re.compile(r"(?P<head>.+?) if (?P<body>.+)", re.IGNORECASE)
_QUALITIES = rf"(?:not )?{_WORD}(?:(?:, and |, | and )(?:not )?{_WORD})*"
_GENERAL = re.compile(
    rf"(?:all |every )?(?P<body>{_QUALITIES}) (?:people|persons?|things?|animals?|ones?) (?:are|is) "
    rf"(?P<not>not )?(?P<head>{_WORD})",
    re.IGNORECASE,
)
_WHO = re.compile(
    rf"(?:every|any)(?:one|body|thing) (?:who|that) (?:is|are) (?P<body>{_QUALITIES}) (?:is|are) "
    rf"(?P<not>not )?(?P<head>{_WORD})",
    re.IGNORECASE,
)
_PLAIN = re.compile(rf"(?P<body>(?:not )?{_WORD}(?: and (?:not )?{_WORD})*) is (?P<not>not )?(?P<head>{_WORD})")
_PLAIN_AFTER = re.compile(rf"(?P<not>not )?(?P<head>{_WORD}) if (?P<body>(?:not )?{_WORD}(?: and (?:not )?{_WORD})*)")
_SENTENCE = re.compile(r"[^.?!\n]+[.?!]?")
_ASIDE = re.compile(r"it is known that ", re.IGNORECASE)
_ASKED = re.compile(r"(?:is it true|does it follow|is it the case) that ", re.IGNORECASE)


def sentences(text: str) -> tuple[str, ...]:
    """The sentences of a text, each with its stop; lines end sentences too."""
    return tuple(found.strip() for found in _SENTENCE.findall(text) if found.strip(" .?!\n"))


def parse_theory(text: str | Sequence[str], *, world: World = "open", names: Sequence[str] | None = None) -> Theory:
    """A theory from its sentences; clause i is sentence i.

    Args:
        text: running text, or one sentence each.
        world: what is not derived is unknown ("open") or false ("closed").
        names: the names in use, for the plain style, where "ada is brave" and "brave is calm" look alike; without them
            a word is a name when no sentence uses it as an attribute.

    Raises:
        UserError: a sentence that is of none of the forms.
    """
    given = sentences(text) if isinstance(text, str) else tuple(text)
    known = _plain_names(given) if names is None else frozenset(name.lower() for name in names)
    clauses: list[Clause] = []
    for place, sentence in enumerate(given, start=1):
        clause = _clause(_ASIDE.sub("", sentence.strip().rstrip(" .!")), known)
        if clause is None:
            raise UserError(
                f"sentence {place} is {sentence!r}, which is no fact or rule that can be read; expected for example "
                "'Ada is brave.', 'The cat chases the dog.', 'If someone is brave then they are calm.' or 'All brave "
                "people are calm.'"
            )
        clauses.append(clause)
    return Theory(tuple(clauses), world)


def parse_statement(text: str) -> Literal:
    """The statement of a question such as "Is it true that Ada is brave?", or a bare one.

    Of "Is this true, false or unknown? Ada is brave." the last sentence counts.

    Raises:
        UserError: it is no statement about a name.
    """
    said = text.strip().rstrip(" .!?")
    said = _ASKED.sub("", said.rsplit("? ", 1)[-1])
    literal = _literal(said, "")
    if literal is None or literal.subject == ANY:
        raise UserError(
            f"question {text!r} holds no statement that can be read; expected 'Is it true that Ada is red?'"
        )
    return literal


def _plain_names(given: Sequence[str]) -> frozenset[str]:
    """Lower-case subjects that no sentence ascribes to anybody."""
    bare = [sentence for sentence in given if sentence == sentence.lower() and not sentence.endswith(".")]
    said = {word for sentence in bare for word in re.findall(r"(?:is|and|if) (?:not )?(\S+)", sentence)}
    said |= {word for sentence in bare for word in re.findall(r"^(?:not )?(\S+) (?:and|if)", sentence)}
    return frozenset(
        word for sentence in bare for word in re.findall(r"^(\S+) is (?:not )?\S+$", sentence) if word not in said
    )


def _clause(text: str, names: frozenset[str]) -> Clause | None:
    """A fact or a rule, without its stop."""
    for form in (_IF, _AFTER):
        if found := form.fullmatch(text):
            clause = _conditional(found["body"], found["head"])
            if clause is not None:
                return clause
    for form in (_WHO, _GENERAL):
        if found := form.fullmatch(text):
            return _general(found)
    if found := _PLAIN_AFTER.fullmatch(text):
        return _general(found)
    if text == text.lower() and (found := _PLAIN.fullmatch(text)) and text.split(" ", 1)[0] not in names:
        return _general(found)
    fact = _literal(text, "")
    return None if fact is None or fact.subject == ANY else Clause(fact)


def _general(found: re.Match[str]) -> Clause:
    parts = re.split(r", and |, | and ", found["body"])
    return Clause(_quality(ANY, found["head"], found["not"]), tuple(_condition(part) for part in parts))


def _condition(part: str) -> Literal:
    denied = part.lower().startswith("not ")
    return _quality(ANY, part[4:] if denied else part, denied)


def _quality(subject: str, word: str, denied: object) -> Literal:
    return Literal(subject, IS, word.lower(), not denied)


def _conditional(body: str, head: str) -> Clause | None:
    """Conditions and conclusion; the conclusion may come first and name what the conditions take up."""
    opening = head.split(" ", 1)[0].lower() in _OPEN
    before = ANY if opening else ""
    found: list[Literal] = []
    for part in re.split(r", and |, | and ", body):
        literal = _literal(part, found[-1].subject if found else before)
        if literal is None and found and found[-1].verb == IS and re.fullmatch(rf"(?:not )?{_WORD}", part):
            literal = _condition(part)._replace(subject=found[-1].subject)
        if literal is None:
            return None
        found.append(literal)
    subjects = [literal.subject for literal in found]
    conclusion = _literal(head, ANY if ANY in subjects else subjects[0])
    if conclusion is None or (conclusion.subject == ANY and ANY not in subjects):
        return None
    return Clause(conclusion, tuple(found))


def _literal(text: str, before: str) -> Literal | None:
    """One statement; `before` is whom "they" and "it" stand for (empty: nobody, and nobody may be left unnamed)."""
    if found := _COPULA.fullmatch(text):
        subject = _name(found["subject"], before)
        return None if subject is None else _quality(subject, found["quality"], found["not"])
    if found := _VERB.fullmatch(text):
        subject, target = _name(found["subject"], before), _name(found["object"], "")
        if subject is None or target is None or target == ANY:
            return None
        verb = found["verb"].lower()
        denied = found["not"]
        plural = found["subject"].lower() == "they" or (denied or "").lower().startswith(("do ", "does "))
        if not plural and not verb.endswith("s"):
            return None
        return Literal(subject, third(verb) if plural else verb, target, not denied)
    return None


def _name(text: str, before: str) -> str | None:
    """A name, a kind of animal without its article, or the rule's unnamed subject."""
    lowered = text.lower()
    if lowered in _OPEN:
        return ANY
    if lowered in _AGAIN:
        return before or None
    words = text.split()
    if not _GLUE.isdisjoint(lowered.split()):
        return None
    if words[0].lower() == "the":
        return " ".join(words[1:]).lower() if 1 < len(words) < 4 else None
    return text if len(words) == 1 else None
