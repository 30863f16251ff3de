"""Which sentences may be cut, and where: after clauses, then between words, never in a span or a grapheme."""

from __future__ import annotations

import re
from collections.abc import Iterable

from agentopt.capsules._graphemes import boundaries
from agentopt.capsules._intact import CONDITIONS, NEGATIONS, QUANTIFIERS, find_intact
from agentopt.capsules._keep import find_keep
from agentopt.capsules._types import Span

_UNCUTTABLE = re.compile(
    rf"\b(?:{NEGATIONS}|{QUANTIFIERS}|{CONDITIONS})\b|[不没未非无別勿]|全部|所有|每|只|仅|至少|最多|除非|除了|如果|若|直到|ない|なら",
    re.VERBOSE | re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"[,;:)\]](?=\s)|[，；、：）]|[^\s,;:](?=\s(?:and|which|who|that|where|so|because|[-–—(])\s?)|[–—](?=\s)"
)
_GAP = re.compile(r"\S(?=\s)")


def uncuttable(text: str) -> bool:
    """Whether `text` has a negation, a quantifier, a condition or an exception: it stays whole or leaves whole."""
    return _UNCUTTABLE.search(text) is not None


def clause_points(text: str) -> list[int]:
    """Offsets at which a clause has ended and the text may be cut, ascending; never in a keep or an intact span."""
    return _outside((match.end() for match in _CLAUSE.finditer(text)), _whole(text), len(text))


def cut_points(text: str) -> list[int]:
    """Offsets at which `text` may be cut, best first: ends of clauses, then gaps between words (each ascending).

    A text without either (Chinese, Thai, ...) may be cut between any two graphemes. Never inside a keep or an intact
    span. Empty when there is no such place.
    """
    spans = _whole(text)
    clauses = _outside((match.end() for match in _CLAUSE.finditer(text)), spans, len(text))
    known = set(clauses)
    gaps = [at for at in _outside((match.end() for match in _GAP.finditer(text)), spans, len(text)) if at not in known]
    if not clauses and not gaps:
        gaps = _outside(boundaries(text), spans, len(text))
    return clauses + gaps


def _whole(text: str) -> list[Span]:
    return sorted([*find_intact(text), *find_keep(text)], key=lambda span: (span.start, span.end))


def _outside(points: Iterable[int], spans: list[Span], size: int) -> list[int]:
    """The points, ascending, that are in no span nor at an end of the text."""
    out: list[int] = []
    ahead, reach = 0, 0
    for at in points:
        while ahead < len(spans) and spans[ahead].start < at:
            reach = max(reach, spans[ahead].end)
            ahead += 1
        if at >= reach and 0 < at < size:
            out.append(at)
    return out
