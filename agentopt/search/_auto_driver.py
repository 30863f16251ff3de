"""`--driver auto`: which search fits, from what is known before anything is spent, and the reason in one sentence.

The order of the rules is their weight. Each is what the benchmarks of this repository show or, where they cannot, what
the methods' own papers report (see docs/drivers.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentopt.graph import ParameterSpec

FEW_ROWS = 12
"""With so few validation rows a full validation costs hardly more than a few steps: putting it off saves nothing."""
WIDE = 4
"""So many parameters to write are worth per-example fronts and merges, where the budget carries them."""
MERGING = 40
"""Full validations that the Pareto search takes to get somewhere (17 to 92 in its paper's runs)."""
_WRITTEN = frozenset({"prompt", "tool_text", "code", "principles", "tools", "pipeline", "value"})
_SPACES = frozenset({"demos", "number", "choice", "knowledge"})


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


def choose(facts: Facts) -> tuple[str, str]:
    """The driver's name and why."""
    kinds = [spec.kind for spec in facts.specs.values()]
    written = sum(kind in _WRITTEN for kind in kinds)
    if len(facts.objectives) > 1:
        return "pareto", f"{len(facts.objectives)} objectives: a front is kept for each of them"
    rows = facts.validation
    if facts.strong and written >= WIDE and (facts.search is None or facts.search >= MERGING * (rows + 6)):
        return "pareto", f"a model that writes, {written} parameters to write and a budget for per-example fronts"
    if facts.strong and written and rows <= FEW_ROWS:
        return "pareto", f"a model that writes and only {rows} validation rows: every step can afford all of them"
    if facts.strong and written:
        return "climb", "a model that writes: each step builds on the last, and validation comes after a few of them"
    if not written and kinds and all(kind in _SPACES for kind in kinds):
        return "greedy", "only demonstrations, numbers, choices and forms: cheap proposals, raced in large rounds"
    return "greedy", "proposals are cheap and no model writes: large rounds, raced against each other"
