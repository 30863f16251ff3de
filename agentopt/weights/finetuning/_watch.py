"""Watches the losses of a run: says when they are no numbers, and why they never move."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from agentopt.errors import RunError
from agentopt.weights.finetuning._options import FinetuneOptions

FLAT_LOSS, FLAT_SCORE = 20, 200
"""Steps without any measured difference after which a run ends: scores of few values tie more often than losses."""
STUCK = 200
"""Steps over which the training loss should have fallen at least a little."""


@dataclass
class Watch:
    """The losses so far."""

    options: FinetuneOptions
    lr: float
    eps: float | None
    labels_in_train: int | None
    """Different labels among the training rows; None when rows have no labels."""
    losses: list[float] = field(default_factory=list[float])
    flat: int = 0
    warned: bool = False

    @property
    def limit(self) -> int:
        """Steps without any difference that are too many."""
        return FLAT_LOSS if self.options.objective == "loss" else FLAT_SCORE

    def see(self, loss: float, *, equal: bool, moved: bool, step: int) -> str | None:
        """Take one step's loss; a warning to show, if any.

        Args:
            loss: the step's mean loss.
            equal: whether all measured losses were the same number.
            moved: whether the weights changed.
            step: counted from 1.

        Raises:
            RunError: the loss is no number, or never moves.
        """
        self.check_finite(loss, step)
        self.losses.append(loss)
        self.flat = self.flat + 1 if (equal or not moved) else 0
        if self.flat >= self.limit and self.lr > 0:
            raise RunError(self.why_flat(equal=equal))
        return self._stuck()

    def check_finite(self, loss: float, step: int) -> None:
        """Raise RunError for a loss that is no number."""
        if math.isfinite(loss):
            return
        eps = "" if self.eps is None else f", or another --eps (now {self.eps:g})"
        half = ", or --dtype bfloat16 or float32" if self.options.dtype == "float16" else ""
        raise RunError(
            f"step {step}: the loss is {loss}, so nothing was changed by this step; give a tenth of the rate (--lr "
            f"{self.lr / 10:g}){eps}{half}. The log and the last good weights are kept."
        )

    def nothing_moved(self) -> None:
        """Two validations agree in every bit, so what was done between them is lost.

        Raises:
            RunError: with the likely cause; not at a rate of 0, which asks for it.
        """
        waiting = 0 < self.flat < self.limit and self.options.objective != "loss"  # for the first score that differs
        if self.lr > 0 and not waiting:
            raise RunError(self.why_flat(equal=self.flat > 0))

    def why_flat(self, *, equal: bool) -> str:
        """The likely cause of a loss that never moves."""
        head = f"the loss has not moved in {self.flat} steps" if self.flat else "validation has not moved at all"
        if self.options.objective == "loss" and 0 < self.flat < len(self.losses):
            return (
                f"{head}: the first steps left the model with the same answer to everything; the rate of {self.lr:g} "
                f"is too large, give a tenth (--lr {self.lr / 10:g}), or --lr auto."
            )
        if self.labels_in_train == 1:
            return f"{head}: all training rows have the same label, so there is nothing to learn; add rows of another."
        if not equal:
            return (
                f"{head}: differences are measured but the rate of {self.lr:g} is too small to change any "
                f"{self.options.dtype} weight; give a larger --lr, or --lr auto."
            )
        if self.options.objective != "loss":
            return (
                f"{head}: no answer changed at eps {self.eps or 0:g}, so --objective {self.options.objective} gives no "
                "direction; give a larger --eps, a larger --batch, or --objective loss."
            )
        if self.eps is not None and self.options.dtype != "float32":
            return (
                f"{head}: eps {self.eps:g} is too small to be seen in {self.options.dtype}; give a larger --eps, or "
                "--dtype float32."
            )
        if self.eps is not None:
            return (
                f"{head}: at eps {self.eps:g} every measured loss is the same number; give a larger --eps, or check "
                "that the prompt lets the answer depend on the text (and that --density trains any weight)."
            )
        return f"{head}: the gradient is zero; check the rows and give a larger --lr."

    def _stuck(self) -> str | None:
        """Once: the loss of the last quarter is no lower than that of the first."""
        if self.warned or len(self.losses) != STUCK:
            return None
        quarter = STUCK // 4
        first, last = (sum(part) / quarter for part in (self.losses[:quarter], self.losses[-quarter:]))
        if last < first - 0.01 * abs(first):
            return None
        self.warned = True
        risen = last > first + 0.05 * abs(first)
        advice = f"a lower --lr (now {self.lr:g})" if risen else f"--lr auto or a larger --lr (now {self.lr:g})"
        return (
            f"the training loss {'rose' if risen else 'did not fall'} in {STUCK} steps ({first:.3f} → {last:.3f}); try "
            f"{advice}."
        )


def smoothed(losses: list[float], window: int = 20) -> float:
    """The mean of the last losses, as it is shown."""
    recent = losses[-window:]
    return sum(recent) / len(recent) if recent else math.nan
