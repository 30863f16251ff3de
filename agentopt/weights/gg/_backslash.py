"""BackSlash: training for rate. After every step of an optimizer the weights are shrunk as their own prior asks.

The penalty is `lam * sum (|w| + eps)^nu`, the generalized-Gaussian code length of the weights up to constants
(arXiv 2504.16968). Its published step is explicit; it crosses zero and oscillates. Here the proximal step of the
penalty is taken, which sets weights to exactly zero and never turns a sign. Imports torch.
"""

# torch's own annotations are partial: its values are checked by the tests, not by the type checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from agentopt.errors import UserError
from agentopt.weights.gg import _fit
from agentopt.weights.gg._rates import bits_per_weight

KEY = "backslash"
NU_RANGE = (0.1, 3.0)
"""The estimated shape is kept within: the range of the published table."""


@dataclass(frozen=True, slots=True)
class Record:
    """The weights at one moment of a training.

    Attributes:
        step: optimizer steps so far.
        nu: shape: the one in use; for `per="tensor"` the mean over the weights.
        sigma: root mean square of the weights.
        zeros: share of weights that are exactly 0.
        bits: entropy of the weights rounded to multiples of `grid`, bits per weight.
    """

    step: int
    nu: float
    sigma: float
    zeros: float
    bits: float


