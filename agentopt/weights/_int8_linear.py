"""A frozen linear layer of 8-bit codes. Only functions that need torch import this module."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agentopt.weights._tiled import TILE as TILE
from agentopt.weights._tiled import product

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
        y = product(x, _Codes(self.codes, self.scales), tile=TILE)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, (out, in) in float32."""
        return self.codes * self.scales

    def extra_repr(self) -> str:
        """What print() shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@dataclass(frozen=True, slots=True)
class _Codes:
    """The weight as it is held."""

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    def tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some rows, widened."""
        return _widened(self.codes[start:stop], self.scales[start:stop], dtype)


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
