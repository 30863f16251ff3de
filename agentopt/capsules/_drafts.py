"""The ways to meet the budget: extraction, a model that rewrites, a trained capsulator.

Each is checked, and each has a reason where it gave way to extraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules._options import CapsuleOptions
from agentopt.capsules._types import Check, Document, DroppedUnit, Made, Mode
from agentopt.capsules.counting._tokens import Meter
from agentopt.capsules.extraction._extract import Extraction, extract
from agentopt.capsules.units._spans import find_intact
from agentopt.capsules.units._units import parse

if TYPE_CHECKING:
    from agentopt.models import LM


_WORDING = ("negation", "quantifier")
"""Kinds of spans that a faithful rewrite may put into other words; verification compares what they say."""


@dataclass(frozen=True, slots=True)
class Job:
    """One call, resolved."""

    source: str
    messages: list[dict[str, Any]] | None
    texts: tuple[str, ...]
    meter: Meter
    documents: tuple[Document, ...]
    """Of the texts after the edits that lose nothing."""
    keep: tuple[str, ...]
    query: str | None
    options: CapsuleOptions


@dataclass(frozen=True, slots=True)
class Draft:
    """One way to meet the budget, or why it did not."""

    made: Made
    texts: tuple[str, ...]
    dropped: tuple[DroppedUnit, ...] = ()
    checks: tuple[Check, ...] = ()
    fallback: str = ""
    usd: float | None = 0.0


async def drafts_of(job: Job, mode: Mode, lm: LM | None) -> list[Draft]:
    """The best without a measurement in front; with `auto` all that may be compared.

    Raises:
        BudgetInfeasible: what must stay does not fit.
    """
    options = job.options
    extraction = extract(job.documents, job.meter, query=job.query, scorer=options.scorer, seed=options.seed)
    extracted = _extracted(job, extraction, "extract")
    drafts: list[Draft] = []
    reasons: list[str] = []
    if options.trained is not None and mode in ("auto", "trained"):
        _sort(_trained(job, extraction), drafts, reasons)
    if lm is not None and mode in ("auto", "rewrite"):
        _sort(await _rewritten(job, extraction, lm), drafts, reasons)
    if not drafts:
        return [replace(extracted, fallback="; ".join(reasons))]
    return [*drafts, extracted] if mode == "auto" else drafts


def _sort(draft: Draft, drafts: list[Draft], reasons: list[str]) -> None:
    if draft.fallback and draft.made == "extract":
        reasons.append(draft.fallback)
    else:
        drafts.append(draft)


def _extracted(job: Job, extraction: Extraction, made: Made) -> Draft:
    """Whole units need no check of what they say: they are the source's own, byte for byte."""
    missing = [
        span.of(document.text)
        for document, text in zip(job.documents, extraction.texts, strict=True)
        for span in document.keep
        if span.of(document.text) not in text
    ]
    checks = (_length(job, extraction.texts), Check("keep", not missing, "; ".join(missing[:5])))
    return Draft(made, extraction.texts, extraction.dropped, checks)


def _length(job: Job, texts: Sequence[str]) -> Check:
    tokens = job.meter.total(texts)
    return Check("length", tokens <= job.meter.limit, f"{tokens} of {job.meter.limit} tokens")


async def _rewritten(job: Job, extraction: Extraction, lm: LM) -> Draft:
    from agentopt.capsules.rewriting._rewrite import rewrite

    options = job.options
    found = await rewrite(
        job.documents,
        job.meter,
        lm,
        query=job.query,
        styles=options.styles,
        repairs=options.repairs,
        seed=options.seed,
        fallback=lambda: extraction,
        options=options.rewriting,
    )
    if found.made != "rewrite":
        return Draft("extract", extraction.texts, fallback=found.fallback)
    checks = (_length(job, found.texts), *found.checks)
    return Draft("rewrite", found.texts, _left(job, found.texts), checks, found.fallback)


def _trained(job: Job, extraction: Extraction) -> Draft:
    from agentopt.capsules.train import load
    from agentopt.capsules.training._trained import Trained

    capsulator = job.options.trained
    if isinstance(capsulator, str | Path):
        capsulator = load(capsulator)
    if not isinstance(capsulator, Trained):  # a policy over units: its choice is an extraction
        values = [capsulator.values(document, job.meter, job.query) for document in job.documents]
        return _extracted(job, extract(job.documents, job.meter, values=values, seed=job.options.seed), "trained")
    texts = list(extraction.texts)
    checks: list[Check] = []
    for place, (document, share) in enumerate(zip(job.documents, extraction.texts, strict=True)):
        if document.whole or share == document.text:
            continue
        meter = Meter(job.meter.units([share])[0] if job.messages else job.meter.limit, job.meter.tokenizer)
        text, failed = _proposed(capsulator, document, meter, job)
        if failed:
            return Draft("extract", extraction.texts, fallback=f"the trained capsulator's text failed: {failed}")
        texts[place], checks = text[0], [*checks, *text[1]]
    length = _length(job, texts)
    if not length.passed:
        return Draft("extract", extraction.texts, fallback=f"the trained capsulator's texts are {length.detail}")
    return Draft("trained", tuple(texts), _left(job, texts), (length, *checks))


def _proposed(capsulator: Any, document: Document, meter: Meter, job: Job) -> tuple[tuple[str, list[Check]], str]:
    """The text and its checks, and what failed."""
    from agentopt.capsules.rewriting._verify import verify

    text: str = capsulator.compress(document, meter, job.options.seed)
    if text.strip() and not meter.fits([text]):
        try:
            text = extract([parse(text, job.keep)], meter, query=job.query, seed=job.options.seed).texts[0]
        except BudgetInfeasible as error:
            return ("", []), str(error)
    checks = verify(document, text, meter=meter)
    return (text, checks), "; ".join(f"{check.name} ({check.detail})" for check in checks if not check.passed)


def _left(job: Job, texts: Sequence[str]) -> tuple[DroppedUnit, ...]:
    """The units of which an intact span is nowhere in a text that was written anew."""
    left: list[DroppedUnit] = []
    for place, (document, text) in enumerate(zip(job.documents, texts, strict=True)):
        if text == document.text:
            continue
        for unit in document.units:
            own = document.text[unit.start : unit.end]
            if any(span.kind not in _WORDING and span.of(own) not in text for span in find_intact(own)):
                left.append(DroppedUnit(own, unit.kind, "value", place))
    return tuple(left)
