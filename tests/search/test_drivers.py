"""What every driver keeps, whatever it decides: bounds, determinism, replay, no harm by bad optimizers, claims."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from agentopt.errors import RunError
from agentopt.evaluation import Dataset, EvaluationResult, EvaluationRow, Example, binomial_lower_bound
from agentopt.graph import Candidate, ParameterSpec, SetText, Usage
from agentopt.optimizers import ProposeContext, Update
from agentopt.search import (
    DRIVER_NAMES,
    Budget,
    CandidateAccepted,
    CandidateRejected,
    Event,
    ProposalMade,
    Spend,
    TuneOptions,
    resolve_driver,
)
from agentopt.search._loop import Outcome, Search, Setup
from agentopt.search._resume import Replay
from agentopt.search._simulate import SyntheticRows, splits, uniform

NAMES = ("part.a", "part.b")
every_driver = pytest.mark.parametrize("driver", DRIVER_NAMES)


class Numbered:
    """Gives fresh texts for the parameters it may touch, several at a time; a function of the context alone."""

    name = "numbered"

    def propose(self, context: ProposeContext) -> list[Update]:
        made: list[Update] = []
        for place in range(context.count):
            name = sorted(context.specs)[(context.seed + place) % len(context.specs)]
            made.append(Update((SetText(name, f"{context.seed % 9973}-{place}"),), source=self.name))
        return made


def skill(candidate: Candidate) -> float:
    """A quarter of the texts help, each part on its own."""
    gain = sum(0.2 for name in NAMES if "-" in (text := str(candidate.get(name))) and uniform(text) < 0.25)
    return 0.4 + gain


class Repeated(SyntheticRows):
    """Each row several times, with the same score."""

    def __init__(self, repeats: int, seed: int) -> None:
        super().__init__(skill, seed=seed)
        self.repeats = repeats

    async def evaluate(self, candidate: Candidate, examples: Dataset, **options: Any) -> EvaluationResult:
        result = await super().evaluate(candidate, examples, **options)
        rows = [replace(row, repeat=repeat) for row in result.rows for repeat in range(self.repeats)]
        return EvaluationResult(candidate, examples, tuple(rows))


@dataclass
class Ran:
    outcome: Outcome
    events: list[Event]
    search: Search
    source: Any
    incomplete: list[str]
    """Candidates that were accepted before all their validation rows were there."""


def run(driver: str, optimizer: Any = None, *, source: Any = None, seed: int = 0, **changes: Any) -> Ran:
    events: list[Event] = []
    incomplete: list[str] = []
    rows = source or SyntheticRows(skill, seed=seed)

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, CandidateAccepted) and len(scores(search, event.candidate)) < len(validation):
            incomplete.append(event.candidate)

    async def sleep(_seconds: float) -> None:
        return

    setup = Setup(
        run_id="r",
        program_name="synthetic",
        specs={name: ParameterSpec(name=name, kind="prompt", default="start") for name in NAMES},
        source=rows,
        optimizer=optimizer or Numbered(),
        driver=resolve_driver(driver)[0],
        splits=splits(train=24, validation=24, test=40, seed=seed),
        budget=Budget(rollouts=500),
        emit=emit,
        options=TuneOptions(screen_size=6, block_size=8),
        seed=seed,
        sleep=sleep,
    )
    setup = replace(setup, **changes)
    validation = setup.splits["validation"]
    search = Search(setup)
    return Ran(asyncio.run(search.run()), events, search, rows, incomplete)


def scores(search: Search, key: str) -> dict[str, float]:
    return search.board._scores.get((key, "validation"), {})


def dicts(events: Sequence[Event]) -> list[str]:
    return [json.dumps({"kind": event.kind, **event.to_dict()}, sort_keys=True) for event in events]


@every_driver
@pytest.mark.parametrize("rollouts", [141, 190, 500])
@pytest.mark.parametrize("repeats", [1, 2])
def test_no_bound_is_exceeded_and_the_run_says_why_it_ended(driver: str, rollouts: int, repeats: int) -> None:
    options = TuneOptions(screen_size=6, block_size=8, repeats=repeats)
    source = Repeated(repeats, rollouts)
    ran = run(driver, source=source, budget=Budget(rollouts=rollouts * repeats), options=options, seed=rollouts)
    assert len(set(source.asked)) * repeats == ran.search.ledger.rollouts
    assert ran.search.ledger.rollouts <= rollouts * repeats
    assert ran.outcome.stop_reason
    assert ran.incomplete == []
    assert ran.outcome.claim.status != "no_claim", "the final test has kept its share"


@every_driver
@pytest.mark.parametrize("proposals", [1, 3, 12])
def test_the_bound_on_proposals_holds(driver: str, proposals: int) -> None:
    ran = run(driver, budget=Budget(rollouts=900, proposals=proposals), seed=proposals)
    made = sum(len(event.updates) for event in ran.events if isinstance(event, ProposalMade))
    assert 0 < made <= proposals
    assert ran.search.ledger.proposals <= proposals
    assert ran.outcome.stop_reason


@every_driver
def test_the_same_seed_gives_the_same_run_and_another_one_another(driver: str) -> None:
    first, again, other = run(driver, seed=3), run(driver, seed=3), run(driver, seed=4)
    assert dicts(first.events) == dicts(again.events)
    assert first.source.asked == again.source.asked
    assert dicts(first.events) != dicts(other.events)


@every_driver
def test_a_true_gain_is_found(driver: str) -> None:
    gains = [skill(run(driver, seed=seed, budget=Budget(rollouts=900)).outcome.best) - 0.4 for seed in range(3)]
    assert sum(gain > 0 for gain in gains) >= 2
    assert sum(gains) / 3 >= 0.15


@every_driver
def test_every_candidate_is_accounted_for(driver: str) -> None:
    """Nobody is accepted twice, every rejection has a reason, and what was kept is in the outcome."""
    ran = run(driver, seed=5, budget=Budget(rollouts=900))
    accepted = [event.candidate for event in ran.events if isinstance(event, CandidateAccepted)]
    rejected = [event for event in ran.events if isinstance(event, CandidateRejected)]
    assert len(accepted) == len(set(accepted))
    assert all(event.reason for event in rejected)
    assert [candidate.hash for candidate in ran.outcome.kept][1:] == accepted
    assert ran.outcome.best in ran.outcome.kept
    turns = [event.iteration for event in ran.events if isinstance(event, Spend)]
    assert turns == list(range(len(turns)))


@every_driver
def test_an_optimizer_that_repeats_itself_gets_nobody_in_twice(driver: str) -> None:
    class Few:
        name = "few"

        def propose(self, context: ProposeContext) -> list[Update]:
            names = sorted(context.specs)
            return [
                Update(
                    (SetText(names[(context.seed + at) % len(names)], f"{(context.seed + at) % 5}-x"),), source="few"
                )
                for at in range(context.count)
            ]

    ran = run(driver, Few(), seed=1, budget=Budget(rollouts=900))
    accepted = [event.candidate for event in ran.events if isinstance(event, CandidateAccepted)]
    assert len(accepted) == len(set(accepted))
    assert len({candidate.hash for candidate in ran.outcome.kept}) == len(ran.outcome.kept)
    assert ran.incomplete == []


# --- optimizers that do no good ---


class Garbage:
    """One kind of nonsense after the other."""

    name = "garbage"

    def __init__(self) -> None:
        self.at = 0

    def propose(self, context: ProposeContext) -> Any:
        self.at += 1
        wrong = Update((SetText("no such parameter", "x"),), source=self.name)
        nonsense: list[Any] = [None, "just text", [], 7, [object()], [Update(())], [wrong], {"edits": []}]
        texts = [Update((SetText(NAMES[self.at % 2], f"worthless {self.at}"),), source=self.name)]
        return [*nonsense, texts, texts, texts][(self.at * 7) % 11]


@every_driver
def test_garbage_never_makes_it_worse_and_never_crashes(driver: str) -> None:
    def accuracy(candidate: Candidate) -> float:
        return 0.05 if any("worthless" in str(candidate.get(name)) for name in NAMES) else 0.6

    for seed in range(2):
        try:
            ran = run(driver, Garbage(), source=SyntheticRows(accuracy, seed=seed), seed=seed)
        except RunError as error:
            assert "in a row failed" in str(error)
        else:
            assert ran.outcome.best == ran.outcome.baseline


@every_driver
def test_an_optimizer_that_always_fails_ends_the_run_clearly(driver: str) -> None:
    class Broken:
        name = "broken"

        def propose(self, context: ProposeContext) -> Any:
            raise ValueError("cannot think")

    with pytest.raises(RunError, match=r"3 iterations in a row failed; .*cannot think"):
        run(driver, Broken(), options=TuneOptions(screen_size=6, max_failures=3))


@every_driver
def test_an_optimizer_without_ideas_ends_the_run(driver: str) -> None:
    class Empty:
        name = "empty"
        asked = 0

        def propose(self, context: ProposeContext) -> list[Update]:
            self.asked += 1
            return []

    optimizer = Empty()
    ran = run(driver, optimizer, budget=Budget(rollouts=2000))
    assert ran.outcome.stop_reason == "the optimizer has nothing new to propose"
    assert optimizer.asked <= 14  # a dozen proposals asked for one at a time, and the turn they end in
    assert ran.outcome.best == ran.outcome.baseline


SECRET = "the quick auditor filed seven blue invoices before lunch on day"


@every_driver
def test_copied_training_text_is_stopped(driver: str) -> None:
    class Leaking:
        name = "leaking"

        def propose(self, context: ProposeContext) -> list[Update]:
            text = str(context.train[context.iteration % len(context.train)].inputs["text"])
            name = sorted(context.specs)[0]
            return [Update((SetText(name, f"Remember: {text}"),), source=self.name)]

    def accuracy(candidate: Candidate) -> float:
        return 0.99 if "auditor" in str(dict(candidate.values)) else 0.5

    def rows(name: str, count: int) -> Dataset:
        made = (Example(inputs={"text": f"{SECRET} {name} {i}"}, expected=("yes", "no")[i % 2]) for i in range(count))
        return Dataset(name, made)

    data = {"train": rows("train", 24), "validation": rows("validation", 24), "test": rows("test", 40)}
    events: list[Event] = []
    ran = run(driver, Leaking(), source=SyntheticRows(accuracy), splits=data, emit=events.append)
    assert "refused" in ran.outcome.stop_reason
    assert ran.outcome.best == ran.outcome.baseline
    assert {event.stage for event in events if isinstance(event, CandidateRejected)} == {"leak"}
    assert not any(isinstance(event, CandidateAccepted) for event in events)


# --- replay ---


@dataclass(frozen=True)
class Stored:
    kind: str
    payload: dict[str, Any]


class Silent:
    """Fails the run when it is asked."""

    name = "numbered"

    def propose(self, context: ProposeContext) -> Any:
        raise AssertionError("asked again")


@every_driver
def test_stored_proposals_give_the_same_run_without_asking_again(driver: str) -> None:
    first = run(driver, seed=7)
    stored = [Stored(event.kind, json.loads(json.dumps(event.to_dict()))) for event in first.events]
    again = run(driver, Silent(), seed=7, replay=Replay(stored))
    assert dicts(again.events) == dicts(first.events)
    assert again.outcome.best == first.outcome.best


class Wandering:
    """Edits what it was not asked about."""

    name = "wandering"

    def __init__(self) -> None:
        self.made = 0

    def propose(self, context: ProposeContext) -> list[Update]:
        self.made += 1
        other = [name for name in NAMES if name not in context.specs]
        return [Update((SetText(name, f"{self.made}"),), source=self.name) for name in other]


@pytest.mark.parametrize("driver", ["pareto", "bayes"])
def test_a_parameter_that_was_not_asked_about_stays(driver: str) -> None:
    ran = run(driver, Wandering(), budget=Budget(rollouts=3000))
    assert "refused" in ran.outcome.stop_reason
    assert {event.stage for event in ran.events if isinstance(event, CandidateRejected)} == {"edit"}
    assert ran.outcome.best == ran.outcome.baseline


def test_several_questions_about_one_parent_in_one_turn_have_places_of_their_own() -> None:
    ran = run("bayes", seed=2)
    first = [event for event in ran.events if isinstance(event, ProposalMade) and event.iteration == 0]
    assert [event.place for event in first] == [0, 1]
    assert len({event.parent for event in first}) == 1
    touched = [{edit["name"] for update in event.updates for edit in update["edits"]} for event in first]
    assert touched == [{NAMES[0]}, {NAMES[1]}]
    replayed = Replay([Stored(event.kind, event.to_dict()) for event in first])
    found = [replayed.proposal(0, first[0].parent, place) for place in range(3)]
    assert [made and made.updates for made in found] == [first[0].updates, first[1].updates, None]


@every_driver
def test_replaying_any_beginning_ends_the_same(driver: str) -> None:
    first = run(driver, seed=9)
    for share in (0.3, 0.8):
        stored = [Stored(event.kind, event.to_dict()) for event in first.events[: int(len(first.events) * share)]]
        assert dicts(run(driver, seed=9, replay=Replay(stored)).events) == dicts(first.events)


# --- claims ---


@pytest.mark.slow
@every_driver
def test_random_labels_false_claims_f6(driver: str) -> None:
    """No candidate is better than any other: `improved` must stay within its 5 %."""
    claims: Counter[str] = Counter()
    for seed in range(40):
        source = SyntheticRows(lambda _candidate: 0.5, seed=seed)
        ran = run(driver, source=source, seed=seed, budget=Budget(rollouts=320))
        claims[ran.outcome.claim.status] += 1
    assert claims["no_claim"] == 0
    assert claims["not_improved"] + claims["improved"] + claims["worse"] >= 5, "some runs must get past the gate"
    assert binomial_lower_bound(claims["improved"], 40, confidence=0.99) <= 0.05


# --- objectives ---


class Weighed:
    """Every candidate has the same scores; what it costs in prompt tokens is the length of its texts."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []

    async def evaluate(
        self,
        candidate: Candidate,
        examples: Dataset,
        *,
        ids: Sequence[str] | None = None,
        keep_traces: Any = None,
        on_row: Callable[[EvaluationRow], None] | None = None,
    ) -> EvaluationResult:
        tokens = sum(len(str(candidate.get(name))) for name in NAMES)
        made: list[EvaluationRow] = []
        for row_id in examples.ids if ids is None else ids:
            score = float(uniform(row_id) < 0.6)
            usage = Usage(input_tokens=tokens, output_tokens=1, calls=1)
            made.append(EvaluationRow(candidate.hash, examples.id, row_id, 0, 0, score, usage=usage))
            if on_row is not None:
                on_row(made[-1])
        return EvaluationResult(candidate, examples, tuple(made))


