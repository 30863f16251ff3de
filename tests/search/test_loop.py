"""The whole loop with scripted optimizers on synthetic rows: failures, stops, warnings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from agentopt.errors import RunError, UserError
from agentopt.evaluation import Dataset, EvaluationResult
from agentopt.graph import Candidate, SetText, SetValue
from agentopt.models import LMRateLimit, LMRefused
from agentopt.optimizers import ProposeContext, Update
from agentopt.search import (
    Budget,
    CandidateRejected,
    Event,
    Greedy,
    MinibatchSkipped,
    ProposalMade,
    SearchState,
    Step,
    TuneOptions,
    resolve_driver,
)
from agentopt.search._data import check_splits, make_splits
from agentopt.search._loop import Outcome, Search, Setup
from agentopt.search._simulate import PARAMETER, SyntheticRows, TextPool, rows, spec, splits, uniform

GOOD = 0.9


class Scripted:
    """Answers of a list, one per call; a callable gets the context, an exception is raised; the last one stays."""

    name = "scripted"

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.contexts: list[ProposeContext] = []

    def propose(self, context: ProposeContext) -> Any:
        self.contexts.append(context)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer(context) if callable(answer) else answer


def text(value: str) -> Update:
    return Update((SetText(PARAMETER, value),), source="scripted")


def accuracy(candidate: Candidate) -> float:
    value = str(candidate.get(PARAMETER))
    return GOOD if "good" in value else 0.45


def search(optimizer: Any, **changes: Any) -> tuple[Search, list[Event], list[float]]:
    events: list[Event] = []
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    setup = Setup(
        run_id="r1",
        program_name="synthetic",
        specs={PARAMETER: spec()},
        source=SyntheticRows(accuracy),
        optimizer=optimizer,
        driver=Greedy(),
        splits=splits(train=40, validation=40, test=60),
        budget=Budget(rollouts=1200),
        emit=events.append,
        sleep=sleep,
    )
    return Search(replace(setup, **changes)), events, waits


def run(optimizer: Any, **changes: Any) -> tuple[Outcome, list[Event], list[float]]:
    made, events, waits = search(optimizer, **changes)
    return asyncio.run(made.run()), events, waits


def outcomes(events: Sequence[Event]) -> list[str]:
    return [event.outcome for event in events if isinstance(event, ProposalMade)]


@pytest.mark.parametrize("garbage", [None, "just text", 7, [None], [object()], {"edits": []}, [Update(())]])
def test_none_or_garbage_from_the_optimizer_is_a_recorded_outcome_d12(garbage: object) -> None:
    outcome, events, _ = run(Scripted(garbage, [text("good")], []))
    assert outcomes(events)[0] in {"none", "garbage"}
    assert outcome.best.get(PARAMETER) == "good"
    assert outcome.claim.status == "improved"


def test_only_propose_is_ever_called_on_an_optimizer_d13() -> None:
    class Bare:
        __slots__ = ("name",)

        def __init__(self) -> None:
            self.name = "bare"

        def propose(self, context: ProposeContext) -> list[Update]:
            return [text(f"good {context.iteration}")]

    outcome, _, _ = run(Bare())
    assert "good" in str(outcome.best.get(PARAMETER))


def test_an_async_optimizer_works_and_gets_the_whole_context() -> None:
    class Asynchronous:
        name = "asynchronous"
        contexts: list[ProposeContext] = []  # noqa: RUF012

        async def propose(self, context: ProposeContext) -> list[Update]:
            self.contexts.append(context)
            await asyncio.sleep(0)
            return [text("good"), text("worse")][: context.count]

    optimizer = Asynchronous()
    run(optimizer)
    first, second = optimizer.contexts[:2]
    assert len(first.rollouts) == 16 and first.iteration == 0 and first.history == ()
    assert {past.candidate_hash for past in second.history} and any(past.accepted for past in second.history)
    assert second.parent.get(PARAMETER) == "good"


def test_an_optimizer_that_always_raises_ends_with_a_clear_error_within_k_iterations_f6() -> None:
    optimizer = Scripted(ValueError("cannot think"))
    with pytest.raises(RunError, match=r"3 iterations in a row failed; .*: ValueError: cannot think.*--resume r1"):
        run(optimizer, options=TuneOptions(max_failures=3))
    assert len(optimizer.contexts) == 3


def test_a_failure_that_passes_does_not_end_the_run() -> None:
    outcome, events, _ = run(
        Scripted(ValueError("a"), None, [text("good")], ValueError("b"), []), options=TuneOptions(max_failures=3)
    )
    assert outcomes(events)[:4] == ["error", "none", "ok", "error"]
    assert outcome.claim.status == "improved"


def test_an_optimizer_at_429_for_a_minute_is_waited_out_f6() -> None:
    limited = LMRateLimit("429 too many requests", status=429, retryable=True)
    outcome, events, waits = run(Scripted(*[limited] * 5, [text("good")], []), options=TuneOptions(max_failures=2))
    assert waits[:5] == [2.0, 4.0, 8.0, 16.0, 32.0]
    assert sum(waits[:5]) >= 60
    assert outcomes(events)[:6] == ["error"] * 5 + ["ok"]
    assert outcome.claim.status == "improved"


def test_waiting_for_the_optimizer_is_bounded() -> None:
    limited = LMRateLimit("429", status=429, retryable=True)
    with pytest.raises(RunError, match="did not answer in"):
        run(Scripted(limited), options=TuneOptions(max_wait=100))


def test_a_refused_optimizer_call_is_not_waited_for() -> None:
    made, _, waits = search(Scripted(LMRefused("401 bad key", status=401)), options=TuneOptions(max_failures=2))
    with pytest.raises(RunError, match="401 bad key"):
        asyncio.run(made.run())
    assert waits == []


def test_bad_configuration_of_the_optimizer_is_bad_input() -> None:
    with pytest.raises(UserError, match="no template"):
        run(Scripted(UserError("no template")))


class Broken(SyntheticRows):
    """Rows that fail: all of them, or only those of proposals."""

    def __init__(
        self, *, when: Callable[[Candidate], bool], message: Callable[[int], str] = lambda _i: "Boom: x"
    ) -> None:
        super().__init__(lambda _c: 0.5)
        self.when = when
        self.message = message or (lambda _i: "Boom: x")

    async def evaluate(self, candidate: Candidate, examples: Dataset, **kw: Any) -> EvaluationResult:  # type: ignore[override]
        result = await super().evaluate(candidate, examples, **kw)
        if not self.when(candidate):
            return result
        failed = (replace(row, score=0.0, error=self.message(i)) for i, row in enumerate(result.rows))
        return replace(result, rows=tuple(failed))


def test_an_evaluator_that_always_raises_is_a_clear_error_at_once_f6() -> None:
    source = Broken(when=lambda _c: True)
    with pytest.raises(RunError, match="All of the first 16 baseline rollouts failed: Boom: x"):
        run(TextPool(), source=source)
    assert len(source.asked) == 16, "nothing is spent after that"


def test_an_evaluator_that_raises_on_every_proposal_ends_within_k_iterations_f6() -> None:
    source = Broken(when=lambda c: c.get(PARAMETER) != "start")
    with pytest.raises(RunError, match=r"3 iterations in a row failed; .*every rollout of every proposal failed: Boom"):
        run(TextPool(), source=source, options=TuneOptions(max_failures=3), budget=Budget(rollouts=5000))


def test_a_baseline_that_fails_in_many_ways_goes_on_with_a_warning() -> None:
    source = Broken(when=lambda c: c.get(PARAMETER) == "start", message=lambda i: f"ParseError: row {i}")
    outcome, _, _ = run(TextPool(), source=source)
    assert any("All of the first 16 baseline rollouts failed" in warning for warning in outcome.warnings)
    assert outcome.claim.status == "improved"


def test_illegal_and_leaking_updates_are_refused_with_a_reason_and_end_the_run() -> None:
    data = splits(train=40, validation=40, test=60)
    leak = "please classify: " + "one two three four five six"
    row = replace(data["test"][0], inputs={"text": "one two three four five six"})
    data["test"] = Dataset("test", [row, *data["test"][1:]])
    updates = [
        Update((SetText("unknown.name", "x"),)),
        Update((SetValue(PARAMETER, 3),)),
        text(leak),
        text("start"),
    ]
    optimizer = Scripted(updates)
    made, events, _ = search(optimizer, splits=data, options=TuneOptions(max_failures=2))
    outcome = asyncio.run(made.run())
    assert "nothing new to propose; at last all it proposed was refused" in outcome.stop_reason
    assert outcome.claim.status == "kept_baseline"
    rejected = [event for event in events if isinstance(event, CandidateRejected)]
    assert [event.stage for event in rejected[:4]] == ["edit", "edit", "leak", "duplicate"]
    assert "from a test example" in rejected[2].reason


def test_nothing_new_to_propose_ends_the_run_normally() -> None:
    outcome, events, _ = run(Scripted([text("good")], [text("good")], [text("good")], [text("good")]))
    assert outcome.stop_reason == "the optimizer has nothing new to propose"
    assert set(outcomes(events)) == {"ok"}, "proposing what is known is no failure"
    assert outcome.claim.status == "improved"


def test_perfect_minibatches_are_skipped_counted_and_end_the_run_gepa_46() -> None:
    def nearly(candidate: Candidate) -> float:
        del candidate
        return 0.999

    class Mostly(SyntheticRows):
        def score(self, candidate: Candidate, example_id: str) -> float:
            return 0.0 if example_id == hard else 1.0

    data = splits(train=40, validation=40, test=60)
    hard = data["validation"].ids[0]
    outcome, events, _ = run(TextPool(), source=Mostly(nearly), splits=data, options=TuneOptions(patience=5))
    assert sum(isinstance(event, MinibatchSkipped) for event in events) == 5
    assert outcome.stop_reason == "every training row is solved: there is nothing left to learn from"
    assert outcome.claim.status == "kept_baseline"


def test_a_perfect_baseline_stops_at_once() -> None:
    outcome, events, _ = run(TextPool(), source=SyntheticRows(lambda _c: 1.0))
    assert outcome.stop_reason == "every validation row is solved"
    assert outcomes(events) == []


def test_no_gain_stops_after_patience() -> None:
    outcome, _, _ = run(
        TextPool(),
        source=SyntheticRows(lambda c: 0.6 if c.get(PARAMETER) == "start" else 0.02),
        options=TuneOptions(patience=2, max_round=2),
        budget=Budget(rollouts=5000),
    )
    assert outcome.stop_reason == "no gain in 2 iterations"
    assert outcome.best == outcome.baseline


def test_same_seed_gives_the_same_run_whatever_the_concurrency() -> None:
    def outcome(concurrency: int, seed: int) -> tuple[str, list[Any]]:
        events: list[Event] = []
        found, events, _ = run(
            TextPool(),
            source=SyntheticRows(lambda c: 0.3 + 0.5 * uniform(c.hash)),
            options=TuneOptions(concurrency=concurrency),
            seed=seed,
        )
        return found.best.hash, [event.to_dict() for event in events]

    assert outcome(1, 0) == outcome(16, 0)
    assert outcome(1, 0) != outcome(1, 1)


def test_without_a_test_set_nothing_is_claimed() -> None:
    data = splits(train=40, validation=40)
    del data["test"]
    outcome, _, _ = run(Scripted([text("good")], []), splits=data)
    assert outcome.best.get(PARAMETER) == "good"
    assert outcome.claim.status == "no_claim"


def test_equal_and_overlapping_sets_are_warned_about_f6() -> None:
    same = rows("same", 40)
    warnings = check_splits({"train": same, "validation": same, "test": rows("test", 40)})
    assert warnings and "train and validation sets are the same rows" in warnings[0]
    copy = Dataset("other name", list(same))
    warnings = check_splits({"train": same, "validation": copy, "test": Dataset("t", [*rows("t", 40), same[0]])})
    assert len(warnings) == 3
    assert "same rows" in warnings[0] and "1 rows are in both the train and the test set" in warnings[1]


def test_equal_train_and_validation_sets_still_run() -> None:
    same = rows("same", 40)
    outcome, _, _ = run(Scripted([text("good")], []), splits={"train": same, "validation": same, "test": rows("t", 60)})
    assert outcome.best.get(PARAMETER) == "good"


def test_one_file_is_split_into_three_and_tiny_sets_are_refused() -> None:
    made = make_splits(rows("all", 200), None, None, seed=0)
    assert [len(made[name]) for name in ("train", "validation", "test")] == [100, 50, 50]
    assert len(make_splits(rows("all", 200), None, rows("t", 9), seed=0)["train"]) == 150
    assert "test" not in make_splits(rows("a", 20), rows("b", 20), None, seed=0)
    with pytest.raises(UserError, match="at least 2"):
        make_splits(rows("train", 20), rows("validation", 1), None, seed=0)
    with pytest.raises(UserError, match="too few"):
        make_splits(rows("all", 2), None, None, seed=0)


def test_drivers_are_resolved_by_name_or_given() -> None:
    driver, why = resolve_driver("auto")
    assert driver.name == "greedy" and why.startswith("auto")

    class Stop:
        name = "stop"

        def next(self, state: SearchState) -> Step | str:
            return f"enough after {state.iteration}"

    given = Stop()
    assert resolve_driver(given)[0] is given
    outcome, _, _ = run(TextPool(), driver=given)
    assert outcome.stop_reason == "enough after 0"
    with pytest.raises(UserError, match="expected auto, greedy"):
        resolve_driver("gradient")
    with pytest.raises(UserError, match="next"):
        resolve_driver(object())  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{"concurrency": 0}, {"timeout": 0}, {"drop_alpha": 1.0}, {"screen_size": 1}])
def test_options_out_of_range_are_bad_input(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        TuneOptions(**bad)
