"""Runs of a study: each is a function of its cell, its result one line of a JSONL file, so that a study can be stopped.

The same command goes on where the file ends; `--shard i/n` splits the cells among processes that run side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
NEAR = 0.05
"""A learning rate is in the stable range when dev accuracy there is within this of the method's best."""


@dataclass(frozen=True)
class Cell:
    """One run: a method at a learning rate on a seed."""

    part: str
    method: str
    lr: float
    seed: int

    @property
    def key(self) -> tuple[str, str, float, int]:
        return (self.part, self.method, self.lr, self.seed)


@dataclass
class Runs:
    """The result file of a study."""

    path: Path
    records: dict[tuple[str, str, float, int], dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.read()

    def read(self) -> None:
        """Take in what other processes have written as well."""
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                if line.endswith("}"):
                    record = json.loads(line)
                    self.records[(record["part"], record["method"], record["lr"], record["seed"])] = record

    def add(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Append one line in one write."""
        record = {"part": cell.part, "method": cell.method, "lr": cell.lr, "seed": cell.seed, **result}
        self.records[cell.key] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({key: _short(value) for key, value in record.items()}) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def go_on(
        self,
        units: Sequence[Sequence[Cell]],
        run: Callable[[Sequence[Cell]], Sequence[Mapping[str, Any]]],
        options: argparse.Namespace,
    ) -> int:
        """Run the units that are missing, within the minutes given; how many are missing still."""
        begun = time.monotonic()
        index, count = (int(number) for number in options.shard.split("/"))
        mine = [unit for number, unit in enumerate(units) if number % count == index - 1]
        for unit in mine:
            if all(cell.key in self.records for cell in unit):
                continue
            if options.minutes and time.monotonic() - begun > 60 * options.minutes:
                break
            started = time.process_time()
            results = run(unit)
            seconds = round((time.process_time() - started) / len(unit), 2)
            for cell, result in zip(unit, results, strict=True):
                self.add(cell, {**result, "cpu_s": seconds})
                print(f"{cell.part} {cell.method} lr {cell.lr:g} seed {cell.seed}: {dict(result)}", flush=True)
        self.read()
        return sum(not all(cell.key in self.records for cell in unit) for unit in mine)

    def of(self, part: str, method: str) -> dict[float, list[dict[str, Any]]]:
        """The runs of a method by learning rate, in the order of seeds."""
        found: dict[float, list[dict[str, Any]]] = {}
        for key in sorted(self.records):
            if key[:2] == (part, method):
                found.setdefault(key[2], []).append(self.records[key])
        return found

    def methods(self, part: str) -> list[str]:
        """The methods of a part, in the order in which they were first run."""
        return list(dict.fromkeys(key[1] for key in self.records if key[0] == part))


@dataclass(frozen=True)
class Best:
    """A method at the learning rate that is best on dev (mean of the seeds)."""

    lr: float
    dev: float
    tests: tuple[float, ...]
    seeds: tuple[int, ...]
    stable: tuple[float, ...]
    rates: tuple[float, ...]

    @property
    def test(self) -> float:
        return statistics.fmean(self.tests)

    @property
    def sd(self) -> float:
        return statistics.stdev(self.tests) if len(self.tests) > 1 else 0.0

    @property
    def decades(self) -> float:
        """Width of the stable range, as the logarithm of its ends' ratio."""
        return math.log10(max(self.stable) / min(self.stable))

    def note(self) -> str:
        """What stands beside the row."""
        edge = " (an end of the grid)" if self.lr in (self.rates[0], self.rates[-1]) and len(self.rates) > 1 else ""
        stable = f"{min(self.stable):g} to {max(self.stable):g}"
        return (
            f"lr {self.lr:g}{edge}, sd {self.sd:.3f}, n = {len(self.tests)}; dev within {NEAR} of its best at {stable}"
        )


def best(by_rate: Mapping[float, Sequence[Mapping[str, Any]]]) -> Best:
    """Choose the learning rate on dev; the test numbers are those of that rate alone."""
    most = max(len(records) for records in by_rate.values())
    whole = {lr: records for lr, records in by_rate.items() if len(records) == most}
    devs = {lr: statistics.fmean(record["dev"] for record in records) for lr, records in whole.items()}
    chosen = max(devs, key=lambda lr: devs[lr])
    around = [chosen]
    order = sorted(devs)
    for step in (1, -1):  # the contiguous range around the best
        place = order.index(chosen) + step
        while 0 <= place < len(order) and devs[order[place]] >= devs[chosen] - NEAR:
            around.append(order[place])
            place += step
    records = whole[chosen]
    tests, seeds = tuple(record["test"] for record in records), tuple(record["seed"] for record in records)
    return Best(chosen, devs[chosen], tests, seeds, tuple(sorted(around)), tuple(order))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Range of the seeds."""
    return min(values), max(values)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every part of the study takes."""
    parser.add_argument("--quick", action="store_true", help="a few runs of a few steps, for make bench")
    parser.add_argument("--seeds", type=int, default=3, help="repeats")
    parser.add_argument("--minutes", type=float, default=0, help="stop after so long; the same command goes on")
    parser.add_argument("--shard", default="1/1", help="i/n: the i-th of n processes that share the runs")
    parser.add_argument("--table", action="store_true", help="only write the result file from the runs there are")


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
