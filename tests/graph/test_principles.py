"""Principles: what the agent sees, and that no sequence of edits breaks the list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentopt as ao
from agentopt import graph
from agentopt.errors import UserError
from agentopt.graph import AddPrinciple, CountPrinciples, DropPrinciple, MergePrinciples, RewritePrinciple
from agentopt.graph._principles import principle_problems

RULES = ["Answer in Latin letters.", "Name the unit.", "Do not guess."]


def child(*edits: graph.Edit, start: graph.Candidate | None = None) -> graph.Candidate:
    return graph.apply_edits(start or graph.Candidate(), edits, graph.declared_parameters())


def refusal(*edits: graph.Edit, start: graph.Candidate | None = None) -> str:
    with pytest.raises(graph.IllegalEdit) as caught:
        child(*edits, start=start)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0].message


def ids(candidate: graph.Candidate, name: str = "rules") -> list[str]:
    value: Any = candidate[name]
    return [item["id"] for item in value]


# --- the handle ------------------------------------------------------------------------------------------------------


def test_the_agent_sees_texts_and_never_counters() -> None:
    rules = ao.principles(RULES, name="rules")
    counted = child(CountPrinciples("rules", ("p1", "p1"), ("p3",)))
    expected = "- Answer in Latin letters.\n- Name the unit.\n- Do not guess."
    with counted.active():
        assert str(rules) == f"{rules}" == expected
        assert "Rules:\n" + rules == f"Rules:\n{expected}"
        assert rules + "!" == f"{expected}!"
        assert list(rules) == rules.texts == RULES
        assert len(rules) == 3
        assert RULES[1] in rules and "p1" not in rules
        assert rules.value[0] == {"id": "p1", "text": RULES[0], "helpful": 2, "harmful": 0}
        assert rules.value[2]["harmful"] == 1


def test_an_empty_list_is_an_empty_text() -> None:
    rules = ao.principles(name="rules")
    assert str(rules) == ""
    assert not rules


def test_a_language_model_gets_the_lines_and_the_read_is_recorded() -> None:
    rules = ao.principles(RULES, name="rules")
    asked: list[str] = []
    lm = ao.FunctionLM(lambda request: asked.append(request.messages[0]["content"]) or "ok")
    with ao.record() as recording:
        anyio.run(lambda: lm.complete(system=rules, user="go"))
    assert asked == [str(rules)]
    assert list(recording.trace.parameters) == ["rules"]


def test_a_handle_made_from_json_is_the_same_kind() -> None:
    rules = ao.principles(RULES, name="rules")
    again = graph.handle_from_json(rules.to_json())
    assert isinstance(again, ao.Principles)
    assert str(again) == str(rules)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["Be short.", "be SHORT"], "says the same as 'p1'"),
        (["", "x"], "'text' must be a rule"),
        (["a", "b", "c"], "has 3 principles, at most 2"),
        ("text", "list of texts"),
        ([3], "list of texts"),
    ],
)
def test_bad_declarations_are_refused(items: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ao.principles(items, name="rules", max_items=2)


@pytest.mark.parametrize("limit", [0, True, 1.5])
def test_a_bad_limit_is_refused(limit: Any) -> None:
    with pytest.raises(UserError, match="max_items"):
        ao.principles(name="rules", max_items=limit)


# --- single edits ----------------------------------------------------------------------------------------------------


def test_new_ids_go_on_from_the_highest_number() -> None:
    ao.principles(RULES, name="rules")
    assert ids(child(AddPrinciple("rules", "Be brief."))) == ["p1", "p2", "p3", "p4"]
    dropped = child(DropPrinciple("rules", "p3"))
    assert ids(child(AddPrinciple("rules", "Be brief."), start=dropped)) == ["p1", "p2", "p4"]  # p3 is the default's


def test_equal_edits_give_equal_candidates() -> None:
    ao.principles(RULES, name="rules")
    edits = (AddPrinciple("rules", "  Be \n brief. "), CountPrinciples("rules", ("p4",)), DropPrinciple("rules", "p1"))
    assert child(*edits).hash == child(*edits).hash
    value: Any = child(*edits)["rules"]
    assert value[-1] == {"id": "p4", "text": "Be brief.", "helpful": 1, "harmful": 0}


def test_rewriting_keeps_place_id_and_counters() -> None:
    ao.principles(RULES, name="rules")
    value: Any = child(CountPrinciples("rules", ("p2",)), RewritePrinciple("rules", "p2", "Name every unit!"))["rules"]
    assert value[1] == {"id": "p2", "text": "Name every unit!", "helpful": 1, "harmful": 0}
    reworded: Any = child(RewritePrinciple("rules", "p2", "name the UNIT"))["rules"]
    assert reworded[1]["text"] == "name the UNIT"  # nearly the text it had is not a duplicate of itself


def test_merging_adds_counters_up_at_the_first_place() -> None:
    ao.principles(RULES, name="rules")
    counted = child(CountPrinciples("rules", ("p1", "p3", "p3"), ("p2", "p3")))
    value: Any = child(MergePrinciples("rules", ("p3", "p2"), "Name the unit, do not guess it."), start=counted)[
        "rules"
    ]
    assert value == [
        {"id": "p1", "text": RULES[0], "helpful": 1, "harmful": 0},
        {"id": "p2", "text": "Name the unit, do not guess it.", "helpful": 2, "harmful": 2},
    ]


def test_a_merge_may_keep_one_of_the_texts() -> None:
    ao.principles(RULES, name="rules")
    value: Any = child(MergePrinciples("rules", ("p1", "p2"), RULES[1]))["rules"]
    assert [item["text"] for item in value] == RULES[1:]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (AddPrinciple("rules", "do NOT guess!!"), "says the same as principle 'p3'"),
        (AddPrinciple("rules", "  \n "), "must not be empty"),
        (AddPrinciple("rules", "Fourth."), "at most 3 are allowed"),
        (AddPrinciple("other", "x"), "not a tunable parameter"),
        (AddPrinciple("text", "x"), "does not fit a parameter of kind 'prompt'"),
        (DropPrinciple("rules", "p9"), "there is no principle 'p9'; the ids are p1, p2, p3"),
        (RewritePrinciple("rules", "p2", RULES[0]), "says the same as principle 'p1'"),
        (RewritePrinciple("rules", "p2", RULES[1]), "has this text already"),
        (MergePrinciples("rules", ("p1", "p1"), "x"), "at least two different principles"),
        (MergePrinciples("rules", (), "x"), "at least two different principles"),
        (MergePrinciples("rules", ("p1", "p7"), "x"), "there is no principle 'p7'"),
        (MergePrinciples("rules", ("p1", "p2"), RULES[2]), "says the same as principle 'p3'"),
        (CountPrinciples("rules"), "names no principle"),
        (CountPrinciples("rules", ("p0",)), "there is no principle 'p0'"),
    ],
)
def test_illegal_edits_are_refused_with_one_clause(edit: graph.Edit, message: str) -> None:
    ao.principles(RULES, name="rules", max_items=3)
    ao.prompt("Say {x}", name="text")
    assert message in refusal(edit)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        ["x"],
        [{"id": "p1", "text": "a"}],
        [{"id": "p1", "text": "a", "helpful": 0, "harmful": -1}],
        [{"id": "p1", "text": "a", "helpful": True, "harmful": 0}],
        [{"id": "p 1", "text": "a", "helpful": 0, "harmful": 0}],
        [{"id": "p1", "text": "a", "helpful": 0, "harmful": 0, "more": 1}],
        [{"id": "p1", "text": text, "helpful": 0, "harmful": 0} for text in ("a", "b")],
    ],
)
def test_whole_values_are_checked_too(value: Any) -> None:
    ao.principles(RULES, name="rules")
    assert refusal(graph.SetValue("rules", value))


# --- any sequence of edits -------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["p1", "p2", "p3", "p4", "p5", "p9", "", "q"])
TEXTS = st.one_of(st.sampled_from([*RULES, "Fourth.", "fifth", "!!!", "٪", " "]), st.text(max_size=12))
EDITS = st.one_of(
    st.builds(AddPrinciple, st.just("rules"), TEXTS),
    st.builds(DropPrinciple, st.just("rules"), NAMES),
    st.builds(RewritePrinciple, st.just("rules"), NAMES, TEXTS),
    st.builds(MergePrinciples, st.just("rules"), st.lists(NAMES, max_size=3).map(tuple), TEXTS),
    st.builds(CountPrinciples, st.just("rules"), st.lists(NAMES, max_size=2).map(tuple), st.just(())),
)


@settings(max_examples=150)
@given(st.lists(EDITS, max_size=12))
def test_any_sequence_of_edits_keeps_the_list_whole(edits: list[graph.Edit]) -> None:
    with graph.parameter_scope():
        spec = ao.principles(RULES, name="rules", max_items=5).spec
        candidate = graph.Candidate()
        for edit in edits:
            assert graph.edit_from_dict(json.loads(json.dumps(edit.to_dict()))) == edit
            try:
                candidate = child(edit, start=candidate)
            except graph.IllegalEdit as error:
                assert str(error)
                continue
            assert spec.problems(candidate["rules"]) == []
            assert graph.Candidate.from_dict(json.loads(json.dumps(candidate.to_dict()))).hash == candidate.hash


@given(st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)))
def test_checking_wild_values_never_raises(value: Any) -> None:
    assert isinstance(principle_problems(value), list)


def test_an_edit_with_wrong_fields_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="'id' is missing"):
        graph.edit_from_dict({"kind": "drop_principle", "name": "rules"})
    with pytest.raises(UserError, match="unknown field 'index'"):
        graph.edit_from_dict({"kind": "drop_principle", "name": "rules", "id": "p1", "index": 1})
    with pytest.raises(UserError, match="expected tuple"):
        graph.edit_from_dict({"kind": "merge_principles", "name": "rules", "ids": "p1", "text": "x"})


def test_a_candidate_with_principles_survives_its_files(tmp_path: Path) -> None:
    ao.principles(RULES, name="rules")
    made = child(AddPrinciple("rules", "Be brief."), CountPrinciples("rules", ("p1",)))
    for suffix in (".json", ".toml"):
        loaded = ao.load(made.save(tmp_path / f"best{suffix}"))
        assert loaded.hash == made.hash
        assert loaded.edits == made.edits
        assert loaded.problems(graph.declared_parameters()) == []


def test_texts_become_a_value_and_known_ones_keep_their_counters() -> None:
    known: list[Any] = [{"id": "p7", "text": "Be short.", "helpful": 3, "harmful": 1}]
    assert graph.principle_list(["Say why.", "be short"], known) == [
        {"id": "p8", "text": "Say why.", "helpful": 0, "harmful": 0},
        {"id": "p7", "text": "be short", "helpful": 3, "harmful": 1},
    ]
