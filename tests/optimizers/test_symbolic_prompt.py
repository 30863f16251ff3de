"""The prompt part of symbolic learning: components one by one, variables kept, retries counted, and whole runs."""

from __future__ import annotations

from typing import Any

import pytest

import agentopt as ao
from agentopt.graph import (
    AddDemo,
    AddPrinciple,
    Candidate,
    CountPrinciples,
    DropDemo,
    DropPrinciple,
    MergePrinciples,
    RewritePrinciple,
    SetNodePrompt,
    SetText,
    apply_edits,
    declared_parameters,
)
from agentopt.optimizers import ProposeContext, Symbolic, SymbolicOptions, resolve_optimizer
from agentopt.optimizers.symbolic._options import Component
from tests.optimizers import arena
from tests.optimizers.symbolic_model import Model, last, question

pytestmark = pytest.mark.anyio
LABELS = ("red", "blue")
CHOICES = ("green", *LABELS)


async def recorded(program: Any, rows: int = 6, names: tuple[str, ...] = (), **changes: Any) -> ProposeContext:
    """A context of real rollouts of `program`, whose answers are all wrong."""
    from agentopt.evaluation import Dataset, EvaluationOptions, Evaluator, Example, load_program, resolve_metric

    train = Dataset("train", [Example("", {"item": f"thing {number}"}, LABELS[number % 2]) for number in range(rows)])
    specs = {name: spec for name, spec in declared_parameters().items() if not names or name in names}
    parent = Candidate({name: spec.default for name, spec in specs.items()})
    evaluator = Evaluator(load_program(program), resolve_metric("exact_match"), EvaluationOptions(keep_traces="all"))
    result = await evaluator.evaluate(parent, train)
    return ProposeContext("program", parent, specs, train, list(result.rollouts), **changes)


def sorter(**parts: Any) -> Any:
    """A program with a prompt in components."""
    prompt = ao.components(name="sort", task="Sort {item}.", **parts)
    lm = ao.FunctionLM(lambda request: "green")

    @ao.agent
    async def sort(item: str) -> str:
        return (await lm.complete(system=prompt.format(item=item), user=item, demos=prompt.demos, choices=CHOICES)).text

    return sort


def only(component: Component, **more: Any) -> Symbolic:
    return Symbolic(SymbolicOptions(components=(component,), **more))


# --- components ------------------------------------------------------------------------------------------------------


async def test_each_component_is_asked_with_its_own_words_and_sees_the_others() -> None:
    program = sorter(principles=["Be quick."], output_format="One word.")
    model = Model({"add": {}, "text": {"analysis": "", "text": ""}})
    context = await recorded(program, lm=model)
    assert await Symbolic().propose(context) == []
    asked = [question(request) for request in model.requests if "You change one part" in question(request)]
    parts = [text.split("the part ")[1].split(" of sort")[0] for text in asked]
    assert list(dict.fromkeys(parts)) == ["task", "principles", "demos", "output_format", "extra"]
    assert all("<task>\nSort {item}." in text and "<output_format>\nOne word." in text for text in asked)
    assert "p1 (helped 0, harmed 0): Be quick." in asked[1]
    assert "Examples that may be added:" in asked[parts.index("demos")]
    assert "Examples that may be added:" not in asked[0]


async def test_all_components_can_change_in_one_update() -> None:
    program = sorter()

    def text(request: Any) -> dict[str, str]:
        task = "the part task" in question(request)
        return {"analysis": "", "text": "Sort {item} by colour." if task else "Use {one} word: red or blue."}

    model = Model(
        {"merge": {"add": ["Name a colour."]}, "drop": {"analysis": "", "add": [0], "drop": []}, "text": text}
    )
    context = await recorded(program, lm=model)
    options = SymbolicOptions(components=("task", "principles", "demos"))
    [update] = await Symbolic(options).propose(context)
    assert [type(edit) for edit in update.edits] == [SetText, AddPrinciple, AddDemo]
    child = apply_edits(context.parent, update.edits, context.specs)
    assert child.get("sort.task") == "Sort {item} by colour."


