"""A model into an archive, tensor by tensor. Imports torch: only functions import this module."""

from __future__ import annotations

import contextlib
import json
import math
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentopt.errors import UserError
from agentopt.weights._events import Event
from agentopt.weights.gg._source import open_source
from agentopt.weights.gg.archive import _grid as grids
from agentopt.weights.gg.archive import _numbers as numbers
from agentopt.weights.gg.archive import _streams as streams
from agentopt.weights.gg.archive import _tensors as tensors
from agentopt.weights.gg.archive._container import Section, Writer
from agentopt.weights.gg.archive._index import safe_name, stream_entry
from agentopt.weights.gg.archive._types import DEFAULT_SQNR, PackResult, TensorInfo, TensorPacked

if TYPE_CHECKING:
    from torch import Tensor

    from agentopt.weights.gg._source import WeightSource

CONFIG = "config.json"
_HIGHEST_SQNR = 140.0


def pack(
    source: str | Path | WeightSource,
    path: str | Path,
    *,
    step: float | None = None,
    sqnr: float | None = None,
    lossless: bool = False,
    on_event: Callable[[Event], None] | None = None,
    stop: Any = None,
) -> PackResult:
    """Write a model into one archive.

    Weights with two axes or more and 1,024 numbers or more are rounded to a uniform grid; all others, and all weights
    of a model that is quantized already, are stored exactly. The archive appears under its name when it is whole.

    Args:
        source: a model folder, or what `agentopt quantize` takes: a hub id, "embedded", a GGUF file, an archive.
        path: the archive to write; one that is there is replaced.
        step: of the grid, the same for all weights.
        sqnr: dB that each tensor keeps on a grid of its own; 42 when neither is given.
        lossless: keep every bit instead.
        on_event: called after every tensor.
        stop: set its `wanted` to end after the tensor that is being written; nothing is kept.

    Raises:
        UserError: more than one of step, sqnr and lossless, or one out of range; weights on a grid that are not
            finite; no model there.
        RunError: the disk is full or cannot be written.
        KeyboardInterrupt: `stop.wanted` was set.
    """
    wanted = _wanted(step, sqnr, lossless)
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        model = open_source(source, quantized=True)
        if model is not source:
            stack.callback(model.close)
        if isinstance(model.config.get("quantization_config"), dict):
            if step is not None or sqnr is not None:
                raise UserError(
                    f"model {model.name!r}: found weights that are quantized already, which are packed without loss; "
                    "leave out step and sqnr, or give the model that they were made from."
                )
            wanted = tensors.Wanted(None, DEFAULT_SQNR, exact=True)
        writer = stack.enter_context(Writer(Path(path).expanduser()))
        return _Packing(model, writer, wanted, on_event, stop).run(began)


