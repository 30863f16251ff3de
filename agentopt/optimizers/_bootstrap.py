"""Bootstrapped demonstration sets by seed, as in MIPROv2 and BootstrapFewShot (arXiv 2406.11695, 2310.03714).

The unit is one set for one demos parameter, told by a seed: -3 is no demonstrations, -2 only labelled ones, -1 the
successes of the program in training order, and 0 or more a shuffled draw of a random number of successes. Free places
are filled with labelled examples. A success is a rollout whose score reaches the threshold.

`Demonstrations` draws sets by balance and by what scored; here the draws are the reference's, for drivers that search
over numbered sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentopt.errors import UserError
from agentopt.evaluation import seeded
from agentopt.graph import SetDemos
from agentopt.optimizers._data import describe
from agentopt.optimizers._demonstrations import (
    Demo,
    Demonstrations,
    fill_form,
    form_of,
    last_user_message,
    reply_text,
)
from agentopt.optimizers._legal import Proposals
from agentopt.optimizers._protocol import ProposeContext, Update
from agentopt.optimizers._space import call_choices, calls_in

if TYPE_CHECKING:
    from agentopt.graph import ParameterSpec

NONE, LABELLED, UNSHUFFLED = -3, -2, -1
_NAMES = {NONE: "no demonstrations", LABELLED: "labelled demonstrations", UNSHUFFLED: "successes in training order"}
_TRIES = 8
"""Seeds tried for each update that is wanted; small stocks give the same set again and again."""


@dataclass(frozen=True, slots=True)
class BootstrapOptions:
    """Settings of `Bootstrap`; the defaults are the reference's."""

    bootstrapped: int = 4
    """Successes of the program in one set, at most."""
    labelled: int = 4
    """Size up to which a set is filled with labelled examples."""
    threshold: float = 1.0
    """Score from which a rollout is a success."""
    max_chars: int = 1500
    """Longest message plus reply of one demonstration."""

    def __post_init__(self) -> None:
        if self.bootstrapped < 0 or self.labelled < 0 or self.bootstrapped + self.labelled == 0:
            raise UserError(
                f"BootstrapOptions: bootstrapped={self.bootstrapped} and labelled={self.labelled} leave no "
                "demonstration; one of them must be positive and none negative."
            )


class Bootstrap:
    """Proposes demonstration sets in the order of their seeds."""

    name = "bootstrap"

    def __init__(self, options: BootstrapOptions | None = None) -> None:
        self.options = options or BootstrapOptions()
        self._found = Demonstrations(threshold=self.options.threshold, max_chars=self.options.max_chars)

    def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates; each sets every demos parameter, all with the same seed."""
        specs = [spec for spec in context.specs.values() if spec.kind == "demos"]
        proposals = Proposals(context)
        stocks = {spec.name: self.stock(context, spec) for spec in specs}
        specs = [spec for spec in specs if stocks[spec.name]]
        if not specs:
            return []
        first = NONE if context.iteration == 0 else 1000 * context.iteration
        for seed in range(first, first + _TRIES * context.count):
            if proposals.full:
                break
            sets = {spec.name: self.demo_set(context, spec, seed, stocks[spec.name]) for spec in specs}
            edits = tuple(SetDemos(name, [demo.item() for demo in items]) for name, items in sets.items())
            proposals.offer(Update(edits, described(seed, list(sets.values())), self.name))
        return proposals.updates

    def sets(self, context: ProposeContext, spec: ParameterSpec, count: int) -> list[list[dict[str, str]]]:
        """Up to `count` different values for `spec`, seeds -3, -2, -1, 0, ... in turn; the first one is empty."""
        stock = self.stock(context, spec)
        found: list[list[dict[str, str]]] = []
        for seed in range(NONE, NONE + _TRIES * count):
            items = [demo.item() for demo in self.demo_set(context, spec, seed, stock)]
            if len(found) < count and items not in found:
                found.append(items)
        return found

    def stock(self, context: ProposeContext, spec: ParameterSpec) -> list[Demo]:
        """Every demonstration that can be had for `spec`, in training order.

        To what `Demonstrations` finds come, where the program hands on what its call replies, the expected texts of
        other training examples: such a call should have replied just that.
        """
        found = {demo.input: demo for demo in self._found.stock(context, spec)}
        for demo in _expected(context, spec):
            if len(demo.input) + len(demo.output) <= self.options.max_chars:
                found.setdefault(demo.input, demo)
        order = {example.id: place for place, example in enumerate(context.train)}
        return sorted(found.values(), key=lambda demo: (order[demo.source], demo.input))

    def demo_set(
        self, context: ProposeContext, spec: ParameterSpec, seed: int, stock: Sequence[Demo] | None = None
    ) -> list[Demo]:
        """The set of one seed. A pure function of the context and the seed."""
        stock = self.stock(context, spec) if stock is None else stock
        limit = len(stock) if spec.max_items is None else spec.max_items
        if seed <= NONE:
            return []
        rng = seeded("bootstrap", context.train.id, spec.name, seed)
        successes = [] if seed == LABELLED else [demo for demo in stock if demo.bootstrapped]
        size = self.options.bootstrapped
        if seed >= 0:
            rng.shuffle(successes)
            size = rng.randint(1, max(1, size)) if size else 0
        chosen = successes[: min(size, limit)]
        taken = {demo.source for demo in chosen}
        # A success whose reply is a label is a labelled example as well.
        labelled = [demo for demo in stock if demo.label or not demo.bootstrapped]
        others = [demo for demo in labelled if demo.source not in taken]
        room = max(0, min(self.options.labelled, limit) - len(chosen))
        return [*chosen, *rng.sample(others, min(room, len(others)))]


def described(seed: int, sets: Sequence[Sequence[Demo]]) -> str:
    """What a set is, for the report."""
    successes = sum(demo.bootstrapped for items in sets for demo in items)
    total = sum(map(len, sets))
    kind = _NAMES.get(seed, f"a draw of successes (seed {seed})")
    return f"{kind}: {total} demonstrations, {successes} of them successes of the program"


def _expected(context: ProposeContext, spec: ParameterSpec) -> list[Demo]:
    """Labelled demonstrations of a call whose reply is the program's output, whatever the answers look like."""
    messages: list[tuple[str, Mapping[str, Any]]] = []
    known: dict[str, str] = {}
    for rollout, graph in zip(context.rollouts, context.graphs, strict=True):
        calls = calls_in(graph.get(spec.name), spec.name)
        message = last_user_message(calls[0]) if len(calls) == 1 else None
        if rollout.row.error or not calls:
            continue
        if message is None or call_choices(calls[0]) or reply_text(calls[0]) != str(rollout.row.output).strip():
            return []
        messages.append((message, rollout.example.inputs))
        known[rollout.example.id] = message
    form = form_of(messages, describe(context.train)) if messages else None
    found: list[Demo] = []
    for example in context.train:
        message = known.get(example.id) or (fill_form(form, example.inputs) if form is not None else None)
        if message and message.strip() and isinstance(example.expected, str) and example.expected.strip():
            found.append(Demo(message, example.expected.strip(), example.id))
    return found
