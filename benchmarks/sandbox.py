"""What a call of changed code costs in each sandbox tier: warm, with a large argument, and the start of a worker.

    python benchmarks/sandbox.py [--quick] [--seeds N]

The peer is what agents without a warm worker do: a fresh `python -I` for every call, JSON in and out, no isolation at
all. Tiers that do not work on this machine are left out, with the reason. Times are wall-clock.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _report import Row, arguments, middle, write_results

from agentopt.sandbox import ContainerTier, Limits, NamespaceTier, ProcessTier, Tier, WorkerRunner

PEER = "python -I per call"
SOURCE = "def f(x):\n    return x"
FRESH = "import json, sys\ndef f(x):\n    return x\nprint(json.dumps(f(json.load(sys.stdin))))"
LARGE = "x" * 100_000


def tiers() -> tuple[dict[str, Tier], dict[str, str]]:
    """Tiers that hold here by name, and the reasons of the others."""
    wanted: dict[str, Tier] = {
        "process": ProcessTier(),
        "namespace": NamespaceTier("own"),
        "container": ContainerTier(),
    }
    if shutil.which("bwrap"):
        wanted["namespace (bwrap)"] = NamespaceTier("bwrap")
    reasons = {name: tier.available() for name, tier in wanted.items()}
    return {n: t for n, t in wanted.items() if reasons[n] is None}, {n: r for n, r in reasons.items() if r is not None}


def milliseconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def memory(pid: int) -> float:
    """MiB that a process and those below it hold, shared pages divided among their users."""
    total, pending = 0, [pid]
    while pending:
        one = pending.pop()
        for line in Path(f"/proc/{one}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
        for task in Path(f"/proc/{one}/task").iterdir():
            pending += [int(child) for child in (task / "children").read_text(encoding="utf-8").split()]
    return total / 1024


def measure(tier: Tier, calls: int, result: dict[str, list[float]]) -> None:
    """One round: start, warm calls, a large argument, memory, close."""

    def add(name: str, value: float) -> None:
        result.setdefault(name, []).append(value)

    runner = WorkerRunner(Limits(), tier=tier)
    identity = ""

    def first() -> None:
        nonlocal identity
        identity = runner.compile(SOURCE, "f")
        runner.call(identity, (1,), {})

    add("start", milliseconds(first))
    gc.collect()
    times = sorted(milliseconds(lambda: runner.call(identity, (1,), {})) for _ in range(calls))
    add("call", statistics.median(times))
    add("call p99", times[int(len(times) * 0.99) - 1])
    add(
        "large",
        statistics.median(milliseconds(lambda: runner.call(identity, (LARGE,), {})) for _ in range(calls // 10)),
    )
    if runner.pid is not None:
        with contextlib.suppress(PermissionError):  # an ordinary user may not read it of a process with another id
            add("memory", memory(runner.pid))
    add("close", milliseconds(runner.close))


def fresh(argument: object, calls: int) -> list[float]:
    """The peer: a new interpreter for each call."""
    text = json.dumps(argument)

    def once() -> None:
        subprocess.run([sys.executable, "-I", "-c", FRESH], input=text, capture_output=True, text=True, check=True)

    return [milliseconds(once) for _ in range(calls)]


def report(results: dict[str, dict[str, list[float]]], peer: list[float], large: list[float]) -> list[Row]:
    """All rows, tier by tier."""
    rows: list[Row] = []
    for name, result in results.items():

        def row(title: str, key: str, unit: str = "ms", name: str = name, result: Any = result, **more: Any) -> None:
            value, interval = middle(result[key])
            rows.append(Row(f"{title}, {name}", value, unit, interval, **more))

        row("warm call, median", "call", goal="<= 2", peer=PEER, peer_value=statistics.median(peer))
        row("warm call, 99th percentile", "call p99", goal="<= 2")
        row("warm call, 100 kB in and out", "large", peer=PEER, peer_value=statistics.median(large))
        row("first call, with the start of the worker", "start", peer=PEER, peer_value=statistics.median(peer))
        row("end of a worker", "close")
        if "memory" in result:
            row("memory of a worker", "memory", unit="MiB")
    return rows


def main() -> int:
    """Measure, print, write."""
    options = arguments(__doc__ or "", seeds=5)
    seeds, calls = (min(options.seeds, 2), 300) if options.quick else (options.seeds, 3_000)
    working, missing = tiers()
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}")
    results: dict[str, dict[str, list[float]]] = {name: {} for name in working}
    peer: list[float] = []
    large: list[float] = []
    for _ in range(seeds):
        for name, tier in working.items():
            measure(tier, calls, results[name])
        peer += fresh(1, 10)
        large += fresh(LARGE, 10)
    write_results("sandbox", report(results, peer, large), quick=options.quick,
                  extra={"tiers": results, "left out": missing, "peer": peer})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
