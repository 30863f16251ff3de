"""Safetensors files written piece by piece: the layout is known before the first byte, so nothing is held in memory.

    for file, entries in layout(groups, shard_bytes=1 << 30).items():
        with ShardWriter(folder / file, entries) as writer:
            writer.put("layer.qweight", rows, start=0)

A file appears under its name when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from agentopt.errors import RunError, UserError
from agentopt.weights.gg._source import INDEX, SINGLE

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def layout(groups: Iterable[Sequence[Entry]], shard_bytes: int) -> dict[str, tuple[Entry, ...]]:
    """Files with the tensors in each; a group (the parts of one layer) stays in one file.

    Args:
        groups: in the order in which they are written.
        shard_bytes: a file above this size is begun only by a single group that is larger.
    """
    shards: list[list[Entry]] = [[]]
    size = 0
    for group in groups:
        more = sum(entry.bytes for entry in group)
        if shards[-1] and size + more > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].extend(group)
        size += more
    if len(shards) == 1:
        return {SINGLE: tuple(shards[0])}
    total = len(shards)
    return {f"model-{place:05d}-of-{total:05d}.safetensors": tuple(one) for place, one in enumerate(shards, 1)}


def write_index(folder: Path, shards: dict[str, tuple[Entry, ...]]) -> None:
    """The index of several files; nothing for a single one."""
    if len(shards) == 1:
        return
    total = sum(entry.bytes for entries in shards.values() for entry in entries)
    places = {entry.name: file for file, entries in shards.items() for entry in entries}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_file(folder / INDEX, (json.dumps(content, indent=2) + "\n").encode())


class ShardWriter:
    """One safetensors file. It takes its name when the writer is left without an error."""

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + ".new")
        # Large numbers first, so that every tensor starts at a multiple of its number's size.
        placed = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._begin: dict[str, tuple[int, Entry]] = {}
        at = 0
        for entry in placed:
            if entry.dtype not in _NAMES:
                raise UserError(f"{entry.name}: found {entry.dtype}, which a safetensors file does not hold here.")
            offsets = [at, at + entry.bytes]
            header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
            self._begin[entry.name] = (at, entry)
            at += entry.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self.bytes = self._start + at
        with writing(self.path):
            self._file = self._temporary.open("wb", buffering=0)
            try:
                self._file.write(len(text).to_bytes(8, "little") + text)
                self._file.truncate(self.bytes)
            except OSError:
                self._discard()
                raise

    def put(self, name: str, part: Tensor, start: int = 0) -> None:
        """Write a tensor, or its rows from `start` on."""
        at, entry = self._begin[name]
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        if part.dtype != entry.dtype or start * row + part.numel() * entry.dtype.itemsize > entry.bytes:
            raise AssertionError(f"{name}: {part.dtype} {tuple(part.shape)} at row {start} does not fit {entry}")
        data = raw_bytes(part)
        with writing(self.path):
            self._file.seek(self._start + at + start * row)
            while data:
                data = data[self._file.write(data) :]

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        with writing(self.path):
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)

    def _discard(self) -> None:
        self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, row by row."""
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def numbers(tensor: Tensor) -> list[Any]:
    """As nested lists."""
    found: Any = tensor
    return found.tolist()


def write_file(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".new")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def writing(path: Path) -> Generator[None]:
    """An error of the disk as one sentence.

    Raises:
        RunError: the disk is full, or does not let itself be written.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}); nothing that was done is lost: make room and run "
            "the same command again."
        ) from error
