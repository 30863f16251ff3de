"""The tool part of symbolic learning: which operation, its words, its unit examples in the sandbox, and whole runs."""

from __future__ import annotations

import re
from typing import Any

import pytest

import agentopt as ao
from agentopt.evaluation import Dataset, EvaluationOptions, Evaluator, Example, load_program, resolve_metric
from agentopt.graph import (
    Candidate,
    CreateTool,
    DeleteTool,
    EditToolCode,
    EditToolDescription,
    SetCode,
    SetText,
    declared_parameters,
)
from agentopt.models import ModelsConfig, Reply, Request, ToolCall, use
from agentopt.optimizers import ProposeContext, Symbolic, SymbolicOptions
from tests.optimizers.symbolic_model import Model, last, question

pytestmark = pytest.mark.anyio
ADD = 'def add(a: int, b: int) -> int:\n    """Adds two whole numbers."""\n    return a + b'
TIMES = 'def times(a: int, b: int) -> int:\n    """Multiplies two whole numbers."""\n    return a * b'
EXAMPLES = [{"args": '{"a": 2, "b": 5}', "expected": "10"}]
TOOLS = SymbolicOptions(kinds=("tool",))


def agent(request: Request) -> Any:
    """Calls the tool that the question's verb names, if it is offered."""
    if request.messages[-1]["role"] == "tool":
        return str(request.messages[-1]["content"])
    found = re.search(r"(add|times|upper)\((\w+), (\w+)\)", str(request.messages[-1]["content"]))
    offered = [tool["function"]["name"] for tool in request.tools]
    if found is None or found[1] not in offered:
        return "I have no tool for this."
    call = ToolCall("1", found[1], {"a": int(found[2]), "b": int(found[3])})
    return Reply("", tool_calls=(call,))


def calculator(*tools: Any) -> Any:
    """A program that answers through its toolbox."""

    def add(a: int, b: int) -> int:
        """Adds."""
        return a - b

    box = ao.toolbox(tools or (add,), name="box")

    @ao.agent
    async def calculate(task: str) -> str:
        turns: list[dict[str, Any]] = [{"role": "user", "content": task}]
        reply = await ao.lm("agent").complete(turns, tools=box)
        if reply.tool_calls:
            turns += await box.aturns(reply)
            reply = await ao.lm("agent").complete(turns, tools=box)
        return reply.text

    return calculate


def data(name: str, verb: str, count: int, start: int) -> Dataset:
    rows = [
        Example(
            "",
            {"task": f"{verb}({number}, {number + 3})"},
            str(2 * number + 3 if verb == "add" else number * (number + 3)),
        )
        for number in range(start, start + count)
    ]
    return Dataset(name, rows)


async def recorded(program: Any, lm: Any, verb: str = "add", **changes: Any) -> ProposeContext:
    train = data("train", verb, 6, 5)
    specs = {name: spec.unfrozen() for name, spec in declared_parameters().items()}
    parent = Candidate({name: spec.default for name, spec in specs.items()})
    evaluator = Evaluator(load_program(program), resolve_metric("exact_match"), EvaluationOptions(keep_traces="all"))
    with use(ModelsConfig({"agent": ao.FunctionLM(agent)})):
        result = await evaluator.evaluate(parent, train)
    return ProposeContext("calculator", parent, specs, train, list(result.rollouts), lm=lm, **changes)


def model(operation: str, tool: str = "", **answers: Any) -> Model:
    return Model({"operation": {"analysis": "", "operation": operation, "tool": tool}, **answers})


# --- operations ------------------------------------------------------------------------------------------------------


async def test_a_wrong_tool_is_recoded() -> None:
    lm = model("edit_code", "add", source={"analysis": "It subtracts.", "source": ADD})
    context = await recorded(calculator(), lm)
    [update] = await Symbolic(TOOLS).propose(context)
    assert update.edits == (EditToolCode("box", "add", ADD),)
    assert update.rationale == "It subtracts."
    choice = question(lm.asked("operation")[0])
    assert "add(a=5, b=8) -> -3" in choice
    for operation in ("improve_description", "create", "edit_code", "delete"):
        assert f"- {operation}:" in choice


async def test_a_missing_tool_is_created_with_examples() -> None:
    made = {"analysis": "", "name": "times", "description": "Multiplies.", "source": TIMES, "examples": EXAMPLES}
    context = await recorded(calculator(), model("create", name=made), "times")
    [update] = await Symbolic(TOOLS).propose(context)
    [edit] = update.edits
    assert isinstance(edit, CreateTool)
    assert edit.examples == ({"args": {"a": 2, "b": 5}, "expected": 10},)


async def test_a_description_and_its_schema_are_improved() -> None:
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a", "b"]}'
    answer = {"analysis": "", "description": "Adds two whole numbers.", "parameters": schema}
    context = await recorded(calculator(), model("improve_description", "add", parameters=answer))
    [update] = await Symbolic(TOOLS).propose(context)
    [edit] = update.edits
    assert isinstance(edit, EditToolDescription)
    assert edit.description == "Adds two whole numbers."
    assert edit.parameters is not None
    assert edit.parameters["required"] == ["a", "b"]


@pytest.mark.parametrize("delete", [True, False])
async def test_a_tool_is_deleted_only_when_that_is_confirmed(delete: bool) -> None:
    context = await recorded(calculator(), model("delete", "add", delete={"analysis": "", "delete": delete}))
    updates = await Symbolic(TOOLS).propose(context)
    assert [update.edits for update in updates] == ([(DeleteTool("box", "add"),)] if delete else [])


