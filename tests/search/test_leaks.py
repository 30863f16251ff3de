"""The leak guard: no copied examples in instructions (gepa#261), demonstrations from training rows alone."""

from __future__ import annotations

from agentopt.evaluation import Dataset, Example
from agentopt.graph import Candidate, ParameterSpec
from agentopt.search._leaks import LeakGuard

TRAIN = Dataset(
    "train", [Example(inputs={"text": "The quick brown fox jumps over the lazy dog"}, expected="animal story")]
)
VALIDATION = Dataset(
    "validation", [Example(inputs={"text": "Seven grey cats sat upon the warm windowsill"}, expected="x")]
)
TEST = Dataset(
    "test",
    [
        Example(
            inputs={"q": {"parts": ["please send my parcel to Harbour Street nine"]}},
            expected="one two three four five",
        ),
        Example(inputs={"q": "short one"}, expected="refund of a payment that failed twice"),
        Example(inputs={"q": "another"}, expected="refund of a payment that failed twice"),
    ],
)
SPECS = {
    "p": ParameterSpec(name="p", kind="prompt", default="Look at the text and answer with one word: {text}"),
    "d": ParameterSpec(name="d", kind="demos", default=[]),
}
BASELINE = Candidate({"p": SPECS["p"].default, "d": []})


def guard(original: Candidate = BASELINE) -> LeakGuard:
    return LeakGuard({"train": TRAIN, "validation": VALIDATION, "test": TEST}, original, SPECS)


def refused(text: str) -> str | None:
    return guard().check(Candidate({"p": text, "d": []}))


def test_five_words_of_any_split_are_refused_and_named() -> None:
    assert "train" in (refused("Example: the QUICK, brown fox jumps!") or "")
    assert "validation" in (refused("cats sat upon the warm") or "")
    assert "test" in (refused("remember: my parcel to Harbour Street") or "")
    assert "test" in (refused("say one two three four five") or "")


def test_four_words_and_own_wording_are_fine() -> None:
    assert refused("quick brown fox jumps") is None
    assert refused("Classify the text. Answer with one word: {text}") is None


def test_label_names_and_the_original_prompt_are_no_leak() -> None:
    assert refused("Choose: refund of a payment that failed twice") is None
    quoting = Candidate({"p": "Say: the quick brown fox jumps over the lazy dog. {text}", "d": []})
    assert guard(quoting).check(Candidate({"p": "Do say: the quick brown fox jumps over the lazy dog. {text}"})) is None


def test_words_around_a_variable_do_not_join() -> None:
    assert refused("The quick brown {text} fox jumps") is None


def test_demonstrations_come_from_training_rows_alone() -> None:
    def demo(text: str, source: str) -> str | None:
        return guard().check(Candidate({"p": "x", "d": [{"input": text, "output": "y", "source": source}]}))

    assert demo("The quick brown fox jumps over the lazy dog", TRAIN[0].id) is None
    assert "not a training example" in (demo("anything", VALIDATION[0].id) or "")
    assert "validation example" in (demo("Seven grey cats sat upon the warm windowsill!", "") or "")
    assert demo("a made-up input", "") is None
