"""Edits that lose nothing: what they change, what they leave alone, and that they are done once."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.capsules.units._lossless import lossless
from agentopt.capsules.units._spans import find_intact, find_keep
from tests.capsules.wild import LONG, TEXTS, repeated

PARAGRAPH = "This paragraph is long enough to be no coincidence."
LONG_PARAGRAPH = " ".join([PARAGRAPH] * 5)


def squeezed(text):
    return "".join(text.split())


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_never_longer_done_once_and_never_empty(text):
    edited, names = lossless(text)
    assert len(edited) <= len(text)
    assert bool(names) == (edited != text)
    assert lossless(edited) == (edited, [])
    assert bool(edited.strip()) == bool(text.strip())


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_intact_spans_of_the_result_are_in_the_original(text):
    """White space between the words of a name may go; what is quoted, code or XML stays as it is."""
    edited, _ = lossless(text)
    packed = squeezed(text)
    for span in find_intact(edited):
        content = span.of(edited)
        if span.kind in ("quote", "code", "xml", "url", "path", "identifier") and "\n" not in content:
            assert content in text
        assert squeezed(content) in packed


@pytest.mark.parametrize(
    "text",
    [
        "See <examples>    </examples>.",
        "As in <pre>a    b</pre> there.",
        "《two  words》 is a title.",
        "<examples>\none  two\n\n\n\nthree\n</examples>\n",
    ],
)
def test_white_space_of_xml_and_quotes_is_theirs_wherever_they_begin(text):
    assert lossless(text) == (text, [])


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_every_keep_span_stays_byte_for_byte(text):
    edited, _ = lossless(text)
    at = 0
    for span in find_keep(text, []):
        found = edited.find(span.of(text), at)
        assert found >= 0, span.of(text)
        at = found + span.end - span.start


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=5), VALUES, min_size=1, max_size=5), st.integers(0, 4), st.booleans())
def test_json_is_the_same_value_with_the_same_literals(value, indent, escape):
    block = json.dumps(value, indent=indent, ensure_ascii=escape)
    edited, _ = lossless(f"Some text.\n\n{block}\n\nMore text.")
    found = edited.removeprefix("Some text.\n\n").removesuffix("\n\nMore text.")
    assert json.loads(found) == value
    assert found == block or found == json.dumps(value, ensure_ascii=escape, separators=(",", ":"))


def test_number_literals_and_key_order_stay():
    assert lossless('{ "b": 1.50,\n  "a": [ 1e5, -0 ],\n  "s": "x  : y" }') == (
        '{"b":1.50,"a":[1e5,-0],"s":"x  : y"}',
        ["JSON white space"],
    )


@pytest.mark.parametrize(
    ("text", "expected", "name"),
    [
        ("one  \ntwo\t\n", "one\ntwo\n", "trailing white space"),
        ("one\n\n\n\ntwo", "one\n\ntwo", "blank lines"),
        ("one  two.  Three", "one two. Three", "runs of spaces"),
        (f"{PARAGRAPH}\n\nOther.\n\n{PARAGRAPH}\n", f"{PARAGRAPH}\n\nOther.\n", "exact repeats"),
        (
            f"# A\n\n{LONG_PARAGRAPH}\n\n# B\n\n{LONG_PARAGRAPH}\n\nX.",
            f"# A\n\n{LONG_PARAGRAPH}\n\n# B\n\nX.",
            "exact repeats",
        ),
    ],
)
def test_edits(text, expected, name):
    assert lossless(text) == (expected, [name])


@pytest.mark.parametrize(
    "text",
    [
        "```\nx  =  1   \n\n\n\ny\n```",
        "  indented once\n    and deeper",
        'He said "a  b" and `c  d` and “e  f”.',
        "name      age\nAnn       3\nBartholo  4",
        "| a  | b  |\n|----|----|\n| 1  | 2  |",
        "<data><a>x  y</a></data>",
        '{"a": not json,  "b"}',
        f"Q: {PARAGRAPH}\nA: x\n\nQ: {PARAGRAPH}\nA: x",
        "- an item that is long enough to be no coincidence\n- an item that is long enough to be no coincidence",
        f"# Plan A\n\n{PARAGRAPH}\n\n# Plan B\n\n{PARAGRAPH}",
        "Short one.\n\nShort one.",
        "Fill in {x} here, in a paragraph of some length.\n\nFill in {x} here, in a paragraph of some length.",
        "",
        "   \n ",
    ],
)
def test_what_is_left_alone(text):
    assert lossless(text) == (text, [])


def test_a_pattern_of_the_user_is_left_alone():
    assert lossless("one  two", ["one +two"]) == ("one  two", [])


@pytest.mark.parametrize("piece", LONG)
def test_hostile_texts_end(piece):
    """A quadratic step anywhere would take minutes at this size."""
    text = repeated(piece, 20_000)
    assert len(lossless(text)[0]) <= len(text)
