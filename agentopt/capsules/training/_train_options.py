"""The settings of a training run, in groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from agentopt.errors import UserError
from agentopt.weights.load import need

Algorithm = Literal["rloo", "grpo", "reinforce", "nano"]
StageKind = Literal["sft", "length", "quality"]


@dataclass(frozen=True)
class Stage:
    """One part of the training.

    `sft` imitates verified capsules; `length` rewards being valid (within the budget, keep spans present) only;
    `quality` uses the whole reward.
    """

    kind: StageKind
    steps: int
    rate: float
    """Learning rate."""
    reader_calls: int | None = None
    """Ends the stage after so many calls of the reader, if that comes before the last step."""

    def __post_init__(self) -> None:
        if self.kind not in ("sft", "length", "quality"):
            raise UserError(f"stage: found kind {self.kind!r}, expected sft, length or quality.")
        if self.steps < 0 or not 0 < self.rate < 1:
            raise UserError(
                f"stage {self.kind}: found {self.steps} steps at rate {self.rate}, expected a rate in (0, 1)."
            )


STAGES = (Stage("sft", 300, 2e-4), Stage("length", 100, 5e-5), Stage("quality", 400, 5e-5))


@dataclass(frozen=True)
class Budgets:
    """What the policy is asked for: a share of the document's tokens, drawn log-uniformly per document and step."""

    low: float = 0.1
    high: float = 0.7
    tokenizers: tuple[str, ...] = ("o200k_base",)
    """One of them is drawn in every step."""

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high <= 1:
            raise UserError(f"budgets: found shares {self.low} to {self.high}, expected 0 < low <= high <= 1.")
        if not self.tokenizers:
            raise UserError("budgets.tokenizers: found none, expected at least one.")


@dataclass(frozen=True)
class Sampling:
    """How much is written in one step."""

    documents: int = 8
    group: int = 8
    """Capsules per document; their rewards are compared with each other."""
    longest: int = 512
    """Tokens of the policy's own tokenizer after which a text is cut."""
    temperature: float = 1.0
    microbatch: int = 16
    """Texts in one backward pass: what memory allows, without changing the result."""

    def __post_init__(self) -> None:
        if self.documents < 1 or self.group < 1 or self.longest < 1 or self.microbatch < 1:
            raise UserError("sampling: documents, group, longest and microbatch are at least 1.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"sampling.temperature: found {self.temperature}, expected a number above 0.")


@dataclass(frozen=True)
class Update:
    """How a batch changes the weights."""

    kl: float = 0.02
    """Weight of the divergence from the policy after the first stage."""
    clip: float | None = None
    """Bound of the probability ratio around 1 (0.2 is usual); None for the plain policy gradient."""
    epochs: int = 1
    """Passes over each batch; more than one needs `clip`."""
    max_norm: float = 1.0
    """The gradient is scaled down to this norm."""

    def __post_init__(self) -> None:
        if self.kl < 0 or self.epochs < 1 or self.max_norm <= 0:
            raise UserError("update: kl is at least 0, epochs at least 1, max_norm above 0.")
        if self.clip is not None and not 0 < self.clip < 1:
            raise UserError(f"update.clip: found {self.clip}, expected a number in (0, 1) or None.")
        if self.epochs > 1 and self.clip is None:
            raise UserError(
                "update: found several epochs without clip: the second would move away from what was drawn."
            )


@dataclass(frozen=True)
class Lora:
    """The adapter."""

    rank: int = 16
    alpha: int = 32
    modules: str | tuple[str, ...] = "all-linear"

    def config(self) -> Any:
        """The same as peft's LoraConfig; UserError when peft is not installed."""
        modules = self.modules if isinstance(self.modules, str) else list(self.modules)
        return need("peft").LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=modules, task_type="CAUSAL_LM"
        )


@dataclass(frozen=True)
class Settings:
    """Everything about a training run.

    Raises:
        UserError: an unknown algorithm, one that needs groups without groups, or no stage.
    """

    algorithm: Algorithm = "rloo"
    stages: Sequence[Stage] = STAGES
    budgets: Budgets = Budgets()
    sampling: Sampling = Sampling()
    update: Update = Update()
    lora: Lora | None = Lora()
    """None trains all weights (small models only)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.algorithm not in ("rloo", "grpo", "reinforce", "nano"):
            raise UserError(f"algorithm: found {self.algorithm!r}, expected rloo, grpo, reinforce or nano.")
        if self.algorithm in ("rloo", "grpo") and self.sampling.group < 2:
            raise UserError(f"sampling.group: found {self.sampling.group}, {self.algorithm} compares at least 2.")
        if not self.stages:
            raise UserError("stages: found none, expected at least one.")

    def to_dict(self) -> dict[str, Any]:
        """A JSON value."""
        return asdict(self) | {"stages": [asdict(stage) for stage in self.stages]}
