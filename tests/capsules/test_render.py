"""Rendering: everything is given back as it was; across a gap the strongest break stays."""

import re

from hypothesis import given
from hypothesis import strategies as st

from agentopt.capsules import Document, Unit, parse
from agentopt.capsules.extraction._render import render, render_with_places


def document(text: str) -> Document:
    """Sentences as units, by their full stops."""
    found = re.finditer(r"[^\s。][^.。\n]*[.。]?", text)
    return Document(text, tuple(Unit(match.start(), match.end(), "sentence", 0) for match in found))


def test_everything_is_given_back_character_for_character():
    text = "  One.  Two.\n\n\n\tThree.\r\nFour. \n"
    assert render(document(text), [True] * 4) == text


def test_neighbours_keep_what_stood_between_them():
    assert render(document("One.  Two.\n\n  Three. Four."), [False, True, True, False]) == "Two.\n\n  Three."


def test_across_a_gap_the_strongest_break_stays():
    text = "One. Two.\n\nThree. Four.\nFive. Six."
    assert render(document(text), [True, False, False, True, False, False]) == "One.\n\nFour."
    assert render(document(text), [False, False, True, False, True, False]) == "Three.\nFive."
    assert render(document(text), [False, False, False, False, True, True]) == "Five. Six."
    assert render(document("One. Two. Three."), [True, False, True]) == "One. Three."


def test_text_without_spaces_gets_none():
    assert render(document("一。二。三。"), [True, False, True]) == "一。三。"


def test_indentation_of_a_line_stays():
    assert render(document("- One.\n  - Two.\n  - Three."), [True, False, True]) == "- One.\n  - Three."


def test_windows_line_ends_stay():
    assert render(document("One.\r\n\r\nTwo.\r\n\r\nThree."), [True, False, True]) == "One.\r\n\r\nThree."


def test_a_piece_stands_for_its_unit():
    assert render(document("One two. Three four. Five."), [True, False, False], {1: "Three"}) == "One two. Three"


@given(st.text(alphabet="ab.。 \n\r\t{x}", max_size=60), st.randoms(use_true_random=False))
def test_places_point_at_the_units(text, draw):
    parsed = parse(text)
    kept = [draw.random() < 0.5 for _ in parsed.units]
    if all(kept):
        return
    rendered, places = render_with_places(parsed, kept)
    assert rendered == render(parsed, kept)
    assert [index for index, _ in places] == [index for index, stays in enumerate(kept) if stays]
    for index, start in places:
        unit = parsed.units[index]
        assert rendered[start:].startswith(text[unit.start : unit.end])
