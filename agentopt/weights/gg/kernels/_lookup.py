"""Decoding by table, in torch: the reference, and what runs where there is no Triton.

`weight = table[book_id, code] * scale` in float32, then rounded to the wanted type. One tile of rows at a time, so that
indices and float32 values stay in a cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Weights decoded at a time. On a CPU the indices and values of a tile are 2 MiB."""


def decode(codes: Tensor, scale: Tensor, table: Tensor, book_id: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Decode codes (N, K) with scales (N, 1) and books (B, 256) by looking every code up."""
    height, width = codes.shape
    out = torch.empty((height, width), dtype=dtype, device=codes.device)
    if not codes.numel():
        return out
    flat = table.to(torch.float32).reshape(-1)
    rows = max(1, _TILE.get(codes.device.type, 1 << 24) // width)
    for low in range(0, height, rows):
        part = slice(low, low + rows)
        index = codes[part].to(torch.int32)
        if book_id is not None:
            index += book_id[part].to(torch.int32) * 256
        values = torch.index_select(flat, 0, index.view(-1)).view(index.shape)
        out[part] = values.mul_(scale[part])
    return out
