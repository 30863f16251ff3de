"""The rewriting engine: a language model writes the shorter text, and nothing it writes is believed.

Each part of the source that extraction would shorten is rewritten on its own, within its share of the budget: one
candidate per style, verified, sent back with what failed, cut by value where it is too long. The best verified one is
used if it answers at least as many questions about the source as extraction does; otherwise extraction is, and the
reason is said. So a model can make a capsule better and never worse than extraction is by these measures. A failure of
the model is such a reason; only `BudgetExhausted` is raised, after the calls that were already under way have ended, so
that what was paid for has reached the cache and is not paid for again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from agentopt.capsules._options import STYLES
from agentopt.capsules._types import Check, Document
from agentopt.capsules.counting._tokens import Meter
from agentopt.capsules.rewriting._chunks import Piece, join, plan
from agentopt.capsules.rewriting._probes import ask_probes, recall
from agentopt.capsules.rewriting._verify import Source, verify_against
from agentopt.capsules.rewriting._wording import load_wording
from agentopt.capsules.rewriting._writer import Attempt, Writer, entailed
from agentopt.evaluation import seed_number
from agentopt.graph import Usage, metered
from agentopt.models import LMError, LMOptions, side_by_side

if TYPE_CHECKING:
    from agentopt.capsules.extraction._extract import Extraction
    from agentopt.models import LM

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Win:
    """A rewrite that was used: what may be shown as an example when the next text of the task is rewritten."""

    style: str
    original: str
    capsule: str


@dataclass(frozen=True)
class RewriteOptions:
    """What has a sensible default in rewriting."""

    chunk: int = 24_000
    """Longer texts are rewritten in pieces of at most this many characters: what the model's context holds."""
    temperature: float = 0.0
    timeout: float = 120.0
    """Seconds for one call."""
    concurrency: int = 8
    judge: LM | None = None
    """Asked whether the source supports what the winner says; None for the checks without a model."""
    reader: LM | None = None
    """Answers the questions about the source from each candidate and from the extraction, so that what counts is what a
    model can still find; None to look the answers up."""
    wins: tuple[Win, ...] = ()
    """Earlier results of the same task: their styles are asked first, and the last of each style is an example."""
    template: Path | None = None
    """A file of fragments that replace shipped ones."""


@dataclass(frozen=True, slots=True)
class Rewriting:
    """What came out."""

    texts: tuple[str, ...]
    """One per document; together within the limit."""
    made: Literal["rewrite", "extract", "unchanged"]
    checks: tuple[Check, ...]
    """Of the parts that were rewritten, each with `verify`'s names."""
    fallback: str = ""
    """Why extraction stands in place of a rewrite, where it does; with several parts, for which ones."""
    tried: tuple[Attempt, ...] = ()
    usage: Usage = field(default_factory=Usage)
    cost: float | None = 0.0
    """USD; None when a price is unknown."""
    wins: tuple[Win, ...] = ()
    extraction: Extraction | None = None
    """What was fallen back to, in whole or in part."""


def rank_styles(styles: Sequence[str], wins: Sequence[Win]) -> tuple[str, ...]:
    """`styles` with those that won most often first; among equals the given order stays."""
    count = {style: sum(win.style == style for win in wins) for style in styles}
    return tuple(sorted(dict.fromkeys(styles), key=lambda style: -count[style]))


