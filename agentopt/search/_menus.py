"""Menus: for each parameter the values that a combination may use, written by the optimizer one parameter at a time.

This is MIPRO's first stage (arXiv 2406.11695): instructions and demonstration sets are proposed apart and combined
later. Numbers and choices need no menu; they are their own search space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentopt.errors import UserError
from agentopt.graph import Candidate, Edit, ParameterSpec, apply_edits, set_value
from agentopt.optimizers import Update

if TYPE_CHECKING:
    from agentopt.search._lab import Lab

OWN_SPACE = frozenset({"number", "choice"})


@dataclass(frozen=True, slots=True)
class Menus:
    """The search space: values per parameter (the baseline's first), and the numbers and choices."""

    values: Mapping[str, Sequence[Any]]
    free: Mapping[str, ParameterSpec]

    @property
    def variables(self) -> int:
        """How many parameters there are to choose for."""
        return sum(len(menu) > 1 for menu in self.values.values()) + len(self.free)

    @property
    def combinations(self) -> float:
        """How many combinations there are; infinite with a number that is not whole."""
        count = 1.0
        for menu in self.values.values():
            count *= len(menu)
        for spec in self.free.values():
            if spec.kind == "choice":
                count *= len(spec.options)
            elif spec.integer and spec.low is not None and spec.high is not None:
                count *= spec.high - spec.low + 1
            else:
                return float("inf")
        return count

    def update(self, base: Candidate, specs: Mapping[str, ParameterSpec], chosen: Mapping[str, Any]) -> Update:
        """The edits from `base` to the chosen values; none for values that stay."""
        edits: list[Edit] = []
        for name, value in chosen.items():
            if value != base.get(name, specs[name].default):
                edits.append(set_value(specs[name], value))
        return Update(tuple(edits), "a combination of proposed values", "bayes")


def child_hash(base: Candidate, update: Update, specs: Mapping[str, ParameterSpec]) -> str | None:
    """The hash of the candidate that the update makes; None when the values may not stand together."""
    try:
        return apply_edits(base, update.edits, specs).hash
    except UserError:
        return None


async def make_menus(lab: Lab, base: Candidate, size: int) -> Menus:
    """Ask the optimizer for `size - 1` further values of each parameter of `base`, all in one turn."""
    values: dict[str, list[Any]] = {}
    free = {name: spec for name, spec in lab.specs.items() if spec.kind in OWN_SPACE}
    async with lab.turn():
        batch = lab.minibatch()
        for name, spec in lab.specs.items():
            if name in free:
                continue
            menu = values[name] = [base.get(name, spec.default)]
            rollouts = await lab.rollouts(base, batch)
            for proposal in await lab.propose(base, size - 1, rollouts, only=[name]):
                value = proposal.candidate.get(name)
                if value not in menu:
                    menu.append(value)
    return Menus(values, free)
