"""Update rules: from the estimate of the gradient to the next weights, tile by tile.

A rule works element by element on float32 tiles: the weights, the estimate `sum_k c_k z_k` and the rule's state, which
it changes in place. Every product and every sum is an operation of its own in one fixed order (torch's fused forms,
such as `add(alpha=...)` or `lerp`, may or may not use fused multiply-add, by device and by place in the tile), and
scalars are rounded to float32 first; so a replay gives the same bits, however the weights are cut into tiles.

Memory beside the weights, per trained weight: sgd and sign 0 bytes, momentum and hizoo 4, adam 8. A masked-out weight
has a zero estimate, but momentum and adam still move a weight that was trained before: where a mask changes from step
to step, the caller keeps the weights outside of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from agentopt.errors import UserError
from agentopt.weights.load import need

if TYPE_CHECKING:
    from torch import Tensor

Estimator = Literal["difference", "hessian", "jvp", "conservative"]
State = Mapping[str, "Tensor"]


class Rule(ABC):
    """One way to use an estimate.

    Attributes:
        name: how it is called.
        slots: names of the float32 buffers that the rule keeps per tensor, each of the tensor's shape.
        initial: what a buffer is filled with before the first step.
        wants: `"estimate"`: `apply` is given `sum_k c_k z_k`; `"direction"`: it is given the plain noise u (scale 1,
            masked) and the step's scalars.
    """

    name: ClassVar[str]
    slots: ClassVar[tuple[str, ...]] = ()
    initial: ClassVar[Mapping[str, float]] = {}
    wants: ClassVar[Literal["estimate", "direction"]] = "estimate"
    defaults: ClassVar[Mapping[str, float]] = {}

    def __init__(self, hyper: Mapping[str, float] | None = None) -> None:
        given = dict(hyper or {})
        for name, value in given.items():
            if name not in self.defaults:
                known = ", ".join(self.defaults) or "none"
                raise UserError(f"method {self.name}: found setting {name!r}, expected one of: {known}.")
            if not 0.0 <= value < 1.0:
                raise UserError(f"method {self.name}: {name} is {value!r}, expected a number from 0 to below 1.")
        self.hyper: dict[str, float] = {**self.defaults, **given}

    @property
    def bytes_per_weight(self) -> int:
        """What the rule stores per trained weight."""
        return 4 * len(self.slots)

    def scale(self, state: State) -> Tensor | None:
        """What a direction's tile is multiplied by before it shifts the weights; None for nothing."""
        del state
        return None

    def apply(
        self,
        weight: Tensor,
        estimate: Tensor,
        state: State,
        lr: float,
        decay: float,
        step: int,
        scalars: Sequence[float] = (),
    ) -> Tensor:
        """The new weights of a tile.

        Args:
            weight: float32, not changed.
            estimate: float32, not changed; see `wants`.
            state: float32 tiles by slot, changed in place.
            lr: learning rate.
            decay: weight decay; the weights are first multiplied by `1 - lr * decay` (decoupled, in every rule).
            step: number of this step, from 0.
            scalars: the step's logged numbers; only rules that want a direction read them.
        """
        with need("torch").no_grad():
            moved = weight * _f32(1.0 - lr * decay) if decay else weight.clone()
            return moved.sub_(self._step(estimate, state, lr, step, scalars))

    @abstractmethod
    def _step(self, estimate: Tensor, state: State, lr: float, step: int, scalars: Sequence[float]) -> Tensor:
        """What is subtracted from the weights."""


class Sgd(Rule):
    """`w - lr g`: ZO-SGD, the rule of MeZO (arXiv 2305.17333). Stores nothing.

    An estimate that already carries the learning rate (`sum_k float32(lr c_k) z_k`) goes in with `lr=1`, `decay=0`.
    """

    name = "sgd"

    def _step(self, estimate: Tensor, state: State, lr: float, step: int, scalars: Sequence[float]) -> Tensor:
        return estimate * _f32(lr)


class Sign(Rule):
    """`w - lr sign(g)`: ZO-SGD-Sign (arXiv 2402.11592). Stores nothing.

    Every trained weight moves by exactly lr. With one direction of signs the step no longer depends on how much the
    loss differed, only on which side was lower.
    """

    name = "sign"

    def _step(self, estimate: Tensor, state: State, lr: float, step: int, scalars: Sequence[float]) -> Tensor:
        return estimate.sign().mul_(_f32(lr))


class Momentum(Rule):
    """`m <- beta m + (1 - beta) g; w - lr m`: ZO-SGD-MMT (arXiv 2402.11592). 4 bytes per weight.

    The mean form keeps the meaning of lr: its steps add up to those of sgd. (With the sum form, lr would have to be
    divided by `1 / (1 - beta)`.)
    """

    name = "momentum"
    slots = ("m",)
    initial: ClassVar[Mapping[str, float]] = {"m": 0.0}
    defaults: ClassVar[Mapping[str, float]] = {"beta": 0.9}

    def _step(self, estimate: Tensor, state: State, lr: float, step: int, scalars: Sequence[float]) -> Tensor:
        beta = self.hyper["beta"]
        mean = _average(state["m"], estimate, beta)
        return mean * _f32(lr)


