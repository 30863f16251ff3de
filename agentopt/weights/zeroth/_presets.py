"""The published methods as settings of one class: `ZerothOrder.preset("fzoo", model)` is `ZerothOrder` with these.

Rates and eps: those of MeZO are the paper's (read in its source; full weights 1e-6, LoRA 1e-4, prefix 1e-2, found on
models of 1.3B to 66B weights with normal probes, batch 16, 20,000 steps). All others are our own choice, derived from
them, and marked `tuned=False`; a small model or a short run usually wants a larger rate. `--lr auto` measures instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from agentopt.errors import UserError
from agentopt.weights.zeroth._rules import Estimator, estimator, rule
from agentopt.weights.zeroth._types import Mask, MaskUpdate, Probe

Trained = Literal["full", "lora", "prefix"]


def _table(full: float, lora: float, prefix: float) -> Mapping[str, float]:
    return MappingProxyType({"full": full, "lora": lora, "prefix": prefix})


_EPS = _table(1e-3, 1e-2, 1e-1)
_LR = _table(1e-6, 1e-4, 1e-2)
_LR_UNIT = _table(3e-5, 1e-3, 1e-2)
"""For normalised steps, whose rate is the length of the expected step: about MeZO's rates times its usual slopes."""

_PUBLISHED = 13e9
"""Weights of the model that the rates for full weights are for."""

_ONE_BLOCK = 1e-3
"""A share of the blocks that rounds to none: then one block moves per step."""


@dataclass(frozen=True, slots=True)
class Preset:
    """One method.

    Attributes:
        name: how it is asked for.
        summary: one line for a list of methods.
        source: where it was published.
        probe: how it measures.
        method: update rule, or the way to estimate that brings one.
        mask: which weights it trains.
        density: share of the weights that the mask trains; for "block" of the blocks, at least one.
        mask_update: whether the mask is kept from the start or follows the weights.
        lr: recommended rate by what is trained.
        eps: recommended length of a shift by what is trained.
        tuned: whether the rates are the method's own published ones; otherwise they are our choice.
        caution: what its user should know; empty for nothing.
    """

    name: str
    summary: str
    source: str
    probe: Probe = field(default_factory=Probe)
    method: str = "sgd"
    mask: Mask = "none"
    density: float = 1.0
    mask_update: MaskUpdate = "fixed"
    lr: Mapping[str, float] = field(default_factory=lambda: _LR)
    eps: Mapping[str, float] = field(default_factory=lambda: _EPS)
    tuned: bool = False
    caution: str = ""

    @property
    def estimator(self) -> Estimator:
        """How it comes to its coefficients: `"jvp"` is the forward gradient, which needs a differentiable loss."""
        return estimator(self.method)

    @property
    def bytes_per_weight(self) -> int:
        """What it stores per trained weight beside the weights."""
        return rule(self.method).bytes_per_weight

    @property
    def forwards(self) -> int:
        """Forward passes over the batch per step; a forward-mode derivative is counted as two."""
        population = self.probe.population
        measured = population + 1 if self.probe.sides == 1 else 2 * population
        return {"difference": measured, "conservative": measured + 3, "hessian": 3, "jvp": 2 * population}[
            self.estimator
        ]

    def settings(self, trained: Trained = "full", weights: int | None = None) -> dict[str, Any]:
        """The keyword arguments of `ZerothOrder`, with the recommended lr and eps for what is trained.

        Args:
            trained: what is tuned.
            weights: how many weights are; the rates for full weights, published for 13 billion, then grow with the
                root of what the model is smaller (see `rate_for`).
        """
        if trained not in get_args(Trained):
            raise UserError(f"method {self.name}: found {trained!r}, expected one of {', '.join(get_args(Trained))}.")
        return {
            "lr": rate_for(self.lr[trained], weights) if trained == "full" and weights else self.lr[trained],
            "eps": self.eps[trained],
            "mask": self.mask,
            "density": self.density,
            "mask_update": self.mask_update,
            "probe": self.probe,
            "method": self.method,
        }

    def line(self) -> str:
        """The line of `agentopt finetune --list-methods`."""
        extra = f", {self.bytes_per_weight} bytes/weight" if self.bytes_per_weight else ""
        return f"{self.name}: {self.summary} [{self.forwards} forwards/step{extra}; {self.source}]"


