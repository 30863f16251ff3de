"""Claim: agentopt needs no more LM calls than the best of its peers to reach 90 % of a known optimum, in less time.

gepa 0.1.4, dspy 3.4.1 (MIPROv2 and GEPA), textgrad 0.1.8 and trace-opt 0.1.3.8 against `ao.tune`, in one run, on one
problem with a known answer (`_peer_world`): 40 training and 40 validation cases, six hidden rules that the instruction
has to state, one start instruction. A loopback endpoint plays both models. Its proposer answers each system in that
system's own format and adds one rule that the feedback it was shown justifies with probability q, else it only rewords;
what it draws depends on the seed and the number of rewrites of that run alone.

    python benchmarks/peers.py [--quick] [--seeds 20] [--only SYSTEM ...] [--latency MS] [--cap CALLS]

Counted are all calls, task and proposer, that a system made until the candidate it would return at that moment (each
adapter says when it has one) is right on 90 % of 1,000 hidden cases. A run that is not there after `--cap` calls is
censored and counts as the cap. The interval is a 95 % bootstrap of the median over the seeds. Every system runs in a
process of its own, its runs one after the other, imports and one warm-up run excluded; up to eight task calls at a
time. "Outside the LM" is the wall time to the target less the time in which at least one request was with the endpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _report import Row, peer_python, print_table, write_results

HERE = Path(__file__).resolve().parent
REQUIREMENTS = ("gepa==0.1.4", "dspy==3.4.1", "optuna==5.0.0", "textgrad==0.1.8", "trace-opt==0.1.3.8")
TARGET = 0.9
ROWS = 40
QUALITIES = (0.9, 0.4)
LIMIT = 240.0
"""Seconds after which a run is given up, its process ended and the benchmark with it."""
FIRST_SEED = 100
"""Seeds below were looked at while the climb driver was made; the figures are from others."""
WARM_UP = 10_000
"""Seed of the run before the counted ones."""
REWRITES = {"gepa", "dspy rewrite", "textgrad", "trace", "optoprime", "instructions", "reflection"}
"""Formats of the proposer that write a new instruction; the others only pass feedback on."""


@dataclass(frozen=True)
class System:
    """One line of the table: its adapter and what the adapter is told."""

    name: str
    adapter: str
    options: dict[str, str] = field(default_factory=dict)


OURS = System("agentopt", "agentopt_", {"driver": "auto", "optimizer": "auto"})
"""What a user gets without naming a driver or an optimizer. The goals are about this one."""
SYSTEMS = (
    OURS,
    System("agentopt, reflection", "agentopt_", {"driver": "auto", "optimizer": "reflection"}),
    System("agentopt, pareto + reflection", "agentopt_", {"driver": "pareto", "optimizer": "reflection"}),
    System("gepa", "gepa_"),
    System("dspy.GEPA", "dspy_gepa"),
    System("textgrad", "textgrad_"),
    System("trace-opt", "trace_opt"),
    System("dspy MIPROv2", "dspy_mipro"),
)
VERSIONS = {
    "gepa": "gepa 0.1.4",
    "dspy.GEPA": "dspy 3.4.1 GEPA",
    "textgrad": "textgrad 0.1.8",
    "trace-opt": "trace-opt 0.1.3.8",
    "dspy MIPROv2": "dspy 3.4.1 MIPROv2",
}


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
    """One system's process, with a cache folder of its own and no proxy between it and the endpoint."""

    def __init__(self, system: System, python: str, folder: Path) -> None:
        self.log = folder / "log.txt"
        self._command = [python, str(HERE / "peer_adapters" / f"{system.adapter}.py")]
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        environment |= {"PYTHONPATH": str(HERE), "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        cache = str(folder / f"cache-{system.adapter}")
        environment |= {"XDG_CACHE_HOME": cache, "DSPY_CACHEDIR": cache}
        with self.log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=environment,
                cwd=folder,
            )

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """One run; raises RuntimeError when the adapter failed."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        timer = threading.Timer(LIMIT, process.kill)
        timer.start()
        # Libraries print while they are imported; an answer begins with the mark.
        line = next((line for line in process.stdout if line.startswith("RUN ")), "")
        timer.cancel()
        if not line:
            raise RuntimeError(f"{self._command[-1]} ended; its last words: {self.log.read_text()[-2000:]}")
        data = json.loads(line[4:])
        if data["error"]:
            raise RuntimeError(f"{self._command[-1]}, {job}: {data['error']}")
        return data

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


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


def measure(system: System, python: str, endpoint: Endpoint, plan: Plan, quality: float) -> list[Outcome]:
    """All seeds of one system at one quality."""
    found: list[Outcome] = []
    worker = Worker(system, python, plan.folder)
    try:
        for seed in (WARM_UP, *range(FIRST_SEED, FIRST_SEED + plan.seeds)):
            name = f"{system.name.replace(' ', '-')}-{quality}-{seed}-{time.monotonic_ns()}".replace(",", "")
            endpoint.declare(name, seed, quality)
            cap = 200 if seed == WARM_UP else plan.cap
            job = {"run": name, "seed": seed, "quality": quality, "rows": ROWS, "cap": cap, "port": endpoint.port}
            data = worker.run({**job, "target": TARGET, "options": system.options})
            calls = endpoint.log(name)
            if seed != WARM_UP:
                found.append(outcome(seed, plan.cap, data, calls))
    finally:
        worker.close()
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap of the median."""
    rng = random.Random(0)
    draws = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(4000))
    return draws[100], draws[-101]


