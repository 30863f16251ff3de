"""What a capsule is worth to a trainer: a reward with a gate for length and spans, and a slope where the gate is shut.

    reward = g * [task * score against gold + agree * match with the original's answers + sem * meaning kept]
             - invented * share of numbers and names that the source does not have
             - longer * max(0, length of the answers over that with the original - 1)

`g` is 1 when the capsule has at most the budget's tokens and every keep span. Otherwise the bracket is replaced by a
fixed floor minus how far the capsule is from valid, so an update still knows the direction, and no reader is called.
A group of capsules of one document gets the same questions and the same reader (common random numbers), which is where
most of the variance of a difference would come from. Meaning is judged by a frozen encoder or by recall of what can be
looked up, never by the hidden state of the model in training, which could shrink the distance by collapsing.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

from agentopt.capsules._types import Document
from agentopt.capsules.counting._tokens import Meter
from agentopt.capsules.rewriting._verify import missing_spans
from agentopt.errors import RunError, UserError
from agentopt.evaluation import seeded

_FACT = re.compile(r"\d+(?:[.,:/-]\d+)*|\b[A-Z][\w’'-]+")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Question:
    """What the reader is asked about a document; `answer` is gold, empty when there is none."""

    text: str
    answer: str = ""


@dataclass(frozen=True)
class Sample:
    """One document to train on."""

    document: Document
    questions: tuple[Question, ...] = ()
    targets: tuple[str, ...] = ()
    """Shorter versions that passed verification; the first stage imitates them. None: the extractive engine's."""

    @cached_property
    def id(self) -> str:
        """Hash of the text and the questions."""
        parts = [self.document.text, *(f"{q.text}\x1f{q.answer}" for q in self.questions)]
        return hashlib.sha256("\x1e".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


@runtime_checkable
class Reader(Protocol):
    """A frozen model that answers questions from a text; a pure function of both."""

    @property
    def name(self) -> str:
        """Tells readers apart."""
        ...

    def answers(self, text: str, questions: Sequence[str]) -> list[str]:
        """One answer per question."""
        ...


@runtime_checkable
class SoftReader(Reader, Protocol):
    """A reader that also tells how likely an answer is to it."""

    def likelihoods(self, text: str, questions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Mean log-probability of each answer's tokens (at most 0)."""
        ...


@dataclass(frozen=True)
class RewardSettings:
    """The weights of the reward.

    Raises:
        UserError: a weight below zero, no question, or an unknown gate.
    """

    task: float = 1.0
    agree: float = 0.0
    sem: float = 0.0
    invented: float = 0.1
    longer: float = 0.0
    questions: int = 8
    """How many questions of a document are asked in one step."""
    gate: Literal["spans", "length"] = "spans"
    """`length` drops the condition on keep spans (an ablation)."""
    soft: bool = False
    """Score an answer by exp(mean log-probability) under the reader instead of by the metric."""

    def __post_init__(self) -> None:
        for name in ("task", "agree", "sem", "invented", "longer"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"reward.{name}: found {value}, expected a weight of at least 0.")
        if self.gate not in ("spans", "length"):
            raise UserError(f"reward.gate: found {self.gate!r}, expected 'spans' or 'length'.")
        if self.questions < 1:
            raise UserError(f"reward.questions: found {self.questions}, expected at least 1.")


FLOOR = -0.25
"""What a capsule that is over the budget or lacks a keep span gets, before the distance is taken off."""


@dataclass(frozen=True)
class Score:
    """A reward and its parts; a part that was not asked for is 0."""

    total: float
    valid: bool
    task: float = 0.0
    agree: float = 0.0
    sem: float = 0.0
    invented: float = 0.0
    longer: float = 0.0
    distance: float = 0.0
    """How far from valid: share of the tokens that are over the budget plus share of keep spans missing."""


Metric = Callable[[str, str], float]
"""(answer, gold) -> score between 0 and 1."""
Semantic = Callable[[Document, str], float]
"""(document, capsule) -> share of the meaning kept, between 0 and 1."""


class Reward:
    """Scores groups of capsules and counts the reader's calls (one per question and text).

    Args:
        readers: Frozen models; one of them is drawn per document and step.
        settings: The weights.
        metric: (answer, gold) -> score between 0 and 1; None for equal words.
        semantic: (document, capsule) -> share of the meaning kept; None for the recall of numbers and names.

    Raises:
        UserError: a weight that needs a reader without one, or `soft` with a reader that gives no likelihoods.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        settings: RewardSettings | None = None,
        *,
        metric: Metric | None = None,
        semantic: Semantic | None = None,
    ) -> None:
        self.readers = tuple(readers)
        self.settings = settings or RewardSettings()
        self.metric = metric or same_answer
        self.semantic = semantic or probe_recall
        self.calls = 0
        self._originals: dict[str, str] = {}
        self.asks = bool(self.settings.task or self.settings.agree or self.settings.longer)
        if self.asks and not self.readers:
            raise UserError("reward: found no reader, expected at least one for a task, agree or longer weight.")
        if self.settings.soft and not all(isinstance(reader, SoftReader) for reader in self.readers):
            raise UserError("reward.soft: found a reader without likelihoods, expected ones that give them.")

    def scores(
        self, sample: Sample, texts: Sequence[str], meter: Meter, *, seed: int, quality: bool = True
    ) -> list[Score]:
        """One score per text of the group; equal arguments give equal scores.

        Args:
            sample: The document they were made from.
            texts: The capsules.
            meter: The budget they were asked to meet.
            seed: Draws reader and questions, the same for the whole group.
            quality: False for the stage that learns length and format only: valid is 1 and nothing is read.

        Raises:
            UserError: the sample has no question of the kind that the weights need.
            RunError: the metric, the reader or the encoder gave a number that is not finite.
        """
        reader, questions = self.drawn(sample, seed) if quality else (None, ())
        return [self._score(sample, text, meter, reader, questions, quality) for text in texts]

    def drawn(self, sample: Sample, seed: int) -> tuple[Reader | None, tuple[Question, ...]]:
        """The reader and the questions of one step: a function of the seed and the sample, never of a capsule."""
        if not self.asks:
            return None, ()
        rng = seeded("reward", seed, sample.id)
        reader = rng.choice(self.readers)
        usable = sample.questions
        if self.settings.task:
            usable = tuple(question for question in usable if question.answer)
        if not usable:
            kind = "questions with an answer" if self.settings.task else "questions"
            raise UserError(f"sample {sample.id}: found no {kind}, expected some to compute the reward.")
        return reader, tuple(rng.sample(usable, min(len(usable), self.settings.questions)))

    def _score(
        self,
        sample: Sample,
        text: str,
        meter: Meter,
        reader: Reader | None,
        questions: tuple[Question, ...],
        quality: bool,
    ) -> Score:
        settings, document = self.settings, sample.document
        distance = distance_from_valid(document, text, meter, spans=settings.gate == "spans")
        made_up = invented(document.text, text)
        if distance > 0:
            total = FLOOR - distance - settings.invented * made_up
            return Score(total=total, valid=False, invented=made_up, distance=distance)
        if not quality:
            return Score(total=1.0 - settings.invented * made_up, valid=True, invented=made_up)
        task, agree, longer = (0.0, 0.0, 0.0) if reader is None else self._read(sample, text, reader, questions)
        sem = self.semantic(document, text) if settings.sem else 0.0
        total = settings.task * task + settings.agree * agree + settings.sem * sem
        total -= settings.invented * made_up + settings.longer * longer
        if not math.isfinite(total):
            raise RunError(
                f"sample {sample.id}: the reward is {total} (task {task}, agree {agree}, sem {sem}): the metric, the "
                "reader or the encoder gave a number that is not finite."
            )
        return Score(total, True, task, agree, sem, made_up, longer)

    def _read(
        self, sample: Sample, text: str, reader: Reader, questions: tuple[Question, ...]
    ) -> tuple[float, float, float]:
        """Score against gold, agreement with the original's answers, and how much longer the answers are."""
        settings = self.settings
        asked = [question.text for question in questions]
        gold = [question.answer for question in questions]
        originals = self.originals(sample, reader, asked) if settings.agree or settings.longer else []
        self.calls += len(asked)
        answers = [] if settings.soft and not settings.longer else reader.answers(text, asked)

        def score(expected: Sequence[str]) -> float:
            if settings.soft and isinstance(reader, SoftReader):
                return _likely(reader, text, asked, expected)
            return _mean([self.metric(answer, one) for answer, one in zip(answers, expected, strict=True)])

        task = score(gold) if settings.task else 0.0
        agree = score(originals) if settings.agree else 0.0
        longer = 0.0
        if settings.longer:
            ratio = sum(map(_words, answers)) / max(1, sum(map(_words, originals)))
            longer = max(0.0, ratio - 1.0)
        return task, agree, longer

    def originals(self, sample: Sample, reader: Reader, questions: Sequence[str]) -> list[str]:
        """The reader's answers from the whole document; each question is asked once."""
        keys = [f"{reader.name}\x1f{sample.id}\x1f{question}" for question in questions]
        missing = [place for place, key in enumerate(keys) if key not in self._originals]
        if missing:
            self.calls += len(missing)
            answers = reader.answers(sample.document.text, [questions[place] for place in missing])
            self._originals |= {keys[place]: answer for place, answer in zip(missing, answers, strict=True)}
        return [self._originals[key] for key in keys]

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: calls so far and the answers from originals; a JSON value."""
        return {"calls": self.calls, "originals": self._originals}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.calls, self._originals = int(state["calls"]), dict(state["originals"])


def distance_from_valid(document: Document, text: str, meter: Meter, *, spans: bool = True) -> float:
    """0 for a text within the limit that is not blank and has every keep span; above 0 by how much is wrong."""
    if not text.strip():
        return 2.0
    over = max(0.0, 1.0 - meter.limit / max(1, meter.total([text])))
    return over + (missing_keep(document, text) if spans else 0.0)


def missing_keep(document: Document, text: str) -> float:
    """Share of the document's keep spans that are not in `text`, byte for byte and in order."""
    missing = len(missing_spans([span.of(document.text) for span in document.keep], text))
    return missing / len(document.keep) if document.keep else 0.0


def invented(source: str, text: str) -> float:
    """Share of the numbers and capitalised words of `text` that `source` does not have."""
    said = set(_FACT.findall(text))
    if not said:
        return 0.0
    numbers, words = set(_FACT.findall(source)), {word.casefold() for word in _WORD.findall(source)}
    new = [one for one in said if one not in numbers and not _known(one, words)]
    return len(new) / len(said)


def _known(fact: str, words: set[str]) -> bool:
    """A capital at the start of a sentence is no new name."""
    return not fact[0].isdigit() and all(word.casefold() in words for word in _WORD.findall(fact))


def probe_recall(document: Document, text: str) -> float:
    """Share of the document's numbers and names that the capsule still has; 1.0 for a document without any."""
    probes = set(_FACT.findall(document.text))
    return len(probes & set(_FACT.findall(text))) / len(probes) if probes else 1.0


def same_answer(answer: str, gold: str) -> float:
    """1.0 when both are the same words, case and punctuation aside."""
    return float(_WORD.findall(answer.casefold()) == _WORD.findall(gold.casefold()))


def _likely(reader: SoftReader, text: str, questions: Sequence[str], answers: Sequence[str]) -> float:
    return _mean([math.exp(min(0.0, value)) for value in reader.likelihoods(text, questions, answers)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _words(text: str) -> int:
    return max(1, len(text.split()))
