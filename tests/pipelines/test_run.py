"""Running pipelines: what nodes see, where routes lead, what is recorded, and that every run ends."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentopt as ao
from agentopt.errors import UserError
from agentopt.evaluation import load_program
from agentopt.graph import (
    AddNode,
    DeleteNode,
    SetNodePrompt,
    apply_edits,
    complete_pipeline,
    pipeline_problems,
    toolbox,
)
from agentopt.models import Reply, Request, ToolCall, reset
from agentopt.optimizers import Update
from agentopt.pipelines._walk import Walk, field_of


@pytest.fixture(autouse=True)
def no_models() -> Any:
    yield
    reset()


class Agent:
    """A language model that answers by the first key found in its prompt; a list is used up from the front."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.requests: list[Request] = []
        ao.configure(models={"agent": ao.FunctionLM(self.answer)})

    def answer(self, request: Request) -> Any:
        self.requests.append(request)
        text = str(request.messages[-1]["content"])
        for key, answer in self.answers.items():
            if key in text:
                return (
                    answer.pop(0)
                    if isinstance(answer, list) and len(answer) > 1
                    else answer[0]
                    if isinstance(answer, list)
                    else answer
                )
        return f"<{text}>"

    @property
    def prompts(self) -> list[str]:
        return [str(request.messages[-1]["content"]) for request in self.requests]


REVIEW = {
    "nodes": {
        "write": "Write about {topic}. Criticism: {check}",
        "check": {"prompt": "Check: {write}", "route": "llm", "description": "finds mistakes"},
    },
    "edges": {"write": ["check"], "check": ["write", "end"]},
}


# ---- what a node sees


def test_a_chain_hands_its_texts_on_and_gives_the_last_one() -> None:
    Agent(Plan="a plan", Answer="42")
    pipe = ao.Pipeline({"nodes": {"plan": "Plan {question}", "answer": "Answer {question} by {plan}"}}, name="qa")
    result = pipe.run_sync(question="6 x 7?")
    assert result == {"output": "42", "path": ["plan", "answer"], "plan": "a plan", "answer": "42"}
    assert pipe.inputs == ("question",)
    assert str(inspect.signature(pipe)) == "(question)"
    assert "value" in inspect.signature(ao.Pipeline).parameters


def test_a_prompt_is_put_together_from_its_components_under_the_role() -> None:
    agent = Agent()
    prompt = {"task": "Answer {q}", "principles": ["Be brief."], "output_format": '{"answer": ...}', "extra": "Soon."}
    ao.Pipeline({"nodes": {"a": {"role": "You know {q}.", "prompt": prompt}}}, name="p").run_sync("all")
    (request,) = agent.requests
    assert [turn["role"] for turn in request.messages] == ["system", "user"]
    assert request.messages[0]["content"] == "You know all."
    assert request.messages[1]["content"] == (
        'Answer all\n\nPrinciples:\n- Be brief.\n\nOutput format:\n{"answer": ...}\n\nSoon.'
    )


def test_a_node_that_names_nothing_is_shown_the_inputs_and_the_text_before_it() -> None:
    agent = Agent(Draft="a draft")
    pipe = ao.Pipeline({"nodes": {"draft": "Draft {q}", "fix": "Correct the text."}}, name="p")
    pipe.run_sync(q="cats")
    assert agent.prompts[1] == "Correct the text.\n\nq:\ncats\n\ndraft:\na draft"


def test_inputs_that_are_no_text_are_shown_as_json() -> None:
    agent = Agent()
    ao.Pipeline({"nodes": {"a": "Sum {numbers} {flag}"}}, name="p").run_sync(numbers=[1, 2], flag=True)
    assert agent.prompts == ["Sum [1, 2] true"]


