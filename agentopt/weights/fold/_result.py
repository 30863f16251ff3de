"""What meta-training says at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class MetaResult:
    """A finished meta-training."""

    steps: int
    best_step: int
    """Whose meta-parameters the folder has now."""
    stop_reason: str
    validation: dict[str, Any]
    """Of the best step: accuracy, recall_exact, recall_set, recall, loss."""
    curve: list[dict[str, Any]] = field(repr=False)
    """All validations, in order."""
    seconds: float
    """Of all steps, without validations."""
    warnings: list[str] = field(default_factory=list[str])
    folder: str | None = None
    """Where it was written."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the folder."""
        values = asdict(self)
        values.pop("folder")
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], folder: str | None) -> MetaResult:
        """What `to_dict` gave."""
        return cls(**values, folder=folder)
