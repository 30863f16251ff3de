"""Claim: agentopt needs no more LM calls than the best of its peers to reach 90 % of a known optimum, in less time.

gepa 0.1.4, dspy 3.4.1 (MIPROv2 and GEPA), textgrad 0.1.8 and trace-opt 0.1.3.8 against `ao.tune`, in one run, on one
problem with a known answer (`_peer_world`): 40 training and 40 validation cases, six hidden rules that the instruction
has to state, one start instruction. A loopback endpoint plays both models. Its proposer answers each system in that
system's own format and adds one rule that the feedback it was shown justifies with probability q, else it only rewords;
what it draws depends on the seed and the number of rewrites of that run alone.

    python benchmarks/peers.py [--quick] [--seeds 20] [--only SYSTEM ...] [--latency MS] [--cap CALLS]

Counted are all calls, task and proposer, that a system made until the candidate it would return at that moment (each
adapter says when it has one) is right on 90 % of 1,000 hidden cases. A run that is not there after `--cap` calls is
censored and counts as the cap. Every system runs in a process of its own, its runs one after the other, imports and one
warm-up run excluded; up to eight task calls at a time. "Outside the LM" is the wall time to the target less the time in
which at least one request was with the endpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _report import Row, peer_python, write_results

HERE = Path(__file__).resolve().parent
REQUIREMENTS = ("gepa==0.1.4", "dspy==3.4.1", "optuna==4.9.0", "textgrad==0.1.8", "trace-opt==0.1.3.8")
TARGET = 0.9
ROWS = 40
QUALITIES = (0.9, 0.4)
LIMIT = 300.0
"""Seconds after which a run is given up and its process ended."""


@dataclass(frozen=True)
class System:
    """One line of the table: its adapter and what the adapter is told."""

    name: str
    adapter: str
    options: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether it is agentopt."""
        return self.adapter == "agentopt_"


SYSTEMS = (
    System("agentopt", "agentopt_", {"driver": "auto", "optimizer": "auto"}),
    System("agentopt auto+reflection", "agentopt_", {"driver": "auto", "optimizer": "reflection"}),
    System("agentopt pareto+reflection", "agentopt_", {"driver": "pareto", "optimizer": "reflection"}),
    System("agentopt greedy+optoprime", "agentopt_", {"driver": "greedy", "optimizer": "optoprime"}),
    System("gepa", "gepa_"),
    System("dspy.GEPA", "dspy_gepa"),
    System("dspy MIPROv2", "dspy_mipro"),
    System("textgrad", "textgrad_"),
    System("trace-opt", "trace_opt"),
)


@dataclass(frozen=True)
class Outcome:
    """One run up to its target (or its end)."""

    seed: int
    reached: bool
    calls: int
    task: int
    proposer: int
    rewrites: int
    wall: float
    outside: float
    cpu: float
    steps: list[tuple[int, float]]
    """(calls so far, hidden accuracy) at every new best."""


