"""Several LoRA adapters in one model: each row of a batch with the adapter it was asked for, or with none.

A layer keeps the factors of those adapters that change it, each with its own rank and scale. Rows without an adapter
get exactly what the bare layer computes; a batch without any costs one look at a dictionary per layer. Folders are
checked before they come here (`agentopt.serving.adapters`); what does not fit the model is refused all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agentopt.errors import UserError
from agentopt.weights.adapters import _files as lora_files
from agentopt.weights.adapters import lora_delta
from agentopt.weights.adapters._layer import is_linear, sizes


class _Choice:
    """Which rows of the running batch use which adapter; one object for all layers."""

    groups: Sequence[tuple[str, Tensor | None]] = ()
    """(adapter, its rows); None for all rows."""


class _Layer(nn.Module):
    """A linear layer and the factors of the adapters that change it."""

    def __init__(self, base: nn.Module, choice: _Choice) -> None:
        super().__init__()
        self.base, self.choice = base, choice
        self.factors: dict[str, tuple[Tensor, Tensor, float]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """The layer, plus for each row what its adapter adds."""
        y: Tensor = self.base(x)
        for name, rows in self.choice.groups:
            held = self.factors.get(name)
            if held is None:
                continue
            a, b, scale = held
            number = torch.promote_types(x.dtype, a.dtype)
            part = x if rows is None else x[rows]
            delta = lora_delta(part.to(number), a.to(number), b.to(number), scale=scale)
            part = (delta + (y if rows is None else y[rows])).to(y.dtype)
            y = part if rows is None else y.index_copy(0, rows, part)
        return y

    @property
    def weight(self) -> Any:
        """The base's weight: some models ask their layers for its type."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The base's bias."""
        return self.base.bias


class Slots:
    """The adapters that a model holds.

    Args:
        model: whose linear layers are wrapped when the first adapter for them comes.
        most: adapters at a time.
        rank: the largest that is taken.
    """

    def __init__(self, model: Any, *, most: int, rank: int) -> None:
        self.model, self.most, self.rank = model, most, rank
        self.folders: dict[str, Path] = {}
        self._choice = _Choice()
        self._layers: dict[str, _Layer] = {}

    def load(self, name: str, folder: Path) -> None:
        """Read a folder of peft's layout.

        Raises:
            UserError: it does not fit, the name is held already, or there is no place.
        """
        if name in self.folders:
            raise UserError(f"the adapter {name!r} has already been loaded.")
        if len(self.folders) >= self.most:
            raise UserError(f"all {self.most} places for adapters are taken; unload one first.")
        stored = lora_files.load(folder)
        plan = {layer: self._fitting(layer, factors) for layer, factors in stored.items()}
        for layer, factors in stored.items():
            wrapped = self._wrapped(layer)
            device = next(iter(plan[layer].parameters()), torch.empty(0)).device
            wrapped.factors[name] = (factors.a.to(device), factors.b.to(device), factors.scale)
        self.folders[name] = folder

    def unload(self, name: str) -> bool:
        """Forget an adapter; whether it was there."""
        if self.folders.pop(name, None) is None:
            return False
        for layer in self._layers.values():
            layer.factors.pop(name, None)
        return True

    def use(self, adapters: Sequence[str | None]) -> None:
        """From now on row r of a batch uses `adapters[r]`."""
        held = {one for one in adapters if one is not None}
        if len(held) == 1 and None not in adapters:
            self._choice.groups = [(next(iter(held)), None)]
            return
        device = self.model.device
        self._choice.groups = [
            (name, torch.tensor([row for row, one in enumerate(adapters) if one == name], device=device))
            for name in sorted(held)
        ]

    def _fitting(self, layer: str, factors: Any) -> nn.Module:
        try:
            module = self.model.get_submodule(layer)
        except AttributeError:
            raise UserError(f"has factors for {layer}, and this model has no such layer.") from None
        base = module.base if isinstance(module, _Layer) else module
        if not is_linear(base):
            raise UserError(f"has factors for {layer}, which is no linear layer.")
        found = (int(factors.a.shape[1]), int(factors.b.shape[0]))
        if found != sizes(base) or factors.rank > self.rank:
            raise UserError(
                f"{layer} has (in, out) = {found} and rank {factors.rank}, expected {sizes(base)} and at most rank "
                f"{self.rank}."
            )
        return base

    def _wrapped(self, layer: str) -> _Layer:
        if layer not in self._layers:
            parent, _, last = layer.rpartition(".")
            wrapped = _Layer(self.model.get_submodule(layer), self._choice)
            setattr(self.model.get_submodule(parent), last, wrapped.train(False))
            self._layers[layer] = wrapped
        return self._layers[layer]
