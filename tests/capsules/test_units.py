"""Units: they cover a text, in order, and what belongs together is together."""

import itertools

import pytest
from hypothesis import given, settings

from agentopt.capsules.units._units import closing_tags, parse
from agentopt.errors import UserError
from tests.capsules.wild import LONG, TEXTS, repeated


def kinds(text, **options):
    document = parse(text, **options)
    return [(unit.kind, text[unit.start : unit.end]) for unit in document.units]


def texts(text):
    return [content for _, content in kinds(text)]


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_units_cover_every_character_that_is_not_white_space_in_order(text):
    document = parse(text)
    at = 0
    for unit in document.units:
        assert unit.start >= at and not text[at : unit.start].strip()
        assert unit.end > unit.start
        assert not text[unit.start].isspace() and not text[unit.end - 1].isspace()
        at = unit.end
    assert not text[at:].strip()


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_blocks_ascend_headings_come_first_and_keep_flags_say_what_spans_say(text):
    document = parse(text)
    units = document.units
    assert all(one.block <= two.block for one, two in itertools.pairwise(units))
    for at, unit in enumerate(units):
        assert -1 <= unit.heading < at or unit.heading == -1
        held = any(span.start < unit.end and unit.start < span.end for span in document.keep)
        assert unit.keep == held
    assert parse(text) == document


