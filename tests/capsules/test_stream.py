"""Streams: the promises of extraction in memory that does not grow with the text."""

import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.capsules import BudgetInfeasible, TokenBudget, stream
from agentopt.capsules.extraction._stream import safe_chunks
from agentopt.errors import UserError

SMALL = 8192


def sentences(count: int, seed: int = 0) -> list[str]:
    """Prose without meaning."""
    draw = random.Random(seed)
    names = [f"{a}{b}" for a in ("tar", "mil", "ven", "kor", "lum") for b in ("ga", "don", "rik", "sel", "tum", "pan")]
    return [" ".join(draw.choices(names, k=9)).capitalize() + f" {number}." for number in range(count)]


def paragraphs(lines: list[str]) -> str:
    return "\n\n".join(" ".join(lines[at : at + 5]) for at in range(0, len(lines), 5))


def pieces(text: str, size: int = 1000):
    return (text[at : at + size] for at in range(0, len(text), size))


def test_a_stream_keeps_what_answers_and_what_must_stay():
    lines = sentences(2_000)
    lines[700] = "The vault opens at noon with a brass key."
    lines[1_500] = "Fill in {slot} afterwards."
    text = paragraphs(lines)
    found = stream(pieces(text), TokenBudget(120, "words"), query="When does the vault open?", chunk=SMALL)
    assert "opens at noon" in found.text and "{slot}" in found.text
    assert found.tokens == len(found.text.split()) <= 120
    assert found.characters == len(text)
    assert found.units == 2_000 and found.units_kept + found.dropped == found.units
    assert found.kept == (("{slot}", "placeholder"),)


def test_a_stream_that_fits_is_kept_but_for_white_space_at_the_ends():
    text = paragraphs(sentences(30)) + "\n\n# End\nLast words.\n"
    assert stream(pieces(text, 7), TokenBudget(10_000), chunk=SMALL).text == text.strip()


def test_breaks_between_chunks_stay():
    text = paragraphs(sentences(1_000))
    assert stream(pieces(text), TokenBudget(100_000), chunk=SMALL).text == text


def test_order_is_kept():
    found = stream(pieces(paragraphs(sentences(1_500))), TokenBudget(300, "words"), chunk=SMALL)
    numbers = [int(word[:-1]) for word in found.text.split() if word[:-1].isdigit()]
    assert numbers == sorted(numbers) and len(numbers) > 20


def test_memory_does_not_grow_with_the_text():
    def peak(rounds: int) -> int:
        def endless():
            for number in range(rounds):
                yield paragraphs(sentences(200, number)) + "\n\n"

        tracemalloc.start()
        try:
            stream(endless(), TokenBudget(100, "words"), chunk=SMALL)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few = peak(4)
    assert peak(16) < 1.5 * few


def test_the_minimum_of_a_stream_can_be_met():
    text = paragraphs([f"{line} Also put {{slot{n}}} in." for n, line in enumerate(sentences(400))])
    with pytest.raises(BudgetInfeasible) as error:
        stream(pieces(text), TokenBudget(50), chunk=SMALL)
    found = stream(pieces(text), TokenBudget(error.value.minimum), chunk=SMALL)
    assert found.tokens <= error.value.minimum
    assert all(f"{{slot{n}}}" in found.text for n in range(400))


def test_an_empty_stream_and_a_blank_one():
    assert stream([], TokenBudget(5)).text == ""
    assert stream(["", "\n\n", " "] * 50, TokenBudget(2, "bytes")).text.isspace()


def test_a_chunk_that_is_too_small_is_refused():
    with pytest.raises(UserError, match="chunk"):
        stream(["text"], TokenBudget(5), chunk=10)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["word ", "\n", "\n\n", "```\n", "é", "{slot}", ". ", "x" * 900]), max_size=60),
    st.integers(1, 5000),
)
def test_chunks_are_the_text(parts, size):
    text = "".join(parts) * 9
    assert "".join(safe_chunks(pieces(text, size), SMALL)) == text


def test_chunks_do_not_tear_fences_or_spans():
    code = "```\n" + "\n\n".join(f"line({n})" for n in range(300)) + "\n```"
    text = paragraphs(sentences(50)) + "\n\n" + code + "\n\n" + paragraphs(sentences(200)) + "<<" + "a b " * 500 + ">>"
    chunks = list(safe_chunks([text], SMALL, [r"<<[^>]*>>"]))
    assert len(chunks) > 1 and "".join(chunks) == text
    assert any(code in chunk for chunk in chunks)
    assert any("<<a b" in chunk and ">>" in chunk for chunk in chunks)