class Endpoint:
    """The loopback endpoint, in its own process."""

    def __init__(self, latency: float) -> None:
        command = [sys.executable, str(HERE / "_peer_endpoint.py"), str(latency)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def declare(self, run: str, seed: int, quality: float) -> None:
        """Open the log of a run."""
        body = json.dumps({"run": run, "seed": seed, "quality": quality, "rows": ROWS}).encode()
        with _opener.open(urllib.request.Request(f"http://127.0.0.1:{self.port}/run", body)) as reply:
            reply.read()

    def log(self, run: str) -> list[tuple[str, float, float, str]]:
        """Close the log of a run and give it."""
        with _opener.open(f"http://127.0.0.1:{self.port}/log/{run}") as reply:
            return json.load(reply)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Worker:
    """One system's process; started again when a run had to be given up."""

    def __init__(self, system: System, python: str, log: Path) -> None:
        self._command = [python, str(HERE / "peer_adapters" / f"{system.adapter}.py")]
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """One run; raises RuntimeError when the adapter failed."""
        if self._process is None:
            with self._log.open("a", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self._command[-1]} ended; see {self._log}")
        data = json.loads(line)
        if data["error"]:
            raise RuntimeError(f"{self._command[-1]}, {job}: {data['error']}")
        return data

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait(30)


def union(intervals: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """Length of the union of intervals, within [start, end]."""
    total, reach = 0.0, start
    for left, right in sorted(intervals):
        left, right = max(left, reach), min(right, end)
        if right > left:
            total += right - left
            reach = right
    return total


def outcome(seed: int, cap: int, data: dict[str, Any], calls: list[tuple[str, float, float, str]]) -> Outcome:
    """What a run's marks and the endpoint's log say together."""
    unknown = [call for call in calls if call[3] == "unknown"]
    if unknown:
        raise RuntimeError(f"the proposer could not read {len(unknown)} prompts of run {data['run']}")
    marks = [(when, truth) for when, truth, _ in data["marks"]]
    starts = sorted(call[1] for call in calls)
    steps = [(sum(start <= when for start in starts), truth) for when, truth in marks]
    hit = next((i for i, (count, truth) in enumerate(steps) if truth >= TARGET and count <= cap), None)
    end = data["ended"] if hit is None else marks[hit][0]
    inside = [call for call in calls if call[1] <= end]
    wall = end - data["started"]
    return Outcome(
        seed=seed,
        reached=hit is not None,
        calls=cap if hit is None else len(inside),
        task=sum(call[0] == "task" for call in inside),
        proposer=sum(call[0] == "proposer" for call in inside),
        rewrites=sum(call[3] in REWRITES for call in inside if call[0] == "proposer"),
        wall=wall,
        outside=wall - union([(call[1], call[2]) for call in inside], data["started"], end),
        cpu=data["cpu"],
        steps=steps,
    )


REWRITES = {"gepa", "dspy rewrite", "textgrad", "trace", "optoprime", "instructions", "reflection"}


def measure(
    system: System, python: str, endpoint: Endpoint, options: argparse.Namespace, seeds: int, quality: float, log: Path
) -> list[Outcome]:
    """All seeds of one system at one quality."""
    worker = Worker(system, python, log)
    found: list[Outcome] = []
    try:
        for seed in (10_000, *range(seeds)):
            name = f"{system.name.replace(' ', '-')}-{quality}-{seed}-{time.monotonic_ns() % 10**9}"
            endpoint.declare(name, seed, quality)
            cap = 200 if seed == 10_000 else options.cap
            job = {"run": name, "seed": seed, "quality": quality, "rows": ROWS, "cap": cap, "port": endpoint.port}
            data = worker.run({**job, "target": TARGET, "options": system.options})
            calls = endpoint.log(name)
            if seed != 10_000:  # that was the warm-up
                found.append(outcome(seed, options.cap, data, calls))
    finally:
        worker.close()
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap of the median."""
    rng = random.Random(0)
    draws = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(4000))
    return draws[100], draws[-101]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 seeds, one setting")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--latency", type=float, default=2.0, help="milliseconds the endpoint takes for every call")
    parser.add_argument("--cap", type=int, default=3000, help="calls after which a run is censored")
    options = parser.parse_args()
    endpoint = Endpoint(options.latency)
    for system in SYSTEMS:
        if options.only and system.name not in options.only:
            continue
        python = sys.executable if system.ours else str(HERE.parent / ".venv-peers/bin/python")
        for q in QUALITIES[:1] if options.quick else QUALITIES:
            t = time.monotonic()
            got = measure(system, python, endpoint, options, 3 if options.quick else options.seeds, q, Path("/tmp/plan/peers.log"))
            print(system.name, q, "med", statistics.median(o.calls for o in got), [o.calls for o in got], "reached", sum(o.reached for o in got), f"wall {statistics.median(o.wall for o in got):.2f} outside {statistics.median(o.outside for o in got):.2f} cpu {statistics.median(o.cpu for o in got):.2f} took {time.monotonic()-t:.0f}", flush=True)
            print("   prop", [o.proposer for o in got], got[0].steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
