"""The operators as torch knows them: schema, shapes for tracing, gradients.

They are defined once per process however often this module is imported. torch keeps them; the module does not own them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import library as torch_operators

from agentopt.errors import UserError
from agentopt.weights.gg._types import FORMATS
from agentopt.weights.gg.kernels import _dispatch

_LINEAR, _DECODE = "agentopt_gg::linear", "agentopt_gg::decode"
_WEIGHT = "Tensor codes, Tensor scale, Tensor table, Tensor? book_id"


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    table: Tensor,
    book_id: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    format: str,
) -> Tensor:
    """A linear layer at a decoded weight: `x @ (table[book_id, codes] * scale)^T + bias`.

    On a GPU the sum runs over unscaled weights in float32 and is scaled at its end, so it differs from the reference in
    the rounding of 16-bit weights; elsewhere it is `F.linear` at the decoded weight. Deterministic.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 too, without kernels).
        codes: uint8 (N, K).
        scale: float32 (N, 1).
        table: float32 (B, 256), of `_tables.table`.
        book_id: uint8 (N, 1), below B; None for one book.
        bias: (N,) or None.
        format: one of `FORMATS`; the formula of a format without books is used in place of the table.

    Returns:
        (..., N) of the type of `x`.

    Raises:
        UserError: an unknown format, or shapes that do not belong together.
    """
    _check(codes, scale, table, book_id, format)
    if x.shape[-1] != codes.shape[1]:
        raise UserError(f"x: found {x.shape[-1]} values per row, expected {codes.shape[1]}, the columns of the codes.")
    return torch.ops.agentopt_gg.linear(x, codes, scale, table, book_id, bias, format)


def decode(
    codes: Tensor,
    scale: Tensor,
    table: Tensor,
    book_id: Tensor | None = None,
    *,
    dtype: torch.dtype,
    format: str,
) -> Tensor:
    """The decoded weight, (N, K) of `dtype`: `table[book_id, codes] * scale` in float32, then rounded; exactly that.

    Arguments as in `linear`.

    Raises:
        UserError: an unknown format, or shapes that do not belong together.
    """
    _check(codes, scale, table, book_id, format)
    return torch.ops.agentopt_gg.decode(codes, scale, table, book_id, dtype, format)


def _check(codes: Tensor, scale: Tensor, table: Tensor, book_id: Tensor | None, format: str) -> None:
    if format not in FORMATS:
        raise UserError(f"format: found {format!r}, expected {', '.join(FORMATS)}.")
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise UserError(f"codes: found {codes.dtype} of {codes.dim()} dimensions, expected uint8 (out, in).")
    rows = (codes.shape[0], 1)
    if scale.shape != rows or scale.dtype != torch.float32:
        raise UserError(f"scale: found {scale.dtype} {tuple(scale.shape)}, expected float32 {rows}.")
    if table.dim() != 2 or table.shape[1] != 256:
        raise UserError(f"table: found {tuple(table.shape)}, expected (books, 256).")
    if book_id is not None and (book_id.shape != rows or book_id.dtype != torch.uint8):
        raise UserError(f"book_id: found {book_id.dtype} {tuple(book_id.shape)}, expected uint8 {rows}.")


def _linear_shape(
    x: Tensor, codes: Tensor, scale: Tensor, table: Tensor, book_id: Tensor | None, bias: Tensor | None, format: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _decode_shape(
    codes: Tensor, scale: Tensor, table: Tensor, book_id: Tensor | None, dtype: torch.dtype, format: str
) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, codes, scale, table, book_id, bias, ctx.format = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(codes, scale, table, book_id)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The layer is linear in `x`: its gradient is a product with the decoded weight, itself differentiable."""
    codes, scale, table, book_id = ctx.saved_tensors
    by_x = by_bias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.agentopt_gg.decode(codes, scale, table, book_id, gradient.dtype, ctx.format)
        by_x = gradient @ weight
    if ctx.needs_input_grad[5]:
        by_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias)
    return by_x, None, None, None, None, by_bias, None


def _register() -> None:
    """Define both operators, unless another import of this module did."""
    if hasattr(torch.ops.agentopt_gg, "linear"):
        return
    operators: Any = torch_operators
    tags = (torch.Tag.pt2_compliant_tag,)
    operators.define(_DECODE, f"({_WEIGHT}, ScalarType dtype, str format) -> Tensor", tags=tags)
    operators.define(_LINEAR, f"(Tensor x, {_WEIGHT}, Tensor? bias, str format) -> Tensor", tags=tags)
    devices = ("cpu", "cuda")
    operators.impl(_DECODE, devices, _dispatch.decode)
    operators.impl(_LINEAR, devices, _dispatch.linear)
    operators.register_fake(_DECODE, _decode_shape)
    operators.register_fake(_LINEAR, _linear_shape)
    operators.register_autograd(_LINEAR, _backward, setup_context=_remember)


_register()
