"""A folder on tasks: every knowledge base folded, its questions asked and judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agentopt.weights.fold._encoding import Pick, grouped
from agentopt.weights.fold._kit import Kit
from agentopt.weights.fold._scores import FoldScores, Scored, judge
from agentopt.weights.fold._types import FoldTask
from agentopt.weights.load import need

_AT_ONCE = 64
"""Questions of a batch."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found."""

    scores: FoldScores
    recalls: tuple[float, ...]
    """Of every task's fold: the mean over its facts."""
    loss: float
    """The outer loss, without the guard."""

    @property
    def recall(self) -> float:
        """Mean over the tasks."""
        return sum(self.recalls) / len(self.recalls)


def measure(
    kit: Kit,
    tasks: Sequence[FoldTask],
    *,
    questions: int | None = None,
    documents: int = 16,
    max_new: int | None = None,
    tell: Callable[[int], None] | None = None,
) -> Measured:
    """Fold and ask.

    Args:
        kit: what folds.
        tasks: knowledge bases with questions.
        questions: at most so many of each, the first ones; None for all.
        documents: knowledge bases folded at once, at most.
        max_new: most tokens of recalled facts, and of an answer; None for what meta-training saw.
        tell: told of the tasks that are done.
    """
    rows: list[Scored] = []
    recalls: list[float] = []
    loss = count = 0.0
    every = [kit.encoder.facts(task.facts) for task in tasks]
    for places in grouped(every, documents):
        group = [tasks[place] for place in places]
        bases = [every[place] for place in places]
        state = kit.fold(bases, graph=False)
        recalls += [sum(one) / len(one) for one in kit.recalled(state, bases)]
        picks = [_pick(task, questions) for task in group]
        with need("torch").no_grad():
            answer, recall = (float(one) for one in kit.losses(state, kit.encoder.questions(picks)))
        asked = sum(len(pick.questions) for pick in picks)
        loss += asked * (answer + (kit.options.recall_weight * recall if kit.options.multi_task else 0.0))
        count += asked
        pairs = [(number, place) for number, pick in enumerate(picks) for place in pick.questions]
        for at in range(0, len(pairs), _AT_ONCE):
            part = pairs[at : at + _AT_ONCE]
            wanted = [group[number].questions[place] for number, place in part]
            written = kit.write(
                state,
                [number for number, _ in part],
                [kit.encoder.prompt(question.text) for question in wanted],
                [question.choices for question in wanted],
                max_new=max_new,
            )
            rows += [
                judge(group[number], place, one, codec=kit.codec)
                for (number, place), one in zip(part, written, strict=True)
            ]
        if tell is not None:
            tell(places.stop)
    return Measured(FoldScores(tuple(rows)), tuple(recalls), loss / count)


def _pick(task: FoldTask, questions: int | None) -> Pick:
    return Pick(task, tuple(range(len(task.facts))), tuple(range(len(task.questions)))[:questions])
