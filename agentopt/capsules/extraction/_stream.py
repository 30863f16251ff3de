"""A text that does not fit into memory: read in pieces, kept within the size of a chunk and of the limit.

The pieces are joined to chunks that end at a blank line, outside of code fences and keep spans. Of each chunk the units
that could win stay in a pool, whose size does not grow with the text; the last race and the hard cut are `extract`'s.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from agentopt.capsules._options import Scorer
from agentopt.capsules._types import SpanKind
from agentopt.capsules.counting._tokens import TokenBudget
from agentopt.capsules.extraction._extract import extract
from agentopt.capsules.extraction._narrow import Pool, part_of
from agentopt.capsules.extraction._order import Taste
from agentopt.capsules.extraction._stretch import stretched
from agentopt.capsules.units._graphemes import safe_cut
from agentopt.capsules.units._spans import find_keep
from agentopt.capsules.units._units import parse
from agentopt.errors import UserError

CHUNK = 1 << 18
"""Characters that are read at once."""
_AROUND = 4096
"""Characters on both sides of a cut in which a keep span is looked for."""
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_BREAKS = ("\n\n", "\n", ". ", " ")


@dataclass(frozen=True, slots=True)
class Streamed:
    """What is left of a stream."""

    text: str
    tokens: int
    limit: int
    tokenizer: str
    characters: int
    """Of the whole stream."""
    units: int
    """Of the whole stream."""
    units_kept: int
    kept: tuple[tuple[str, SpanKind], ...]
    """The keep spans: text and kind, in order."""

    @property
    def dropped(self) -> int:
        """How many units are not in the text."""
        return self.units - self.units_kept


def stream(
    chunks: Iterable[str],
    budget: TokenBudget,
    *,
    query: str | None = None,
    keep: Sequence[str] = (),
    scorer: Scorer = "auto",
    seed: int = 0,
    chunk: int = CHUNK,
) -> Streamed:
    """Extract from a stream; memory is bounded by the chunk, the limit and what must be kept, not by the text.

    Args:
        chunks: The text, in pieces of any size: an open file will do.
        budget: The hard limit.
        query: What the reader will be asked.
        keep: Regular expressions; what they match is never dropped. A match longer than 4,096 characters may be missed
            where it lies across the end of a chunk.
        scorer: As for `extract`.
        seed: Decides between units of equal worth.
        chunk: Characters that are scored at once.

    Raises:
        BudgetInfeasible: what must stay is longer than the limit.
        UserError: a pattern that is no regular expression, or a chunk that is too small.
    """
    if chunk < 2 * _AROUND:
        raise UserError(f"chunk: found {chunk} characters, expected at least {2 * _AROUND}.")
    meter = budget.meter()
    asked = query if query and query.strip() and scorer != "coverage" else None
    pool = Pool(meter, Taste(asked, scorer, seed), chunk)
    characters = units = 0
    blank = space = ""
    for text in safe_chunks(chunks, chunk, keep):
        characters += len(text)
        document = parse(text, keep)
        if not document.units:
            blank, space = blank or text, (space + text)[-64:]
            continue
        document = stretched(document)
        units += len(document.units)
        pool.add(part_of(document, 0, len(document.units)), space + text[: document.units[0].start])
        space = text[document.units[-1].end :]
    document = pool.held if pool.held.units else parse(blank, keep)
    found = extract([document], meter, query=query, scorer=scorer, seed=seed)
    return Streamed(
        text=found.texts[0],
        tokens=meter.total(found.texts),
        limit=budget.limit,
        tokenizer=meter.tokenizer.name,
        characters=characters,
        units=units,
        units_kept=len(found.kept),
        kept=tuple((span.of(document.text), span.kind) for span in document.keep),
    )


def safe_chunks(chunks: Iterable[str], size: int, keep: Sequence[str] = ()) -> Iterator[str]:
    """The same text in chunks of about `size` characters that end where nothing is torn apart."""
    waiting: list[str] = []
    length = 0
    for piece in chunks:
        for start in range(0, len(piece), size):
            part = piece[start : start + size]
            waiting.append(part)
            length += len(part)
            if length >= 2 * size:
                text = "".join(waiting)
                at = _cut(text, size, keep)
                yield text[:at]
                waiting, length = [text[at:]], len(text) - at
    text = "".join(waiting)
    while len(text) > size + _AROUND:
        at = _cut(text, size, keep)
        yield text[:at]
        text = text[at:]
    if text:
        yield text


def _cut(text: str, size: int, keep: Sequence[str]) -> int:
    """Where to end a chunk: a blank line outside of a fence, before a keep span that would be torn."""
    low, at = size // 2, -1
    fences = [match.start() for match in _FENCE.finditer(text, 0, size)]
    for mark in _BREAKS:
        at = text.rfind(mark, low, size)
        while mark == "\n\n" and at >= low and bisect_left(fences, at) % 2:
            at = text.rfind(mark, low, at)
        if at >= low:
            at += len(mark)
            break
    if at < low:
        at = safe_cut(text, low, size)
    start = max(0, at - _AROUND)
    for span in find_keep(text[start : at + _AROUND], keep):
        if start + span.start < at < start + span.end and start + span.start > 0:
            return start + span.start
    return at
