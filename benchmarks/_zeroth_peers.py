"""What ZerothOrder is measured against, in our own words: MeZO as it was published, with or without a stored mask.

`InPlace` is the algorithm of arXiv 2305.17333: normal noise drawn again from one seed for every pass over the weights,
which are moved to plus eps, to minus eps, back, and along the estimate; four passes, two forward passes. With `masks`
it is the naive form of Sparse-MeZO (arXiv 2402.15751): a bool per weight, stored, multiplied in at every pass.
`LoraAdam` and `FullAdam` are the first-order ends of the scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

Loss = Callable[[Any], Any]


def stored_masks(model: Any, density: float) -> dict[str, Any]:
    """A bool for every weight of every matrix: whether it is among the smallest `density` of its tensor."""
    masks: dict[str, Any] = {}
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            flat = weight.detach().abs().float().flatten()
            kept = max(1, round(density * flat.numel()))
            masks[name] = (flat <= torch.kthvalue(flat, kept).values).view_as(weight)
    return masks


class InPlace:
    """MeZO with the weights moved in place, in the weights' own precision.

    `rounding="stochastic"` rounds the update (not the three moves of the probe) at random, so that its mean lands;
    `restore=True` takes a copy of the weights back after the probe instead of adding the noise a third time.
    """

    def __init__(
        self,
        model: Any,
        lr: float,
        eps: float = 1e-3,
        seed: int = 0,
        masks: Mapping[str, Any] | None = None,
        rounding: str = "nearest",
        restore: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        self.model, self.lr, self.eps, self.seed, self.masks = model, lr, eps, seed, masks or {}
        self.rounding, self.restore, self.weight_decay = rounding, restore, weight_decay
        self.step_number = 0

    @torch.no_grad()
    def step(self, loss_fn: Loss) -> float:
        seed = (self.seed << 32) + self.step_number
        before = [weight.clone() for weight in self.model.parameters()] if self.restore else []
        self._move(seed, self.eps)
        plus = float(torch.as_tensor(loss_fn(self.model)).double().mean())
        self._move(seed, -2 * self.eps)
        minus = float(torch.as_tensor(loss_fn(self.model)).double().mean())
        if self.restore:
            for weight, kept in zip(self.model.parameters(), before, strict=True):
                weight.copy_(kept)
        else:
            self._move(seed, self.eps)
        slope = (plus - minus) / (2 * self.eps)
        if not math.isfinite(slope):
            raise FloatingPointError(f"loss is not a number after {self.step_number} steps")
        self._update(seed, slope)
        self.step_number += 1
        return (plus + minus) / 2

    def _noise(self, seed: int) -> Any:
        """Every weight with its noise, drawn in the same order each time."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.model.named_parameters():
            z = torch.empty_like(weight).normal_(generator=generator)
            if name in self.masks:
                z.mul_(self.masks[name])
            yield weight, z

    def _move(self, seed: int, scale: float) -> None:
        for weight, z in self._noise(seed):
            weight.add_(z, alpha=scale)

    def _update(self, seed: int, slope: float) -> None:
        dice = torch.Generator().manual_seed(seed ^ 0x5EED)
        for weight, z in self._noise(seed):
            decay = self.weight_decay if weight.dim() > 1 else 0.0
            if self.rounding == "stochastic":
                moved = weight.float() - self.lr * (slope * z.float() + decay * weight.float())
                weight.copy_(stochastic(moved, weight.dtype, dice))
            else:
                weight.sub_(z.mul_(slope).add_(weight, alpha=decay), alpha=self.lr)


def stochastic(value: Any, dtype: Any, dice: torch.Generator) -> Any:
    """`value` (float32) in 16 bits, up or down at random so that the mean is right."""
    if dtype == torch.float32:
        return value
    near = value.to(dtype)
    other = torch.where(
        near.float() < value,
        torch.nextafter(near, torch.full_like(near, math.inf)),
        torch.nextafter(near, torch.full_like(near, -math.inf)),
    )
    gap = (other.float() - near.float()).abs()
    share = torch.where(gap > 0, (value - near.float()).abs() / gap, torch.zeros_like(value))
    return torch.where(torch.rand(value.shape, generator=dice) < share, other, near)


class FullAdam:
    """AdamW on all weights."""

    def __init__(self, model: Any, lr: float) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(list(self.parameters()), lr=lr, weight_decay=0.0)

    def parameters(self) -> Any:
        return self.model.parameters()

    def step(self, loss_fn: Loss) -> float:
        with torch.enable_grad():
            loss = loss_fn(self.model).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self.optimizer.step()
        return float(loss.detach())


class LoraAdam(FullAdam):
    """AdamW on LoRA adapters of every linear layer (our own `adapters.attach`)."""

    def __init__(self, model: Any, lr: float, rank: int = 8, seed: int = 0) -> None:
        from agentopt.weights import adapters

        self.adapters = adapters.attach(model, rank=rank, alpha=2 * rank, seed=seed)
        super().__init__(model, lr)

    def parameters(self) -> Any:
        return list(self.adapters.parameters().values())
