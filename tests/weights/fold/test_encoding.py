"""Facts as rows: what is cut where, and which tokens count."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.weights.fold._codec import Codec
from agentopt.weights.fold._encoding import Encoder, Pick, grouped, sentences
from tests.weights.fold import tiny

_, TOKENIZER = tiny.tiny_model(words=(*tiny.WORDS, "lot.", "drum.", "coin!"))


def encoder(row_tokens: int = 8, *, multi_task: bool = True) -> Encoder:
    return Encoder(Codec(TOKENIZER, tiny.FORMAT, multi_task=multi_task), row_tokens)


def words(row: tuple[int, ...]) -> str:
    return str(TOKENIZER.decode(list(row)))


def test_a_long_text_is_cut_at_sentence_ends_and_a_long_sentence_inside() -> None:
    text = "ann owns a drum. bob owns a lot. " + "cid owns " * 10 + "coin! dan owns"
    found = encoder().facts(["eve owns rope", text])
    assert found.fact == (0, 1, 1, 1, 1, 1)
    assert words(found.ids[1]) == "ann owns a drum. bob owns a lot."
    assert words(found.ids[-1]) == "dan owns"
    assert [len(row) for row in found.ids[2:5]] == [7, 7, 7]  # the long sentence, in equal parts
    (cut,) = found.cuts
    assert cut == "fact 1 has 31 tokens, more than a row of 8: it was cut into 5 rows, 1 sentence of it inside."


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from(["ann", "owns", "drum.", "lot."]), min_size=2, max_size=40), min_size=1),
    st.integers(4, 12),
)
def test_rows_hold_every_token_once_and_in_order(facts: list[list[str]], row_tokens: int) -> None:
    made = encoder(row_tokens)
    texts = [" ".join(fact) for fact in facts]
    found = made.facts(texts)
    assert max(map(len, found.ids)) <= row_tokens
    for place, text in enumerate(texts):
        rows = [row for row, owner in zip(found.ids, found.fact, strict=True) if owner == place]
        assert [one for row in rows for one in row] == made.codec.ids(text)
        assert (len(rows) > 1) == any(cut.startswith(f"fact {place} ") for cut in found.cuts)


@pytest.mark.parametrize(("fact", "found"), [("", "empty"), (" \n", "empty"), ("ann", "one token")])
def test_a_fact_without_anything_to_learn_is_refused(fact: str, found: str) -> None:
    with pytest.raises(UserError, match=f"number 1 .*{found}"):
        encoder().facts(["ann owns drum", fact])


def test_knowledge_bases_are_folded_together_as_far_as_they_fit() -> None:
    small = encoder(128).facts(["ann owns drum"])
    large = encoder(128).facts(["ann owns " * 50] * 100)
    assert grouped([small] * 5, 2) == [range(0, 2), range(2, 4), range(4, 5)]
    found = grouped([small, large, small, small, large, large], 8)
    assert [len(group) for group in found] == [1, 1, 2, 1, 1]


def test_padding_and_first_tokens_have_no_weight() -> None:
    made = encoder()
    rows = made.fold_rows([made.facts(["ann owns drum", "bob owns"]), made.facts(["cid owns a coin!"])])
    assert tuple(rows.ids.shape) == (2, 2, 4)
    assert rows.weight.tolist() == [[[0, 1, 1, 0], [0, 1, 0, 0]], [[0, 1, 1, 1], [0, 0, 0, 0]]]


def test_the_outer_loss_sees_recalled_facts_and_answer_but_not_the_question() -> None:
    task = tiny.tasks(1, facts=3, questions=2)[0]
    asked = encoder().questions([Pick(task, (2, 1, 0), (0, 1)), Pick(task, (0, 1, 2), (1,))])
    ids = asked.rows.ids[0, 0]
    relevant = task.facts[task.questions[0].relevant[0]]
    assert words(tuple(ids[asked.recall[0, 0] > 0].tolist())) == f"{relevant} so:"
    assert words(tuple(ids[asked.answer[0, 0] > 0].tolist())) == f"{task.questions[0].answer} <eos>"
    assert float(asked.rows.weight[1, 1].sum()) == 0  # the second base is asked one question only
    alone = encoder(multi_task=False).questions([Pick(task, (0, 1, 2), (0,))])
    assert float(alone.recall.sum()) == 0 and float(alone.answer.sum()) == 2


def test_sentences_end_at_full_stops_lines_and_marks_of_other_scripts() -> None:
    assert sentences('He said "no." She left!  Why?\n- one\n\ntwo. 甲。乙') == [
        'He said "no."',
        "She left!",
        "Why?",
        "- one",
        "two.",
        "甲。",
        "乙",
    ]
