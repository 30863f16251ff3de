"""Which optimizer and driver run on which problem of `optimizers.py`, and one such run through the public `tune`."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from _oracles import CountedOracle
from _problems import PROBLEMS

import agentopt as ao
from agentopt.graph import parameter_scope
from agentopt.search import DRIVER_NAMES

ROLLOUTS = 600
"""The most one run may use."""
QUALITIES = (1.0, 0.5, 0.2)
SWEPT = ("rules",)
"""Problems that are run at every quality of the optimizer's model; the others at the best one."""
DRIVERS = DRIVER_NAMES
FREE = ("values", "tpe", "instructions-free", "demonstrations", "bootstrap")
"""Optimizers that ask no model: quality means nothing to them."""

_VALUES = ("auto", "optoprime", "optoprime-multi", "opro", "textgrad")
_TEXTS = (*_VALUES, "reflection")
APPLIES: dict[str, tuple[str, ...]] = {
    "numbers": (*_VALUES, "values", "tpe"),
    "code": (*_TEXTS, "code", "symbolic"),
    "rules": (*_TEXTS, "instructions", "grounded", "symbolic", "instructions-free"),
    "examples": ("auto", "bootstrap", "bootstrap+grounded"),
    "principles": ("auto", "playbook", "symbolic"),
    "pipeline": ("symbolic", "symbolic-pipeline"),
    "tools": ("symbolic", "symbolic-tool"),
}
_TEXT = "changes texts and demonstrations, not numbers"
_SETS = "sets numbers and choices; here are none"
_PROMPTS = "changes prompts and demonstrations; here are none"
_PIECES = "changes lists of principles; here are none"
_SYMBOLIC = "changes prompts, tools and pipelines, not numbers"
_SAME = "the same as symbolic, which has nothing else to change here"
_CODE = "rewrites functions; here are none"
_NO_PIPELINE = "changes pipelines; here are none"
_NO_TOOLS = "changes tools; here are none"
SKIPPED: dict[str, dict[str, str]] = {
    "numbers": {
        **dict.fromkeys(("instructions", "grounded", "instructions-free", "demonstrations", "bootstrap"), _TEXT),
        **dict.fromkeys(("symbolic", "symbolic-prompt", "symbolic-tool", "symbolic-pipeline"), _SYMBOLIC),
        "reflection": _TEXT, "code": _CODE, "playbook": _PIECES,
    },
    "code": {
        **dict.fromkeys(("instructions", "grounded", "instructions-free", "demonstrations", "bootstrap"), _PROMPTS),
        **dict.fromkeys(("values", "tpe"), _SETS),
        "symbolic-tool": _SAME, "symbolic-prompt": _PROMPTS, "symbolic-pipeline": _NO_PIPELINE, "playbook": _PIECES,
    },
    "rules": {
        **dict.fromkeys(("values", "tpe"), _SETS),
        **dict.fromkeys(("demonstrations", "bootstrap"), "there is no place for demonstrations; see examples"),
        "symbolic-prompt": _SAME, "symbolic-tool": _NO_TOOLS, "symbolic-pipeline": _NO_PIPELINE,
        "code": _CODE, "playbook": _PIECES,
    },
    "examples": {
        "demonstrations": "no run succeeds at the start and replies are no labels: no demonstration can be had",
    },
}  # fmt: skip
"""Optimizers that do not apply to a problem, and why."""
BAYES_ON_NUMBERS = "this driver searches numbers by itself and asks no optimizer"


@dataclass(frozen=True)
class Run:
    """What one seed of one cell gave."""

    score: float
    proposals: int
    rollouts: int
    calls: int
    tokens: int
    stop: str


@dataclass(frozen=True)
class Cell:
    """One optimizer with one driver on one problem at one quality of its model (None: it asks no model)."""

    problem: str
    quality: float | None
    optimizer: str
    driver: str
    reason: str = ""
    """Why it does not apply; '' where it does."""

    @property
    def key(self) -> str:
        """The cell as text."""
        quality = "" if self.quality is None else f" q={self.quality:g}"
        return f"{self.problem}{quality}: {self.optimizer} x {self.driver}"


def cells(qualities: Sequence[float] = QUALITIES, drivers: Sequence[str] = DRIVERS) -> list[Cell]:
    """Every cell of the synthetic part."""
    found: list[Cell] = []
    for problem, optimizers in APPLIES.items():
        for optimizer in optimizers:
            several = qualities if problem in SWEPT else [max(qualities)]
            for quality in [None] if optimizer in FREE else several:
                for driver in drivers:
                    ignored = problem == "numbers" and driver == "bayes" and optimizer != "tpe"
                    reason = BAYES_ON_NUMBERS if ignored else ""
                    found.append(Cell(problem, quality, optimizer, driver, reason))
    return found


def run(cell: Cell, seed: int) -> Run:
    """One run.

    Raises:
        RuntimeError: an optimizer asked something that no family of oracles knows.
    """
    with parameter_scope():
        problem = PROBLEMS[cell.problem](seed)
        oracle = CountedOracle(problem, quality=1.0 if cell.quality is None else cell.quality, seed=seed)
        result = ao.tune(
            problem.program,
            train=problem.train,
            val=problem.validation,
            metric=problem.metric,
            optimizer=cell.optimizer,
            driver=cell.driver,
            budget=ao.Budget(rollouts=ROLLOUTS),
            seed=seed,
            # Models of low quality fail many iterations in a row; the run must not end by that.
            options=ao.TuneOptions(screen_size=8, block_size=8, max_failures=60, capture=False, tune=problem.tune),
            models=problem.models(oracle),
            store=":memory:",
        )
        if oracle.unknown:
            raise RuntimeError(f"{cell.key}: the oracle was asked something it does not know: {oracle.unknown[0]}")
        cost = result.cost
        return Run(
            problem.truth(result.best),
            int(cost["proposals"]),
            int(cost["rollouts"]),
            oracle.calls,
            int(cost["optimizer_tokens"]),
            result.stop_reason,
        )


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over seeds."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def summary(cell: Cell, runs: Sequence[Run]) -> dict[str, Any]:
    """One cell as JSON values."""
    head = {key: value for key, value in asdict(cell).items() if value != ""}
    if not runs:
        return head
    scores = [run.score for run in runs]
    means = {
        name: round(statistics.fmean(getattr(run, name) for run in runs), 1)
        for name in ("proposals", "rollouts", "calls", "tokens")
    }
    low, high = interval(scores)
    score = round(statistics.fmean(scores), 4)
    stops = sorted({run.stop for run in runs})
    return {
        **head,
        "score": score,
        "interval": [round(low, 4), round(high, 4)],
        "solved": sum(value > 0.999 for value in scores),
        "seeds": len(runs),
        **means,
        "stops": stops,
    }
