"""Typed edits: what may be changed, and what an edit may not break."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentopt import graph
from agentopt.errors import UserError
from agentopt.graph import (
    AddDemo,
    Candidate,
    DropDemo,
    IllegalEdit,
    SetChoice,
    SetCode,
    SetDemos,
    SetNumber,
    SetText,
    SetValue,
    apply_edits,
)

DEMO = {"input": "i", "output": "o", "source": "train-1"}
braces = st.text(st.sampled_from("{}ab é!:.[]0\n"), max_size=30) | st.text(max_size=30)
demo = st.fixed_dictionaries(
    {"input": st.text(max_size=9), "output": st.text(max_size=9), "source": st.text(max_size=9)}
)
any_edit = (
    st.builds(SetText, st.text(), st.text())
    | st.builds(SetDemos, st.text(), st.lists(demo, max_size=3))
    | st.builds(AddDemo, st.text(), demo)
    | st.builds(DropDemo, st.text(), st.integers(0, 9))
    | st.builds(SetNumber, st.text(), st.integers() | st.floats(allow_nan=False, allow_infinity=False))
    | st.builds(SetChoice, st.text(), st.text() | st.booleans() | st.none())
    | st.builds(SetCode, st.text(), st.text())
    | st.builds(SetValue, st.text(), st.lists(st.integers()))
)


@given(any_edit)
def test_json_form_gives_the_same_edit(edit: graph.Edit) -> None:
    assert graph.edit_from_dict(json.loads(json.dumps(edit.to_dict()))) == edit


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "edit kind"),
        ({"kind": "boom"}, "boom.*set_text"),
        ({"kind": "set_text", "name": 3, "text": "x"}, "'name' must be text"),
        ({"kind": "set_text", "name": "p"}, "'text' is missing"),
        ({"kind": "set_text", "name": "p", "text": 3}, "wrong type"),
        ({"kind": "drop_demo", "name": "p", "index": True}, "wrong type"),
        ({"kind": "set_number", "name": "p", "value": "3"}, "wrong type"),
        ({"kind": "add_demo", "name": "p", "item": []}, "wrong type"),
    ],
)
def test_bad_json_form_is_a_clear_error(data: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        graph.edit_from_dict(data)


def specs() -> dict[str, graph.ParameterSpec]:
    graph.prompt("Classify {ticket} for {team}", name="p")
    graph.demos(name="d", max_items=2)
    graph.number(0, 10, name="n")
    graph.number(0.0, 1.0, name="t")
    graph.choice(["a", "b"], name="c")
    return graph.declared_parameters()


def test_edits_apply_in_order_and_leave_lineage() -> None:
    known = specs()
    parent = Candidate({name: spec.default for name, spec in known.items()})
    edits = (
        SetText("p", "Sort {team}: {ticket}"),
        AddDemo("d", DEMO),
        AddDemo("d", {"input": "x", "output": "y"}),
        DropDemo("d", 0),
        SetNumber("n", 3),
        SetChoice("c", "b"),
    )
    child = apply_edits(parent, edits, known)
    assert child["p"] == "Sort {team}: {ticket}"
    assert child["d"] == [{"input": "x", "output": "y", "source": ""}]
    assert (child["n"], child["c"]) == (3, "b")
    assert child.parents == (parent.hash,)
    assert child.edits == edits
    assert parent["d"] == []


def test_edits_of_the_empty_candidate_start_from_the_declared_defaults() -> None:
    graph.demos(name="d", max_items=3, default=[{"input": "a", "output": "b"}])
    child = apply_edits(Candidate(), [AddDemo("d", DEMO)], graph.declared_parameters())
    assert child["d"] == [{"input": "a", "output": "b", "source": ""}, DEMO]
    assert AddDemo("d", DEMO).apply(Candidate()) == child


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (SetText("q", "x"), "not a tunable parameter.*tunable are: p, d, n, t, c"),
        (SetText("n", "x"), "set_text does not fit a parameter of kind 'number'"),
        (SetText("p", "Classify {ticket}"), "loses the variable {team}"),
        (SetText("p", "Classify {ticket} {team} {other}"), "adds the variable {other}"),
        (SetText("p", "  "), "empty"),
        (SetText("p", 'Classify {ticket} {team} as {"label": 1}'), r"literal braces|\{\{"),
        (SetText("p", "Classify {ticket} {team} {"), "unescaped brace"),
        (SetText("p", "Classify {ticket} {team.__class__}"), "a form that the original text does not have"),
        (SetText("p", "Classify {ticket:>99999999} {team}"), "a form that the original"),
        (SetText("p", "Classify {ticket} {team} {0}"), "literal braces"),
        (SetDemos("d", [DEMO] * 3), "has 3 demonstrations, at most 2"),
        (SetDemos("d", [{"input": "x"}]), "demonstration 0: 'output' must be text"),
        (SetDemos("d", ["text"]), "demonstration 0: expected a map"),  # type: ignore[list-item]
        (AddDemo("d", {"input": "x", "output": 3}), "'output' must be text"),  # type: ignore[dict-item]
        (AddDemo("d", {"input": "x", "output": "y", "weight": "z"}), "unknown key 'weight'"),
        (DropDemo("d", 0), "no demonstration at index 0; there are 0"),
        (DropDemo("d", -1), "no demonstration at index -1"),
        (SetNumber("n", 11), "outside the bounds 0 to 10"),
        (SetNumber("n", 2.5), "whole number"),
        (SetNumber("n", True), "expected a number"),
        (SetNumber("t", float("nan")), "nan"),
        (SetChoice("c", "z"), "none of the options 'a', 'b'"),
    ],
)
def test_illegal_edit_is_refused_with_the_reason(edit: graph.Edit, words: str) -> None:
    known = specs()
    with pytest.raises(IllegalEdit, match=words) as caught:
        apply_edits(Candidate(), [edit], known)
    assert caught.value.problems[0].name == edit.name


def test_every_problem_is_listed_and_nothing_is_applied() -> None:
    known = specs()
    with pytest.raises(IllegalEdit) as caught:
        apply_edits(Candidate(), [SetNumber("n", 99), SetNumber("t", 0.5), SetChoice("c", "z")], known)
    assert [problem.name for problem in caught.value.problems] == ["n", "c"]


def test_later_edit_is_checked_against_what_earlier_ones_made() -> None:
    known = specs()
    with pytest.raises(IllegalEdit, match="at most 2"):
        apply_edits(Candidate(), [AddDemo("d", DEMO)] * 3, known)
    child = apply_edits(
        Candidate(), [AddDemo("d", DEMO), AddDemo("d", DEMO), DropDemo("d", 1), AddDemo("d", DEMO)], known
    )
    assert child["d"] == [DEMO, DEMO]


def test_constraint_refuses_by_false_by_reason_and_by_value_error() -> None:
    def short(text: str) -> bool:
        return len(text) < 20

    def strict(text: str) -> None:
        if "please" in text:
            raise ValueError("no pleading")

    graph.prompt("one", name="a", constraint=short, constraint_text="shorter than 20 characters")
    graph.prompt("one", name="b", constraint=lambda text: "must not shout" if text.isupper() else None)
    graph.prompt("one", name="c", constraint=strict)
    known = graph.declared_parameters()
    for edit, words in [
        (SetText("a", "x" * 30), "shorter than 20"),
        (SetText("b", "LOUD"), "must not shout"),
        (SetText("c", "please"), "no pleading"),
    ]:
        with pytest.raises(IllegalEdit, match=words):
            apply_edits(Candidate(), [edit], known)
    assert apply_edits(Candidate(), [SetText("a", "two"), SetText("c", "ok")], known)["a"] == "two"


def test_projection_is_applied_before_the_check_and_is_what_lineage_shows() -> None:
    graph.prompt("one", name="a", projection=str.strip, constraint=lambda text: text == text.strip())
    child = apply_edits(Candidate(), [SetText("a", "  two \n")], graph.declared_parameters())
    assert child["a"] == "two"
    assert child.edits == (SetText("a", "two"),)


def test_project_gives_the_nearest_allowed_value() -> None:
    known = specs()
    assert known["n"].project(99) == 10
    assert known["n"].project("3.6") == 4
    assert known["t"].project(-1.0) == 0.0
    assert known["c"].project(" B\n") == "b"
    assert known["c"].project("zzz") == "zzz"
    assert known["d"].project([DEMO] * 5) == [DEMO] * 2
    fixed = known["p"].project('{ticket} {team} -> {"label": {{}} }')
    assert known["p"].problems(fixed) == []


@given(braces)
@example("{")
@example("}{ticket}{{ticket}}{ticket!r}{{{team}}}")
def test_projected_text_with_any_braces_can_be_filled(text: str) -> None:
    with graph.parameter_scope():
        known = specs()
        proposed = "{ticket}" + text + "{team}"
        projected = known["p"].project(proposed)
        assert isinstance(projected, str)
        assert known["p"].problems(projected) == []
        assert "TICKET" in projected.format(ticket="TICKET", team="TEAM")
        assert known["p"].project(projected) == projected


@given(braces)
@example("{ticket}{team}{ticket!r}")
@example("{{ticket}}{team}")
@example("{ticket} {team} {ticket:{team}}")
def test_accepted_text_can_always_be_filled_with_exactly_the_variables(text: str) -> None:
    with graph.parameter_scope():
        known = specs()
        if known["p"].problems(text) == []:
            filled = text.format(ticket="<T>", team="<M>")
            assert "<T>" in filled
            assert "<M>" in filled


def test_forms_of_the_original_stay_allowed() -> None:
    graph.prompt("{user.name:>10} says {text!r}", name="p")
    known = graph.declared_parameters()
    assert known["p"].problems("{text!r}, {user.name:>10}") == []
    assert known["p"].problems("{text}: {user.name:>10} {user}") == []
    assert known["p"].problems("{user.password} {text}") != []


def test_prompt_without_variables_may_hold_braces_unless_it_is_formatted() -> None:
    p = graph.prompt("Answer with a label.", name="p")
    assert p.spec.problems('Answer as {"label": "x"}') == []
    assert p.spec.problems("Answer {ticket}") != []
    p.format()
    assert p.spec.problems('Answer as {"label": "x"}') != []
    assert p.spec.problems('Answer as {{"label": "x"}}') == []


def test_placeholders_of_another_syntax_are_kept_when_declared() -> None:
    graph.prompt("Sort {{ ticket }} into $team", name="p", variables=["ticket", "team"])
    spec = graph.declared_parameters()["p"]
    assert spec.problems("Put {{ticket}} where $team wants") == []
    assert "loses the variable {team}" in spec.problems("Put {{ticket}} where teams want")[0]
    graph.prompt("Literal {braces} here", name="q", variables=[])
    assert graph.declared_parameters()["q"].problems("Other {words} here") == []
    graph.prompt('{ticket}: reply {"label": 1}', name="r")
    assert graph.declared_parameters()["r"].problems('Reply {"label": 2} to {ticket}') == []
    assert "loses" in graph.declared_parameters()["r"].problems('Reply {"label": 2} to ticket')[0]


def test_set_value_makes_the_edit_that_fits_the_kind() -> None:
    known = specs()
    edits = [
        graph.set_value(known["p"], "{ticket}{team}"),
        graph.set_value(known["d"], [DEMO]),
        graph.set_value(known["n"], 1),
        graph.set_value(known["c"], "b"),
    ]
    assert [edit.kind for edit in edits] == ["set_text", "set_demos", "set_number", "set_choice"]
    assert apply_edits(Candidate(), edits, known)["d"] == [DEMO]
