"""Cells of the utility benchmark: what was measured for one task, seed, method and ratio, kept after every one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Cell:
    """One method at one ratio; `scores` holds one number per test row, in the order of the rows, and is empty where the
    method gave nothing to read.
    """

    task: str
    seed: int
    method: str
    ratio: float
    """Asked share of the original's length; 1.0 for the original itself."""
    scores: list[float]
    length: float
    """Length that came out, in the task's unit; a mean over rows where every row has a text of its own."""
    original: float
    """Length of the original in that unit."""
    over: int = 0
    """Texts that came out longer than asked."""
    reader_calls: int = 0
    seconds: float = 0.0
    """For making the shorter text or texts; reading them is not counted."""
    groups: list[str] = field(default_factory=list[str])
    """What rows have in common (the theory they ask about); empty where every row stands alone."""
    note: str = ""
    raw: float | None = None
    """Accuracy of a label-scoring reader without calibration."""

    @property
    def key(self) -> str:
        """Names the cell."""
        return key_of(self.task, self.seed, self.method, self.ratio)


def key_of(task: str, seed: int, method: str, ratio: float) -> str:
    """The name of a cell, before it is there."""
    return f"{task}|{seed}|{method}|{ratio:g}"


class Cells:
    """All cells so far, in one file of JSON lines; the later of two with one key counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Cell] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                cell = Cell(**json.loads(line))
                self._found[cell.key] = cell

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def add(self, cell: Cell) -> None:
        """Keep one more."""
        self._found[cell.key] = cell
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(cell)) + "\n")

    def of(self, task: str, method: str, ratio: float) -> list[Cell]:
        """The seeds of one method at one ratio; of a task only those in which as much was measured as in any."""
        counts = Counter(cell.seed for cell in self._found.values() if cell.task == task)
        found = [cell for cell in self._found.values() if (cell.task, cell.method, cell.ratio) == (task, method, ratio)]
        whole = [cell for cell in found if counts[cell.seed] == max(counts.values())]
        return sorted(whole, key=lambda cell: cell.seed)

    def tasks(self) -> list[str]:
        """Tasks with at least one cell."""
        return list(dict.fromkeys(cell.task for cell in self._found.values()))

    def methods(self, task: str) -> list[str]:
        """Methods with at least one cell of a task."""
        return list(dict.fromkeys(cell.method for cell in self._found.values() if cell.task == task))

    def ratios(self, task: str) -> list[float]:
        """Asked shares of a task, largest first, without the original."""
        return sorted({cell.ratio for cell in self._found.values() if cell.task == task} - {1.0, 0.0}, reverse=True)


def values_of(cells: Sequence[Cell]) -> tuple[list[float], list[str]]:
    """All rows of all seeds, and the group each belongs to."""
    values = [score for cell in cells for score in cell.scores]
    groups = [
        group
        for cell in cells
        for group in (cell.groups or [f"{cell.seed}-{number}" for number in range(len(cell.scores))])
    ]
    return values, groups


def interval(values: Sequence[float], groups: Sequence[str]) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean; what has a group in common is drawn together."""
    names = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    sums, sizes = np.zeros(len(names)), np.zeros(len(names))
    for value, group in zip(values, groups, strict=True):
        sums[names[group]] += value
        sizes[names[group]] += 1
    drawn = np.random.default_rng(0).integers(0, len(names), (RESAMPLES, len(names)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def mean_of(cells: Sequence[Cell]) -> tuple[float, tuple[float, float]]:
    """Mean score over all rows of all seeds, with its interval."""
    values, groups = values_of(cells)
    return float(np.mean(values)), interval(values, groups)


def difference(one: Sequence[Cell], other: Sequence[Cell]) -> tuple[float, tuple[float, float]]:
    """Mean of the paired differences over the seeds that both have, with its interval."""
    shared = {cell.seed for cell in one} & {cell.seed for cell in other}
    left, groups = values_of([cell for cell in one if cell.seed in shared])
    right, _ = values_of([cell for cell in other if cell.seed in shared])
    values = [a - b for a, b in zip(left, right, strict=True)]
    return float(np.mean(values)), interval(values, groups)


def notes_of(cells: Sequence[Cell]) -> list[str]:
    """What was noted, without what stands in brackets: a reason may quote the data, which stays out of results."""
    return sorted({cell.note.partition(" (")[0] for cell in cells if cell.note})


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """What goes into the result file beside the accuracy: counts and lengths, no data."""
    found: dict[str, Any] = {
        "rows": sum(len(cell.scores) for cell in cells),
        "seeds": [cell.seed for cell in cells],
        "by_seed": [round(float(np.mean(cell.scores)), 4) for cell in cells],
        "length": round(float(np.mean([cell.length for cell in cells])), 1),
        "share": round(float(np.mean([cell.length / cell.original for cell in cells])), 4),
        "over": sum(cell.over for cell in cells),
        "reader_calls": sum(cell.reader_calls for cell in cells),
        "seconds": round(sum(cell.seconds for cell in cells), 2),
    }
    notes = notes_of(cells)
    return found | ({"note": "; ".join(notes)} if notes else {})
