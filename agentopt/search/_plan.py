"""The pre-flight plan: what a budget buys, said before it is spent (gepa#375, gepa#46)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from agentopt.errors import UserError
from agentopt.search._budget import Budget, Ledger


@dataclass(frozen=True, slots=True)
class Plan:
    """Rollouts that each part of the run takes. `proposals` is an estimate, None when nothing bounds it."""

    train: int
    validation: int
    test: int
    budget: dict[str, Any]
    baseline: int
    claim: int
    """Kept back for the final test: baseline and best, once each."""
    smallest: int
    """One proposal alone: screen of parent and child, then all of validation."""
    search: int | None
    proposals: int | None
    usd_per_rollout: float | None = None
    tokens_per_rollout: float | None = None
    text: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows per split, screen size and repeats: all that the arithmetic needs."""

    train: int
    validation: int
    test: int
    screen: int
    repeats: int = 1

    @property
    def batch(self) -> int:
        """Rows of a minibatch."""
        return min(self.screen, self.train)

    @property
    def baseline(self) -> int:
        """Rollouts of the baseline run."""
        return self.validation * self.repeats

    @property
    def claim(self) -> int:
        """Rollouts of the final test."""
        return 2 * self.test * self.repeats

    @property
    def smallest(self) -> int:
        """Rollouts of one proposal that goes all the way."""
        return (2 * self.batch + self.validation) * self.repeats

    @property
    def typical(self) -> float:
        """Rollouts of an average proposal: screened, with one in four racing about half of validation."""
        return (self.batch * 1.25 + self.validation / 8) * self.repeats


def default_budget(sizes: Sizes) -> Budget:
    """Without a budget: the baseline, the test, and eight full evaluations (at least 400 rollouts) for the search."""
    search = max(400, 8 * sizes.smallest)
    return Budget(rollouts=sizes.baseline + sizes.claim + search)


def check_before(sizes: Sizes, budget: Budget) -> None:
    """Refuse a rollout budget in which not even one proposal fits, before the baseline is paid for.

    Raises:
        UserError: the budget is too small.
    """
    needed = sizes.baseline + sizes.claim + sizes.smallest
    if budget.rollouts is not None and budget.rollouts < needed:
        raise UserError(
            f"budget: rollouts={budget.rollouts} is too small for one proposal: the baseline takes {sizes.baseline}, "
            f"one proposal {sizes.smallest} and the final test {sizes.claim}; give rollouts={needed} or more, or fewer "
            "validation and test rows"
        )


def make_plan(sizes: Sizes, ledger: Ledger) -> Plan:
    """The plan from what the baseline cost (or, before it, from the row counts alone)."""
    budget = ledger.budget
    spent = ledger.rollouts
    left = ledger.left()
    search = left if spent or left is None else max(0, left - sizes.baseline)
    proposals = None if search is None else int(search / sizes.typical)
    if budget.proposals is not None:
        proposals = budget.proposals if proposals is None else min(proposals, budget.proposals)
    usd = ledger.rollout_usd if spent else None
    tokens = ledger.rollout_tokens if spent else None
    if proposals is None:
        bounded = (
            f"within {budget.minutes:g} minutes" if budget.minutes is not None else "until nothing improves any more"
        )
        text = f"No bound on rollouts: the search goes on {bounded}."
    else:
        text = f"This budget ({budget}) buys about {proposals} proposals"
        text += "." if search is None else f": {search} rollouts for the search, {sizes.claim} kept for the final test."
    if usd:
        text += f" One rollout costs about {usd:.5f} USD."
    return Plan(
        train=sizes.train,
        validation=sizes.validation,
        test=sizes.test,
        budget=budget.to_dict(),
        baseline=sizes.baseline,
        claim=sizes.claim,
        smallest=sizes.smallest,
        search=search,
        proposals=proposals,
        usd_per_rollout=usd,
        tokens_per_rollout=tokens,
        text=text,
    )


def check_after(plan: Plan, ledger: Ledger) -> list[str]:
    """Check the plan against the measured cost of a rollout; returns warnings.

    Raises:
        UserError: a USD budget that cannot be enforced, or a budget in which not even one proposal fits.
    """
    budget = ledger.budget
    if budget.usd is not None and ledger.calls == 0 and ledger.tokens == 0 and ledger.usd == 0:
        raise UserError(
            f"budget: usd={budget.usd:g} cannot be enforced, because the baseline run showed no language-model usage; "
            "report it with ao.report_usage(tokens=..., usd=...), leave capture on, or give --budget rollouts=N instead"
        )
    if budget.usd is not None and ledger.usd == 0 and ledger.unpriced:
        raise UserError(
            f"budget: usd={budget.usd:g} cannot be enforced, because no price is known for the model the program "
            "called; configure its price, or give --budget tokens=N or rollouts=N instead"
        )
    if budget.tokens is not None and ledger.calls == 0 and ledger.tokens == 0:
        raise UserError(
            f"budget: tokens={budget.tokens} cannot be enforced, because the baseline run showed no language-model "
            "usage; report it with ao.report_usage(tokens=...), leave capture on, or give --budget rollouts=N instead"
        )
    if plan.search is not None and plan.search < plan.smallest:
        raise UserError(
            f"budget: {budget} does not cover one proposal after the baseline: {plan.search} rollouts are left for the "
            f"search and one proposal takes {plan.smallest}; the final test keeps {plan.claim} back"
        )
    warnings: list[str] = []
    if plan.search is not None and plan.search < 3 * plan.smallest:
        warnings.append(
            f"This budget covers fewer than three fully evaluated proposals ({plan.search} rollouts left, "
            f"{plan.smallest} each): a result of no improvement would say little."
        )
    if budget.usd is not None and ledger.unpriced:
        warnings.append("Some calls have no known price; the USD budget does not see them.")
    return warnings
