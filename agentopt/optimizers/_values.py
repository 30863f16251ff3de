"""Local proposals for numbers and choices: neighbours, the ends of the range, the other options.

The unit is one parameter. No model is asked. Parameters that were tried least come first, so that no declared number or
choice is left untouched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from agentopt.evaluation import seeded
from agentopt.graph import set_value
from agentopt.optimizers._legal import Proposals, current_value
from agentopt.optimizers._protocol import ProposeContext, Update

if TYPE_CHECKING:
    from agentopt.graph import ParameterSpec

KINDS = frozenset({"number", "choice"})


class Values:
    """Proposes one new value of one number or choice at a time."""

    name = "values"

    def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates; [] when nothing is left to try around the parent."""
        specs = [spec for spec in context.specs.values() if spec.kind in KINDS]
        tried = Counter(edit.name for past in context.history for edit in past.update.edits)
        rng = seeded("values", context.seed, context.iteration, context.parent.hash)
        order = {spec.name: rng.random() for spec in specs}
        specs.sort(key=lambda spec: (tried[spec.name], order[spec.name]))
        proposals = Proposals(context)
        queues = [(spec, iter(neighbours(spec, current_value(context, spec)))) for spec in specs]
        while queues and not proposals.full:
            for spec, queue in list(queues):
                try:
                    value = next(queue)
                except StopIteration:
                    queues.remove((spec, queue))
                    continue
                proposals.offer(Update((set_value(spec, value),), f"tries {spec.name} = {value!r}", self.name))
        return proposals.updates


def bounds(spec: ParameterSpec, value: float) -> tuple[float, float]:
    """The declared bounds of a number; where one is missing, room around `value`."""
    low = spec.low if spec.low is not None else min(0.0, 2.0 * value)
    high = spec.high if spec.high is not None else max(1.0, 2.0 * value)
    return low, high


def neighbours(spec: ParameterSpec, value: Any) -> Iterator[Any]:
    """Values near `value`, nearest first for numbers, in order of declaration for choices; all allowed by `spec`."""
    if spec.kind == "choice":
        yield from (option for option in spec.options if option != value)
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    low, high = bounds(spec, value)
    seen: list[Any] = [value]
    for share in (0.25, -0.25, 0.1, -0.1, 0.5, -0.5):
        step = share * (high - low)
        if spec.integer:
            step = max(1.0, abs(step)) * (1 if share > 0 else -1)
        new = spec.project(round(value + step, 6))
        if new not in seen and not spec.problems(new):
            seen.append(new)
            yield new
    for end in (low, high):
        new = spec.project(end)
        if new not in seen and not spec.problems(new):
            seen.append(new)
            yield new
