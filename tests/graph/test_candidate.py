"""Candidates: values, hash, lineage and files."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt import graph
from agentopt.errors import UserError
from agentopt.graph import Candidate, SetNumber, SetText

any_text = st.text(st.characters(exclude_categories=()), max_size=40)
clean_text = st.text(max_size=60) | st.sampled_from(
    ['"""', "a\r\nb\n", "\\", '\\"\n"', '""\n""""', "\t\x00\x7f\n", "\n"]
)
atoms = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    atoms | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=12,
)
toml_values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | clean_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(clean_text, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(any_text, json_values, max_size=5))
def test_json_form_gives_an_equal_candidate_with_the_same_hash(values: dict) -> None:
    candidate = Candidate(values, parents=("p",), note="n")
    again = Candidate.from_dict(json.loads(json.dumps(candidate.to_dict())))
    assert (again, again.hash, dict(again.values)) == (candidate, candidate.hash, dict(candidate.values))
    assert (again.parents, again.note) == (("p",), "n")


@given(st.dictionaries(any_text, json_values, max_size=5))
def test_json_file_round_trip(tmp_path_factory: pytest.TempPathFactory, values: dict) -> None:
    path = tmp_path_factory.mktemp("c") / "best.json"
    candidate = Candidate(values)
    candidate.save(path)
    assert graph.load(path).hash == candidate.hash


@given(st.dictionaries(clean_text, toml_values, max_size=5))
def test_toml_file_round_trip(tmp_path_factory: pytest.TempPathFactory, values: dict) -> None:
    path = tmp_path_factory.mktemp("c") / "best.toml"
    candidate = Candidate(values, edits=(SetText("a", "x\ny"), SetNumber("n", 0.5)), parents=("abc",))
    candidate.save(path)
    again = graph.load(path)
    assert again.hash == candidate.hash
    assert again.edits == candidate.edits


def test_hash_depends_on_values_alone_and_not_on_order() -> None:
    one = Candidate({"a": "x", "b": [1, {"y": 2, "z": 3}]}, note="one")
    two = Candidate({"b": [1, {"z": 3, "y": 2}], "a": "x"}, parents=("q",))
    assert one == two
    assert hash(one) == hash(two)
    assert one.hash == two.hash
    assert len(one.hash) == 16
    assert one != Candidate({"a": "x"})
    assert Candidate().hash == Candidate({}).hash


def test_later_changes_of_given_or_returned_containers_change_nothing() -> None:
    items = [{"input": "a", "output": "b"}]
    candidate = Candidate({"demos": items})
    items.append({"input": "c", "output": "d"})
    given_back = candidate.get("demos")
    assert isinstance(given_back, list)
    given_back.clear()
    shown = candidate.values["demos"]
    assert isinstance(shown, list)
    shown.clear()
    assert candidate["demos"] == [{"input": "a", "output": "b"}]
    with pytest.raises(TypeError):
        candidate.values["demos"] = []  # type: ignore[index]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (object(), "type object"),
        ({1: 2}, "key of type int"),
        (float("nan"), "nan"),
        ([float("inf")], r"\[0\].*inf"),
        ({"a": {1, 2}}, r"p.*\.a.*type set"),
        (b"x", "bytes"),
    ],
)
def test_value_without_json_form_is_refused_by_name(value: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Candidate({"p": value})  # type: ignore[dict-item]


def test_self_containing_value_is_refused() -> None:
    loop: list = []
    loop.append(loop)
    with pytest.raises(UserError, match="nested"):
        Candidate({"p": loop})


def test_save_replaces_in_one_step_and_keeps_normal_permissions(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    Candidate({"a": 1}).save(path)
    Candidate({"a": 2}).save(path)
    assert graph.load(path)["a"] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["best.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "best.toml"
    Candidate({"a": 1}).save(path)
    with pytest.raises(UserError, match="None"):
        Candidate({"a": None}).save(path)
    with pytest.raises(UserError, match="surrogate"):
        Candidate({"a": "\ud800"}).save(path)
    assert graph.load(path)["a"] == 1


def test_file_a_person_can_read_and_edit(tmp_path: Path) -> None:
    path = tmp_path / "best.toml"
    Candidate({"t.instruction": 'Say "hi" to {name}.\nBe kind.', "t.k": 3}).save(path)
    text = path.read_text()
    assert 'Say "hi" to {name}.\nBe kind.' in text
    stated = graph.load(path)
    path.write_text(text.replace("Be kind.", "Be brief."))
    edited = graph.load(path)
    assert edited["t.instruction"] == 'Say "hi" to {name}.\nBe brief.'
    assert edited.hash != stated.hash
    assert edited.parents == (stated.hash,)
    assert edited.edits == ()


def test_hand_written_file_needs_only_values(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[values]\n"a.b" = "text"\n')
    assert graph.load(path) == Candidate({"a.b": "text"})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.json", None, "no such file"),
        ("bad.json", "{\n  'a': 1}", r"bad\.json:2: not valid JSON"),
        ("bad.toml", "x = [", "not valid TOML"),
        ("list.json", "[1]", "expected a JSON object"),
        ("empty.json", "{}", "'values' must be a map"),
        ("wrong.json", '{"values": [1]}', "'values' must be a map.*list"),
        ("other.json", '{"format": "agentopt.trace", "values": {}}', "agentopt.trace"),
        ("new.json", '{"version": 99, "values": {}}', "newer agentopt"),
        ("edits.json", '{"values": {}, "edits": [{"kind": "explode"}]}', "explode"),
        ("note.json", '{"values": {}, "note": 3}', "'note' must be text"),
        ("nan.json", '{"values": {"a": NaN}}', "nan"),
    ],
)
def test_bad_file_is_one_sentence_that_names_it(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        graph.load(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_binary_file_and_unknown_suffix_and_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        graph.load(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"\.json or \.toml"):
        Candidate().save(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="cannot write"):
        Candidate().save(tmp_path / "no" / "x.json")
    with pytest.raises(UserError, match="cannot read"):
        graph.load(tmp_path)


def test_problems_name_unknown_parameters_and_wrong_values() -> None:
    graph.prompt("Classify {ticket}", name="t.instruction")
    graph.number(0, 1.0, name="t.temperature")
    candidate = Candidate({"t.instructoin": "x", "t.temperature": 7})
    texts = [str(problem) for problem in candidate.problems(graph.declared_parameters())]
    assert any("did you mean 't.instruction'" in text for text in texts)
    assert any("bounds" in text for text in texts)
    assert Candidate({"t.instruction": "Sort {ticket}"}).problems(graph.declared_parameters()) == []
