"""The index of an archive as JSON, and its checks: nothing in it is believed before it was looked at.

{"format": "ggz", "tensors": [TENSOR, ...], "files": [FILE, ...]}
TENSOR  {"name", "dtype", "shape", "kind": "grid" | "planes" | "raw", "step", "sqnr_db", "entropy_bits", "streams"}
STREAM  {"coding": "raw" | "eg" | "rans" | "gg", "count", "chunks": [[count, offset, length, crc], ...], and
"k" (eg); "low", "bits", "table": [size, k, offset, length, crc] (rans);
"nu", "b", "reach", "bits" (gg); "crc" of the frequencies (rans, gg)}
FILE    {"name", "coding": "raw" | "zlib", "size", "at": [offset, length, crc]}
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast

from agentopt.weights.gg.archive._container import Section
from agentopt.weights.gg.archive._expgolomb import LARGEST_ORDER, lanes
from agentopt.weights.gg.archive._rans import LEAST_BITS, MOST_BITS
from agentopt.weights.gg.archive._streams import LARGEST_CHUNK, Coding
from agentopt.weights.gg.archive._tables import FINEST, LARGEST_NU
from agentopt.weights.gg.archive._types import BYTES, EXP_GOLOMB, RANS, RANS_GG, RAW, TensorInfo

MOST_NUMBERS = 1 << 44
MOST_SYMBOLS = 1 << 16
_CODINGS = {"eg": EXP_GOLOMB, "rans": RANS, "gg": RANS_GG}
# deflate cannot make more out of a byte
_ZLIB_RATIO = 1032

Damaged = Callable[[str], Exception]
"""Makes the error for a reason."""


@dataclass(frozen=True)
class StoredStream:
    """A stream in a file.

    Attributes:
        coding: its kind; the table is not made yet.
        count: symbols.
        chunks: symbols and section of each.
        bits: of the table.
        crc: of the table's frequencies.
        table: size, order and section of a stored one.
        gg: nu, b and reach of a computed one.
    """

    coding: str
    count: int
    chunks: tuple[tuple[int, Section], ...]
    k: int = 0
    low: int = 0
    bits: int = 0
    crc: int = 0
    table: tuple[int, int, Section] | None = None
    gg: tuple[float, float, int] | None = None

    @property
    def sections(self) -> list[Section]:
        """All of it."""
        return [at for _, at in self.chunks] + ([self.table[2]] if self.table else [])


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    info: TensorInfo
    kind: str
    streams: tuple[StoredStream, ...]


@dataclass(frozen=True)
class StoredFile:
    """A small file in an archive."""

    name: str
    coding: str
    size: int
    at: Section


def safe_name(name: str) -> bool:
    """Whether a name is a relative path that stays inside of a folder, on every system."""
    if not name or any(ord(one) < 32 or one in '\\:*?"<>|\x7f' or "\ud800" <= one <= "\udfff" for one in name):
        return False
    if len(name.encode()) > 255:
        return False
    parts = name.split("/")
    return not PurePosixPath(name).is_absolute() and all(
        part not in ("", ".", "..") and not part.endswith((".", " ")) for part in parts
    )


def stream_entry(
    coding: Coding, count: int, chunks: list[tuple[int, Section]], table: Section | None
) -> dict[str, Any]:
    """A stream as it stands in the index."""
    found: dict[str, Any] = {"coding": coding.kind, "count": count}
    if coding.kind == "eg":
        found["k"] = coding.k
    if coding.table is not None:
        found |= {"bits": coding.table.bits, "crc": coding.checksum}
        if coding.gg is not None:
            found |= {"nu": coding.gg[0], "b": coding.gg[1], "reach": -coding.low}
        elif table is not None:
            found |= {"low": coding.low, "table": [len(coding.table.frequencies), coding.k, *table]}
    found["chunks"] = [[number, *at] for number, at in chunks]
    return found


def read_tensors(index: dict[str, Any], sizes: dict[str, int], damaged: Damaged) -> dict[str, StoredTensor]:
    """All tensors of an index.

    Args:
        index: JSON.
        sizes: bytes per number of the number types that are known.
        damaged: makes the error.
    """
    check = Checker(damaged)
    check(index.get("format") == "ggz", "no format")
    found: dict[str, StoredTensor] = {}
    for entry in check.list(index.get("tensors"), "tensors"):
        one = _tensor(check.object(entry, "a tensor"), sizes, check)
        check(one.info.name not in found, f"tensor {one.info.name!r} twice")
        found[one.info.name] = one
    return found


def read_files(index: dict[str, Any], damaged: Damaged) -> dict[str, StoredFile]:
    """All small files of an index."""
    check = Checker(damaged)
    found: dict[str, StoredFile] = {}
    for entry in check.list(index.get("files"), "files"):
        one = check.object(entry, "a file")
        name, coding = check.text(one.get("name"), "a file's name"), one.get("coding")
        check(safe_name(name), f"the file name {name!r}, which could lie outside of the folder")
        check(name.lower() not in {other.lower() for other in found}, f"file {name!r} twice")
        size = check.integer(one.get("size"), "a file's size", 0, 1 << 40)
        at = check.section(check.list(one.get("at"), "a file's place"))
        check(coding in ("raw", "zlib"), f"a file coded by {coding!r}")
        limit = at[1] if coding == "raw" else _ZLIB_RATIO * at[1] + 64
        check(size <= limit and (coding == "zlib" or size == at[1]), f"file {name!r} of {size:,} bytes in {at[1]:,}")
        found[name] = StoredFile(name, str(coding), size, at)
    return found


@dataclass(frozen=True)
class Checker:
    """JSON values of the types that they should have; `damaged` makes the error where they are not."""

    damaged: Damaged

    def __call__(self, held: bool, what: str) -> None:
        if not held:
            raise self.damaged(what)

    def list(self, found: Any, what: str) -> list[Any]:
        self(isinstance(found, list), f"no list of {what}")
        return cast("list[Any]", found)

    def object(self, found: Any, what: str) -> dict[str, Any]:
        self(isinstance(found, dict), f"no object for {what}")
        return cast("dict[str, Any]", found)

    def text(self, found: Any, what: str) -> str:
        self(isinstance(found, str) and 0 < len(found) <= 4096, f"no text for {what}")
        return str(found)

    def integer(self, found: Any, what: str, least: int, most: int) -> int:
        self(type(found) is int and least <= found <= most, f"{what} {found!r}")
        return int(found)

    def number(self, found: Any, what: str, *, positive: bool = True) -> float:
        known = type(found) in (int, float) and math.isfinite(found) and (found > 0 or not positive)
        self(known, f"{what} {found!r}")
        return float(found)

    def section(self, found: list[Any]) -> Section:
        self(len(found) == 3, "a place of other than three numbers")
        offset, length = (self.integer(one, "a place", 0, 1 << 62) for one in found[:2])
        return offset, length, self.integer(found[2], "a checksum", 0, (1 << 32) - 1)


def _tensor(entry: dict[str, Any], sizes: dict[str, int], check: Checker) -> StoredTensor:
    name = check.text(entry.get("name"), "a tensor's name")
    dtype, kind = check.text(entry.get("dtype"), "a number type"), entry.get("kind")
    check(dtype in sizes, f"tensor {name!r} of number type {dtype!r}")
    shape = check.list(entry.get("shape"), "a shape")
    check(len(shape) <= 64, f"tensor {name!r} of {len(shape)} axes")
    axes = tuple(check.integer(one, f"tensor {name!r}: an axis of", 0, MOST_NUMBERS) for one in shape)
    weights = math.prod(axes)
    check(weights <= MOST_NUMBERS, f"tensor {name!r} of {weights:,} numbers")
    streams = tuple(
        _stream(check.object(one, "a stream"), name, check) for one in check.list(entry.get("streams"), "streams")
    )
    size = sizes[dtype]
    expected = {"grid": [weights], "planes": [weights] * size, "raw": [weights * size]}.get(str(kind))
    check(
        expected == [one.count for one in streams], f"tensor {name!r}: streams that do not fit {kind!r} and its shape"
    )
    codings = {one.coding for one in streams}
    fits = {"grid": codings <= {"eg", "rans", "gg"}, "planes": codings <= {"raw", "rans"}, "raw": codings <= {"raw"}}
    check(fits[str(kind)], f"tensor {name!r}: codings that do not fit {kind!r}")
    step = check.number(entry.get("step"), f"tensor {name!r}: a step of") if kind == "grid" else None
    if step is not None and (gg := streams[0].gg) is not None:
        check(1 / FINEST <= gg[1] / step <= FINEST, f"tensor {name!r}: a table with b {gg[1]} on a grid of {step}")
    check(kind != "grid" or (size <= 4 and "float" in dtype and size > 1), f"tensor {name!r}: a grid of {dtype}")
    sqnr = entry.get("sqnr_db")
    bits = check.number(entry.get("entropy_bits"), f"tensor {name!r}: an entropy of", positive=False)
    stored = sum(at[1] for one in streams for at in one.sections)
    info = TensorInfo(
        name=name,
        dtype=dtype,
        shape=axes,
        coding=_CODINGS[streams[0].coding] if kind == "grid" else BYTES if kind == "planes" else RAW,
        step=step,
        sqnr_db=math.inf if sqnr is None else check.number(sqnr, f"tensor {name!r}: an SQNR of", positive=False),
        entropy_bits=bits,
        stored_bits=8 * stored / weights if weights else 0.0,
        bytes=stored,
        weights=weights,
    )
    return StoredTensor(info, str(kind), streams)


def _stream(entry: dict[str, Any], name: str, check: Checker) -> StoredStream:
    coding = entry.get("coding")
    count = check.integer(entry.get("count"), f"tensor {name!r}: a stream of", 0, 8 * MOST_NUMBERS)
    chunks: list[tuple[int, Section]] = []
    for one in check.list(entry.get("chunks"), "chunks"):
        parts = check.list(one, "a chunk's numbers")
        number = check.integer(parts[0] if parts else None, f"tensor {name!r}: a chunk of", 1, LARGEST_CHUNK)
        at = check.section(parts[1:])
        # Every lane has four bytes, exp-Golomb a bit and a raw stream a byte for every symbol.
        least = {"raw": number, "eg": 4 * lanes(number) + number // 8}.get(str(coding), 4 * lanes(number))
        check(at[1] >= least, f"tensor {name!r}: a chunk of {number:,} symbols in {at[1]:,} bytes")
        chunks.append((number, at))
    check(sum(number for number, _ in chunks) == count, f"tensor {name!r}: chunks that do not add up")
    where = f"tensor {name!r}: a table"
    if coding == "raw":
        return StoredStream("raw", count, tuple(chunks))
    if coding == "eg":
        k = check.integer(entry.get("k"), f"tensor {name!r}: the order", 0, LARGEST_ORDER)
        return StoredStream("eg", count, tuple(chunks), k=k)
    check(coding in ("rans", "gg"), f"tensor {name!r}: a stream coded by {coding!r}")
    bits = check.integer(entry.get("bits"), f"{where} of 2^", LEAST_BITS, MOST_BITS)
    crc = check.integer(entry.get("crc"), f"{where} with the checksum", 0, (1 << 32) - 1)
    if coding == "gg":
        nu = check.number(entry.get("nu"), f"{where} with nu")
        b = check.number(entry.get("b"), f"{where} with b")
        check(nu <= LARGEST_NU, f"{where} with nu {nu}")
        reach = check.integer(entry.get("reach"), f"{where} that reaches", 1, 1 << bits - 1)
        return StoredStream("gg", count, tuple(chunks), low=-reach, bits=bits, crc=crc, gg=(nu, b, reach))
    low = check.integer(entry.get("low"), f"{where} from", -MOST_SYMBOLS, MOST_SYMBOLS)
    parts = check.list(entry.get("table"), "a table's numbers")
    check(len(parts) == 5, f"{where} of other than five numbers")
    size = check.integer(parts[0], f"{where} of the size", 1, MOST_SYMBOLS)
    k = check.integer(parts[1], f"{where} of the order", 0, LARGEST_ORDER)
    return StoredStream(
        "rans", count, tuple(chunks), low=low, bits=bits, crc=crc, table=(size, k, check.section(parts[2:]))
    )
