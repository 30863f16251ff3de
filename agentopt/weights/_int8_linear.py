"""A frozen linear layer of 8-bit codes. Only functions that need torch import this module."""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from torch import Tensor, nn

TILE = 1 << 20
"""Weights that are widened at a time: 4 MB of float32, which stay in the cache."""
_local = threading.local()


class Int8Linear(nn.Module):
    """`y = x W^T + bias` with W as codes from -127 to 127 and one float32 scale per output row.

    The weight is never whole in memory: a tile of rows is widened into a scratch that all layers of a thread reuse.
    Gradients flow to `x` (twice, too), not to the weight. `codes` and `scales` are buffers; there is no `weight`.
    """

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = (int(size) for size in codes.shape)
        self.codes: Tensor
        self.scales: Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, in the type of `x`."""
        y = _product(x, self.codes, self.scales, False)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, (out, in) in float32."""
        return self.codes * self.scales

    def extra_repr(self) -> str:
        """What print() shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """x W^T, or x W when `back`: each is the derivative of the other, so it can be differentiated again and again."""

    @staticmethod
    def forward(x: Tensor, codes: Tensor, scales: Tensor, back: bool) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = flat.new_zeros(flat.shape[0], codes.shape[1]) if back else flat.new_empty(flat.shape[0], codes.shape[0])
        rows = max(1, TILE // codes.shape[1])
        for start in range(0, codes.shape[0], rows):
            tile = _widened(codes[start : start + rows], scales[start : start + rows], x.dtype)
            if back:
                y.addmm_(flat[:, start : start + rows], tile)
            else:
                y[:, start : start + rows] = flat @ tile.mT
        return y.reshape(*x.shape[:-1], y.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.codes, ctx.scales, ctx.back = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _product(grads[0], ctx.codes, ctx.scales, not ctx.back), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        # Only x can vary, and any number of leading axes will do.
        return _product(args[0].movedim(in_dims[0], 0), *args[1:]), 0


def _product(x: Any, codes: Any, scales: Any, back: bool) -> Any:
    return cast(Any, _Product).apply(x, codes, scales, back)


def _widened(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The tile's weights in this thread's scratch: good until the next call."""
    scratches: dict[Any, Tensor] = _local.__dict__.setdefault("scratches", {})
    key = (codes.device, dtype)
    scratch = scratches.get(key)
    if scratch is None or scratch.numel() < codes.numel():
        scratch = scratches[key] = torch.empty(max(TILE, codes.numel()), dtype=dtype, device=codes.device)
    tile = scratch[: codes.numel()].view(codes.shape)
    return torch.mul(codes, scales, out=tile)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight (out, in): the largest magnitude of a row becomes 127."""
    wide = weight.detach().float()
    scales = wide.abs().amax(dim=1, keepdim=True) / 127
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return torch.round(wide / scales).clamp_(-127, 127).to(torch.int8), scales
