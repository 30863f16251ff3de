"""Protected spans as marks and back: the very same characters, whatever the text holds."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.capsules import Document, Span, Unit
from agentopt.capsules.rewriting._sentinels import mask
from agentopt.capsules.units._units import parse

WILD = st.text(
    st.one_of(
        st.sampled_from(list("[]<>()⟦⟧⟪⟫{}:0123456789 \n\"'`Z$€-.,/")),
        st.characters(),
    ),
    max_size=120,
)


def _every(pattern: str, text: str) -> list[Span]:
    return [Span(*match.span(), "intact", "number") for match in re.finditer(pattern, text)]


@given(WILD, st.lists(st.tuples(st.integers(0, 120), st.integers(1, 20), st.booleans()), max_size=12))
@settings(max_examples=200)
def test_any_text_with_any_spans_comes_back_byte_for_byte(text: str, wanted: list[tuple[int, int, bool]]) -> None:
    keep: list[Span] = []
    intact: list[Span] = []
    for start, length, kept in wanted:
        end = min(len(text), start + length)
        if start < end and kept and not any(span.start < end and start < span.end for span in keep):
            keep.append(Span(start, end, "keep", "pattern"))
        elif start < end:
            intact.append(Span(start, end, "intact", "quote"))
    keep.sort(key=lambda span: span.start)
    document = Document(text, (Unit(0, len(text), "sentence", 0),) if text else (), tuple(keep))

    def find(_: str) -> Sequence[Span]:
        return intact

    masked = mask(document, find)
    assert masked.marks.restore(masked.text) == text
    bare = masked.marks.pattern.sub(lambda match: masked.marks.bare(int(match[1])), masked.text)
    assert masked.marks.restore(bare) == text
    assert len(masked.marks.numbers(masked.text)) == len(masked.marks.spans)
    for span in keep:
        assert any(span.of(text) in whole for whole in masked.marks.spans)


@given(WILD)
@settings(max_examples=60)
def test_the_spans_that_are_found_come_back_too(text: str) -> None:
    masked = mask(parse(text))
    assert masked.marks.restore(masked.text) == text


TEXT = 'Pay $45.00 within 30 days, and cite "Terms of Sale" at https://shop.example/terms for {name}.'


def test_marks_are_numbered_and_show_what_they_stand_for() -> None:
    masked = mask(parse(TEXT))
    assert "[[1: $45.00]]" in masked.text
    assert "{name}" not in masked.text.replace("[[5: {name}]]", "")
    assert masked.marks.kept[masked.marks.spans.index("{name}")]
    assert not masked.marks.kept[masked.marks.spans.index("$45.00")]


@pytest.mark.parametrize(
    ("reply", "restored"),
    [
        ("Pay [[1]]", "Pay $45.00"),
        ("Pay [[ 1 ]]", "Pay $45.00"),
        ("Pay [[1: $45.00]]", "Pay $45.00"),
        ("Pay [[1: 45 dollars]]", "Pay $45.00"),
        ("Pay $45.00", "Pay $45.00"),
        ("Pay [[99]]", "Pay [[99]]"),
        ("Pay [[0]]", "Pay [[0]]"),
        ("Pay [[1: 30 days]]", "Pay [[1: 30 days]]"),
    ],
)
def test_a_mark_is_read_by_its_number_however_it_is_written_unless_its_label_is_of_another(
    reply: str, restored: str
) -> None:
    marks = mask(parse(TEXT)).marks
    assert marks.restore(reply) == restored
    assert bool(marks.leftover(marks.restore(reply))) == ("[[" in restored)


@pytest.mark.parametrize("held", ["[[1]]", "[[1: x]] <<2>>", "[[ << (( ⟦ ⟪", "[[Z1Z]] ZZZ [[ << (( ⟦ ⟪ ]] >>"])
def test_marks_take_another_form_where_the_text_holds_such(held: str) -> None:
    text = f"{held} costs 45 dollars and 30 cents."
    masked = mask(parse(text), lambda found: _every(r"\d+ \w+", found))
    assert len(masked.marks.spans) >= 2
    assert masked.marks.opening not in text
    assert masked.marks.restore(masked.text) == text


def test_overlapping_spans_are_one_mark_that_is_kept_if_one_of_them_is() -> None:
    text = 'Send {"user": "{name}", "age": 3} now.'
    document = Document(text, (Unit(0, len(text), "sentence", 0),), (Span(15, 21, "keep", "placeholder"),))
    masked = mask(document, lambda _: [Span(5, 33, "intact", "json"), Span(31, 32, "intact", "number")])
    assert masked.marks.spans == ('{"user": "{name}", "age": 3}',)
    assert masked.marks.kept == (True,)