class Adam(Rule):
    """Adam with decoupled decay on the estimate: ZO-Adam (arXiv 2402.11592, 1412.6980). 8 bytes per weight.

    With one direction of signs and no mask, the second moment is the same number for every weight (a sign squared is
    1): then this is momentum with one shared step size. Normal probes or a population make it differ.
    """

    name = "adam"
    slots = ("m", "v")
    initial: ClassVar[Mapping[str, float]] = {"m": 0.0, "v": 0.0}
    defaults: ClassVar[Mapping[str, float]] = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}

    def _step(self, estimate: Tensor, state: State, lr: float, step: int, scalars: Sequence[float]) -> Tensor:
        beta1, beta2 = self.hyper["beta1"], self.hyper["beta2"]
        mean = _average(state["m"], estimate, beta1)
        square = _average(state["v"], estimate * estimate, beta2)
        root = square.sqrt().div_(_f32((1.0 - beta2 ** (step + 1)) ** 0.5)).add_(_f32(self.hyper["epsilon"]))
        return (mean * _f32(lr / (1.0 - beta1 ** (step + 1)))).div_(root)


class Hizoo(Rule):
    """Preconditioning by a running diagonal curvature: HiZOO (arXiv 2402.15173). 4 bytes per weight.

    The loss is measured along `z = u / sqrt(h)` (`scale`), with u normal; the step's scalars are those of
    `hessian_coefficients`: the derivative c and the half curvature s along z. Then
        `h <- (1 - alpha) h + alpha |s h u^2|` (the diagonal of `s H^(1/2) u u' H^(1/2)`), and `w - lr c u / sqrt(h)`.
    h starts at 1, where this is MeZO, and is kept within 1e-8 to 1e8. alpha has to be small: in d dimensions the share
    of s u^2 that tells one weight from another is about 2 / d.
    """

    name = "hizoo"
    slots = ("h",)
    initial: ClassVar[Mapping[str, float]] = {"h": 1.0}
    wants = "direction"
    defaults: ClassVar[Mapping[str, float]] = {"alpha": 1e-6}

    def scale(self, state: State) -> Tensor:
        """`h ** -0.5`, to be read before the step changes h."""
        return state["h"].sqrt().reciprocal_()

    def _step(self, estimate: Tensor, state: State, lr: float, step: int, scalars: Sequence[float]) -> Tensor:
        if len(scalars) != 2:
            raise UserError(f"method hizoo: found {len(scalars)} scalars, expected the 2 of hessian_coefficients().")
        slope, curvature = (float(scalar) for scalar in scalars)
        hessian = state["h"]
        fresh = (hessian * estimate).mul_(estimate).mul_(_f32(curvature)).abs_()
        _average(hessian, fresh, 1.0 - self.hyper["alpha"]).clamp_(1e-8, 1e8)
        return (estimate * _f32(lr * slope)).div_(hessian.sqrt())


_RULES: dict[str, Callable[[Mapping[str, float] | None], Rule]] = {
    "sgd": Sgd,
    "sign": Sign,
    "momentum": Momentum,
    "adam": Adam,
    "hizoo": Hizoo,
}
_METHODS: dict[str, tuple[str, Estimator]] = {
    **{name: (name, "difference") for name in ("sgd", "sign", "momentum", "adam")},
    "hizoo": ("hizoo", "hessian"),
    "jvp": ("sgd", "jvp"),
    "conservative": ("sgd", "conservative"),
}
METHODS = tuple(_METHODS)
"""What `ZerothOrder(method=...)` may be: a rule fed by differences of losses, or a way to estimate that brings one."""


def rule(name: str, hyper: Mapping[str, float] | None = None) -> Rule:
    """The update rule of a method, with its settings (`{"beta": 0.95}`) where the defaults do not fit."""
    return _RULES[_method(name)[0]](hyper)


def estimator(name: str) -> Estimator:
    """How a method comes to its coefficients."""
    return _method(name)[1]


def _method(name: str) -> tuple[str, Estimator]:
    if name not in _METHODS:
        raise UserError(f"method: found {name!r}, expected one of {', '.join(METHODS)}.")
    return _METHODS[name]


def _f32(value: float) -> float:
    """A scalar as every device will use it."""
    return float(np.float32(value))


def _average(running: Any, fresh: Any, keep: float) -> Any:
    """`running <- keep running + (1 - keep) fresh`, in place; three roundings, never fused."""
    return running.mul_(_f32(keep)).add_(fresh * _f32(1.0 - keep))
