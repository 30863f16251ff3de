"""The one metric of folding and reading: right answers, and whether exactly the facts that matter were recalled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentopt.weights.fold._types import FoldTask, Question

if TYPE_CHECKING:
    from agentopt.weights.fold._answers import Written
    from agentopt.weights.fold._codec import Codec


@dataclass(frozen=True, slots=True)
class Scored:
    """One question of one knowledge base, answered."""

    task: str
    question: int
    """Place among the task's questions."""
    depth: int | None
    expected: str
    text: str
    correct: bool
    recall_exact: bool | None
    """The recalled sentences are the relevant facts, in their order; None in the single-task form."""
    recall_set: bool | None
    """The same in any order."""
    margin: float
    logprob: float


@dataclass(frozen=True, slots=True)
class FoldScores:
    """Answers to the questions of several knowledge bases."""

    rows: tuple[Scored, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def correct(self) -> list[float]:
        """1.0 or 0.0 per row."""
        return [float(row.correct) for row in self.rows]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return _mean(self.correct)

    @property
    def recall_exact(self) -> float | None:
        """Share of questions whose relevant facts were recalled exactly and in order."""
        return self._share([row.recall_exact for row in self.rows])

    @property
    def recall_set(self) -> float | None:
        """The same in any order."""
        return self._share([row.recall_set for row in self.rows])

    def by_depth(self) -> dict[int | None, float]:
        """Accuracy for every depth there is, small depths first."""
        depths = sorted({row.depth for row in self.rows}, key=lambda depth: -1 if depth is None else depth)
        return {depth: _mean([float(row.correct) for row in self.rows if row.depth == depth]) for depth in depths}

    @staticmethod
    def _share(found: Sequence[bool | None]) -> float | None:
        known = [float(one) for one in found if one is not None]
        return _mean(known) if known else None


def judge(task: FoldTask, number: int, written: Written, *, codec: Codec) -> Scored:
    """Compare what was written with what the task expects; white space does not count.

    Recall is judged in the multi-task form for questions that say which facts are relevant.
    """
    question = task.questions[number]
    exact = together = None
    if codec.multi_task and question.relevant:
        expected = codec.expected([task.facts[place] for place in question.relevant])
        exact = written.closed and written.recalled == expected
        together = written.closed and set(written.recalled) == set(expected)
    return Scored(
        task=task.id,
        question=number,
        depth=question.depth,
        expected=question.answer,
        text=written.text,
        correct=_right(question, written, codec),
        recall_exact=exact,
        recall_set=together,
        margin=written.margin,
        logprob=written.logprob,
    )


def _right(question: Question, written: Written, codec: Codec) -> bool:
    if question.choices:
        return written.text == question.answer
    # A free text went through the tokenizer: so does what it is compared with.
    return " ".join(written.text.split()) in {" ".join(question.answer.split()), codec.normal(question.answer)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