def test_wrong_arguments_are_named() -> None:
    Agent()
    pipe = ao.Pipeline({"nodes": {"a": "{question} {context}"}}, name="qa")
    with pytest.raises(UserError, match=r"pipeline 'qa': missing a required argument: 'context'; it takes question"):
        pipe.run_sync(question="x")
    with pytest.raises(UserError, match="unexpected keyword argument"):
        pipe.run_sync(question="x", context="y", more="z")
    with pytest.raises(UserError, match="max_tool_rounds must be"):
        ao.Pipeline({"nodes": {"a": "{q}"}}, name="r", max_tool_rounds=-1)


@pytest.mark.anyio
async def test_it_is_awaitable_and_works_for_sync_code_inside_a_loop() -> None:
    Agent(Answer="yes")
    pipe = ao.Pipeline({"nodes": {"a": "Answer {q}"}}, name="p")
    assert await pipe(q="x") == "yes"
    assert (await pipe.run("x"))["path"] == ["a"]
    assert pipe.run_sync("x")["output"] == "yes"


# ---- where routes lead


def test_a_loop_goes_on_until_the_router_says_so() -> None:
    agent = Agent(
        **{"possible next steps": ["write", "end"], "Criticism: \n": "x", "Check": "too long", "Write": ["one", "two"]}
    )
    pipe = ao.Pipeline(REVIEW, name="p")
    result = pipe.run_sync(topic="cats")
    assert result["path"] == ["write", "check", "write", "check"] and result["write"] == "two"
    router = agent.prompts[2]
    assert "- write: Write about {topic}" in router and "- end: finish" in router and "too long" in router
    assert agent.requests[2].choices == ("write", "end")
    assert agent.prompts[3] == "Write about cats. Criticism: too long"


def test_visits_end_a_loop_that_the_model_never_leaves() -> None:
    Agent(**{"possible next steps": "write"})
    assert ao.Pipeline(REVIEW, name="p").run_sync(topic="x")["path"] == ["write", "check"] * 3


def test_a_used_up_node_is_passed_over_to_what_stands_behind_it() -> None:
    Agent()
    value = {
        "nodes": {"a": {"prompt": "{q}", "max_visits": 1, "route": "next"}, "b": "{q}", "c": "{q}"},
        "edges": {"a": ["b"], "b": ["a", "c"], "c": ["end"]},
    }
    assert ao.Pipeline(value, name="p").run_sync(q="x")["path"] == ["a", "b", "c"]


def test_next_repeats_a_node_as_often_as_it_may() -> None:
    Agent()
    value = {
        "nodes": {"a": {"prompt": "{q} {a}", "max_visits": 4}, "b": "{a}"},
        "edges": {"a": ["a", "b"], "b": ["end"]},
    }
    assert ao.Pipeline(value, name="p").run_sync(q="x")["path"] == ["a", "a", "a", "a", "b"]


def test_a_router_that_answers_nonsense_goes_straight_on() -> None:
    Agent(**{"possible next steps": "banana"})
    assert ao.Pipeline(REVIEW, name="p").run_sync(topic="x")["path"][:3] == ["write", "check", "write"]


@pytest.mark.parametrize(
    ("reply", "to"),
    [
        ('Sure: {"verdict": "Good", "why": "x"}', []),
        ('{"verdict": true}', ["fix"]),
        ("**Verdict:** bad", ["fix"]),
        ("verdict = good", []),
        ("no idea", ["fix"]),
    ],
)
def test_a_field_of_the_text_chooses_by_its_case(reply: str, to: list[str]) -> None:
    Agent(Judge=reply)
    value = {
        "nodes": {
            "judge": {
                "prompt": "Judge {q}",
                "route": {"kind": "field", "field": "verdict", "cases": {"good": "end", "bad": "fix", "true": "fix"}},
            },
            "fix": "Repair {judge}",
        },
        "edges": {"judge": ["fix", "end"], "fix": ["end"]},
    }
    assert ao.Pipeline(value, name="p").run_sync(q="x")["path"] == ["judge", *to]


