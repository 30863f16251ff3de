"""`quantize`: a model folder in, a model folder of one byte per weight out.

    result = quantize("model-folder", "model-rf8", format="rf8-gg")

The model is read and written tensor by tensor, so it may be larger than memory. OUT appears when it is complete; until
then the work stands in `OUT.partial`, and the same call goes on with it after the last complete file.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from agentopt.errors import UserError
from agentopt.weights import _events as events
from agentopt.weights.gg import _passes
from agentopt.weights.gg._books import NUS, default_books
from agentopt.weights.gg._calibration import Calibration, text_digest
from agentopt.weights.gg._checkpoint import Checkpoint
from agentopt.weights.gg._coders import Coder, OwnCoder
from agentopt.weights.gg._export import StockCoder, check_exportable, export_config
from agentopt.weights.gg._guard import guarded
from agentopt.weights.gg._partial import Partial, check_free, target
from agentopt.weights.gg._plan import Layer, Plan, plan
from agentopt.weights.gg._shards import Entry, ShardWriter, layout, numbers, write_file, write_index
from agentopt.weights.gg._source import RESULT, FolderSource, WeightSource, opened
from agentopt.weights.gg._types import (
    EXPORTS,
    FORMATS,
    Export,
    Format,
    Histogram,
    Planned,
    Quality,
    QuantizeOptions,
    QuantizeResult,
    ShardWritten,
    TensorDone,
    TensorReport,
)

VERSION = 1
_BOOKS = "books.json"

OnEvent = Callable[[events.Event], None]


class Stopping(Protocol):
    """Such as `agentopt.weights.finetuning.Stop`."""

    wanted: bool


def quantize(
    model: str | Path | WeightSource,
    out_dir: str | Path,
    format: Format | Export = "rf8-gg",
    *,
    options: QuantizeOptions | None = None,
    on_event: OnEvent | None = None,
    stop: Stopping | None = None,
) -> QuantizeResult:
    """Quantize the linear layers of a causal language model.

    Args:
        model: a folder of safetensors files, `"embedded"`, a `.gguf` path, a hub id, a `.ggz` archive, or a source.
        out_dir: a new or empty folder. Until it is complete the work stands in a folder of that name with `.partial`.
        format: `rf8-gg` (best quality), `rf8`, `rf8-strict`, `e3m4`; or for stock loaders `fp8`, `int8`.
        options: what else may be asked.
        on_event: told what happens: `Planned`, `Warned`, `Resumed`, `Working`, `TensorDone`, `ShardWritten`.
        stop: its `wanted` is looked at between tensors.

    Raises:
        UserError: the model, the folder or an option is not as it must be, or a weight is NaN or infinite.
        RunError: the disk is full; the same call goes on.
        KeyboardInterrupt: `stop.wanted`; the same call goes on.
    """
    asked = options or QuantizeOptions()
    _check_format(format, asked)
    out = target(out_dir)
    check_free(out)
    text = text_digest(asked.calibrate) if asked.calibrate is not None else None
    with opened(model) as source:
        sorted_out = plan(source, skip=asked.skip, head=asked.head)
        if format in EXPORTS:
            check_exportable(sorted_out, format, source.name)
        with Partial(out, _settings(format, asked, source, text)) as partial:
            return _Job(source, sorted_out, format, asked, partial, on_event, stop).run()


def _check_format(format: str, options: QuantizeOptions) -> None:
    if format not in FORMATS and format not in EXPORTS:
        raise UserError(f"format: found {format!r}, expected {', '.join([*FORMATS, *EXPORTS])}.")
    if options.scale == "tensor_pow2" and format not in ("rf8", "rf8-strict"):
        raise UserError(f"scale: tensor_pow2 is for rf8 and rf8-strict, found the format {format}.")
    if options.dynamic_activations and format not in EXPORTS:
        raise UserError(f"dynamic_activations: is for {' and '.join(EXPORTS)}, found the format {format}.")


def _settings(format: str, options: QuantizeOptions, source: WeightSource, text: str | None) -> dict[str, Any]:
    """What a later call must have in common with the one that began."""
    chosen = asdict(options)
    if text is None:
        for name in ("calibrate_tokens", "sequence"):
            chosen.pop(name)
    return {"version": VERSION, "format": format, **chosen, "calibrate": text, "weights": source.identity}


class _Job:
    """One quantization."""

    def __init__(
        self,
        source: WeightSource,
        sorted_out: Plan,
        format: Format | Export,
        options: QuantizeOptions,
        partial: Partial,
        on_event: OnEvent | None,
        stop: Stopping | None,
    ) -> None:
        self.source, self.plan, self.format, self.options = source, sorted_out, format, options
        self.partial = partial
        self._on_event, self._stop = on_event, stop
        self._began = time.perf_counter()
        self._reports: list[TensorReport] = []
        self._hashes: dict[str, str] = {}

    def run(self) -> QuantizeResult:
        """All of it."""
        self._announce()
        calibration = None
        if self.options.calibrate is not None:
            calibration = Calibration(self.source, self.options, self.tell, self.check_stop)
        columns: Mapping[str, Tensor] = {}
        if calibration is not None and self.format == "rf8-gg":
            columns = calibration.columns(self.plan.layers, self.partial)
        coder = self._coder(columns)
        shards = layout(self._groups(coder), self.options.shard_bytes)
        self._write(coder, shards)
        self._write_rest(shards, coder)
        quality = None
        if calibration is not None:
            quality = self._measure(calibration, coder)
        return self._finish(shards, quality)

    def tell(self, event: events.Event) -> None:
        """Tell the caller."""
        if self._on_event is not None:
            self._on_event(event)

    def check_stop(self) -> None:
        """Stop when the caller wants it."""
        if self._stop is not None and self._stop.wanted:
            raise KeyboardInterrupt

    # --- before ------------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        weights = sum(math.prod(layer.shape) for layer in self.plan.layers)
        before = sum(_bytes(self.source, name) for name in self.source.names)
        self.tell(Planned(len(self.plan.layers), len(self.plan.kept), weights, before))
        for message in self.plan.warnings:
            self.tell(events.Warned(message))

    def _coder(self, columns: Mapping[str, Tensor]) -> Coder:
        if self.format in EXPORTS:
            dtype = self.source.dtype(self.plan.layers[0].tensor)
            return StockCoder(
                self.format,
                torch.float32 if dtype == torch.float64 else dtype,
                dynamic=self.options.dynamic_activations,
            )
        format = cast("Format", self.format)
        if format != "rf8-gg":
            return OwnCoder(format, self.options.scale)
        return OwnCoder(format, "channel", self._books(columns), columns)

    def _books(self, columns: Mapping[str, Tensor]) -> Tensor:
        if not self.options.refine:
            return default_books()
        saved: Any = self.partial.read_json(_BOOKS)
        if saved is None:
            self.tell(events.Working("fitting books to rows of all layers"))
            found = _passes.refined_books(self.source, self.plan.layers, seed=self.options.seed, columns=columns)
            saved = numbers(found)
            self.partial.write_json(_BOOKS, saved)
        return torch.tensor(saved, dtype=torch.float32)

    # --- pass 2 ------------------------------------------------------------------------------------------------------

    def _groups(self, coder: Coder) -> list[tuple[Entry, ...]]:
        layers = {layer.tensor: layer for layer in self.plan.layers}
        kept = set(self.plan.kept)
        found: list[tuple[Entry, ...]] = []
        for name in self.source.names:
            if name in layers:
                found.append(coder.entries(layers[name]))
            elif name in kept:
                found.append((Entry(name, self.source.dtype(name), self.source.shape(name)),))
        return found

    def _write(self, coder: Coder, shards: Mapping[str, tuple[Entry, ...]]) -> None:
        """Every file that is not complete yet."""
        done = self.partial.shards()
        if done:
            self.tell(events.Resumed(sum(len(one["tensors"]) for one in done.values())))
        layers = {entry.name: layer for layer in self.plan.layers for entry in coder.entries(layer)}
        for file, entries in shards.items():
            if file in done:
                self._take(done[file])
                continue
            path = self.partial.model / file
            reports, hashes = self._write_shard(coder, path, entries, layers)
            size = path.stat().st_size
            about = {"file": file, "bytes": size, "tensors": [asdict(one) for one in reports], "hashes": hashes}
            self.partial.add_shard(about)
            self._hashes.update(hashes)
            self.tell(ShardWritten(str(path), size, len(entries)))

    def _take(self, about: Mapping[str, Any]) -> None:
        """What an earlier call did."""
        self._hashes.update(about["hashes"])
        for values in about["tensors"]:
            self._done(_report(values), resumed=True)

    def _write_shard(
        self, coder: Coder, path: Path, entries: tuple[Entry, ...], layers: Mapping[str, Layer]
    ) -> tuple[list[TensorReport], dict[str, str]]:
        reports: list[TensorReport] = []
        hashes: dict[str, str] = {}
        with ShardWriter(path, entries) as writer:
            for entry in entries:
                layer = layers.get(entry.name)
                name = entry.name if layer is None else layer.tensor
                if name in hashes:
                    continue
                self.check_stop()
                if layer is None:
                    hashes[name] = _passes.copy_tensor(self.source, name, writer)
                    continue
                self.tell(events.Working(layer.name, len(self._reports), len(self.plan.layers)))
                report, hashes[name] = _passes.quantize_layer(self.source, layer, coder, writer)
                reports.append(report)
                self._done(report)
        return reports, hashes

    def _done(self, report: TensorReport, *, resumed: bool = False) -> None:
        self._reports.append(report)
        self.tell(TensorDone(report, len(self._reports), len(self.plan.layers), resumed))

    # --- after -------------------------------------------------------------------------------------------------------

    def _write_rest(self, shards: dict[str, tuple[Entry, ...]], coder: Coder) -> None:
        """Everything but the weights."""
        folder = self.partial.model
        write_index(folder, shards)
        for name, content in self.source.files().items():
            write_file(folder / name, content)
        config = {**self.source.config, "quantization_config": self._config(coder)}
        if self.format in FORMATS:
            config = guarded(config)
        write_file(folder / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())

    def _config(self, coder: Coder) -> dict[str, Any]:
        if isinstance(coder, StockCoder):
            return export_config(coder.format, self.plan.left, dynamic=coder.dynamic)
        assert isinstance(coder, OwnCoder)
        books = () if coder.books is None else tuple(tuple(numbers(book[:255])) for book in coder.books)
        weights = [math.prod(one.shape) for one in self._reports]
        nu = sum(one.nu * count for one, count in zip(self._reports, weights, strict=True)) / sum(weights)
        return Checkpoint(
            format=coder.format,
            scale=coder.scale,
            books=books,
            nus=NUS if books else (),
            skip=self.plan.skip,
            head=self.options.head,
            gg={"nu": nu, "estimator": "moments", "per": "tensor", "average": "weights"},
            source_sha256=self._source_digest(),
        ).to_dict()

    def _source_digest(self) -> str:
        """Of all tensors that were read: names, number types, shapes, bytes; not of the files they came from."""
        digest = hashlib.sha256()
        for name in sorted(self._hashes):
            about = f"{name} {self.source.dtype(name)} {list(self.source.shape(name))} {self._hashes[name]}\n"
            digest.update(about.encode())
        return digest.hexdigest()

    def _measure(self, calibration: Calibration, coder: Coder) -> Quality:
        stored = FolderSource(self.partial.model, str(self.partial.out), quantized=True)
        try:
            return calibration.quality(self.plan.layers, coder, stored)
        finally:
            stored.close()

    def _finish(self, shards: Mapping[str, tuple[Entry, ...]], quality: Quality | None) -> QuantizeResult:
        source, names = self.source, [*(layer.tensor for layer in self.plan.layers), *self.plan.kept]
        result = QuantizeResult(
            out=str(self.partial.out),
            format=self.format,
            tensors=tuple(self._reports),
            kept=self.plan.kept,
            bytes_before=sum(_bytes(source, name) for name in source.names),
            bytes_16=2 * sum(math.prod(source.shape(name)) for name in names),
            bytes_after=sum(entry.bytes for entries in shards.values() for entry in entries),
            seconds=time.perf_counter() - self._began,
            quality=quality,
            source=source.name,
            warnings=self.plan.warnings,
        )
        text = json.dumps(result.to_dict(), ensure_ascii=False, indent=1) + "\n"
        write_file(self.partial.model / RESULT, text.encode())
        self.partial.finish()
        return result


def _bytes(source: WeightSource, name: str) -> int:
    return math.prod(source.shape(name)) * source.dtype(name).itemsize


def _report(values: Mapping[str, Any]) -> TensorReport:
    fields = dict(values)
    histogram = fields.pop("histogram")
    fields["shape"] = tuple(fields["shape"])
    return TensorReport(**fields, histogram=Histogram(histogram["low"], histogram["high"], tuple(histogram["counts"])))
