"""What every benchmark shares: the row, the description of the machine, the table and the result file."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ".venv-peers"


@dataclass(frozen=True)
class Row:
    """One measured number. `goal` is "<= x", ">= x" or None; `interval` is a 95 % interval or the repeats' range."""

    name: str
    value: float | None
    unit: str
    interval: tuple[float, float] | None = None
    goal: str | None = None
    peer: str | None = None
    peer_value: float | None = None
    note: str | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        if self.goal is None:
            return None
        match = re.fullmatch(r"(<=|>=)\s*(-?[\d.]+(?:e-?\d+)?)", self.goal)
        if match is None:
            raise ValueError(f"row {self.name!r}: goal must be '<= x' or '>= x', found {self.goal!r}")
        if self.value is None or math.isnan(self.value):
            return False
        limit = float(match[2])
        return self.value <= limit if match[1] == "<=" else self.value >= limit


def middle(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median of repeats with their range."""
    return statistics.median(values), (min(values), max(values))


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(value) over log(size) by least squares: 1.0 is linear, 2.0 quadratic."""
    xs, ys = [math.log(size) for size in sizes], [math.log(max(value, 1e-9)) for value in values]
    return statistics.linear_regression(xs, ys).slope


def arguments(description: str, *, seeds: int = 3, **flags: str) -> argparse.Namespace:
    """Parse --quick and --seeds N, plus the given extra flags (name=help)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, for make bench")
    parser.add_argument("--seeds", type=int, default=seeds, help="repeats")
    for name, text in flags.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    return parser.parse_args()


def describe_machine(gpu: str | None = None) -> str:
    """Cores, vector unit, memory, GPU, Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = ""
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        flags = next(
            (line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("flags")), ""
        )
    vector = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if f" {flag}" in flags), "no AVX2")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    python = platform.python_version()
    return f"{cores} cores, {vector}, {memory:.0f} GB, {gpu or 'no GPU'}, {platform.system()}, Python {python}"


def peer_python(*requirements: str, extra_args: Sequence[str] = ()) -> tuple[str | None, str]:
    """Install pinned peers into .venv-peers and give its Python, or None and the reason it could not be done."""
    folder = ROOT / PEERS
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        *extra_args,
        *requirements,
    ]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip failed without a message"]
        return None, lines[-1][:200]
    return str(python), ""


def write_results(name: str, rows: Sequence[Row], *, quick: bool, gpu: str | None = None, extra: object = None) -> Path:
    """Print the table and write benchmarks/results/NAME.json (NAME.quick.json for a quick run, which is not kept)."""
    print_table(rows)
    data: dict[str, object] = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": describe_machine(gpu),
        "quick": quick,
        "rows": [_row_json(row) for row in rows],
    }
    if extra is not None:
        data["extra"] = extra
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / (f"{name}.quick.json" if quick else f"{name}.json")
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nwritten: {path.relative_to(ROOT)}")
    missed = [row.name for row in rows if row.met is False]
    print(f"goals missed: {', '.join(missed)}" if missed else "all goals met")
    return path


def _row_json(row: Row) -> dict[str, object]:
    data = asdict(row)
    for key in ("value", "peer_value"):
        data[key] = _rounded(data[key])
    data["interval"] = None if row.interval is None else [_rounded(row.interval[0]), _rounded(row.interval[1])]
    if row.note is None:
        del data["note"]
    return data


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(f"{value:.4g}")


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows as a table a person can read; a missed goal is marked."""
    head = ("measurement", "value", "range", "unit", "goal", "", "peer", "peer value")
    lines = [head]
    for row in rows:
        spread = "" if row.interval is None else f"{_show(row.interval[0])}–{_show(row.interval[1])}"
        verdict = {True: "ok", False: "MISSED", None: ""}[row.met]
        lines.append(
            (
                row.name,
                _show(row.value),
                spread,
                row.unit,
                row.goal or "",
                verdict,
                row.peer or "",
                _show(row.peer_value),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for number, line in enumerate(lines):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))
    for row in rows:
        if row.note:
            print(f"* {row.name}: {row.note}")


def _show(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