def test_a_case_for_everything_else() -> None:
    Agent(Judge="whatever")
    route = {"kind": "field", "cases": {"yes": "fix", "*": "end"}}
    value = {
        "nodes": {"judge": {"prompt": "Judge {q}", "route": route}, "fix": "x"},
        "edges": {"judge": ["fix", "end"], "fix": ["end"]},
    }
    assert ao.Pipeline(value, name="p").run_sync(q="x")["path"] == ["judge"]


@given(st.text(max_size=40), st.sampled_from(("", "a", "verdict")))
def test_no_text_is_too_strange_to_look_for_a_field_in(text: str, field: str) -> None:
    found = field_of(text, field)
    assert found is None or isinstance(found, str)


@settings(max_examples=150)
@given(st.data())
def test_every_walk_of_a_legal_pipeline_ends_and_keeps_the_limits(data: st.DataObject) -> None:
    names = "abcd"[: data.draw(st.integers(1, 4))]
    edges = {
        name: list(dict.fromkeys(data.draw(st.lists(st.sampled_from([*names, "end"]), min_size=1, max_size=4))))
        for name in names
    }
    nodes: dict[str, dict[str, Any]] = {
        name: {
            "prompt": "{q}",
            "max_visits": data.draw(st.integers(0, 3)),
            "route": "llm" if len(edges[name]) > 1 else "next",
        }
        for name in names
    }
    value = complete_pipeline({"nodes": nodes, "edges": edges})
    if pipeline_problems(value, ("q",)):
        return
    walk, node = Walk(value, {"q": "x"}), "a"
    while node != "end":
        walk.visited(node, "text", "text")
        assert len(walk.path) < 200
        options = walk.options(node)
        limit = nodes[node]["max_visits"]
        assert options and (limit == 0 or walk.path.count(node) <= limit)
        node = data.draw(st.sampled_from(options))


# ---- what is recorded


def test_nodes_are_steps_with_the_inputs_they_read_and_exact_edges() -> None:
    Agent(Echo="same", Compare="x")
    pipe = ao.Pipeline({"nodes": {"one": "Echo {q}", "two": "Echo {one}", "three": "Compare {one}"}}, name="p")
    with ao.record() as recording:
        pipe.run_sync(q="?")
    ops = {op.op: op for op in recording.trace.ops if op.kind == "step"}
    assert list(ops) == ["p.one", "p.two", "p.three", "p"]
    assert dict(ops["p.one"].inputs) == {"q": "?"} and ops["p.one"].output == "same"
    # Two nodes said the same; the third read the first one, and the edge says so.
    data = [parent for parent, kind in ops["p.three"].parents if kind in ("data", "text")]
    assert data == [ops["p.one"].id]
    assert (ops["p.two"].id, "data") not in ops["p.three"].parents
    inside = [op for op in recording.trace.ops if op.kind == "lm"]
    assert [op.parent_op for op in inside] == [ops["p.one"].id, ops["p.two"].id, ops["p.three"].id]
    assert ops["p"].output == "x" and ops["p"].meta is not None and ops["p"].meta["path"] == ["one", "two", "three"]


def test_feedback_reaches_the_pipeline_through_the_nodes_that_took_part() -> None:
    Agent(Choose="b")
    value = {
        "nodes": {"a": {"prompt": "{q}", "route": {"kind": "llm", "prompt": "Choose."}}, "b": "B {a}", "c": "C {a}"},
        "edges": {"a": ["b", "c"], "b": ["end"], "c": ["end"]},
    }
    pipe = ao.Pipeline(value, name="p")
    with ao.record() as recording:
        output = pipe.run_sync(q="x")["output"]
        recording.set_output(output)
    trace = recording.trace
    found = ao.backward(trace, [ao.Feedback(target=trace.output_id or 0, text="wrong")])
    assert [op.op for op in found["p"].ops if op.op.startswith("p.")] == ["p.a", "p.b"]