class _Packing:
    """One run of `pack`."""

    def __init__(
        self,
        source: WeightSource,
        writer: Writer,
        wanted: tensors.Wanted,
        on_event: Callable[[Event], None] | None,
        stop: Any,
    ) -> None:
        self.source, self.writer, self.wanted = source, writer, wanted
        self.on_event, self.stop = on_event, stop
        self.power = self.noise = self.entropy = 0.0
        self.before = 0

    def run(self, began: float) -> PackResult:
        """Tensors, then files, then the index."""
        entries: list[dict[str, Any]] = []
        infos: list[TensorInfo] = []
        for name in self.source.names:
            if self.stop is not None and self.stop.wanted:
                raise KeyboardInterrupt
            start = time.perf_counter()
            entry, info = self._tensor(name)
            entries.append(entry)
            infos.append(info)
            if self.on_event is not None:
                seconds = time.perf_counter() - start
                self.on_event(TensorPacked(info, len(infos), len(self.source.names), seconds))
        files = [self._file(name, data) for name, data in _files(self.source).items()]
        size = self.writer.finish({"format": "ggz", "tensors": entries, "files": files})
        return PackResult(
            path=str(self.writer.path),
            tensors=tuple(infos),
            files=tuple(one["name"] for one in files),
            bytes_before=self.before,
            bytes_after=size,
            entropy_bytes=self.entropy / 8,
            tensor_bytes=sum(one.bytes for one in infos),
            sqnr_db=grids.sqnr_db(self.power, self.noise),
            seconds=time.perf_counter() - began,
        )

    def _tensor(self, name: str) -> tuple[dict[str, Any], TensorInfo]:
        tensor = self.source.read(name)
        dtype, shape = numbers.dtype_name(tensor, name), tuple(tensor.shape)
        flat = numbers.flat(tensor)
        del tensor
        plan = tensors.plan(flat, name, dtype, self.wanted)
        kind = "grid" if plan.step is not None else "planes" if plan.planes else "raw"
        begin = self.writer.at
        written = [self._stream(flat, plan, place) for place in range(len(plan.streams))]
        size, weights = self.writer.at - begin, flat.numel()
        self.before += weights * flat.element_size()
        self.entropy += plan.entropy
        self.power += plan.power
        self.noise += plan.noise
        info = TensorInfo(
            name=name,
            dtype=dtype,
            shape=shape,
            coding=plan.coding,
            step=plan.step,
            sqnr_db=plan.sqnr_db,
            entropy_bits=plan.entropy / weights if weights else 0.0,
            stored_bits=8 * size / weights if weights else 0.0,
            bytes=size,
            weights=weights,
        )
        entry: dict[str, Any] = {"name": name, "dtype": dtype, "shape": list(shape), "kind": kind}
        if plan.step is not None:
            entry |= {"step": plan.step, "sqnr_db": plan.sqnr_db if math.isfinite(plan.sqnr_db) else None}
        entry |= {"entropy_bits": info.entropy_bits, "streams": written}
        return entry, info

    def _stream(self, flat: Tensor, plan: tensors.Plan, place: int) -> dict[str, Any]:
        coding = plan.streams[place]
        table = self.writer.add(coding.stored_table) if coding.kind == "rans" else None
        chunks: list[tuple[int, Section]] = []
        for part in tensors.chunks(flat, plan, place):
            chunks.append((len(part), self.writer.add(streams.encode(coding, part))))
        return stream_entry(coding, sum(count for count, _ in chunks), chunks, table)

    def _file(self, name: str, data: bytes) -> dict[str, Any]:
        if not safe_name(name):
            raise UserError(f"model {self.source.name!r}: found the file name {name!r}, expected a plain relative one.")
        packed = zlib.compress(data, 9)
        coding = "zlib" if len(packed) < len(data) else "raw"
        self.before += len(data)
        at = self.writer.add(packed if coding == "zlib" else data)
        return {"name": name, "coding": coding, "size": len(data), "at": list(at)}


def _files(source: WeightSource) -> Mapping[str, bytes]:
    config = (json.dumps(source.config, indent=2, ensure_ascii=False) + "\n").encode() if source.config else None
    return {**({} if config is None else {CONFIG: config}), **source.files()}


def _wanted(step: float | None, sqnr: float | None, lossless: bool) -> tensors.Wanted:
    given = [name for name, one in (("step", step), ("sqnr", sqnr), ("lossless", lossless or None)) if one is not None]
    if len(given) > 1:
        raise UserError(f"pack: found {' and '.join(given)}, expected one of step, sqnr and lossless.")
    if step is not None and not (math.isfinite(step) and step > 0):
        raise UserError(f"step: found {step}, expected a positive number.")
    if sqnr is not None and not 0 < sqnr <= _HIGHEST_SQNR:
        raise UserError(f"sqnr: found {sqnr}, expected dB above 0 and up to {_HIGHEST_SQNR:.0f}.")
    return tensors.Wanted(None if step is None else float(step), DEFAULT_SQNR if sqnr is None else sqnr, lossless)
