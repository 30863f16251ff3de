"""Many runs of the study side by side: members that share seed, batches and noise, and differ in mask and rate.

Two-sided sign probes with plain steps only, which is what the grid of masks and rates is made of. Noise and masks are
those of `ZerothOrder`, drawn once for all members; the forward passes of all members and both sides are one batched
pass. `check` holds a member against `ZerothOrder` itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call, vmap

from agentopt.weights.zeroth import Shift, ZerothOrder, probe_seed


@dataclass(frozen=True)
class Member:
    """One run: what ZerothOrder is given.

    `stored` keeps a mask by magnitude as it was at the start, as a bool per weight would, and lets the weights cross
    the threshold; `ZerothOrder` stores no mask and holds the weights on their side.
    """

    settings: tuple[tuple[str, Any], ...]
    lr: float
    stored: bool = False

    @property
    def dynamic(self) -> bool:
        return dict(self.settings).get("mask_update") == "dynamic"


class Ensemble:
    """Steps for all members at once.

    Args:
        model: the common start.
        members: the runs; all have the same eps.
        seed: of the noise and of random masks.
        rows: gives the inputs and the loss per example of logits, see `step`.
    """

    def __init__(self, model: Any, members: Sequence[Member], seed: int) -> None:
        self.model, self.members, self.seed = model, list(members), seed
        self.eps = float(dict(members[0].settings).get("eps", 1e-3))
        self.rates = torch.tensor([member.lr for member in members])
        self.weights = {
            name: weight.detach().unsqueeze(0).repeat(len(members), *[1] * weight.dim())
            for name, weight in model.named_parameters()
        }
        self.masks: dict[str, Any] = {}
        self.limits: dict[str, tuple[Any, Any]] = {}
        self.follow: dict[str, list[tuple[int, bool, float]]] = {}
        """Members whose masks follow the weights: number, whether small, threshold."""
        self.failed: list[int | None] = [None] * len(members)
        self.step_number = 0
        self._prepare()

    def _prepare(self) -> None:
        """Masks and, for those by magnitude, the bounds that keep a weight on its side of the threshold."""
        kinds: dict[Any, ZerothOrder] = {}
        for member in self.members:
            if member.settings not in kinds:
                kinds[member.settings] = ZerothOrder(self.model, lr=1.0, seed=self.seed, **dict(member.settings))
        self.source = next(zo for zo in kinds.values() if len(zo.sites) == len(self.weights))
        for site in self.source.sites:
            masks = [self._mask(kinds[member.settings], site.name) for member in self.members]
            self.masks[site.name] = torch.stack(masks)
            low, high = torch.zeros(len(masks)), torch.full((len(masks),), torch.inf)
            self.follow[site.name] = []
            for number, member in enumerate(self.members):
                zo = kinds[member.settings]
                mine = next((one for one in zo.sites if one.name == site.name), None)
                if mine is None or mine.threshold is None or not mine.is_matrix or member.stored:
                    continue
                small = zo.mask.kind == "small"
                if member.dynamic:
                    self.follow[site.name].append((number, small, mine.threshold))
                else:
                    (high if small else low)[number] = mine.threshold
            shape = (len(masks), *[1] * site.tensor.dim())
            self.limits[site.name] = (low.view(shape), high.view(shape))

    def _mask(self, zo: ZerothOrder, name: str) -> Any:
        """1 where the member's weights move, else 0."""
        site = next((one for one in zo.sites if one.name == name), None)
        weight = dict(self.model.named_parameters())[name].detach()
        if site is None:
            return torch.zeros_like(weight)
        ones = torch.ones(weight.numel())
        zo.mask.apply_(site, weight.view(-1), ones, 0, 0)
        return ones.view_as(weight)

    @torch.no_grad()
    def step(self, losses: Callable[[Any], Any]) -> None:
        """One step of every member; `losses` maps a callable model to a loss per example."""
        shift = Shift(probe_seed(self.seed, self.step_number, 0), 1.0)
        moves: dict[str, Any] = {}
        for site in self.source.sites:
            for number, small, threshold in self.follow[site.name]:
                size = self.weights[site.name][number].abs()
                self.masks[site.name][number] = size <= threshold if small else size >= threshold
            signs = torch.empty(site.size)
            self.source._directions.fill(site, shift, 0, 1.0, signs)
            moves[site.name] = signs.view_as(site.tensor) * self.masks[site.name]
        both = {
            name: torch.cat([weight + self.eps * moves[name], weight - self.eps * moves[name]])
            for name, weight in self.weights.items()
        }
        found = self._evaluate(both, losses).double().mean(1)
        plus, minus = found[: len(self.members)], found[len(self.members) :]
        slopes = ((plus - minus) / (2 * self.eps)).float()
        for number in torch.nonzero(~torch.isfinite(slopes)).flatten().tolist():
            if self.failed[number] is None:
                self.failed[number] = self.step_number
        alive = torch.tensor([failed is None for failed in self.failed])
        steps = torch.where(alive, self.rates * slopes, torch.zeros_like(slopes))
        for name, weight in self.weights.items():
            moved = weight - steps.view(-1, *[1] * (weight.dim() - 1)) * moves[name]
            low, high = self.limits[name]
            held = torch.where(moved.abs() < low, low * torch.sign(weight), moved.clamp(-high, high))
            self.weights[name] = torch.where(self.masks[name] > 0, held, weight)
        self.step_number += 1

    def _evaluate(self, weights: dict[str, Any], losses: Callable[[Any], Any]) -> Any:
        def one(mine: dict[str, Any]) -> Any:
            return losses(lambda *args, **kwargs: functional_call(self.model, mine, args, kwargs))

        return vmap(one)(weights)

    def member(self, number: int) -> Any:
        """A model with the weights of one member."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(self.weights[name][number])
        return model


def check(model: Any, member: Member, seed: int, losses: Callable[[int], Callable[[Any], Any]], steps: int) -> float:
    """Largest difference of a weight between a member and `ZerothOrder` after some steps."""
    together = Ensemble(model, [member, Member((("eps", dict(member.settings)["eps"]),), member.lr)], seed)
    alone = copy.deepcopy(model)
    zo = ZerothOrder(alone, lr=member.lr, seed=seed, **dict(member.settings))
    for step in range(steps):
        together.step(losses(step))
        zo.step(losses(step))
    mine = dict(together.member(0).named_parameters())
    return max(float((mine[name] - weight).detach().abs().max()) for name, weight in alone.named_parameters())
