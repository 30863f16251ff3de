"""Edits of a pipeline: what is accepted is legal by an oracle of its own; what is refused changes nothing."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.graph import (
    AddNode,
    Candidate,
    DeleteNode,
    EditError,
    IllegalEdit,
    MoveNode,
    ParameterSpec,
    RewireNodes,
    SetEdges,
    SetNodeDescription,
    SetNodePrompt,
    SetNodeTools,
    SetRoute,
    SetValue,
    apply_edits,
    complete_pipeline,
    declare_pipeline,
    edit_from_dict,
    fill_placeholders,
    parameter_scope,
    pipeline_inputs,
    pipeline_problems,
)

NAMES = ("a", "b", "c", "d", "e", "f")


def declared(value: Any, **options: Any) -> ParameterSpec:
    return declare_pipeline(value, name="p", frame=sys._getframe(1), **options)


def chain(*names: str, **more: Any) -> dict[str, Any]:
    return {"nodes": {name: f"{name}: {{q}}" for name in names}, **more}


def edited(value: Any, *edits: Any, **options: Any) -> Any:
    with parameter_scope():
        spec = declared(value, **options)
        return apply_edits(Candidate({}), edits, {"p": spec}).get("p")


def refusal(value: Any, *edits: Any, **options: Any) -> str:
    with pytest.raises(IllegalEdit) as caught:
        edited(value, *edits, **options)
    return str(caught.value)


# ---- the oracle: the invariants written again, from the documentation


def walkable(edges: dict[str, list[str]], start: list[str]) -> set[str]:
    seen: set[str] = set()
    todo = list(start)
    while todo:
        here = todo.pop()
        if here not in seen:
            seen.add(here)
            todo.extend(edges.get(here, []))
    return seen


def broken_invariants(value: Any, inputs: set[str]) -> list[str]:
    nodes, edges = value["nodes"], value["edges"]
    wrong: list[str] = []
    if set(nodes) != set(edges) or value["root"] not in nodes:
        return ["nodes, edges and root disagree"]
    for name, later in edges.items():
        if not later or len(set(later)) != len(later) or any(to != "end" and to not in nodes for to in later):
            wrong.append(f"edges of {name}: {later}")
    if wrong:
        return wrong
    if set(nodes) - walkable(edges, [value["root"]]):
        wrong.append("orphan")
    wrong += [f"no end from {name}" for name in nodes if "end" not in walkable(edges, edges[name])]
    free = {name: {to for to in edges[name] if to in nodes and nodes[to]["max_visits"] == 0} for name in nodes}
    left = {name for name in nodes if nodes[name]["max_visits"] == 0}
    while True:  # peel off nodes that no unlimited node leads to; a rest is a cycle
        loose = {name for name in left if not any(name in free[other] for other in left)}
        if not loose:
            break
        left -= loose
    wrong += ["unbounded cycle"] if left else []
    return wrong + [clause for name in nodes for clause in broken_in_node(name, value, inputs)]


def broken_in_node(name: str, value: Any, inputs: set[str]) -> list[str]:
    nodes, edges, node = value["nodes"], value["edges"], value["nodes"][name]
    told = json.dumps({key: part for key, part in node.items() if key != "description"})
    wrong: list[str] = []
    for used in re.findall(r"(?<!\{)\{([A-Za-z_]\w*)\}(?!\})", told):
        if used in nodes and name not in walkable(edges, edges[used]):
            wrong.append(f"{used} cannot run before {name}")
        if used not in nodes and used not in inputs and used != "previous":
            wrong.append(f"{used} is nothing")
    if node["route"]["kind"] in ("llm", "field") and len(edges[name]) < 2:
        wrong.append(f"{name} has nothing to choose")
    if node["route"]["kind"] == "field" and set(node["route"]["cases"].values()) - set(edges[name]):
        wrong.append(f"{name} routes to a foreign node")
    return wrong


# ---- random pipelines and edits

names = st.sampled_from(NAMES)
targets = st.lists(st.sampled_from((*NAMES, "end")), min_size=1, max_size=3).map(tuple)
texts = st.sampled_from(
    ("Answer {q}", "Go on: {previous}", "Look at {a}", "Look at {b} and {q}", "{nobody}", "", 'Give {"x": 1}', "{{q}}")
)
routes = st.sampled_from(
    (
        {"kind": "next"},
        {"kind": "llm", "prompt": "Which one?"},
        {"kind": "field", "field": "go", "cases": {"yes": "a", "no": "end"}},
        {"kind": "coin"},
    )
)
definitions = st.fixed_dictionaries({"prompt": texts, "max_visits": st.integers(-1, 3)}) | texts.map(
    lambda text: {"prompt": {"task": text}}
)
edits = st.one_of(
    st.builds(
        AddNode,
        st.just("p"),
        names,
        definitions,
        names | st.just(""),
        targets | st.just(()),
    ),
    st.builds(DeleteNode, st.just("p"), names),
    st.builds(MoveNode, st.just("p"), names, names | st.just("")),
    st.builds(SetEdges, st.just("p"), names, targets, st.none() | st.integers(0, 3), st.none() | routes),
    st.builds(RewireNodes, st.just("p"), st.dictionaries(names, targets.map(list), max_size=3), st.none() | names),
    st.builds(SetRoute, st.just("p"), names, routes),
    st.builds(
        SetNodePrompt, st.just("p"), names, st.sampled_from(("task", "extra", "principles", "tone")), texts | targets
    ),
    st.builds(SetNodeDescription, st.just("p"), names, texts),
    st.builds(SetNodeTools, st.just("p"), names, targets),
)


@st.composite
def pipelines(draw: st.DrawFn) -> dict[str, Any]:
    """A legal pipeline: a chain with random extra edges, routed where there are several."""
    own = NAMES[: draw(st.integers(1, 5))]
    edges: dict[str, list[str]] = {}
    for index, name in enumerate(own):
        extra = draw(st.lists(st.sampled_from((*own, "end")), max_size=2))
        edges[name] = list(dict.fromkeys(((*own, "end")[index + 1], *extra)))
    nodes = {
        name: {
            "prompt": draw(st.sampled_from(("Answer {q}", "Go on: {previous}", "Just do it"))),
            "route": "llm" if len(edges[name]) > 1 else "next",
            "max_visits": draw(st.integers(1, 3)),
        }
        for name in own
    }
    return {"nodes": nodes, "edges": edges}


@settings(max_examples=150)
@given(pipelines(), st.lists(edits, min_size=1, max_size=8))
def test_what_is_accepted_keeps_every_invariant_and_what_is_refused_changes_nothing(
    value: dict[str, Any], proposed: list[Any]
) -> None:
    with parameter_scope():
        spec = declared(value, inputs=("q",), with_tools=True)
        candidate = Candidate({"p": spec.default})
        assert broken_invariants(candidate.get("p"), {"q"}) == []
        for edit in proposed:
            before = json.dumps(candidate.get("p"))
            try:
                child = apply_edits(candidate, [edit], {"p": spec})
            except IllegalEdit as error:
                assert all(problem.message and not problem.message.endswith(".") for problem in error.problems)
                assert json.dumps(candidate.get("p")) == before
                continue
            assert broken_invariants(child.get("p"), {"q"}) == []
            assert pipeline_problems(child.get("p"), ("q",)) == []
            again = apply_edits(candidate, [edit_from_dict(json.loads(json.dumps(edit.to_dict())))], {"p": spec})
            assert again.hash == child.hash
            assert json.dumps(candidate.get("p")) == before
            candidate = child


@settings(max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(("root", "nodes", "edges", "prompt", "route", "task", "a", "max_visits")),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_no_value_is_too_strange_to_be_described(value: Any) -> None:
    problems = pipeline_problems(complete_pipeline(value), ("q",))
    assert all(isinstance(problem, str) for problem in problems)
    if not problems:
        assert broken_invariants(complete_pipeline(value), {"q"}) == []


# ---- each check in words

LOOP = {"a": ["b"], "b": ["a", "end"]}


@pytest.mark.parametrize(
    ("value", "clause"),
    [
        ([], "expected a map with root, nodes and edges"),
        ({"nodes": {}}, "at least one node"),
        ({**chain("a"), "root": "z"}, "root 'z' is no node"),
        ({**chain("a"), "loops": 1}, "unknown key 'loops'"),
        (chain("end"), "node name 'end'"),
        (chain("two words"), "node name 'two words'"),
        (chain("a", edges={"a": ["z"]}), "'z' is no node"),
        (chain("a", "b", edges={"a": ["end"], "b": ["end"]}), "node 'b' is an orphan"),
        (chain("a", "b", edges={"a": ["b"], "b": ["a"]}), "the end cannot be reached from node 'a'"),
        ({"nodes": {"a": {"prompt": "x", "max_visits": 0, "route": "llm"}}, "edges": {"a": ["a", "end"]}}, "a → a"),
        ({"nodes": {"a": {"prompt": "x", "max_visits": 99}}}, "'max_visits' must be"),
        ({"nodes": {"a": {"prompt": "x", "max_visits": True}}}, "'max_visits' must be"),
        ({"nodes": {"a": {"prompt": "  "}}}, "'task' is empty"),
        ({"nodes": {"a": {"prompt": "x", "mood": "good"}}}, "'mood' is missing or unknown"),
        ({"nodes": {"a": {"prompt": {"task": "x", "tone": "y"}}}}, "'prompt' must be a map with exactly"),
        ({"nodes": {"a": "look at {b}", "b": "x"}}, "{b} cannot have run before 'a'"),
        ({"nodes": {"a": {"prompt": "x", "route": "llm"}}}, "needs at least two next nodes"),
        (chain("a", "b", edges={"a": ["b", "end"], "b": ["end"]}), "always takes 'b' and never end"),
        ({"nodes": {"a": {"prompt": "x", "route": "coin"}}}, "route kind 'coin' is none of next, llm, field"),
        (
            {
                "nodes": {"a": {"prompt": "x", "route": {"kind": "field", "cases": {"y": "b"}}}, "b": "x"},
                "edges": {"a": ["a", "end"], "b": ["end"]},
            },
            "orphan",
        ),
        (
            {
                "nodes": {"a": {"prompt": "x", "route": {"kind": "field", "cases": {}}}, "b": "x"},
                "edges": {"a": ["b", "end"], "b": ["end"]},
            },
            "no route case leads to 'end'",
        ),
    ],
)
def test_a_wrong_pipeline_is_refused_in_one_clause(value: Any, clause: str) -> None:
    assert any(clause in problem for problem in pipeline_problems(complete_pipeline(value), ("q",)))


def test_a_declaration_with_a_wrong_pipeline_says_which_one() -> None:
    with pytest.raises(UserError, match=r"pipeline 'p': node 'b' is an orphan"):
        declared(chain("a", "b", edges={"a": ["end"], "b": ["end"]}))
    with pytest.raises(UserError, match="max_nodes must be"):
        declared(chain("a"), max_nodes=0)


def test_inputs_are_the_placeholders_that_are_no_nodes() -> None:
    value = complete_pipeline({"nodes": {"a": "{q} {context} {previous}", "b": '{a} {style} {{literal}} {"x": 1}'}})
    assert pipeline_inputs(value) == ("q", "context", "style")
    assert "{nobody} is neither an input nor a node" in refusal(
        chain("a"), SetNodePrompt("p", "a", "task", "Answer {q} like {nobody}")
    )
    assert "names tools, but the pipeline has no toolbox" in refusal(chain("a"), SetNodeTools("p", "a", ("search",)))
    assert "has 3 nodes, at most 2" in refusal(chain("a", "b"), AddNode("p", "c", {"prompt": "x"}, "b"), max_nodes=2)
    assert "has the name of an input" in refusal(chain("a"), AddNode("p", "q", {"prompt": "x"}, "a"))


def test_filling_leaves_other_braces_and_filled_values_alone() -> None:
    text = 'say {q} as {"q": {"r": 1}} or {{q}} to {who}'
    assert fill_placeholders(text, {"q": "{who}", "r": "no"}) == 'say {who} as {"q": {"r": 1}} or {q} to {who}'


# ---- what each edit does


def test_a_node_is_added_between_a_node_and_what_follows_it() -> None:
    value = edited(chain("a", "b"), AddNode("p", "check", {"prompt": "Check {a}"}, "a"))
    assert value["edges"] == {"a": ["check"], "b": ["end"], "check": ["b"]}
    assert value["nodes"]["check"]["prompt"]["task"] == "Check {a}" and value["nodes"]["check"]["lm"] == "agent"


def test_a_node_is_added_in_front_as_a_branch_and_on_one_edge() -> None:
    assert edited(chain("a"), AddNode("p", "plan", {"prompt": "Plan {q}"}, ""))["root"] == "plan"
    branch = edited(chain("a", "b"), AddNode("p", "c", {"prompt": "x"}, "a", ("end",)))
    assert branch["edges"]["a"] == ["b", "c"] and branch["nodes"]["a"]["route"]["kind"] == "llm"
    routed = {
        "nodes": {"a": {"prompt": "{q}", "route": {"kind": "field", "cases": {"ok": "end", "no": "b"}}}, "b": "{q}"},
        "edges": {"a": ["end", "b"], "b": ["end"]},
    }
    value = edited(routed, AddNode("p", "c", {"prompt": "x"}, "a", ("b",)))
    assert value["edges"] == {"a": ["end", "c"], "b": ["end"], "c": ["b"]}
    assert value["nodes"]["a"]["route"]["cases"] == {"ok": "end", "no": "c"}


def test_a_node_that_repeats_itself_goes_on_repeating_before_an_added_node() -> None:
    value = edited(chain("a", edges={"a": ["a", "end"]}), AddNode("p", "b", {"prompt": "x"}, "a"))
    assert value["edges"] == {"a": ["a", "b"], "b": ["end"]}


def test_a_deleted_node_is_bridged_and_its_placeholders_name_the_node_before_it() -> None:
    value = edited({"nodes": {"a": "{q}", "b": "{a}", "c": "{b} {a}"}}, DeleteNode("p", "b"))
    assert value["edges"] == {"a": ["c"], "c": ["end"]}
    assert value["nodes"]["c"]["prompt"]["task"] == "{a} {a}"


def test_deleting_the_checker_of_a_loop_leaves_no_self_loop() -> None:
    value = {
        "nodes": {"write": "{q} {check}", "check": {"prompt": "{write}", "route": "llm"}},
        "edges": {"write": ["check"], "check": ["write", "end"]},
    }
    made = edited(value, DeleteNode("p", "check"))
    assert made["edges"] == {"write": ["end"]} and made["nodes"]["write"]["route"]["kind"] == "next"
    assert made["nodes"]["write"]["prompt"]["task"] == "{q} {previous}"


def test_a_root_hands_over_to_its_only_heir_and_the_last_node_stays() -> None:
    assert edited(chain("a", "b"), DeleteNode("p", "a"))["root"] == "b"
    assert "is the only node" in refusal(chain("a"), DeleteNode("p", "a"))
    fork = {
        "nodes": {"a": {"prompt": "{q}", "route": "llm"}, "b": "{q}", "c": "{q}"},
        "edges": {"a": ["b", "c"], "b": ["end"], "c": ["end"]},
    }
    assert "is the root and leads to b, c" in refusal(fork, DeleteNode("p", "a"))


def test_a_node_moves_and_placeholders_that_come_too_early_refuse_it() -> None:
    value = edited(chain("a", "b", "c"), MoveNode("p", "a", "b"))
    assert (value["root"], value["edges"]) == ("b", {"b": ["a"], "c": ["end"], "a": ["c"]})
    assert edited(chain("a", "b", "c"), MoveNode("p", "c", ""))["root"] == "c"
    said = refusal({"nodes": {"a": "{q}", "b": "see {a}"}}, MoveNode("p", "b", ""))
    assert "{a} cannot have run before 'b'" in said
    assert "cannot stand behind itself" in refusal(chain("a", "b"), MoveNode("p", "a", "a"))


def test_edges_come_with_their_route_and_limit() -> None:
    value = edited(
        chain("a", "b"),
        SetEdges("p", "b", ("a", "end"), 2, {"kind": "field", "field": "ok", "cases": {"yes": "end"}}),
    )
    assert value["edges"]["b"] == ["a", "end"] and value["nodes"]["b"]["max_visits"] == 2
    assert value["nodes"]["b"]["route"] == {"kind": "field", "field": "ok", "cases": {"yes": "end"}, "prompt": ""}
    back = edited(value, SetEdges("p", "b", ("end",)))
    assert back["nodes"]["b"]["route"]["kind"] == "next"  # nothing is left to choose from


def test_two_nodes_swap_in_one_edit_that_would_be_illegal_in_two() -> None:
    value = chain("a", "b", "c")
    assert "cannot be reached" in refusal(value, SetEdges("p", "c", ("b",)), SetEdges("p", "b", ("end",)))
    made = edited(value, RewireNodes("p", {"a": ["c"], "c": ["b"], "b": ["end"]}))
    assert made["edges"] == {"a": ["c"], "b": ["end"], "c": ["b"]}
    assert edited(value, RewireNodes("p", {"c": "a", "b": "end"}, "c"))["root"] == "c"
    assert "expected a list of next nodes" in refusal(value, RewireNodes("p", {"a": 3}))


def test_prompts_descriptions_tools_and_routes_change() -> None:
    value = edited(
        chain("a", "b", edges={"a": ["a", "b"], "b": ["end"]}),
        SetNodePrompt("p", "a", "principles", ("Be brief.",)),
        SetNodePrompt("p", "a", "role", "You answer."),
        SetNodeDescription("p", "a", "answers"),
        SetNodeTools("p", "a", ("search", "search")),
        SetRoute("p", "a", {"kind": "llm"}),
        with_tools=True,
    )
    node = value["nodes"]["a"]
    assert node["prompt"]["principles"] == ["Be brief."] and node["role"] == "You answer."
    assert node["description"] == "answers" and node["tools"] == ["search"] and node["route"]["kind"] == "llm"
    assert "must be a list of texts" in refusal(value, SetNodePrompt("p", "a", "principles", "x"), with_tools=True)
    assert "is no component" in refusal(value, SetNodePrompt("p", "a", "tone", "x"), with_tools=True)


def test_an_unknown_node_is_named_with_the_nearest_one() -> None:
    said = refusal(chain("write", "check"), SetNodeDescription("p", "chek", "x"))
    assert "there is no node 'chek' (did you mean 'check'?); the nodes are write, check" in said
    assert "there is a node 'write' already" in refusal(chain("write"), AddNode("p", "write", {"prompt": "x"}, ""))


def test_a_whole_value_may_be_set_with_keys_left_out() -> None:
    value = edited(chain("a"), SetValue("p", {"nodes": {"x": "{q}", "y": "{x}"}}))
    assert value["edges"] == {"x": ["y"], "y": ["end"]} and value["root"] == "x"
    assert "nodes" in refusal(chain("a"), SetValue("p", "no pipeline"))


def test_an_edit_of_a_value_that_is_no_pipeline_says_so() -> None:
    with pytest.raises(EditError, match="not usable as it is"):
        DeleteNode("p", "a").change({"nodes": 3}, None)


@pytest.mark.parametrize("route", [5, [1], {"cases": 3}, {"kind": "field", "cases": ["end"]}, {"kind": ["llm"]}])
def test_a_route_of_another_form_is_refused_in_one_clause(route: Any) -> None:
    for edit in (AddNode("p", "x", {"prompt": "x", "route": route}, "a"), SetRoute("p", "a", route)):
        assert "route" in refusal(chain("a", "b"), edit)
    assert "route" in refusal(chain("a", "b"), SetEdges("p", "a", ("b", "end"), None, route))
