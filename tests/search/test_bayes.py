"""The Bayes driver: MIPROv2's schedule decision by decision without racing, and what racing saves."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest

from agentopt.errors import UserError
from agentopt.evaluation import Dataset, EvaluationResult, EvaluationRow, Example
from agentopt.graph import Candidate, ParameterSpec, SetText
from agentopt.optimizers import ProposeContext, Update
from agentopt.search import Budget, CandidateRejected, Driver, Event, Lab, TuneOptions
from agentopt.search._bayes import Bayes
from agentopt.search._loop import Outcome, Search, Setup
from agentopt.search._simulate import SyntheticRows, splits, uniform

RECORDED: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("data").joinpath("mipro_decisions.json").read_text(encoding="utf-8")
)["runs"]


def recorded_score(run: Mapping[str, Any], row: int, places: Mapping[str, int]) -> float:
    """The score that the recorder gave: see benchmarks/peer_adapters/record_mipro.py."""
    text = json.dumps([run["seed"], row, sorted(places.items())])
    number = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
    return float(number < 0.3 + 0.1 * sum(places.values()) / len(places))


def menus_of(run: Mapping[str, Any]) -> dict[str, int]:
    """Parameter name → number of values, in the order in which the reference draws them."""
    sizes: dict[str, int] = {}
    for number in range(run["predictors"]):
        sizes[f"{number}_predictor_instruction"] = run["instructions"]
        if run["demos"]:
            sizes[f"{number}_predictor_demos"] = run["demos"]
    return sizes


class Menu:
    """Gives the one parameter that is asked about as many numbered values as are wanted of it."""

    name = "menu"

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes

    def propose(self, context: ProposeContext) -> list[Update]:
        (name,) = context.specs
        return [Update((SetText(name, str(place)),), source=self.name) for place in range(1, self.sizes[name])]


@dataclass
class Rows:
    """Rows from a function of (row number, values)."""

    score: Callable[[int, Mapping[str, Any]], float]
    asked: int = 0

    async def evaluate(
        self, candidate: Candidate, examples: Dataset, *, ids: Sequence[str] | None = None, **_: Any
    ) -> EvaluationResult:
        rows: list[EvaluationRow] = []
        for row_id in examples.ids if ids is None else ids:
            self.asked += 1
            value = self.score(int(examples.get(row_id).inputs["row"]), candidate.values)
            rows.append(EvaluationRow(candidate.hash, examples.id, row_id, 0, 0, value))
        return EvaluationResult(candidate, examples, tuple(rows))


@dataclass
class Watched:
    """A driver behind a lab that notes what is measured on validation: (values, row numbers)."""

    inner: Driver
    seen: list[tuple[dict[str, Any], list[int]]] = field(default_factory=list[tuple[dict[str, Any], list[int]]])
    name: str = "watched"

    async def run(self, lab: Lab) -> str:
        measure, rows = lab.measure, lab.board.splits["validation"]

        async def noted(candidates: Sequence[Candidate], split: Any, ids: Sequence[str]) -> None:
            await measure(candidates, split, ids)
            for candidate in candidates:
                if split == "validation":
                    self.seen.append((dict(candidate.values), [int(rows.get(row_id).inputs["row"]) for row_id in ids]))

        lab.measure = noted  # type: ignore[method-assign]
        return await self.inner.run(lab)


def dataset(name: str, count: int) -> Dataset:
    return Dataset(name, (Example(inputs={"row": str(number)}, expected="x") for number in range(count)))


def replay(run: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Search, Outcome]:
    """Our evaluations in the recorder's form, the full ones of the original left out: they cost nothing here."""
    sizes = menus_of(run)
    widest = max(sizes.values())
    driver = Watched(
        Bayes(
            racing=False,
            candidates=widest,
            trials=run["trials"],
            minibatch=run["minibatch"],
            full_every=run["full_every"],
        )
    )
    setup = Setup(
        run_id="replay",
        program_name="synthetic",
        specs={name: ParameterSpec(name=name, kind="prompt", default="0") for name in sizes},
        source=Rows(lambda row, values: recorded_score(run, row, {name: int(str(values[name])) for name in sizes})),
        optimizer=Menu(sizes),
        driver=driver,
        splits={"train": dataset("train", 6), "validation": dataset("validation", run["validation"])},
        budget=Budget(rollouts=100_000),
        emit=lambda _event: None,
        options=TuneOptions(pool_size=64),
        seed=run["seed"],
    )
    search = Search(setup)
    outcome = asyncio.run(search.run())
    steps: list[dict[str, Any]] = []
    for values, rows in driver.seen:
        places = [int(values[name]) for name in sizes]
        full = len(rows) == run["validation"]
        if full and sum(places) == 0:
            continue
        steps.append({"places": places, "rows": "all" if full else rows})
    return steps, search, outcome


