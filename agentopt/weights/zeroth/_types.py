"""What the parts of zeroth-order tuning hand to each other: a probe, a variant of the weights, the result of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from agentopt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Mask = Literal["none", "small", "random", "large", "block"]
MaskUpdate = Literal["fixed", "dynamic", "stored"]
Kind = Literal["rademacher", "normal", "lowrank"]
Normalize = Literal["none", "std"]


@dataclass(frozen=True, slots=True)
class Probe:
    """How the loss around the weights is felt out.

    Attributes:
        kind: `"rademacher"` draws a sign per weight, `"normal"` a standard normal, `"lowrank"` the product of two
            normal factors of `rank` columns per matrix (LOZO, arXiv 2410.07698; EGGROLL, arXiv 2511.16652).
        sides: 2 measures at plus and minus `eps` (MeZO); 1 measures at plus `eps` and once at the weights themselves.
        population: independent directions per step.
        per_example: every example of the batch gets a direction of its own: one drawn for all, its signs flipped by
            rows and columns per example (flipout; GRZO, arXiv 2606.02857). Needs a loss per example.
        normalize: `"std"` divides the step by the standard deviation of the measured losses (FZOO), so that one
            learning rate serves many tasks.
        rank: columns of a low-rank direction.
        lazy: steps for which the right factor of a low-rank direction is kept.
    """

    kind: Kind = "rademacher"
    sides: Literal[1, 2] = 2
    population: int = 1
    per_example: bool = False
    normalize: Normalize = "none"
    rank: int = 1
    lazy: int = 1

    def __post_init__(self) -> None:
        for name in ("population", "rank", "lazy"):
            if getattr(self, name) < 1:
                raise UserError(f"probe: {name} is {getattr(self, name)!r}, expected a whole number of at least 1.")
        for name, known in (("kind", ("rademacher", "normal", "lowrank")), ("normalize", ("none", "std"))):
            if getattr(self, name) not in known:
                raise UserError(f"probe: {name} is {getattr(self, name)!r}, expected one of {', '.join(known)}.")
        if self.sides not in (1, 2):
            raise UserError(f"probe: sides is {self.sides!r}, expected 1 or 2.")
        if self.per_example and self.kind == "lowrank":
            raise UserError(
                "probe: per_example flips the signs of a full direction; use kind='rademacher' or 'normal'."
            )


@dataclass(frozen=True, slots=True)
class Shift:
    """One term of a variant: `scale` times the direction that `seed` stands for."""

    seed: int
    scale: float
    right_seed: int = 0
    """Seed of the right factor of a low-rank direction, which lives for `Probe.lazy` steps."""


Variant = tuple[Shift, ...]
"""Weights to measure at: the weights themselves plus the sum of these shifts. `()` is the weights themselves."""


@runtime_checkable
class Objective(Protocol):
    """A loss that can measure several variants of the weights in one forward pass.

    Any callable `(model) -> float | Tensor` is a loss as well: one variant is then measured after the other.
    """

    def __call__(self, model: Any) -> float | Tensor:
        """The loss of the batch (a number), or of every example (float tensor of shape (examples,))."""
        ...

    def losses(self, model: Any, copies: int) -> Tensor:
        """Losses of shape (copies, examples): the batch repeated `copies` times along its first axis, copy by copy.

        Row r of what is given to the model belongs to copy `r // rows per copy`; the model's forward pass perturbs each
        copy in its own way. The batch has to be the first axis inside of the model as well: with a model that puts time
        first, set `copies=1`.
        """
        ...


class Exchange(Protocol):
    """Workers that hold the same weights and tell each other nothing but losses."""

    rank: int
    world: int

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every worker's float64 values, in the order of ranks; the same on every worker."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured and did.

    Attributes:
        step: number of this step, from 0.
        loss: mean of the measured losses of the step (for one-sided probes the loss at the weights themselves).
        losses: mean loss of each variant that was measured.
        scalars: coefficients of the directions (the log's k numbers).
        lr: learning rate of this step.
        forwards: forward passes over a batch that the step cost (a pass that carries n copies counts as n).
        moved: whether the weights changed.
    """

    step: int
    loss: float
    losses: tuple[float, ...]
    scalars: tuple[float, ...]
    lr: float
    forwards: int
    moved: bool
