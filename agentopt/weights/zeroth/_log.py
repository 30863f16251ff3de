"""The log of a run: 16 + 4k bytes per step, from which the tuned weights are computed again, bit for bit.

A step is known by its seed, its learning rate and its k measured coefficients (MeZO, arXiv 2305.17333, section 2.1), so
20,000 steps of one direction are 400 KB. A record is written before its update is applied: a process that dies at any
moment loses at most the measurement of one step, which is made again.

    magic (8 bytes) | u32 length | u32 CRC-32 | header (JSON) | record | record | ...
    record: step u32 | seal u64 | learning rate f32 | k coefficients f32            (little endian)

The seed of a step is a function of the run's seed, so its eight bytes can do a second duty: `seal` is the seed xor the
BLAKE2s digest, keyed by the header, of the record's other bytes. A single changed bit anywhere in the file is found.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2s
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agentopt.errors import RunError, UserError
from agentopt.weights.zeroth._log_header import Header, HeaderCutOff, pack_header, read_header
from agentopt.weights.zeroth._philox import probe_seed

_BODY = struct.Struct("<If")
_RECORD = struct.Struct("<IQf")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """What one step did; the numbers are those that the file holds, rounded to float32."""

    step: int
    seed: int
    lr: float
    scalars: tuple[float, ...]


def rounded(values: Sequence[float]) -> tuple[float, ...]:
    """The numbers as float32 holds them: what the update must be computed from, with a log or without one."""
    layout = f"<{len(values)}f"
    return struct.unpack(layout, struct.pack(layout, *values))


class Log:
    """An append-only file of steps; one process at a time may have it open for writing."""

    def __init__(self, path: Path, header: Header, file: FileIO, start: int, *, writable: bool) -> None:
        """Use `create`, `open`, `resume` or `read`."""
        self.path = path
        self.header = header
        self.torn = 0
        """Bytes of a last record that was being written when its process died; they are not part of the log."""
        self._file = file  # closes, and gives up its lock, with this object at the latest
        self._descriptor = file.fileno()
        self._start = start
        self._size = _RECORD.size + 4 * header.k
        self._key = blake2s(pack_header(header), digest_size=32).digest()
        self._count = 0
        self._writable = writable
        self._sync_every = 64
        self._broken = False

    @classmethod
    def create(cls, path: str | Path, header: Header, *, sync_every: int = 64) -> Self:
        """Begin a log.

        Args:
            path: the file, by custom `steps.zo`.
            header: what the run is made of.
            sync_every: steps after which the disk is told to keep what was written. A killed process loses nothing
                whatever this is; a machine without power may lose these last steps, which are then made again.

        Raises:
            UserError: there is a log already, or the file cannot be made.
            RunError: the disk is full.
        """
        path = Path(path)
        file = _open(path, os.O_RDWR | os.O_CREAT)
        descriptor = file.fileno()
        try:
            _lock(descriptor, path)
            data = pack_header(header)
            size = os.fstat(descriptor).st_size
            # A process that died while it wrote this very header left its beginning, and no step followed.
            if size >= len(data) or os.pread(descriptor, size, 0) != data[:size]:
                _, start = read_header(descriptor, path)
                raise UserError(
                    f"{path}: found a log of {size - start} bytes of steps, expected no file; resume that run, or give "
                    "another path for a new one."
                )
            os.ftruncate(descriptor, 0)
            log = cls(path, header, file, len(data), writable=True)
            log._sync_every = sync_every
            log._write(data, 0, "its header")
            os.fsync(descriptor)
            _sync_folder(path)
        except BaseException:
            file.close()
            raise
        return log

    @classmethod
    def open(cls, path: str | Path, expect: Header, *, sync_every: int = 64) -> Self:
        """Go on with a log; the torn last record of a process that died is cut off.

        Raises:
            UserError: there is no such log, another process writes it, it is damaged, or it belongs to another run: the
                message names the first field that differs.
        """
        log = cls._existing(Path(path), os.O_RDWR, expect)
        log._sync_every = sync_every
        if log.torn:
            os.ftruncate(log._descriptor, log._end())
        return log

    @classmethod
    def read(cls, path: str | Path, expect: Header | None = None, *, ignore: Sequence[str] = ()) -> Self:
        """Look at a log, which may be growing meanwhile; what is appended later is not seen.

        Args:
            path: the file.
            expect: the run it must belong to; None takes any.
            ignore: fields of the header that may differ. An update is the same on every device and with any number of
                threads, so who only replays a finished run may ignore `threads` and `torch`.

        Raises:
            UserError: as for `open`.
        """
        return cls._existing(Path(path), os.O_RDONLY, expect, ignore)

    @classmethod
    def resume(cls, path: str | Path, header: Header, *, sync_every: int = 64) -> Self:
        """`open` when there is a log, else `create`: also after a crash while the very first bytes were written."""
        if Path(path).exists():
            with contextlib.suppress(HeaderCutOff):
                return cls.open(path, header, sync_every=sync_every)
        return cls.create(path, header, sync_every=sync_every)

    @classmethod
    def _existing(cls, path: Path, mode: int, expect: Header | None, ignore: Sequence[str] = ()) -> Self:
        file = _open(path, mode)
        try:
            if mode == os.O_RDWR:
                _lock(file.fileno(), path)
            header, start = read_header(file.fileno(), path)
            if expect is not None:
                header.check(expect, path, ignore)
            log = cls(path, header, file, start, writable=mode == os.O_RDWR)
            log._scan()
        except BaseException:
            file.close()
            raise
        return log

    def __len__(self) -> int:
        return self._count

    def append(self, step: int, seed: int, lr: float, scalars: Sequence[float]) -> Record:
        """Write one step, before its update is applied; the update must be computed from the record that is returned.

        Raises:
            UserError: the log is open for reading, or `step` is not the one after the last.
            RunError: a coefficient is no finite number, or the disk does not take the record. The file then ends with
                the last whole step, the weights are those of that step, and the step can be made again.
        """
        self._check(step, seed, len(scalars))
        try:
            record = Record(step, seed, rounded([lr])[0], rounded(scalars))
        except OverflowError:
            record = Record(step, seed, lr, (float("inf"),))
        bad = [value for value in (record.lr, *record.scalars) if value - value != 0]
        if bad:
            raise RunError(
                f"{self.path}: step {step} measured {bad[0]}, expected finite numbers that float32 holds; nothing was "
                "written and the weights are as they were. Use a smaller learning rate or a smaller eps."
            )
        body = struct.pack(f"<{len(record.scalars)}f", *record.scalars)
        seal = seed ^ self._digest(step, record.lr, body)
        self._write(_RECORD.pack(step, seal, record.lr) + body, self._end(), f"step {step}")
        self._count += 1
        if self._count % self._sync_every == 0:
            self.sync()
        return record

    def records(self, start: int = 0) -> Iterator[Record]:
        """The steps from `start` on, in order."""
        per_chunk = max(1, _CHUNK // self._size)
        for first in range(start, self._count, per_chunk):
            many = min(per_chunk, self._count - first)
            data = os.pread(self._descriptor, many * self._size, self._start + first * self._size)
            for number in range(many):
                record = self._unpack(data[number * self._size : (number + 1) * self._size], first + number)
                if record is None:
                    raise self._damage(first + number)
                yield record

    def cut(self, steps: int) -> None:
        """Keep the first `steps` steps; a log that is open for reading only looks shorter."""
        if not 0 <= steps <= self._count:
            raise ValueError(f"cut to {steps} steps a log of {self._count}")
        self._count = steps
        if self._writable:
            os.ftruncate(self._descriptor, self._end())

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise RunError(f"{self.path}: the disk does not keep the log: {error.strerror or error}") from error

    def close(self) -> None:
        """Give the file free."""
        if self._writable and not self._file.closed:
            with contextlib.suppress(OSError):
                os.fsync(self._descriptor)
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- bytes

    def _end(self) -> int:
        return self._start + self._count * self._size

    def _digest(self, step: int, lr: float, body: bytes) -> int:
        digest = blake2s(_BODY.pack(step, lr) + body, digest_size=8, key=self._key)
        return int.from_bytes(digest.digest(), "little")

    def _check(self, step: int, seed: int, k: int) -> None:
        if not self._writable or self._file.closed:
            raise UserError(f"{self.path}: the log is not open for writing; use Log.open.")
        if self._broken:
            raise RunError(f"{self.path}: an earlier write failed and could not be taken back; open the log again.")
        if step != self._count:
            raise UserError(
                f"{self.path}: the log holds {self._count} steps, and step {step} (counted from 0) was to be written; "
                "replay the log before going on."
            )
        if seed != probe_seed(self.header.seed, step) or k != self.header.k:
            raise ValueError(f"step {step}: seed {seed} or its {k} coefficients do not belong to {self.header}")

    def _unpack(self, data: bytes, index: int) -> Record | None:
        """The record at `index`; None where the bytes are not what was written there."""
        if len(data) != self._size:
            return None
        step, seal, lr = _RECORD.unpack_from(data)
        body = data[_RECORD.size :]
        seed = seal ^ self._digest(step, lr, body)
        if step != index or seed != probe_seed(self.header.seed, index):
            return None
        return Record(step, seed, lr, struct.unpack(f"<{self.header.k}f", body))

    def _scan(self) -> None:
        """Check every record; what a crash left at the end is told apart from damage."""
        size = os.fstat(self._descriptor).st_size
        whole, partial = divmod(size - self._start, self._size)
        self._count, self.torn = whole, partial
        for index in range(whole):
            data = os.pread(self._descriptor, self._size, self._start + index * self._size)
            if self._unpack(data, index) is not None:
                continue
            # After a power cut a file may be as long as it was, with zeros where the disk had not kept the last steps.
            if data[-1] or not self._zeros(self._start + (index + 1) * self._size, size):
                raise self._damage(index)
            self._count, self.torn = index, size - (self._start + index * self._size)
            return

    def _zeros(self, start: int, stop: int) -> bool:
        for place in range(start, stop, _CHUNK):
            if any(os.pread(self._descriptor, min(_CHUNK, stop - place), place)):
                return False
        return True

    def _damage(self, index: int) -> UserError:
        place = self._start + index * self._size
        return UserError(
            f"{self.path}: damaged at byte {place} (step {index}): found bytes that are not what was written there. "
            f"Take the file from a copy, or keep the steps before (`truncate -s {place} {self.path}`): a resumed run "
            "makes the others again."
        )

    def _write(self, data: bytes, place: int, what: str) -> None:
        """All of `data` at `place`, or a file that ends at `place` as before.

        Raises:
            RunError: the disk does not take it.
        """
        try:
            done = os.pwrite(self._descriptor, data, place)
            while done < len(data):  # what is left tells why it was not taken
                more = os.pwrite(self._descriptor, data[done:], place + done)
                if not more:
                    raise OSError(0, "the disk took no more bytes")
                done += more
        except OSError as error:
            try:
                os.ftruncate(self._descriptor, place)
            except OSError:
                self._broken = True
            raise RunError(
                f"{self.path}: {what} cannot be written: {error.strerror or error}. Nothing is lost: the log holds "
                f"{self._count} whole steps and the weights were not changed since; make room and resume."
            ) from error


def _open(path: Path, mode: int) -> FileIO:
    try:
        if mode & os.O_CREAT:
            path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, mode | os.O_CLOEXEC, 0o644)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such log; give the path of a steps.zo that a run has written.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be opened as a log: {error.strerror or error}.") from error
    try:
        return FileIO(descriptor, "r+" if mode & os.O_RDWR else "r")
    except OSError as error:  # a folder
        os.close(descriptor)
        raise UserError(f"{path}: cannot be opened as a log: {error.strerror or error}.") from error


def _lock(descriptor: int, path: Path) -> None:
    """Take the file for this process; the lock ends with the process, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{path}: another run is writing this log; wait until it ends, or give another path."
        ) from error


def _sync_folder(path: Path) -> None:
    """A new file outlives a power cut only when its folder is kept as well."""
    folder: Any = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
