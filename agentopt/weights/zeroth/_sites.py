"""The tensors that are tuned, each with its place in the random number generator, its modules and its block."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentopt.errors import UserError
from agentopt.weights.zeroth._noise import tensor_id

_FORMATS = ("torch.float32", "torch.bfloat16", "torch.float16")
_LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(slots=True)
class Site:
    """One tuned tensor.

    Attributes:
        name: its name in `model.named_parameters()`; tied weights have one site.
        tensor: the parameter; never written to but by an update.
        id: its tensor id in the counter of the random numbers.
        block: number of the block (decoder layer, embedding, head, final norm) it belongs to.
        owners: the modules that use it, each with the attribute's name.
        kept: bits of a stored mask, 32 to an int32 word; None without one.
        threshold: magnitude at which a "small" or "large" mask divides it; None where no mask applies.
    """

    name: str
    tensor: Any
    id: int
    block: int
    owners: list[tuple[Any, str]] = field(default_factory=list[tuple[Any, str]])
    threshold: float | None = None
    kept: Any = None

    @property
    def is_matrix(self) -> bool:
        """Whether masks and weight decay apply: norm scales and biases are always trained, and never decay."""
        return self.tensor.dim() > 1

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(self.tensor.numel())


def find_sites(model: Any, trainable: Callable[[str], bool] | None = None) -> list[Site]:
    """The tuned tensors of a model, in the order of `named_parameters()`.

    Args:
        model: a torch module.
        trainable: which names to tune; None for those that require a gradient.

    Raises:
        UserError: nothing is left to tune, a tensor is not float32, bfloat16 or float16, or not contiguous, or two
            names share a tensor id.
    """
    sites: list[Site] = []
    by_identity: dict[int, Site] = {}
    blocks: dict[str, int] = {}
    ids: dict[int, str] = {}
    for found_name, tensor in model.named_parameters():
        name = found_name.replace("_orig_mod.", "")  # what torch.compile() puts in
        wanted = tensor.requires_grad if trainable is None else trainable(name)
        if not wanted or tensor.numel() == 0:
            continue
        if str(tensor.dtype) not in _FORMATS:
            raise UserError(
                f"{name}: found {tensor.dtype}, expected float32, bfloat16 or float16; convert the model, or tune an "
                "adapter on top."
            )
        if not tensor.is_contiguous():
            raise UserError(f"{name}: found a tensor that is not contiguous; give the model contiguous weights.")
        number = tensor_id(name)
        if number in ids:
            raise UserError(f"{name} and {ids[number]} share a tensor id; leave one of them out with trainable=.")
        ids[number] = name
        found = _LAYER.match(name)
        block = blocks.setdefault(found[1] if found else name.rpartition(".")[0], len(blocks))
        site = Site(name, tensor, number, block)
        sites.append(site)
        by_identity[id(tensor)] = site
    for module in model.modules():
        for attribute, tensor in module._parameters.items():
            site = by_identity.get(id(tensor))
            if site is not None:
                site.owners.append((module, attribute))
    if not sites:
        raise UserError("there is nothing to tune: no parameter requires a gradient or matches trainable=.")
    return sites


def check_mode(model: Any) -> None:
    """Refuse a model of which two forward passes differ by themselves.

    Raises:
        UserError: dropout is on, or a batch norm is gathering statistics.
    """
    if not model.training:
        return
    for name, module in model.named_modules():
        kind = type(module).__name__
        drops = "Dropout" in kind and getattr(module, "p", 0)
        if module.training and (drops or getattr(module, "track_running_stats", False)):
            raise UserError(
                f"{name}: found {kind} in training mode, which makes two measurements of the same weights differ; call "
                "model.eval() first."
            )


def owners_of(sites: Sequence[Site]) -> dict[Any, dict[str, Site]]:
    """For every module that uses tuned tensors: attribute name to site."""
    modules: dict[Any, dict[str, Site]] = {}
    for site in sites:
        for module, attribute in site.owners:
            modules.setdefault(module, {})[attribute] = site
    return modules
