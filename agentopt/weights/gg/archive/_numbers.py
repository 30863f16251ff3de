"""Tensors as numpy integers and floats, and back. Imports torch: only functions import this module."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentopt.errors import UserError

Array = NDArray[Any]

FLOATS = ("bfloat16", "float16", "float32", "float64")
"""Their bits are turned left by one, so that an exponent begins at the top bit and the sign is the lowest."""
GRIDS = ("bfloat16", "float16", "float32")
"""Number types whose values may be put on a grid."""
SIZES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Number types that an archive holds, with bytes per number."""
_shared: Callable[[Array], Tensor] = cast("Any", torch).from_numpy
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def dtype_name(tensor: Tensor, where: str) -> str:
    """Torch's name of its number type.

    Raises:
        UserError: an archive cannot hold it.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in SIZES:
        raise UserError(f"tensor {where!r}: found the number type {name}, expected one of {', '.join(SIZES)}.")
    if sys.byteorder != "little":
        raise UserError("archives are read and written on little-endian machines only.")
    return name


def flat(tensor: Tensor) -> Tensor:
    """One axis, on the CPU, in memory order."""
    return tensor.detach().cpu().contiguous().reshape(-1)


def bits(numbers: Tensor) -> Array:
    """The bit patterns of a flat tensor, as unsigned integers of its size; shares its memory."""
    size = numbers.element_size()
    return numbers.view(_SIGNED[size]).numpy().view(_UNSIGNED[size])


def floats(numbers: Tensor) -> Array:
    """A flat tensor as float32."""
    return numbers.to(torch.float32).numpy()


def as_tensor(patterns: Array, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of these bit patterns; shares their memory."""
    size = SIZES[dtype]
    signed = _shared(patterns.view(f"i{size}"))
    if dtype == "bool":
        return signed.to(torch.bool).reshape(shape)
    return signed.view(getattr(torch, dtype)).reshape(shape)


def renderer(step: float, dtype: str) -> Callable[[Array], Array]:
    """`q * step` rounded to float32 and then to the number type, as bit patterns; never beyond its largest number."""
    kind = getattr(torch, dtype)
    limit = torch.finfo(kind).max

    def render(symbols: Array) -> Array:
        exact = symbols.astype(np.float64) * step
        single = np.clip(exact, -limit, limit).astype(np.float32)
        return bits(_shared(single).to(kind))

    return render


def patterns(symbols: Array) -> Array:
    """Bytes as they are."""
    return symbols.astype(np.uint8)


def cast_floating(tensor: Tensor, dtype: Any) -> Tensor:
    """In another floating number type; None for its own.

    Raises:
        UserError: the number type is unknown or not a floating one.
    """
    if dtype is None:
        return tensor
    wanted = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise UserError(f"dtype: found {dtype!r}, expected a floating number type such as bfloat16.")
    return tensor.to(wanted) if tensor.is_floating_point() else tensor
