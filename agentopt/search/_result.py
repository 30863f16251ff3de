"""What `tune` gives back, and the same as JSON in the run's row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentopt.evaluation import EvaluationRow
from agentopt.graph import Candidate
from agentopt.optimizers import PastProposal
from agentopt.search._board import Board
from agentopt.search._budget import usage_calls
from agentopt.search._claim import Claim
from agentopt.search._loop import Outcome
from agentopt.search._objectives import trade_offs
from agentopt.search._propose import update_to_dict
from agentopt.search._uncached import input_tokens, timed, tokens, told, usd


@dataclass(frozen=True, slots=True)
class TuneResult:
    """A finished run. `best` is the baseline when nothing beat it.

    `validation` holds the means on which the choice was made: selection estimates, too good by nature. `cost` holds
    the totals of tuning (`usd`, `tokens`, `rollouts`, `proposals`, ...) and the means per run of the program before
    and after (`per_run_before`, `per_run_after`: `usd`, `tokens`, `input_tokens`, `calls`, `latency` in seconds).
    """

    run_id: str
    program: str
    best: Candidate
    baseline: Candidate
    claim: Claim
    validation: dict[str, Any]
    cost: dict[str, Any]
    stop_reason: str
    plan: dict[str, Any] = field(default_factory=dict[str, Any])
    history: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    warnings: list[str] = field(default_factory=list[str])
    trade_offs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Every kept candidate with its validation `score`, `usd`, `prompt_tokens` and `latency` (seconds) per run, and
    whether it is `on_front`: no other one is better in one objective of the run and worse in none."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the run's summary."""
        return {
            "run_id": self.run_id,
            "program": self.program,
            "best": self.best.to_dict(),
            "baseline": self.baseline.to_dict(),
            "claim": self.claim.to_dict(),
            "validation": self.validation,
            "cost": self.cost,
            "stop_reason": self.stop_reason,
            "plan": self.plan,
            "history": self.history,
            "warnings": self.warnings,
            "trade_offs": self.trade_offs,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TuneResult:
        """The inverse of `to_dict`."""
        return cls(
            run_id=data["run_id"],
            program=data["program"],
            best=Candidate.from_dict(data["best"]),
            baseline=Candidate.from_dict(data["baseline"]),
            claim=Claim.from_dict(data["claim"]),
            validation=dict(data["validation"]),
            cost=dict(data["cost"]),
            stop_reason=data["stop_reason"],
            plan=dict(data.get("plan") or {}),
            history=list(data.get("history") or []),
            warnings=list(data.get("warnings") or []),
            trade_offs=list(data.get("trade_offs") or []),
        )


def make_result(
    outcome: Outcome, board: Board, run_id: str, program: str, objectives: Sequence[str] = ("score",)
) -> TuneResult:
    """Gather a finished search's result; `objectives` are what the table of trade-offs compares by."""
    return TuneResult(
        run_id=run_id,
        program=program,
        best=outcome.best,
        baseline=outcome.baseline,
        claim=outcome.claim,
        validation={
            "n": len(board.splits["validation"]),
            "baseline": board.mean(outcome.baseline, "validation"),
            "best": board.mean(outcome.best, "validation"),
            "note": "selection estimate: the choice was made on these rows",
        },
        cost={
            **board.ledger.to_dict(),
            "per_run_before": per_run(_rows(board, outcome.baseline)),
            "per_run_after": per_run(_rows(board, outcome.best)),
        },
        stop_reason=outcome.stop_reason,
        plan=outcome.plan.to_dict(),
        history=[past_to_dict(past) for past in outcome.history],
        warnings=list(outcome.warnings),
        trade_offs=[item.to_dict() for item in trade_offs(board, outcome.kept, objectives)],
    )


def past_to_dict(past: PastProposal) -> dict[str, Any]:
    """JSON form of one entry of the history."""
    return {
        "candidate": past.candidate_hash,
        "parent": past.parent_hash,
        "update": update_to_dict(past.update),
        "screen": past.screen,
        "screen_parent": past.screen_parent,
        "validation": past.validation,
        "accepted": past.accepted,
        "reason": past.reason,
    }


def _rows(board: Board, candidate: Candidate) -> list[EvaluationRow]:
    return board.rows(candidate, "test") or board.rows(candidate, "validation")


def per_run(rows: Sequence[EvaluationRow]) -> dict[str, Any] | None:
    """Means per run of the program, as if no reply had come from the cache; None without rows.

    A cached reply costs nothing now, but it counts here with the tokens and the price it had: what a run of the program
    takes is the same on a cold and on a warm store. Seconds are those of the rows without a cached call.
    """
    counted = told(rows)
    if not counted:
        return None
    n = len(counted)
    costs = [usd(row) for row in counted]
    waited = timed(rows)
    return {
        "n": n,
        "usd": None if any(cost is None for cost in costs) else sum(cost or 0.0 for cost in costs) / n,
        "tokens": sum(map(tokens, counted)) / n,
        "input_tokens": sum(map(input_tokens, counted)) / n,
        "calls": sum(usage_calls(row.usage) for row in counted) / n,
        "latency": sum(row.latency for row in waited) / len(waited),
    }
