"""What a run may spend, and what it has spent so far.

A `Budget` bounds five things: USD, tokens, rollouts (one rollout = one run of the program on one example), proposals
and wall-clock minutes. It covers the whole run: baseline, search and the final test. `Ledger` counts. Rows count
once, the first time a run uses them, whether they were computed just now or come back from the store on a resume, so
that a resumed run makes the same decisions as an uninterrupted one. Replies from the LM cache cost nothing, because
nothing was paid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from agentopt.errors import AgentoptError, UserError
from agentopt.evaluation import EvaluationRow
from agentopt.graph import Usage


class OutOfBudget(AgentoptError):
    """Ends the search quietly: the next block of work no longer fits. Never leaves this room."""


_INTEGERS = ("tokens", "rollouts", "proposals")


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper bounds for one run; None means unbounded. Checked before every block of work.

    Raises:
        UserError: a bound that is not a positive finite number (whole for tokens, rollouts and proposals).
    """

    usd: float | None = None
    tokens: int | None = None
    rollouts: int | None = None
    proposals: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        for bound in fields(self):
            value: object = getattr(self, bound.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UserError(f"budget: {bound.name} must be a positive number; found {value!r}")
            if bound.name in _INTEGERS and not float(value).is_integer():
                raise UserError(f"budget: {bound.name} must be a whole number; found {value!r}")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `"rollouts=600,usd=2"`; underscores in numbers are fine.

        Raises:
            UserError: an unknown name, a name given twice, or a value that is no number.
        """
        names = [bound.name for bound in fields(cls)]
        found: dict[str, float] = {}
        for part in text.split(","):
            if not part.strip():
                continue
            name, equals, raw = (piece.strip() for piece in part.partition("="))
            if not equals or name not in names:
                raise UserError(
                    f"budget: cannot read {part.strip()!r}; expected NAME=NUMBER with NAME one of {', '.join(names)}, "
                    "for example --budget rollouts=600,usd=2"
                )
            if name in found:
                raise UserError(f"budget: {name} is given twice in {text!r}")
            try:
                found[name] = float(raw)
            except ValueError:
                raise UserError(f"budget: {name} must be a number; found {raw!r}") from None
        return cls.from_dict(found)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Budget:
        """The inverse of `to_dict`; also takes a parsed TOML table."""
        names = [bound.name for bound in fields(cls)]
        for name in data:
            if name not in names:
                raise UserError(f"budget: unknown bound {name!r}; expected one of {', '.join(names)}")
        values = dict(data)
        for name in _INTEGERS:
            value = values.get(name)
            if isinstance(value, float) and value.is_integer():
                values[name] = int(value)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Only the bounds that are set."""
        return {bound.name: value for bound in fields(self) if (value := getattr(self, bound.name)) is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.to_dict().items()) or "unbounded"


def usage_tokens(usage: Usage | None) -> int:
    """Input plus output tokens of the calls that were really made."""
    return 0 if usage is None else usage.input_tokens + usage.output_tokens


def usage_calls(usage: Usage) -> int:
    """Calls of a model, whether it answered or the cache did: the same figure on a cold and on a warm store."""
    return usage.calls + usage.cached_calls


@dataclass(slots=True)
class Ledger:
    """Running totals of one run. `reserved` rollouts are kept back for the final test."""

    budget: Budget
    reserved: int = 0
    rollouts: int = 0
    proposals: int = 0
    usd: float = 0.0
    tokens: int = 0
    calls: int = 0
    unpriced: int = 0
    optimizer_usd: float = 0.0
    optimizer_tokens: int = 0
    optimizer_calls: int = 0
    rollout_usd: float = 0.0
    """USD of one rollout, the highest mean seen in a finished block of work; prices the reserve and the next block."""
    rollout_tokens: float = 0.0
    clock: Callable[[], float] = time.monotonic
    started: float = 0.0
    _seen: set[tuple[str, str, str, int, int]] = field(default_factory=set[tuple[str, str, str, int, int]])

    def __post_init__(self) -> None:
        self.started = self.clock()

    def charge_rows(self, rows: Iterable[EvaluationRow]) -> None:
        """Count every row that this run has not used before."""
        fresh, usd, tokens = 0, 0.0, 0
        for row in rows:
            key = (row.candidate_hash, row.dataset_id, row.example_id, row.repeat, row.seed)
            if key in self._seen:
                continue
            self._seen.add(key)
            fresh += 1
            used = usage_tokens(row.usage)
            usd += row.cost or 0.0
            tokens += used
            self.calls += usage_calls(row.usage)
            self.unpriced += int(row.cost is None and used > 0)
        if fresh:
            self.rollouts += fresh
            self.usd += usd
            self.tokens += tokens
            if fresh >= 8:  # a mean over fewer rows is too rough to plan with
                self.rollout_usd = max(self.rollout_usd, usd / fresh)
                self.rollout_tokens = max(self.rollout_tokens, tokens / fresh)

    def charge_extra(self, usd: float, tokens: int) -> None:
        """Count spend that no new row shows; negative differences (rows read back from the store) are nothing."""
        if usd > 1e-12:
            self.usd += usd
        if tokens > 0:
            self.tokens += tokens

    def charge_optimizer(self, usd: float | None, tokens: int, calls: int = 0) -> None:
        """Count what an optimizer's own LM calls took."""
        self.usd += usd or 0.0
        self.tokens += tokens
        self.calls += calls
        self.optimizer_usd += usd or 0.0
        self.optimizer_tokens += tokens
        self.optimizer_calls += calls

    def left(self) -> int | None:
        """Rollouts that still fit after the reserve, by whichever bound is tightest; None when none bounds them."""
        bounds: list[float] = []
        if self.budget.rollouts is not None:
            bounds.append(self.budget.rollouts - self.rollouts - self.reserved)
        if self.budget.usd is not None and self.rollout_usd > 0:
            bounds.append((self.budget.usd - self.usd) / self.rollout_usd - self.reserved)
        if self.budget.tokens is not None and self.rollout_tokens > 0:
            bounds.append((self.budget.tokens - self.tokens) / self.rollout_tokens - self.reserved)
        return None if not bounds else max(0, math.floor(min(bounds) + 1e-9))

    def exhausted(self, upcoming: int = 0) -> str | None:
        """Why `upcoming` more rollouts may not start, or None when they may."""
        left = self.left()
        if left is not None and (upcoming > left or left == 0):
            return f"budget: {self.tightest()} used up"
        if self.budget.usd is not None and self.usd >= self.budget.usd:
            return "budget: usd used up"
        if self.budget.tokens is not None and self.tokens >= self.budget.tokens:
            return "budget: tokens used up"
        if self.budget.minutes is not None and self.clock() - self.started >= self.budget.minutes * 60:
            return "budget: minutes used up"
        return None

    def out_of_proposals(self) -> bool:
        """Whether the bound on proposals is reached."""
        return self.budget.proposals is not None and self.proposals >= self.budget.proposals

    def tightest(self) -> str:
        """The name of the bound that allows the fewest further rollouts."""
        best, name = math.inf, "rollouts"
        for bound, per, spent in (
            ("rollouts", 1.0, float(self.rollouts)),
            ("usd", self.rollout_usd, self.usd),
            ("tokens", self.rollout_tokens, float(self.tokens)),
        ):
            limit = getattr(self.budget, bound)
            if limit is not None and per > 0 and (limit - spent) / per < best:
                best, name = (limit - spent) / per, bound
        return name

    def over(self, usd: float, tokens: int) -> str | None:
        """Whether spend that is under way (on top of what is counted) reaches a bound; asked before each paid call."""
        reserve_usd, reserve_tokens = self.reserved * self.rollout_usd, self.reserved * self.rollout_tokens
        if self.budget.usd is not None and self.usd + usd + reserve_usd >= self.budget.usd:
            return "budget: usd used up"
        if self.budget.tokens is not None and self.tokens + tokens + reserve_tokens >= self.budget.tokens:
            return "budget: tokens used up"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Totals as JSON values."""
        return {
            "rollouts": self.rollouts,
            "proposals": self.proposals,
            "usd": self.usd,
            "tokens": self.tokens,
            "calls": self.calls,
            "unpriced_rows": self.unpriced,
            "optimizer_usd": self.optimizer_usd,
            "optimizer_tokens": self.optimizer_tokens,
            "optimizer_calls": self.optimizer_calls,
        }
