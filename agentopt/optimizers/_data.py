"""What the training data says by itself: input fields, answer form, labels, and the words that go with each label.

The unit is one dataset. No language model is used; everything is counted. Only the dataset that is given is looked at,
and callers give the training set alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from agentopt.evaluation import Dataset

AnswerForm = Literal["label", "number", "json", "text", "none"]

MAX_LABELS = 30
_WORD = re.compile(r"[^\W\d_][\w'-]+")
_NUMBER = re.compile(r"^[-+]?\$?\d[\d,]*(\.\d+)?%?$")


@dataclass(frozen=True, slots=True)
class DataDescription:
    """Counts of one dataset. `labels` and `fields` are empty when the answers are not labels or not JSON objects."""

    size: int
    inputs: tuple[str, ...]
    """Input field names, in order of first use."""
    answer: AnswerForm
    labels: tuple[str, ...] = ()
    """Most frequent first, equal counts in alphabetical order."""
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Of JSON-object answers: key → its labels (empty when the key's values are not labels)."""
    median_words: int = 0
    """Of all input text of one example."""

    @property
    def majority(self) -> float:
        """Share of the most frequent label; 0.0 without labels."""
        return max(self.counts.values()) / self.size if self.counts and self.size else 0.0

    def text(self) -> str:
        """The description as a few plain lines for a meta-prompt."""
        lines = [f"{self.size} examples with the input {_list(self.inputs)} (about {self.median_words} words each)."]
        match self.answer:
            case "label":
                counted = ", ".join(f"{label} ({self.counts[label]})" for label in self.labels)
                lines.append(f"The expected answer is one of {len(self.labels)} labels: {counted}.")
            case "number":
                lines.append("The expected answer is a number.")
            case "json":
                lines.append(f"The expected answer is a JSON object with the keys {_list(tuple(self.fields))}.")
                lines.extend(f"  {key}: one of {', '.join(labels)}" for key, labels in self.fields.items() if labels)
            case "text":
                lines.append("The expected answer is free text.")
            case "none":
                lines.append("No expected answers are given.")
        return "\n".join(lines)


def describe(data: Dataset) -> DataDescription:
    """Count `data` (every example once)."""
    inputs: dict[str, None] = {}
    words: list[int] = []
    answers: list[Any] = []
    for example in data:
        inputs.update(dict.fromkeys(example.inputs))
        words.append(len(input_text(example.inputs).split()))
        if example.expected is not None:
            answers.append(example.expected)
    median = sorted(words)[len(words) // 2] if words else 0
    base = DataDescription(len(words), tuple(inputs), "none", median_words=median)
    if not answers:
        return base
    return _with_answers(base, answers)


def _with_answers(base: DataDescription, answers: Sequence[Any]) -> DataDescription:
    size, inputs, median = base.size, base.inputs, base.median_words
    if all(isinstance(answer, Mapping) for answer in answers):
        keys = dict.fromkeys(str(key) for answer in answers for key in cast("Mapping[str, Any]", answer))
        fields = {key: _labels([cast("Mapping[str, Any]", answer).get(key) for answer in answers])[0] for key in keys}
        return DataDescription(size, inputs, "json", fields=fields, median_words=median)
    labels, counts = _labels(answers)
    if labels:
        return DataDescription(size, inputs, "label", labels, counts, median_words=median)
    numeric = all(_is_number(answer) for answer in answers)
    return DataDescription(size, inputs, "number" if numeric else "text", median_words=median)


def _labels(answers: Sequence[Any]) -> tuple[tuple[str, ...], dict[str, int]]:
    """The label set when the answers repeat like labels do, else nothing."""
    if not all(isinstance(answer, (str, bool)) for answer in answers if answer is not None):
        return (), {}
    counts = Counter(label_text(answer) for answer in answers if answer is not None)
    few = len(counts) <= MAX_LABELS and len(counts) * 2 <= len(answers)
    short = all(0 < len(label) <= 60 and "\n" not in label for label in counts)
    numeric = len(counts) > 10 and all(_is_number(label) for label in counts)
    if len(counts) < 2 or not few or not short or numeric:
        return (), {}
    ordered = tuple(sorted(counts, key=lambda label: (-counts[label], label)))
    return ordered, {label: counts[label] for label in ordered}


def label_text(answer: Any) -> str:
    """An expected answer as the text a program would return for it."""
    return str(answer).strip()


def _is_number(answer: Any) -> bool:
    if isinstance(answer, bool):
        return False
    return isinstance(answer, (int, float)) or (isinstance(answer, str) and bool(_NUMBER.match(answer.strip())))


def input_text(inputs: Mapping[str, Any]) -> str:
    """All text among an example's inputs, in field order."""
    return "\n".join(value for value in inputs.values() if isinstance(value, str))


def label_of(expected: Any, labels: Iterable[str]) -> str | None:
    """Which of `labels` is expected: the answer itself, or the one among an object's values; None when unclear."""
    known = set(labels)
    if isinstance(expected, Mapping):
        found = {label_text(value) for value in cast("Mapping[str, Any]", expected).values()} & known
        return found.pop() if len(found) == 1 else None
    text = label_text(expected)
    return text if text in known else None


def cue_words(data: Dataset, labels: Sequence[str], per_label: int = 4) -> dict[str, tuple[str, ...]]:
    """For each label the words that speak for it: smoothed log odds over the examples that hold the word, at least 3.

    Single words only, so that no phrase of a training row can pass into a prompt. A label without such words is left
    out. Words equal to a label are skipped.
    """
    present: dict[str, Counter[str]] = {label: Counter() for label in labels}
    totals: Counter[str] = Counter()
    for example in data:
        label = label_of(example.expected, labels)
        if label is None:
            continue
        totals[label] += 1
        present[label].update({word.casefold() for word in _WORD.findall(input_text(example.inputs))})
    taken = {label.casefold() for label in labels}
    everything = sum(present.values(), Counter[str]())
    size = sum(totals.values())
    result: dict[str, tuple[str, ...]] = {}
    for label in labels:
        inside, outside = totals[label], size - totals[label]
        scored: list[tuple[float, str]] = []
        for word, count in present[label].items():
            if count < 3 or word in taken:
                continue
            others = everything[word] - count
            odds = math.log((count + 0.5) / (inside + 1.0)) - math.log((others + 0.5) / (outside + 1.0))
            if odds > 0.7:
                scored.append((-odds * math.sqrt(count), word))
        if scored:
            result[label] = tuple(word for _, word in sorted(scored)[:per_label])
    return result


def _list(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) if names else "(none)"
