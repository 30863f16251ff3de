"""Toolbox: what a model is offered, how tools run, what edits may do, and a whole agent loop with a created tool."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentopt as ao
from agentopt import graph
from agentopt.errors import UserError
from agentopt.graph import CreateTool, DeleteTool, EditToolCode, EditToolDescription
from agentopt.graph._tool_values import read_source, schema_of
from agentopt.models import ToolCall
from agentopt.sandbox import ProcessRunner

FACTOR = 3
TRIPLE = 'def triple(n: int, times: int = 1) -> int:\n    """Triple a number."""\n    return n * FACTOR * times'


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessRunner]:
    with ProcessRunner() as runner:
        yield runner


@pytest.fixture(autouse=True)
def sandboxed(worker: ProcessRunner) -> Iterator[None]:
    with graph.use_code_runner(worker):
        yield


def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


async def shout(text: str) -> str:
    """Say it loud."""
    return text.upper()


def box(*extra: Any, max_tools: int = 4) -> ao.Toolbox:
    return ao.toolbox([add, shout, *extra], name="box", max_tools=max_tools, uses=["FACTOR"])


def child(*edits: graph.Edit, start: graph.Candidate | None = None) -> graph.Candidate:
    return graph.apply_edits(start or graph.Candidate(), edits, graph.declared_parameters())


def create(tool: str = "triple", source: str = TRIPLE, **more: Any) -> CreateTool:
    return CreateTool("box", tool, "Triples a number.", source, **more)


def refusal(*edits: graph.Edit) -> str:
    with pytest.raises(graph.IllegalEdit) as caught:
        child(*edits)
    assert len(caught.value.problems) == 1, caught.value.problems
    return caught.value.problems[0].message


# --- what a model is offered -----------------------------------------------------------------------------------------


def test_tools_are_what_a_chat_api_takes() -> None:
    tools = box().tools
    assert tools[0] == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 2}},
                "required": ["a"],
            },
        },
    }
    assert box().names == ["add", "shout"]
    assert list(box()) == tools
    assert [tool["function"]["name"] for tool in box().only(["shout", "none"])] == ["shout"]
    assert box().spec.frozen
    assert str(box()) == f"{box()}" == "- add(a, b): Add two numbers.\n- shout(text): Say it loud."
    assert "add" in box() and "sub" not in box() and len(box()) == 2


def test_annotations_become_a_schema() -> None:
    def f(
        a: str | None,
        b: list[dict[str, int]],
        c: Literal["x", "y"] = "x",
        d: float | bool = 1.5,
        e: object = None,
        *,
        g: tuple[int, ...] = (),
    ) -> None: ...

    assert schema_of(inspect.signature(f, eval_str=False)) == {
        "type": "object",
        "properties": {
            "a": {"type": "string"},
            "b": {"type": "array", "items": {"type": "object", "additionalProperties": {"type": "integer"}}},
            "c": {"enum": ["x", "y"], "default": "x"},
            "d": {"anyOf": [{"type": "number"}, {"type": "boolean"}], "default": 1.5},
            "e": {},
            "g": {"type": "array", "items": {"type": "integer"}, "default": []},
        },
        "required": ["a", "b"],
    }
    texts = ("list[Unknown]", "Literal[1, 2]", "broken[", "Annotated[int, 'how many']", "str | Any", "'int'")
    kind = inspect.Parameter.KEYWORD_ONLY
    named = [inspect.Parameter(f"a{place}", kind, annotation=text) for place, text in enumerate(texts)]
    properties: Any = schema_of(inspect.Signature(named))["properties"]
    assert list(properties.values()) == [
        {"type": "array"},
        {"enum": [1, 2]},
        {},
        {"type": "integer", "description": "how many"},
        {},
        {"type": "integer"},
    ]


def test_a_model_call_takes_the_toolbox_and_records_the_read() -> None:
    tools = box()
    offered: list[Any] = []
    lm = ao.FunctionLM(lambda request: offered.extend(request.tools) or "ok")
    with child(create()).active(), ao.record() as recording:
        anyio.run(lambda: lm.complete(user="go", tools=tools))
        expected = tools.tools
    assert offered == expected and len(offered) == 3
    call = next(op for op in recording.trace.ops if op.kind == "lm")
    assert [kind for _, kind in call.parents] == ["parameter"]
    assert list(recording.trace.parameters) == ["box"]


def test_a_decorated_tool_shows_its_own_description_until_the_toolbox_changes_it() -> None:
    @ao.tool(name="weather")
    def weather(city: str) -> str:
        """The weather."""
        return f"{city}: fine"

    tools = ao.toolbox([weather], name="box")

    def shown() -> str:
        return tools.tools[0]["function"]["description"]

    with child(graph.SetText("weather.description", "Today's weather.")).active():
        assert shown() == "Today's weather."
    both = child(
        graph.SetText("weather.description", "Today's weather."), EditToolDescription("box", "weather", "Rain?")
    )
    with both.active():
        assert shown() == "Rain?"
    with ao.record() as recording:
        assert shown() == "The weather."
    assert set(recording.trace.parameters) == {"box", "weather.description"}


# --- running ---------------------------------------------------------------------------------------------------------


def test_own_functions_run_here_and_created_ones_in_the_sandbox() -> None:
    here = 'def pid() -> int:\n    """Which process?"""\n    import os\n    return os.getpid()'

    def where() -> int:
        """Which process?"""
        return os.getpid()

    tools = ao.toolbox([where], name="box", uses=[os])
    made = child(CreateTool("box", "pid", "Which process?", here))
    with made.active():
        assert tools.call("where") == os.getpid()
        assert tools.call("pid") != os.getpid()


async def _acall(tools: ao.Toolbox, tool: str, args: dict[str, Any]) -> Any:
    return await tools.acall(tool, args)


def test_calls_are_recorded_as_tools_with_their_arguments_and_the_parameter() -> None:
    tools = box()
    with child(create()).active(), ao.record() as recording:
        assert tools.call("add", {"a": 1}) == 3
        assert tools.call("triple", {"n": 2}) == 6
        assert anyio.run(_acall, tools, "triple", {"n": 2, "times": 2}) == 12
        assert anyio.run(_acall, tools, "shout", {"text": "a"}) == "A"
        assert anyio.run(_acall, tools, "add", {"a": 1, "b": 1}) == 2
    calls = [op for op in recording.trace.ops if op.kind == "tool"]
    assert [(op.op, op.output) for op in calls] == [
        ("add", 3),
        ("triple", 6),
        ("triple", 12),
        ("shout", "A"),
        ("add", 2),
    ]
    assert dict(calls[1].inputs) == {"n": 2, "times": 1}
    assert all("parameter" in [kind for _, kind in op.parents] for op in calls)


def test_an_async_function_needs_acall() -> None:
    with pytest.raises(UserError, match="await"):
        box().call("shout", {"text": "a"})


def test_a_created_async_tool_runs_both_ways() -> None:
    tools = box()
    source = 'async def later(n: int) -> int:\n    """Later."""\n    return n + 1'
    with child(create("later", source)).active():
        assert tools.call("later", {"n": 1}) == anyio.run(_acall, tools, "later", {"n": 1}) == 2


@pytest.mark.parametrize(
    ("tool", "args", "message"),
    [
        ("none", {}, "there is no tool 'none'; the tools are: add, shout"),
        ("add", {}, "missing a required argument: 'a'; the arguments are (a, b)"),
        ("add", {"a": 1, "c": 2}, "unexpected keyword argument 'c'"),
    ],
)
def test_a_call_that_does_not_fit_says_so_to_the_model(tool: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(graph.ToolError) as caught:
        box().call(tool, args)
    assert message in str(caught.value)
    with pytest.raises(graph.ToolError):
        anyio.run(_acall, box(), tool, args)


def test_created_code_that_raises_is_a_code_error_with_its_text() -> None:
    tools = box()
    source = 'def bad(n: int) -> int:\n    """Bad."""\n    raise ValueError(f"no {n}")'
    wanted = pytest.raises(graph.CodeError, match="ValueError: no 3 at line 3")
    with child(create("bad", source)).active(), ao.record() as recording, wanted:
        tools.call("bad", {"n": 3})
    failed = recording.trace.ops[1]
    assert failed.op == "bad" and failed.error is not None


def test_code_of_a_hand_made_candidate_is_checked_before_it_runs() -> None:
    tools = box()
    value: Any = child(create())["box"]
    value[-1]["source"] = 'def triple(n: int) -> int:\n    """x"""\n    import socket\n    return n'
    with graph.Candidate({"box": value}).active(), pytest.raises(graph.CodeError, match="imports 'socket'"):
        tools.call("triple", {"n": 1})


def test_effects_are_held_back_in_rollouts_also_when_the_code_was_changed() -> None:
    sent: list[str] = []

    @ao.tool(name="send", effects=True)
    def send(text: str) -> str:
        """Send it."""
        sent.append(text)
        return "sent"

    tools = ao.toolbox([send], name="box")
    changed = child(EditToolCode("box", "send", 'def send(text: str) -> str:\n    """Send."""\n    return "changed"'))
    scope = graph.RolloutScope(0, "c", "e")
    for candidate in (graph.Candidate(), changed):
        with graph.rollout(scope), candidate.active(), pytest.raises(graph.EffectsRefused):
            tools.call("send", {"text": "a"})

    @send.when_tuning
    def pretend(text: str) -> str:
        return f"would send {text}"

    with graph.rollout(scope), changed.active():
        assert tools.call("send", {"text": "a"}) == "would send a"
    assert tools.call("send", {"text": "b"}) == "sent"
    with changed.active():
        assert tools.call("send", {"text": "c"}) == "changed"
    assert sent == ["b"]


def test_an_agent_loop_uses_a_created_tool_in_the_sandbox() -> None:
    """The model asks for a tool, gets errors as text, asks again, and answers with what the sandbox computed."""
    tools = box()

    def agent(request: Any) -> Any:
        turns = [turn for turn in request.messages if turn["role"] == "tool"]
        names = [tool["function"]["name"] for tool in request.tools]
        if not turns:
            wrong = ToolCall("1", "nothing", {})
            return ao.Reply("", tool_calls=(wrong, ToolCall("2", "triple", {"n": "x"}, raw="{n: x}")))
        if len(turns) == 2:
            right = ToolCall("3", "triple", {"n": 14})
            return ao.Reply("let me see", tool_calls=(right,)) if "triple" in names else "cannot"
        return turns[-1]["content"]

    lm = ao.FunctionLM(agent)

    async def run(question: str) -> tuple[str, list[Any]]:
        messages: list[Any] = [{"role": "user", "content": question}]
        while True:
            reply = await lm.complete(messages, tools=tools)
            if not reply.tool_calls:
                return reply.text, messages
            messages += await tools.aturns(reply)

    async def go() -> tuple[str, list[Any]]:
        with ao.record() as recording:
            text, messages = await run("3 times 14?")
        assert [op.op for op in recording.trace.ops if op.kind == "tool"] == ["triple"] * (text == "42")
        return text, messages

    assert anyio.run(go)[0] == "cannot"
    with child(create()).active():
        text, messages = anyio.run(go)
    assert text == "42"
    assert messages[1]["tool_calls"][1]["function"]["arguments"] == "{n: x}"
    assert messages[2]["content"] == "error: there is no tool 'nothing'; the tools are: add, shout, triple"
    assert "no JSON object" in messages[3]["content"]
    assert messages[5] == {"role": "tool", "tool_call_id": "3", "content": "42"}


def test_turns_without_await_and_an_exception_of_the_program() -> None:
    def lookup(key: str) -> dict[str, Any]:
        """Look it up."""
        return {"key": {"a": 1}[key]}

    tools = box(lookup)
    reply = ao.Reply("", tool_calls=(ToolCall("1", "lookup", {"key": "a"}),))
    assert json.loads(tools.turns(reply)[1]["content"]) == {"key": 1}
    with pytest.raises(KeyError):
        tools.turns(ao.Reply("", tool_calls=(ToolCall("1", "lookup", {"key": "b"}),)))
    assert tools.turns(ao.Reply("hello")) == [{"role": "assistant", "content": "hello"}]


# --- edits -----------------------------------------------------------------------------------------------------------


def test_a_created_tool_gets_the_schema_of_its_signature() -> None:
    box()
    value: Any = child(create(examples=({"args": {"n": 2}, "expected": 6},)))["box"]
    assert value[-1] == {
        "name": "triple",
        "description": "Triples a number.",
        "parameters": {
            "type": "object",
            "properties": {"n": {"type": "integer"}, "times": {"type": "integer", "default": 1}},
            "required": ["n"],
        },
        "source": TRIPLE,
        "examples": [{"args": {"n": 2}, "expected": 6}],
    }


def test_recoding_keeps_a_schema_that_fits_and_derives_it_anew_otherwise() -> None:
    box()
    described: dict[str, Any] = {
        "type": "object",
        "properties": {"a": {"type": "integer", "description": "one"}, "b": {}},
    }
    described["required"] = ["a"]
    same = 'def add(a, b=2):\n    """Add."""\n    return b + a'
    value: Any = child(EditToolDescription("box", "add", parameters=described), EditToolCode("box", "add", same))["box"]
    assert value[0]["parameters"] == described
    value = child(EditToolCode("box", "add", same.replace("b=2", "b=2, c: int = 0")))["box"]
    assert list(value[0]["parameters"]["properties"]) == ["a", "b", "c"]


def test_deleted_own_tools_are_gone_and_can_be_replaced() -> None:
    tools = box()
    source = 'def add(a: int) -> int:\n    """More."""\n    return a + FACTOR'
    with child(DeleteTool("box", "add"), DeleteTool("box", "shout")).active():
        assert tools.names == [] and tools.tools == []
        with pytest.raises(graph.ToolError, match="the tools are: none"):
            tools.call("add", {"a": 1})
    with child(DeleteTool("box", "add"), create("add", source)).active():
        assert tools.call("add", {"a": 1}) == 4


SOURCES = {
    "def triple(n:": "line 1",
    "x = 1": "must define the function 'triple'; it defines no function",
    "def other(n):\n    'x'": "it defines other",
    "def triple(*n):\n    'x'": "no *args",
    "def triple(n, /):\n    'x'": "positional-only",
    "def triple(n=[x]):\n    'x'": "the default of 'n' must be a plain JSON value",
    "def triple(n):\n    return n": "has no docstring",
    "def triple(n):\n    'x'\n    import socket": "imports 'socket', which is not allowed",
    "def triple(n):\n    'x'\n    return missing": "uses 'missing'",
    "def triple(n):\n    'x'\n    yield n": "must return its result",
}


@pytest.mark.parametrize("source", SOURCES)
def test_bad_code_is_refused_with_one_clause(source: str) -> None:
    box()
    assert SOURCES[source] in refusal(create(source=source))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (create("add", TRIPLE.replace("triple", "add")), "there is a tool 'add' already"),
        (create("no name", TRIPLE), "must define the function 'no name'"),
        (CreateTool("box", "triple", " ", TRIPLE), "'description' must say what the tool does"),
        (create(parameters={"type": "object"}), "must have and require the argument 'n'"),
        (create(parameters={"type": "array"}), "'parameters' must be"),
        (create(examples=({"args": {"n": 1, "m": 1}, "expected": 1},)), "unexpected keyword argument 'm'"),
        (create(examples=(3,)), "example 1 must be"),
        (EditToolDescription("box", "ad", "x"), "there is no tool 'ad' (did you mean 'add'?)"),
        (EditToolDescription("box", "add"), "neither a description nor parameters"),
        (
            EditToolDescription(
                "box", "add", parameters={"type": "object", "properties": {"a": {}, "z": {}}, "required": ["a"]}
            ),
            "'z', which is no argument of (a, b)",
        ),
        (EditToolCode("box", "add", "def add(a):\n  return a"), "has no docstring"),
        (DeleteTool("box", "sub"), "there is no tool 'sub'"),
        (DeleteTool("text", "add"), "does not fit a parameter of kind 'prompt'"),
    ],
)
def test_illegal_edits_are_refused_with_one_clause(edit: graph.Edit, message: str) -> None:
    ao.prompt("x", name="text")
    box()
    assert message in refusal(edit)


def test_the_limit_and_unknown_code_are_refused() -> None:
    box(max_tools=2)
    assert "at most 2 are allowed" in refusal(create())
    value: Any = graph.declared_parameters()["box"].default
    assert "is no function of the program" in refusal(graph.SetValue("box", [{**value[0], "name": "sub"}]))
    assert "two tools have the name 'add'" in refusal(graph.SetValue("box", [value[0], value[0]]))
    assert "expected a list of tools" in refusal(graph.SetValue("box", {}))


# --- unit examples ---------------------------------------------------------------------------------------------------


def examples_of(source: str, *examples: tuple[dict[str, Any], Any], tool: str = "triple") -> list[str]:
    tools = box()
    items = tuple({"args": args, "expected": expected} for args, expected in examples)
    return graph.run_examples(child(create(tool, source, examples=items))["box"], tool, tools.uses)


def test_unit_examples_pass_fail_or_raise() -> None:
    assert examples_of(TRIPLE, ({"n": 2}, 6), ({"n": 1, "times": 0}, 0)) == []
    found = examples_of(TRIPLE.replace("times: int", "times"), ({"n": 2}, 7), ({"n": "x", "times": None}, 1))
    assert found[0] == "example 1: triple(n=2) gave 6, expected 7"
    assert found[1].startswith("example 2: triple(n='x', times=None) failed: triple: TypeError")


@pytest.mark.parametrize("body", ["random.random()", "count.append(1) or len(count)", "time.time()"])
def test_a_tool_must_answer_the_same_each_time(body: str) -> None:
    source = f'import random, time\ncount = []\ndef roll(n: int) -> float:\n    """Roll."""\n    return {body}'
    found = examples_of(source, ({"n": 1}, 1), tool="roll")
    assert "it must give the same result each time" in found[0]


def test_results_are_compared_as_json_with_rounding() -> None:
    source = 'def f(n: int):\n    """F."""\n    return {"a": (0.1 + 0.2, n), "b": True}'
    assert examples_of(source, ({"n": 1}, {"a": [0.3, 1], "b": True}), tool="f") == []
    assert examples_of(source, ({"n": 1}, {"a": [0.3, 1], "b": 1}), tool="f")


def test_functions_of_the_program_are_not_run_by_examples() -> None:
    tools = box()
    assert graph.run_examples(tools.value, "add", tools.uses) == []
    assert graph.run_examples(tools.value, "none") == ["there is no tool 'none'"]


# --- declarations ----------------------------------------------------------------------------------------------------


def bare(a: int) -> int:
    return a


def many(*a: int) -> int:
    """Many."""
    return sum(a)


def stream(a: int) -> Iterator[int]:
    """Stream."""
    yield a


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([bare], "bare has no docstring"),
        ([many], "'a' without a name of its own"),
        ([stream], "is a generator"),
        ([3], "expected functions"),
        ([lambda: 1], "is no name for a tool"),
        ([add, add], "two tools have the name 'add'"),
        ("add", "expected a list of functions"),
    ],
)
def test_what_is_no_tool_is_refused(tools: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ao.toolbox(tools, name="box")


def test_bad_uses_and_limits_are_refused() -> None:
    with pytest.raises(UserError, match="not defined there yet"):
        ao.toolbox([add], name="box", uses=["nowhere"])
    with pytest.raises(UserError, match="without a name"):
        ao.toolbox([add], name="box", uses=[3])
    with pytest.raises(UserError, match="max_tools"):
        ao.toolbox([add], name="box", max_tools=0)


def test_a_second_declaration_needs_the_same_functions() -> None:
    assert box().names == box().names
    other: dict[str, Any] = {}
    exec('def add(a: int, b: int = 2) -> int:\n    """Add two numbers."""\n    return a', other)
    with pytest.raises(UserError, match="declared twice with different functions"):
        ao.toolbox([other["add"], shout], name="box", max_tools=4)


def test_a_handle_made_from_the_declaration_runs_tools_too() -> None:
    box()
    again = graph.handle_for(graph.declared_parameters()["box"])
    assert isinstance(again, ao.Toolbox)
    assert again.call("add", {"a": 1}) == 3
    assert [use.name for use in again.uses] == ["FACTOR"]


# --- any sequence of edits -------------------------------------------------------------------------------------------

TOOLS = st.sampled_from(["add", "shout", "triple", "extra", "", "1x"])
CODE = st.sampled_from(
    [
        TRIPLE,
        TRIPLE.replace("triple", "add"),
        'def extra(text: str = "a") -> str:\n    """Extra."""\n    return text',
        'async def shout(text, loud: bool = True):\n    """S."""\n    return text',
        *SOURCES,
        "",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "n", "args"]), inner),
)
SCHEMAS = st.none() | st.just(schema_of(inspect.signature(add))) | st.dictionaries(st.just("type"), JSON)
EXAMPLES = st.lists(st.just({"args": {"n": 1}, "expected": 3}) | JSON, max_size=2).map(tuple)
EDITS = st.one_of(
    st.builds(CreateTool, st.just("box"), TOOLS, st.sampled_from(["What.", ""]), CODE, EXAMPLES, SCHEMAS),
    st.builds(EditToolDescription, st.just("box"), TOOLS, st.none() | st.text(max_size=5), SCHEMAS),
    st.builds(EditToolCode, st.just("box"), TOOLS, CODE),
    st.builds(DeleteTool, st.just("box"), TOOLS),
)


@settings(max_examples=120)
@given(st.lists(EDITS, max_size=8))
def test_any_sequence_of_edits_keeps_the_toolbox_whole(edits: list[graph.Edit]) -> None:
    with graph.parameter_scope():
        tools = box()
        candidate = graph.Candidate()
        for edit in edits:
            assert graph.edit_from_dict(json.loads(json.dumps(edit.to_dict()))) == edit
            try:
                candidate = child(edit, start=candidate)
            except graph.IllegalEdit as error:
                assert str(error)
                continue
            assert tools.spec.problems(candidate["box"]) == []
            assert graph.Candidate.from_dict(json.loads(json.dumps(candidate.to_dict()))).hash == candidate.hash
            with candidate.active():
                assert [tool["function"]["name"] for tool in tools.tools] == tools.names


@given(JSON)
def test_checking_wild_values_never_raises(value: Any) -> None:
    with graph.parameter_scope():
        check = box().spec.check_value
        assert check is not None
        entry = {"name": "add", "description": "x", "parameters": value, "source": "", "examples": [value]}
        assert isinstance(check([entry]), list) and isinstance(check(value), list)


@settings(max_examples=60)
@given(
    st.text(max_size=30) | st.sampled_from(["a" + ".b" * 5000, "a" + "|b" * 5000, "(" * 300, "list[" * 60, "'\\x00'"]),
    st.sampled_from(
        ["def triple(n: %s):\n  'x'\n  return n", "def triple(n=%s):\n  'x'", "%s", "def triple(n):\n  %s"]
    ),
)
def test_reading_wild_code_never_raises(text: str, frame: str) -> None:
    unit, problems = read_source(frame % text, "triple")
    assert unit is not None or problems
    if unit is not None:
        assert schema_of(unit.signature)["type"] == "object"


def test_changed_code_of_a_decorated_tool_sees_its_own_names_too() -> None:
    offset = 40

    @ao.tool(name="shift", uses=["offset"])
    def shift(n: int) -> int:
        """Shift."""
        return n + offset

    tools = ao.toolbox([shift], name="box", uses=["FACTOR"])
    source = 'def shift(n: int) -> int:\n    """Shift."""\n    return n * FACTOR + offset'
    changed = child(EditToolCode("box", "shift", source))
    value: Any = changed["box"]
    value[0]["examples"] = [{"args": {"n": 1}, "expected": 43}]
    assert [use.name for use in tools.visible("shift")] == ["FACTOR", "offset"]
    assert graph.run_examples(value, "shift", tools.visible("shift")) == []
    with changed.active():
        assert tools.call("shift", {"n": 0}) == 40
    assert tools.call("shift", {"n": 0}) == 40 and tools.call("shift", {"n": 1}) == 41


def test_a_candidate_with_tools_survives_its_files(tmp_path: Path) -> None:
    box()
    made = child(create(examples=({"args": {"n": 2}, "expected": 6},)), DeleteTool("box", "shout"))
    for suffix in (".json", ".toml"):
        loaded = ao.load(made.save(tmp_path / f"best{suffix}"))
        assert loaded.hash == made.hash and loaded.edits == made.edits


def test_blank_code_is_not_taken_for_the_programs_own_function() -> None:
    box = ao.toolbox([add], name="box")
    (tool,) = box.value
    assert "must define the function 'add'" in box.spec.problems([{**tool, "source": "  "}])[0]
