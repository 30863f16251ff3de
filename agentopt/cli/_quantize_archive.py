"""`agentopt quantize --archive` and `--verify`: weights packed for the disk, unpacked again, and checked."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentopt.cli._console import out, seconds
from agentopt.cli._quantize_live import LiveQuantize, tail
from agentopt.cli._quantize_print import FEW, NAME, named, paragraph
from agentopt.cli._quantize_settings import QuantizeSettings
from agentopt.cli._training_live import duration, size
from agentopt.observe._quantize_summary import decibels

if TYPE_CHECKING:
    from agentopt.weights.gg.archive import PackResult, TensorInfo, UnpackResult

CODINGS = {
    "raw": "as it is",
    "bytes": "bytes, rANS",
    "exp-golomb": "exp-Golomb",
    "rans": "rANS",
    "rans-gg": "rANS, GG table",
}


def archive_command(settings: QuantizeSettings, live: LiveQuantize, *, tensors: bool, as_json: bool) -> int:
    """Pack, unpack or verify, and say what came of it."""
    from agentopt.weights.gg import archive

    model, target = settings.model, settings.out
    found: dict[str, Any]
    if settings.job == "verify":
        with archive.Archive(model) as opened:
            number, files = opened.verify(on_event=live), len(opened.file_names)
            found = {"archive": model, "checked": number, "bytes": opened.bytes}
        if not as_json:
            live.progress.stop()
            text = (
                f"Sound: {number - files:,} tensors and {files:,} files of {model} have the checksums they were given."
            )
            paragraph(out(), text, "bold green")
    elif settings.job == "pack":
        packed = archive.pack(
            model, target, step=settings.step, sqnr=settings.sqnr, lossless=settings.lossless, on_event=live
        )
        found = {"source": model, **packed.to_dict(), "warnings": live.warnings}
        if not as_json:
            live.progress.stop()
            print_packed(packed, out(), tensors=tensors)
    else:
        unpacked = archive.unpack(
            model, target, dtype=settings.dtype, shard_bytes=settings.options.shard_bytes, on_event=live
        )
        found = {**unpacked.to_dict(), "warnings": live.warnings}
        if not as_json:
            live.progress.stop()
            print_unpacked(unpacked, out())
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    return 0


def print_packed(result: PackResult, console: Console, *, tensors: bool = False) -> None:
    """Size against the source and against the entropy bound, how it was coded, what to do with it."""
    shown = os.path.relpath(result.path)
    coded = [one for one in result.tensors if one.coding != "raw"]
    loss = "bit for bit" if math.isinf(result.sqnr_db) else f"{decibels(result.sqnr_db)} dB over all weights"
    share = result.bytes_after / max(result.bytes_before, 1)
    console.print()
    text = f"Packed: {len(result.tensors):,} tensors into {shown}, {size(result.bytes_after)}"
    paragraph(console, f"{text}: {share:.1%} of the source; {loss}.", "bold green")
    console.print()
    console.print(_coding_table(result.tensors))
    if tensors or 0 < len(coded) <= FEW:
        console.print()
        console.print("bits: entropy of what is coded, and stored", style="dim")
        console.print(_tensor_table(coded))
    console.print()
    over = result.tensor_bytes / max(result.entropy_bytes, 1) - 1
    named(console, "size", [f"{size(result.bytes_before)} before, {size(result.bytes_after)} now"])
    named(console, "bound", [f"{over:.1%} above the entropy of what is coded ({size(result.entropy_bytes)})"])
    pace = result.bytes_before / max(result.seconds, 1e-9) / 1e6
    named(console, "time", [f"{duration(result.seconds)}, {pace:.1f} MB/s of the source"])
    console.print()
    quoted = shlex.quote(shown)
    for line in (
        f"check:  agentopt quantize {quoted} --verify",
        f"unpack: agentopt quantize {quoted} --archive --out DIR",
        f"serve:  agentopt quantize {quoted} --format rf8-gg --out DIR",
    ):
        console.print(Text(line, style="dim"), soft_wrap=True)


def _coding_table(tensors: Sequence[TensorInfo]) -> Table:
    """A line per way of coding."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("coding", no_wrap=True)
    for name in ("tensors", "weights", "entropy bits", "stored bits", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for coding in sorted({one.coding for one in tensors}, key=lambda name: list(CODINGS).index(name)):
        group = [one for one in tensors if one.coding == coding]
        weights = sum(one.weights for one in group) or 1
        entropy = sum(one.entropy_bits * one.weights for one in group) / weights
        stored = sum(one.stored_bits * one.weights for one in group) / weights
        table.add_row(
            CODINGS[coding],
            f"{len(group):,}",
            f"{weights:,}",
            f"{entropy:.2f}",
            f"{stored:.2f}",
            size(sum(one.bytes for one in group)),
        )
    return table


def _tensor_table(tensors: Sequence[TensorInfo]) -> Table:
    """A line per tensor."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", no_wrap=True, width=NAME)
    for name in ("step", "SQNR dB", "bits", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in tensors:
        step = "-" if one.step is None else f"{one.step:.2g}"
        sqnr = decibels(one.sqnr_db)
        bits = f"{one.entropy_bits:.2f}/{one.stored_bits:.2f}"
        table.add_row(Text(tail(one.name.removesuffix(".weight"), NAME)), step, sqnr, bits, size(one.bytes))
    return table


def print_unpacked(result: UnpackResult, console: Console) -> None:
    """What stands in the folder now."""
    shown = os.path.relpath(result.out)
    console.print()
    text = f"Unpacked: {len(result.tensors):,} tensors and {len(result.files):,} files to {shown}"
    sizes = f"{size(result.bytes_after)} ({size(result.bytes_before)} packed)"
    paragraph(console, f"{text}, {sizes}, in {seconds(result.seconds)}.", "bold green")
    line = f"load:  model, tokenizer = agentopt.weights.load.model({shown!r})"
    console.print(Text(line, style="dim"), soft_wrap=True)
