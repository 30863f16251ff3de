"""The hard cut: never over the limit, never without what must stay, never empty, and a minimum that can be met."""

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.capsules import BudgetInfeasible, Document, TokenBudget, extract, find_intact, parse
from agentopt.capsules.counting._tokenizers import resolve_tokenizer
from agentopt.capsules.units._spans import uncuttable
from agentopt.errors import UserError


class Nasty:
    """Counts that do not add up and may fall when text is added."""

    name = "nasty"
    exact = True

    def count(self, text: str) -> int:
        noise = zlib.crc32(text.encode("utf-8", "surrogatepass")) % 7
        return noise + max(0, len(text) // 3 - 5 * text.count("e")) + (1 if text else 0)

    def count_many(self, texts):
        return [self.count(text) for text in texts]


def _tokenizers():
    for name in ("bytes", "words", "o200k_base", "cl100k_base", "embedded"):
        try:
            yield resolve_tokenizer(name)
        except UserError:  # the weights are a package of their own
            continue
    yield Nasty()


TOKENIZERS = list(_tokenizers())
PIECES = [
    "{x}", "{{name}}", "${v}", "%s", "not ", "never ", "unless ", "\n", "\n\n", ". ", "! ", ", ", "; ", "the cat ",
    "dog", "42 km", "$5.30", '"quoted text"', "http://a.b/c", "你好世界", "。", "これはペンです", "สวัสดี", "\ud800",
    "👨‍👩‍👧", "e\u0301", "🇩🇪", "\t", "\r\n", "```\ncode\n```", '{"a": 1}', "<a>b</a>", "# Head\n", "- item ",
    "1. one\n",
    "Q: what?\nA: yes\n\n", "| a | b |\n|---|---|\n| 1 | 2 |\n", "\n<doc>\nprose here.\n</doc>\n", "a" * 250, "\u200b",
    "\u3000", 'Output JSON: {"answer": str}\n', "user: hi\nassistant: hello\n",
    "Question: Who?\nLet's think step by step\nA. B. C.\nThe answer is 4\n\n",
]  # fmt: skip
wild = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=40).map("".join)
patterns = st.sampled_from([(), (), ("cat", r"\d+"), (r"\s\w",), (r"\n+",)])
parts = st.lists(st.tuples(wild, patterns, st.integers(0, 6)), min_size=1, max_size=3).map(
    lambda given: [parse(text, keep, whole=luck == 0) for text, keep, luck in given]
)


def holds(documents: list[Document], texts: tuple[str, ...]) -> None:
    """Keep spans in order and byte for byte; whole parts untouched; something is left."""
    assert any(texts) or not any(document.text for document in documents)
    for document, text in zip(documents, texts, strict=True):
        assert not document.whole or text == document.text
        place = 0
        for span in document.keep:
            place = text.index(span.of(document.text), place) + span.end - span.start


@settings(max_examples=250, deadline=None)
@given(parts, st.sampled_from(TOKENIZERS), st.floats(0, 1.1), st.sampled_from([None, "cat dog", "where is 42?"]))
def test_a_capsule_fits_or_says_what_would(documents, tokenizer, share, query):
    total = tokenizer.count("".join(document.text for document in documents))
    limit = max(1, int(share * share * total))
    try:
        found = extract(documents, TokenBudget(limit, tokenizer).meter(), query=query)
    except BudgetInfeasible as error:
        assert error.minimum > limit
        limit = error.minimum
        found = extract(documents, TokenBudget(limit, tokenizer).meter(), query=query)
    assert TokenBudget(limit, tokenizer).meter().total(found.texts) <= limit
    holds(documents, found.texts)


@settings(max_examples=150, deadline=None)
@given(wild, st.floats(0, 0.6))
def test_units_that_stay_are_not_altered_and_those_that_are_cut_lose_no_part_of_a_span(text, share):
    document = parse(text)
    meter = TokenBudget(max(1, int(share * len(text))), "bytes").meter()
    try:
        found = extract([document], meter)
    except BudgetInfeasible:
        return
    lost = {dropped.text for dropped in found.dropped if dropped.reason == "cut"}
    for _, index in found.kept if document.units else ():
        unit = document.units[index]
        original = text[unit.start : unit.end]
        if original in found.texts[0]:
            continue
        # It was cut: only where it may be, and what left holds spans as wholes.
        assert lost and not uncuttable(original)
        for span in find_intact(original):
            assert span.of(original) in found.texts[0] or any(span.of(original) in piece for piece in lost)


def test_the_error_says_what_must_be_kept():
    text = "Say {name} first. " + "Fill this with many words. " * 20 + 'Then output JSON: {"answer": "..."}'
    with pytest.raises(BudgetInfeasible) as error:
        extract([parse(text)], TokenBudget(3, "bytes").meter())
    found = extract([parse(text)], TokenBudget(error.value.minimum, "bytes").meter())
    assert len(found.texts[0].encode()) == error.value.minimum
    assert "{name}" in found.texts[0] and '{"answer": "..."}' in found.texts[0]


def test_whole_parts_alone_may_be_too_long():
    documents = [parse("Some history here. And more of it."), parse("The last question stays as it is.", whole=True)]
    with pytest.raises(BudgetInfeasible) as error:
        extract(documents, TokenBudget(10, "bytes").meter())
    assert error.value.minimum == len("The last question stays as it is.")


def test_a_sentence_with_a_negation_stays_whole_or_leaves_whole():
    text = "The pump must not run dry, and the operator checks the level, the filter and the seal of it."
    with pytest.raises(BudgetInfeasible) as error:
        extract([parse(text)], TokenBudget(40, "bytes").meter())
    assert error.value.minimum == len(text)


def test_prose_is_cut_at_a_clause_when_no_sentence_fits():
    text = "The old pump in the cellar broke, the operator went down the stairs, the filter was dirty again."
    found = extract([parse(text)], TokenBudget(80, "bytes").meter())
    assert found.texts[0] == "The old pump in the cellar broke, the operator went down the stairs,"
    assert [dropped.reason for dropped in found.dropped] == ["cut"]
    assert found.dropped[0].text == "the filter was dirty again."
    tiny = extract([parse(text)], TokenBudget(12, "bytes").meter())
    assert tiny.texts[0] == "The old pump"


def test_white_space_alone_gives_white_space():
    found = extract([parse("\n" * 500)], TokenBudget(3, "bytes").meter())
    assert found.texts[0] and not found.texts[0].strip()


def test_nothing_gives_nothing():
    assert extract([parse("")], TokenBudget(1).meter()).texts == ("",)
    assert extract([], TokenBudget(1).meter()).texts == ()


def test_a_long_line_without_a_break_ends():
    found = extract([parse("word " * 100_000)], TokenBudget(50).meter())
    assert 0 < TokenBudget(50).meter().total(found.texts) <= 50
    assert len(extract([parse("x" * 300_000)], TokenBudget(1000, "bytes").meter()).texts[0]) <= 1000


def test_a_budget_is_used():
    sentences = [f"The {name} of district {n} was built near the river in 18{n:02d}." for n, name in enumerate(
        ["bridge", "mill", "school", "harbour", "tower", "market", "theatre", "library", "station", "museum"] * 6
    )]  # fmt: skip
    text = "\n\n".join(" ".join(sentences[at : at + 6]) for at in range(0, 60, 6))
    for limit in (100, 150, 300, 500):
        meter = TokenBudget(limit).meter()
        assert meter.total(extract([parse(text)], meter).texts) >= 0.9 * limit
        assert meter.total(extract([parse(text)], meter, query="when was the tower built?").texts) >= 0.9 * limit
