"""What packing and unpacking tell: a tensor's coding and size, the sums, the events. No torch here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from agentopt.weights._events import Event

RAW, BYTES, EXP_GOLOMB, RANS, RANS_GG = "raw", "bytes", "exp-golomb", "rans", "rans-gg"
CODINGS = (RAW, BYTES, EXP_GOLOMB, RANS, RANS_GG)
"""As stored; byte planes by rANS (both exact); a grid by exp-Golomb, by rANS with a stored table, or with a GG's."""

DEFAULT_SQNR = 42.0
"""dB. About the error of `rf8-gg`, so that packing and then quantizing costs at most 3 dB of it."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in an archive.

    Attributes:
        name: its name.
        dtype: torch's name of its number type, such as "bfloat16".
        shape: of the tensor.
        coding: one of `CODINGS`.
        step: of the grid; None where it is stored exactly.
        sqnr_db: of the values on the grid against the original, before they are cast to its number type; infinite
            where nothing is lost.
        entropy_bits: bits per weight that a perfect order-0 coder with a free table would take for what is coded.
        stored_bits: bits per weight in the file, tables and lanes included; the index is not.
        bytes: in the file.
        weights: numbers in the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    coding: str
    step: float | None
    sqnr_db: float
    entropy_bits: float
    stored_bits: float
    bytes: int
    weights: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values; an infinite SQNR becomes null."""
        return {**asdict(self), "sqnr_db": self.sqnr_db if math.isfinite(self.sqnr_db) else None}


@dataclass(frozen=True, slots=True)
class PackResult:
    """What was packed.

    Attributes:
        path: the archive.
        tensors: in its order.
        files: names of the small files in it, config.json included.
        bytes_before: of all tensors and files as they were.
        bytes_after: of the archive.
        entropy_bytes: of all tensors, at their entropy (`TensorInfo.entropy_bits`).
        tensor_bytes: of all tensors in the archive; the rest of it is the small files and the index.
        sqnr_db: over all weights together; infinite where nothing is lost.
        seconds: wall clock.
    """

    path: str
    tensors: tuple[TensorInfo, ...]
    files: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    entropy_bytes: float
    tensor_bytes: int
    sqnr_db: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values; an infinite SQNR becomes null."""
        found = asdict(self)
        found["tensors"] = [one.to_dict() for one in self.tensors]
        found["sqnr_db"] = self.sqnr_db if math.isfinite(self.sqnr_db) else None
        return found


@dataclass(frozen=True, slots=True)
class UnpackResult:
    """What was unpacked.

    Attributes:
        path: the archive.
        out: the new folder.
        tensors: names of the tensors in it.
        files: names of the small files in it.
        bytes_before: of the archive.
        bytes_after: of all tensors in the folder.
        seconds: wall clock.
    """

    path: str
    out: str
    tensors: tuple[str, ...]
    files: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TensorPacked(Event):
    """A tensor is in the file."""

    kind: ClassVar[str] = "packed"
    info: TensorInfo
    done: int
    total: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values; an infinite SQNR becomes null."""
        return {"kind": self.kind, **asdict(self), "info": self.info.to_dict()}


@dataclass(frozen=True, slots=True)
class TensorUnpacked(Event):
    """A tensor is in the folder."""

    kind: ClassVar[str] = "unpacked"
    name: str
    bytes: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class TensorVerified(Event):
    """A tensor was read and is whole."""

    kind: ClassVar[str] = "verified"
    name: str
    done: int
    total: int
