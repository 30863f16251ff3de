"""What folding gives: a knowledge base as tensors, with how well it is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agentopt.weights.fold._contradictions import Contradiction

HELD = 0.5
"""From this recall on a fact counts as kept where no gate was calibrated."""


@dataclass(eq=False)
class Adapter:
    """A folded knowledge base; made by `Folder.fold`, asked with `Folder.ask`."""

    state: dict[str, Any] = field(repr=False)
    """The adapted tensors."""
    facts: tuple[str, ...]
    """What was folded, each text once."""
    rows: int
    """Rows of the inner loop that they made."""
    fact_recall: tuple[float, ...] = field(repr=False)
    """exp(-mean loss per token) of each fact under the adapter."""
    recall_before: float
    """`recall` where the inner loop starts."""
    base_hash: str
    """Of the base that it belongs to."""
    meta_hash: str
    """Of the meta-parameters that folded it."""
    accepted: bool = True
    """The gate takes it: questions are asked of it, not of the facts in the prompt."""
    reason: str = ""
    """Why."""
    threshold: float | None = None
    """Of the gate, for `recall`."""
    contradictions: tuple[Contradiction, ...] = ()
    warnings: tuple[str, ...] = ()
    """What was cut, repeated or contradicts, a sentence each."""
    write: Callable[[Adapter, Path], None] | None = field(default=None, repr=False)
    """How its folder writes it."""

    @property
    def recall(self) -> float:
        """Mean over the facts: 1 is word for word."""
        return sum(self.fact_recall) / len(self.fact_recall)

    @property
    def lift(self) -> float:
        """What folding added to the recall."""
        return self.recall - self.recall_before

    @property
    def confidence(self) -> float:
        """Share of the facts that are kept: whose recall reaches the gate's threshold (0.5 without a gate)."""
        least = HELD if self.threshold is None else self.threshold
        return sum(one >= least for one in self.fact_recall) / len(self.fact_recall)

    def save(self, out: str | Path) -> Path:
        """Write a folder that peft, transformers and vLLM load as a LoRA adapter, with `fold.json` beside it.

        With `adapts="all"` it is a model folder instead.

        Raises:
            UserError: the folder that made it was closed, or trains the base and has not been saved yet.
            RunError: it cannot be written.
        """
        from agentopt.errors import UserError

        if self.write is None:
            raise UserError("adapter: the folder that made it is closed; save before closing.")
        path = Path(out).expanduser()
        self.write(self, path)
        return path

    def card(self) -> dict[str, Any]:
        """What `fold.json` holds of it."""
        return {
            "base_hash": self.base_hash,
            "meta_hash": self.meta_hash,
            "facts": list(self.facts),
            "rows": self.rows,
            "recall": self.recall,
            "recall_before": self.recall_before,
            "fact_recall": list(self.fact_recall),
            "confidence": self.confidence,
            "accepted": self.accepted,
            "reason": self.reason,
            "threshold": self.threshold,
            "contradictions": [asdict(one) for one in self.contradictions],
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_card(cls, card: dict[str, Any], state: dict[str, Any]) -> Adapter:
        """The adapter of a `fold.json`."""
        return cls(
            state=state,
            facts=tuple(card["facts"]),
            rows=card["rows"],
            fact_recall=tuple(card["fact_recall"]),
            recall_before=card["recall_before"],
            base_hash=card["base_hash"],
            meta_hash=card["meta_hash"],
            accepted=card["accepted"],
            reason=card["reason"],
            threshold=card["threshold"],
            contradictions=tuple(Contradiction(**one) for one in card["contradictions"]),
            warnings=tuple(card["warnings"]),
        )
