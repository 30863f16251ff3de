"""What `agentopt quantize` prints when it is done: layers, sizes, quality, and the next commands to copy."""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentopt.cli._console import count, hanging, seconds
from agentopt.cli._quantize_live import tail
from agentopt.cli._training_live import WIDTH, duration, size
from agentopt.observe._quantize_summary import (
    KindSummary,
    Spread,
    decibels,
    gpu_bytes,
    kinds_of,
    mean_bits,
    number_of,
    quality_sentences,
    worst,
)
from agentopt.weights.gg import EXPORTS

if TYPE_CHECKING:
    from agentopt.weights.gg import QuantizeResult, TensorReport

FEW = 24
"""Up to so many layers are shown one by one."""
WORST = 5
NAME, SHAPE = 31, 11
"""Columns of a layer's name and shape in an 80-column table."""


def print_quantized(
    result: QuantizeResult,
    console: Console,
    *,
    report: Path | None = None,
    tensors: bool = False,
) -> None:
    """The whole result of a quantization."""
    shown = os.path.relpath(result.out)
    rows = result.tensors
    console.print()
    if rows:
        sqnr = Spread.of([one.sqnr_db for one in rows])
        figures = f"median SQNR {_db(sqnr.middle)}, worst {_db(sqnr.low)}"
        text = (
            f"{count(number_of(rows))} weights in {_layers(len(rows))}, {mean_bits(rows, 'stored_bits'):.2f} bits each"
        )
        paragraph(console, f"Quantized to {result.format}: {text}; {figures}.", "bold green")
        console.print()
        if tensors or len(rows) <= FEW:
            console.print("bits: entropy of the codes, and stored", style="dim")
            console.print(layer_table(rows))
        else:
            console.print(
                "nu and SQNR: least, median and greatest; bits: entropy of the codes, and stored", style="dim"
            )
            console.print(_kind_table(kinds_of(rows)))
            console.print()
            console.print("lowest SQNR (--tensors shows all layers)", style="dim")
            console.print(layer_table(worst(rows, WORST), head=False))
    else:
        paragraph(console, "Nothing was quantized: every linear layer was left out.", "bold yellow")
    console.print()
    named(console, "size", [f"{size(result.bytes_before)} before, {size(result.bytes_after)} in {shown}"])
    named(console, "GPU", [_gpu(result)])
    if result.quality is not None:
        named(console, "quality", quality_sentences(result.quality))
    named(console, "time", [duration(result.seconds)])
    if report is not None:
        named(console, "report", [os.path.relpath(report)])
    console.print()
    for line in usage(result, reported=report is not None):
        console.print(Text(line, style="dim"), soft_wrap=True)


def _gpu(result: QuantizeResult) -> str:
    before, after = gpu_bytes(result)
    saved = f"{size(before - after)} less" if before > after else "no less"
    return (
        f"about {size(after)} for weights instead of {size(before)} at 16 bits, {saved}; a CPU decodes them when it "
        "loads and saves no memory"
    )


def _layers(number: int) -> str:
    return "1 layer" if number == 1 else f"{number:,} layers"


def _db(value: float) -> str:
    shown = decibels(value)
    return shown if shown == "exact" else f"{shown} dB"


def _kind_table(kinds: Sequence[KindSummary]) -> Table:
    """Least, median and greatest of every kind of layer."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", no_wrap=True)
    table.add_column("of", justify="right")
    for name in ("nu", "SQNR dB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for kind in kinds:
        nu = "  ".join(f"{value:.2f}" for value in (kind.nu.low, kind.nu.middle, kind.nu.high))
        sqnr = "  ".join(decibels(value) for value in (kind.sqnr.low, kind.sqnr.middle, kind.sqnr.high))
        bits = f"{kind.entropy_bits:.2f}/{kind.stored_bits:.2f}"
        table.add_row(tail(kind.kind, 14), str(len(kind.tensors)), nu, sqnr, bits, seconds(kind.seconds))
    return table


def layer_table(rows: Sequence[TensorReport], *, head: bool = True) -> Table:
    """A line per layer."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=head)
    table.add_column("layer", no_wrap=True, width=NAME)
    table.add_column("shape", justify="right", no_wrap=True, min_width=SHAPE)
    table.add_column("nu", justify="right", no_wrap=True)
    table.add_column("SQNR dB", justify="right", no_wrap=True, min_width=7)
    table.add_column("bits", justify="right", no_wrap=True, min_width=9)
    table.add_column("time", justify="right", no_wrap=True, min_width=6)
    for one in rows:
        shape = "x".join(map(str, one.shape))
        bits = f"{one.entropy_bits:.2f}/{one.stored_bits:.2f}"
        cells = (tail(one.name, NAME), shape, f"{one.nu:.2f}", decibels(one.sqnr_db), bits, seconds(one.seconds))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def usage(result: QuantizeResult, *, reported: bool = False) -> list[str]:
    """How the folder is loaded and served."""
    shown = os.path.relpath(result.out)
    folder, quoted = repr(shown), shlex.quote(shown)
    if result.format in EXPORTS:
        load = f"AutoModelForCausalLM.from_pretrained({folder})  # with compressed-tensors installed"
    else:
        load = f"model, tokenizer = agentopt.weights.load.model({folder})"
    lines = [f"load:   {load}", f"serve:  vllm serve {quoted}"]
    return [*lines, *([] if reported else [f"report: agentopt quantize {quoted} --report report.html"])]


# --- words -----------------------------------------------------------------------------------------------------------


def paragraph(console: Console, text: str, style: str = "") -> None:
    """Wrapped at words, without the blanks that end a line."""
    for line in textwrap.wrap(text, console.width, break_on_hyphens=False):
        console.print(Text(line, style=style))


def named(console: Console, name: str, texts: Sequence[str], style: str = "") -> None:
    """Lines under one name, wrapped at words."""
    pieces = [piece for text in texts for piece in hanging(text, console.width - WIDTH)]
    for place, piece in enumerate(pieces):
        console.print(Text.assemble((("" if place else name).ljust(WIDTH), "bold"), (piece.lstrip(), style)))