class Shortening:
    """Texts of other lengths, most of them shorter."""

    name = "shortening"

    def propose(self, context: ProposeContext) -> list[Update]:
        made: list[Update] = []
        for place in range(context.count):
            name = sorted(context.specs)[place % len(context.specs)]
            length = (context.seed + 17 * place) % 60 + 1
            made.append(Update((SetText(name, "w" * length),), source=self.name))
        return made


LONG = {name: ParameterSpec(name=name, kind="prompt", default="x" * 40) for name in NAMES}


@every_driver
def test_a_cheaper_candidate_of_equal_score_counts_only_when_tokens_are_an_objective(driver: str) -> None:
    options = TuneOptions(screen_size=6, block_size=8)
    plain = run(driver, Shortening(), source=Weighed(), specs=LONG, options=options)
    assert plain.outcome.best == plain.outcome.baseline
    both = run(
        driver, Shortening(), source=Weighed(), specs=LONG, options=replace(options, objectives=("score", "tokens"))
    )
    assert both.incomplete == []
    assert len(both.outcome.kept) > 1
    length = sum(len(str(both.outcome.best.get(name))) for name in NAMES)
    assert length < 80, "the cheaper one is chosen"
    assert length == min(sum(len(str(kept.get(name))) for name in NAMES) for kept in both.outcome.kept)


class Learned(SyntheticRows):
    """The program solves every training row and half of the others."""

    known = frozenset(splits(train=24, validation=24, test=40)["train"].ids)

    def score(self, candidate: Candidate, example_id: str) -> float:
        return float(example_id in self.known or uniform(example_id) < 0.5)


@pytest.mark.parametrize("driver", [name for name in DRIVER_NAMES if name != "bayes"])
def test_solved_training_rows_end_the_search_in_a_few_turns_and_the_reason_says_so(driver: str) -> None:
    ran = run(driver, source=Learned(skill, seed=0), budget=Budget(rollouts=2000))
    assert "every training row is solved" in ran.outcome.stop_reason
    assert sum(isinstance(event, Spend) for event in ran.events) <= 20


@every_driver
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rollouts", [141, 231, 321, 456])
def test_whoever_was_measured_has_an_outcome_wherever_the_budget_ends(driver: str, rollouts: int, seed: int) -> None:
    ran = run(driver, seed=seed, budget=Budget(rollouts=rollouts))
    told = {event.candidate for event in ran.events if isinstance(event, CandidateAccepted | CandidateRejected)}
    measured = {candidate for candidate, _, _ in ran.source.asked} - {ran.outcome.baseline.hash}
    assert measured <= told
