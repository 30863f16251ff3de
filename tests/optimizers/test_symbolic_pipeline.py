"""The pipeline part of symbolic learning: analysis, edits, static checks, and a writer that learns to check."""

from __future__ import annotations

from typing import Any

import pytest

import agentopt as ao
from agentopt.evaluation import Dataset, EvaluationOptions, Evaluator, Example, load_program, resolve_metric
from agentopt.graph import (
    AddNode,
    Candidate,
    DeleteNode,
    MoveNode,
    RewireNodes,
    SetEdges,
    SetNodeDescription,
    SetNodePrompt,
    apply_edits,
    declared_parameters,
)
from agentopt.models import ModelsConfig, Request, use
from agentopt.optimizers import ProposeContext, Symbolic, SymbolicOptions
from tests.optimizers.symbolic_model import Model, last, question

pytestmark = pytest.mark.anyio
PIPELINE = SymbolicOptions(kinds=("pipeline",))
CHECK = {
    "operation": "add_node", "node": "check", "after": "write", "to": [], "description": "corrects the draft",
    "role": "", "task": "Correct the mistakes of this draft: {write}", "output_format": "", "route": "",
    "route_prompt": "", "route_field": "", "route_cases": [], "max_visits": 0,
}  # fmt: skip
EMPTY = {key: type(value)() for key, value in CHECK.items()}


def operation(kind: str, **fields: Any) -> dict[str, Any]:
    return {**EMPTY, "operation": kind, **fields}


def agent(request: Request) -> str:
    """Writes with a mistake; corrects it when asked to; routes to the first choice."""
    text = last(request)
    if request.choices:
        return request.choices[0]
    topic = text.split("about ")[-1].split(":")[-1].strip(" .")
    return topic.replace("(with a mistake)", "(right)") if "Correct" in text else f"{topic} (with a mistake)"


def writer(nodes: Any = None, **more: Any) -> ao.Pipeline:
    return ao.Pipeline({"nodes": nodes or {"write": "Write about {topic}."}, **more}, name="flow")


def data(name: str, count: int, start: int = 0) -> Dataset:
    rows = [Example("", {"topic": f"sea{number}"}, f"sea{number} (right)") for number in range(start, start + count)]
    return Dataset(name, rows)


async def recorded(pipeline: Any, lm: Any, **changes: Any) -> ProposeContext:
    train = data("train", 4)
    specs = dict(declared_parameters())
    parent = Candidate({name: spec.default for name, spec in specs.items()})
    evaluator = Evaluator(load_program(pipeline), resolve_metric("exact_match"), EvaluationOptions(keep_traces="all"))
    with use(ModelsConfig({"agent": ao.FunctionLM(agent)})):
        result = await evaluator.evaluate(parent, train)
    return ProposeContext("writer", parent, specs, train, list(result.rollouts), lm=lm, **changes)


def model(*operations: Any, **answers: Any) -> Model:
    found = {"change": {"analysis": "Nobody checks the draft.", "change": True}}
    return Model({**found, "operations": {"operations": list(operations)}, **answers})


async def test_the_structure_is_analysed_before_it_is_edited() -> None:
    lm = model(CHECK)
    context = await recorded(writer(), lm)
    [update] = await Symbolic(PIPELINE).propose(context)
    [edit] = update.edits
    assert isinstance(edit, AddNode)
    assert (edit.node, edit.after) == ("check", "write")
    analysis, editing = question(lm.asked("change")[0]), question(lm.asked("operations")[0])
    assert "node write: (no description)" in analysis
    assert "flow.write(" in analysis
    assert "What has to change: Nobody checks the draft." in editing
    child = apply_edits(context.parent, update.edits, context.specs)
    assert child.get("flow")["edges"] == {"write": ["check"], "check": ["end"]}  # type: ignore[index, call-overload]


async def test_no_change_is_an_answer() -> None:
    lm = model(CHECK, change={"analysis": "Only the wording is bad.", "change": False})
    context = await recorded(writer(), lm)
    assert await Symbolic(PIPELINE).propose(context) == []
    assert lm.asked("operations") == []
    assert context.dropped == []


CHAIN = {"a": "Begin with {topic}.", "b": "Go on with {a}.", "c": "End with {b}."}


@pytest.mark.parametrize(
    ("given", "edit"),
    [
        (operation("delete_node", node="b"), DeleteNode("flow", "b")),
        (operation("move_node", node="c", after="a", task="x"), MoveNode("flow", "c", "a")),
        (
            operation("set_edges", node="c", to=["a", "end"], route="llm", route_prompt="Again?", max_visits=2),
            SetEdges("flow", "c", ("a", "end"), 2, {"kind": "llm", "prompt": "Again?"}),
        ),
        (operation("set_description", node="b", description="goes on"), SetNodeDescription("flow", "b", "goes on")),
    ],
)
async def test_operations_become_edits(given: dict[str, Any], edit: Any) -> None:
    nodes = dict(CHAIN, c="End with {previous}.") if given["operation"] == "move_node" else CHAIN
    context = await recorded(writer(nodes), model(given))
    [update] = await Symbolic(PIPELINE).propose(context)
    assert update.edits == (edit,)
    apply_edits(context.parent, update.edits, context.specs)


