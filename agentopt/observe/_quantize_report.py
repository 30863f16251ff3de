"""The page of a quantization: one self-contained file with every weight's fit, figures across depth, and the books.

Made from a `QuantizeResult` and the folder it names, so it can be written again at any time.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentopt.errors import RunError
from agentopt.observe._layers import places
from agentopt.observe._quantize_summary import (
    KindSummary,
    Spread,
    change,
    decibels,
    gpu_bytes,
    kinds_of,
    mean_bits,
    number_of,
    quality_sentences,
)
from agentopt.observe._weight_charts import (
    Depths,
    Shape,
    book_chart,
    density,
    depth_charts,
    histogram_chart,
    positions,
)

if TYPE_CHECKING:
    from agentopt.weights.gg import QuantizeResult, TensorReport

SPAN, BINS = 5.0, 61
"""Of the histograms: standard deviations to each side, and bins (odd: one stands around zero)."""


@dataclass(frozen=True)
class Card:
    """One figure at the head of the page."""

    title: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Book:
    """A table of levels: the shape it was made for, its share of the rows, its outermost level, and a drawing."""

    shape: str
    share: str
    width: float
    outermost: str
    svg: str


@dataclass(frozen=True)
class Page:
    """What the template reads."""

    title: str
    out: str
    format: str
    date: str
    command: str
    sentence: str
    quality: list[str]
    cards: list[Card]
    kinds: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    kept: list[str]
    depth: list[dict[str, str]]
    books: list[Book]
    warnings: list[str]
    beyond: str


def size(number: float) -> str:
    """Bytes as a person reads them."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:.0f} B"


def write_quantize_report(result: QuantizeResult, path: str | Path, *, command: str = "") -> Path:
    """Write the page of a quantization, atomically.

    Args:
        result: what `agentopt.weights.gg.quantize` gave; its folder is read for the books.
        path: the HTML file.
        command: that made it; shown to be copied.

    Raises:
        RunError: the file cannot be written.
    """
    path = Path(path)
    page = render_quantize(quantize_page(result, command=command))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise RunError(
            f"{path}: the report cannot be written ({error.strerror or error}); {result.out} is complete."
        ) from error
    return path