async def test_principles_change_item_by_item() -> None:
    program = sorter(principles=["One.", "Two.", "Three.", "Four."])
    reply = {
        "analysis": "rules repeat",
        "add": ["Name a colour."],
        "rewrite": [{"id": "p1", "text": "First of all."}],
        "drop": ["p4"],
        "merge": [],
        "helpful": ["p1", "p9"],
        "harmful": ["p4"],
    }
    context = await recorded(program, lm=Model({"merge": reply}))
    [update] = await only("principles").propose(context)
    assert update.edits == (
        DropPrinciple("sort.principles", "p4"),
        RewritePrinciple("sort.principles", "p1", "First of all."),
        AddPrinciple("sort.principles", "Name a colour."),
        CountPrinciples("sort.principles", ("p1",), ()),
    )
    merge = {"merge": [{"ids": ["p2", "p3"], "text": "Both."}], "add": [], "helpful": ["p1"]}
    context = await recorded(program, lm=Model({"merge": merge}))
    [update] = await only("principles").propose(context)
    assert update.edits == (MergePrinciples("sort.principles", ("p2", "p3"), "Both."),)


async def test_counters_alone_are_no_proposal() -> None:
    context = await recorded(sorter(principles=["One."]), lm=Model({"merge": {"helpful": ["p1"], "add": []}}))
    assert await only("principles").propose(context) == []


async def test_demonstrations_come_from_training_rows_only() -> None:
    program = sorter(demos=[{"input": "old", "output": "grey"}])
    model = Model({"drop": {"analysis": "", "add": [0, 2, 77], "drop": [0]}})
    context = await recorded(program, lm=model)
    [update] = await only("demos").propose(context)
    added = [edit for edit in update.edits if isinstance(edit, AddDemo)]
    assert isinstance(update.edits[0], DropDemo)
    assert len(added) == 2
    assert {edit.item["source"] for edit in added} <= set(context.train.ids)
    assert "there is no example [77]" in last(model.requests[-1])
    assert any("[77]" in drop.problem and drop.tries == 4 for drop in context.dropped)


async def test_prompts_of_pipeline_nodes_change_by_node_and_keep_their_placeholders() -> None:
    pipeline = ao.Pipeline(
        {"nodes": {"draft": "Draft an answer about {item}.", "check": "Check this: {draft}"}}, name="flow"
    )

    def gradient(request: Any) -> dict[str, str]:
        node = question(request).split("The call you look at: ")[1].split(",")[0]
        return {"suggestion": "Check the colour.", "demand_on_previous": ""} if node == "flow.check" else {}

    def text(request: Any) -> dict[str, str]:
        repaired = "every placeholder must stay" in last(request)
        return {"analysis": "", "text": "Check the colour in this: {draft}" if repaired else "Check the colour."}

    model = Model({"suggestion": gradient, "text": text})
    with ao.models.use(ao.models.ModelsConfig({"agent": ao.FunctionLM(lambda request: "green")})):
        context = await recorded(pipeline, lm=model)
        optimizer = Symbolic(SymbolicOptions(kinds=("prompt",), components=("task",)))
        [update] = await optimizer.propose(context)
    assert update.edits == (SetNodePrompt("flow", "check", "task", "Check the colour in this: {draft}"),)


async def test_many_prompts_take_turns() -> None:
    nodes = {f"n{number}": "Go on with {item}." for number in range(3)}
    pipeline = ao.Pipeline({"nodes": nodes}, name="flow")
    asked: list[list[str]] = []
    for iteration in range(2):
        model = Model({"text": {"analysis": "", "text": ""}, "rules": {"analysis": "", "rules": []}})
        with ao.models.use(ao.models.ModelsConfig({"agent": ao.FunctionLM(lambda request: "green")})):
            context = await recorded(pipeline, lm=model, iteration=iteration)
            await Symbolic(SymbolicOptions(kinds=("prompt",), questions=6)).propose(context)
        texts = [question(request) for request in model.requests if "You change one part" in question(request)]
        asked.append([text.split("the part ")[1].split(".\n")[0] for text in texts])
    assert [len(set(names)) for names in asked] == [6, 6]
    assert len({*asked[0], *asked[1]}) == 12


# --- legality --------------------------------------------------------------------------------------------------------


async def test_a_lost_variable_is_sent_back_three_times_then_dropped_and_recorded() -> None:
    model = Model({"text": {"analysis": "", "text": "Sort it well."}})
    context = await recorded(sorter(), lm=model)
    assert await only("task").propose(context) == []
    assert len([request for request in model.requests if model.kind(request) == "text"]) == 4
    [dropped] = context.dropped
    assert dropped.tries == 4
    assert "loses the variable {item}" in dropped.problem