async def test_several_changes_of_edges_are_made_together() -> None:
    nodes = {name: text.replace("{a}", "{previous}").replace("{b}", "{previous}") for name, text in CHAIN.items()}
    moved = [operation("set_edges", node=node, to=[to]) for node, to in (("a", "c"), ("c", "b"), ("b", "end"))]
    context = await recorded(writer(nodes), model(*moved))
    [update] = await Symbolic(PIPELINE).propose(context)
    assert update.edits == (RewireNodes("flow", {"a": ["c"], "c": ["b"], "b": ["end"]}),)


async def test_S6_routes_that_nobody_changed_stay() -> None:
    cases = {"kind": "field", "field": "next", "cases": {"more": "write"}}
    nodes = {"write": {"prompt": "Write about {topic}."}, "judge": {"prompt": "Judge {write}.", "route": cases}}
    pipeline = writer(nodes, edges={"write": ["judge"], "judge": ["end", "write"]})
    context = await recorded(pipeline, model(CHECK))
    [update] = await Symbolic(PIPELINE).propose(context)
    child: Any = apply_edits(context.parent, update.edits, context.specs).get("flow")
    assert child["nodes"]["judge"]["route"]["kind"] == "field"
    assert child["nodes"]["judge"]["route"]["cases"] == {"more": "write"}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (operation("set_edges", node="write", to=["nowhere"]), "nowhere"),
        (operation("delete_node", node="write"), "only node"),
        (operation("add_node", node="check", after="write", task="Check {missing}."), "missing"),
        (operation("add_node", node="check", after="write"), "task"),
        (operation("set_edges", node="write", to=["write"]), "end cannot be reached"),
        (operation("set_route", node="write", route="field"), "route"),
        (operation("explode", node="write"), "is none of"),
    ],
)
async def test_S6_illegal_structures_are_sent_back_three_times_then_dropped(
    given: dict[str, Any], problem: str
) -> None:
    lm = model(given)
    context = await recorded(writer(), lm)
    assert await Symbolic(PIPELINE).propose(context) == []
    conversation = [request for request in lm.requests if lm.kind(request) == "operations"]
    turns = [request for request in conversation if len(request.messages) > 2]
    assert len(turns) >= 3
    assert problem in last(conversation[-1])
    assert [drop.tries for drop in context.dropped] == [4]


async def test_single_kind_updates_come_with_one_that_combines_them() -> None:
    text = {"analysis": "", "text": "Write well about {topic}."}
    context = await recorded(writer(), model(CHECK, text=text, rules={"analysis": "", "rules": []}), count=3)
    options = SymbolicOptions(components=("task",))
    updates = await Symbolic(options).propose(context)
    assert [update.source for update in updates] == ["symbolic.pipeline", "symbolic.prompt", "symbolic.all"]
    assert [type(edit) for edit in updates[2].edits] == [AddNode, SetNodePrompt]
    apply_edits(context.parent, updates[2].edits, context.specs)


async def test_in_rounds_one_kind_is_changed_per_iteration() -> None:
    text = {"analysis": "", "text": "Write well about {topic}."}
    options = SymbolicOptions(components=("task",), order="round")
    sources: list[str] = []
    for iteration in range(3):
        context = await recorded(writer(), model(CHECK, text=text), count=1, iteration=iteration)
        sources += [update.source for update in await Symbolic(options).propose(context)]
    assert sources == ["symbolic.pipeline", "symbolic.prompt", "symbolic.pipeline"]


async def tuned(lm: Any, rollouts: int = 300) -> ao.TuneResult:
    return await ao.atune(
        writer(),
        train=data("train", 16),
        val=data("val", 16, 100),
        test=data("test", 40, 200),
        metric="exact_match",
        optimizer="symbolic-pipeline",
        budget=ao.Budget(rollouts=rollouts),
        options=ao.TuneOptions(screen_size=4, max_failures=50),
        models={"agent": ao.FunctionLM(agent), "optimizer": lm},
        store=":memory:",
    )


async def test_a_perfect_model_gives_the_writer_a_checker() -> None:
    result = await tuned(model(CHECK))
    assert (result.validation["baseline"], result.validation["best"]) == (0.0, 1.0)
    best: Any = result.best.get("flow")
    assert list(best["nodes"]) == ["write", "check"]
    assert result.claim.status == "improved"


async def test_a_garbage_model_is_never_worse() -> None:
    perfect = model(CHECK)
    lm = ao.OracleLM(lambda request: perfect._reply(request), quality=0.0, name="garbage")
    result = await tuned(lm, 150)
    assert result.validation["best"] >= result.validation["baseline"]


async def test_a_leaking_model_is_stopped() -> None:
    copied = "\n".join(f"{row.inputs['topic']} is the sea of the example number {row.id}" for row in data("train", 16))
    # The topics are one word each; a leak has to copy five words of a row.
    rows = [Example("", {"topic": f"the far and wide old sea {n}"}, f"sea {n}") for n in range(40)]
    leak = dict(CHECK, task=f"Correct {{write}}. Known: {rows[0].inputs['topic']}. {copied}")
    result = await ao.atune(
        writer(),
        train=Dataset("train", rows[:16]),
        val=Dataset("val", rows[16:32]),
        metric="exact_match",
        optimizer="symbolic-pipeline",
        budget=ao.Budget(rollouts=150),
        options=ao.TuneOptions(screen_size=4, max_failures=50),
        models={"agent": ao.FunctionLM(agent), "optimizer": model(leak)},
        store=":memory:",
    )
    assert "far and wide" not in str(result.best.to_dict())
