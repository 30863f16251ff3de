"""File-size table: a file past 400 lines is asked what it is doing, past 700 the check fails.

Size is a quantity we look at on every run, so growth is noticed the day it happens.
"""

from __future__ import annotations

import sys
from pathlib import Path

ASK, SPLIT = 400, 700
ROOTS = ("agentopt", "tests", "benchmarks", "traces")


def main() -> int:
    """Print lines per room and the largest files; exit code 1 when a file is past the hard limit."""
    root = Path(__file__).resolve().parent.parent
    sizes = {
        path.relative_to(root): sum(1 for _ in path.open(encoding="utf-8"))
        for top in ROOTS
        for path in sorted((root / top).rglob("*.py"))
    }
    rooms: dict[str, list[int]] = {}
    for path, lines in sizes.items():
        rooms.setdefault("/".join(path.parts[:2]) if len(path.parts) > 2 else path.parts[0], []).append(lines)
    for room, lines in sorted(rooms.items()):
        print(f"{room:32}{len(lines):5} files {sum(lines):7} lines   largest {max(lines)}")
    print(f"{'all':32}{len(sizes):5} files {sum(sizes.values()):7} lines")
    for path, lines in sorted(sizes.items(), key=lambda item: -item[1]):
        if lines > ASK:
            print(f"{'SPLIT' if lines > SPLIT else 'ask  '} {path}: {lines} lines")
    return int(any(lines > SPLIT for lines in sizes.values()))


if __name__ == "__main__":
    sys.exit(main())
