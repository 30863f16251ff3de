"""The file around the streams: a header of fixed size, sections one behind the other, and a JSON index at the end.

    0   8   magic: 89 47 47 5A 0D 0A 1A 0A
    8   4   version, 1
    12  4   size of this header, 80
    16  8   where the index begins
    24  8   length of the index
    32  8   length of the file
    40  32  SHA-256 of the index
    72  4   0
    76  4   CRC-32 of the 76 bytes before

Integers are little-endian. Every section has its offset, length and CRC-32 in the index; the sections fill the bytes
between header and index without a gap, so that no byte of the file is without a checksum.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Generator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from agentopt.errors import RunError, UserError

MAGIC = b"\x89GGZ\r\n\x1a\n"
VERSION = 1
HEADER = struct.Struct("<8sIIQQQ32sI")
SIZE = HEADER.size + 4
LARGEST_INDEX = 1 << 30

Section = tuple[int, int, int]
"""Offset, length, CRC-32."""


def is_archive(path: str | Path) -> bool:
    """Whether a file begins as an archive does."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class Writer:
    """A new archive. It takes its name when the writer is left without an error; else nothing is left of it.

    Raises:
        UserError: the path is a folder, or another process is writing there.
        RunError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            raise UserError(f"{path}: found a folder, expected the name of a file to write.")
        self.path = path
        self._temporary = path.with_name(f".{path.name}.partial")
        self.at = SIZE
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not emptied on opening: another process may be writing it.
            file = os.fdopen(os.open(self._temporary, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(self._temporary))
        except OSError:
            same = False
        if not same:
            file.close()
            raise UserError(f"{path}: another process is writing this archive; wait for it.")
        self._file = file
        with self._writing():
            file.truncate(0)  # what a killed process left
            file.write(bytes(SIZE))
        self._finished = False

    def add(self, data: bytes) -> Section:
        """Write a section; where it is."""
        section = (self.at, len(data), zlib.crc32(data))
        self._write(data)
        return section

    def finish(self, index: Mapping[str, Any]) -> int:
        """Write the index and the header, and take the name; the size of the file."""
        text = json.dumps(index, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
        begin = self.at
        self._write(text)
        head = HEADER.pack(MAGIC, VERSION, SIZE, begin, len(text), self.at, hashlib.sha256(text).digest(), 0)
        head += struct.pack("<I", zlib.crc32(head))
        with self._writing():
            self._file.seek(0)
            self._file.write(head)
            os.fsync(self._file.fileno())
            os.replace(self._temporary, self.path)
        self._finished = True
        return self.at

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        with self._writing():
            while view:
                written = self._file.write(view)
                view = view[written:]
        self.at += len(data)

    @contextlib.contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written ({error.strerror or error}); nothing is left of it: make room and "
                "run the same command again."
            ) from error

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            with contextlib.suppress(OSError):
                self._temporary.unlink()
        self._file.close()


class Reader:
    """An archive that is open; its header and index were checked, its sections are checked when they are read.

    Raises:
        UserError: there is no such file, it is no archive, of another version, damaged or cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except IsADirectoryError:
            raise UserError(f"{path}: found a folder, expected a .ggz archive.") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror or error}).") from error
        try:
            self.bytes = os.fstat(self._file.fileno()).st_size
            self.index = self._read_index()
        except BaseException:
            self._file.close()
            raise

    def section(self, where: Section, what: str) -> bytes:
        """A section's bytes.

        Raises:
            UserError: they are not what was written.
        """
        offset, length, crc = where
        data = self._read(offset, length)
        if len(data) != length or zlib.crc32(data) != crc:
            raise self.damaged(what)
        return data

    def damaged(self, what: str, why: str = "another checksum than was written") -> UserError:
        """The error for a part of this file."""
        return UserError(f"{self.path}: {what} is damaged ({why}); copy or pack the archive again.")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def check_tiling(self, sections: list[Section]) -> None:
        """Whether the sections fill the space before the index.

        Raises:
            UserError: they do not.
        """
        at = SIZE
        for offset, length, _ in sorted(sections):
            if offset != at:
                raise self.damaged("the index", f"a section at {offset:,}, expected one at {at:,}")
            at += length
        if at != self._begin:
            raise self.damaged("the index", f"sections that end at {at:,}, expected {self._begin:,}")

    def _read(self, offset: int, length: int) -> bytes:
        parts: list[bytes] = []
        while length:
            try:
                part = os.pread(self._file.fileno(), length, offset)
            except OSError as error:
                raise RunError(f"{self.path}: cannot be read ({error.strerror or error}).") from error
            if not part:
                break
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts) if len(parts) != 1 else parts[0]

    def _read_index(self) -> dict[str, Any]:
        head = self._read(0, SIZE)
        if head[: len(MAGIC)] != MAGIC:
            raise UserError(f"{self.path}: found a file that does not begin as a .ggz archive does, expected one.")
        if len(head) < SIZE:
            raise self.damaged("the header", f"{len(head)} bytes, expected {SIZE}")
        _, version, size, begin, length, whole, digest, zero = HEADER.unpack_from(head)
        if struct.unpack_from("<I", head, HEADER.size)[0] != zlib.crc32(head[: HEADER.size]):
            raise self.damaged("the header")
        if version != VERSION:
            raise UserError(
                f"{self.path}: found version {version} of the archive format, expected {VERSION}; a newer agentopt may "
                "read it."
            )
        if whole != self.bytes:
            state = "cut off" if self.bytes < whole else "longer than it was written"
            raise UserError(
                f"{self.path}: the archive is {state}: {self.bytes:,} bytes, expected {whole:,}; copy it again."
            )
        if (size, zero) != (SIZE, 0) or begin < SIZE or length > LARGEST_INDEX or begin + length != whole:
            raise self.damaged("the header", "places that do not fit the file")
        self._begin = begin
        text = self._read(begin, length)
        if hashlib.sha256(text).digest() != digest:
            raise self.damaged("the index")
        try:
            index = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.damaged("the index", f"no JSON: {error}") from None
        if not isinstance(index, dict):
            raise self.damaged("the index", "no JSON object")
        return cast("dict[str, Any]", index)
