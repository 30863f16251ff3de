"""From rows of a weight to the tensors that are stored for it: one coder per target format.

A coder sees some rows at a time, so a tensor never has to be in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from agentopt.weights.gg import _codec
from agentopt.weights.gg._checkpoint import BOOK, CODES, SCALE
from agentopt.weights.gg._plan import Layer
from agentopt.weights.gg._shards import Entry
from agentopt.weights.gg._types import Encoded, Format, Scale


@dataclass(frozen=True, slots=True)
class Coded:
    """Rows of a weight, encoded.

    Attributes:
        parts: tensors to store, by the end of their name; their first axis is the rows.
        codes: one byte per weight, as the file holds them.
        decoded: float32 (rows, in): what a loader computes from them.
    """

    parts: Mapping[str, Tensor]
    codes: Tensor
    decoded: Tensor


class Coder(Protocol):
    """How the weights of one format are stored."""

    @property
    def needs_peak(self) -> bool:
        """Whether `encode` must be told the largest magnitude of the whole tensor."""
        ...

    def entries(self, layer: Layer) -> tuple[Entry, ...]:
        """The tensors of a layer in the file."""
        ...

    def encode(self, layer: Layer, weight: Tensor, peak: float | None) -> Coded:
        """Encode float32 rows (rows, in)."""
        ...

    def whole(self, layer: Layer) -> Mapping[str, Tensor]:
        """Parts that belong to the layer and not to its rows."""
        ...

    def decode(self, layer: Layer, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight, float32 (out, in), from all stored parts."""
        ...


class OwnCoder:
    """rf8, rf8-strict, e3m4 and rf8-gg.

    Args:
        format: of all layers.
        scale: how scales are chosen.
        books: (K, 256), for `rf8-gg`.
        columns: what a squared error counts, per input column of a layer; by the layer's name.
    """

    def __init__(
        self,
        format: Format,
        scale: Scale = "channel",
        books: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.format: Format = format
        self.scale: Scale = scale
        self.books = books
        self._columns = columns or {}

    @property
    def needs_peak(self) -> bool:
        """One scale for the tensor depends on all rows."""
        return self.scale == "tensor_pow2"

    def entries(self, layer: Layer) -> tuple[Entry, ...]:
        """Codes, scales, and book ids where there are several books."""
        rows = layer.shape[0]
        found = [
            Entry(f"{layer.name}.{CODES}", torch.uint8, layer.shape),
            Entry(f"{layer.name}.{SCALE}", torch.float32, (rows, 1)),
        ]
        if self.books is not None and len(self.books) > 1:
            found.append(Entry(f"{layer.name}.{BOOK}", torch.uint8, (rows, 1)))
        return tuple(found)

    def encode(self, layer: Layer, weight: Tensor, peak: float | None) -> Coded:
        """Encode rows."""
        rows = len(weight)
        if peak is not None:
            # A row more that holds the tensor's largest magnitude gives these rows the scale of the whole tensor.
            weight = torch.cat([weight, torch.full_like(weight[:1], peak)])
        found = _codec.encode(
            weight,
            self.format,
            scale=self.scale,
            books=self.books,
            column_weight=self._columns.get(layer.name),
            name=layer.tensor,
        )
        decoded = _codec.decode(found)[:rows]
        codes = found.codes[:rows]
        scale = found.scale.expand(len(weight), 1)[:rows].contiguous()
        parts = {CODES: codes, SCALE: scale}
        if found.book_id is not None:
            parts[BOOK] = found.book_id[:rows]
        return Coded(parts, codes, decoded)

    def whole(self, layer: Layer) -> Mapping[str, Tensor]:
        """Nothing."""
        del layer
        return {}

    def decode(self, layer: Layer, parts: Mapping[str, Tensor]) -> Tensor:
        """The codec's decode."""
        del layer
        books = parts.get(BOOK)
        return _codec.decode(Encoded(parts[CODES], parts[SCALE], self.format, 0, self.books, books))
