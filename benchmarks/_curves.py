"""A line chart as SVG with linear axes and a band per series (an interval or the range of the seeds).

Plain text, so that it opens anywhere and diffs well; `_curve.py` is the same with logarithmic axes and without bands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 820, 460, 64, 230, 40, 52
COLOURS = ("#3465a4", "#cc0000", "#4e9a06", "#75507b", "#c17d11", "#555753", "#06989a", "#a40000", "#204a87", "#8f5902")
Series = Sequence[tuple[float, float, float, float]]
"""Points of one line: x, y, low, high."""


def curves(
    path: Path, title: str, x_label: str, y_label: str, series: Mapping[str, Series], dashed: Sequence[str] = ()
) -> None:
    """Write the chart to `path`; series named in `dashed` are references. A series of one point is only a dot."""
    points = [point for line in series.values() for point in line]
    if not points:
        raise ValueError("curves: no points to draw")
    x_ticks = ticks(min(p[0] for p in points), max(p[0] for p in points))
    y_ticks = ticks(min(p[2] for p in points), max(p[3] for p in points))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img"><title>{escape(title)}</title><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="16" y="{(TOP + HEIGHT - BOTTOM) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {(TOP + HEIGHT - BOTTOM) / 2})">{escape(y_label)}</text>',
    ]

    def px(value: float) -> float:
        return round(LEFT + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - RIGHT - LEFT), 1)

    def py(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - BOTTOM - TOP), 1)

    for x in x_ticks:
        parts.append(
            f'<line x1="{px(x)}" y1="{TOP}" x2="{px(x)}" y2="{HEIGHT - BOTTOM}" stroke="#eee"/>'
            f'<text x="{px(x)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:,g}</text>'
        )
    for y in y_ticks:
        parts.append(
            f'<line x1="{LEFT}" y1="{py(y)}" x2="{WIDTH - RIGHT}" y2="{py(y)}" stroke="#ccc"/>'
            f'<text x="{LEFT - 6}" y="{py(y) + 4}" text-anchor="end">{y:g}</text>'
        )
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        dash = ' stroke-dasharray="5 4"' if name in dashed else ""
        ordered = sorted(line)
        band = [f"{px(x)},{py(high)}" for x, _, _, high in ordered]
        band += [f"{px(x)},{py(low)}" for x, _, low, _ in reversed(ordered)]
        if any(low != high for _, _, low, high in ordered):
            parts.append(f'<polygon points="{" ".join(band)}" fill="{colour}" fill-opacity="0.12" stroke="none"/>')
        route = " ".join(f"{px(x)},{py(y)}" for x, y, _, _ in ordered)
        parts.append(f'<polyline points="{route}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if not dash:
            parts += [f'<circle cx="{px(x)}" cy="{py(y)}" r="3" fill="{colour}"/>' for x, y, _, _ in ordered]
        row = TOP + 18 * number + 8
        start = WIDTH - RIGHT + 12
        parts.append(
            f'<line x1="{start}" y1="{row}" x2="{start + 22}" y2="{row}" stroke="{colour}" stroke-width="2"{dash}/>'
            f'<text x="{start + 28}" y="{row + 4}">{escape(name)}</text>'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose `low` and `high`."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"curves: found a value that is not finite ({low}, {high})")
    if high <= low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
