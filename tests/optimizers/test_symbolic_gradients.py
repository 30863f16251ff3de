"""Losses and gradients: what is asked about a failing run, how it is gathered, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import agentopt as ao
from agentopt.evaluation import Dataset, EvaluationRow, Example, Rollout
from agentopt.graph import Candidate, declared_parameters
from agentopt.models import BudgetExhausted, LMRateLimit, LMRefused, Request
from agentopt.optimizers import ProposeContext, Symbolic, SymbolicOptions, load_templates
from agentopt.optimizers.symbolic import Gradient, gathered, trajectory_of
from agentopt.optimizers.symbolic._gradients import backward
from agentopt.optimizers.symbolic._work import LimitedLM, Work
from tests.optimizers import arena
from tests.optimizers.symbolic_model import Model, last, question

pytestmark = pytest.mark.anyio
TEXT = {"text": {"analysis": "", "text": "Process the item well."}}


def run(program: Callable[..., Any], inputs: dict[str, Any], *, score: float = 0.0, expected: Any = "x") -> Rollout:
    """One recorded run, scored as told."""
    error, output = None, None
    with ao.record("program") as recording:
        try:
            output = program(**inputs)
            recording.set_output(output)
        except ValueError as raised:
            error = f"ValueError: {raised}"
    example = Example("", inputs, expected)
    row = EvaluationRow("c", "d", example.id, 0, 0, score, None, {}, output, error)
    return Rollout(example, row, recording.trace)


def context(rollouts: list[Rollout], lm: Any, **changes: Any) -> ProposeContext:
    specs = {name: spec for name, spec in declared_parameters().items() if spec.kind == "prompt"}
    parent = Candidate({name: spec.default for name, spec in specs.items()})
    train = Dataset("train", [rollout.example for rollout in rollouts])
    return ProposeContext("program", parent, specs, train, rollouts, lm=lm, **changes)


def work(given: ProposeContext, **options: Any) -> Work:
    settings = SymbolicOptions(**options)
    lm = LimitedLM(given.lm, settings.max_calls)  # type: ignore[arg-type]
    return Work(given, lm, load_templates(), settings, settings.rate.at(0))


def writer() -> Callable[..., str]:
    """Drafts, then checks as often as `rounds` says; a draft of nothing takes another way."""
    draft_prompt = ao.prompt("Draft a text.", name="w.draft")
    check_prompt = ao.prompt("Check the text.", name="w.check")
    lm = ao.FunctionLM(lambda request: "a draft text of some length")

    @ao.step
    def draft(topic: str) -> str:
        return lm.complete_sync(system=draft_prompt, user=topic).text

    @ao.step
    def tidy(text: str) -> str:
        return text + " (tidied)"

    @ao.step
    def check(text: str) -> str:
        return lm.complete_sync(system=check_prompt, user=text).text + " checked"

    @ao.agent
    def write(topic: str, rounds: int) -> str:
        text = tidy(draft(topic))
        for _ in range(rounds):
            text = check(text)
        return text

    return write


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("scores", [True, False])
async def test_the_four_losses_show_and_ask_what_they_may(labels: bool, scores: bool) -> None:
    task = arena.RulesTask()
    model = Model({"comments": {"comments": "Wrong rule.", "score": 3}})
    made = work(await arena.context(task, model), labels=labels, scores=scores)
    await backward(made)
    asked = model.asked("comments")[0]
    assert ("The right answer: 'code" in question(asked)) == labels
    assert ("measured at 0 of 10" in question(asked)) == scores
    assert ("score" in (asked.schema or {})["properties"]) == (not scores)
    loss = made.cases[0].loss
    assert loss is not None
    assert loss.comments == "Wrong rule."
    assert (loss.score, loss.source) == ((0.0, "metric") if scores else (3.0, "label" if labels else "judge"))
    if not labels:
        assert all("code " not in question(request) for request in model.requests)


@pytest.mark.parametrize(("given", "score"), [("7", 7.0), (99, 10.0), (-3, 0.0), ("high", None), (None, None)])
async def test_a_score_is_brought_to_0_to_10_or_left_unknown(given: Any, score: float | None) -> None:
    model = Model({"comments": {"comments": "Wrong.", "score": given}})
    made = work(await arena.context(arena.RulesTask(), model), scores=False)
    await backward(made)
    assert {case.loss.score for case in made.cases if case.loss is not None} == {score}


async def test_a_case_whose_loss_fails_goes_on_without_one_and_is_recorded() -> None:
    task = arena.RulesTask()

    def comments(request: Request) -> Any:
        if "Parcel 1 of kind 2" in question(request):
            return "" if request.schema is None else LMRefused("no")
        return {"comments": "Wrong."}

    model = Model({"comments": comments, **TEXT})
    given = await arena.context(task, model)
    made = work(given)
    await backward(made)
    lost = [case for case in made.cases if case.loss is None]
    assert len(lost) == 1
    assert "kind 2" in str(lost[0].rollout.example.inputs)
    assert [(drop.source, lost[0].rollout.example.id in drop.problem) for drop in given.dropped] == [
        ("symbolic.loss", True)
    ]
    # It has a gradient nevertheless, made from the facts alone.
    assert any("Rule 2" in question(request) for request in model.asked("suggestion"))
    assert len(made.gradients["answer_item"]) == 1  # all say the same


async def test_the_metric_alone_can_be_the_loss() -> None:
    model = Model(TEXT)
    made = work(await arena.context(arena.RulesTask(), model), loss="metric")
    await backward(made)
    assert model.asked("comments") == []
    loss = made.cases[0].loss
    assert loss is not None
    assert "This rule was not followed" in loss.comments


async def test_good_cases_are_not_looked_at() -> None:
    program = writer()
    model = Model(TEXT)
    given = context([run(program, {"topic": "a", "rounds": 0}, score=1.0)], model)
    assert await Symbolic().propose(given) == []
    assert model.requests == []


# --- gradients -------------------------------------------------------------------------------------------------------


async def test_gradients_go_from_the_last_call_to_the_first_and_demands_pass_through() -> None:
    program = writer()

    def gradient(request: Request) -> dict[str, str]:
        node = question(request).split("The call you look at: ")[1].split(",")[0]
        return {"suggestion": f"{node} better", "demand_on_previous": f"{node} wants more"}

    model = Model({"suggestion": gradient})
    made = work(context([run(program, {"topic": "sea", "rounds": 2})], model))
    await backward(made)
    asked = [question(request) for request in model.asked("suggestion")]
    order = [text.split("The call you look at: ")[1].split("\n")[0] for text in asked]
    assert order == ["check, its call number 2.", "check, its call number 1.", "draft, its call number 1."]
    # `tidy` has nothing to tune: it is not asked, and what `check` demands reaches `draft` through it.
    assert "check: check wants more" in question(model.asked("suggestion")[2])
    assert "nothing came after it" in question(model.asked("suggestion")[0])
    checks = made.gradients["check"]
    assert [(found.call_index, found.parameters) for found in checks] == [(0, ("w.check",))]
    assert set(made.gradients) == {"check", "draft"}
    trace = made.cases[0].rollout.trace
    assert trace is not None
    assert {trace.ops[number].op for number in made.gradients["draft"][0].evidence} == {"draft", "lm"}


async def test_S5_runs_of_different_length_and_branch_reach_the_right_nodes() -> None:
    program = writer()
    branch_prompt = ao.prompt("Say why not.", name="w.branch")

    @ao.step
    def decline(topic: str) -> str:
        return f"{branch_prompt} {topic}"

    @ao.agent
    def entry(topic: str, rounds: int) -> str:
        return decline(topic) if topic == "no" else program(topic, rounds)

    def gradient(request: Request) -> dict[str, str]:
        text = question(request)
        node, _, rest = text.split("The call you look at: ")[1].partition(", its call number ")
        topic = text.split("topic = '")[1].split("'")[0]
        return {"suggestion": f"{node} call {rest[0]} of {topic}", "demand_on_previous": ""}

    rollouts = [
        run(entry, {"topic": topic, "rounds": rounds}) for topic, rounds in (("no", 0), ("one", 1), ("three", 3))
    ]
    made = work(context(rollouts, Model({"suggestion": gradient})))
    await backward(made)
    found = {node: [item.suggestion for item in items] for node, items in made.gradients.items()}
    assert found["decline"] == ["decline call 1 of no"]
    assert found["draft"] == ["draft call 1 of one", "draft call 1 of three"]
    assert found["check"] == [
        "check call 1 of one",
        "check call 1 of three",
        "check call 2 of three",
        "check call 3 of three",
    ]
    for node, items in made.gradients.items():
        assert {name for item in items for name in item.parameters} == {
            {"decline": "w.branch", "draft": "w.draft", "check": "w.check"}[node]
        }


def test_gradients_are_gathered_by_name_without_duplicates() -> None:
    gradients = [
        Gradient("a", 0, "Say it clearly.", "", (1,)),
        Gradient("b", 0, "Say it clearly.", "", (2,)),
        Gradient("a", 1, "say it CLEARLY", "", (3,)),
        Gradient("a", 2, "Say more.", "", (4,)),
    ]
    found = gathered(gradients)
    assert {node: [item.evidence for item in items] for node, items in found.items()} == {
        "a": [(1,), (4,)],
        "b": [(2,)],
    }


async def test_calls_are_linear_in_the_run_and_bounded() -> None:
    program = writer()
    counts: dict[int, int] = {}
    for rounds in (1, 3, 6):
        model = Model({})
        made = work(context([run(program, {"topic": "sea", "rounds": rounds})], model), visits=50, max_calls=100)
        await backward(made)
        counts[rounds] = len(model.requests)
    assert counts == {1: 1 + 2, 3: 1 + 4, 6: 1 + 7}
    model = Model({})
    given = context([run(program, {"topic": f"sea {number}", "rounds": 20}) for number in range(6)], model)
    await backward(work(given, visits=8, max_calls=24))
    assert len(model.requests) <= 12
    assert any("earlier calls get no gradient" in drop.problem for drop in given.dropped)


async def test_the_limit_on_calls_holds_for_the_whole_step() -> None:
    task = arena.RulesTask()
    model = Model({"text": "nothing readable {"})
    given = await arena.context(task, model, count=4)
    assert await Symbolic(SymbolicOptions(max_calls=8, cases=2)).propose(given) == []
    assert len(model.requests) <= 2 * 8  # the client may ask once more for a form that was missed


async def test_a_model_that_needs_two_calls_for_an_answer_still_gets_to_the_updates() -> None:
    class Plain(Model):
        def _reply(self, request: Request) -> Any:
            return "no form" if request.schema is not None else super()._reply(request)

    program = writer()
    model = Plain({"text": {"analysis": "", "text": "Write a better draft."}})
    given = context([run(program, {"topic": f"sea {number}", "rounds": 6}) for number in range(6)], model)
    assert await Symbolic(SymbolicOptions(max_calls=24)).propose(given)


async def test_a_failed_call_shows_its_error_and_a_run_without_trace_is_one_call() -> None:
    program = writer()

    @ao.agent
    def breaks(topic: str) -> str:
        program(topic, 0)
        raise ValueError("no such sea")

    rollout = run(breaks, {"topic": "sea"})
    model = Model({})
    await backward(work(context([rollout], model)))
    assert "no such sea" in question(model.asked("comments")[0])
    bare = Rollout(rollout.example, rollout.row, None)
    [visit] = trajectory_of(bare, ["w.draft"], [], "program").visits
    assert (visit.node, visit.reads, visit.error) == ("program", ("w.draft",), "ValueError: no such sea")


# --- failures of the model -------------------------------------------------------------------------------------------


class Failing:
    """A model whose calls fail, its own waiting and trying again included."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def complete(self, *_: Any, **__: Any) -> Any:
        raise self.error


