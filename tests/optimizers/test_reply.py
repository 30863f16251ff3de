from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.optimizers._reply import parse_reply, parse_text, resolve_name

NAMES = ["triage.instruction", "x", "code"]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"reasoning": "r", "suggestion": {"x": "1"}}', {"x": "1"}),
        ('```json\n{"suggestion": {"x": "1"}}\n```', {"x": "1"}),
        ('```\n{"suggestion": {"x": "1"}}\n```', {"x": "1"}),
        ('Sure! Here it is:\n{"suggestion": {"x": "1"}}\nHope it helps {smile}.', {"x": "1"}),
        ('Sure:\n```json\n{"suggestion": {"x": "1"}}\n```\nBye', {"x": "1"}),
        ('{"suggestion": [{"name": "x", "value": "1"}, {"name": "code", "value": "2"}]}', {"x": "1", "code": "2"}),
        ('[{"name": "x", "value": "1"}]', {"x": "1"}),
        ('{"x": "1"}', {"x": "1"}),
        ('{"reasoning": "r", "triage.instruction": "new", "answer": "3"}', {"triage.instruction": "new"}),
        ('{"suggestion": {"x:0": "1"}}', {"x": "1"}),
        ('{"suggestion": {"x0": "1"}}', {"x": "1"}),
        ('{"suggestion": {"instruction": "new"}}', {"triage.instruction": "new"}),
        ('{"suggestion": {"triage_instruction": "new"}}', {"triage.instruction": "new"}),
        ('{"suggestion": {"x": {"value": "1", "why": "z"}}}', {"x": "1"}),
        ('{"suggestion": "{\\"x\\": \\"1\\"}"}', {"x": "1"}),
        ('{"suggestion": {"x": "1",},}', {"x": "1"}),
        ('{"suggestion": {"x": "two\nlines"}}', {"x": "two\nlines"}),
        ('{"reasoning": "the {ticket} part", "suggestion": {"x": "use {ticket}"}}', {"x": "use {ticket}"}),
        ('{"suggestion": {"x": "finished", "code": "cut of', {"x": "finished"}),
        ("<reasoning>r</reasoning><variable name=\"x\">1</variable>", {"x": "1"}),
        ("<variable>\n<name>x</name>\n<value>\n1\n2\n</value>\n</variable>", {"x": "1\n2"}),
        ('<variable name="x"><value>1</value></variable><variable name="x">2</variable>', {"x": "1"}),
        ("before <x>1</x> after <unknown>3</unknown>", {"x": "1"}),
        ("<variable name='x'>\n<b>bold</b>\n</variable>", {"x": "<b>bold</b>"}),
        ("x: 1\nother: 2", {"x": "1"}),
        ("I suggest 'x': \"1\" because", {"x": "1"}),
    ],
)  # fmt: skip
def test_each_rung_of_the_ladder_reads_its_form(reply: str, expected: dict[str, Any]) -> None:
    parsed = parse_reply(reply, NAMES)
    assert parsed.problem is None
    assert parsed.suggestion == expected


@pytest.mark.parametrize(
    "reply",
    [
        "TERMINATE",
        "no change.",
        '{"reasoning": "fine", "suggestion": {}}',
        '{"suggestion": []}',
        '{"suggestion": null, "x": "a"}',
    ],
)
def test_no_change_is_a_readable_answer(reply: str) -> None:
    parsed = parse_reply(reply, NAMES)
    assert parsed.problem is None
    assert parsed.suggestion in ({}, {"x": "a"})


@pytest.mark.parametrize("reply", [None, "", "   ", "I'm sorry, I can't help.", "{", "{}", '{"reasoning": "a"', "42"])
def test_garbage_is_a_problem_not_an_exception(reply: Any) -> None:
    parsed = parse_reply(reply, NAMES)
    assert parsed.suggestion == {}
    assert parsed.problem


def test_a_suggestion_for_an_unknown_name_is_named_in_the_problem() -> None:
    parsed = parse_reply('{"suggestion": {"nothing_known": "1"}}', NAMES)
    assert parsed.suggestion == {}
    assert "nothing_known" in (parsed.problem or "") or parsed.unknown == ("nothing_known",)


def test_reasoning_is_kept() -> None:
    assert parse_reply('{"reasoning": "because", "suggestion": {"x": "1"}}', NAMES).reasoning == "because"
    assert parse_reply("<reasoning>because</reasoning><x>1</x>", NAMES).reasoning == "because"


def test_an_ambiguous_short_name_is_not_guessed() -> None:
    assert resolve_name("instruction", ["a.instruction", "b.instruction"]) is None
    assert resolve_name("A.Instruction", ["a.instruction", "b.instruction"]) == "a.instruction"


@given(st.text(max_size=300))
def test_no_text_makes_the_ladder_raise(reply: str) -> None:
    parsed = parse_reply(reply, NAMES)
    assert set(parsed.suggestion) <= set(NAMES)
    parse_text(reply, "instruction")


KEYS = st.sampled_from([*NAMES, "suggestion", "name", "value", "reasoning", "z"])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
)


@given(JSON_VALUES)
def test_no_json_value_makes_the_ladder_raise(value: Any) -> None:
    for reply in (value, json.dumps(value), "noise " + json.dumps(value)[:-1]):
        assert set(parse_reply(reply, NAMES).suggestion) <= set(NAMES)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ('{"instruction": "Do it well."}', "Do it well."),
        ("```\nDo it well.\n```", "Do it well."),
        ("Sure, here you go\nInstruction: Do it well.", "Do it well."),
        ('"Do it well."', "Do it well."),
        ("<instruction>Do it well.</instruction>", "Do it well."),
        ("I'm sorry, but I can't do that.", None),
        ('{"instruction": ', None),
        ("", None),
        (None, None),
        ("12 34", None),
        ("x" * 9000, None),
    ],
)
def test_one_text_is_found_or_refused(reply: str | None, text: str | None) -> None:
    assert parse_text(reply, "instruction") == text
