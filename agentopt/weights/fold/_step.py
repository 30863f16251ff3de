"""One inner step: the gradient of every document's loss, and where the rule goes with it.

Only functions that need torch import this module. A checkpointed step keeps its inputs alone and is computed again in
the backward pass: the memory of one step's graph, whatever is unrolled. (torch.utils.checkpoint cannot do this: it does
not work where `autograd.grad` is called inside.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from agentopt.weights.fold._rates import coefficients, rate

if TYPE_CHECKING:
    from agentopt.weights.fold._engine import Engine
    from agentopt.weights.fold._meta import MetaParameters
    from agentopt.weights.fold._rows import Work

_BETA1, _BETA2 = 0.9, 0.95
_EPS = 1e-8

Tensors = dict[str, Tensor]


@dataclass(slots=True)
class Place:
    """Where the inner loop stands."""

    phi: Tensors
    """Adapted tensors with their document axis."""
    first: Tensors
    """AdamW's running mean of gradients; empty for other rules and before the first step."""
    second: Tensors
    """... and of their squares."""


def inner_gradient(engine: Engine, work: Work, phi: Tensors, net: Mapping[str, Tensor], *, twice: bool) -> Tensors:
    """The gradient of the summed losses: every document's own, since none sees another's tensors.

    Token weights are constants of the loss that is differentiated here; with `twice` the derivative of the result
    still knows how they depend on the network and on the hidden states.
    """
    nll, hidden = engine.tokens(phi, work, twice=twice)
    counts = coefficients(work, hidden, net).to(nll.dtype)
    found = torch.autograd.grad(
        nll, list(phi.values()), counts if twice else counts.detach(), create_graph=twice, materialize_grads=True
    )
    return dict(zip(phi, found, strict=True))


def update(rule: str, place: Place, gradient: Tensors, rates: Tensors, number: int) -> Place:
    """Where step `number` goes with these gradients; `rates` are numbers per tensor."""
    first, second = dict(place.first), dict(place.second)
    phi: Tensors = {}
    for name, g in gradient.items():
        direction = g
        if rule == "normalized":
            # The eps under the root: at a gradient of exactly 0 the root has no derivative.
            mean = g.square().mean(tuple(range(1, g.dim())), keepdim=True) if g.dim() > 1 else g.square()
            direction = g * (mean + _EPS**2).rsqrt()
        elif rule == "adamw":
            first[name] = _mix(first.get(name), g, _BETA1)
            second[name] = _mix(second.get(name), g.square(), _BETA2)
            debiased = second[name] / (1 - _BETA2 ** (number + 1))
            direction = first[name] / (1 - _BETA1 ** (number + 1)) * (debiased + _EPS**2).rsqrt()
        phi[name] = place.phi[name] - rate(rates[name]) * direction
    return Place(phi, first, second)


def _mix(before: Tensor | None, now: Tensor, beta: float) -> Tensor:
    return now * (1 - beta) if before is None else before * beta + now * (1 - beta)


def constant_step(engine: Engine, meta: MetaParameters, work: Work, place: Place, number: int) -> Place:
    """A step whose gradient is a constant: paths to the start and to the rate stay, no graph of the model is kept."""
    with torch.enable_grad():
        here = {name: tensor.detach().requires_grad_() for name, tensor in place.phi.items()}
        gradient = inner_gradient(engine, work, here, meta.token_weights, twice=False)
    return update(engine.options.rule, place, gradient, _of_step(meta, number), number)


def graph_step(engine: Engine, meta: MetaParameters, work: Work, place: Place, number: int) -> Place:
    """A step that is differentiated through."""
    here = {name: t if t.requires_grad else t.detach().requires_grad_() for name, t in place.phi.items()}
    gradient = inner_gradient(engine, work, here, meta.token_weights, twice=True)
    return update(engine.options.rule, place, gradient, _of_step(meta, number), number)


def checkpointed_step(engine: Engine, meta: MetaParameters, work: Work, place: Place, number: int) -> Place:
    """`graph_step` that keeps its inputs alone and is computed again in the backward pass."""
    last = number + 1 == engine.options.inner_steps
    step = _Step(engine, work, number, tuple(place.phi), tuple(meta.token_weights), bool(place.first), not last)
    inputs = [
        *place.phi.values(),
        *place.first.values(),
        *place.second.values(),
        *_of_step(meta, number).values(),
        *meta.token_weights.values(),
        *engine.shared().values(),
    ]
    function: Any = _Checkpointed
    return step.place(cast(tuple[Tensor, ...], function.apply(step, *inputs)))


@dataclass(frozen=True, slots=True)
class _Step:
    """A step as a function of a flat list of tensors: phi, AdamW's means if it has some, rates, token weights.

    What follows them are the base's weights, which the engine has itself.
    """

    engine: Engine
    work: Work
    number: int
    names: tuple[str, ...]
    net: tuple[str, ...]
    has_means: bool
    gives_means: bool

    @property
    def own(self) -> int:
        """How many of the tensors are not the base's."""
        return (4 if self.has_means else 2) * len(self.names) + len(self.net)

    def run(self, tensors: Sequence[Tensor], *, twice: bool) -> tuple[Tensor, ...]:
        given = iter(tensors)

        def take(names: tuple[str, ...]) -> Tensors:
            return {name: next(given) for name in names}

        means = self.names if self.has_means else ()
        place = Place(take(self.names), take(means), take(means))
        rates, net = take(self.names), take(self.net)
        gradient = inner_gradient(self.engine, self.work, place.phi, net, twice=twice)
        with torch.set_grad_enabled(twice):
            after = update(self.engine.options.rule, place, gradient, rates, self.number)
        return (
            *after.phi.values(),
            *(after.first.values() if self.gives_means else ()),
            *(after.second.values() if self.gives_means else ()),
        )

    def place(self, tensors: Sequence[Tensor]) -> Place:
        """What `run` returned, with its names."""
        count = len(self.names)
        parts = [
            dict(zip(self.names, tensors[start : start + count], strict=False)) for start in range(0, 3 * count, count)
        ]
        return Place(*parts)


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: _Step, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            # The step's own gradient only: fused attention will do, and its graph is gone when this returns.
            return step.run([t.detach().requires_grad_() for t in tensors[: step.own]], twice=False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        step: _Step = ctx.step
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        with torch.enable_grad():
            own = [t.detach().requires_grad_() for t in saved[: step.own]]
            out = step.run(own, twice=True)
            given = [*own, *step.engine.shared().values()]
            wanted = [t for t, needed in zip(given, ctx.needs_input_grad[1:], strict=True) if needed]
            found = iter(torch.autograd.grad(out, wanted, grads, allow_unused=True))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])


def _of_step(meta: MetaParameters, number: int) -> Tensors:
    return {name: raw[number] for name, raw in meta.rates.items()}
