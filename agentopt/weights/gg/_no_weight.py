"""What `layer.weight` is in a layer of codes: it can be asked for its type and place, and refuses everything else.

peft, transformers and models ask a linear layer's weight for its number type or device; some write to it (merging an
adapter). The first must get an answer, the second must fail rather than be lost. Only functions that need torch import
this module.
"""

from __future__ import annotations

from typing import Any

import torch

from agentopt.errors import UserError

_ASKED = frozenset(
    {"device", "dtype", "shape", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn", "names"}
)
_PLACES = frozenset({"is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_quantized", "itemsize"})
_HARMLESS = frozenset(
    {"dim", "size", "numel", "is_floating_point", "is_complex", "element_size", "get_device", "__len__"}
)

SENTENCE = (
    "this layer holds 8-bit codes: its weight cannot be read or changed in place, and nothing can be added to it "
    "without loss (found {what}). `layer.dequantize()` gives the weight as a copy. To merge an adapter, save it, load "
    "the 16-bit original (or call `model.dequantize()` before peft is put on the model), load the adapter there, "
    "merge, and quantize again."
)


class NoWeight(torch.Tensor):
    """A weight (out, in) without numbers."""

    @staticmethod
    def __new__(cls: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> NoWeight:
        """Only the attributes are held."""
        make: Any = torch.Tensor._make_wrapper_subclass  # pyright: ignore[reportPrivateUsage]
        return make(cls, shape, dtype=dtype, device=device, requires_grad=False)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what is harmless.

        Raises:
            UserError: anything else.
        """
        name = str(getattr(func, "__name__", func))
        asked = getattr(getattr(func, "__self__", None), "__name__", name) if name in ("__get__", "__set__") else name
        if (name == "__get__" and asked in _ASKED | _PLACES) or name in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
                return func(*args, **(kwargs or {}))
        raise UserError(SENTENCE.format(what=f"`{asked}`"))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise: nothing may be computed with it.

        Raises:
            UserError: always.
        """
        raise UserError(SENTENCE.format(what=f"`{func}`"))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """What print() shows."""
        return f"NoWeight({tuple(self.shape)}, {self.dtype}, {self.device})"
