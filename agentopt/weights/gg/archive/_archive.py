"""An archive that is open for reading: any tensor alone, and of the file only its bytes.

Imports torch: only functions import this module.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from agentopt.errors import UserError
from agentopt.weights._events import Event
from agentopt.weights.gg.archive import _index as indexes
from agentopt.weights.gg.archive import _numbers as numbers
from agentopt.weights.gg.archive import _streams as streams
from agentopt.weights.gg.archive import _tables as tables
from agentopt.weights.gg.archive import _tensors as tensors
from agentopt.weights.gg.archive._container import Reader
from agentopt.weights.gg.archive._expgolomb import DamagedStream
from agentopt.weights.gg.archive._index import StoredStream, StoredTensor
from agentopt.weights.gg.archive._packing import CONFIG
from agentopt.weights.gg.archive._streams import Coding
from agentopt.weights.gg.archive._types import TensorInfo, TensorVerified

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]


class Archive:
    """A `.ggz` archive, open until it is closed or the `with` ends.

    Attributes:
        path: of the file.
        names: of all tensors, in the order of the file.
        file_names: of the small files, config.json included.
        config: config.json; empty where there is none.
        bytes: of the file.

    Raises:
        UserError: no such file, no archive, one of another version, damaged or cut off.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._reader = Reader(self.path)
        try:
            self._tensors = indexes.read_tensors(self._reader.index, numbers.SIZES, self._bad_index)
            self._files = indexes.read_files(self._reader.index, self._bad_index)
            sections = [at for one in self._tensors.values() for stream in one.streams for at in stream.sections]
            self._reader.check_tiling(sections + [one.at for one in self._files.values()])
            self.names = tuple(self._tensors)
            self.file_names = tuple(self._files)
            self.bytes = self._reader.bytes
            self.config = self._config()
        except BaseException:
            self._reader.close()
            raise

    def info(self, name: str) -> TensorInfo:
        """What is known of a tensor without reading it.

        Raises:
            UserError: there is none of this name.
        """
        return self._stored(name).info

    def read(self, name: str, dtype: Any = None) -> Tensor:
        """A tensor, in its own number type or in another one.

        Args:
            name: of the tensor.
            dtype: a torch dtype or its name, for a floating tensor; None for its own.

        Raises:
            UserError: there is none of this name, its bytes are damaged, or `dtype` is no floating number type.
        """
        stored = self._stored(name)
        if stored.kind == "grid":
            step = stored.info.step
            assert step is not None
            # On a grid no rounding but the last one: straight to the number type that is asked for.
            wanted = stored.info.dtype if dtype is None else str(dtype).removeprefix("torch.")
            wanted = wanted if wanted in numbers.GRIDS else "float32"
            found = self._symbols(stored, 0, numbers.renderer(step, wanted), np.dtype(f"u{numbers.SIZES[wanted]}"))
            tensor = numbers.as_tensor(found, wanted, stored.info.shape)
        else:
            tensor = numbers.as_tensor(self._exact(stored), stored.info.dtype, stored.info.shape)
        return numbers.cast_floating(tensor, dtype)

    def files(self) -> dict[str, bytes]:
        """The small files, config.json excepted (see `config`).

        Raises:
            UserError: one is damaged.
        """
        return {name: self.file(name) for name in self._files if name != CONFIG}

    def file(self, name: str) -> bytes:
        """A small file.

        Raises:
            UserError: there is none of this name, or it is damaged.
        """
        if name not in self._files:
            raise UserError(f"{self.path}: found no file {name!r}, expected one of {', '.join(self._files)}.")
        stored, what = self._files[name], f"file {name!r}"
        data = self._reader.section(stored.at, what)
        if stored.coding == "raw":
            return data
        opener = zlib.decompressobj()
        try:
            found = opener.decompress(data, stored.size + 1)
        except zlib.error as error:
            raise self._reader.damaged(what, str(error)) from None
        if len(found) != stored.size or not opener.eof or opener.unused_data:
            raise self._reader.damaged(what, "another length than was written")
        return found

    def verify(self, on_event: Callable[[Event], None] | None = None) -> int:
        """Read and decode everything, and keep nothing.

        Returns:
            How many tensors and files were checked.

        Raises:
            UserError: at the first one that is damaged.
        """
        for done, name in enumerate(self.names, 1):
            self.read(name)
            if on_event is not None:
                on_event(TensorVerified(name, done, len(self.names)))
        for name in self._files:
            self.file(name)
        return len(self.names) + len(self._files)

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise UserError(f"{self.path}: found no tensor {name!r} among {len(self.names)}, such as {self.names[:3]}.")
        return self._tensors[name]

    def _exact(self, stored: StoredTensor) -> Array:
        """Bit patterns of a tensor that is stored exactly."""
        size = numbers.SIZES[stored.info.dtype]
        if stored.kind == "raw":
            return self._symbols(stored, 0, numbers.patterns, np.dtype("u1")).view(f"u{size}")
        found = np.empty(stored.info.weights, f"u{size}")
        planes = found.view(np.uint8).reshape(-1, size)
        for place in range(size):
            self._symbols(stored, place, numbers.patterns, np.dtype("u1"), planes[:, place])
        return tensors.turned_back(found) if stored.info.dtype in numbers.FLOATS else found

    def _symbols(
        self, stored: StoredTensor, place: int, render: streams.Render, dtype: Any, out: Array | None = None
    ) -> Array:
        """The rendered symbols of one stream."""
        stream, what = stored.streams[place], f"tensor {stored.info.name!r}"
        coding = self._coding(stream, stored.info.step, what)
        found = np.empty(stream.count, dtype) if out is None else out
        start = 0
        for count, at in stream.chunks:
            data = self._reader.section(at, what)
            try:
                found[start : start + count] = streams.decode(coding, data, count, render)
            except DamagedStream as error:
                raise self._reader.damaged(what, str(error)) from None
            start += count
        return found

    def _coding(self, stream: StoredStream, step: float | None, what: str) -> Coding:
        table = None
        try:
            if stream.table is not None:
                size, k, at = stream.table
                table = streams.table_of(self._reader.section(at, what), size, k, stream.bits)
            elif stream.gg is not None:
                nu, b, reach = stream.gg
                table = tables.from_gg(nu, b, step or 1.0, reach, stream.bits)
        except DamagedStream as error:
            raise self._reader.damaged(what, str(error)) from None
        coding = Coding(stream.coding, 0, k=stream.k, low=stream.low, table=table)
        if table is not None and coding.checksum != stream.crc:
            raise UserError(
                f"{self.path}: {what}: the frequencies that are made from its nu, b and step differ from the writer's "
                "on this machine; unpack the archive where it was packed, and pack it again with this version."
                if stream.gg is not None
                else f"{self.path}: {what} is damaged (another table than was written); copy or pack the archive again."
            )
        return coding

    def _config(self) -> dict[str, Any]:
        if CONFIG not in self._files:
            return {}
        try:
            found = json.loads(self.file(CONFIG))
        except ValueError as error:
            raise self._reader.damaged(CONFIG, f"no JSON: {error}") from None
        if not isinstance(found, dict):
            raise self._reader.damaged(CONFIG, "no JSON object")
        return cast("dict[str, Any]", found)

    def _bad_index(self, why: str) -> Exception:
        return self._reader.damaged("the index", f"it has {why}")
