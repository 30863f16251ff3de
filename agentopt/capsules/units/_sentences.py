"""Sentences: where a paragraph may be divided, in any script, and how a text without any boundary is limited."""

from __future__ import annotations

import re

from agentopt.capsules.units._graphemes import safe_cut
from agentopt.capsules.units._words import words

LONGEST = 2_000
"""Characters of the longest piece; prose without a boundary is divided at white space before it."""

# What may end a sentence. Scripts without spaces need none after it; a Latin stop does.
# One set of first characters (found fast), and a run of stops looked at from its first one only.
_BOUNDARY = re.compile(
    r"""[.!?…؟۔।॥。！？｡\n](?:(?<=\n)
      |(?<=[。！？｡])[。！？｡]*+["'”’»」』）】]{0,3}
      |(?<=[.!?…؟۔।॥])(?<![.!?…][.!?…])[.!?…]*+(?:["'”’»)\]]{1,3})?(?=\s))""",
    re.VERBOSE,
)
_ABBREVIATIONS = words(
    """mr mrs ms dr prof st sr jr vs etc eg ie e.g i.e cf al fig figs eq eqs vol vols pp approx dept est gen
    col lt sgt capt cmdr rev hon gov sen rep pres inc ltd co corp bros jan feb mar apr jun jul aug sep sept oct
    nov dec mon tue wed thu fri sat sun ph.d m.d b.a m.a d.c u.s u.k u.n e.u a.m p.m ca viz ed eds trans ch sec
    ave blvd rd ft mt op arts art nr bzw z.b d.h usw ggf ca evtl"""
)
# Abbreviations that a capital often follows within one sentence; after the others a capital begins a new one.
_BEFORE_NAMES = words(
    """mr mrs ms dr prof st gen col lt sgt capt cmdr rev hon gov sen rep pres fig figs eq eqs vol vols pp vs
    cf eg ie e.g i.e approx ca al ed eds ch sec z.b d.h mt op jan feb mar apr jun jul aug sep sept oct nov dec"""
)
# German writes an ordinal with a stop: what follows one within a sentence.
_AFTER_ORDINAL = re.compile(
    r"""(?:Januar|Jänner|Februar|Feber|März|April|Mai|Juni|Juli|August|September|Oktober|November|Dezember|Quartal|Halbjahr
      |Jahrhunderts?|Jahrtausends?|Weltkriegs?|Kapitels?|Absatz|Auflage|Platz|Etage|Stock|Klasse|Woche|Tag(?:es)?
      |Geburtstag|Instanz|Bundesliga)\b""",
    re.VERBOSE,
)
# Stretches that hold together although a stop is in them.
_TOGETHER = re.compile(
    r"""`[^`\n]{1,300}`|"[^"\n]{1,300}"|“[^“”\n]{1,300}”|«[^«»\n]{1,300}»|「[^「」\n]{1,300}」|\{[^{}\n]{0,300}\}""",
    re.VERBOSE,
)
_LAST_WORD = re.compile(r"[^\s(\[\"'“‘]*$")
_LAST_GAP = re.compile(r"\s\S*\Z")
_NEXT = re.compile(r"""[\s"'“‘«(\[*_]*""")
_WORD = re.compile(r"\S+")
_STOPS = tuple(".!?…:。！？।؟")
_WRAP_FROM = 40
"""Characters of the longest line from which a paragraph may have been wrapped at a column."""


def split(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The sentences of the paragraph `text[start:end]`: offsets without white space at either end, in order."""
    width: int | None = None
    caseless = None
    together: list[tuple[int, int]] | None = None
    pieces: list[tuple[int, int]] = []
    begin = start
    for found in _BOUNDARY.finditer(text, start, end):
        stop = found.end()
        first = text[found.start()]
        if first == "\n":
            if width is None:
                width = max(map(len, text[start:end].split("\n")))
            if _goes_on(text, start, found.start(), stop, end, width):
                continue
        elif first in ".!?…" and stop < end:
            if caseless is None:
                caseless = text[start:end].islower()
            if not _ends(text, begin, found.start(), stop, end, caseless):
                continue
        if stop < end:
            if together is None:
                together = [match.span() for match in _TOGETHER.finditer(text, start, end)]
                together.reverse()
            while together and together[-1][1] <= found.start():
                together.pop()
            if together and together[-1][0] < found.start() and stop < together[-1][1]:
                continue
        _add(text, begin, stop, pieces)
        begin = stop
    _add(text, begin, end, pieces)
    return pieces


def _add(text: str, start: int, end: int, pieces: list[tuple[int, int]]) -> None:
    """Trim, limit and keep a piece; one of closing marks alone belongs to the piece before it."""
    if end <= start:
        return
    if text[start].isspace() or text[end - 1].isspace():
        body = text[start:end]
        end = start + len(body.rstrip())
        start = end - len(text[start:end].lstrip())
        if end <= start:
            return
    while end - start > LONGEST:
        cut = _limit(text, start, start + LONGEST)
        _add(text, start, cut, pieces)
        start = cut
        while start < end and text[start].isspace():
            start += 1
    pieces.append((start, end))


def _limit(text: str, start: int, limit: int) -> int:
    """The last offset of at most `limit` at white space in the second half, else between two graphemes."""
    middle = start + (limit - start) // 2
    gap = _LAST_GAP.search(text[middle : limit + 1])
    return middle + gap.start() if gap else safe_cut(text, start, limit)


def _goes_on(text: str, start: int, at: int, after: int, end: int, width: int) -> bool:
    """Whether the sentence goes on over the line break at `at`: a doubt joins, so that nothing is torn from its "not".

    A line that ends without a stop goes on when the next begins with a small letter, or when the next word would not
    have fitted on it (`width` characters): then it was wrapped.
    """
    last = text[max(start, at - 8) : at].rstrip().rstrip("\"'”’»)]*_`")
    if last[-1:] in _STOPS:
        return False
    while after < end and text[after].isspace():
        after += 1
    if after >= end:
        return False
    if text[after].islower():
        return True
    word = _WORD.match(text, after, end)
    line = at - max(start, text.rfind("\n", start, at) + 1)
    return width >= _WRAP_FROM and word is not None and line + 1 + len(word[0]) > width


def _ends(text: str, begin: int, stop: int, after: int, end: int, caseless: bool) -> bool:
    """Whether the stop at `stop`, with the white space that begins at `after`, ends a sentence."""
    following = _NEXT.match(text, after, end)
    at = following.end() if following else after
    if at >= end:
        return True
    coming = text[at]
    if text[stop - 1 : stop].isspace() and stop > begin:
        return True  # tokenised text: a stop that stands alone
    if coming.islower() and not caseless:
        return False
    if text[stop] != "." or after - stop > 1:
        return True
    word = _LAST_WORD.search(text, max(begin, stop - 24), stop)
    last = word[0] if word else ""
    if len(last) == 1 and last.isalpha() and last != "I":
        return False  # an initial
    if last.isdigit() and stop - len(last) == begin:
        return False  # the number of a list item
    if last.isdigit() and len(last) <= 2 and _AFTER_ORDINAL.match(text, at, end):
        return False
    low = last.lower()
    if low in ("no", "nos"):
        return not coming.isdigit()
    if low not in _ABBREVIATIONS:
        return not (len(last) > 2 and last[-2] == "." and last[-1].isupper())  # U.S.A
    return low not in _BEFORE_NAMES and coming.isupper()