def without_the_original(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"places": step["places"], "rows": step["rows"]}
        for step in steps
        if not (step["rows"] == "all" and sum(step["places"]) == 0)
    ]


def check(run: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], best_score: float) -> None:
    found, search, outcome = replay(run)
    assert found == without_the_original(steps)
    assert search.pool.best.score == pytest.approx(best_score)
    assert outcome.stop_reason == f"{run['trials']} trials done"


@pytest.mark.parametrize("run", RECORDED, ids=lambda run: f"seed{run['seed']}")
def test_the_same_combinations_minibatches_and_full_evaluations_as_miprov2(run: dict[str, Any]) -> None:
    check(run, run["steps"], run["best_score"])
    _, search, _ = replay(run)
    best = [int(str(value)) for value in search.pool.best.candidate.values.values()]
    full = [step for step in run["steps"] if step["rows"] == "all" and step["score"] == run["best_score"]]
    assert best in [step["places"] for step in full]


# --- an oracle of the schedule ---


def oracle(run: Mapping[str, Any]) -> tuple[list[dict[str, Any]], float]:
    """MIPROv2's third step in the words of its description, on Optuna alone."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sizes, rows = menus_of(run), range(run["validation"])
    space: dict[str, Any] = {
        name: optuna.distributions.CategoricalDistribution(list(range(size))) for name, size in sizes.items()
    }
    rng = random.Random(run["seed"])
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=run["seed"], multivariate=True)
    )

    def mean(places: Mapping[str, int], chosen: Sequence[int]) -> float:
        return sum(recorded_score(run, row, places) for row in chosen) / len(chosen)

    def add(places: dict[str, int]) -> float:
        value = mean(places, rows)
        study.add_trial(optuna.trial.create_trial(params=places, distributions=space, value=value))
        return value

    best = add(dict.fromkeys(sizes, 0))
    steps: list[dict[str, Any]] = []
    means: dict[tuple[int, ...], list[float]] = {}
    full: set[tuple[int, ...]] = set()
    for _ in range(run["trials"]):
        trial = study.ask(space)
        places = {name: int(trial.params[name]) for name in sizes}
        batch = rng.sample(rows, run["minibatch"])
        value = mean(places, batch)
        steps.append({"places": list(places.values()), "rows": batch})
        means.setdefault(tuple(places.values()), []).append(value)
        # After every `full_every` minibatch trials, and after the last one.
        last = len([step for step in steps if step["rows"] != "all"]) == run["trials"]
        if (trial.number + 1) % (run["full_every"] + 1) == 0 or last:
            open_ = {key: sum(values) / len(values) for key, values in means.items() if key not in full}
            if open_:
                top = max(open_, key=lambda key: open_[key])
                full.add(top)
                best = max(best, add(dict(zip(sizes, top, strict=True))))
                steps.append({"places": list(top), "rows": "all"})
        study.tell(trial, value)
    return steps, best


@pytest.mark.parametrize("seed", range(100, 112))
def test_the_schedule_is_the_oracles(seed: int) -> None:
    rng = random.Random(seed)
    every = rng.randint(2, 6)
    run = {
        "seed": seed,
        "predictors": rng.randint(1, 3),
        "instructions": rng.randint(2, 5),
        "demos": rng.choice([0, 2, 5]),
        "validation": rng.randint(12, 40),
        "trials": every * rng.randint(1, 4) + 1,
        "minibatch": rng.randint(3, 11),
        "full_every": every,
    }
    check(run, *oracle(run))


# --- racing ---

NAMES = ("part.a", "part.b")


class Texts:
    """Fresh texts for the one parameter asked about; a function of the context."""

    name = "texts"

    def propose(self, context: ProposeContext) -> list[Update]:
        (name,) = context.specs
        return [Update((SetText(name, f"{context.seed}-{at}"),), source=self.name) for at in range(context.count)]


def skill(candidate: Candidate) -> float:
    texts = [str(candidate.get(name)) for name in NAMES]
    return 0.35 + sum(0.5 * uniform(text) ** 3 - 0.1 for text in texts if text != "start")


def race(seed: int, racing: bool) -> tuple[float, int, list[Event]]:
    events: list[Event] = []
    driver = Bayes(racing=racing, candidates=6, trials=24, minibatch=35)
    setup = Setup(
        run_id="r",
        program_name="synthetic",
        specs={name: ParameterSpec(name=name, kind="prompt", default="start") for name in NAMES},
        source=SyntheticRows(skill, seed=seed),
        optimizer=Texts(),
        driver=driver,
        splits=splits(train=20, validation=100, test=40, seed=seed),
        budget=Budget(rollouts=1000 if racing else 1900),
        emit=events.append,
        seed=seed,
    )
    search = Search(setup)
    best = asyncio.run(search.run()).best
    return skill(best), search.ledger.rollouts, events


def test_racing_finds_as_much_with_fewer_rollouts_and_drops_early() -> None:
    raced = [race(seed, racing=True) for seed in range(12)]
    blind = [race(seed, racing=False) for seed in range(12)]
    gain = sum(score for score, _, _ in raced) - sum(score for score, _, _ in blind)
    assert gain >= 0
    assert sum(rollouts for _, rollouts, _ in raced) < sum(rollouts for _, rollouts, _ in blind)
    rejected = [event for _, _, events in raced for event in events if isinstance(event, CandidateRejected)]
    assert sum("behind the leader" in event.reason for event in rejected) > 50


def test_numbers_and_choices_are_searched_without_asking_the_optimizer() -> None:
    class Never:
        name = "never"

        def propose(self, context: ProposeContext) -> list[Update]:
            raise AssertionError("asked")

    specs = {
        "heat": ParameterSpec(name="heat", kind="number", default=0.9, low=0.0, high=1.0),
        "count": ParameterSpec(name="count", kind="number", default=1, low=1, high=8, integer=True),
        "mode": ParameterSpec(name="mode", kind="choice", default="slow", options=("slow", "fast")),
    }

    def score(row: int, values: Mapping[str, Any]) -> float:
        near = 1 - abs(values["heat"] - 0.2) - 0.05 * abs(values["count"] - 5)
        return max(0.0, near - 0.2 * (values["mode"] == "slow")) * (0.9 + 0.01 * (row % 10))

    setup = Setup(
        run_id="r",
        program_name="synthetic",
        specs=specs,
        source=Rows(score),
        optimizer=Never(),
        driver=Bayes(trials=60),
        splits={"train": dataset("train", 8), "validation": dataset("validation", 20)},
        budget=Budget(rollouts=1500),
        emit=lambda _event: None,
    )
    best = asyncio.run(Search(setup).run()).best
    assert best.get("mode") == "fast"
    heat, count = best.get("heat"), best.get("count")
    assert isinstance(heat, float) and abs(heat - 0.2) < 0.2
    assert isinstance(count, int)


@pytest.mark.parametrize("setting", ["candidates", "trials", "minibatch", "full_every"])
def test_settings_are_checked(setting: str) -> None:
    wrong: dict[str, Any] = {setting: 0}
    with pytest.raises(UserError, match=f"Bayes: {setting} must be at least 1; found 0"):
        Bayes(**wrong)