async def test_a_repaired_variable_is_taken() -> None:
    def text(request: Any) -> dict[str, str]:
        return {"analysis": "", "text": "Sort {item} well." if "loses the variable" in last(request) else "Sort well."}

    context = await recorded(sorter(), lm=Model({"text": text}))
    [update] = await only("task").propose(context)
    assert update.edits == (SetText("sort.task", "Sort {item} well."),)
    assert context.dropped == []


async def test_an_answer_of_no_use_does_not_end_the_asking_but_several_in_a_row_do() -> None:
    def unlucky(request: Any) -> Any:
        return "junk" if request.options.sample == 0 else {"analysis": "", "text": "Sort {item} by colour."}

    [update] = await only("task").propose(await recorded(sorter(), lm=Model({"text": unlucky}), count=2))
    assert update.edits == (SetText("sort.task", "Sort {item} by colour."),)
    silent = Model({"text": {"analysis": "", "text": ""}})
    assert await only("task").propose(await recorded(sorter(), lm=silent, count=20)) == []
    assert sum("You change one part" in question(request) for request in silent.requests) == 3


async def test_more_updates_are_more_answers_to_the_same_question() -> None:
    task = arena.RulesTask()

    def text(request: Any) -> dict[str, str]:
        return {"analysis": "", "text": f"Process the item, way {request.options.sample}."}

    model = Model({"text": text})
    updates = await Symbolic().propose(await arena.context(task, model, count=3))
    assert [update.edits[0].to_dict()["text"] for update in updates] == [
        f"Process the item, way {place}." for place in range(3)
    ]
    assert len(model.asked("suggestion")) <= 6  # gradients are made once


GARBAGE = [
    "", "   ", "I'm sorry, I can't help with that.", "{", '{"text": "cut of', "null", "[]", "lorem " * 400,
    "```json\n```",
    "\x00\ud7ff", '{"text": 3}', '{"text": ["a", 1]}', '{"analysis": {}}', '{"operations": [1, {"operation": 2}]}',
    '{"comments": 5, "suggestion": [], "operation": "explode", "source": 1}',
    '{"comments": "x", "suggestion": "y", "add": "a", "drop": {"a": 1}, "merge": [1], "rewrite": [{"id": 1}]}',
]  # fmt: skip


@pytest.mark.parametrize("reply", GARBAGE)
async def test_D12_garbage_gives_no_crash_and_no_illegal_update(reply: str) -> None:
    program = sorter(principles=["One."])
    context = await recorded(program, lm=ao.FunctionLM(lambda request: reply), count=3)
    for update in await Symbolic().propose(context):
        apply_edits(context.parent, update.edits, context.specs)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["symbolic", "symbolic-prompt"])
async def test_a_perfect_model_reaches_the_optimum(name: str) -> None:
    task = arena.RulesTask()
    result = await arena.run(task, name, arena.perfect_lm())
    assert result.validation["best"] == 1.0
    assert result.best.get("rules.instruction") == task.optimum
    assert result.claim.status == "improved"


async def test_a_garbage_model_is_never_worse_than_the_baseline() -> None:
    task = arena.RulesTask()
    for seed in (0, 1):
        result = await arena.run(task, "symbolic", arena.garbage_lm(seed=seed), rollouts=300, seed=seed)
        assert result.validation["best"] >= result.validation["baseline"]


async def test_a_leaking_model_is_stopped() -> None:
    task = arena.RulesTask()
    result = await arena.run(task, "symbolic", arena.leaking_lm(task), rollouts=300)
    assert not arena.leaks(task, result.best)


def test_the_names_are_known() -> None:
    for name in ("symbolic", "symbolic-prompt", "symbolic-tool", "symbolic-pipeline"):
        assert resolve_optimizer(name).name == name


async def test_a_text_that_the_projection_refuses_is_dropped_and_recorded() -> None:
    def short(text: str) -> str:
        if len(text) > 20:
            raise ValueError("at most 20 characters")
        return text

    prompt = ao.prompt("Sort {item}.", name="tight", projection=short)
    lm = ao.FunctionLM(lambda request: "green")

    @ao.agent
    async def sort(item: str) -> str:
        return (await lm.complete(system=prompt.format(item=item), user=item, choices=CHOICES)).text

    model = Model({"text": {"analysis": "", "text": "Sort {item} with a lot of care."}})
    given = await recorded(sort, names=("tight",), lm=model)
    assert await Symbolic().propose(given) == []
    assert any("at most 20 characters" in drop.problem for drop in given.dropped)