def render_quantize(page: Page) -> str:
    """The HTML text; everything that is not a drawing of ours is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates", encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("quantize.html.j2").render(p=page)


def quantize_page(result: QuantizeResult, *, command: str = "") -> Page:
    """Gather the content; parts that there are not stay empty."""
    kinds = kinds_of(result.tensors)
    shapes = {one.name: shape_of([one]) for one in result.tensors}
    outside = [1 - shape.inside for shape in shapes.values()]
    return Page(
        title=result.source or result.out,
        out=result.out,
        format=result.format,
        date=datetime.now().strftime("%Y-%m-%d %H:%M"),
        command=command,
        sentence=_sentence(result),
        quality=quality_sentences(result.quality) if result.quality else [],
        cards=_cards(result),
        kinds=[_kind(kind, shapes) for kind in kinds],
        rows=[_row(place, one) for place, one in enumerate(result.tensors)],
        kept=list(result.kept),
        depth=_depth(result.tensors, kinds),
        books=_books(result.out),
        warnings=list(result.warnings),
        beyond=f"{max(outside):.2%}" if outside else "",
    )


def _sentence(result: QuantizeResult) -> str:
    if not result.tensors:
        return "Nothing was quantized."
    layers, bits = len(result.tensors), mean_bits(result.tensors, "stored_bits")
    quantized = f"{number_of(result.tensors):,} weights in {layers:,} layers at {bits:.2f} bits each"
    return f"{quantized}; {len(result.kept):,} other tensors are as they were."


def _cards(result: QuantizeResult) -> list[Card]:
    cards = [Card("Size of the tensors", size(result.bytes_after), f"{size(result.bytes_before)} before")]
    before, after = gpu_bytes(result)
    note = f"estimate: {size(after)} of weights, {size(before)} at 16 bits"
    cards.append(Card("GPU memory saved", size(max(before - after, 0)), note))
    if result.tensors:
        sqnr = Spread.of([one.sqnr_db for one in result.tensors])
        cards.append(Card("SQNR, median layer", f"{decibels(sqnr.middle)} dB", f"worst {decibels(sqnr.low)} dB"))
        nu = Spread.of([one.nu for one in result.tensors])
        cards.append(Card("Shape ν, median layer", f"{nu.middle:.2f}", f"{nu.low:.2f} to {nu.high:.2f}"))
    quality = result.quality
    if quality is not None:
        before, after = quality.perplexity_before, quality.perplexity_after
        note = f"{before:.3f} before ({change(before, after)})"
        cards.append(Card("Perplexity", f"{quality.perplexity_after:.3f}", note))
        cards.append(Card("KL divergence", f"{quality.kl:.2g}", f"nats per token, over {quality.tokens:,} tokens"))
        cards.append(Card("Same top token", f"{quality.same_top:.2%}", "of next tokens, against the original"))
    return cards


# --- weights ---------------------------------------------------------------------------------------------------------


def shape_of(tensors: Sequence[TensorReport]) -> Shape:
    """Histogram and fit of some weights together, each in units of its own standard deviation."""
    heights, inside, total = [0.0] * BINS, 0.0, 0.0
    curve = [0.0] * len(positions(SPAN))
    for one in tensors:
        count = sum(one.histogram.counts)
        if not count or one.sigma <= 0:
            continue
        total += count
        for place, share in _rebinned(one):
            heights[place] += share
            inside += share
        for place, x in enumerate(positions(SPAN)):
            curve[place] += count * density(x, one.nu)
    step = 2 * SPAN / BINS
    total = total or 1.0
    return Shape(SPAN, tuple(h / total / step for h in heights), tuple(y / total for y in curve), inside / total)


def _rebinned(one: TensorReport) -> list[tuple[int, float]]:
    """Counts of a histogram on our bins: (bin, count); a bin that lies across several is shared out between them."""
    histogram, step = one.histogram, 2 * SPAN / BINS
    width = (histogram.high - histogram.low) / len(histogram.counts) / one.sigma
    if width <= 0:
        return [(BINS // 2, float(sum(histogram.counts)))]
    found: list[tuple[int, float]] = []
    for place, count in enumerate(histogram.counts):
        low = histogram.low / one.sigma + place * width
        first = math.floor((low + SPAN) / step)
        last = math.floor((low + width + SPAN) / step)
        for bin in range(max(first, 0), min(last, BINS - 1) + 1):
            left, right = -SPAN + bin * step, -SPAN + (bin + 1) * step
            shared = (min(right, low + width) - max(left, low)) / width
            if count and shared > 0:
                found.append((bin, count * shared))
    return found


def _kind(kind: KindSummary, shapes: dict[str, Shape]) -> dict[str, Any]:
    shape = shape_of(kind.tensors)
    one = len(kind.tensors) == 1
    return {
        "name": kind.kind,
        "count": len(kind.tensors),
        "weights": f"{number_of(kind.tensors):,}",
        "nu": [f"{value:.2f}" for value in (kind.nu.low, kind.nu.middle, kind.nu.high)],
        "sqnr": [decibels(value) for value in (kind.sqnr.low, kind.sqnr.middle, kind.sqnr.high)],
        "entropy": f"{kind.entropy_bits:.2f}",
        "stored": f"{kind.stored_bits:.2f}",
        "seconds": f"{kind.seconds:.1f}",
        "range": f"ν {kind.nu.low:.2f}" if one else f"ν {kind.nu.low:.2f} to {kind.nu.high:.2f}",
        "linear": histogram_chart(shape),
        "log": histogram_chart(shape, logarithmic=True),
        "each": [] if one else _each(kind.tensors, shapes),
    }


def _each(tensors: Sequence[TensorReport], shapes: dict[str, Shape]) -> list[dict[str, str]]:
    """The weights of one kind, by the number of their block where that tells them apart."""
    where = places(one.name for one in tensors)
    depths = [where[one.name].depth for one in tensors]
    told_apart = None not in depths and len(set(depths)) == len(depths)
    return [
        {
            "name": one.name,
            "short": f"layer {depth}" if told_apart else one.name,
            "range": f"ν {one.nu:.2f}",
            "linear": histogram_chart(shapes[one.name]),
            "log": histogram_chart(shapes[one.name], logarithmic=True),
        }
        for one, depth in zip(tensors, depths, strict=True)
    ]


def _row(place: int, one: TensorReport) -> dict[str, Any]:
    """A line of the long table: texts, and the numbers they are sorted by."""
    cells = [
        ("x".join(map(str, one.shape)), math.prod(one.shape)),
        (f"{one.nu:.3f}", one.nu),
        (f"{one.sigma:.2g}", one.sigma),
        (decibels(one.sqnr_db, 2), one.sqnr_db if math.isfinite(one.sqnr_db) else 1e9),
        (f"{one.entropy_bits:.2f}", one.entropy_bits),
        (f"{one.stored_bits:.3f}", one.stored_bits),
        (f"{one.seconds:.2f}", one.seconds),
    ]
    return {"place": place, "name": one.name, "cells": cells}


def _depth(tensors: Sequence[TensorReport], kinds: Sequence[KindSummary]) -> list[dict[str, str]]:
    """Charts of the kinds that blocks are made of: shape and noise by the block's number."""
    where = places(one.name for one in tensors)

    def rows(name: str) -> list[Depths]:
        found: list[Depths] = []
        for kind in kinds:
            points = [
                (depth, float(getattr(one, name)))
                for one in kind.tensors
                if (depth := where[one.name].depth) is not None and math.isfinite(getattr(one, name))
            ]
            if points:
                found.append(Depths(kind.kind, tuple(points)))
        return found

    nu, sqnr = depth_charts(rows("nu"), 2), depth_charts(rows("sqnr_db"), 1)
    return [{"kind": kind, "nu": nu[kind], "sqnr": sqnr.get(kind, "")} for kind in nu]


