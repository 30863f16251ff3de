"""Which way a layer is computed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from agentopt.weights.gg.kernels import _lookup


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can work on this tensor: on CUDA with Triton (or in its interpreter, for tests)."""
    return False


def decode(
    codes: Tensor, scale: Tensor, table: Tensor, book_id: Tensor | None, dtype: torch.dtype, format: str
) -> Tensor:
    """The weight, (N, K)."""
    return _lookup.decode(codes, scale, table, book_id, dtype)


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    table: Tensor,
    book_id: Tensor | None,
    bias: Tensor | None,
    format: str,
) -> Tensor:
    """The layer's output, (..., N)."""
    weight = decode(codes, scale, table, book_id, x.dtype, format)
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
