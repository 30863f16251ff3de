"""Two small inline SVG charts for the report: the held-out interval, and the search over time.

Plain strings, no script, no library: the report must open anywhere, also in ten years. Numbers only; nothing from the
user's data reaches this file, so nothing needs escaping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 900


@dataclass(frozen=True)
class Point:
    """One proposal: x in rollouts spent (or proposal number), y in score."""

    x: float
    y: float
    accepted: bool
    label: str


def _scale(value: float, low: float, high: float, start: float, end: float) -> float:
    return start if high <= low else start + (value - low) / (high - low) * (end - start)


def interval_chart(difference: float, low: float, high: float) -> str:
    """The difference with its interval against a line at zero."""
    left, right = min(low, 0.0), max(high, 0.0)
    margin = (right - left) * 0.15 or 0.1
    left, right = left - margin, right + margin

    def at(value: float) -> float:
        return round(_scale(value, left, right, 20, WIDTH - 20), 1)

    colour = "var(--good)" if low > 0 else "var(--bad)" if high < 0 else "var(--soft)"
    return (
        f'<svg viewBox="0 0 {WIDTH} 92" role="img" '
        f'aria-label="difference {difference:+.3f}, interval {low:+.3f} to {high:+.3f}">'
        f'<line class="axis" x1="20" y1="62" x2="{WIDTH - 20}" y2="62"/>'
        f'<line x1="{at(0)}" y1="18" x2="{at(0)}" y2="70" stroke="var(--soft)" stroke-dasharray="4 3"/>'
        f'<text x="{at(0)}" y="86" text-anchor="middle">no change</text>'
        f'<line x1="{at(low)}" y1="42" x2="{at(high)}" y2="42" stroke="{colour}" stroke-width="4"/>'
        f'<circle cx="{at(difference)}" cy="42" r="7" fill="{colour}"/>'
        f'<text x="{at(difference)}" y="24" text-anchor="middle">{difference:+.3f}</text>'
        f'<text x="{at(low)}" y="60" text-anchor="end">{low:+.3f}&#160;</text>'
        f'<text x="{at(high)}" y="60">&#160;{high:+.3f}</text></svg>'
    )


def search_chart(points: Sequence[Point], start: float) -> str:
    """Proposals as dots and the best accepted score so far as a step line from the baseline `start`."""
    if not points:
        return ""
    height, bottom, top, gutter = 260, 226, 14, 48
    ys = [point.y for point in points] + [start]
    low, high = min(ys), max(ys)
    low, high = (low - 0.05, high + 0.05) if high - low < 0.05 else (low, high)
    last = max(point.x for point in points)
    first = min(0.0, min(point.x for point in points))

    def px(value: float) -> float:
        return round(_scale(value, first, last, gutter, WIDTH - 16), 1)

    def py(value: float) -> float:
        return round(_scale(value, low, high, bottom, top), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="score of every proposal in order">']
    for step in range(5):
        value = low + (high - low) * step / 4
        parts.append(f'<line class="axis" x1="{gutter}" y1="{py(value)}" x2="{WIDTH - 16}" y2="{py(value)}"/>')
        parts.append(f'<text x="{gutter - 8}" y="{py(value) + 4}" text-anchor="end">{value:.2f}</text>')
    best = start
    path = [f"M{px(first)} {py(best)}"]
    for point in sorted(points, key=lambda item: item.x):
        if point.accepted and point.y > best:
            path.append(f"H{px(point.x)}")
            best = point.y
            path.append(f"V{py(best)}")
    path.append(f"H{px(last)}")
    parts.append(f'<path class="best" d="{" ".join(path)}"/>')
    for point in points:
        style = "dot ok" if point.accepted else "dot"
        parts.append(
            f'<circle class="{style}" cx="{px(point.x)}" cy="{py(point.y)}" r="{5 if point.accepted else 3.5}"/>'
        )
    parts.append(f'<text x="{gutter}" y="{height - 8}">first proposal</text>')
    parts.append(f'<text x="{WIDTH - 16}" y="{height - 8}" text-anchor="end">{int(last)} rollouts</text></svg>')
    return "".join(parts)
