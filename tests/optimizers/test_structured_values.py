"""What optimizers show of principles, tools and pipelines, and how replies become values of these kinds."""

from __future__ import annotations

import json
from typing import Any

import pytest

import agentopt as ao
from agentopt import graph
from agentopt.optimizers._legal import coerce, edit_for
from agentopt.optimizers._memory import edit_text
from agentopt.optimizers._problem import _LEVELS, _variable, constraint_line

TRIPLE = 'def triple(n: int) -> int:\n    """Triple."""\n    return 3 * n'


def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


def created() -> list[dict[str, Any]]:
    box = ao.toolbox([add], name="box")
    edit = graph.CreateTool("box", "triple", "Triples.", TRIPLE, ({"args": {"n": 1}, "expected": 3},))
    with graph.apply_edits(graph.Candidate(), [edit], graph.declared_parameters()).active():
        return box.value


def test_the_problem_text_shows_rules_and_tools_readably() -> None:
    rules = ao.principles(["Be short.", "Say why."], name="rules")
    counted = graph.apply_edits(
        graph.Candidate(), [graph.CountPrinciples("rules", ("p2",))], graph.declared_parameters()
    )
    shown = _variable(rules.spec, counted["rules"], _LEVELS[0])
    assert shown == "(principles) rules =\n<<<\np1: Be short.\np2: Say why.  (helped 1, harmed 0)\n>>>"
    assert "at most 24 rules" in constraint_line(rules.spec)
    tools = _variable(graph.ParameterSpec("box", "tools", []), created(), _LEVELS[0])
    assert "add(a, b): Add two numbers.\ntriple(n): Triples.\n  code:\n    def triple(n: int) -> int:" in tools
    assert 'example: {"n": 1} -> 3' in tools
    assert _variable(rules.spec, [], _LEVELS[0]) == "(principles) rules = []"


def test_a_pipeline_is_shown_readably() -> None:
    node = {"description": "plans", "role": "", "prompt": {"task": "Plan {q}", "principles": ["Be short."]}}
    value = {"root": "plan", "nodes": {"plan": {**node, "tools": ["add"], "route": {"kind": "llm"}}}}
    lines = graph.readable_lines({**value, "edges": {"plan": ["plan", "end"]}})
    assert lines is not None
    assert lines[:3] == ["starts at plan", "plan -> plan, end (route: llm)", "  description: plans"]
    assert "    - Be short." in lines


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [{"id": 1}], ["x"], {"nodes": 3}, {"nodes": {}, "edges": 1}])
def test_other_values_are_left_to_the_caller(value: Any) -> None:
    assert graph.readable_lines(value) is None


@pytest.mark.parametrize(
    "value",
    [
        [{"id": 1, "text": None, "helpful": "x", "harmful": []}],
        [{"name": None, "description": None, "parameters": 3, "source": None, "examples": [3]}],
        {"nodes": {"a": 3, "b": {"prompt": 3, "tools": 3, "route": []}}, "edges": {"a": 3}},
    ],
)
def test_malformed_values_are_shown_without_an_error(value: Any) -> None:
    assert graph.readable_lines(value)


def test_memory_tells_what_an_edit_of_a_part_does() -> None:
    assert edit_text(graph.AddPrinciple("rules", "Be short."), 80) == "rules: add principle text='Be short.'"
    assert edit_text(graph.DeleteTool("box", "add"), 80) == "box: delete tool tool='add'"
    assert "ids=['p1', 'p2']" in edit_text(graph.MergePrinciples("rules", ("p1", "p2"), "x"), 200)
    long = edit_text(graph.EditToolCode("box", "triple", TRIPLE * 9), 60)
    assert len(long) < 100 and "chars]" in long
    whole = graph.SetValue("rules", graph.principle_list(["Be short."]))
    assert edit_text(whole, 80) == "rules =\np1: Be short."
    assert edit_text(graph.SetText("text", "x"), 80) == "text = x"


@pytest.mark.parametrize(
    "reply",
    [
        ["Be short.", "Name the unit."],
        '["Be short.", "Name the unit."]',
        "- Be short.\n- Name the unit.\n",
        "```\n1. Be short.\n2) Name the unit.\n```",
        "p2: Be short.  (helped 1, harmed 0)\n\n- p7: Name the unit.",
        [{"text": "Be short."}, "Name the unit.", " - name the unit"],
    ],
)
def test_texts_become_principles_and_keep_known_counters(reply: Any) -> None:
    rules = ao.principles(["Say why.", "Be short."], name="rules")
    assert [(item["id"], item["text"]) for item in coerce(rules.spec, reply)] == [
        ("p2", "Be short."),
        ("p3", "Name the unit."),
    ]
    edit = edit_for(rules.spec, reply)
    assert graph.apply_edits(graph.Candidate(), [edit], graph.declared_parameters())["rules"]


@pytest.mark.parametrize("reply", [None, 3, "", "{", {}, [1], [{"id": "p1"}], "```json\n[{]\n```"])
def test_junk_is_an_illegal_edit_and_never_an_exception(reply: Any) -> None:
    rules = ao.principles(["Say why."], name="rules")
    tools = ao.toolbox([add], name="box")
    for handle in (rules, tools):
        edit = edit_for(handle.spec, reply)
        try:
            graph.apply_edits(graph.Candidate(), [edit], graph.declared_parameters())
        except graph.IllegalEdit as error:
            assert str(error)


def test_a_number_beyond_every_float_is_an_illegal_edit() -> None:
    number = ao.number(0.0, 1.0, name="number")
    with pytest.raises(graph.IllegalEdit):
        graph.apply_edits(graph.Candidate(), [edit_for(number.spec, 10**400)], graph.declared_parameters())


def test_text_nested_without_end_stays_text() -> None:
    box = ao.toolbox([add], name="box")
    assert coerce(box.spec, "[" * 100_000) == "[" * 100_000


def test_a_toolbox_given_as_text_is_read_as_json() -> None:
    value = created()
    spec = graph.declared_parameters()["box"]
    assert coerce(spec, "```json\n" + json.dumps(value) + "\n```") == value