def test_an_agent_prompt():
    found = kinds(
        "You are a support agent for Acme.\nNever reveal internal notes.\n\n"
        "## Tools\n- search(query: str) -> list[str]: search the base\n\n"
        "# Rules\n1. Always be polite.\n2. Old orders\n   are not returned.\n\n"
        "Respond with one word.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    )
    assert found == [
        ("instruction", "You are a support agent for Acme."),
        ("constraint", "Never reveal internal notes."),
        ("heading", "## Tools"),
        ("tool", "- search(query: str) -> list[str]: search the base"),
        ("heading", "# Rules"),
        ("constraint", "1. Always be polite."),
        ("item", "2. Old orders\n   are not returned."),
        ("schema", "Respond with one word."),
        ("table", "| a | b |\n|---|---|\n| 1 | 2 |"),
    ]


def test_headings_govern_until_the_next_of_their_level():
    text = "# A\n\nOne thing.\n\n## B\n\nTwo things.\n\n# C\n\nThree things.\n\nOptions:\n- x\n- y\n\nAfter it.\n"
    document = parse(text)
    names = [text[unit.start : unit.end] for unit in document.units]
    governed = {
        name: names[unit.heading] for name, unit in zip(names, document.units, strict=True) if unit.heading >= 0
    }
    assert governed == {
        "One thing.": "# A",
        "## B": "# A",
        "Two things.": "## B",
        "Three things.": "# C",
        "Options:": "# C",
        "- x": "Options:",
        "- y": "Options:",
        "After it.": "# C",
    }


@pytest.mark.parametrize(
    "text",
    [
        "```python\nx = 1\n\ny = {\n```",
        "~~~\n```\nnot closed here\n```\n~~~",
        "````\n```\ninner\n```\nstill\n````",
        "```\nnever closed\n\n# no heading\n- no item",
        '{"a": [1, {"b": "}"}],\n\n "c": 2}',
        '<data><row id="1">x</row>\n<row id="2">y</row></data>',
    ],
)
def test_a_block_is_one_unit(text):
    assert texts(f"Before it.\n\n{text}") == ["Before it.", text]


def test_a_schema_and_a_tool_definition_are_kept():
    tool = '{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}'
    schema = '{"type": "object", "properties": {"a": {"type": "string"}}}'
    data = '{"type": "cat", "age": 3}'
    document = parse(f"{tool}\n\n{schema}\n\n{data}\n")
    assert [(unit.kind, unit.keep) for unit in document.units] == [("tool", True), ("schema", True), ("json", False)]


def test_a_wrapper_around_prose_is_no_block_and_its_tags_are_known():
    prose = "A sentence of a passage that goes on for a while. " * 10
    text = f"<context>\n{prose}\n</context>\n\nThe end of it."
    document = parse(text)
    (pair,) = closing_tags(document).items()
    opening, closing = (document.units[at] for at in pair)
    assert text[opening.start : opening.end] == "<context>" and text[closing.start : closing.end] == "</context>"
    assert sum(unit.heading == pair[0] for unit in document.units) == 11


def test_short_demonstrations_are_one_unit_each():
    shots = "Review: fine\nSentiment: good\n\nReview: bad film\nSentiment: bad"
    text = f"Classify the review.\n\n{shots}\n\nReview: {{x}}\nSentiment:"
    document = parse(text)
    assert kinds(text)[:3] == [
        ("instruction", "Classify the review."),
        ("demonstration", "Review: fine\nSentiment: good"),
        ("demonstration", "Review: bad film\nSentiment: bad"),
    ]
    assert "".join(span.of(text) for span in document.keep) == "Review: {x}\nSentiment:"


@pytest.mark.parametrize("cue", ["A: Let's think step by step.", "Let's think step by step"])
def test_a_long_demonstration_is_a_block_from_its_question_to_its_answer(cue):
    work = "\n".join(
        f"Then there are {number} of them, which is {number} more than none at all." for number in range(9)
    )
    shot = f"Question: How many are there?\n{cue}\n{work}\nThe answer is 8."
    text = f"{shot}\n\n{shot}"
    document = parse(text)
    assert {unit.kind for unit in document.units} == {"demonstration"}
    for block in (0, 1):
        units = [text[unit.start : unit.end] for unit in document.units if unit.block == block]
        assert units[0] == f"Question: How many are there?\n{cue}" and units[-1] == "The answer is 8."
        assert len(units) == 11


def test_demonstrations_of_other_forms():
    shots = "English: one\nFrench: un\n\nEnglish: two\nFrench: deux\n\nEnglish: three\nFrench: trois"
    assert [kind for kind, _ in kinds(shots)] == ["demonstration"] * 3
    assert [kind for kind, _ in kinds("<example>\nQ: a\nA: b\n</example>\n<example>\nQ: c\nA: d\n</example>")] == [
        "demonstration",
        "demonstration",
    ]
    numbered = "Example 1:\nInput: a\nOutput: b\n\nExample 2:\nInput: c\nOutput: d"
    assert kinds(numbered) == [
        ("demonstration", "Example 1:\nInput: a\nOutput: b"),
        ("demonstration", "Example 2:\nInput: c\nOutput: d"),
    ]


def test_questions_without_answers_are_no_demonstrations():
    assert "demonstration" not in [kind for kind, _ in kinds("Question: one?\n\nQuestion: two?\n\nSome text.")]


def test_turns_and_log_lines():
    chat = "User: hello there\nAssistant: hi\nmore of it\nUser: bye"
    assert kinds(chat) == [("turn", "User: hello there"), ("turn", "Assistant: hi\nmore of it"), ("turn", "User: bye")]
    log = "2024-01-02 10:00:00 start\n  at main\n2024-01-02 10:00:01 ERROR stop"
    assert kinds(log) == [
        ("log", "2024-01-02 10:00:00 start\n  at main"),
        ("log", "2024-01-02 10:00:01 ERROR stop"),
    ]


@pytest.mark.parametrize(
    "sentences",
    [
        ["Dr. J. K. Smith of the U.S. army paid 3.50 dollars.", "He left."],
        ["See https://a.b/c.d?e=f. for it, e.g. there.", "Or not... really.", "Yes!"],
        ['"Is it? Yes it is." he said.', "Nobody heard."],
        ["Use `a. B` and {x. Y} here.", "Then stop."],
        ["Wait...", "What?!", "No."],
        ["Wir zahlen keine Rechnung vor dem 3. Mai 2024.", "Das 4. Quartal war gut.", "Es waren 12.", "Dann ging er."],
        ["the film is bad .", "the end is good ."],
        ["मैं घर गया।", "वह आया।"],
        ["ما هذا؟", "هذا كتاب."],
    ],
)
def test_sentences(sentences):
    assert texts(" ".join(sentences)) == sentences


def test_sentences_without_spaces():
    assert texts("他来了。她说：「好。走吧。」然后呢？没有！") == [
        "他来了。",
        "她说：「好。走吧。」",
        "然后呢？",
        "没有！",
    ]


def test_wrapped_prose_is_joined_and_lines_without_it_are_not():
    wrapped = "This sentence goes over\nthe end of a line and\nthen stops. Another one\nfollows it here."
    assert texts(wrapped) == [
        "This sentence goes over\nthe end of a line and\nthen stops.",
        "Another one\nfollows it here.",
    ]
    assert texts("Two and two is four\nFour and four is eight") == ["Two and two is four", "Four and four is eight"]


@pytest.mark.parametrize(
    "sentence",
    [
        f"{'Slots, schemas, formats, ' * 6}and patterns are\nnever dropped.",
        "The invoice for the harbour must never be paid to\nAnna before the third of May.",
        "A refund is granted by the desk in the hall unless\n3 days have gone by.",
    ],
)
def test_a_sentence_goes_on_over_a_wrapped_line_however_wide_it_is_and_whatever_comes_next(sentence):
    assert texts(f"All is well. {sentence} It rains.")[1] == sentence


def test_text_without_a_boundary_is_limited_and_graphemes_stay_whole():
    family = "👩‍👩‍👧‍👦"
    pieces = texts(family * 1000)
    assert "".join(pieces) == family * 1000
    assert all(len(piece) <= 2000 and len(piece) % len(family) == 0 for piece in pieces)
    assert all(len(piece) <= 2000 for piece in texts("word " * 3000))
    assert all(piece.endswith("word") for piece in texts("word " * 3000))


def test_role_and_whole_are_carried():
    document = parse("Hello.", role="user", whole=True)
    assert document.role == "user" and document.whole and document.text == "Hello."


@pytest.mark.parametrize("pattern", ["(", "[z-a]", "(a+)+", r"(?:\w*)*$"])
def test_a_bad_pattern_is_one_sentence(pattern):
    with pytest.raises(UserError, match="keep: found the pattern"):
        parse("text", [pattern])


@pytest.mark.parametrize("piece", LONG)
def test_hostile_texts_end(piece):
    """A quadratic step anywhere would take minutes at this size."""
    text = repeated(piece, 30_000)
    at = 0
    for unit in parse(text).units:
        assert not text[at : unit.start].strip()
        at = unit.end
    assert not text[at:].strip()


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\x00", "\ud800", "[" * 100_000, "[" * 100_000 + "]" * 100_000])
def test_odd_texts(text):
    assert sum(unit.end - unit.start for unit in parse(text).units) == len(text.strip())


def test_ten_megabytes_on_one_line():
    size = 10_000_000
    assert sum(unit.end - unit.start for unit in parse("x" * size).units) == size


def test_a_list_of_tools_without_marks():
    found = kinds("Answer it. You have access to the following tools:\n\nSearch: finds things.\nSum: adds.\n\nBegin!")
    assert found == [
        ("instruction", "Answer it."),
        ("heading", "You have access to the following tools:"),
        ("tool", "Search: finds things."),
        ("tool", "Sum: adds."),
        ("sentence", "Begin!"),
    ]


def test_marks_of_a_chat_template_begin_turns():
    found = kinds("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>")
    assert [kind for kind, _ in found] == ["turn", "turn"]
