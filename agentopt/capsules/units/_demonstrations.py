"""Demonstrations and turns: which lines of a prompt are worked examples, and which are what somebody said."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from agentopt.capsules.units._lines import Element
from agentopt.capsules.units._words import words

QUESTIONS = words(
    """q question input problem review text sentence tweet passage query premise utterance ticket message email comment
    statement article headline task example prompt request 问 問 问题 問題 输入"""
)
ANSWERS = words(
    """a answer output label sentiment category class response solution result target translation summary type intent
    completion verdict classification reply expected 答 答案 输出"""
)
SPEAKERS = words(
    """user assistant system human ai bot customer agent support developer tool function client operator model chatbot
    observation"""
)
_NAME = re.compile(r"(?:\*\*|<)?([^:：]{1,44}?)(?:\*\*)?\s?[:：]")
_EXAMPLE = re.compile(r"(?:\*\*)?(?:Example|EXAMPLE|example)(?: ?#?\d+)?\b")
_STEP = re.compile(r"Let['’]?s (?:think|work|solve|break)\b[^\n.:]{0,60}[.:]?", re.IGNORECASE)
_ANSWER_IS = re.compile(r"\b(?:final )?answer(?: is|:)|^#{4} ", re.IGNORECASE | re.MULTILINE)
_INLINE = re.compile(r"\s(?:A|Answer|Output|Label|Sentiment|Category)\s?:\s*(?=\S)|\s[-=]>\s*(?=\S)|→\s*(?=\S)")
_LIMIT = 200


class Demonstration(NamedTuple):
    """Elements `first` up to (not with) `last`; what is asked ends at offset `asked`."""

    first: int
    last: int
    asked: int
    answered: bool
    """False for a question at the end that waits for its answer: the task itself, no demonstration."""


def label_of(text: str, element: Element) -> str:
    """The label that an element begins with, in lower case without number; empty for none."""
    if element.kind != "label":
        return ""
    name = _NAME.match(text, element.start, min(element.end, element.start + 50))
    return name[1].strip("*< ").rstrip("0123456789# ").casefold() if name else ""


def find_demonstrations(text: str, elements: Sequence[Element]) -> list[Demonstration]:
    """The demonstrations, in order, and the open question at the end when there is one."""
    labels = {at: label_of(text, element) for at, element in enumerate(elements) if element.kind == "label"}
    if not labels:
        return []
    questions, answers = _pairs(labels, elements)
    reader = _Reader(text, elements, labels, questions, answers)
    found: list[Demonstration] = []
    free = 0
    for at, label in labels.items():
        if at < free:
            continue
        if label in questions or (not label and _EXAMPLE.match(text, elements[at].start)):
            one = reader.read(at)
            if one is not None:
                found.append(one)
                free = one.last
    return found


def find_turns(text: str, elements: Sequence[Element]) -> set[int]:
    """Elements that begin a turn of a transcript."""
    labels = {at: label_of(text, element) for at, element in enumerate(elements) if element.kind == "label"}
    turns = {
        at for at, label in labels.items() if label in SPEAKERS or text.startswith(("<|", "[INST"), elements[at].start)
    }
    counts = Counter(label for label in labels.values() if label and " " not in label)
    known = QUESTIONS | ANSWERS
    speakers = {label for label, count in counts.items() if count > 1 and label not in known}
    if 2 <= len(speakers) <= 8 and sum(counts[label] for label in speakers) >= 5:
        turns |= {at for at, label in labels.items() if label in speakers}
    return turns if len(turns) > 1 else set()


def _pairs(labels: dict[int, str], elements: Sequence[Element]) -> tuple[set[str], set[str]]:
    """Labels of questions and of answers: the usual ones, and a first and last label that alternate in this text."""
    questions, answers = set(QUESTIONS), set(ANSWERS)
    order = [label for label in labels.values() if label]
    leads = Counter(
        label for at, label in labels.items() if label and (at == 0 or elements[at - 1].kind in ("blank", "heading"))
    )
    for lead, count in leads.items():
        if count < 2 or lead in questions or lead in answers or lead in SPEAKERS:
            continue
        places = [at for at, label in enumerate(order) if label == lead]
        lasts = Counter(order[after - 1] for after in places[1:] if order[after - 1] != lead)
        last, times = lasts.most_common(1)[0] if lasts else ("", 0)
        if last and times >= count - 1:
            questions.add(lead)
            answers.add(last)
    return questions, answers


class _Reader:
    """Follows one demonstration from its first line."""

    def __init__(
        self, text: str, elements: Sequence[Element], labels: dict[int, str], questions: set[str], answers: set[str]
    ) -> None:
        self.text, self.elements, self.labels = text, elements, labels
        self.questions, self.answers = questions, answers

    def read(self, first: int) -> Demonstration | None:
        """The demonstration that begins at element `first`; None when nothing answers."""
        text, elements = self.text, self.elements
        lead = self.labels[first]
        asked = self._asked(first, first)
        last = first + 1
        for at in range(first + 1, min(len(elements), first + _LIMIT)):
            element = elements[at]
            if element.kind in ("heading", "open", "close") or self._next(at, lead, asked >= 0):
                break
            if element.kind == "blank":
                if asked >= 0 and elements[last - 1].end > asked and not self._goes_on(at, lead):
                    break
                continue
            last = at + 1
            if asked < 0:
                asked = self._asked(at, first)
        if asked < 0:
            return None
        end = elements[last - 1].end
        answered = end > asked and bool(text[asked:end].strip())
        if not answered and any(element.kind != "blank" for element in elements[last:]):
            return None
        return Demonstration(first, last, asked, answered)

    def _next(self, at: int, lead: str, asked: bool) -> bool:
        """Whether another demonstration begins at element `at`."""
        label = self.labels.get(at)
        if label is None:
            return False
        if not label or (label == "example" and lead != "example"):
            return bool(_EXAMPLE.match(self.text, self.elements[at].start))
        return label == lead or (asked and label in self.questions and lead in self.questions)

    def _asked(self, at: int, first: int) -> int:
        """Offset where the question ends, when the answer begins in element `at`; -1 otherwise."""
        text, element = self.text, self.elements[at]
        label = self.labels.get(at, "")
        if at != first and label in self.answers:
            colon = max(text.find(":", element.start, element.end), text.find("：", element.start, element.start + 50))
            colon += 3 if text.startswith(":**", colon) else 1
            step = _STEP.match(text, min(colon + 1, element.end), element.end)
            return step.end() if step else colon
        step = _STEP.match(text, element.start, element.end)
        if step and at != first:
            return step.end()
        if at == first:
            inline = _INLINE.search(text, element.start, element.end)
            return len(text[: inline.end()].rstrip()) if inline and element.end - element.start < 600 else -1
        if element.kind == "text" and _ANSWER_IS.search(text, element.start, element.end):
            return element.start
        return -1

    def _goes_on(self, blank: int, lead: str) -> bool:
        """Whether the answer continues after a blank line: a later paragraph of it states the answer."""
        text, elements = self.text, self.elements
        paragraphs = 0
        for at in range(blank + 1, min(len(elements), blank + 40)):
            element = elements[at]
            if element.kind == "blank":
                paragraphs += 1
                if paragraphs > 4:
                    return False
            elif element.kind in ("heading", "open", "close") or self._next(at, lead, True):
                return False
            elif _ANSWER_IS.search(text, element.start, element.end):
                return True
        return False
