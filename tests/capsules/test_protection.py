"""Promise 2: keep spans survive byte for byte and in order, intact spans are never altered in a unit that stays."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules.counting._tokens import TokenBudget
from agentopt.capsules.extraction._extract import extract
from agentopt.capsules.units._lossless import lossless
from agentopt.capsules.units._spans import find_intact, find_keep, uncuttable
from agentopt.capsules.units._units import parse
from tests.capsules.prompts import MAKERS
from tests.capsules.wild import TEXTS

PATTERNS = (r"\b[A-Z][a-z]+ V\w+", r"internal notes\.", r"\d+\.5 kg")


def survives(document, capsule):
    """The keep spans of a document are in the capsule, in order; what is missing otherwise."""
    at = 0
    for span in document.keep:
        content = span.of(document.text)
        found = capsule.find(content, at)
        if found < 0:
            return content
        at = found + len(content)
    return None


def check(document, found):
    """Everything the promise says about one extraction of one document."""
    (capsule,) = found.texts
    text = document.text
    assert survives(document, capsule) is None
    cuts = [dropped.text for dropped in found.dropped if dropped.reason == "cut"]
    at = 0
    for _, index in found.kept:
        unit = document.units[index]
        content = text[unit.start : unit.end]
        place = capsule.find(content, at)
        if place >= 0 and not capsule[at:place].strip():
            at = place + len(content)
            continue
        # A unit that was cut: prose that may be, and each of its intact spans stays whole or leaves whole.
        assert not uncuttable(content), content
        assert unit.kind in ("sentence", "instruction", "item", "turn", "log", "heading"), unit.kind
        for span in find_intact(content):
            stretch = span.of(content)
            assert stretch in capsule or any(stretch in cut for cut in cuts), stretch
        left = content
        for word in capsule[at:].split():
            if word not in left:
                break
            at = capsule.index(word, at) + len(word)
            left = left[left.index(word) + len(word) :]
    assert not capsule[at:].strip() or cuts


def extracted(document, limit, tokenizer, query=None):
    """The extraction at a limit, at the least one where that is more."""
    try:
        return extract([document], TokenBudget(limit, tokenizer).meter(), query=query)
    except BudgetInfeasible as error:
        assert error.minimum > limit
        return extract([document], TokenBudget(error.minimum, tokenizer).meter(), query=query)


@pytest.mark.parametrize("maker", sorted(MAKERS))
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0.02, 1),
    tokenizer=st.sampled_from(("bytes", "words")),
    query=st.none() | st.just("Where is the violin of Ada Njoku?"),
    keep=st.sets(st.sampled_from(PATTERNS)),
)
def test_made_up_prompts(maker, seed, share, tokenizer, query, keep):
    text = MAKERS[maker](random.Random(seed))
    document = parse(text, sorted(keep))
    whole = TokenBudget(1, tokenizer).meter().total([text])
    check(document, extracted(document, max(1, int(whole * share)), tokenizer, query))


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.floats(0.02, 1), st.sampled_from(("bytes", "words")))
def test_wild_texts(text, share, tokenizer):
    document = parse(text)
    whole = TokenBudget(1, tokenizer).meter().total([text])
    found = extracted(document, max(1, int(whole * share)), tokenizer)
    assert survives(document, found.texts[0]) is None


@pytest.mark.parametrize("maker", sorted(MAKERS))
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), spaces=st.booleans())
def test_lossless_edits_alter_no_span(maker, seed, spaces):
    text = MAKERS[maker](random.Random(seed))
    if spaces:
        text = text.replace("\n\n", "\n \n\n").replace(". ", ".  ")
    edited, _ = lossless(text)
    assert survives(parse(text), edited) is None
    packed = "".join(text.split())
    for span in find_intact(edited):
        assert "".join(span.of(edited).split()) in packed


def test_a_generated_prompt_has_every_kind_of_keep_span():
    kinds = {
        span.kind
        for seed in range(30)
        for maker in MAKERS.values()
        for span in find_keep(maker(random.Random(seed)), ["at"])
    }
    assert kinds == {"placeholder", "schema", "format", "pattern"}


def test_a_demonstration_never_loses_its_answer():
    for seed in range(20):
        text = MAKERS["worked"](random.Random(seed))
        document = parse(text)
        blocks = {}
        for index, unit in enumerate(document.units):
            if unit.kind == "demonstration":
                blocks.setdefault(unit.block, []).append(index)
        whole = len(text.split())
        for share in (0.2, 0.4, 0.7):
            kept = {index for _, index in extracted(document, int(whole * share), "words").kept}
            assert all((units[0] in kept) == (units[-1] in kept) for units in blocks.values())
