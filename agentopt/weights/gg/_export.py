"""FP8 E4M3 and INT8 with a scale per row, in the layout of compressed-tensors, which transformers and vLLM read.

- `fp8`: `P.weight` float8_e4m3fn (out, in), `P.weight_scale` (out, 1); format "float-quantized".
- `int8`: `P.weight_packed` int32 (out, ceil(in / 4)), four codes in each, the first in the lowest byte, 128 added;
  `P.weight_scale` (out, 1); `P.weight_shape` int64 (2,); format "pack-quantized".
- `int8` with dynamic activations: `P.weight` int8 (out, in), `P.weight_scale` (out, 1); format "int-quantized".

Activations stay in 16 or 32 bits (W8A16), or the loader quantizes them per token as it runs (dynamic, W8A8).

Scales are stored in the number type of the model, and the codes are chosen for the scale that is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from agentopt.errors import UserError
from agentopt.weights.gg._coders import Coded
from agentopt.weights.gg._plan import Layer, Plan
from agentopt.weights.gg._shards import Entry
from agentopt.weights.gg._types import Export

_LARGEST = {"fp8": 448.0, "int8": 127.0}
_SMALLEST = {torch.float16: 2.0**-20}
"""Of the scales; elsewhere the smallest normal float32."""


def export_config(format: Export, ignore: tuple[str, ...], *, dynamic: bool) -> dict[str, Any]:
    """`quantization_config` for config.json.

    Args:
        format: "fp8" or "int8".
        ignore: modules that are not quantized, by their whole names.
        dynamic: activations are quantized per token as the model runs.
    """
    common: dict[str, Any] = {
        "num_bits": 8,
        "type": "float" if format == "fp8" else "int",
        "symmetric": True,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
        "observer_kwargs": {},
    }
    weights = {**common, "strategy": "channel", "dynamic": False, "observer": "minmax"}
    activations = {**common, "strategy": "token", "dynamic": True, "observer": None} if dynamic else None
    packing = "int-quantized" if dynamic else "pack-quantized"
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if format == "fp8" else packing,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def check_exportable(plan: Plan, format: Export, name: str) -> None:
    """Refuse what the stock layout has no place for.

    Raises:
        UserError: Conv1D layers, or a quantized embedding.
    """
    if plan.conv1d:
        raise UserError(
            f"model {name!r}: found Conv1D layers ({next(x for x in plan.layers if x.transposed).name}), which the "
            f"stock format {format} has not; give one of the formats rf8-gg, rf8, e3m4."
        )
    if any(layer.embedding for layer in plan.layers):
        raise UserError(
            f"model {name!r}: the head is the embedding, which the stock format {format} leaves alone; leave head out."
        )


class StockCoder:
    """A scale per row, and the nearest code.

    Args:
        format: "fp8" or "int8".
        dtype: of the stored scales.
        dynamic: activations are quantized as the model runs; `int8` codes are not packed then.
    """

    needs_peak = False

    def __init__(self, format: Export, dtype: torch.dtype, *, dynamic: bool = False) -> None:
        self.format: Export = format
        self.dtype, self.dynamic = dtype, dynamic
        self._packs = format == "int8" and not dynamic

    def entries(self, layer: Layer) -> tuple[Entry, ...]:
        """The tensors of a layer in the file."""
        rows, columns = layer.shape
        scale = Entry(f"{layer.name}.weight_scale", self.dtype, (rows, 1))
        if not self._packs:
            number = torch.float8_e4m3fn if self.format == "fp8" else torch.int8
            return (Entry(f"{layer.name}.weight", number, layer.shape), scale)
        return (
            Entry(f"{layer.name}.weight_packed", torch.int32, (rows, -(-columns // 4))),
            scale,
            Entry(f"{layer.name}.weight_shape", torch.int64, (2,)),
        )

    def encode(self, layer: Layer, weight: Tensor, peak: float | None) -> Coded:
        """Encode rows; a row of zeros has the scale 1."""
        del peak
        limit = _LARGEST[self.format]
        largest = weight.abs().amax(1, keepdim=True)
        scale = (largest / limit).clamp(min=_SMALLEST.get(self.dtype, 2.0**-126))
        scale = torch.where(largest == 0, torch.ones_like(scale), scale).to(self.dtype)
        unit = (weight / scale.float()).clamp(-limit, limit)
        if self.format == "fp8":
            codes = unit.to(torch.float8_e4m3fn)
            return Coded(
                {"weight": codes, "weight_scale": scale}, codes.view(torch.uint8), codes.float() * scale.float()
            )
        codes = unit.round().to(torch.int8)
        parts = {"weight_packed": _packed(codes)} if self._packs else {"weight": codes}
        parts["weight_scale"] = scale
        return Coded(parts, codes.view(torch.uint8), codes.float() * scale.float())

    def whole(self, layer: Layer) -> Mapping[str, Tensor]:
        """The shape, which packing hides."""
        return {"weight_shape": torch.tensor(layer.shape)} if self._packs else {}

    def decode(self, layer: Layer, parts: Mapping[str, Tensor]) -> Tensor:
        """Codes times scale, in float32."""
        scale = parts["weight_scale"].float()
        if not self._packs:
            return parts["weight"].float() * scale
        codes = parts["weight_packed"].contiguous().view(torch.uint8)[:, : layer.shape[1]]
        return (codes.to(torch.int16) - 128).float() * scale


def _packed(codes: Tensor) -> Tensor:
    """int8 (rows, in) as int32 (rows, ceil(in / 4)), little-endian, padded with zero bytes."""
    shifted = (codes.to(torch.int16) + 128).to(torch.uint8)
    return torch.nn.functional.pad(shifted, (0, -codes.shape[1] % 4)).contiguous().view(torch.int32)
