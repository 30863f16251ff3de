"""A user's rows become prompts, labels and token ids; what is wrong with them is said with its row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.evaluation import Dataset, Example
from agentopt.weights.tasks import Batches, TaskData, Template, load_task
from tests.weights.tiny import tiny

REVIEWS = [{"text": f"film {n}", "label": n % 2} for n in range(12)]
WORDS = ["film", "It", "was", "Label:", "terrible", "great", *map(str, range(12)), "Answer:", "red", "blue", "sky"]


def jsonl(folder: Path, rows: list[Any], name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_importing_loads_no_torch() -> None:
    code = "import sys, agentopt.weights.tasks; print('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- what the rows are


@pytest.mark.parametrize(
    ("rows", "kind", "prompt", "answer"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], "classification", "a\nLabel:", "x"),
        ([{"sentence": "a", "label": 1}, {"sentence": "b", "label": 0}], "classification", "a\nLabel:", "1"),
        ([{"text": "a", "answer": "no"}, {"text": "b", "answer": "yes"}] * 2, "classification", "a\nLabel:", "no"),
        (
            [{"premise": "a", "hypothesis": "b", "label": True}, {"premise": "c", "hypothesis": "d", "label": False}],
            "classification",
            "Premise: a\nHypothesis: b\nLabel:",
            "true",
        ),
        ([{"question": "q", "choices": ["r", "s"], "answer": 1}], "choice", "q\nAnswer:", "s"),
        ([{"question": "q", "options": ["r", "s"], "label": "A"}], "choice", "q\nAnswer:", "r"),
        (
            [{"question": "q", "choices": {"text": ["r", "s"], "label": ["1", "2"]}, "answerKey": "2"}],
            "choice",
            "q\nAnswer:",
            "s",
        ),
        ([{"question": "q", "choices": ["1", "0"], "answer": "0"}], "choice", "q\nAnswer:", "0"),
        ([{"prompt": "p", "completion": " c"}], "generation", "p", " c"),
        ([{"question": "q", "answer": "a long story " * 5}] * 2, "generation", "q\nAnswer:", "a long story " * 5),
        (
            [{"id": 7, "text": "a", "label": "x"}, {"id": 8, "text": "b", "label": "y"}],
            "classification",
            "a\nLabel:",
            "x",
        ),
    ],
)
def test_kind_prompt_and_answer_follow_from_the_columns(
    rows: list[dict[str, Any]], kind: str, prompt: str, answer: str
) -> None:
    data = load_task(rows)
    assert (data.kind, data.prompts()[0], data.rows[0].expected) == (kind, prompt, answer)


def test_labels_and_words() -> None:
    plain = load_task(REVIEWS)
    assert (plain.labels, plain.words) == (("0", "1"), ("0", "1"))
    words = load_task(REVIEWS, labels={0: "terrible", "1": "great"}, prompt="{text} It was {label}")
    assert (words.labels, words.words) == (("0", "1"), ("terrible", "great"))
    assert words.prompts()[1] == "film 1 It was " and words.rows[1].expected == "great"
    named = load_task([{"text": "a", "label": 1, "label_text": "joy"}, {"text": "b", "label": 0, "label_text": "fear"}])
    assert (named.labels, named.words) == (("0", "1"), ("fear", "joy")) and named.prompts()[0] == "a\nLabel:"
    many = load_task([{"text": "a", "label": n % 11} for n in range(22)])
    assert many.labels == tuple(map(str, range(11)))
    assert load_task([{"text": "a", "label": "very_good"}, {"text": "b", "label": "bad"}]).words == ("bad", "very good")


def test_a_file_a_dataset_and_rows_are_the_same_task(tmp_path: Path) -> None:
    from_rows, from_file = load_task(REVIEWS), load_task(jsonl(tmp_path, REVIEWS))
    dataset = Dataset("reviews", [Example("", {"text": row["text"]}, row["label"]) for row in REVIEWS])
    from_dataset = load_task(dataset)
    assert [row.id for row in from_rows.rows] == [row.id for row in from_file.rows] == dataset.ids
    assert from_rows.prompts() == from_file.prompts() == from_dataset.prompts()
    assert load_task(from_file) is from_file
    table = tmp_path / "data.csv"
    table.write_text("text,label\nfilm 0,0\nfilm 1,1\n", encoding="utf-8")
    assert load_task(table).labels == ("0", "1")


def test_a_split_keeps_labels_and_pairs_rows_by_id() -> None:
    data = load_task(REVIEWS, labels={"0": "terrible", "1": "great"})
    train, val, test = data.split(seed=4)
    assert (len(train), len(val), len(test)) == (6, 3, 3)
    assert train.words == test.words == data.words
    assert {row.id for part in (train, val, test) for row in part.rows} == {row.id for row in data.rows}
    assert [row.id for row in train.rows] == [row.id for row in data.split(seed=4)[0].rows]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, "the dataset is empty"),
        ([{"text": "a", "label": "x"}, {"text": "b"}], {}, r"data\.jsonl, line 2: the field 'label' is missing"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], {}, r"line 2: the field 'label' is null"),
        ([{"text": "a", "label": "x"}] * 3, {}, "every row has the label 'x'"),
        (REVIEWS, {"labels": {"0": "terrible"}}, r"line 2: the label is '1', expected one of '0'"),
        (REVIEWS, {"labels": {"0": "same", "1": "same"}}, "two labels have the word 'same'"),
        (REVIEWS, {"labels": {"0": " ", "1": "great"}}, "the word for the label '0' is empty"),
        (REVIEWS, {"prompt": "{txt} It was"}, r"no column 'txt'; did you mean \{text\}"),
        (REVIEWS, {"prompt": "{text} was {label}."}, "found text after the answer"),
        (REVIEWS, {"prompt": "{text"}, "braces that are text"),
        (REVIEWS, {"prompt": "{text!r}"}, "found a format"),
        (REVIEWS, {"prompt": "{text.__class__}"}, "no column 'text.__class__'"),
        (REVIEWS, {"prompt": "It was"}, "shows no column"),
        (REVIEWS, {"text": "txt"}, "did you mean 'text'"),
        (REVIEWS, {"label": "lbl"}, "no column 'lbl' for the answer"),
        (REVIEWS, {"kind": "ranking"}, "kind: found 'ranking'"),
        ([{"text": "a"}], {}, "no column with the answer"),
        ([{"label": "a"}, {"label": "b"}], {}, "no column to show"),
        (
            [{"question": "q", "choices": ["r", "s"], "answer": 2}],
            {},
            r"line 1: the answer is 2, expected one of the 2",
        ),
        ([{"question": "q", "choices": ["r"], "answer": 0}], {}, "at least two options"),
        ([{"question": "q", "choices": ["r", "r"], "answer": 0}], {}, "options that differ"),
        ([{"question": "q", "choices": ["r", "s"], "answer": 0}], {"labels": {"0": "x"}}, "labels= is for"),
        ([{"prompt": "p", "completion": ""}], {}, "the field 'completion' is empty"),
        (["text"], {}, "line 1: found text, expected an object"),
    ],
)
def test_what_is_wrong_is_said_with_its_row(
    tmp_path: Path, rows: list[Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        load_task(jsonl(tmp_path, rows), **options)


@given(st.text(max_size=30), st.text(max_size=30))
def test_a_template_shows_what_a_row_holds_and_no_more(text: str, literal: str) -> None:
    source = literal.replace("{", "{{").replace("}", "}}") + "{text}"
    assert Template.parse(source, columns=["text"]).render({"text": text}) == literal + text


# ---- as tokens


def encoded(data: TaskData, **options: Any) -> Any:
    return data.encode(tiny(WORDS)[1], **options)


def test_prompts_and_label_words_as_tokens() -> None:
    rows = encoded(load_task(REVIEWS, labels={"0": "terrible", "1": "great"}, prompt="{text} It was {label}"))
    tokenizer = tiny(WORDS)[1]
    first = rows[0]
    assert tokenizer.convert_ids_to_tokens(list(first.prompt)) == ["film", "0", "It", "was"]
    assert [tokenizer.convert_ids_to_tokens(list(one)) for one in first.candidates] == [["terrible"], ["great"]]
    assert (first.answer, rows[1].answer, rows.kind, rows.notes) == (0, 1, "classification", ())
    assert [len(one.prompt) for one in rows.content_free] == [3, 2, 3]
    assert len(rows[2:5]) == 3


def test_numbers_as_label_words_are_noted() -> None:
    assert "tell the model nothing" in encoded(load_task(REVIEWS)).notes[0]


def byte_tokenizer(template: str | None = None, *, begin: bool = False) -> Any:
    """One token per byte, as byte-level tokenizers treat rare words; optionally with a begin-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<s>", "</s>"])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if begin:
        inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    found = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>", bos_token="<s>")
    found.chat_template = template
    return found