def rate_for(rate: float, weights: int) -> float:
    """A rate for 13 billion weights, for a smaller model: times sqrt(13e9 / weights), to two digits.

    Our own rule of thumb. It meets what worked: 1e-6 for OPT-13B and 1e-6 to 1e-5 for RoBERTa-large (arXiv 2305.17333),
    1e-5 to 3e-5 for the embedded model of 135 million and 3e-4 for a model of a hundred thousand (our study).
    """
    return float(f"{rate * max(1.0, _PUBLISHED / weights) ** 0.5:.1e}")


def preset(name: str) -> Preset:
    """The preset of this name; UserError lists the names when there is none."""
    if name not in PRESETS:
        raise UserError(f"method: found {name!r}, expected one of {', '.join(PRESETS)}.")
    return PRESETS[name]


_ALL = (
    Preset(
        "mezo",
        "steps along one random direction, weighed by the difference of the loss on its two sides",
        "arXiv 2305.17333",
        tuned=True,
        caution="probes are signs where the paper draws normals: same expectation, a hundredth of the cost on a CPU",
    ),
    Preset(
        "sparse-mezo",
        "MeZO on the half of every matrix with the smallest weights; allows larger rates",
        "arXiv 2402.15751",
        mask="small",
        density=0.5,
        mask_update="dynamic",
        lr=_table(2e-6, 1e-4, 1e-2),
        caution="for full weights: masks slow adapters down; that small weights are special did not clearly reproduce; "
        "weights that may not outgrow the threshold stall at large rates, with mask_update='stored' they do not",
    ),
    Preset(
        "zo-sgd-sign",
        "every weight moves by exactly the rate, by the sign of the estimate",
        "arXiv 2402.11592",
        method="sign",
        lr=_table(1e-5, 1e-4, 1e-3),
    ),
    Preset(
        "zo-momentum",
        "MeZO with a running mean of the estimates",
        "arXiv 2402.11592",
        method="momentum",
    ),
    Preset(
        "zo-adam",
        "Adam on the estimates, with normal probes",
        "arXiv 2402.11592",
        probe=Probe(kind="normal"),
        method="adam",
        lr=_table(1e-5, 1e-4, 1e-3),
    ),
    Preset(
        "zo-conservative",
        "tries to stay, to step and to step back on the same batch, and takes the best",
        "arXiv 2402.11592",
        method="conservative",
    ),
    Preset(
        "forward-gradient",
        "exact derivative along one random direction by forward-mode differentiation: an upper bound",
        "arXiv 2202.08587",
        method="jvp",
        caution="needs a loss that torch can differentiate; not zeroth order",
    ),
    Preset(
        "block-wise",
        "MeZO on one block of layers per step, in turn",
        "arXiv 2501.19099",
        mask="block",
        density=_ONE_BLOCK,
    ),
    Preset(
        "fzoo",
        "eight one-sided sign probes; the step is divided by the spread of their losses",
        "arXiv 2506.09034",
        probe=Probe(sides=1, population=8, normalize="std"),
        lr=_LR_UNIT,
    ),
    Preset(
        "hizoo",
        "MeZO scaled by a running estimate of every weight's curvature",
        "arXiv 2402.15173",
        probe=Probe(kind="normal"),
        method="hizoo",
        caution="reported to hurt on LoRA adapters",
    ),
    Preset(
        "lozo",
        "MeZO along directions of rank 2, one factor of which is kept for 50 steps",
        "arXiv 2410.07698",
        probe=Probe(kind="lowrank", rank=2, lazy=50),
    ),
    Preset(
        "grzo",
        "every example of the batch gets a direction of its own; steps divided by the spread of their differences",
        "arXiv 2606.02857",
        probe=Probe(per_example=True, normalize="std"),
        lr=_LR_UNIT,
        caution="needs a loss per example",
    ),
    Preset(
        "lowrank-population",
        "evolution strategy: sixteen two-sided directions of rank 1, run as a batch of LoRA adapters",
        "EGGROLL, arXiv 2511.16652",
        probe=Probe(kind="lowrank", population=16, normalize="std"),
        lr=_LR_UNIT,
    ),
)
PRESETS: Mapping[str, Preset] = MappingProxyType({one.name: one for one in _ALL})
"""Every preset by name."""
