"""Facts that say the opposite of each other: found by their words, so that what is reported can be seen to be true.

Two statements contradict each other when one is the other with a negation in it ("The cat is big." and "The cat isn't
big."; "Ann likes Bob." and "Ann does not like Bob."). Anything whose negation may leave both true is left alone:
conditions, alternatives, "some", "may", "sometimes", "not only". No model is asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_EDGES = "\"'()[]{},:\u201c\u201d\u2018\u2019"
_SHORT = {"cannot": ("can", "not"), "can't": ("can", "not"), "won't": ("will", "not"), "shan't": ("shall", "not")}
_AUXILIARY = {"do", "does", "did"}
_NEGATIONS = {"not", "never"}
# With one of these, a sentence and its negation may both be true (or the negation may stand in another clause).
_OPEN = frozenset(
    re.split(
        r"\s+",
        "if when unless whenever while because although or either neither nor who which that whose but except some "
        "someone something somebody any anyone anything all every each everyone everything no nobody nothing none most "
        "many few may might could should would must sometimes often usually always necessarily only just merely yet "
        "still",
    )
)
# Endings of verbs in the third person: "chases" is "does chase", "tries" is "does try".
_THIRD = (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x"), ("zzes", "zz"), ("oes", "o"))


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Two facts that cannot both be true."""

    first: int
    second: int
    """Places of the two among the facts."""
    sentence: str
    """For people."""


def contradictions(facts: Sequence[str]) -> tuple[Contradiction, ...]:
    """Every pair of facts that differ by a negation, in the order of the facts."""
    seen: dict[tuple[str, ...], list[tuple[int, bool]]] = {}
    found: set[tuple[int, int]] = set()
    for place, fact in enumerate(facts):
        for words, negated in _readings(fact):
            before = seen.setdefault(words, [])
            found |= {(other, place) for other, was in before if was != negated and other != place}
            before.append((place, negated))
    return tuple(
        Contradiction(one, two, f"{_short(facts[one])} contradicts {_short(facts[two])}") for one, two in sorted(found)
    )


def _short(fact: str, most: int = 80) -> str:
    text = " ".join(fact.split())
    return f'"{text if len(text) <= most else text[: most - 3] + "..."}"'


def _readings(fact: str) -> list[tuple[tuple[str, ...], bool]]:
    """The statement without its negation, and whether it had one; none when its negation would prove nothing."""
    body = fact.strip().rstrip(".!").strip()
    if not body or re.search(r"[.!?;]\s", body) or body.endswith("?"):
        return []  # several sentences, or a question
    words = _words(body)
    if _OPEN & set(words):
        return []
    at = [place for place, word in enumerate(words) if word in _NEGATIONS]
    if len(at) > 1:
        return []
    if not at:
        return [(tuple(words), False), *_with_do(words)]
    left = words[: at[0]] + words[at[0] + 1 :]
    return [(tuple(left), True)]


def _words(text: str) -> list[str]:
    """Lower case, short forms written out, "no longer" as a negation."""
    words: list[str] = []
    for word in (part.strip(_EDGES).replace("\u2019", "'") for part in text.lower().split()):
        if not word:
            continue
        if word in _SHORT:
            words += _SHORT[word]
        elif word.endswith("n't"):
            words += [word[:-3], "not"]
        elif word == "longer" and words and words[-1] == "no":
            words[-1] = "not"
        else:
            words.append(word)
    return words


def _with_do(words: Sequence[str]) -> list[tuple[tuple[str, ...], bool]]:
    """Read "Ann likes Bob" as "Ann does like Bob", which "Ann does not like Bob" negates; once for every possible verb.

    A word that is no verb ("cats") gives a reading that no grammatical negation has, so it can do no harm.
    """
    if _AUXILIARY & set(words):
        return []
    found: list[tuple[tuple[str, ...], bool]] = []
    for place, word in enumerate(words[1:], 1):
        base = _base(word)
        if base:
            found.append(((*words[:place], "does", base, *words[place + 1 :]), False))
        found.append(((*words[:place], "do", *words[place:]), False))
    return found


def _base(word: str) -> str | None:
    if word == "has":
        return "have"
    for ending, start in _THIRD:
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word[: -len(ending)] + start
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 2 else None
