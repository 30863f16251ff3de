"""What the GPU benchmarks share: where agentopt is, the device, timing, a deadline, results written as they come."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "benchmarks"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from _report import RESULTS, Row, _row_json, describe_machine, print_table  # noqa: E402

NO_GPU = "torch sees no GPU here, so the GPU benchmarks are left out; nothing was measured."


def options(description: str, minutes: float) -> argparse.Namespace:
    """The command line of a GPU benchmark; ends the program with one sentence where there is no GPU."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu together with --tiny")
    parser.add_argument("--tiny", action="store_true", help="shapes that show that everything runs, not what it costs")
    parser.add_argument("--minutes", type=float, default=minutes, help="no new measurement is begun after this long")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    found = parser.parse_args()
    if found.device != "cpu" and not available():
        print(NO_GPU)
        raise SystemExit(0)
    if found.device == "cpu" and not found.tiny:
        parser.error("--device cpu needs --tiny: the real shapes need a GPU")
    if found.device == "cpu":
        import torch

        torch.set_num_threads(1)
    return found


def available() -> bool:
    """Whether torch is there and sees a GPU."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


class Bench:
    """Rows of one benchmark; every row is written to NAME.gpu.json as soon as it is there."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        self.tiny, self.device, self.rows = given.tiny, given.device, list[Row]()
        self.skipped: list[str] = []
        self.extra: dict[str, Any] = {}
        self.path: Path = given.out / f"{name}.gpu{'.quick' if given.tiny else ''}.json"
        self._deadline = time.monotonic() + 60 * given.minutes
        self._began = time.monotonic()

    def late(self, name: str) -> bool:
        """Whether time is over; the measurement is then noted as left out."""
        if time.monotonic() < self._deadline:
            return False
        self.skipped.append(name)
        self.write()
        return True

    def add(self, *rows: Row) -> None:
        """Take rows, print them, write the file."""
        self.rows += rows
        for row in rows:
            verdict = {True: "ok", False: f"MISSED (goal {row.goal})", None: ""}[row.met]
            value = "-" if row.value is None else f"{row.value:.4g}"
            print(f"  {row.name}: {value} {row.unit} {verdict} {row.note or ''}".rstrip(), flush=True)
        self.write()

    def write(self) -> None:
        import torch

        gpu = torch.cuda.get_device_name() if self.device != "cpu" else None
        data: dict[str, Any] = {
            "command": shlex.join(["python", f"benchmarks/gpu/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": f"{describe_machine(gpu)}, torch {torch.__version__}",
            "quick": self.tiny,
            "seconds": round(time.monotonic() - self._began, 1),
            "rows": [_row_json(row) for row in self.rows],
            "left_out": self.skipped,
            "extra": self.extra,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def finish(self) -> None:
        """Print the whole table and what was left out."""
        self.write()
        print()
        print_table(self.rows)
        if self.skipped:
            print(f"left out, for lack of time: {', '.join(self.skipped)}")
        print(f"written: {self.path}")


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def measure(action: Callable[[], Any], device: str, repeats: int) -> tuple[list[float], float | None]:
    """Seconds of each repeat after a warm-up, and peak memory (GiB) of all of them; None on a CPU."""
    import torch

    action()
    synchronize(device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    for _ in range(repeats):
        begun = time.perf_counter()
        action()
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return times, None if device == "cpu" else torch.cuda.max_memory_allocated() / 2**30


def median(values: list[float]) -> float:
    """The middle one."""
    return statistics.median(values)