def median(outcomes: Sequence[Outcome], name: str) -> float:
    """Median of one figure over the seeds."""
    return statistics.median(getattr(outcome, name) for outcome in outcomes)


def rows_of(quality: float, results: dict[str, list[Outcome]]) -> list[Row]:
    """The table of one quality: calls with the goal on ours, share reached, time outside the LM, wall and CPU time."""
    peers = {name: found for name, found in results.items() if name in VERSIONS}
    arrived = {n: found for n, found in peers.items() if sum(o.reached for o in found) > len(found) / 2}
    fewest = min(arrived, key=lambda name: median(arrived[name], "calls"), default=None)
    quickest = min(arrived, key=lambda name: median(arrived[name], "outside"), default=None)
    rows: list[Row] = []
    head = f"q = {quality}"
    for figure, label, unit, best in (
        ("calls", "calls to 90 %", "calls, median", fewest),
        ("reached", "runs that got there", "share", None),
        ("outside", "time outside the LM", "s, median", quickest),
        ("wall", "wall time", "s, median", None),
        ("cpu", "CPU time of its process", "s, median", None),
    ):
        for name, found in results.items():
            values = [float(getattr(outcome, figure)) for outcome in found]
            value = statistics.fmean(values) if figure == "reached" else statistics.median(values)
            spread = None if figure == "reached" else interval(values)
            goal, peer, peer_value, note = None, None, None, None
            if best is not None and name not in VERSIONS:
                peer, peer_value = VERSIONS[best], median(peers[best], figure)
                goal = f"<= {peer_value:g}" if name == OURS.name else None
            if figure == "calls":
                task, proposer, rewrites = (median(found, part) for part in ("task", "proposer", "rewrites"))
                note = (
                    f"median {task:g} task and {proposer:g} proposer calls, of which {rewrites:g} wrote an instruction"
                )
            title = VERSIONS.get(name, name)
            rows.append(Row(f"{head} · {label}: {title}", value, unit, spread, goal, peer, peer_value, note))
    return rows


@dataclass(frozen=True)
class Plan:
    """Sizes of this run."""

    seeds: int
    cap: int
    folder: Path


def pythons(systems: Sequence[System]) -> dict[str, str]:
    """The interpreter of each system; a peer that cannot be installed is left out, with a word why."""
    found = {system.name: sys.executable for system in systems if system.adapter == OURS.adapter}
    if len(found) < len(systems):
        python, problem = peer_python(*REQUIREMENTS)
        if python is None:
            print(f"the peers could not be installed: {problem}", flush=True)
        else:
            found |= {system.name: python for system in systems if system.name not in found}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 seeds, one setting")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[], help="systems by name; nothing is written then")
    parser.add_argument("--latency", type=float, default=2.0, help="milliseconds the endpoint takes for every call")
    parser.add_argument("--cap", type=int, default=3000, help="calls after which a run is censored")
    options = parser.parse_args()
    systems = [system for system in SYSTEMS if not options.only or system.name in options.only]
    python = pythons(systems)
    endpoint = Endpoint(options.latency)
    rows: list[Row] = []
    detail: dict[str, Any] = {"latency_ms": options.latency, "cap": options.cap, "rows": ROWS, "ours": OURS.options}
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(3 if options.quick else options.seeds, options.cap, Path(folder))
        try:
            for quality in QUALITIES[:1] if options.quick else QUALITIES:
                results: dict[str, list[Outcome]] = {}
                for system in systems:
                    if system.name in python:
                        found = measure(system, python[system.name], endpoint, plan, quality)
                        results[system.name] = found
                        detail[f"{quality} {system.name}"] = [vars(outcome) for outcome in found]
                        calls = sorted(outcome.calls for outcome in found)
                        print(f"q = {quality}, {system.name}: {calls}", flush=True)
                rows += rows_of(quality, results)
        finally:
            endpoint.close()
    if options.only:
        print_table(rows)
    else:
        write_results("peers", rows, quick=options.quick, extra=detail)
    return 0


if __name__ == "__main__":
    sys.exit(main())