def test_runs_of_different_length_and_branch_keep_their_nodes_apart() -> None:
    """Gradients are gathered by node over a batch: a call must carry its node's name, not its place in the run."""
    Agent(**{"loop 2": "write", "loop 1": "end", "possible next steps": ["write", "end", "end"]})
    pipe = ao.Pipeline(REVIEW, name="p")
    gathered: dict[str, list[tuple[int, int]]] = {}
    for number, topic in enumerate(("cats", "dogs", "birds")):
        with ao.record() as recording:
            pipe.run_sync(topic=topic)
        for op in recording.trace.ops:
            if op.kind == "step" and op.meta and "visit" in op.meta:
                gathered.setdefault(op.op, []).append((number, op.meta["visit"]))
                assert set(op.inputs) == ({"topic", "check"} if op.op == "p.write" else {"write"})
    assert gathered == {
        "p.write": [(0, 1), (0, 2), (1, 1), (2, 1)],
        "p.check": [(0, 1), (0, 2), (1, 1), (2, 1)],
    }


def test_nothing_is_needed_of_a_recording() -> None:
    Agent(Answer="yes")
    pipe = ao.Pipeline({"nodes": {"a": "Answer {q}", "b": "Answer {a}"}}, name="p")
    with ao.stop_tracing():
        assert pipe.run_sync(q="x")["output"] == "yes"


# ---- candidates


def test_the_active_candidate_is_the_pipeline_that_runs() -> None:
    Agent(Check="checked", Answer="raw")
    pipe = ao.Pipeline({"nodes": {"a": "Answer {q}"}}, name="p")
    edit = AddNode("p", "check", {"prompt": "Check {a}"}, "a")
    child = apply_edits(ao.Candidate({}), [edit], {"p": pipe.spec})
    with child.active():
        assert pipe.run_sync(q="x")["path"] == ["a", "check"]
        assert pipe.value["edges"] == {"a": ["check"], "check": ["end"]}
    assert pipe.run_sync(q="x")["path"] == ["a"]


def test_an_illegal_candidate_is_refused_before_the_first_call() -> None:
    agent = Agent()
    pipe = ao.Pipeline({"nodes": {"a": "Answer {q}"}}, name="p")
    value = pipe.value
    value["edges"]["a"] = ["a"]
    with (
        ao.Candidate({"p": value}).active(),
        pytest.raises(UserError, match="pipeline 'p': the end cannot be reached from node 'a'"),
    ):
        pipe.run_sync(q="x")
    assert not agent.requests


def test_two_candidates_run_at_the_same_time() -> None:
    Agent(Long="L", Short="S")
    pipe = ao.Pipeline({"nodes": {"a": "Long {q}"}}, name="p")
    other = apply_edits(ao.Candidate({}), [SetNodePrompt("p", "a", "task", "Short {q}")], {"p": pipe.spec})
    seen: dict[str, str] = {}

    async def run(key: str, candidate: ao.Candidate) -> None:
        with candidate.active():
            seen[key] = await pipe(q="x")

    async def both() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(run, "one", ao.Candidate({}))
            group.start_soon(run, "two", other)

    anyio.run(both)
    assert seen == {"one": "L", "two": "S"}


# ---- tools


def search(query: str) -> str:
    """Look something up."""
    return f"found {query}"


def secret() -> str:
    """Tell a secret."""
    raise AssertionError("not offered")


def calling(*calls: tuple[str, dict[str, Any]]) -> Reply:
    return Reply("", tool_calls=tuple(ToolCall(f"c{i}", name, args) for i, (name, args) in enumerate(calls)))


def with_tools(answers: list[Any], **options: Any) -> tuple[Any, list[Request]]:
    lm = ao.ScriptedLM(answers)
    ao.configure(models={"agent": lm})
    box = toolbox([search, secret], name="box")
    value = {"nodes": {"a": {"prompt": "Answer {q}", "tools": ["search", "gone"]}}}
    return ao.Pipeline(value, name="p", tools=box, **options), lm.requests


