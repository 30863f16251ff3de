"""The batched LoRA layer: `y = x W + s (x A_b) B_b`, every row of a batch with an adapter of its own.

Only functions that need torch import this module. LoRA: arXiv 2106.09685. The same layer serves three things: several
adapters at once (serving), perturbed factors (zeroth-order tuning) and factors that are the result of other
computations (folding): the factors are arguments of `functional`, and everything here can be differentiated twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from agentopt.errors import UserError


def lora_delta(x: Tensor, a: Tensor, b: Tensor, index: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """`scale * (x a^T) b^T`, computed with the adapter of each row.

    Args:
        x: (rows, ..., in).
        a: (adapters, rank, in), or (rank, in) for one.
        b: (adapters, out, rank), or (out, rank) for one. One of `a` and `b` may be one while the other is several.
        index: the adapter of each row, of shape (rows,), or of each of equal chunks of consecutive rows (beams);
            None splits the rows into one equal chunk per adapter, in order.
        scale: alpha / rank.

    Returns:
        (rows, ..., out), differentiable (also twice, also under torch.func) in x, a and b.
    """
    a = a.unsqueeze(0) if a.dim() == 2 else a
    b = b.unsqueeze(0) if b.dim() == 2 else b
    adapters = max(a.shape[0], b.shape[0])
    if adapters == 1:
        return (x @ a[0].mT * scale) @ b[0].mT
    a, b = a.expand(adapters, -1, -1), b.expand(adapters, -1, -1)
    if index is not None:
        # The factors of a row are copied for it: small beside the row's activations unless tokens < rank.
        a, b = a[index], b[index]
    chunks = a.shape[0]
    if x.shape[0] % chunks:
        what = f"{adapters} adapters" if index is None else f"an index of {chunks} rows"
        raise UserError(f"adapters: found a batch of {x.shape[0]} rows for {what}; expected a multiple of {chunks}.")
    grouped = x.reshape(chunks, -1, x.shape[-1])
    delta = torch.bmm(torch.bmm(grouped, a.mT) * scale, b.mT)
    return delta.reshape(*x.shape[:-1], b.shape[1])


class Selection:
    """Which adapter each row uses; one object that all layers of a model share."""

    index: Tensor | None = None


class LoraLinear(nn.Module):
    """A frozen linear layer and the float32 factors of `copies` adapters.

    `base` is any module with `in_features` and `out_features` (`nn.Linear`, `Int8Linear`, `RF8Linear`, those of
    bitsandbytes) or the `Conv1D` of transformers. With one copy the parameters are matrices, `lora_A` (rank, in) and
    `lora_B` (out, rank); with several they have a first axis, (copies, rank, in) and (copies, out, rank). Both start at
    zero: `attach` fills `lora_A`.

    Args:
        base: the layer that is wrapped.
        rank: columns of the factors.
        alpha: the adapters' output is multiplied by `alpha / rank`.
        dropout: share of the adapters' inputs that is dropped in training mode.
        copies: adapters that are held side by side.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, copies: int = 1) -> None:
        super().__init__()
        self.in_features, self.out_features = sizes(base)
        self.rank, self.alpha, self.copies = rank, alpha, copies
        self.base = base
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        front = () if copies == 1 else (copies,)
        where = _device(base)
        self.lora_A = nn.Parameter(torch.zeros(*front, rank, self.in_features, device=where))
        self.lora_B = nn.Parameter(torch.zeros(*front, self.out_features, rank, device=where))
        self.selection = Selection()
        self.override: tuple[Tensor, Tensor] | None = None

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank

    @property
    def weight(self) -> Any:
        """The base's weight: some models ask their layers for its type."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The base's bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """The layer with its own factors, or with those that `Adapters.use` put in their place."""
        a, b = (self.lora_A, self.lora_B) if self.override is None else self.override
        return self.functional(x, a, b, self.selection.index)

    def functional(self, x: Tensor, a: Tensor, b: Tensor, index: Tensor | None = None) -> Tensor:
        """The layer with the factors `a` and `b`; see `lora_delta` for their shapes and for `index`."""
        y = self.base(x)
        number = torch.promote_types(x.dtype, a.dtype)
        delta = lora_delta(self.dropout(x).to(number), a.to(number), b.to(number), index, self.scale)
        if y.dtype == delta.dtype and not torch.is_grad_enabled():
            return y.add_(delta)  # one activation less at the peak
        return (y + delta).to(y.dtype)

    def extra_repr(self) -> str:
        """What print() shows."""
        return f"rank={self.rank}, alpha={self.alpha}, copies={self.copies}"


def sizes(base: Any) -> tuple[int, int]:
    """Features in and out of a linear layer."""
    if is_conv(base):
        return int(base.nx), int(base.nf)
    return int(base.in_features), int(base.out_features)


def is_conv(module: Any) -> bool:
    """Whether this is the `Conv1D` of transformers (GPT-2), whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def is_linear(module: Any) -> bool:
    """Whether `LoraLinear` can wrap it."""
    known = isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )
    return (known or is_conv(module)) and not isinstance(module, LoraLinear)


def _device(base: nn.Module) -> torch.device:
    for tensor in (*base.parameters(), *base.buffers()):
        return tensor.device
    return torch.device("cpu")
