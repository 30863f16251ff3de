"""Several objectives: what each is, when one candidate is better than another, and the table of trade-offs.

Every objective is turned so that larger is better; money, prompt tokens and seconds count negative. Values are means
over validation rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentopt.errors import UserError
from agentopt.evaluation import EvaluationRow
from agentopt.graph import Candidate
from agentopt.search._board import Board, Split
from agentopt.search._racing import behind
from agentopt.search._uncached import input_tokens, priced, timed, told, usd

TOLERANCE_ALPHA = 0.2
"""One-sided level at which a cheaper candidate counts as worse in score."""

_Rows = Sequence[EvaluationRow]
_OF_ROW: Mapping[str, tuple[Callable[[_Rows], _Rows], Callable[[EvaluationRow], float]]] = {
    "score": (list, lambda row: row.score),
    "cost": (priced, lambda row: -(usd(row) or 0.0)),
    "tokens": (told, lambda row: -float(input_tokens(row))),
    "latency": (timed, lambda row: -row.latency),
}
"""Objective → the rows that tell it, and its value in one of them."""
OBJECTIVES = tuple(_OF_ROW)


def check_objectives(names: Sequence[str]) -> tuple[str, ...]:
    """The objectives with the score in front.

    Raises:
        UserError: an unknown name, or one given twice.
    """
    for name in names:
        if name not in OBJECTIVES:
            raise UserError(f"options: unknown objective {name!r}; expected one of {', '.join(OBJECTIVES)}")
    if len(set(names)) < len(names):
        raise UserError(f"options: an objective is given twice in {', '.join(names)}")
    return ("score", *(name for name in names if name != "score"))


def means(rows: Sequence[EvaluationRow], names: Sequence[str]) -> dict[str, float]:
    """Mean of each objective over `rows`, larger is better.

    Cached replies count with the tokens and the price they had; they took no time, so that seconds are read from rows
    without one, where there are any.
    """
    found: dict[str, float] = {}
    for name in names:
        telling, value = _OF_ROW[name]
        counted = telling(rows)
        found[name] = sum(map(value, counted)) / len(counted) if counted else 0.0
    return found


def dominates(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether `one` is nowhere worse and somewhere better; both over the same objectives."""
    return all(one[name] >= other[name] for name in one) and any(one[name] > other[name] for name in one)


def front(values: Sequence[Mapping[str, float]]) -> list[bool]:
    """Which of the points no other one dominates."""
    return [not any(dominates(other, point) for other in values) for point in values]


def better(
    board: Board,
    child: Candidate,
    parent: Candidate,
    names: Sequence[str],
    train: Sequence[str] | None = None,
    *,
    validation: Sequence[str] | None = None,
) -> bool:
    """Whether a child is worth keeping: on all validation rows, or on the given training or validation rows.

    With the score alone: a higher mean. With more objectives also: a score that is not shown to be lower, and another
    objective that improved while none of them got worse.
    """
    split: Split = "validation" if train is None else "train"
    ids = validation if train is None else train
    if board.mean(child, split, ids) > board.mean(parent, split, ids):
        return True
    others = [name for name in names if name != "score"]
    if not others or behind(board.paired(parent, child, split, ids), TOLERANCE_ALPHA):
        return False
    wanted = None if ids is None else frozenset(ids)
    values = [
        means([row for row in board.rows(one, split) if wanted is None or row.example_id in wanted], others)
        for one in (child, parent)
    ]
    return dominates(values[0], values[1])


@dataclass(frozen=True, slots=True)
class TradeOff:
    """One candidate with all validation rows. USD, prompt tokens and seconds are per run of the program."""

    candidate: Candidate
    score: float
    usd: float | None
    prompt_tokens: float
    latency: float
    on_front: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the candidate by its hash and values."""
        return {
            "candidate": self.candidate.to_dict(),
            "score": self.score,
            "usd": self.usd,
            "prompt_tokens": self.prompt_tokens,
            "latency": self.latency,
            "on_front": self.on_front,
        }


def trade_offs(board: Board, candidates: Sequence[Candidate], names: Sequence[str]) -> list[TradeOff]:
    """The table of all candidates with every validation row, best score first."""
    complete = [candidate for candidate in candidates if board.complete(candidate, "validation")]
    rows = [board.rows(candidate, "validation") for candidate in complete]
    kept = front([means(each, names) for each in rows])
    found: list[TradeOff] = []
    for candidate, each, on_front in zip(complete, rows, kept, strict=True):
        values = means(each, OBJECTIVES)
        unpriced = any(usd(row) is None for row in told(each))
        found.append(
            TradeOff(
                candidate=candidate,
                score=values["score"],
                usd=None if unpriced else abs(values["cost"]),
                prompt_tokens=abs(values["tokens"]),
                latency=abs(values["latency"]),
                on_front=on_front,
            )
        )
    return sorted(found, key=lambda item: -item.score)