async def rewrite(
    documents: Sequence[Document],
    meter: Meter,
    lm: LM,
    *,
    query: str | None = None,
    styles: Sequence[str] = STYLES,
    repairs: int = 2,
    seed: int = 0,
    fallback: Callable[[], Extraction],
    options: RewriteOptions | None = None,
) -> Rewriting:
    """Let `lm` shorten `documents` to the meter's limit.

    Args:
        documents: texts that share the budget; those that must stay whole are not touched.
        meter: counts what is sent, and holds the limit.
        lm: the model that writes; any `LM` or double.
        query: what the reader will be asked.
        styles: one candidate each.
        repairs: rounds in which a candidate that failed its checks is sent back.
        seed: of the calls, the fence and the questions.
        fallback: the extractive engine on the same documents and meter.
        options: everything else.

    Raises:
        BudgetInfeasible: what must be kept is longer than the limit (from `fallback`, before any call).
        BudgetExhausted: the run's budget does not cover a call.
    """
    options = options or RewriteOptions()
    texts = tuple(document.text for document in documents)
    if meter.fits(texts):
        return Rewriting(texts, "unchanged", ())
    extraction = fallback()
    pieces = plan(documents, meter, extraction, chunk=options.chunk, query=query, seed=seed)
    order = rank_styles(styles, options.wins)
    wording = load_wording(options.template)
    examples = {win.style: win.capsule for win in options.wins}
    concurrency = 1 if getattr(getattr(lm, "client", lm), "sequential", False) else max(1, options.concurrency)

    def job(piece: Piece, style: str) -> Callable[[], Awaitable[list[Attempt]]]:
        shown = (examples[style],) if style in examples else ()
        writer = Writer(lm, wording, query, repairs, seed, options.temperature, options.timeout, shown)
        return lambda: writer.candidate(piece, style)

    with metered() as spent:
        todo = [(piece, style) for piece in pieces if not piece.problem for style in order]
        rounds = await side_by_side([job(piece, style) for piece, style in todo], concurrency)
        attempts: dict[int, list[Attempt]] = {number: [] for number in range(len(pieces))}
        places = {id(piece): number for number, piece in enumerate(pieces)}
        for (piece, _), made in zip(todo, rounds, strict=True):
            attempts[places[id(piece)]] += made
        chosen = [await _choose(piece, attempts[number], options, wording, seed) for number, piece in enumerate(pieces)]
    result = _assemble(documents, meter, extraction, pieces, chosen, query, seed)
    tried = tuple(attempt for number in sorted(attempts) for attempt in attempts[number])
    cost = None if spent.unpriced_calls else spent.cost
    return replace(result, tried=tried, usage=spent.usage, cost=cost, extraction=extraction)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which attempt stands for a piece, or why none does."""

    attempt: Attempt | None
    reason: str = ""


async def _choose(
    piece: Piece, attempts: Sequence[Attempt], options: RewriteOptions, wording: Mapping[str, str], seed: int
) -> _Choice:
    if piece.problem:
        return _Choice(None, piece.problem)
    good = [attempt for attempt in attempts if not attempt.problem]
    ranked = sorted(good, key=lambda attempt: (-attempt.recall, attempt.tokens))
    floor = piece.floor
    able = [attempt for attempt in ranked if attempt.recall >= floor and attempt.recall > 0]
    if not able and ranked:
        best = ranked[0].recall
        return _Choice(
            None, f"the best rewrite answers {best:.2f} of the questions on the source, extraction {floor:.2f}"
        )
    if not able:
        last = {attempt.style: attempt.problem for attempt in attempts}
        listed = "; ".join(dict.fromkeys(f"{style}: {problem[:160]}" for style, problem in last.items()))
        return _Choice(None, f"no rewrite passed its checks ({listed})")
    if options.reader is not None:
        able, reason = await _as_read(piece, able, options.reader, wording, seed=seed, timeout=options.timeout)
        if not able:
            return _Choice(None, reason)
    if options.judge is None:
        return _Choice(able[0])
    for attempt in able:
        check = await entailed(piece, attempt.text, options.judge, wording, seed=seed, timeout=options.timeout)
        if check.passed:
            return _Choice(replace(attempt, checks=(*attempt.checks, check)))
    return _Choice(None, "the judge found statements that the source does not support")


async def _as_read(
    piece: Piece, able: Sequence[Attempt], reader: LM, wording: Mapping[str, str], *, seed: int, timeout: float
) -> tuple[list[Attempt], str]:
    """The candidates from which a model answers at least as much as from extraction, best first; or why there is none.

    Raises:
        BudgetExhausted: the budget does not cover a call.
    """
    probes = piece.source.probes
    options = LMOptions(max_tokens=32 * len(probes) + 64, seed=seed_number("reader", seed), timeout=timeout)

    async def read(text: str) -> float:
        return await ask_probes(probes, text, reader, options=options, templates=wording)

    try:
        floor = await read(piece.fallback)
        found = [(await read(attempt.text), attempt) for attempt in able]
    except LMError as error:
        return [], f"the reader failed: {' '.join(str(error).split())[:160]}"
    ranked = sorted(found, key=lambda pair: (-pair[0], pair[1].tokens))
    best = ranked[0][0]
    if best < floor:
        return [], f"the reader answers {best:.2f} of the questions from the best rewrite, {floor:.2f} from extraction"
    return [attempt for share, attempt in ranked if share >= floor], ""


def _assemble(
    documents: Sequence[Document],
    meter: Meter,
    extraction: Extraction,
    pieces: Sequence[Piece],
    chosen: Sequence[_Choice],
    query: str | None,
    seed: int,
) -> Rewriting:
    """The parts put together: each rewritten where that is at least as good, and the whole within the limit."""
    texts = list(extraction.texts)
    checks: dict[int, list[Check]] = {}
    wins: dict[int, list[Win]] = {}
    reasons: dict[int, str] = {}
    for part in sorted({piece.part for piece in pieces}):
        own = [(piece, choice) for piece, choice in zip(pieces, chosen, strict=True) if piece.part == part]
        used = [(piece, choice.attempt) for piece, choice in own if choice.attempt is not None]
        if not used:
            reasons[part] = own[0][1].reason
            continue
        text = join([choice.attempt.text if choice.attempt else piece.fallback for piece, choice in own])
        whole = len(own) == 1
        source = own[0][0].source if whole else Source(documents[part], query, seed)
        found = used[0][1].checks if whole else tuple(verify_against(source, text, meter=None))
        failed = [check for check in found if not check.passed]
        if failed:
            reasons[part] = f"the pieces put together fail {failed[0].name}: {failed[0].detail}"
        elif not whole and recall(source.probes, text) < recall(source.probes, texts[part]):
            reasons[part] = "the pieces put together answer fewer questions on the source than extraction"
        else:
            texts[part] = text
            checks[part] = list(found)
            wins[part] = [Win(attempt.style, piece.document.text, attempt.text) for piece, attempt in used]
            left = [choice.reason for _, choice in own if choice.attempt is None]
            if left:
                reasons[part] = f"{len(left)} of {len(own)} pieces are extracts: {left[0]}"
    while checks and not meter.fits(texts):  # the parts' tokens do not add up exactly
        part = max(checks, key=lambda part: meter.units([texts[part]])[0])
        texts[part] = extraction.texts[part]
        del checks[part], wins[part]
        reasons[part] = "with the other parts the rewrite is over the limit"
    several = len(documents) > 1
    if not pieces:
        reasons[-1] = "nothing that may be shortened is left to rewrite"
    return Rewriting(
        texts=tuple(texts),
        made="rewrite" if checks else "extract",
        checks=tuple(check for part in sorted(checks) for check in checks[part]),
        fallback="; ".join(
            f"part {part + 1}: {reason}" if several and part >= 0 else reason
            for part, reason in sorted(reasons.items())
        ),
        wins=tuple(win for part in sorted(wins) for win in wins[part]),
    )