def test_a_node_calls_its_tools_and_the_calls_are_recorded_inside_it() -> None:
    pipe, requests = with_tools([calling(("search", {"query": "cats"})), "done"])
    with ao.record() as recording:
        assert pipe.run_sync(q="x")["output"] == "done"
    step = next(op for op in recording.trace.ops if op.op == "p.a")
    call = next(op for op in recording.trace.ops if op.kind == "tool")
    assert (call.op, call.output, call.parent_op) == ("search", "found cats", step.id)
    assert step.meta is not None and step.meta["missing_tools"] == ["gone"]  # deleted by another edit: not an error
    assert [tool["function"]["name"] for tool in requests[0].tools] == ["search"]
    assert requests[1].messages[-1] == {"role": "tool", "tool_call_id": "c0", "content": "found cats"}


def test_a_node_that_never_stops_calling_has_to_answer() -> None:
    pipe, requests = with_tools([calling(("search", {"query": "x"}))] * 2 + ["enough"], max_tool_rounds=2)
    assert pipe.run_sync(q="x")["output"] == "enough"
    assert not requests[-1].tools and len(requests) == 3


def test_a_tool_that_the_node_was_not_offered_is_not_run() -> None:
    pipe, requests = with_tools([calling(("secret", {})), "fine"])
    assert pipe.run_sync(q="x")["output"] == "fine"
    assert "There is no tool secret; the tools are: search." in str(requests[1].messages[-1]["content"])


# ---- as a target


PROGRAM = """
import agentopt as ao

pipe = ao.Pipeline({"nodes": {"answer": "Answer {question}"}}, name="qa")
"""


def test_a_pipeline_in_a_file_is_a_program(tmp_path: Path) -> None:
    (tmp_path / "piped_agent.py").write_text(PROGRAM)
    program = load_program(f"{tmp_path / 'piped_agent.py'}:pipe")
    assert list(program.parameters) == ["qa"] and list(program.tunable()) == ["qa"]
    assert list(program.signature.parameters) == ["question"] and program.is_async
    whole = load_program(f"{tmp_path / 'piped_agent.py'}:pipe.run")
    assert list(whole.parameters) == ["qa"]
    Agent(Answer="yes")
    result = ao.evaluate(
        whole, [{"question": "x", "answer": "yes"}], lambda output, expected, example: output["output"] == expected
    )
    assert result.mean == 1.0


class OneEdit:
    """Proposes a checking node once."""

    async def propose(self, context: Any) -> list[Update]:
        return [Update((AddNode("qa", "check", {"prompt": "Check {answer}"}, "answer"),), "a checker", "test")]


def test_tune_improves_a_pipeline_by_adding_a_node(tmp_path: Path) -> None:
    (tmp_path / "tuned_pipe.py").write_text(PROGRAM)
    Agent(Check="right", Answer="wrong")
    rows = [{"question": f"question {number}", "answer": "right"} for number in range(24)]
    result = ao.tune(
        f"{tmp_path / 'tuned_pipe.py'}:pipe",
        train=rows,
        metric="exact_match",
        optimizer=OneEdit(),
        budget=ao.Budget(proposals=1),
    )
    best: Any = result.best.get("qa")
    assert best["edges"] == {"answer": ["check"], "check": ["end"]}
    (edit,) = result.best.edits
    assert isinstance(edit, AddNode)


def test_a_pipeline_is_drawn_as_a_flowchart() -> None:
    text = ao.Pipeline(REVIEW, name="p").to_mermaid()
    assert text.splitlines()[:3] == ["flowchart TD", '    n_write["write"]', '    n_check["check: finds mistakes"]']
    assert '    n_check -->|"llm"| n_end' in text and "    n_write --> n_check" in text


def test_a_handle_is_no_plain_value_and_its_deletion_is_an_edit() -> None:
    Agent()
    pipe = ao.Pipeline({"nodes": {"a": "{q}", "b": "{a}"}}, name="p", description="answers")
    assert json.dumps(pipe.to_json()) == '{"$parameter": "p"}' and pipe.tools is None
    child = apply_edits(ao.Candidate({}), [DeleteNode("p", "b")], {"p": pipe.spec})
    with child.active():
        assert pipe.run_sync(q="x")["path"] == ["a"]
