"""What the capsulator raises on purpose: only for a budget that cannot be met; never for quality."""

from __future__ import annotations

from agentopt.errors import UserError


class BudgetInfeasible(UserError):
    """No capsule fits: what must be kept is longer than the budget.

    `minimum` is achievable: the same call with a budget of `minimum` tokens gives a capsule.
    """

    def __init__(self, *, minimum: int, limit: int, tokenizer: str, because: str = "") -> None:
        self.minimum = minimum
        self.limit = limit
        self.tokenizer = tokenizer
        self.because = because
        reason = f" ({because})" if because else ""
        super().__init__(
            f"budget: found {limit:,} tokens of {tokenizer}, expected at least {minimum:,}, which is what must be kept"
            f"{reason}; raise the budget or give fewer things to keep."
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (self.minimum, self.limit, self.tokenizer, self.because)


def _again(minimum: int, limit: int, tokenizer: str, because: str) -> BudgetInfeasible:
    return BudgetInfeasible(minimum=minimum, limit=limit, tokenizer=tokenizer, because=because)
