"""A base model in 8 bits, a quarter of the memory of float32: frozen, with float32 adapters on top.

    from agentopt.weights import adapters, int8
    int8.quantize_(model)
    held = adapters.attach(model, rank=8)

Each output row of a linear layer is divided by its largest magnitude and rounded to 255 levels (row-wise absmax, as in
LLM.int8(), arXiv 2208.07339, without its outlier columns): no weight moves by more than half a level of its row. Such
a model is for tuning and measuring in this process; what is saved is the adapter. Importing this loads no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agentopt.errors import UserError
from agentopt.weights.load import need

if TYPE_CHECKING:
    from agentopt.weights._int8_linear import Int8Linear as Int8Linear

__all__ = ["Int8Linear", "quantize_"]


def quantize_(model: Any, skip: Sequence[str] = ("lm_head",)) -> Any:
    """Replace the linear layers by `Int8Linear`, one after the other, and return the model.

    Args:
        model: changed in place: `nn.Linear` and the `Conv1D` of transformers, also under LoRA adapters.
        skip: layers that stay as they are: whole names, or their ends. An output head is best left alone: it is often
            the embedding as well.

    Raises:
        UserError: no layer is left to quantize, or a weight is not finite.
    """
    torch = need("torch")
    from agentopt.weights._int8_linear import Int8Linear, quantized
    from agentopt.weights.adapters._layer import is_conv

    if isinstance(skip, str):
        raise UserError(f"int8: skip is the text {skip!r}, expected a list of names.")
    found = [
        (name, module)
        for name, module in model.named_modules()
        if name
        and (type(module) is torch.nn.Linear or is_conv(module))
        and not any(name == one or name.endswith(f".{one}") for one in skip)
    ]
    if not found:
        raise UserError(f"int8: {type(model).__name__} has no linear layer to quantize (skipped: {', '.join(skip)}).")
    for name, module in found:
        if not bool(torch.isfinite(module.weight).all()):
            raise UserError(f"int8: {name} has weights that are not finite; the model was damaged before.")
    modules: list[Any] = [module for _, module in found]
    names = [name for name, _ in found]
    del found
    for name in names:
        old = modules.pop(0)
        codes, scales = quantized(old.weight.mT if is_conv(old) else old.weight)
        parent, _, last = name.rpartition(".")
        new = Int8Linear(codes.contiguous(), scales, None if old.bias is None else old.bias.detach())
        setattr(model.get_submodule(parent), last, new.train(old.training))
    return model


def __getattr__(name: str) -> object:
    if name == "Int8Linear":
        need("torch")
        return importlib.import_module("agentopt.weights._int8_linear").Int8Linear
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
