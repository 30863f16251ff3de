"""Originals by handle, and the tool by which an agent reads them back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import agentopt as ao
from agentopt.capsules import BudgetInfeasible
from agentopt.capsules.agents._originals import Originals, UnknownHandle, handle_of, retrieval_tool
from agentopt.store import Store

PAGES = "\n\n".join(f"Chapter {n} is about the {word}." for n, word in enumerate(("moon", "tide", "harbour", "storm")))


@given(st.text())
def test_every_text_comes_back_under_its_handle(text: str) -> None:
    originals = Originals()
    handle = originals.put(text)
    assert originals.get(handle) == text and handle == originals.put(text) == handle_of(text)
    assert handle in originals and handle.startswith("cap:")


def test_a_store_keeps_texts_across_processes_and_repairs_a_damaged_row(tmp_path: Path) -> None:
    text = "half a pair \ud83d and more"
    with Store.open(tmp_path / "s.db") as store:
        handle = Originals(store).put(text)
    with Store.open(tmp_path / "s.db") as store:
        originals = Originals(store)
        assert originals.get(handle) == text
        store.put_capsule(handle, {"original": "another text"}, replace=True)
        with pytest.raises(UnknownHandle):
            originals.get(handle)
        assert originals.put(text) == handle and originals.get(handle) == text


def test_of_a_long_original_the_part_that_fits_the_question_comes_back() -> None:
    originals = Originals(tokenizer="bytes")
    handle = originals.put(PAGES)
    assert originals.get(handle, "what is said of the harbour?", 40) == "Chapter 2 is about the harbour."
    assert len(originals.get(handle, max_tokens=70)) <= 70
    assert originals.get(handle, max_tokens=10_000) == PAGES


def test_an_unknown_handle_is_explained() -> None:
    for handle in ("cap:0123456789abcdef", "", "the file", "cap:zz"):
        with pytest.raises(UnknownHandle, match="there is no original under"):
            Originals().get(handle)


def test_an_agent_reads_originals_with_a_tool() -> None:
    originals = Originals(tokenizer="bytes")
    handle = originals.put(PAGES)
    tool = retrieval_tool(originals, max_tokens=40)
    again = retrieval_tool(originals, max_tokens=40)
    box = ao.toolbox([tool], name="reader")
    assert box.tools[0]["function"]["name"] == "read_original"
    assert tool(f"[{handle.upper().replace('CAP', 'cap')}]", "the storm") == "Chapter 3 is about the storm."
    assert again(handle, "the storm") == box.call("read_original", {"handle": handle, "query": "the storm"})
    assert tool("cap:ffffffffffffffff").startswith("error: there is no original")
    code = originals.put("\n".join(f"print(f'{{value_{n}}} and {{other_{n}}}')" for n in range(50)))
    assert 0 < len(originals.get(code, max_tokens=100)) <= 100
    whole = originals.put("Never do this unless the owner asks.")
    tiny = retrieval_tool(originals, max_tokens=5, name="tiny")
    assert tiny(whole).startswith("error: the smallest part of it has ")
    with pytest.raises(BudgetInfeasible):
        originals.get(whole, max_tokens=5)
