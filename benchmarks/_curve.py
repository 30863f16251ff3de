"""A line chart as SVG: logarithmic axes, one line per series. Plain text, so that it opens anywhere and diffs well."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 440, 64, 190, 40, 52
COLOURS = ("#3465a4", "#cc0000", "#4e9a06", "#75507b", "#c17d11", "#555753")
Points = Sequence[tuple[float, float]]


def write_curve(
    path: Path, title: str, x_name: str, y_name: str, series: Mapping[str, Points], dashed: Sequence[str] = ()
) -> None:
    """Write the chart; series named in `dashed` are references, not measurements."""
    points = [point for line in series.values() for point in line]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    at_x, at_y = _axis(min(xs), max(xs), LEFT, WIDTH - RIGHT), _axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img"><title>{escape(title)}</title><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_name)}</text>',
        f'<text x="16" y="{(TOP + HEIGHT - BOTTOM) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {(TOP + HEIGHT - BOTTOM) / 2})">{escape(y_name)}</text>',
    ]
    for x in sorted(set(xs)):
        parts.append(
            f'<line x1="{at_x(x)}" y1="{TOP}" x2="{at_x(x)}" y2="{HEIGHT - BOTTOM}" stroke="#eee"/>'
            f'<text x="{at_x(x)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>'
        )
    for exponent in range(math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys))) + 1):
        y = 10.0**exponent
        if min(ys) <= y <= max(ys):
            parts.append(
                f'<line x1="{LEFT}" y1="{at_y(y)}" x2="{WIDTH - RIGHT}" y2="{at_y(y)}" stroke="#ccc"/>'
                f'<text x="{LEFT - 6}" y="{at_y(y) + 4}" text-anchor="end">{y:g}</text>'
            )
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        dash = ' stroke-dasharray="5 4"' if name in dashed else ""
        route = " ".join(f"{at_x(x)},{at_y(y)}" for x, y in line)
        parts.append(f'<polyline points="{route}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if not dash:
            parts += [f'<circle cx="{at_x(x)}" cy="{at_y(y)}" r="3" fill="{colour}"/>' for x, y in line]
        y = TOP + 18 * number + 8
        start = WIDTH - RIGHT + 12
        parts.append(
            f'<line x1="{start}" y1="{y}" x2="{start + 22}" y2="{y}" stroke="{colour}" stroke-width="2"{dash}/>'
            f'<text x="{start + 28}" y="{y + 4}">{escape(name)}</text>'
        )
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Value to coordinate on a logarithmic axis."""
    span = math.log(high / low) or 1.0
    return lambda value: round(start + math.log(value / low) / span * (end - start), 1)
