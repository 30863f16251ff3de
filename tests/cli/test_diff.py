"""Diffs and reports of parameters that have parts."""

from __future__ import annotations

import json
from typing import Any

from agentopt.cli._console import diff_lines, value_lines
from agentopt.graph import principle_list
from agentopt.observe._report import _changes


def tool(source: str) -> list[dict[str, Any]]:
    schema = {"type": "object", "properties": {"n": {}}, "required": ["n"]}
    return [{"name": "triple", "description": "Triples.", "parameters": schema, "source": source, "examples": []}]


def test_a_changed_rule_is_one_line_of_the_diff() -> None:
    before, after = principle_list(["Be short.", "Say why."]), principle_list(["Be short.", "Name the unit."])
    assert diff_lines(before, after) == [(" ", "p1: Be short."), ("-", "p2: Say why."), ("+", "p2: Name the unit.")]
    (change,) = _changes({"rules": before}, {"rules": after})
    assert change["lines"][0] == (" ", "p1: Be short.")


def test_changed_code_of_a_tool_is_shown_as_code() -> None:
    lines = diff_lines(tool("def triple(n):\n    return n"), tool("def triple(n):\n    return 3 * n"))
    assert (" ", "    def triple(n):") in lines
    assert ("+", "        return 3 * n") in lines


def test_other_values_are_shown_as_before() -> None:
    assert value_lines("a\nb") == ["a", "b"]
    assert value_lines([{"input": "a", "output": "b"}]) == ["a  ->  b"]
    assert value_lines({"a": 1}) == json.dumps({"a": 1}, indent=2).splitlines()
    assert value_lines([]) == []