# --- books -----------------------------------------------------------------------------------------------------------


def _books(folder: str) -> list[Book]:
    """The books of a folder in our format with the share of rows that each has; none for formulas and exports."""
    from agentopt.weights.gg._checkpoint import METHOD, Checkpoint

    try:
        config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    found: dict[str, Any] = config.get("quantization_config") or {}
    if found.get("quant_method") != METHOD or not found.get("codebooks"):
        return []
    checkpoint = Checkpoint.from_dict(found, f"{folder}/config.json")
    rows = _rows_per_book(Path(folder), len(checkpoint.books))
    total = sum(rows) or 1
    books: list[Book] = []
    for place, levels in enumerate(checkpoint.books):
        nu = checkpoint.nus[place] if place < len(checkpoint.nus) else None
        shape = "" if nu is None else f"ν {nu:g}" if math.isfinite(nu) else "uniform (ν = ∞)"
        share = rows[place] / total
        books.append(
            Book(shape, f"{share:.1%}", round(100 * share, 1), f"{max(map(abs, levels)):.1f}σ", book_chart(levels))
        )
    return books


def _rows_per_book(folder: Path, books: int) -> list[int]:
    """How many rows of all layers chose each book; one book has them all."""
    import numpy

    from agentopt.weights.gg._checkpoint import BOOK

    safe_open: Any = importlib.import_module("safetensors").safe_open
    counts = [0] * books
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                if name.endswith(f".{BOOK}"):
                    found = numpy.bincount(file.get_tensor(name).reshape(-1), minlength=books)
                    counts = [have + int(more) for have, more in zip(counts, found, strict=False)]
    return counts if any(counts) else [1, *counts[1:]]
