"""What the commands print with: two consoles, and the words for numbers that stand in every table.

Results go to stdout, progress and remarks to stderr, so that `agentopt ... --json | jq` works.
"""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Mapping
from typing import Any, cast

from rich.console import Console
from rich.text import Text


def out() -> Console:
    """Console on stdout; made anew so that a test's redirected stdout is honoured."""
    return Console(highlight=False, soft_wrap=False)


def err() -> Console:
    """Console on stderr."""
    return Console(stderr=True, highlight=False)


def short(value: Any, limit: int = 72) -> str:
    """One line of at most `limit` characters; what was cut is marked."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def usd(amount: float | None) -> str:
    """Dollars, with the cents that matter; unknown is said, never shown as zero."""
    if amount is None:
        return "unknown"
    if amount == 0:
        return "$0"
    return f"${amount:.2f}" if amount >= 1 else f"${amount:.4f}"


def spent(amount: float | None) -> str:
    """Dollars where no heading says that they are; unknown is said of what."""
    return "cost unknown" if amount is None else usd(amount)


def seconds(duration: float | None) -> str:
    """A duration in the unit a person would use."""
    if duration is None:
        return "-"
    if duration < 0.001:
        return f"{duration * 1e6:.0f} us"
    if duration < 1:
        return f"{duration * 1e3:.0f} ms"
    return f"{duration:.1f} s" if duration < 100 else f"{duration / 60:.1f} min"


def count(number: float) -> str:
    """1234567 as 1.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.1f}{unit}"
    return f"{number:.0f}"


def value_lines(value: Any, name: str = "") -> list[str]:
    """The value of parameter `name` as lines: text as it is, a demonstration a line, the rest readable or as JSON."""
    if isinstance(value, str):
        return value.splitlines() or [""]
    if isinstance(value, list):
        items = cast("list[Any]", value)
        if all(isinstance(item, Mapping) and "output" in item for item in items):
            return [f"{short(item.get('input', ''), 100)}  ->  {item['output']}" for item in items]
    from agentopt.graph import readable_lines

    lines = readable_lines(value, name)
    if lines is not None:
        return lines
    return json.dumps(value, ensure_ascii=False, indent=2).splitlines()


def diff_lines(before: Any, after: Any, name: str = "") -> list[tuple[str, str]]:
    """(sign, line) pairs: '-' only before, '+' only after, ' ' in both."""
    lines = difflib.ndiff(value_lines(before, name), value_lines(after, name))
    return [(line[0], line[2:]) for line in lines if line[0] in "-+ "]


def hanging(line: str, width: int) -> list[str]:
    """`line` broken at words, its continuation two columns further in than its beginning."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, max(20, width), subsequent_indent=indent, break_on_hyphens=False) or [""]


def _print_line(console: Console, sign: str, line: str) -> None:
    style = {"-": "red", "+": "green"}.get(sign, "dim")
    for place, piece in enumerate(hanging(line, console.width - 4)):
        console.print(Text(f"  {' ' if place else sign} {piece}", style=style))


def print_diff(console: Console, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Every changed parameter as a coloured diff; says so when nothing differs."""
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if not changed:
        console.print("no parameter differs")
    for name in changed:
        console.print(Text(name, style="bold"))
        if name not in before or name not in after:
            sign, only = ("+", after) if name not in before else ("-", before)
            for line in value_lines(only[name], name):
                _print_line(console, sign, line)
            continue
        for sign, line in diff_lines(before[name], after[name], name):
            _print_line(console, sign, line)
