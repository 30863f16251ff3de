"""The gate: candidates are compared on one part of the examples, the best is held against the original on the other.

Both parts follow from the rows' content and the seed; rows that belong together stay together. What is paid for reaches
the store's reply cache, so gating again asks only for what is new. A program that fails with the capsule scores the
lowest score there; where it fails with the original nothing can be said, and such rows count as ties at best.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agentopt.capsules._types import GateReport
from agentopt.capsules.counting._tokenizers import Bytes
from agentopt.capsules.counting._tokens import Tokenizer
from agentopt.capsules.gating._answers import Answered, Answers, OnProgress, Reader, together
from agentopt.capsules.gating._noninferior import (
    BETS,
    METHOD,
    Bounds,
    Units,
    Verdict,
    Wager,
    bounds,
    holm,
    rows_needed,
    units_of,
)
from agentopt.capsules.gating._task import OpenTask, Task
from agentopt.errors import UserError
from agentopt.evaluation import Dataset, Evaluator, content_hash
from agentopt.store import Store


async def gate(
    original: str,
    candidates: Sequence[tuple[str, str]],
    task: Task,
    *,
    margin: float = 0.05,
    confidence: float = 0.95,
    seed: int = 0,
    store: Store | str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[int | None, GateReport]:
    """Hold the best of some candidates against the original.

    Args:
        original: the text that is being compressed.
        candidates: how each was made, and its text.
        task: examples, program and metric.
        margin: how much lower the score may be, as a share of the score's range.
        confidence: of the one-sided bounds.
        seed: the split, the program's draws and the bounds follow from it.
        store: where replies are kept and found again; None for where `ao.configure` says.
        tokenizer: in what the length of candidates is told, and ties of the score are broken; None for bytes.
        on_progress: called with stage, rows done, rows in all.

    Returns:
        The index of the winner (None without candidates), and the report about it.

    Raises:
        RunError: the program fails with the original.
        UserError: the task cannot be used.
    """
    if not 0 < margin < 1:
        raise UserError(f"margin: found {margin}, expected a number between 0 and 1.")
    opened = task.open(original)
    counter = tokenizer or Bytes()
    if not candidates:
        return None, _nothing(opened, margin, confidence)
    with opened.surroundings(store):
        metric = opened.metric if opened.kind == "accuracy" else Answered()
        evaluator = Evaluator(opened.program, metric, opened.evaluation(seed))
        reader = Reader(opened, original, evaluator, on_progress)
        trial = _Trial(opened, original, tuple(candidates), counter, reader, margin, confidence, seed)
        return await trial.run()


def regate_needed(
    report: GateReport, original: str, capsule: str, task: Task, *, tokenizer: Tokenizer | None = None
) -> tuple[str, ...]:
    """What has changed since the gate; () when it still holds.

    The parts are called prompt, capsule, program, reader, metric, data and tokenizer.

    Raises:
        UserError: the task cannot be used.
    """
    opened = task.open(original)
    with opened.models():
        now = _inputs(opened, original, capsule, tokenizer or Bytes())
    before: dict[str, str] = {}
    for part in report.inputs.split():
        name, _, value = part.partition("=")
        before[name] = value
    return tuple(name for name, value in now.items() if before.get(name) != value)


def _inputs(task: OpenTask, original: str, capsule: str, tokenizer: Tokenizer) -> dict[str, str]:
    hashes = {
        "prompt": content_hash(original),
        "capsule": content_hash(capsule),
        "program": task.source(),
        "reader": task.reader(),
        "metric": content_hash([task.metric.name, task.kind]),
        "data": task.dataset.id,
        "tokenizer": content_hash(tokenizer.name),
    }
    return {name: value[:12] for name, value in hashes.items()}


@dataclass(frozen=True)
class _Trial:
    """One gate under way."""

    task: OpenTask
    original: str
    candidates: tuple[tuple[str, str], ...]
    counter: Tokenizer
    reader: Reader
    margin: float
    confidence: float
    seed: int

    async def run(self) -> tuple[int, GateReport]:
        """Select, then gate."""
        options = self.task.options
        distinct = len({text for _, text in self.candidates})
        several = distinct > options.gated
        select, part = split(self.task, options.select_share if several else 0.0, self.seed)
        compared, ranking = await self._select(select)
        chosen: list[int] = []
        for index in ranking:
            if self.candidates[index][1] not in {self.candidates[place][1] for place in chosen}:
                chosen.append(index)
        chosen = chosen[: options.gated]
        if self.candidates[chosen[0]][1] == self.original:
            return chosen[0], self._same_text(chosen[0], compared, len(select))
        if options.sequential:
            return chosen[0], await self._bet(chosen[0], part, compared, len(select))
        return await self._hold(chosen, part, compared, len(select))

    async def _select(self, rows: Dataset) -> tuple[tuple[dict[str, Any], ...], list[int]]:
        """Every candidate's length and score, and their places from best to worst."""
        tokens = self.counter.count_many([text for _, text in self.candidates])
        scores: list[float | None] = [None] * len(self.candidates)
        if len(rows):
            total = len(rows) * (len(self.candidates) + 1)
            base = await self.reader.read(self.original, rows, "select", 0, total)
            for place, (_, text) in enumerate(self.candidates):
                answers = await self.reader.read(text, rows, "select", len(rows) * (place + 1), total)
                d = self._differences(base, answers)
                scores[place] = sum(base.scores.values()) / len(rows) + sum(d.values()) / len(rows) * self._width
        compared = tuple(
            {"made": made, "tokens": count, "score": score}
            for (made, _), count, score in zip(self.candidates, tokens, scores, strict=True)
        )
        # Rounded, so that the order in which equal scores were added up decides nothing.
        order = sorted(range(len(tokens)), key=lambda i: (-round(scores[i] or 0.0, 9), tokens[i], i))
        return compared, order

    @property
    def _width(self) -> float:
        low, high = self.task.options.score_range
        return high - low

    def _differences(self, base: Answers, answers: Answers) -> dict[str, float]:
        """Paired differences in shares of the score's range."""
        low, high = self.task.options.score_range
        found: dict[str, float] = {}
        for key, before in base.scores.items():
            after = answers.scores[key]
            for score in (before, after):
                if not low - 1e-9 <= score <= high + 1e-9:
                    raise UserError(
                        f"metric {self.task.metric.name!r} gave {score:g} on example {key}, outside {low:g} to "
                        f"{high:g}; give the range with TaskOptions(score_range=(LOWEST, HIGHEST))."
                    )
            d = (after - before) / (high - low)
            found[key] = min(d, 0.0) if key in base.failed else d
        return found

    def _units(self, differences: dict[str, float]) -> Units:
        groups: list[Hashable] = [self.task.unit(self.task.dataset.get(key)) for key in differences]
        return units_of(list(differences.values()), groups)

    async def _hold(
        self, chosen: list[int], part: Dataset, compared: tuple[dict[str, Any], ...], n_select: int
    ) -> tuple[int, GateReport]:
        total = len(part) * (len(chosen) + 1)
        base = await self.reader.read(self.original, part, "gate", 0, total)
        answers: list[Answers] = []
        for place, index in enumerate(chosen):
            text = self.candidates[index][1]
            answers.append(await self.reader.read(text, part, "gate", len(part) * (place + 1), total))
        units = [self._units(self._differences(base, item)) for item in answers]
        first = [bounds(item, self.margin, confidence=self.confidence, seed=self.seed) for item in units]
        levels = holm([item.p_value for item in first], self.confidence)
        found = [
            bounds(u, self.margin, confidence=level, seed=self.seed) for u, level in zip(units, levels, strict=True)
        ]
        accepted = [place for place, item in enumerate(found) if item.verdict == "accepted"]
        best = min(accepted, key=lambda place: (compared[chosen[place]]["tokens"], place), default=0)
        outcome = _Outcome(found[best], found[best].verdict, units[best], levels[best], METHOD)
        return chosen[best], self._report(chosen[best], outcome, base, answers[best], compared, n_select)

    async def _bet(self, index: int, part: Dataset, compared: tuple[dict[str, Any], ...], n_select: int) -> GateReport:
        """Block by block, until the bets decide or the rows are used up."""
        blocks = blocks_of(self.task, part, self.seed)
        sizes = [len(group) for block in blocks for group in block]
        wager = Wager(self.margin, confidence=self.confidence, largest=float(max(sizes)))
        bases: list[Answers] = []
        others: list[Answers] = []
        sums: list[float] = []
        done = 0
        for block in blocks:
            rows = part.take([key for group in block for key in group])
            bases.append(await self.reader.read(self.original, rows, "gate", 2 * done, 2 * len(part)))
            others.append(
                await self.reader.read(self.candidates[index][1], rows, "gate", 2 * done + len(rows), 2 * len(part))
            )
            done += len(rows)
            d = self._differences(bases[-1], others[-1])
            for group in block:
                sums.append(sum(d[key] for key in group))
                wager.add(sums[-1], float(len(group)))
            wager.look()
            if wager.verdict != "undecided":
                break
        units = Units(np.array(sums), np.array(sizes[: len(sums)], dtype=np.float64))
        bound = Bounds(units.difference, wager.lower, wager.upper, math.exp(-wager.evidence), self.margin)
        outcome = _Outcome(bound, wager.verdict, units, self.confidence, BETS)
        return self._report(index, outcome, together(bases), together(others), compared, n_select)

    def _report(
        self,
        index: int,
        outcome: _Outcome,
        base: Answers,
        answers: Answers,
        compared: tuple[dict[str, Any], ...],
        n_select: int,
    ) -> GateReport:
        bound, width = outcome.bound, self._width
        before = sum(base.scores.values()) / len(base.scores)
        needed = rows_needed(self.margin, outcome.units.spread, confidence=outcome.confidence)
        return GateReport(
            verdict=outcome.verdict,
            kind=self.task.kind,
            margin=self.margin * width,
            confidence=outcome.confidence,
            n_select=n_select,
            n_gate=outcome.units.rows,
            original=before,
            capsule=before + bound.difference * width,
            difference=bound.difference * width,
            lower_bound=bound.lower * width,
            method=outcome.method,
            needed=needed,
            output_ratio=answers.output_tokens / base.output_tokens if base.output_tokens else None,
            candidates=compared,
            inputs=self._written(index),
            reason=_reason(self.task.kind, outcome, needed, base, answers),
            usd=self.reader.usd,
        )

    def _same_text(self, index: int, compared: tuple[dict[str, Any], ...], n_select: int) -> GateReport:
        return GateReport(
            verdict="accepted",
            kind=self.task.kind,
            margin=self.margin * self._width,
            confidence=self.confidence,
            n_select=n_select,
            n_gate=0,
            original=compared[index]["score"] or 0.0,
            capsule=compared[index]["score"] or 0.0,
            difference=0.0,
            lower_bound=0.0,
            method="the same text",
            needed=0,
            candidates=compared,
            inputs=self._written(index),
            reason="The capsule is the original text.",
            usd=self.reader.usd,
        )

    def _written(self, index: int) -> str:
        parts = _inputs(self.task, self.original, self.candidates[index][1], self.counter)
        return " ".join(f"{name}={value}" for name, value in parts.items())


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How the gate of one candidate ended."""

    bound: Bounds
    verdict: Verdict
    units: Units
    confidence: float
    method: str


def _nothing(task: OpenTask, margin: float, confidence: float) -> GateReport:
    low, high = task.options.score_range
    return GateReport(
        verdict="undecided",
        kind=task.kind,
        margin=margin * (high - low),
        confidence=confidence,
        n_select=0,
        n_gate=0,
        original=0.0,
        capsule=0.0,
        difference=0.0,
        lower_bound=low - high,
        method=METHOD,
        needed=rows_needed(margin, 0.0, confidence=confidence),
        reason="There was no candidate to gate.",
        usd=0.0,
    )


def _reason(kind: str, outcome: _Outcome, needed: int, base: Answers, answers: Answers) -> str:
    bound, n = outcome.bound, outcome.units.rows
    what = "the score" if kind == "accuracy" else "agreement with the original's answers"
    sure = f"{outcome.confidence * 100:.4g} % confidence"
    units = outcome.units.sums.size
    rows = f"{n} rows" if units == n else f"{n} rows in {units} independent groups"
    points = f"{bound.margin * 100:.3g} points"
    if outcome.verdict == "accepted":
        text = (
            f"On {rows} {what} changes by {bound.difference * 100:+.2f} points, and with {sure} falls by at most "
            f"{max(-bound.lower, 0.0) * 100:.2f}: within the margin of {points}."
        )
    elif outcome.verdict == "rejected":
        text = (
            f"On {rows} {what} changes by {bound.difference * 100:+.2f} points, and with {sure} falls by at least "
            f"{-bound.upper * 100:.2f}: more than the margin of {points}."
        )
    else:
        text = (
            f"On {rows} {what} changes by {bound.difference * 100:+.2f} points, but a fall of "
            f"{-bound.lower * 100:.2f} is not excluded with {sure}; the margin is {points}. "
        )
        if bound.difference > -bound.margin:
            text += f"A capsule without harm would need about {needed} rows to be shown so."
        else:
            text += "More rows would probably show harm."
    for number, name in ((len(answers.failed), "the capsule"), (len(base.failed), "the original")):
        if number:
            text += f" The program failed with {name} on {number} of them."
    return text


# ---- the parts


def split(task: OpenTask, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """About `share` of the rows, and the others; rows of one unit on one side, whatever their order in the file."""
    groups = _groups(task, task.dataset, seed)
    target = share * len(task.dataset)
    first: set[str] = set()
    for group in groups:
        # At least one unit on each side where there are two; never more than the share beyond that.
        if share > 0 and group is not groups[-1] and (not first or len(first) + len(group) <= target):
            first.update(group)
    name, ids = task.dataset.name, task.dataset.ids
    return (
        task.dataset.take([key for key in ids if key in first], name=f"{name}:select"),
        task.dataset.take([key for key in ids if key not in first], name=f"{name}:gate"),
    )


def blocks_of(task: OpenTask, rows: Dataset, seed: int) -> list[list[list[str]]]:
    """The rows' units in seeded order, in blocks of about `options.block` rows."""
    blocks: list[list[list[str]]] = [[]]
    for group in _groups(task, rows, seed):
        if sum(map(len, blocks[-1])) >= task.options.block:
            blocks.append([])
        blocks[-1].append(group)
    return blocks


def _groups(task: OpenTask, rows: Dataset, seed: int) -> list[list[str]]:
    groups: dict[Hashable, list[str]] = {}
    for example in rows:
        groups.setdefault(task.unit(example), []).append(example.id)
    return sorted(groups.values(), key=lambda group: hashlib.sha256(f"{seed}:{min(group)}".encode()).digest())
