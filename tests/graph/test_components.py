"""A prompt in parts: what is declared, what is shown, what is read."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

import agentopt as ao
from agentopt import graph
from agentopt.errors import UserError


def full() -> ao.Components:
    return ao.components(
        name="triage",
        task="Classify: {ticket}",
        principles=["Be kind."],
        demos=[{"input": "no heat", "output": "repair"}],
        output_format='JSON such as {"label": "repair"}',
        extra="Today is {day}.",
    )


def test_each_part_is_a_parameter_of_its_own() -> None:
    parts = full()
    specs = graph.declared_parameters()
    assert set(specs) == {f"triage.{component}" for component in graph.COMPONENTS}
    for component, handle in parts.handles.items():
        assert (handle.spec.owner, handle.spec.component) == ("triage", component)
        assert not handle.spec.frozen
    assert parts.task.spec.variables == ("ticket",)
    assert [handle.spec.kind for handle in parts.handles.values()] == [
        "prompt",
        "principles",
        "demos",
        "prompt",
        "prompt",
    ]


def test_the_parts_stand_in_order_and_empty_ones_are_left_out() -> None:
    assert full().format(ticket="it drips", day="Monday") == (
        "Classify: it drips\n\nPrinciples:\n- Be kind.\n\n"
        'Output format:\nJSON such as {"label": "repair"}\n\nNotes:\nToday is Monday.'
    )
    assert str(full()).startswith("Classify: {ticket}\n\nPrinciples:")
    assert "Notes:\nToday is {day}." in f"{full()}"
    assert ao.components(name="bare", task="Do it.").format() == "Do it."


def test_demos_are_shown_in_the_text_on_request_only() -> None:
    text = full().format(with_demos=True, ticket="x", day="y")
    assert "Examples:\nInput: no heat\nOutput: repair\n\nOutput format:" in text
    assert "no heat" not in full().format(ticket="x", day="y")


def test_a_missing_variable_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="day"):
        full().format(ticket="x")


def test_text_with_braces_and_no_variables_is_taken_as_it_is() -> None:
    parts = ao.components(name="a", task='Give {"a": 1}', extra="{}")
    assert parts.format(a=1) == 'Give {"a": 1}\n\nNotes:\n{}'


def test_edits_change_one_part_and_keep_variables() -> None:
    parts = full()
    specs = graph.declared_parameters()
    edits = [graph.AddPrinciple("triage.principles", "Be short."), graph.SetText("triage.output_format", "One word.")]
    with graph.apply_edits(graph.Candidate(), edits, specs).active():
        text = parts.format(ticket="x", day="y")
    assert "- Be short." in text and "One word." in text
    for name, wrong, message in (
        ("triage.task", "Classify.", "loses the variable {ticket}"),
        ("triage.output_format", "As {shape}", "adds the variable {shape}"),
        ("triage.task", "", "the text is empty"),
    ):
        with pytest.raises(graph.IllegalEdit, match=message.replace("{", r"\{").replace("}", r"\}")):
            graph.apply_edits(graph.Candidate(), [graph.SetText(name, wrong)], specs)
    graph.apply_edits(graph.Candidate(), [graph.SetText("triage.output_format", "")], specs)  # it may be left empty
    empty = ao.components(name="bare", task="Do it.")
    with graph.apply_edits(
        graph.Candidate(), [graph.SetText("bare.extra", "Hurry.")], graph.declared_parameters()
    ).active():
        assert empty.format() == "Do it.\n\nNotes:\nHurry."


def test_every_part_that_may_be_shown_is_read_also_when_it_is_empty() -> None:
    parts = ao.components(name="bare", task="Do it.")
    with ao.record() as recording:
        parts.format()
    assert set(recording.trace.parameters) == {f"bare.{part}" for part in graph.COMPONENTS if part != "demos"}


def test_a_model_call_takes_components_and_their_demos() -> None:
    parts = ao.components(name="t", task="Classify.", principles=["Be kind."], demos=[{"input": "a", "output": "b"}])
    seen: list[Any] = []
    lm = ao.FunctionLM(lambda request: seen.extend(request.messages) or "ok")
    with ao.record() as recording:
        anyio.run(lambda: lm.complete(system=parts, user="c", demos=parts.demos))
    assert [message["content"] for message in seen] == [str(parts), "a", "b", "c"]
    call = next(op for op in recording.trace.ops if op.kind == "lm")
    assert len([kind for _, kind in call.parents if kind == "parameter"]) == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": ""}, "the task must be a text"),
        ({"task": "x", "principles": "one"}, "list of texts"),
        ({"task": "x", "demos": [{"input": "a"}]}, "'output' must be text"),
        ({"task": "x", "extra": None}, "extra must be a text"),
        ({"task": "x", "max_demos": 0}, "max_demos"),
        ({"task": "x", "max_principles": 0}, "max_items"),
    ],
)
def test_bad_parts_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ao.components(name="bad", **given)


def test_the_same_declaration_twice_is_one_and_another_is_refused() -> None:
    assert str(full()) == str(full())
    with pytest.raises(UserError, match="declared twice"):
        ao.components(name="triage", task="Something else: {ticket}")