def text_of(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(list(ids))


def test_words_of_several_tokens_share_what_they_begin_with() -> None:
    tokenizer = byte_tokenizer()
    rows = load_task(REVIEWS, labels={"0": "bad", "1": "bald"}).encode(tokenizer)
    assert text_of(tokenizer, rows[0].prompt) == "film 0\nLabel: ba"
    assert [text_of(tokenizer, one) for one in rows[0].candidates] == ["d", "ld"]


def test_a_word_that_begins_with_another_is_closed() -> None:
    tokenizer = byte_tokenizer()
    rows = load_task(REVIEWS, labels={"0": "good", "1": "goodness"}).encode(tokenizer)
    assert [text_of(tokenizer, one) for one in rows[0].candidates] == ["\n", "ness\n"]
    assert "closed by a line break" in rows.notes[0]


def test_the_begin_of_text_token_stands_first_also_in_a_cut_prompt() -> None:
    tokenizer = byte_tokenizer(begin=True)
    data = load_task([{"text": "x" * 50 + "end", "label": n} for n in "ab"])
    rows = data.encode(tokenizer, max_tokens=20)
    assert rows[0].prompt[0] == tokenizer.bos_token_id
    assert text_of(tokenizer, rows[0].prompt[1:]) == "xxxxxxxend\nLabel: "
    assert rows.truncated == 2 and "cut in front" in rows.notes[-1]
    assert max(len(row.prompt) for row in rows) <= 20
    with pytest.raises(UserError, match="row 1: the answer has 2 tokens"):
        data.encode(tokenizer, max_tokens=3)


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def test_the_chat_template_is_an_option_and_stays_whole_when_the_text_is_cut() -> None:
    tokenizer = byte_tokenizer(CHAT)
    data = load_task([{"text": "0123456789" * 4, "label": n} for n in "ab"])
    rows = data.encode(tokenizer, chat=True)
    assert text_of(tokenizer, rows[0].prompt) == f"<user>{'0123456789' * 4}\nLabel:<assistant>"
    assert [text_of(tokenizer, one) for one in rows[0].candidates] == ["a", "b"]
    short = data.encode(tokenizer, chat=True, max_tokens=32)
    assert text_of(tokenizer, short[0].prompt) == "<user>3456789\nLabel:<assistant>"
    with pytest.raises(UserError, match="no chat template"):
        data.encode(byte_tokenizer(), chat=True)


def test_completions_are_taken_as_written_and_end() -> None:
    tokenizer = byte_tokenizer()
    rows = load_task([{"prompt": "p:", "completion": "\nc"}, {"prompt": "p ", "completion": "c"}]).encode(tokenizer)
    assert [text_of(tokenizer, (*row.prompt, *row.candidates[0])) for row in rows] == ["p:\nc</s>", "p c</s>"]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (REVIEWS, {"labels": {"0": "dreadful", "1": "great"}}, "does not know the word 'dreadful' of the label '0'"),
        (
            [{"question": "sky", "choices": ["mauve", "puce"], "answer": 0}],
            {},
            "row 1: 'mauve' and 'puce' are the same to the tokenizer",
        ),
        ([{"text": "", "label": n} for n in ("red", "blue")], {"prompt": "{text}"}, "row 1: the prompt is empty"),
    ],
)
def test_what_the_tokenizer_cannot_tell(rows: list[dict[str, Any]], options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        encoded(load_task(rows, **options))


# ---- batches


def test_batches_are_a_function_of_seed_and_step() -> None:
    rows = encoded(load_task(REVIEWS))
    batches = Batches(rows, batch=5, seed=1, micro_batch=2)
    again = Batches(rows, batch=5, seed=1, micro_batch=2)
    assert batches.at(7) == again.at(7) and batches.at(0) == batches.at(0)
    assert Batches(rows, batch=5, seed=2).at(0).examples != batches.at(0).examples
    assert [len(part) for part in batches.at(3).micro] == [2, 2, 1] and len(batches.at(3)) == 5
    seen = [example.id for step in range(12) for example in batches.at(step).examples]
    assert all(seen.count(row.id) == 5 for row in rows)  # 60 draws of 12 rows: five whole shuffles
    assert len(Batches(rows, batch=30).at(0)) == 30
    with pytest.raises(UserError, match="micro_batch to 2 or less"):
        Batches(rows, batch=4).at(0).share(0, 2)
    with pytest.raises(UserError, match="batch: found 0"):
        Batches(rows, batch=0)
    with pytest.raises(UserError, match="no rows"):
        Batches(rows[:0])
