"""Weights that something else than their own module reads: found out in the first pass, so that none moves unmeasured.

A probe perturbs the weights of a module in the module's own forward pass. A weight that a parent reads
(`F.linear(x, self.embedding.weight)`, the output projection of `nn.MultiheadAttention`, `nn.utils.weight_norm`) or that
the loss itself reads would stay as it is there. The first pass of a run therefore hands such readers a tensor that
tells what it is used for; from then on the tensors that it found are perturbed whole, for everyone, one variant of the
weights per pass.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Generator, Mapping
from typing import Any, cast

from agentopt.weights.zeroth._sites import Site

_HARMLESS = frozenset(
    (
        *("__get__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous"),
        *("is_floating_point", "is_signed", "ndimension", "nelement", "numel", "size", "storage_offset", "stride"),
    )
)
_ASKED = frozenset(
    (
        *("device", "dtype", "grad", "grad_fn", "is_cuda", "is_leaf", "is_meta", "is_quantized", "is_sparse"),
        *("itemsize", "layout", "names", "nbytes", "ndim", "requires_grad", "shape"),
    )
)
"""What can be asked of a weight without reading its numbers."""


class Parameters(dict[str, Any]):
    """A module's parameters; whoever reads a tuned one from outside of the module's forward pass is found out."""

    def __init__(self, plain: dict[str, Any], sites: Mapping[str, Site], used: set[int]) -> None:
        super().__init__(plain)
        self.plain, self.sites, self.used = plain, sites, used

    def __getitem__(self, name: str) -> Any:
        """The parameter, or what watches it."""
        found: Any = super().__getitem__(name)
        site = self.sites.get(name)
        return found if site is None or site.id in self.used else _watcher()(found, site.id, self.used)


@contextlib.contextmanager
def watched(owners: Mapping[Any, Mapping[str, Site]], used: set[int]) -> Generator[None]:
    """Inside, ids of tensors that are read from outside of their modules' forward passes go to `used`."""
    before = {module: module.__dict__["_parameters"] for module in owners}
    try:
        for module, sites in owners.items():
            module.__dict__["_parameters"] = Parameters(before[module], sites, used)
        yield
    finally:
        for module, parameters in before.items():
            module.__dict__["_parameters"] = parameters


@contextlib.contextmanager
def unwatched(module: Any) -> Generator[None]:
    """Inside, the module's own forward pass runs."""
    parameters = module.__dict__["_parameters"]
    if not isinstance(parameters, Parameters):
        yield
        return
    module.__dict__["_parameters"] = parameters.plain
    try:
        yield
    finally:
        module.__dict__["_parameters"] = parameters


@contextlib.contextmanager
def swapped(tensors: Mapping[tuple[Any, str], Any]) -> Generator[None]:
    """Inside, modules have other tensors in the place of some parameters: by (module, attribute)."""
    before = {(module, name): module._parameters[name] for module, name in tensors}
    try:
        for (module, name), tensor in tensors.items():
            module._parameters[name] = tensor
        yield
    finally:
        for (module, name), tensor in before.items():
            module._parameters[name] = tensor


@contextlib.contextmanager
def replaced(forwards: Mapping[Any, Callable[..., Any]]) -> Generator[None]:
    """Inside, modules have other forward passes; one that a module had been given before comes back afterwards.

    Torch's fused encoder layers, which read the weights of their parts, are off, and compiled models run uncompiled:
    every pass has other weights, so they would be compiled again for each.
    """
    import torch

    mha: Any = torch.backends.mha
    before: dict[Any, Any] = {module: module.__dict__.get("forward") for module in forwards}
    fast = mha.get_fastpath_enabled()
    compiled = "torch._dynamo" in sys.modules
    try:
        mha.set_fastpath_enabled(False)
        for module, forward in forwards.items():
            module.forward = forward
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            yield
    finally:
        mha.set_fastpath_enabled(fast)
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own


@functools.cache
def _watcher() -> Any:
    """The class of tensors that tell: made at first use, as torch is."""
    import torch

    base: Any = torch.Tensor

    class Watcher(base):
        """A weight that notes its use in a computation."""

        _is_param = True

        def __new__(cls, tensor: Any, number: int, used: set[int]) -> Any:
            made = base._make_subclass(cls, tensor.detach())
            made.number, made.used = number, used
            return made

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(func, "__name__", "")
            asked = name in _HARMLESS and (name != "__get__" or func.__self__.__name__ in _ASKED)
            if not asked:
                for value in _flat((args, kwargs or {})):
                    if isinstance(value, cls):
                        value.used.add(value.number)
            with cast("Any", torch._C).DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    return Watcher


def _flat(values: Any) -> Generator[Any]:
    if isinstance(values, Mapping):
        values = list(cast("Mapping[str, Any]", values).values())
    if isinstance(values, list | tuple):
        for value in cast("list[Any]", values):
            yield from _flat(value)
    else:
        yield values
