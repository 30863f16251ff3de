"""Which way a layer is computed: by the number of tokens, in plain integers, so that a CUDA graph keeps the choice.

With 16-bit activations,
- up to `FEW` tokens reading the weights is what takes the time: decoded in registers, multiplied by tensor cores;
- up to `TILED` tokens in tiles, decoded again for every tile of tokens;
- above it decoded once to a scratch in the layer's type, slice by slice, and multiplied by torch.

Where the kernels cannot run, torch decodes and multiplies.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from agentopt.weights.gg.kernels import _lookup

FEW, TILED = 32, 256
SCRATCH_BYTES = 32 << 20
"""Size of a slice of decoded weights: it stays in the cache of a large GPU, and is enough work for all its units."""

GATHERED_BOOKS = 16
"""Books that a program holds; with more of them every value is loaded by itself."""

_WARPS = 12
"""Warps per multiprocessor that the columns are shared out for, where rows and tokens alone give fewer."""

_TRITON = importlib.util.find_spec("triton") is not None

_FORMATS = {"rf8": 0, "rf8-strict": 0, "e3m4": 1, "rf8-gg": 2}


@dataclass(frozen=True, slots=True)
class Config:
    """How one product is cut up.

    Attributes:
        way: the kernel, or "scratch".
        out: rows of weights of a program.
        tokens: tokens of a program.
        columns: columns of a step of one part.
        parts: warps of a program; each has columns of its own in "few".
        stages: steps whose loads are under way.
        split: programs that share the columns; 0 to choose it by the size of the GPU.
    """

    way: Literal["few", "tiled", "scratch"]
    out: int = 0
    tokens: int = 0
    columns: int = 0
    parts: int = 4
    stages: int = 4
    split: int = 0


CONFIGS: list[tuple[int, Config]] = [
    (4, Config("few", out=16, tokens=8, columns=64, parts=8)),
    (8, Config("few", out=32, tokens=8, columns=64, parts=8, stages=3)),
    (16, Config("few", out=32, tokens=16, columns=64, parts=8, stages=3)),
    (FEW, Config("few", out=64, tokens=32, columns=64, parts=4, stages=3)),
    (64, Config("tiled", out=128, tokens=64, columns=64, parts=4)),
    (TILED, Config("tiled", out=128, tokens=128, columns=64, parts=8, stages=3)),
]
"""By the greatest number of tokens; more tokens go by scratch. Chosen from compiled code, not from timings."""

EXACT_CONFIGS: list[tuple[int, Config]] = [
    (4, Config("few", out=16, tokens=8, columns=64, parts=8, stages=2)),
    (8, Config("few", out=32, tokens=8, columns=64, parts=8, stages=2)),
]
"""For float32, which tensor cores do not take: more tokens go by scratch."""

OVERRIDES: dict[tuple[int, int, int], Config] = {}
"""By (tokens, rows, columns) of a product: taken instead, to measure and to tune. No effect on results but rounding."""


def choose(tokens: int, height: int, width: int, units: int, exact: bool = False) -> Config:
    """The way a product is computed.

    Args:
        tokens: rows of the input.
        height: rows of the weight.
        width: its columns.
        units: multiprocessors of the GPU.
        exact: float32 operands.
    """
    found = OVERRIDES.get((tokens, height, width))
    if found is None:
        table = EXACT_CONFIGS if exact else CONFIGS
        found = next((config for most, config in table if tokens <= most), Config("scratch"))
    if found.way == "scratch" or found.split:
        return found
    programs = -(-height // found.out) * -(-tokens // found.tokens)
    split, steps = 1, -(-width // _step(found))
    while split < 8 and programs * found.parts * split < _WARPS * units and steps >= 4 * split:
        split *= 2
    return replace(found, split=split)


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can work on such an input: on CUDA with Triton (or in its interpreter, for tests).

    torch.compile may trace it. The GPU has to be one of NVIDIA's that knows bfloat16 (compute capability 8.0).
    """
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not _TRITON:
        return False
    return _interpreted() or (tensor.is_cuda and _able(tensor.device))


