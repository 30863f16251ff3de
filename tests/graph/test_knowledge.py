"""Knowledge parameters: documents and their forms, what is refused, records, edits, files, and forgotten calls."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import agentopt as ao
from agentopt import graph
from agentopt.errors import UserError
from agentopt.graph import KnowledgeSource, KnowledgeWarning, describe_knowledge
from agentopt.graph._knowledge import knowledge_problems

FACTS = ["Parcels leave at noon.", "Letters leave at six."]


def handbook(**changes: Any) -> ao.Knowledge:
    return ao.knowledge("support.handbook", FACTS, **changes)


def capsule_of(handle: ao.Knowledge, text: str = "Parcels: noon.") -> dict[str, Any]:
    assert handle.spec.knowledge is not None
    return {"form": "capsule", "of": handle.spec.knowledge.hash, "text": text}


def folded(handle: ao.Knowledge, adapter: str = "adapters/handbook") -> dict[str, Any]:
    assert handle.spec.knowledge is not None
    of = handle.spec.knowledge.hash
    return {"form": "folded", "of": of, "adapter": adapter, "base_hash": "b" * 8, "recall": 0.97}


def candidate(value: Any) -> ao.Candidate:
    return ao.Candidate({"support.handbook": value})


# ---- documents


def test_texts_lists_files_and_folders_are_documents(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("Second.\n")
    (tmp_path / "a.txt").write_text("\ufeffFirst.\n\nMore.\n", encoding="utf-8")
    (tmp_path / ".hidden").write_text("no")
    assert ao.knowledge("one", "One text.").documents == ("One text.",)
    assert ao.knowledge("two", FACTS).documents == tuple(FACTS)
    assert ao.knowledge("file", tmp_path / "b.md").documents == ("Second.",)
    assert ao.knowledge("name", str(tmp_path / "b.md")).documents == ("Second.",)
    assert ao.knowledge("word", "noon.").documents == ("noon.",)
    assert ao.knowledge("folder", str(tmp_path)).documents == ("First.\n\nMore.", "Second.")


def test_a_path_is_looked_up_here_and_beside_the_declaring_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "facts.txt").write_text("Beside.")
    monkeypatch.chdir(tmp_path / "here")
    code = compile("import agentopt as ao\nk = ao.knowledge('x', 'facts.txt')\n", str(tmp_path / "prog.py"), "exec")
    names: dict[str, Any] = {"__name__": "prog"}
    exec(code, names)
    assert names["k"].documents == ("Beside.",)


@pytest.mark.parametrize(
    "docs", ["", [], ["  "], 3, [1], ["a", None], "missing.md", "gone.pdf", "no/where", Path("nowhere")]
)
def test_documents_that_are_none_are_refused_in_one_sentence(docs: Any) -> None:
    with pytest.raises(UserError, match=r"^parameter 'x': .*\.$"):
        ao.knowledge("x", docs)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match=r"picture\.png is no UTF-8 text"):
        ao.knowledge("x", tmp_path)


def test_the_same_name_with_other_documents_is_a_collision() -> None:
    assert handbook().spec is handbook().spec
    with pytest.raises(UserError, match="other documents"):
        ao.knowledge("support.handbook", ["Something else."])
    with pytest.raises(UserError, match="another folder"):
        handbook(folder="meta")


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4), st.lists(st.text(min_size=1), min_size=1, max_size=4))
def test_the_hash_tells_documents_apart(one: list[str], other: list[str]) -> None:
    assert (KnowledgeSource(tuple(one)).hash == KnowledgeSource(tuple(other)).hash) == (one == other)


# ---- forms


def test_the_text_follows_the_form() -> None:
    handle = handbook()
    assert (handle.form, handle.adapter) == ("in-context", None)
    assert handle.value == str(handle) == f"{handle}" == "Parcels leave at noon.\nLetters leave at six."
    with candidate(capsule_of(handle)).active():
        assert (handle.form, f"Know: {handle}", handle + "!", "noon" in handle) == (
            "capsule", "Know: Parcels: noon.", "Parcels: noon.!", True
        )  # fmt: skip
    with candidate(folded(handle)).active():
        assert (handle.form, handle.adapter, str(handle), bool(handle)) == ("folded", "adapters/handbook", "", False)
    assert handle.documents == tuple(FACTS)


def test_documents_of_several_lines_are_kept_apart_by_an_empty_line() -> None:
    assert str(ao.knowledge("x", ["One.\nTwo.", "Three."])) == "One.\nTwo.\n\nThree."


@pytest.mark.parametrize(
    "value",
    [
        "text",
        {},
        {"form": "else"},
        {"form": "in-context", "of": "x"},
        {"form": "capsule", "text": "no hash"},
        {"form": "capsule", "of": "x", "text": ""},
        {"form": "folded", "of": "x", "adapter": 3},
        {"form": "folded", "of": "x", "adapter": "a", "recall": 2},
        {"form": "folded", "of": "x", "adapter": "a", "else": 1},
    ],
)
def test_values_of_another_shape_are_refused(value: Any) -> None:
    handle = handbook()
    assert knowledge_problems(value)
    assert candidate(value).problems({handle.name: handle.spec})
    with candidate(value).active(), pytest.raises(UserError, match=r"^parameter 'support\.handbook': .*\.$"):
        str(handle)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["form", "of", "text", "adapter", "recall", "x"]), inner, max_size=4),
    max_leaves=6))  # fmt: skip
def test_no_value_breaks_the_check(value: Any) -> None:
    assert all(isinstance(problem, str) for problem in knowledge_problems(value, source=KnowledgeSource(("a",))))


@pytest.mark.parametrize("make", [capsule_of, folded])
def test_what_was_made_of_other_documents_is_refused(make: Any) -> None:
    stored = candidate(make(handbook()))
    with graph.parameter_scope():
        changed = ao.knowledge("support.handbook", [*FACTS, "Nothing leaves on Sunday."])
        with stored.active(), pytest.raises(UserError, match="made of other documents"):
            str(changed)
        (problem,) = stored.problems({changed.name: changed.spec})
        assert "made of other documents" in problem.message
        with candidate({"form": "in-context"}).active():
            assert "Sunday" in str(changed)


# ---- records, edits, files, concurrency


def test_reads_are_recorded_with_the_small_value() -> None:
    handle = handbook()

    @ao.step
    def use() -> str:
        return f"{handle}?"

    with ao.record() as recording:
        use()
    parameter = recording.trace.parameters["support.handbook"]
    assert (parameter.kind, parameter.value) == ("knowledge", {"form": "in-context"})


def test_edits_set_the_whole_value_and_texts_do_not_fit() -> None:
    handle = handbook()
    specs = {handle.name: handle.spec}
    edit = graph.set_value(handle.spec, capsule_of(handle))
    child = graph.apply_edits(ao.Candidate(), [edit], specs)
    assert graph.edit_from_dict(edit.to_dict()) == edit
    assert child[handle.name] == capsule_of(handle)
    with pytest.raises(graph.IllegalEdit, match="does not fit a parameter of kind 'knowledge'"):
        graph.apply_edits(ao.Candidate(), [graph.SetText(handle.name, "text")], specs)
    with pytest.raises(graph.IllegalEdit, match="other documents"):
        graph.apply_edits(child, [graph.set_value(handle.spec, {**capsule_of(handle), "of": "x"})], specs)


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_candidates_are_saved_and_loaded(tmp_path: Path, suffix: str) -> None:
    handle = handbook()
    edit = graph.set_value(handle.spec, folded(handle))
    child = graph.apply_edits(ao.Candidate(), [edit], {handle.name: handle.spec})
    again = ao.load(child.save(tmp_path / f"best{suffix}"))
    assert (again, again.edits) == (child, (edit,))
    with again.active():
        assert handle.adapter == "adapters/handbook"


def test_candidates_in_threads_do_not_mix() -> None:
    handle = handbook()
    values = [{"form": "in-context"}, capsule_of(handle), folded(handle)]

    def form(number: int) -> tuple[str, str]:
        with candidate(values[number % 3]).active():
            return handle.form, handle.value

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(form, range(300)))
    assert found == [found[number % 3] for number in range(300)]
    assert {one[0] for one in found} == {"in-context", "capsule", "folded"}


def test_forms_in_words() -> None:
    handle = handbook(description="desk hours")
    assert describe_knowledge({"form": "in-context"}) == "in-context"
    assert describe_knowledge({"form": "in-context"}, handle.name) == "in-context (about 11 tokens)"
    assert graph.readable_lines(folded(handle)) == ["folded (adapter adapters/handbook, recall 0.97)"]
    assert graph.readable_lines(capsule_of(handle)) == ["capsule (about 4 tokens)", "  Parcels: noon."]
    described = handle.spec.to_dict()
    assert described["documents"] == handle.spec.knowledge.hash  # pyright: ignore[reportOptionalMemberAccess]


# ---- calls that forget the knowledge


def test_a_call_without_the_folded_knowledge_is_told_once() -> None:
    handle = handbook()
    with candidate(folded(handle, "adapters/forgotten")).active():
        _ = f"{handle}\nWhen?"
        with pytest.warns(KnowledgeWarning, match=r"'support\.handbook' is folded"):
            ao.ScriptedLM(["x"]).complete_sync("When?")
        _ = f"{handle}\nWhen?"
        ao.ScriptedLM(["x"]).complete_sync("When?")  # filterwarnings=error: a second warning would raise


def test_no_warning_where_the_call_names_it_or_it_is_in_the_prompt() -> None:
    handle = handbook()
    model = ao.ScriptedLM({"": "x"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.complete_sync(f"{handle}\nWhen?")
        with candidate(folded(handle, "adapters/named")).active():
            model.complete_sync(f"{handle}\nWhen?", knowledge=handle)
            model.complete_sync("Something else.")
            _ = handle.form, handle.adapter, handle.documents
            model.complete_sync("Something else.")
            _ = str(handle)
        model.complete_sync("Another candidate by now.")
    assert len(model.requests) == 5
