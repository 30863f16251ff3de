"""Clauses of a text, the words they are matched by, and what a clause says no to.

Two texts about the same thing are compared clause by clause: words are lower-cased and cut to a rough stem, a clause of
the shorter text is matched to the clauses of the longer one that share most words with it, and then what reverses or
limits a statement (negations, exceptions, conditions, "only", "all" against "some", "must" against "may") is compared.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from agentopt.capsules.extraction._terms import UNSPACED

_WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+(?:['’][^\W_{UNSPACED}]+)*")
_STOP_WORDS = (
    "a about after also am an and are as at be been being but by did do does doing done for from further had has have "
    "having he her here hers him his how i in into is it its itself just me my of on or our out over own same she so "
    "such than that the their them then there these they this those through to too under up us very was we were what "
    "when where which while who whom why will with would you your yours please if unless until except only not no nor "
    "never none neither cannot all any every each some may can must should shall might could without least most more "
    "less fewer per via e g i.e e.g etc s t ve ll d m re"
)
_STOP = frozenset(_STOP_WORDS.split())
_CONDITIONAL = r"unless|except|excluding|only|if|until|till|provided|when|whenever|where|as long as|in case|otherwise"
_SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？；])|[;\n]+|\s\|\s|\s[•·–—]\s|\s-{1,3}>?\s")
_COMMA = re.compile(rf",\s++(?!(?:(?:and|or|but)\s)?(?:{_CONDITIONAL})\b)|\s(?=(?:but|whereas|although)\b)", re.I)
_LEADS = re.compile(rf"\W*+(?:(?:and|or|but)\s)?(?:{_CONDITIONAL})\b", re.I)

_MARKERS = re.compile(
    r"""
    (?P<idiom>\b(?:goes\ without\ saying|no\ matter|no\ doubt|whether\ or\ not|not\ (?:only|just|merely)
        |not\ to\ mention|last\ but\ not\ least|more\ often\ than\ not|without\ (?:a\ )?doubt
        |if\ any|no\ problem|as\ a\ whole)\b)
    |(?P<lower>\b(?:at\ least|at\ minimum|no\ less\ than|not\ less\ than|no\ fewer\ than|not\ fewer\ than|minimum\ of
        |min\.?\ (?=\d)|(?:more|greater|larger|higher|longer|older)\ than|exceed(?:s|ing)?|above|minimum)\b|>=?|≥|⩾)
    |(?P<upper>\b(?:at\ most|at\ maximum|no\ more\ than|not\ more\ than|no\ later\ than|not\ later\ than
        |no\ greater\ than|not\ exceed(?:ing)?|up\ to|maximum\ of|max\.?\ (?=\d)
        |(?:less|fewer|lower|smaller|shorter|younger)\ than|below|maximum)\b|<=?|≤|⩽)
    |(?P<some>\bnot\ (?:all|every|always|each|everyone|everything)\b)
    |(?P<only>\b(?:only|solely|exclusively|nothing\ but|none\ but)\b)
    |(?P<soft>\b(?:un(?:able|less)|avoid\w*|refus\w+|prohibit\w*|forbid\w*|forbidden|disallow\w*|ban(?:ned|s)?|lack\w*
        |impossible|exclud\w+|except\w*|apart\ from|other\ than|omit\w*|skip\w*|stop\w*|prevent\w*|fail\w*|invalid
        |rather\ than|instead\ of|den(?:y|ied|ies)|reject\w*|ineligible|exempt\w*|free\ of)\b)
    |(?P<neg>\b(?:not|no(?!\.\s?\d)|never|none|nobody|nothing|nowhere|neither|nor|cannot|without|non|nicht|kein\w*|niemals|ohne
        |jamais|aucune?|nunca|jamás|não|не|нет|никогда|без)\b|n['’]t\b|\bw/o\b|[不没沒無无勿别別])
    |(?P<cond>\b(?:if|when|whenever|until|till|provided|as\ long\ as|in\ case|once|where|while|during|for|on|upon|after
        |before|wenn|falls|si|cuando|если)\b|→|->|=>|:(?=\s)|\?)
    |(?P<all>\b(?:all|every|everyone|everybody|everything|each|always|any|anyone|anything|entire|whole)\b)
    |(?P<few>\b(?:some|sometimes|someone|several|few|most|mostly|usually|often|many|partly|rarely|occasionally)\b)
    |(?P<must>\b(?:must|shall|required?|requires|mandatory|needs?\ to|ha(?:s|ve)\ to|obligatory)\b)
    |(?P<may>\b(?:may|might|could|can|optional(?:ly)?|allowed|permitted)\b)
    """,
    re.X | re.I,
)
_HARD_CONDITION = re.compile(r"\b(?:if|unless|until|provided|as long as|in case|only when|only if|wenn|falls)\b", re.I)


def stems(text: str) -> list[str]:
    """The content words of `text`, each cut to a rough stem, in order."""
    return [stem(word) for word in (found.lower() for found in _WORD.findall(text)) if word not in _STOP]


@lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """A lower-case word without the endings that telegraphic writing drops."""
    word = re.sub(r"['’](?:s|t|re|ve|ll|d|m)?$", "", word)
    if len(word) < 4 or not word[-1].isalpha():
        return word
    for ending in ("ations", "ation", "ings", "ing", "edly", "ies", "ied", "ed", "es", "s", "ly", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


@dataclass(frozen=True, slots=True)
class Polarity:
    """What a clause says no to, and how far what it says goes."""

    no: int = 0
    """Negations that are words of their own."""
    soft: Counter[str] = field(default_factory=Counter[str])
    """Words that negate in their own way ("avoid", "except")."""
    marks: frozenset[str] = frozenset()
    """Which of only, all, some, must, may, lower, upper, cond it has."""
    condition: bool = False
    scopes: tuple[frozenset[str], ...] = ()
    """Of each negation the words that it stands at."""
    reach: frozenset[str] = frozenset()
    """The words that a negation or an exception here may be about."""

    def __add__(self, other: Polarity) -> Polarity:
        return Polarity(
            self.no + other.no,
            self.soft + other.soft,
            self.marks | other.marks,
            self.condition or other.condition,
            self.scopes + other.scopes,
            self.reach | other.reach,
        )


def polarity(text: str) -> Polarity:
    """Count what negates, excepts, limits and obliges in `text`."""
    soft: Counter[str] = Counter()
    marks: set[str] = set()
    denied: list[tuple[int, int]] = []
    first = len(text)
    for match in _MARKERS.finditer(text):
        kind = match.lastgroup or ""
        if kind in ("neg", "some"):
            denied.append(match.span())
            marks.update({"few"} if kind == "some" else ())
        elif kind == "soft":
            soft[stem(match[0].lower())[:4]] += 1
        else:
            marks.add(kind)
        if kind in ("neg", "some", "soft"):
            first = min(first, match.end())
    scopes = tuple(
        frozenset(stems(text[end : end + 80])[:3] or stems(text[max(0, start - 80) : start])[-3:])
        for start, end in denied
    )
    after = stems(text[first:])
    about = after if len(after) >= _FEW or not denied else stems(text)  # "flooding is not covered" is about flooding
    reach = frozenset(about or stems(text)) if denied or soft else frozenset[str]()
    condition = _HARD_CONDITION.search(text) is not None
    return Polarity(len(denied), soft, frozenset(marks), condition, scopes, reach)


@dataclass(frozen=True)
class Clause:
    """A stretch of a text that is compared as one."""

    text: str
    sentence: int
    """Which sentence it is of."""
    stems: frozenset[str]

    @cached_property
    def polarity(self) -> Polarity:
        """See `polarity`."""
        return polarity(self.text)


def split(text: str) -> list[Clause]:
    """The clauses of `text`. What hangs on a condition or an exception stays with it."""
    return [
        Clause(text[start:end], number, frozenset(stems(text[start:end])))
        for number, (begin, stop) in enumerate(_cuts(text, 0, len(text), _SENTENCE))
        for start, end in _inside(text, begin, stop)
    ]


def sentences(text: str) -> list[str]:
    """The sentences, lines and cells of `text`."""
    return [text[start:end] for start, end in _cuts(text, 0, len(text), _SENTENCE)]


def _inside(text: str, begin: int, stop: int) -> Iterator[tuple[int, int]]:
    if _LEADS.match(text, begin, stop):
        yield begin, stop
    else:
        yield from _cuts(text, begin, stop, _COMMA)


def _cuts(text: str, begin: int, stop: int, at: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    start = begin
    for match in at.finditer(text, begin, stop):
        if text[start : match.start()].strip():
            yield start, match.start()
            start = match.end()
    if text[start:stop].strip():
        yield start, stop


_FREQUENT = 2_000
_FEW = 3


class Index:
    """The clauses of a source, found by the words they share with another clause."""

    def __init__(self, clauses: Sequence[Clause]) -> None:
        self.clauses = clauses
        self._places: dict[str, list[int]] = defaultdict(list)
        for number, clause in enumerate(clauses):
            for word in clause.stems:
                self._places[word].append(number)

    def __contains__(self, word: str) -> bool:
        return word in self._places

    @cached_property
    def ordered(self) -> list[str]:
        """Every stem, sorted: what abbreviations are looked up in."""
        return sorted(self._places)

    def shared(self, words: frozenset[str]) -> Counter[int]:
        """How many of `words` each clause has; words that stand nearly everywhere are passed over."""
        found: Counter[int] = Counter()
        for word in words:
            places = self._places.get(word, ())
            if len(places) <= _FREQUENT:
                found.update(places)
        return found

    def best(self, words: frozenset[str]) -> list[int]:
        """The clauses that share most with `words`, a rare word counting more: the best and those as good."""
        shared = self.shared(words)
        if not shared:
            return []
        most = max(shared.values())
        if most < 2 and most * 2 < len(words):
            return []
        weight: Counter[int] = Counter()
        for word in words:
            places = self._places.get(word, ())
            if len(places) <= _FREQUENT:
                for place in places:
                    weight[place] += 1_000 // len(places)  # pyright: ignore[reportArgumentType]
        top = max(weight.values())
        ties = [number for number, value in weight.items() if value >= 0.95 * top]
        return sorted(ties, key=lambda number: (len(self.clauses[number].stems), number))

    def expected(self, clause: Clause) -> list[Polarity]:
        """What `clause` may say, going by the source: one entry for every way to match it; [] where nothing matches."""
        best = self.best(clause.stems)
        if not best:
            return []
        found = [self.clauses[number].polarity for number in best[:8]]
        total, rest = self.clauses[best[0]].polarity, clause.stems - self.clauses[best[0]].stems
        while rest:
            more = [number for number in self.best(rest) if self._adds(number, rest)]
            if not more:
                break
            total = total + self.clauses[more[0]].polarity
            rest = rest - self.clauses[more[0]].stems
            found.append(total)
        return found if len(found) == len(best[:8]) else found[len(best[:8]) :]

    def _adds(self, number: int, rest: frozenset[str]) -> bool:
        """Whether a clause's words among `rest` say that it is meant too: two of them, or all it has."""
        own = self.clauses[number].stems
        return len(own & rest) >= 2 or own <= rest


def differences(clause: Clause, expected: Sequence[Polarity]) -> str:
    """In a few words how `clause` says something else than every entry of `expected`; empty when one agrees."""
    problems = [_difference(clause.polarity, source) for source in expected]
    return "" if not problems or "" in problems else problems[0]


def _difference(new: Polarity, old: Polarity) -> str:
    common = new.soft & old.soft
    spare_new, spare_old = (new.soft - common).total(), (old.soft - common).total()
    if new.no + spare_new < old.no:
        return "lost a negation"
    if old.no + spare_old < new.no:
        return "added a negation"
    if new.soft["unle"] > old.soft["unle"] and not old.no and not spare_old:
        return 'turned a condition into "unless"' if old.condition else 'added "unless"'
    if any(scope and not scope & old.reach for scope in new.scopes):
        return "added a negation" if new.no > old.no else "moved a negation"
    if new.no <= old.no and not spare_new and any(word in _EXCEPTIONS for word in old.soft - common):
        return "lost an exception"
    if ("only" in new.marks) != ("only" in old.marks):
        return 'lost "only"' if "only" in old.marks else 'added "only"'
    for one, other, names in _OPPOSITES:
        for here, there in ((one, other), (other, one)):
            if here in new.marks and there not in new.marks and there in old.marks and here not in old.marks:
                return f"turned {names[there]} into {names[here]}"
    excepts = any(word in _EXCEPTIONS for word in new.soft)
    if old.condition and not (new.condition or new.no or excepts or new.marks & {"cond", "only"}):
        return LOST_CONDITION
    return ""


LOST_CONDITION = "lost a condition"
_EXCEPTION_WORDS = "exce excl unle othe apar unab avoi proh forb disa ban bann inst rath exem impo inel"
_EXCEPTIONS = frozenset(_EXCEPTION_WORDS.split())
_OPPOSITES = (
    ("all", "few", {"all": '"all"', "few": '"some"'}),
    ("must", "may", {"must": '"must"', "may": '"may"'}),
    ("lower", "upper", {"lower": '"at least"', "upper": '"at most"'}),
)
