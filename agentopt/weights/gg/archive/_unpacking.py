"""An archive into a model folder, tensor by tensor. Imports torch: only functions import this module."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from agentopt.errors import UserError
from agentopt.weights._events import Event
from agentopt.weights.gg._partial import check_free, target
from agentopt.weights.gg._shards import Entry, ShardWriter, layout, write_file, write_index, writing
from agentopt.weights.gg.archive import _numbers as numbers
from agentopt.weights.gg.archive._archive import Archive
from agentopt.weights.gg.archive._packing import CONFIG
from agentopt.weights.gg.archive._types import TensorUnpacked, UnpackResult


def unpack(
    path: str | Path,
    out_dir: str | Path,
    *,
    dtype: Any = None,
    shard_bytes: int = 1 << 30,
    on_event: Callable[[Event], None] | None = None,
    stop: Any = None,
) -> UnpackResult:
    """Write a model folder (safetensors) from an archive. The folder appears when it is whole.

    Args:
        path: the archive.
        out_dir: a new folder, or an empty one.
        dtype: number type of all floating tensors, a torch dtype or its name; None for their own.
        shard_bytes: size above which a new safetensors file is begun.
        on_event: called after every tensor.
        stop: set its `wanted` to end after the tensor that is being written; nothing is kept.

    Raises:
        UserError: the folder is taken; the archive is damaged; a dtype for a model that is quantized.
        RunError: the disk is full or cannot be written.
        KeyboardInterrupt: `stop.wanted` was set.
    """
    began = time.perf_counter()
    out = target(out_dir)
    if shard_bytes < 1:
        raise UserError(f"shard_bytes: found {shard_bytes}, expected 1 or more.")
    with Archive(path) as archive:
        check_free(out)
        kind = _kind(archive, dtype)
        work = out.with_name(f".{out.name}.partial-{os.getpid()}")
        try:
            with writing(out):
                work.mkdir(parents=True)
            size = _tensors(archive, work, kind, shard_bytes, on_event, stop)
            _files(archive, work, kind)
            check_free(out)
            with writing(out):
                os.replace(work, out)
        finally:
            with contextlib.suppress(OSError):
                shutil.rmtree(work)
        return UnpackResult(
            path=str(archive.path),
            out=str(out),
            tensors=archive.names,
            files=archive.file_names,
            bytes_before=archive.bytes,
            bytes_after=size,
            seconds=time.perf_counter() - began,
        )


def _kind(archive: Archive, dtype: Any) -> torch.dtype | None:
    if dtype is None:
        return None
    if isinstance(archive.config.get("quantization_config"), dict):
        raise UserError(
            f"{archive.path}: found a quantized model, whose number types are part of its format; leave out dtype."
        )
    return numbers.cast_floating(torch.zeros(0), dtype).dtype


def _tensors(
    archive: Archive,
    work: Path,
    kind: torch.dtype | None,
    shard_bytes: int,
    on_event: Callable[[Event], None] | None,
    stop: Any,
) -> int:
    groups: list[list[Entry]] = []
    for name in archive.names:
        info = archive.info(name)
        own: torch.dtype = getattr(torch, info.dtype)
        groups.append([Entry(name, kind if kind is not None and own.is_floating_point else own, info.shape)])
    shards = layout(groups, shard_bytes)
    done = size = 0
    for file, entries in shards.items():
        with ShardWriter(work / file, entries) as shard:
            for entry in entries:
                if stop is not None and stop.wanted:
                    raise KeyboardInterrupt
                shard.put(entry.name, archive.read(entry.name, entry.dtype if entry.dtype.is_floating_point else None))
                done, size = done + 1, size + entry.bytes
                if on_event is not None:
                    on_event(TensorUnpacked(entry.name, entry.bytes, done, len(archive.names)))
    write_index(work, shards)
    return size


def _files(archive: Archive, work: Path, kind: torch.dtype | None) -> None:
    for name in archive.file_names:
        data = archive.file(name)
        if name == CONFIG and kind is not None:
            config = {key: one for key, one in archive.config.items() if key != "torch_dtype"}
            config["dtype"] = str(kind).removeprefix("torch.")
            data = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        write_file(work / name, data)