def decode(
    codes: Tensor, scale: Tensor, table: Tensor, book_id: Tensor | None, dtype: torch.dtype, format: str
) -> Tensor:
    """The weight, (N, K)."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if not usable(out):
        return _lookup.decode(codes, scale, table, book_id, dtype)
    _decode(codes.contiguous(), scale.contiguous(), table.contiguous(), _plain(book_id), out, format)
    return out


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
    if not usable(x):
        weight = _lookup.decode(codes, scale, table, book_id, x.dtype)
        return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    height, width = codes.shape
    out = torch.empty((*x.shape[:-1], height), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    if not width:
        return out.zero_() if bias is None else out.copy_(bias)
    flat = x.reshape(-1, width)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    weight = (codes.contiguous(), scale.contiguous(), table.contiguous(), _plain(book_id))
    config = choose(len(flat), height, width, _units(x.device), x.dtype == torch.float32)
    (_by_scratch if config.way == "scratch" else _fused)(
        flat, weight, _plain(bias), out.view(-1, height), format, config
    )
    return out


_Weight = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _fused(flat: Tensor, weight: _Weight, bias: Tensor | None, out: Tensor, format: str, config: Config) -> None:
    kernels: Any = importlib.import_module("agentopt.weights.gg.kernels._triton")
    codes, scale, table, book_id = weight
    (tokens, width), height = flat.shape, codes.shape[0]
    step = _step(config)
    steps = -(-width // (step * config.split))
    parts = out
    if config.split > 1:
        parts = torch.empty((config.split, tokens, height), dtype=torch.float32, device=flat.device)
    exact = flat.dtype == torch.float32 or _interpreted()
    words = not exact
    unit = _rf8_unit(flat.dtype) if words and _FORMATS[format] == 0 else 1.0
    cut = {"PARTS": config.parts} if config.way == "few" else {}
    grid = (-(-height // config.out), -(-tokens // config.tokens), config.split)
    with _on(flat):
        getattr(kernels, f"{config.way}_kernel")[grid](
            *(flat, codes, scale, table, book_id, bias, parts),
            *(tokens, height, width, flat.stride(0), steps, len(table), unit),
            FORMAT=_FORMATS[format],
            WORDS=words,
            EXACT=exact,
            **_books(table, book_id),
            BIAS=bias is not None,
            EVEN=width == steps * step * config.split,
            SPLIT=config.split,
            OUT=config.out,
            TOKENS=config.tokens,
            COLUMNS=config.columns,
            STAGES=config.stages,
            **cut,
            num_warps=config.parts,
        )
        if config.split > 1:
            kernels.finish_kernel[(-(-height // 512), tokens)](
                *(parts, scale, bias, out, tokens, height, unit),
                BIAS=bias is not None,
                SPLIT=config.split,
                BLOCK=512,
                num_warps=4,
            )


def _by_scratch(flat: Tensor, weight: _Weight, bias: Tensor | None, out: Tensor, format: str, _config: Config) -> None:
    """The scratch is torch's to reuse: from call to call, and within a CUDA graph."""
    codes, scale, table, book_id = weight
    height, width = codes.shape
    rows = min(height, max(128, SCRATCH_BYTES // (width * flat.element_size()) // 128 * 128))
    scratch = torch.empty((rows, width), dtype=flat.dtype, device=flat.device)
    for low in range(0, height, rows):
        part = slice(low, min(low + rows, height))
        decoded = scratch[: part.stop - low]
        _decode(codes[part], scale[part], table, None if book_id is None else book_id[part], decoded, format)
        if bias is None:
            torch.mm(flat, decoded.t(), out=out[:, part])
        else:
            torch.addmm(bias[part].to(flat.dtype), flat, decoded.t(), out=out[:, part])


def _decode(codes: Tensor, scale: Tensor, table: Tensor, book_id: Tensor | None, out: Tensor, format: str) -> None:
    kernels: Any = importlib.import_module("agentopt.weights.gg.kernels._triton")
    height, width = codes.shape
    if not codes.numel():
        return
    rows, columns = (16, 256) if width > 128 else (32, 128)
    with _on(out):
        kernels.decode_kernel[(-(-height // rows), -(-width // columns))](
            *(codes, scale, table, book_id, out, height, width, len(table)),
            FORMAT=_FORMATS[format],
            **_books(table, book_id),
            ROWS=rows,
            COLUMNS=columns,
            ROUND=out.dtype == torch.bfloat16 and _interpreted(),
            num_warps=4,
        )


def _rf8_unit(dtype: torch.dtype) -> float:
    units: dict[str, float] = importlib.import_module("agentopt.weights.gg.kernels._values").RF8_UNIT
    return units[str(dtype).removeprefix("torch.")]


def _step(config: Config) -> int:
    """Columns of a program's step."""
    return config.columns * (config.parts if config.way == "few" else 1)


def _books(table: Tensor, book_id: Tensor | None) -> dict[str, Any]:
    count = 1 if book_id is None else len(table)
    padded = 1 << (count - 1).bit_length()
    return {
        "ONE_BOOK": book_id is None,
        "GATHER": count <= GATHERED_BOOKS,
        "BOOKS_PADDED": min(padded, GATHERED_BOOKS),
    }


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _able(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _units(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    cuda: Any = torch.cuda
    return int(cuda.get_device_properties(device).multi_processor_count)


def _on(tensor: Tensor) -> Any:
    """Kernels are launched on the current device."""
    return torch.cuda.device_of(tensor)
