"""`--candidate NAME=FILE...`: what is recognised, what is refused, how variants are named and shared out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentopt as ao
from agentopt.errors import UserError
from agentopt.graph import SetText, apply_edits
from agentopt.serving._types import CHAT, Exchange
from agentopt.serving.variants import Variant, VirtualModel, load_candidates, read_spec, sticky_of

DEMOS = [{"input": "in", "output": "out", "source": ""}]


def saved(path: Path, values: dict[str, Any]) -> Path:
    return ao.Candidate(values).save(path)


def loaded(*specs: str) -> tuple[list[VirtualModel], list[str]]:
    told: list[str] = []
    return load_candidates(specs, warn=told.append), told


def messages(model: VirtualModel, text: str = "hello", **body: Any) -> Any:
    rewrite = model.variants[0].rewrite
    assert rewrite is not None
    return rewrite(CHAT, {"messages": [{"role": "user", "content": text}], **body})["messages"]


# --- what is recognised


@pytest.mark.parametrize(
    ("values", "system", "turns"),
    [
        ({"served.system": "S", "served.demos": DEMOS, "served.cue": "C"}, "S", 5),
        ({"served.system": "", "served.demos": DEMOS}, None, 3),
        ({"served.system": "Call {name} {", "served.demos": []}, "Call {name} {", 2),
        ({"shop.instruction": "S"}, "S", 2),
        ({"instructions": "S", "few_shot": DEMOS}, "S", 4),
        ({"whatever": "S"}, "S", 2),
        ({"desk.prompt": "S", "desk.cue": "", "mode": "off", "flag": False}, "S", 2),
    ],
)
def test_names_and_forms_that_say_what_a_parameter_is(
    tmp_path: Path, values: dict[str, Any], system: str | None, turns: int
) -> None:
    (model,), _ = loaded(f"m={saved(tmp_path / 'best.json', values)}")
    made = messages(model)
    assert [turn["content"] for turn in made if turn["role"] == "system"] == ([] if system is None else [system])
    assert len(made) == turns


def test_a_file_that_tuning_wrote_is_served_from_json_and_toml(tmp_path: Path) -> None:
    handle = ao.prompt("Old.", name="a.instruction")
    best = apply_edits(ao.Candidate(), [SetText("a.instruction", "New.")], {handle.name: handle.spec})
    for name in ("best.json", "best.toml"):
        (model,), told = loaded(f"m={best.save(tmp_path / name)}")
        assert messages(model)[0] == {"role": "system", "content": "New."}
        assert model.variants[0].hash == best.hash
        assert not told


def test_what_is_ambiguous_is_asked_and_can_be_said(tmp_path: Path) -> None:
    values = {"a.instruction": "A", "a.examples": DEMOS, "b.instruction": "B", "b.examples": [*DEMOS, *DEMOS]}
    path = saved(tmp_path / "best.json", values)
    with pytest.raises(UserError, match=r"'a\.instruction', 'b\.instruction' could each be the prompt"):
        loaded(f"m={path}")
    with pytest.raises(UserError, match=r"'a\.instruction' \(a text\), 'a\.examples' \(demonstrations\) were part"):
        loaded(f"m={path}?system=b.instruction")
    (model,), told = loaded(f"m={path}?system=b.instruction&without=a.*")
    assert len(messages(model)) == 1 + 4 + 1, "the demonstrations beside the prompt are its own"
    assert "served without 'a.instruction'" in told[0]
    (model,), _ = loaded(f"m={path}?system=b.instruction&demos=&without=a.*,b.examples")
    assert len(messages(model)) == 2


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"desk.tools": [{"name": "add", "description": "d", "parameters": {}}]}, r"'desk\.tools' \(tools\) was"),
        ({"shorten.code": "def shorten(x): ..."}, r"'shorten\.code' \(code\)"),
        ({"lookup.description": "Looks up."}, r"'lookup\.description' \(a tool's text\)"),
        ({"pipe": {"nodes": {"a": {}}, "root": "a"}}, r"'pipe' \(a pipeline\)"),
        ({"agent.tries": 3}, r"'agent\.tries' \(the number 3\)"),
        ({"rules": [{"id": "p1", "text": "Be brief."}]}, r"'rules' \(principles\)"),
        ({"book": {"form": "in-context"}}, r"'book' \(knowledge\)"),
        ({"agent.deep": True}, r"'agent\.deep' \(the value True\)"),
        ({"triage.calibrate": "content_free"}, r"'triage\.calibrate' \(a text\)"),
    ],
)
def test_what_no_endpoint_can_serve_is_refused_by_name(tmp_path: Path, extra: dict[str, Any], words: str) -> None:
    path = saved(tmp_path / "best.json", {"a.instruction": "A", **extra})
    with pytest.raises(UserError, match=words) as caught:
        loaded(f"m={path}")
    assert f"?without={next(iter(extra))}" in str(caught.value)
    assert str(path) in str(caught.value)
    (model,), told = loaded(f"m={path}?without={next(iter(extra))}")
    assert len(messages(model)) == 2
    assert len(told) == 1
    assert "may differ from those that were measured" in told[0]


def test_a_choice_that_is_off_is_only_told(tmp_path: Path) -> None:
    path = saved(tmp_path / "best.json", {"a.instruction": "A", "a.calibrate": "none", "a.extra_demos": []})
    _, told = loaded(f"m={path}")
    assert told == [f"{path}: 'a.calibrate' ('none') is taken for 'nothing is done' and is not served."]


def test_folded_knowledge_is_answered_with_its_adapter(tmp_path: Path) -> None:
    folded = {"form": "folded", "of": "ab", "adapter": "adapters/handbook"}
    path = saved(tmp_path / "best.json", {"a.instruction": "A", "book": folded})
    (model,), told = loaded(f"m={path}")
    assert model.variants[0].adapter == "handbook"
    assert not told


def test_a_candidate_that_changes_nothing_is_told(tmp_path: Path) -> None:
    _, told = loaded(f"m={saved(tmp_path / 'best.json', {})}")
    assert "nothing in this candidate changes" in told[0]


# --- malformed


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("best.json", "expected NAME=FILE"),
        ("=best.json", "expected NAME=FILE"),
        ("m=", "expected NAME=FILE"),
        ("m m=best.json", "the name of letters"),
        ("m=?system=a", "expected NAME=FILE"),
        ("m=nowhere.json", "no such file"),
        ("m=ok.json?colour=red", "expected KEY=VALUE"),
        ("m=ok.json?system", "expected KEY=VALUE"),
        ("m=ok.json?system=a&system=b", "each key once"),
        ("m=ok.json?system=b", "is no parameter of this candidate; it has a"),
        ("m=ok.json?demos=a", r"'a' is a text, expected a list"),
        ("m=ok.json?user=a", "no {variable}"),
        ("m=ok.json?without=b*", "fits no parameter"),
        ("m=ok.json?temperature=9", "a number from 0 to 2"),
        ("m=ok.json?temperature=nan", "a number from 0 to 2"),
        ("m=ok.json?continue=perhaps", "expected yes or no"),
        ("m=base?system=a", "the plain base has no parameters"),
        ("m=wide.json", "takes the width of 'x' from a variable"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, spec: str, words: str) -> None:
    saved(tmp_path / "ok.json", {"a": "A"})
    saved(tmp_path / "wide.json", {"a": "{x:>{n}}"})
    with pytest.raises(UserError, match=words):
        loaded(spec)


def test_weights_of_zero_only_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "ok.json", {"a": "A"})
    with pytest.raises(UserError, match="every weight is 0"):
        loaded(f"m={path}@0")


@given(text=st.text(max_size=30) | st.from_regex(r"m=[a-z.]{1,5}(\?[a-z=&]{0,9})?(@[0-9.]{0,4})?", fullmatch=True))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        spec = read_spec(text)
    except UserError:
        return
    assert spec.name
    assert spec.file
    assert spec.weight >= 0


# --- variants


def test_labels_are_file_stems_made_unique(tmp_path: Path) -> None:
    paths: list[Path] = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        paths.append(saved(tmp_path / folder / "best.json", {"a": folder}))
    other = saved(tmp_path / "my prompt!.json", {"a": "third"})
    (model, alone), _ = loaded(
        f"m={paths[0]}@3", f"m={paths[1]}", f"m={other}@0.5", f"m={other}", "m=base@1", "m=base", f"alone={paths[0]}"
    )
    labels = [variant.label for variant in model.variants]
    assert labels[0].startswith("best-")
    assert labels[1].startswith("best-")
    assert labels[0] == f"best-{str(model.variants[0].hash)[:6]}"
    assert len(set(labels)) == len(labels)
    assert {"base", "base-2"} < set(labels)
    assert all(set(label) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_") for label in labels)
    assert [variant.weight for variant in model.variants] == [3, 1, 0.5, 1, 1, 1]
    assert [variant.label for variant in alone.variants] == ["best"]


def test_weights_are_kept_and_choices_stick() -> None:
    model = VirtualModel("m", (Variant("a", 3.0), Variant("b", 1.0), Variant("never", 0.0)))
    picks = [model.pick(f"user:{number}").label for number in range(4000)]
    counts = Counter(picks)
    assert counts["never"] == 0
    assert 2850 < counts["a"] < 3150  # 3000, give or take 5.5 standard deviations
    assert picks == [model.pick(f"user:{number}").label for number in range(4000)]


@given(weights=st.lists(st.floats(0.1, 10), min_size=2, max_size=5), more=st.floats(0.1, 10), who=st.text(max_size=10))
@settings(max_examples=100)
def test_a_new_variant_takes_over_and_moves_nobody_else(weights: list[float], more: float, who: str) -> None:
    old = tuple(Variant(f"v{number}", weight) for number, weight in enumerate(weights))
    before = VirtualModel("m", old).pick(who)
    after = VirtualModel("m", (*old, Variant("new", more))).pick(who)
    assert after.label in (before.label, "new")


def test_who_is_asking() -> None:
    def asked(body: dict[str, Any], session: str | None = None) -> str:
        return sticky_of(Exchange("req_1", CHAT, "c", body=body, session=session))

    assert asked({"user": "first"}, "s1") == asked({"user": "second"}, "s1")
    assert asked({"user": "first"}) != asked({"user": "second"})
    assert asked({"user": "first"}) == asked({"metadata": {"user_id": "first"}})
    assert asked({"user": ""}) == asked({"user": 7}) == asked({}) == "request:req_1"
