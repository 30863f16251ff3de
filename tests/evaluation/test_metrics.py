"""Metrics: the score, and feedback that says what was expected; mistakes in a metric are told, not scored."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.evaluation import Example, Judge, Score, resolve_metric
from agentopt.evaluation._text import last_number, normalize, token_f1
from agentopt.models import LM, FunctionLM, LMBadReply

EXAMPLE = Example(inputs={"q": "?"}, expected="x")


def score(metric: Any, output: Any, expected: Any = None, field: str | None = None) -> Score:
    return asyncio.run(resolve_metric(metric, field)(output, expected, EXAMPLE, None))


@dataclass
class Answer:
    label: str


@pytest.mark.parametrize(
    ("metric", "output", "expected", "value"),
    [
        ("exact_match", " billing\n", "billing", 1),
        ("exact_match", "Billing", "billing", 0),
        ("exact_match", {"a": 1}, {"a": 1}, 1),
        ("exact_match", "3", 3, 1),
        ("exact_match", 3.0, 3, 1),
        ("exact_match", None, "x", 0),
        ("normalized_match", "The  Billing!", "billing", 1),
        ("normalized_match", "shipping", "billing", 0),
        ("contains", "It is in Paris, France.", "paris", 1),
        ("contains", "It is in Paris", ["paris", "france"], 0),
        ("f1", "the cat sat", "a cat sat down", 0.8),
        ("f1", "", "", 1),
        ("numeric", "The answer is 1,234.50 euros", "1234.5", 1),
        ("numeric", "between 3 and 4", 4, 1),
        ("numeric:0.5", "10.4", 10, 1),
        ("numeric:0.5", "10.6", 10, 0),
        ("numeric", "none", 10, 0),
        ("numeric", 1_000_000.5, 1_000_000, 1),
        ("regex", "order 4711 shipped", r"\b\d{4}\b", 1),
        (r"regex:^yes", "no", None, 0),
        ("json_schema", '{"a": 1}', {"type": "object", "required": ["a"]}, 1),
        ("json_schema", '```json\n{"a": 1}\n```', '{"required": ["a"]}', 1),
        ("json_schema", {"b": 1}, {"required": ["a"]}, 0),
        ("json_schema", "no json", {"required": ["a"]}, 0),
    ],
)
def test_named_metrics(metric: str, output: Any, expected: Any, value: float) -> None:
    found = score(metric, output, expected)
    assert found.value == pytest.approx(value)
    assert bool(found.feedback) == (value < 1), "feedback exactly when something is wrong"


def test_feedback_names_both_values_and_what_kind_of_difference() -> None:
    assert score("exact_match", "Billing.", "billing").feedback == (
        "Expected 'billing', but the output is 'Billing.'. Only the form differs: case, punctuation or articles."
    )
    assert "Missing words: sat" in (score("f1", "cat", "cat sat").feedback or "")
    assert "a: 'x' is not of type 'integer'" in (
        score("json_schema", '{"a": "x"}', {"properties": {"a": {"type": "integer"}}}).feedback or ""
    )
    assert len(score("exact_match", "x" * 10_000, "y").feedback or "") < 500


def test_output_field_reads_dicts_and_objects() -> None:
    assert score("exact_match", {"label": "x"}, "x", "label").value == 1
    assert score("exact_match", Answer("x"), "x", "label").value == 1
    wrong = score("exact_match", {"other": "x"}, "x", "label")
    assert (wrong.value, wrong.feedback) == (0.0, "The output has no field 'label'; it has 'other'.")
    assert "expected an object with the field 'label'" in (score("exact_match", "x", "x", "label").feedback or "")


@pytest.mark.parametrize(
    ("result", "value", "feedback", "objectives"),
    [
        (True, 1.0, None, {}),
        (0.25, 0.25, None, {}),
        ((0.5, "nearly"), 0.5, "nearly", {}),
        ((1, ""), 1.0, None, {}),
        ({"score": 0.5, "length": 3}, 0.5, None, {"length": 3.0}),
        ({"a": 1.0, "b": 0.0, "feedback": "b is missing"}, 0.5, "b is missing", {"a": 1.0, "b": 0.0}),
        (Score(0.75, "x"), 0.75, "x", {}),
    ],
)
def test_what_a_users_metric_may_return(result: Any, value: float, feedback: str | None, objectives: Any) -> None:
    def metric(output: Any, expected: Any, example: Any) -> Any:
        return result

    async def ametric(output: Any, expected: Any, example: Any, *, trace: Any = None) -> Any:
        return result

    for target in (metric, ametric):
        found = score(target, "x", "y")
        assert (found.value, found.feedback, dict(found.objectives)) == (value, feedback, objectives)


@pytest.mark.parametrize("result", [None, "good", (1, 2, 3), {}, {"score": "x"}, math.nan, math.inf])
def test_a_metric_that_returns_no_score_is_told(result: Any) -> None:
    with pytest.raises(UserError, match=r"metric 'metric' returned|could not|expected"):

        def metric(output: Any, expected: Any, example: Any) -> Any:
            return result

        score(metric, "x", "y")


def test_metrics_from_files_and_modules(tmp_path: Path) -> None:
    (tmp_path / "grading_here.py").write_text(
        "def graded(output, expected, example):\n    return 0.5, 'half'\nlimit = 3\ndef short(output):\n    return 1\n",
        encoding="utf-8",
    )
    assert score(f"{tmp_path}/grading_here.py:graded", "x").feedback == "half"
    assert resolve_metric("grading_here:graded").name == "grading_here:graded"
    with pytest.raises(UserError, match=r"has no 'grade'; did you mean 'graded'"):
        resolve_metric("grading_here:grade")
    with pytest.raises(UserError, match="is a int, expected a function"):
        resolve_metric("grading_here:limit")
    with pytest.raises(UserError, match=r"takes \(output\), expected \(output, expected, example\)"):
        resolve_metric("grading_here:short")
    sys.modules.pop("grading_here")
    sys.path.remove(str(tmp_path))


def test_an_unknown_metric_lists_the_known_ones_and_the_closest() -> None:
    with pytest.raises(
        UserError, match=r"unknown metric 'exact_mach'; known are exact_match, .*Did you mean 'exact_match'"
    ):
        resolve_metric("exact_mach")
    with pytest.raises(UserError, match="unknown metric 'f1:3'"):
        resolve_metric("f1:3")
    with pytest.raises(UserError, match="the tolerance is a number"):
        resolve_metric("numeric:small")
    with pytest.raises(UserError, match="no regular expression"):
        resolve_metric("regex:(")
    with pytest.raises(UserError, match="the schema cannot be read"):
        resolve_metric("json_schema:missing.json")
    with pytest.raises(UserError, match="found int, expected a name"):
        resolve_metric(3)  # pyright: ignore[reportArgumentType]


def test_json_schema_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(UserError, match=r"pip install 'agentopt\[jsonschema\]'"):
        resolve_metric("json_schema")


@settings(max_examples=80, deadline=None)
@given(a=st.text(max_size=30), b=st.text(max_size=30))
def test_text_measures_keep_their_bounds(a: str, b: str) -> None:
    assert normalize(normalize(a)) == normalize(a)
    assert 0.0 <= token_f1(a, b) == token_f1(b, a) <= 1.0
    assert token_f1(a, a) == 1.0
    assert last_number(a) is None or math.isfinite(last_number(a) or 0.0) or "e" in a.lower()


@settings(max_examples=80, deadline=None)
@given(value=st.integers(-(10**12), 10**12))
def test_the_last_number_is_read_with_or_without_separators(value: int) -> None:
    assert last_number(f"12 then {value}.") == value
    assert last_number(f"is {value:,} euros") == value


def judge_reply(request: Any) -> str:
    text = request.messages[-1]["content"]
    return json.dumps({"reasons": "too short" if "brief" in text else "fine", "score": 3 if "brief" in text else 10})


def test_a_judge_grades_with_reasons() -> None:
    judge = Judge("The answer is polite.", LM(FunctionLM(judge_reply)))
    assert score(judge, "a brief answer") == Score(0.3, "too short")
    assert score(judge, {"answer": "a long one"}, "expected text").value == 1.0


def test_a_judge_without_a_usable_reply_is_an_error() -> None:
    with pytest.raises(LMBadReply):
        score(Judge("Polite.", LM(FunctionLM(lambda request: "no idea"))), "x")