@pytest.mark.parametrize("error", [LMRateLimit("slow", retryable=True), BudgetExhausted("no money")])
async def test_F6_transport_errors_and_an_empty_budget_reach_the_search(error: Exception) -> None:
    given = await arena.context(arena.RulesTask(), Failing(error))
    with pytest.raises(type(error)):
        await Symbolic().propose(given)


async def test_a_model_that_refuses_everything_is_an_error() -> None:
    refused: Any = lambda _: LMRefused("wrong key")  # noqa: E731
    given = await arena.context(arena.RulesTask(), Model({"comments": refused, "suggestion": refused}))
    with pytest.raises(LMRefused):
        await Symbolic().propose(given)


async def test_equal_contexts_give_equal_updates_and_requests() -> None:
    task = arena.RulesTask()
    sent: list[set[str]] = []
    updates: list[Any] = []
    for _ in range(2):
        model = Model({**TEXT, "suggestion": lambda request: {"suggestion": question(request)[-40:]}})
        updates.append(await Symbolic().propose(await arena.context(task, model, count=2)))
        sent.append({request.key() for request in model.requests})
    assert updates[0] == updates[1] != []
    assert sent[0] == sent[1]


async def test_fragments_can_be_replaced(tmp_path: Any) -> None:
    path = tmp_path / "words.txt"
    path.write_text("=== symbolic.loss ===\nJudge this: {output} {form}\n", encoding="utf-8")
    model = Model(TEXT)
    await Symbolic(template=path).propose(await arena.context(arena.RulesTask(), model))
    assert question(model.asked("comments")[0]).startswith("Judge this: 'unsure")
    assert last(model.asked("comments")[0])