class BackSlash(torch.optim.Optimizer):
    """Wraps a torch optimizer; use it in its place.

        optimizer = BackSlash(torch.optim.AdamW(model.parameters(), lr=1e-3), lam=2e-2)

    Learning-rate schedulers, `state_dict`, closures and `GradScaler` work as with any optimizer. A parameter group may
    carry its own strength under the key `lam` (0 leaves it alone).

    Proximal step, `tau = lr * lam`: for nu <= 1 the penalty is concave in `|w|` and lies below its tangent, so
    `w <- sign(w) max(|w| - tau nu (|w| + eps)^(nu-1), 0)` is a majorise-minimise step (re-weighted L1); for nu > 1
    the penalty is convex and its proximal point is found by Newton's method.

    Args:
        optimizer: any torch optimizer over float32 or float64 parameters.
        lam: strength per weight, scaled by the learning rate of the group.
        nu: shape of the penalty, or "auto": estimated from the weights by the moment ratio. With torch.distributed the
            sums are added over all ranks, so that every rank uses the same shape.
        eps: keeps the slope finite at 0.
        prox: False takes the explicit published step `w <- w - tau nu sign(w) (|w| + eps)^(nu-1)`.
        every: nu is estimated again after this many steps.
        per: "model" for one estimate over all weights (as published), "tensor" for one each.
        only: which parameters are shrunk; None for those with two or more dimensions.
        scale_by_lr: False leaves the learning rate out, as published.
        per_count: divide `lam` by the number of weights that are shrunk, as published (there: of all parameters).
        log_every: a record is added to `log()` after this many steps; 0 for never.
        grid: step of the grid for the record's bits.

    Raises:
        UserError: a value out of range, half-precision parameters (the steps would be lost in rounding: keep float32
            master weights), or nothing to shrink.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lam: float,
        nu: float | Literal["auto"] = "auto",
        eps: float = 1e-5,
        *,
        prox: bool = True,
        every: int = 1,
        per: Literal["model", "tensor"] = "model",
        only: Callable[[Tensor], bool] | None = None,
        scale_by_lr: bool = True,
        per_count: bool = False,
        log_every: int = 100,
        grid: float = 2.0**-10,
    ) -> None:
        _check(lam, nu, eps, every, per, log_every)
        # torch's constructor would copy the groups: it gets a stand-in, then the groups and the state are shared.
        super().__init__([torch.zeros(1)], dict(optimizer.defaults))
        self.inner = optimizer
        self._share()
        self.lam, self.nu, self.eps, self.prox, self.every, self.per = float(lam), nu, float(eps), prox, every, per
        self.scale_by_lr, self.per_count, self.log_every, self.grid = scale_by_lr, per_count, log_every, grid
        self._only: Callable[[Tensor], bool] = only or _is_matrix
        self.steps = 0
        self.frozen = False
        self._shapes: list[float] = []
        self._log: list[Record] = []
        weights = [weight for weight, _ in self._weights()]
        if not weights:
            raise UserError("BackSlash: found no parameter to shrink, expected weights with two dimensions.")
        half = {str(one.dtype) for one in weights if one.dtype not in (torch.float32, torch.float64)}
        if half:
            raise UserError(
                f"BackSlash: found parameters in {', '.join(sorted(half))}, expected float32 master weights."
            )
        self._count = sum(weight.numel() for weight in weights)

    def step(self, closure: Any = None) -> Any:
        """The wrapped optimizer's step, then the shrinking."""
        zeros = [weight == 0 for weight, _ in self._weights()] if self.frozen else []
        loss: Any = self.inner.step(closure)
        if self.frozen:
            self._hold(zeros)
        else:
            self.shrink()
        return loss

    def freeze_zeros(self) -> None:
        """From now on nothing is shrunk, and weights that are 0 stay 0.

        For the last part of a training: what is left wins back what the shrinking cost, at the same share of zeros.
        """
        self.frozen = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of the wrapped optimizer."""
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of the wrapped optimizer; the shapes are estimated anew at the next step."""
        if not hasattr(self, "inner"):
            super().add_param_group(param_group)
            return
        self.inner.add_param_group(param_group)
        self._share()
        self._shapes = []
        self._count = sum(weight.numel() for weight, _ in self._weights())

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with our own under one more key."""
        own = {
            "steps": self.steps,
            "frozen": self.frozen,
            "shapes": list(self._shapes),
            "log": [asdict(record) for record in self._log],
        }
        return {**self.inner.state_dict(), KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also takes the state of the bare optimizer: the shrinking then starts anew."""
        rest = dict(state_dict)
        own = rest.pop(KEY, {"steps": 0, "shapes": [], "log": []})
        self.inner.load_state_dict(rest)
        self._share()
        self.steps, self._shapes = int(own["steps"]), list(own["shapes"])
        self.frozen = bool(own.get("frozen", False))
        self._log = [Record(**record) for record in own["log"]]

    def log(self) -> list[Record]:
        """The records so far."""
        return list(self._log)

    def record(self) -> Record:
        """The weights as they are now."""
        weights = [weight for weight, _ in self._weights()]
        count = sum(weight.numel() for weight in weights)
        shapes = self._shapes or self._estimate(weights)
        energy = sum(float(weight.detach().square().sum()) for weight in weights)
        return Record(
            step=self.steps,
            nu=sum(shape * weight.numel() for shape, weight in zip(shapes, weights, strict=True)) / count,
            sigma=math.sqrt(energy / count),
            zeros=sum(int((weight == 0).sum()) for weight in weights) / count,
            bits=sum(bits_per_weight(weight, self.grid).entropy * weight.numel() for weight in weights) / count,
        )

    @torch.no_grad()
    def shrink(self) -> None:
        """The step of the penalty alone."""
        pairs = list(self._weights())
        if not self._shapes or self.steps % self.every == 0:
            self._shapes = self._estimate([weight for weight, _ in pairs])
        for (weight, group), nu in zip(pairs, self._shapes, strict=True):
            strength = float(group.get("lam", self.lam)) / (self._count if self.per_count else 1)
            tau = strength * (float(group["lr"]) if self.scale_by_lr else 1.0)
            if tau > 0:
                (shrink_ if self.prox else _explicit_)(weight, tau, nu, self.eps)
        self._count_step()

    @torch.no_grad()
    def _hold(self, zeros: list[Tensor]) -> None:
        for (weight, _), zero in zip(self._weights(), zeros, strict=True):
            weight.masked_fill_(zero, 0)
        self._count_step()

    def _count_step(self) -> None:
        self.steps += 1
        if self.log_every and self.steps % self.log_every == 0:
            self._log.append(self.record())

    def _share(self) -> None:
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    def _weights(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Every weight that is shrunk, once, with its group."""
        seen: set[int] = set()
        for group in self.param_groups:
            for weight in cast("list[Tensor]", group["params"]):
                if id(weight) not in seen and weight.requires_grad and weight.numel() and self._only(weight):
                    seen.add(id(weight))
                    yield weight, group

    def _estimate(self, weights: list[Tensor]) -> list[float]:
        if self.nu != "auto":
            return [float(self.nu)] * len(weights)
        sums = torch.stack([_sums(weight).to(weights[0].device) for weight in weights])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        if self.per == "model":
            sums = sums.sum(0, keepdim=True).expand_as(sums)
        count, first, second = sums.double().cpu().unbind(1)
        shapes: list[float] = _fit.shape_of_moments(count, first, second).clamp(*NU_RANGE).tolist()
        return shapes


def _is_matrix(weight: Tensor) -> bool:
    return weight.ndim >= 2


def shrink_(weight: Tensor, tau: float, nu: float, eps: float = 1e-5) -> None:
    """Proximal step of `tau * sum (|w| + eps)^nu`, in place. No sign turns, zeros stay, tau = 0 changes nothing."""
    size = weight.abs()
    if nu <= 1:
        pull = (size + eps).pow_(nu - 1).mul_(tau * nu) if nu < 1 else torch.full_like(size, tau)
        shrunk = size.sub_(pull).clamp_min_(0)
    else:
        shrunk = _convex(size, tau * nu, nu, eps)
    weight.copy_(torch.copysign(shrunk, weight))
    weight.add_(0.0)  # -0 becomes 0


def _convex(size: Tensor, pull: float, nu: float, eps: float) -> Tensor:
    """The x >= 0 with `x + pull (x + eps)^(nu-1) = size`, 0 where there is none.

    In y = x + eps the left side is increasing and either concave (nu < 2) or convex; Newton's steps are kept in
    `[eps, size + eps]`, and from the left (concave) or the right (convex) they come from one side.
    """
    goal = size + eps
    y = goal.clone()
    for _ in range(50):
        power = y.pow(nu - 2).mul_(pull)
        new = (y - (y + power * y - goal) / (1 + (nu - 1) * power)).clamp_min_(eps)
        new = torch.minimum(new, goal)
        change = float((new - y).abs().max())
        y = new
        if change <= 4 * torch.finfo(y.dtype).eps * float(goal.max()):
            break
    return y.sub_(eps).clamp_min_(0)


def _explicit_(weight: Tensor, tau: float, nu: float, eps: float) -> None:
    weight.sub_(weight.sign() * (weight.abs() + eps).pow_(nu - 1), alpha=tau * nu)


def _sums(weight: Tensor) -> Tensor:
    """Count, sum of magnitudes, sum of squares; in float64 where the device has it."""
    weight = weight.detach()
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    size = torch.linalg.vector_norm(weight, 1, dtype=wide)
    square = torch.linalg.vector_norm(weight, 2, dtype=wide).square()
    return torch.stack([torch.full_like(size, weight.numel()), size, square])


def _check(lam: float, nu: float | str, eps: float, every: int, per: str, log_every: int) -> None:
    if not (math.isfinite(lam) and lam >= 0):
        raise UserError(f"BackSlash: lam: found {lam}, expected a number from 0.")
    if nu != "auto" and not (isinstance(nu, int | float) and math.isfinite(nu) and nu > 0):
        raise UserError(f"BackSlash: nu: found {nu!r}, expected 'auto' or a positive number.")
    if not (math.isfinite(eps) and eps > 0):
        raise UserError(f"BackSlash: eps: found {eps}, expected a positive number.")
    if every < 1 or log_every < 0:
        raise UserError(f"BackSlash: found every={every}, log_every={log_every}, expected at least 1 and 0.")
    if per not in ("model", "tensor"):
        raise UserError(f"BackSlash: per: found {per!r}, expected 'model' or 'tensor'.")