async def test_no_operation_is_an_answer_and_an_unknown_one_is_recorded() -> None:
    context = await recorded(calculator(), model("none"))
    assert await Symbolic(TOOLS).propose(context) == []
    assert context.dropped == []
    context = await recorded(calculator(), model("explode"))
    assert await Symbolic(TOOLS).propose(context) == []
    assert "names no operation" in context.dropped[0].problem


async def test_an_operation_on_no_known_tool_is_recorded() -> None:
    context = await recorded(calculator(add_one, add_two), model("edit_code", "nothing"))
    assert await Symbolic(TOOLS).propose(context) == []
    assert "there is no such tool" in context.dropped[0].problem


def add_one(a: int, b: int) -> int:
    """Adds one."""
    return a + b + 1


def add_two(a: int, b: int) -> int:
    """Adds two."""
    return a + b + 2


async def test_decorated_tools_change_through_their_own_parameters() -> None:
    @ao.tool
    def shout(text: str) -> str:
        """Says it."""
        return text

    @ao.agent
    def loud(task: str) -> str:
        return shout(task)

    source = 'def shout(text: str) -> str:\n    """Says it loudly."""\n    return text.upper()'
    lm = model("edit_code", "shout", source={"analysis": "", "source": source})
    context = await recorded(loud, lm)
    assert {"shout.code", "shout.description"} <= set(context.specs)
    [update] = await Symbolic(TOOLS).propose(context)
    assert update.edits == (SetCode("shout.code", source),)
    assert "create" not in question(lm.asked("operation")[0]).split("The operations:")[1].split("- none")[0]
    better = {"analysis": "", "description": "Says it loudly.", "parameters": ""}
    context = await recorded(loud, model("improve_description", "shout", parameters=better))
    [update] = await Symbolic(TOOLS).propose(context)
    assert update.edits == (SetText("shout.description", "Says it loudly."),)


# --- the sandbox decides ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "examples", "problem"),
    [
        (TIMES.replace("*", "+"), EXAMPLES, "expected 10"),
        (TIMES.replace("a * b", "1 // 0"), EXAMPLES, "ZeroDivisionError"),
        (TIMES, [], "at least one unit example"),
        (TIMES, [{"args": "{}", "expected": "10"}], "missing"),
        (TIMES, [{"args": "2", "expected": "10"}], "must be"),
        (
            'def times(a: int, b: int) -> float:\n    """Guesses."""\n    import random\n    return random.random()',
            EXAMPLES,
            "same result each time",
        ),
        ("def times(a, b):\n    return a * b", EXAMPLES, "docstring"),
        ("def times(a, b:", EXAMPLES, "line 1"),
    ],
)
async def test_a_created_tool_that_fails_its_checks_is_sent_back_three_times_then_dropped(
    source: str, examples: list[Any], problem: str
) -> None:
    made = {"analysis": "", "name": "times", "description": "Multiplies.", "source": source, "examples": examples}
    lm = model("create", name=made)
    context = await recorded(calculator(), lm, "times")
    assert await Symbolic(TOOLS).propose(context) == []
    assert len([request for request in lm.requests if lm.kind(request) == "name"]) == 4
    assert problem in last(lm.requests[-1])
    assert [drop.tries for drop in context.dropped] == [4]


async def test_new_code_is_run_on_recorded_calls() -> None:
    def source(request: Request) -> dict[str, str]:
        failed = "a recorded call, failed" in last(request)
        return {"analysis": "", "source": ADD if failed else ADD.replace("a + b", "a // (b - b)")}

    lm = model("edit_code", "add", source=source)
    context = await recorded(calculator(), lm)
    [update] = await Symbolic(TOOLS).propose(context)
    assert update.edits == (EditToolCode("box", "add", ADD),)


# --- whole runs ------------------------------------------------------------------------------------------------------


async def tuned(program: Any, lm: Any, verb: str, rollouts: int = 400) -> ao.TuneResult:
    return await ao.atune(
        program,
        train=data("train", verb, 16, 0),
        val=data("val", verb, 16, 100),
        test=data("test", verb, 40, 200),
        metric="exact_match",
        optimizer="symbolic",
        budget=ao.Budget(rollouts=rollouts),
        options=ao.TuneOptions(screen_size=4, tune=("box",), max_failures=50),
        models={"agent": ao.FunctionLM(agent), "optimizer": lm},
        store=":memory:",
    )


async def test_a_perfect_model_repairs_the_tool() -> None:
    lm = model("edit_code", "add", source={"analysis": "", "source": ADD})
    result = await tuned(calculator(), lm, "add")
    assert (result.validation["baseline"], result.validation["best"]) == (0.0, 1.0)
    assert result.claim.status == "improved"


async def test_a_perfect_model_creates_the_tool() -> None:
    made = {"analysis": "", "name": "times", "description": "Multiplies.", "source": TIMES, "examples": EXAMPLES}
    result = await tuned(calculator(), model("create", name=made), "times")
    assert (result.validation["baseline"], result.validation["best"]) == (0.0, 1.0)


async def test_a_garbage_model_is_never_worse() -> None:
    perfect = model("edit_code", "add", source={"analysis": "", "source": ADD})
    lm = ao.OracleLM(lambda request: perfect._reply(request), quality=0.0, name="garbage")
    result = await tuned(calculator(), lm, "add", 200)
    assert result.validation["best"] >= result.validation["baseline"]
