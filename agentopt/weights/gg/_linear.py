"""Layers that hold codes: `RF8Linear` and, where the head is the embedding, `RF8Embedding`.

Only functions that need torch import this module. Both hold `qweight` uint8 (out, in), `weight_scale` float32 (out, 1)
and, with several books, `book_id` uint8 (out, 1), under the names of the checkpoint. Their `weight` is a `NoWeight`:
what would add to it (merging an adapter) or initialise it must fail rather than be lost.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from agentopt.weights._tiled import TILE, product
from agentopt.weights.gg._checkpoint import BOOK, CODES, SCALE
from agentopt.weights.gg._no_weight import NoWeight

_DIMS = 256


def decode_rows(codes: Tensor, scale: Tensor, table: Tensor, book_id: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`table[book_id, code] * scale` in float32, cast to `dtype`; a tile of rows at a time, so little else is held.

    Args:
        codes: uint8 (out, in).
        scale: float32 (out, 1).
        table: float32 (K, 256).
        book_id: uint8 (out, 1); None for the first book.
        dtype: of the result.
    """
    out, wide = codes.shape
    rows = max(1, TILE // max(1, wide))
    if out <= rows:
        return _decode(codes, scale, table, book_id).to(dtype)
    whole = torch.empty((out, wide), dtype=dtype, device=codes.device)
    for start in range(0, out, rows):
        part = slice(start, start + rows)
        whole[part] = _decode(codes[part], scale[part], table, None if book_id is None else book_id[part])
    return whole


def _decode(codes: Tensor, scale: Tensor, table: Tensor, book_id: Tensor | None) -> Tensor:
    place = codes.to(torch.int32)
    if book_id is not None:
        place = place + book_id.to(torch.int32) * _DIMS
    return table.flatten()[place] * scale


@dataclass(frozen=True, slots=True)
class _Rows:
    """The codes of a layer, widened some rows at a time."""

    codes: Tensor
    scale: Tensor
    table: Tensor
    book_id: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    def tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some rows, widened."""
        book = None if self.book_id is None else self.book_id[start:stop]
        return _decode(self.codes[start:stop], self.scale[start:stop], self.table, book).to(dtype)


class _Codes(nn.Module):
    """What both layers hold, and how it survives `.to(dtype)` and `load_state_dict`."""

    format: str
    compute_dtype: torch.dtype
    qweight: Tensor
    weight_scale: Tensor
    book_id: Tensor | None
    _table: Tensor
    _decoded: Tensor | None
    _stand_in: Tensor | None

    def hold(
        self, codes: Tensor, scale: Tensor, table: Tensor, book_id: Tensor | None, format: str, dtype: torch.dtype
    ) -> None:
        """Register the tensors; the table is not part of the state, for the model's config has it."""
        self.format, self.compute_dtype = format, dtype
        self.register_parameter(CODES, nn.Parameter(codes, requires_grad=False))
        self.register_parameter(SCALE, nn.Parameter(scale, requires_grad=False))
        self.register_parameter(BOOK, None if book_id is None else nn.Parameter(book_id, requires_grad=False))
        self._table, self._decoded, self._stand_in = table, None, None

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            held = self.__dict__.get("_stand_in")
            return NoWeight(self.qweight.shape, self.compute_dtype, self.qweight.device) if held is None else held
        return super().__getattr__(name)

    def pretend(self) -> None:
        """Have a `weight` on `meta` until `reveal`: transformers initialises those of some models by their name.

        It leaves alone what carries its mark of being initialised, and nothing can be written to `meta`.
        """
        self._is_hf_initialized = True
        self._stand_in = torch.empty(self.qweight.shape, device="meta")
        self._stand_in._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]

    def reveal(self) -> None:
        """The `weight` refuses to be used again."""
        self._stand_in = None

    @property
    def table(self) -> Tensor:
        """The values of all codes, (K, 256) float32, where the codes are."""
        if self._table.device != self.qweight.device:
            self._table = self._table.to(self.qweight.device)
        return self._table

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, (out, in): a copy."""
        with torch.no_grad():
            return decode_rows(self.qweight, self.weight_scale, self.table, self.book_id, dtype)

    def forget(self) -> None:
        """Drop the decoded weight: it is decoded again when it is needed."""
        self._decoded = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Only the device may change: a scale in 16 bits, or codes as floats, would be other weights.
        names = [name for name in (CODES, SCALE, BOOK) if getattr(self, name) is not None]
        before = {name: getattr(self, name).detach() for name in names}
        probe = torch.empty(0, dtype=self.compute_dtype, device=before[CODES].device)
        above: Any = super()
        above._apply(fn, recurse)
        for name, tensor in before.items():
            held = getattr(self, name)
            if held.dtype != tensor.dtype:
                held.data = tensor.to(held.device)
        self.compute_dtype = fn(probe).dtype
        self.forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        above: Any = super()
        above._load_from_state_dict(*args, **kwargs)
        self.forget()


class RF8Linear(_Codes, nn.Linear):
    """`y = x W^T + bias`, W as codes. Gradients flow to `x` (twice, too), not to the weight.

    On the CPU the weight is decoded once, in the number type of `x`, and kept beside the codes; with `keep_packed` a
    tile of rows is decoded at every call, which takes less memory and more time. On a GPU the fused kernel decodes in
    registers.

    Args:
        codes: uint8 (out, in).
        scale: float32 (out, 1).
        table: float32 (K, 256), see `_tables.table`.
        book_id: uint8 (out, 1), or None for the first book.
        bias: (out,), or None.
        format: of the codes.
        dtype: in which the model computes.
        keep_packed: memory before speed.
        conv: it stands for the `Conv1D` of transformers, whose weight is (in, out).
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        table: Tensor,
        book_id: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        format: str,
        dtype: torch.dtype = torch.float32,
        keep_packed: bool = False,
        conv: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = (int(size) for size in codes.shape)
        self.keep_packed, self.conv = keep_packed, conv
        self.hold(codes, scale, table, book_id, format, dtype)
        held = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", held)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out), in the type of the input."""
        bias = self._bias(input.dtype)
        if input.is_cuda:
            kernels = _kernels()
            if kernels is not None and kernels.usable(input):
                held = (self.qweight, self.weight_scale, self.table, self.book_id)
                return kernels.linear(input, *held, bias, format=self.format)
        if self.keep_packed:
            y = product(input, _Rows(self.qweight, self.weight_scale, self.table, self.book_id), tile=TILE)
            return y if bias is None else y + bias
        return functional.linear(input, self.decoded(input.dtype), bias)

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        held: Tensor | None = self._parameters["bias"]
        return held if held is None or held.dtype == dtype else held.to(dtype)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, kept for the next call."""
        held = self._decoded
        if held is None or held.dtype != dtype or held.device != self.qweight.device:
            # A weight that was made in inference mode could not be used in training afterwards.
            with torch.inference_mode(False):
                held = self._decoded = self.dequantize(dtype)
        return held

    def extra_repr(self) -> str:
        """What print() shows."""
        bias = self._parameters["bias"] is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, format={self.format}"


class RF8Embedding(_Codes, nn.Embedding):
    """An embedding that is also the head: the codes are shared, and only the rows that are asked for are decoded.

    Args:
        codes, scale, table, book_id, format: as for `RF8Linear`; `out` is the size of the vocabulary.
        dtype: of the result.
        padding_idx: as for `nn.Embedding`; kept, it matters for gradients only.
        factor: what the rows are multiplied by after the cast, in models that scale their embeddings.
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        table: Tensor,
        book_id: Tensor | None = None,
        *,
        format: str,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
        factor: float | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = (int(size) for size in codes.shape)
        self.padding_idx, self.factor = padding_idx, factor
        self.kind: Any = nn.Embedding
        """What it stands for."""
        self.hold(codes, scale, table, book_id, format, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(...) token ids to (..., in)."""
        book = None if self.book_id is None else self.book_id[input]
        rows = _decode(self.qweight[input], self.weight_scale[input], self.table, book).to(self.compute_dtype)
        return rows if self.factor is None else rows * torch.tensor(self.factor, dtype=rows.dtype, device=rows.device)

    def extra_repr(self) -> str:
        """What print() shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}"


_found: list[Any] = []


def _kernels() -> Any:
    """The fused kernels, or None where they cannot be imported (no Triton)."""
    if not _found:
        try:
            _found.append(importlib.import_module("agentopt.weights.gg.kernels"))
        except ImportError:
            _found.append(None)
    return _found[0]


PACKED = (RF8Linear, RF8Embedding)
"""For `isinstance`."""
