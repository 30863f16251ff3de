"""What a finished run says: the claim, the scores beside the baselines, what it cost, where the model is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from agentopt.weights.finetuning._claim import FinetuneClaim
from agentopt.weights.finetuning._memory import size
from agentopt.weights.finetuning._options import FIRST_ORDER

SAVED = {"full": "model", "lora": "PEFT adapter (LoRA)", "prefix": "PEFT adapter (prefix)"}


@dataclass(frozen=True)
class FinetuneResult:
    """The outcome of a run, as kept in result.json."""

    folder: str
    model: str
    method: str
    tune: str
    metric: str
    """What the scores are: accuracy, or a metric's name."""
    claim: FinetuneClaim
    validation: dict[str, float]
    """Score by name: tuned, zero-shot, majority, calibrated, prior-matched."""
    test: dict[str, float]
    lr: float
    eps: float | None
    best_step: int
    """Updates that the written model has had; 0 when nothing beat the untrained model and none was written."""
    steps_done: int
    stop_reason: str
    forwards: int
    """Forward passes over training batches (with gradients one backward pass counts as two)."""
    seconds: float
    """Of training, over all parts of a resumed run."""
    memory: int
    """Peak bytes of the process that trained."""
    log_bytes: int
    """Size of the log from which the weights can be made again; 0 with gradients."""
    checked: str
    """How what was written was verified."""
    usage: str
    """Python that loads it."""
    curve: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    """Validation score and loss by step."""
    warnings: list[str] = field(default_factory=list[str])
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    rows: dict[str, int] = field(default_factory=dict[str, int])
    """How many there are to train, validate and test."""
    rate: str = ""
    """How `--lr auto` came to the rate; empty when it was given."""

    @property
    def work(self) -> str:
        """The cost of the steps in words."""
        passes = f"{self.forwards:,} forward passes"
        return f"the work of {passes}" if self.method in FIRST_ORDER else passes

    @property
    def memory_text(self) -> str:
        """The peak as a person reads it."""
        return size(self.memory)

    @property
    def what_is_saved(self) -> str:
        """What lies in the folder, in a few words."""
        return SAVED[self.tune] if self.best_step else "no model (nothing beat the untrained one)"

    def table(self) -> list[tuple[str, float | None, float | None]]:
        """Rows of name, validation score and test score; the tuned model last."""
        names = [name for name in (*self.validation, *self.test) if name != "tuned"]
        return [(name, self.validation.get(name), self.test.get(name)) for name in (*dict.fromkeys(names), "tuned")]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FinetuneResult:
        """The inverse of `to_dict`."""
        values: dict[str, Any] = {**data, "claim": FinetuneClaim(**data["claim"])}
        return cls(**values)
