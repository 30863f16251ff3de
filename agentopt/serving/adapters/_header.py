"""The header of a safetensors file, read without torch: what tensors there are, and whether the file is whole.

A file is eight bytes of length, so many bytes of JSON, then the tensors' bytes. Everything that the header says is
checked against the file before any of it is believed: a header longer than the file, tensors that overlap, that leave
gaps, that end after the file's end, or whose bytes do not match their shape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError

BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32},
    **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Bits of one number of each type that the format names."""
LONGEST_HEADER = 100_000_000
"""Bytes; the format's own bound."""
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file, without its numbers."""

    dtype: str
    """As the format names it: F32, BF16, U8, ..."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    stop: int


def read_header(path: Path) -> dict[str, Tensor]:
    """Name and place of every tensor in a safetensors file.

    Raises:
        UserError: the file cannot be read, was cut off, or is no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            lead = file.read(8)
            length = int.from_bytes(lead, "little")
            if len(lead) < 8 or length > min(size - 8, LONGEST_HEADER):
                raise UserError(_damaged(path, f"its header would be {length:,} bytes, the file has {size:,}"))
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    try:
        found: Any = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise UserError(_damaged(path, "its header is not JSON")) from None
    if not isinstance(found, dict):
        raise UserError(_damaged(path, "its header is no JSON object"))
    held = cast("dict[str, Any]", found)
    tensors = {name: _tensor(path, name, about, 8 + length) for name, about in held.items() if name != "__metadata__"}
    _check_places(path, tensors, 8 + length, size)
    return tensors


def chunks(path: Path, tensor: Tensor) -> Generator[bytes]:
    """The bytes of one tensor, at most 4 MB at a time.

    Raises:
        UserError: the file is shorter than it was.
    """
    with path.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.stop - tensor.start
        while left:
            part = file.read(min(left, _CHUNK))
            if not part:
                raise UserError(_damaged(path, "it was cut off while it was read"))
            left -= len(part)
            yield part


def is_finite(path: Path, tensor: Tensor) -> bool:
    """Whether no number of a tensor in 16, 32 or 64 bits is NaN or infinite; other types have neither here."""
    import numpy as np

    kinds: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    kind = kinds.get(tensor.dtype)
    if kind is None:
        return True
    for part in chunks(path, tensor):
        numbers: Any = np.frombuffer(part, dtype=kind)
        # The exponent of a bfloat16 is all ones exactly where a number is infinite or NaN.
        if tensor.dtype == "BF16" and bool(((numbers & 0x7F80) == 0x7F80).any()):
            return False
        if tensor.dtype != "BF16" and not bool(np.isfinite(numbers).all()):
            return False
    return True


def _tensor(path: Path, name: str, about: Any, offset: int) -> Tensor:
    try:
        dtype, shape, (start, stop) = about["dtype"], about["shape"], about["data_offsets"]
        numbers = [*shape, start, stop]
    except (TypeError, KeyError, ValueError):
        raise UserError(_damaged(path, f"its header says of {name!r:.120} what a tensor is not")) from None
    whole = all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 1 << 62 for one in numbers)
    if not whole or not isinstance(dtype, str) or dtype not in BITS:
        raise UserError(_damaged(path, f"the type, shape or place of {name!r:.120} is none"))
    if (stop - start) * 8 != math.prod(shape) * BITS[dtype]:
        raise UserError(_damaged(path, f"{name!r:.120} has {stop - start:,} bytes, which is not its shape in {dtype}"))
    return Tensor(dtype, tuple(shape), offset + start, offset + stop)


def _check_places(path: Path, tensors: dict[str, Tensor], offset: int, size: int) -> None:
    """Tensors lie one after another to the end of the file."""
    place = offset
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != place:
            raise UserError(_damaged(path, f"{name!r:.120} does not begin where the tensor before it ends"))
        place = tensor.stop
    if place != size:
        raise UserError(_damaged(path, f"its tensors end at byte {place:,}, the file at {size:,}"))


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _damaged(path: Path, why: str) -> str:
    return f"{path}: no whole safetensors file ({why}); copy it again."
