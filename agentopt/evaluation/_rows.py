"""What an evaluation leaves: a score, the row that statistics read, the result over a dataset, rollouts with traces.

`EvaluationRow` is the only row type statistics read. Its key is the cache's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from agentopt.evaluation._data import Dataset, Example
from agentopt.evaluation._statistics import bootstrap_interval
from agentopt.graph import Usage

if TYPE_CHECKING:
    from agentopt.graph import Candidate, Trace

KeepTraces = Literal["never", "failures", "all"]
RowKey = tuple[str, str, str, int, int]


@dataclass(frozen=True, slots=True)
class Score:
    """What a metric says of one output: a number (larger is better), why, and further objectives by name."""

    value: float
    feedback: str | None = None
    objectives: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One (candidate, example, repeat) and how it went.

    `output` is the JSON form of what the program returned; `error` the text of what it raised (then `score` is
    `EvaluationOptions.min_score`). `cost` is USD, None when a price is unknown; `latency` is seconds.
    """

    candidate_hash: str
    dataset_id: str
    example_id: str
    repeat: int
    seed: int
    score: float
    feedback: str | None = None
    objectives: Mapping[str, float] = field(default_factory=dict[str, float])
    output: Any = None
    error: str | None = None
    usage: Usage = field(default_factory=Usage)
    cost: float | None = 0.0
    latency: float = 0.0
    trace_id: str | None = None
    cached: bool = False
    """True when this row came from the cache; never stored."""

    @property
    def key(self) -> RowKey:
        """What identifies the row."""
        return (self.candidate_hash, self.dataset_id, self.example_id, self.repeat, self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; what equals its default is left out, `cached` always."""
        data: dict[str, Any] = {
            "candidate_hash": self.candidate_hash,
            "dataset_id": self.dataset_id,
            "example_id": self.example_id,
            "repeat": self.repeat,
            "seed": self.seed,
            "score": self.score,
            "cost": self.cost,
            "latency": round(self.latency, 6),
        }
        for name in ("feedback", "output", "error", "trace_id"):
            if (value := getattr(self, name)) is not None:
                data[name] = value
        if self.objectives:
            data["objectives"] = dict(self.objectives)
        if self.usage:
            data["usage"] = {key: count for key, count in self.usage.to_dict().items() if count != 0}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, cached: bool = False) -> EvaluationRow:
        """The inverse of `to_dict`."""
        return cls(
            candidate_hash=data["candidate_hash"],
            dataset_id=data["dataset_id"],
            example_id=data["example_id"],
            repeat=data["repeat"],
            seed=data["seed"],
            score=data["score"],
            feedback=data.get("feedback"),
            objectives=data.get("objectives") or {},
            output=data.get("output"),
            error=data.get("error"),
            usage=Usage.from_dict(data.get("usage") or {}),
            cost=data.get("cost"),
            latency=data.get("latency") or 0.0,
            trace_id=data.get("trace_id"),
            cached=cached,
        )


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """How examples are run."""

    concurrency: int = 8
    """Rollouts at the same time, and worker threads for sync programs."""
    timeout: float | None = 120.0
    """Seconds for one rollout, metric included; None for no limit."""
    repeats: int = 1
    """Rollouts per example; scores are averaged over them before any comparison."""
    seed: int = 0
    """The run's seed: every draw of a rollout follows from it."""
    keep_traces: KeepTraces = "failures"
    """Which traces to keep: none, those with an error or a score below `perfect_score`, or all."""
    min_score: float = 0.0
    """The score of a rollout that raised or timed out."""
    perfect_score: float = 1.0
    """A rollout that scores less than this is a failure."""
    max_abandoned: int = 64
    """How many hung sync rollouts may be left behind in their threads before the evaluation gives up."""


class Rollout:
    """An example, its row and, where it was kept, the trace (loaded on first use)."""

    __slots__ = ("_load", "_trace", "example", "row")

    def __init__(
        self,
        example: Example,
        row: EvaluationRow,
        trace: Trace | None = None,
        load: Callable[[str], Trace | None] | None = None,
    ) -> None:
        self.example = example
        self.row = row
        self._trace = trace
        self._load = load

    @property
    def trace(self) -> Trace | None:
        """The recording of this rollout, or None when it was not kept."""
        if self._trace is None and self._load is not None and self.row.trace_id is not None:
            self._trace = self._load(self.row.trace_id)
        return self._trace

    def __repr__(self) -> str:
        return f"Rollout({self.example.id!r}, score={self.row.score!r})"


@dataclass(frozen=True)
class EvaluationResult:
    """A candidate on a dataset: rows in example order, repeats of one example next to each other."""

    candidate: Candidate
    dataset: Dataset
    rows: tuple[EvaluationRow, ...]
    options: EvaluationOptions = field(default_factory=EvaluationOptions)
    load_trace: Callable[[str], Trace | None] | None = field(default=None, repr=False, compare=False)
    abandoned: int = 0
    """Hung sync rollouts of this evaluation whose threads could not be stopped and still run."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[EvaluationRow]:
        return iter(self.rows)

    @cached_property
    def scores(self) -> dict[str, float]:
        """Example id to score, the mean over its repeats, in example order."""
        grouped: dict[str, list[float]] = {}
        for row in self.rows:
            grouped.setdefault(row.example_id, []).append(row.score)
        return {example_id: sum(values) / len(values) for example_id, values in grouped.items()}

    @property
    def mean(self) -> float:
        """Mean score over examples; 0.0 when there are none."""
        scores = self.scores
        return sum(scores.values()) / len(scores) if scores else 0.0

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 % BCa bootstrap interval of the mean over examples (Efron 1987)."""
        return bootstrap_interval(list(self.scores.values())) if self.scores else (0.0, 0.0)

    @property
    def cost(self) -> float | None:
        """USD spent by the rows that were not cached; None when a price is unknown."""
        spent = [row.cost for row in self.rows if not row.cached]
        return None if any(cost is None for cost in spent) else sum(cost or 0.0 for cost in spent)

    @property
    def usage(self) -> Usage:
        """Tokens and calls of the rows that were not cached."""
        total = Usage()
        for row in self.rows:
            if not row.cached:
                total += row.usage
        return total

    @property
    def errors(self) -> list[EvaluationRow]:
        """The rows whose program raised, timed out or could not be scored."""
        return [row for row in self.rows if row.error is not None]

    @property
    def failures(self) -> list[EvaluationRow]:
        """The rows that scored less than `options.perfect_score`."""
        return [row for row in self.rows if row.score < self.options.perfect_score]

    @cached_property
    def rollouts(self) -> Sequence[Rollout]:
        """The rows with their examples and, loaded on first use, their traces."""
        return [Rollout(self.dataset.get(row.example_id), row, load=self.load_trace) for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Summary and rows as plain JSON data."""
        low, high = self.interval
        return {
            "candidate": self.candidate.hash,
            "dataset": {"name": self.dataset.name, "id": self.dataset.id, "examples": len(self.dataset)},
            "mean": self.mean,
            "interval": [low, high],
            "cost": self.cost,
            "usage": self.usage.to_dict(),
            "errors": len(self.errors),
            "rows": [row.to_dict() for row in self.rows],
        }
