"""Inline SVG charts of weights: a histogram with the fitted density over it, a figure across depth, levels of a book.

Plain strings like the other charts of the reports. Numbers only; nothing of a user's data but counts reaches this file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PANEL, TALL = 240, 132
"""Size of a small chart, in the unit of its view box."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 8, 8, 20
_POINTS = 121
_DECADES = 5
"""Powers of ten that a logarithmic histogram shows."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A density of unit standard deviation on equal bins from -span to span, and the shapes fitted to what is in it.

    Attributes:
        span: in standard deviations.
        heights: of the bins; they hold `inside` of all.
        curve: the fitted density, at `_POINTS` equal steps.
        inside: share of the weights that is shown.
    """

    span: float
    heights: tuple[float, ...]
    curve: tuple[float, ...]
    inside: float


def density(x: float, nu: float) -> float:
    """The generalized Gaussian of unit variance: nu / (2 b G(1/nu)) exp(-(|x| / b)^nu), b^2 = G(1/nu) / G(3/nu)."""
    log_b = (math.lgamma(1 / nu) - math.lgamma(3 / nu)) / 2
    log_top = math.log(nu / 2) - log_b - math.lgamma(1 / nu)
    return math.exp(log_top - (abs(x) / math.exp(log_b)) ** nu) if x else math.exp(log_top)


def positions(span: float) -> list[float]:
    """Where `Shape.curve` is taken."""
    return [span * (2 * step / (_POINTS - 1) - 1) for step in range(_POINTS)]


def histogram_chart(shape: Shape, *, logarithmic: bool = False) -> str:
    """Bars for what the weights are and a line for what was fitted; densities, or their logarithms."""
    top = max(shape.heights, default=0.0)
    if top <= 0:
        return ""
    low = 10.0**-_DECADES * top

    def py(value: float) -> float:
        share = min(value / (1.12 * top), 1.0)
        if logarithmic:
            share = max(0.0, 1 + math.log10(max(value, low) / (1.5 * top)) / (_DECADES + 0.2))
        return round(_TOP + (TALL - _TOP - _BOTTOM) * (1 - share), 1)

    def px(value: float) -> float:
        return round(_LEFT + (value / shape.span + 1) / 2 * (PANEL - _LEFT - _RIGHT), 1)

    floor = TALL - _BOTTOM
    step = 2 * shape.span / len(shape.heights)
    bars = [f"M{px(-shape.span)} {floor}"]
    for place, height in enumerate(shape.heights):
        bars.append(f"V{py(height)}H{px(-shape.span + (place + 1) * step)}")
    bars.append(f"V{floor}Z")
    line = " ".join(
        f"{'L' if place else 'M'}{px(x)} {py(y)}"
        for place, (x, y) in enumerate(zip(positions(shape.span), shape.curve, strict=True))
    )
    marks = [_mark(px(value), value) for value in _marks(shape.span)]
    kind = "log" if logarithmic else "linear"
    return (
        f'<svg class="{kind}" viewBox="0 0 {PANEL} {TALL}" role="img" '
        f'aria-label="histogram and fitted density, {kind}"><path class="bars" d="{"".join(bars)}"/>'
        f'<path class="fit" d="{line}"/><line class="axis" x1="{_LEFT}" y1="{floor}" x2="{PANEL - _RIGHT}" '
        f'y2="{floor}"/>{"".join(marks)}</svg>'
    )


def _marks(span: float) -> list[float]:
    step = next((step for step in (1, 2, 5, 10, 20, 50) if span / step <= 3.5), 100)
    count = int(span // step)
    return [float(place * step) for place in range(-count, count + 1)]


def _mark(x: float, value: float) -> str:
    text = "0" if value == 0 else f"{value:+.0f}σ".replace("-", "−")
    floor = TALL - _BOTTOM
    return (
        f'<line class="axis" x1="{x}" y1="{floor}" x2="{x}" y2="{floor + 3}"/>'
        f'<text x="{x}" y="{TALL - 5}" text-anchor="middle">{text}</text>'
    )


@dataclass(frozen=True, slots=True)
class Depths:
    """A figure of one kind of layer: (depth, value), finite."""

    kind: str
    points: tuple[tuple[int, float], ...]


def depth_charts(rows: Sequence[Depths], digits: int) -> dict[str, str]:
    """A chart per kind on one scale: its own points in colour, those of all others behind them in grey."""
    every = [point for row in rows for point in row.points]
    if not every:
        return {}
    deepest = max(depth for depth, _ in every)
    low, high = min(value for _, value in every), max(value for _, value in every)
    room = (high - low) * 0.08 or 0.5
    low, high = low - room, high + room
    left = 14 + 6 * len(f"{high:.{digits}f}")

    def px(depth: int) -> float:
        return round(left + (depth / deepest if deepest else 0.5) * (PANEL - left - 12), 1)

    def py(value: float) -> float:
        return round(_TOP + (high - value) / (high - low) * (TALL - _TOP - _BOTTOM), 1)

    frame = "".join(
        f'<line class="axis" x1="{left - 6}" y1="{py(value)}" x2="{PANEL - 4}" y2="{py(value)}"/>'
        f'<text x="{left - 10}" y="{py(value) + 4}" text-anchor="end">{value:.{digits}f}</text>'
        for value in _rules(low, high)
    )
    ends = f'<text x="{px(0)}" y="{TALL - 4}" text-anchor="middle">0</text>'
    if deepest:
        ends += f'<text x="{px(deepest)}" y="{TALL - 4}" text-anchor="end">layer {deepest}</text>'
    lines = {row.kind: _line([(px(depth), py(value)) for depth, value in sorted(row.points)]) for row in rows}
    charts: dict[str, str] = {}
    for row in rows:
        behind = "".join(f'<path class="behind" d="{line}"/>' for kind, line in lines.items() if kind != row.kind)
        dots = "".join(
            f'<circle class="on" cx="{px(depth)}" cy="{py(value)}" r="2.4"><title>layer {depth}: {value:.{digits}f}'
            "</title></circle>"
            for depth, value in row.points
        )
        charts[row.kind] = (
            f'<svg viewBox="0 0 {PANEL} {TALL}" role="img" aria-label="across depth">{frame}{ends}{behind}'
            f'<path class="own" d="{lines[row.kind]}"/>{dots}</svg>'
        )
    return charts


def _line(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{'L' if place else 'M'}{x} {y}" for place, (x, y) in enumerate(points))


def _rules(low: float, high: float) -> list[float]:
    """Two to four round numbers between the ends."""
    span = high - low
    unit = 10.0 ** math.floor(math.log10(span))
    step = next(step for step in (unit / 5, unit / 2, unit, 2 * unit, 5 * unit) if span / step <= 4)
    first = math.ceil(low / step)
    return [place * step for place in range(first, math.floor(high / step) + 1)]


def book_chart(levels: Sequence[float], span: float = 6.0) -> str:
    """The levels of a book as ticks from -span to span standard deviations; those beyond are not shown."""
    wide, high = 560, 22

    def px(value: float) -> float:
        return round((value / span + 1) / 2 * wide, 1)

    ticks = "".join(f"M{px(level)} 2V{high - 4}" for level in levels if abs(level) <= span)
    return (
        f'<svg viewBox="0 0 {wide} {high}" preserveAspectRatio="none" role="img" aria-label="levels of the book">'
        f'<path class="ticks" d="{ticks}"/></svg>'
    )
