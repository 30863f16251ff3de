"""Spans: what is found as keep, as intact, as not to be cut, and where a cut is allowed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.capsules.units import _graphemes
from agentopt.capsules.units._spans import find_intact, find_keep, uncuttable
from agentopt.errors import UserError
from tests.capsules.wild import LONG, TEXTS, repeated


def kept(text, *patterns):
    return [(span.kind, span.of(text)) for span in find_keep(text, patterns)]


def intact(text):
    return [(span.kind, span.of(text)) for span in find_intact(text)]


@pytest.mark.parametrize(
    "slot",
    [
        "{x}", "{ticket.id}", "{items[0]}", "{price:.2f}", "{x!r}", "{0}", "{{x}}", "{{ user.name | upper }}",
        "{{{raw}}}",
        "{{#if a}}", "{% for a in b %}", "${x}", "${HOME:-none}", "$name", "%s", "%d", "%(x)d", "%5.2f", "[[x]]",
        "[[some slot]]",
        "<your answer>", "<name>", "<yes/no>",
    ],
)  # fmt: skip
def test_placeholders(slot):
    assert kept(f"Dear friend, see {slot} for more.") == [("placeholder", slot)]


@pytest.mark.parametrize(
    "noise",
    [
        r"\frac{a}{b}", r"x^{n} + y_{i}", r"\begin{equation}", "$x + y$", "$$x$$", "$5.00", "costs 100%",
        "50 % discount",
        '{"a": 1}', '{"a": {}}', "{a, b}", "<b>bold</b>", "a < b and b > c", "List<String>", "array[[1]]", "<br>",
        "[1]", "f(){}", "http://a.b/%20c", "<me@x.org>",
    ],
)  # fmt: skip
def test_what_only_looks_like_a_placeholder(noise):
    assert kept(f"We see {noise} here.") == []


@pytest.mark.parametrize(
    "sentence",
    [
        "Respond with JSON.",
        "Return a JSON object with two keys.",
        "Answer with exactly one of the labels.",
        "Please answer only yes or no.",
        "Your answer must be a number.",
        "Then reply in French.",
        "Output format: one word per line.",
        "Format: a list.",
        "Put your final answer in a box.",
        "Write no additional text.",
        "End your response with a line of dashes.",
        "Use at most three sentences.",
        "请以JSON格式回答。",
    ],
)
def test_statements_of_the_output_format(sentence):
    text = f"The film was long. {sentence} The end."
    assert kept(text) == [("format", sentence)]


@pytest.mark.parametrize(
    "sentence",
    [
        "She did not respond with kindness.",
        "He returned the book and gave an answer.",
        "The answer is 4.",
        "They respond to heat.",
        "The output of the mine fell.",
    ],
)
def test_narrative_is_no_statement_of_a_format(sentence):
    assert kept(sentence) == []


def test_the_example_after_a_statement_is_kept():
    fence = '```json\n{"answer": "...", "why": "..."}\n```'
    text = f"Some text.\n\nRespond in this format:\n{fence}\n\nMore text."
    assert kept(text) == [("format", "Respond in this format:"), ("schema", fence)]
    steps = "Thought: what you think\nAction: what you do"
    text = f"Use the following format:\n\n{steps}\n\nBegin."
    assert kept(text) == [("format", "Use the following format:"), ("format", steps)]


def test_schemas_are_kept_and_data_is_not():
    schema = '{"type": "object",\n "properties": {"a": {"type": "string"}}}'
    assert kept(f"Text.\n{schema}\nText.") == [("schema", schema)]
    assert kept('{"type": "dog", "properties": "furry"}') == []


def test_the_cue_at_the_end_of_a_prompt_is_no_statement_but_a_user_pattern_is_kept():
    assert kept("Order AB-12 and order CD-34.", r"[A-Z]{2}-\d\d") == [("pattern", "AB-12"), ("pattern", "CD-34")]
    assert kept("abc", "x*") == []
    assert kept("see {x} now", r"\{x\} now") == [("pattern", "{x} now")]


@pytest.mark.parametrize("pattern", ["(", "*", "(a+)+$", "([a-z]*)*"])
def test_a_bad_pattern(pattern):
    with pytest.raises(UserError, match="keep: found the pattern"):
        find_keep("text", [pattern])


@pytest.mark.parametrize(
    ("kind", "span"),
    [
        ("number", "-5 °C"), ("number", "3.75 hours"), ("number", "1,000,000"), ("number", "10-20 km"), ("number",
        "30%"),
        ("number", "1e-5"), ("number", "2/5"), ("number", "3rd"), ("number", "two hundred people"), ("number",
        "10-minute"),
        ("number", "+12"), ("number", "5 GB"), ("number", "60 km/h"), ("number", "٣"),
        ("money", "$5.50"), ("money", "€3 million"), ("money", "20 dollars"), ("money", "-$4"), ("money", "USD 30"),
        ("date", "2024-05-03"), ("date", "2024-05-03T10:00:00Z"), ("date", "May 3, 2024"), ("date", "3 May 2024"),
        ("date", "3. Mai 2024"), ("date", "12/14/1937"), ("date", "10:30 pm"), ("date", "Q3 2024"),
        ("date", "2024年5月3日"),
        ("name", "Mirja Koskela"), ("name", "Dr. J. K. Rowling"), ("name", "NASA"), ("name", "Bank of England"),
        ("name", "Acme Corp"), ("name", "Windows 11"), ("name", "O'Neill"),
        ("quote", '"as it is"'), ("quote", "“as it is”"), ("quote", "«as it is»"), ("quote", "「引号」"), ("quote",
        "'as it is'"),
        ("code", "`x = 1`"), ("url", "https://a.b/c?d=e#f"), ("url", "bob.smith+x@mail.example.org"), ("url",
        "www.a.org/b"),
        ("path", "/etc/hosts.conf"), ("path", "~/a/b.txt"), ("path", "src/main.py"), ("path", r"C:\Users\me\a.txt"),
        ("identifier", "snake_case_name"), ("identifier", "camelCase"), ("identifier", "a.b.c()"[:5] + "d()"),
        ("identifier", "--dry-run"), ("identifier", "GPT-4o"), ("identifier", "550e8400-e29b-41d4-a716-446655440000"),
        ("identifier", "d41d8cd98f00b204e9800998ecf8427e"), ("identifier", "@handle"), ("identifier", "#123"),
        ("json", '{"a": [1, 2]}'), ("xml", "<b>bold</b>"),
    ],
)  # fmt: skip
def test_intact_spans(kind, span):
    text = f"then see {span}, they say"
    found = intact(text)
    if kind == "identifier" and span.startswith("a.b"):
        assert any(what == kind and content in span for what, content in found)
    else:
        assert (kind, span) in found


def test_the_outer_span_wins_and_fences_are_whole():
    assert intact('they said "5 km on 3 May" then') == [("quote", '"5 km on 3 May"')]
    fence = "```\nx = 5 # not\n```"
    assert intact(f"so\n{fence}\nso") == [("code", fence)]


def test_negations_and_quantifiers_reach_to_the_end_of_the_clause_around_other_spans():
    found = intact("You may not sell it before 3 May 2024 to them, they say.")
    assert found == [("negation", "not sell it before"), ("date", "3 May 2024"), ("negation", "to them")]
    assert ("quantifier", "every user of it") in intact("we ask every user of it, and so on")


@pytest.mark.parametrize(
    "text",
    [
        "Do not go.", "It isn't so.", "Take at most it.", "Go unless it rains.", "All of them.", "Only if so.",
        "Wait until then.",
        "Everything except cake.", "他不去", "Ich gehe nicht.", "Never.", "without sugar", "When it rains, stay.",
    ],
)  # fmt: skip
def test_uncuttable(text):
    assert uncuttable(text)


def test_cuttable():
    assert not uncuttable("The bridge crosses the river in the north of the town.")


@settings(max_examples=120, deadline=None)
@given(TEXTS)
def test_spans_are_sorted_apart_and_inside(text):
    for spans in (find_keep(text, []), find_intact(text)):
        at = 0
        for span in spans:
            assert at <= span.start < span.end <= len(text)
            at = span.end


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=30))
def test_graphemes_without_the_regex_module_are_not_finer_than_marks_and_pairs(text):
    points = [at for at in range(1, len(text)) if _graphemes._between(text, at)]
    assert all(not (text[at - 1] == "\r" and text[at] == "\n") and text[at] != "\u200d" for at in points)


def test_a_long_run_of_flags():
    points = _graphemes.boundaries("🇩🇪" * 5_000)
    assert points == list(range(0, 10_001, 2))


@pytest.mark.parametrize("piece", LONG)
def test_hostile_texts_end(piece):
    """A quadratic step anywhere would take minutes at this size."""
    text = repeated(piece, 20_000)
    for find in (find_keep, find_intact):
        assert all(span.end <= len(text) for span in find(text))
    uncuttable(text)
