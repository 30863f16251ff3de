"""`--driver auto`: which search fits, from what is known before anything is spent, and the reason in one sentence.

The order of the rules is their weight. Each is what the benchmarks of this repository show or, where they cannot, what
the methods' own papers report (see docs/drivers.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentopt.graph import ParameterSpec

FEW_ROWS = 30
"""Fewer validation rows than this decide little: nothing that needs many comparisons."""
_WRITTEN = frozenset({"prompt", "tool_text", "knowledge", "code", "principles", "tools", "pipeline", "value"})
_SPACES = frozenset({"demos", "number", "choice"})


@dataclass(frozen=True, slots=True)
class Facts:
    """What the choice is made from."""

    specs: Mapping[str, ParameterSpec]
    train: int
    validation: int
    search: int | None
    """Rollouts for the search alone; None when nothing bounds them."""
    strong: bool
    """Whether the optimizer's model can write proposals."""
    objectives: Sequence[str] = ("score",)

    @property
    def validations(self) -> float:
        """How many whole validations the search may spend."""
        return float("inf") if self.search is None else self.search / max(1, self.validation)


def choose(facts: Facts) -> tuple[str, str]:
    """The driver's name and why."""
    kinds = [spec.kind for spec in facts.specs.values()]
    written = sum(kind in _WRITTEN for kind in kinds)
    if len(facts.objectives) > 1:
        return "pareto", f"{len(facts.objectives)} objectives: a front is kept for each of them"
    if facts.strong and written > 1 and facts.validations >= 6:
        return "pareto", f"a model that writes, {written} parameters to write: parents from per-example fronts, merges"
    if facts.strong and written:
        return "greedy", "a model that writes and one place to write: each round builds on the best"
    if not written and kinds and all(kind in _SPACES for kind in kinds):
        return "greedy", "only demonstrations, numbers and choices: cheap proposals, raced in large rounds"
    return "greedy", "proposals are cheap and no model writes: large rounds, raced against each other"
