"""Folding as a user does it: what is learned, folded, asked and refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from agentopt.errors import RunError, UserError
from agentopt.weights.fold import Folder, Gate, Question
from tests.weights.fold import tiny

torch: Any = pytest.importorskip("torch")

FACTS = ["ann owns drum", "bob owns kite", "cid owns rope"]


@pytest.fixture
def gated(tiny_folder: Folder) -> Iterator[Folder]:
    """The shared folder, whose gate a test may set."""
    before = tiny_folder.gate
    yield tiny_folder
    tiny_folder.gate = before


def fresh(**fields: Any) -> Folder:
    model, tokenizer = tiny.tiny_model(width=16)
    return Folder(model, tokenizer, options=tiny.options(**fields))


def test_a_trained_folder_answers_without_the_facts(tiny_folder: Folder) -> None:
    scores = tiny_folder.evaluate(tiny.tasks(32, seed=2))
    assert scores.accuracy >= 0.9
    assert scores.recall_exact is not None and scores.recall_exact >= 0.9
    adapter = tiny_folder.fold(FACTS)
    assert adapter.recall > 0.5 > adapter.recall_before and adapter.lift > 0.3
    assert adapter.rows == 3 and len(adapter.fact_recall) == 3 and adapter.warnings == ()
    answers = tiny_folder.ask_many(adapter, ["ann owns?", "bob owns?", "cid owns?"])
    assert [one.text for one in answers] == ["drum", "kite", "rope"]
    assert [one.source for one in answers] == ["folded"] * 3
    assert answers[0].recalled == ("ann owns drum",)
    assert all(one.recall == adapter.recall and one.margin > 0 for one in answers)


def test_adapters_side_by_side_answer_as_each_alone(tiny_folder: Folder) -> None:
    bases = [FACTS, ["ann owns coin", "dan owns sled"], ["bob owns lamp", "eve owns drum", "fay owns coin"]]
    together = tiny_folder.fold_many(bases)
    alone = [tiny_folder.fold(base) for base in bases]
    for one, two in zip(together, alone, strict=True):
        assert one.fact_recall == pytest.approx(two.fact_recall, rel=1e-3)
    pairs = [
        (together[at], f"{name} owns?") for at, name in ((2, "bob"), (0, "bob"), (1, "ann"), (0, "ann"), (2, "fay"))
    ]
    answers = tiny_folder.ask_pairs(pairs)
    assert [one.text for one in answers] == ["lamp", "kite", "coin", "drum", "coin"]
    for (adapter, question), answer in zip(pairs, answers, strict=True):
        single = tiny_folder.ask(adapter, question)
        assert single.text == answer.text and single.margin == pytest.approx(answer.margin, rel=1e-3)


def test_choices_are_scored(tiny_folder: Folder) -> None:
    adapter = tiny_folder.fold(FACTS)
    answer = tiny_folder.ask(adapter, "bob owns?", choices=["rope", "kite"])
    assert answer.text == "kite" and answer.margin > 0
    assert tiny_folder.ask(adapter, Question("bob owns?", "", choices=("lamp",))).text == "lamp"
    with pytest.raises(UserError, match="empty question"):
        tiny_folder.ask(adapter, "  ")


def test_a_fold_below_the_gate_is_answered_in_context(gated: Folder) -> None:
    adapter = gated.fold(FACTS)
    gated.gate = Gate(recall=2.0)
    answer = gated.ask(adapter, "ann owns?", choices=tiny.THINGS)
    assert answer.source == "in-context" and answer.recall is None
    assert "below the gate's 2.000" in answer.reason
    with gated.base_in_use():
        assert answer.text == gated.reader().ask(FACTS, "ann owns?", tiny.THINGS).text
    assert not gated.fold(FACTS).accepted
    assert gated.ask(adapter, "ann owns?", gate=False).source == "folded"
    gated.gate = Gate(recall=0.0, margin=1e9)
    answer = gated.ask(adapter, "ann owns?", choices=tiny.THINGS)
    assert answer.source == "in-context" and "the answer beats the next one" in answer.reason


def test_context_stands_between_the_facts_and_the_question(gated: Folder) -> None:
    adapter = gated.fold(FACTS)
    told = gated.ask(adapter, "ann owns?", choices=tiny.THINGS, context=["not a", "lot"], gate=False)
    plain = gated.ask(adapter, "ann owns?", choices=tiny.THINGS, gate=False)
    assert told.source == "folded" and told.margin != plain.margin
    gated.gate = Gate(recall=2.0)
    told = gated.ask(adapter, "ann owns?", choices=tiny.THINGS, context=["not a", "lot"])
    with gated.base_in_use():
        read = gated.reader().ask([*FACTS, "not a", "lot"], "ann owns?", tiny.THINGS)
    assert (told.source, told.text) == ("in-context", read.text)
    assert told.margin == pytest.approx(read.margin, rel=1e-3)
    with pytest.raises(UserError, match=r"expected a list of lines: context=\[text\]"):
        gated.ask(adapter, "ann owns?", context="not a")


def test_facts_that_do_not_fit_the_window_are_answered_by_the_fold(gated: Folder) -> None:
    adapter = gated.fold([f"{name} owns {thing}" for name in tiny.NAMES for thing in tiny.THINGS])
    gated.gate = Gate(recall=2.0)
    answer = gated.ask(adapter, "ann owns?", choices=tiny.THINGS)
    assert answer.source == "folded" and "so this is the folded answer" in answer.reason


@pytest.mark.parametrize(
    ("docs", "match"),
    [
        ([], "no documents"),
        (["ann owns drum", ""], "document 1 is ''"),
        ([" \t\n"], "document 0 is"),
        ("ann owns drum", "found one text"),
        (["ann"], "one token"),
        ([None], "document 0 is None"),
    ],
)
def test_documents_without_facts_are_refused(tiny_folder: Folder, docs: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        tiny_folder.fold(docs)


def test_what_is_repeated_cut_or_contradicted_is_told(tiny_folder: Folder) -> None:
    long = "ann does not a " * 40
    adapter = tiny_folder.fold(["bob is a lot", " bob  is a lot ", "bob is not a lot", long, "what is so: a"])
    assert adapter.facts == ("bob is a lot", "bob is not a lot", long.strip(), "what is so: a")
    assert [(one.first, one.second) for one in adapter.contradictions] == [(0, 1)]
    told = " | ".join(adapter.warnings)
    assert "fact 2 has 160 tokens, more than a row of 128: it was cut into 2 rows" in told
    assert "1 repeated document was folded once" in told
    assert '"bob is a lot" contradicts "bob is not a lot"; both were folded' in told
    assert "a fact holds 'so:'" in told
    assert adapter.rows == 5 and len(adapter.fact_recall) == 4


def test_an_inner_loop_that_diverges_names_the_document() -> None:
    with fresh(rule="sgd", lr=1e38) as folder, pytest.raises(RunError, match=r"step 0|knowledge base 0"):
        folder.fold(FACTS)


def test_the_model_is_given_back_as_it_was() -> None:
    model, tokenizer = tiny.tiny_model(width=16)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with Folder(model, tokenizer, options=tiny.OPTIONS) as folder:
        adapter = folder.fold(FACTS)
        assert "Folder(" in repr(folder)
    assert model.training and all(tensor.requires_grad for tensor in model.parameters())
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match="this folder is closed"):
        folder.ask(adapter, "ann owns?")
    folder.close()  # twice is once


def test_a_model_that_cannot_fold_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.tiny_model(width=16)
    model.train()
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with pytest.raises(UserError, match="no output head"):
        Folder(model, tokenizer, options=tiny.OPTIONS)
    assert all(module.training for module in model.modules())
    assert all(tensor.requires_grad for tensor in model.parameters())


def test_options_and_model_must_fit() -> None:
    model, tokenizer = tiny.tiny_model(width=16)
    with pytest.raises(UserError, match=r"expected Folder\(model, tokenizer\)"):
        Folder(model)
    with pytest.raises(UserError, match="unknown option 'ranc'"):
        Folder(model, tokenizer, ranc=3)
    with pytest.raises(UserError, match="options= and rank"):
        Folder(model, tokenizer, options=tiny.OPTIONS, rank=3)
    with pytest.raises(UserError, match="at most 2"):
        Folder(model, tokenizer, layers=3)
    with (
        Folder(model, tokenizer, options=tiny.OPTIONS) as folder,
        pytest.raises(UserError, match="meta_train: steps is 0"),
    ):
        folder.meta_train(tiny.tasks(4), steps=0)


def test_without_a_gate_every_answer_is_folded() -> None:
    with fresh(multi_task=False) as folder:
        answer = folder.ask(folder.fold(FACTS), "ann owns?", choices=tiny.THINGS)
    assert answer.source == "folded" and answer.reason == "no gate" and math.isfinite(answer.logprob)
