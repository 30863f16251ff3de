"""How rollouts scale: per second against how many run at once, locally and on Ray; and how large a big run becomes.

    python benchmarks/scale.py [--quick] [--seeds N]

Simulated latency: a model that sleeps 200 ms, so that N rollouts at a time make at most N / 0.2 s per second; what is
missing from that is this library's own work (recording, reply cache and store are on). CPU-bound: a program that hashes
for some 15 ms; one process has one interpreter lock, so only more processes help. Every measurement is a process of its
own, and warm: workers have loaded the program and made their first rollouts before the clock starts.

The large evaluation: 64 candidates on 1,000 examples, each rollout with one model call, through the search's own board.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "_scale_program.py"
LATENCY = 0.2
AT_ONCE = (1, 2, 4, 16, 64, 256)
EXAMPLES, CANDIDATES = 1000, 64


# --- the workers: each prints one JSON object -------------------------------------------------


def tickets(count: int, what: str = "") -> list[dict[str, Any]]:
    return [
        {"ticket": f"{what} {i}: I was charged twice for order {i * 7919 % 10007}.", "expected": "ok"}
        for i in range(count)
    ]


async def answer(request: Any) -> str:
    await asyncio.sleep(LATENCY)
    return "ok"


async def measure(target: str, executor: str, workers: int | None, points: dict[int, int]) -> dict[str, float]:
    """Rollouts per second by how many run at once; `points` says how many rollouts each figure is made from."""
    from agentopt.evaluation import (
        EvaluationOptions,
        Evaluator,
        Work,
        load_dataset,
        load_program,
        open_executor,
        resolve_metric,
    )
    from agentopt.graph import Candidate
    from agentopt.models import FunctionLM, LMSettings, ModelsConfig, use
    from agentopt.store import Store

    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder) / "bench.db") as store:
        models = ModelsConfig({"agent": FunctionLM(answer, name="simulated")}, LMSettings(cache=store))
        store.create_run("bench", {})
        program = load_program(f"{PROGRAM}:{target}")
        metric = resolve_metric("exact_match")
        found: dict[str, float] = {}
        with use(models):
            async with open_executor(executor, workers, Work(program, "exact_match", EvaluationOptions())) as opened:
                for at_once, rollouts in points.items():
                    options = EvaluationOptions(concurrency=at_once)
                    evaluator = Evaluator(program, metric, options, store=store, run_id="bench", executor=opened)
                    warm = load_dataset(tickets(min(at_once * 2, 64), f"warm {at_once}"), signature=program.signature)
                    data = load_dataset(tickets(rollouts, f"ticket {at_once}"), signature=program.signature)
                    await evaluator.evaluate(Candidate({}), warm)
                    started = time.perf_counter()
                    result = await evaluator.evaluate(Candidate({}), data)
                    store.flush()
                    found[str(at_once)] = rollouts / (time.perf_counter() - started)
                    if result.mean != 1.0:
                        raise RuntimeError(f"{result.errors[:1]}")
    return found


async def large(candidates: int, examples: int) -> dict[str, float]:
    from agentopt.evaluation import EvaluationOptions, Evaluator, load_dataset, load_program, resolve_metric
    from agentopt.graph import Candidate
    from agentopt.models import FunctionLM, LMSettings, ModelsConfig, use
    from agentopt.search import Budget
    from agentopt.search._board import Board
    from agentopt.search._budget import Ledger
    from agentopt.store import Store

    def reply(request: Any) -> str:
        text = str(request.messages[-1]["content"])
        return "ok" if len(text) % 3 else "I am sorry to hear that; please send us the order number. " * 3

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.db"
        started = time.perf_counter()
        with Store.open(path) as store:
            store.create_run("bench", {})
            program = load_program(f"{PROGRAM}:ask")
            options = EvaluationOptions(concurrency=64, keep_traces="never")
            evaluator = Evaluator(program, resolve_metric("exact_match"), options, store=store, run_id="bench")
            data = load_dataset(tickets(examples), signature=program.signature)
            board = Board(evaluator, {"train": data, "validation": data}, Ledger(Budget(rollouts=10**9)))
            with use(ModelsConfig({"agent": FunctionLM(reply, name="simulated")}, LMSettings(cache=store))):
                for number in range(candidates):
                    text = f"Answer the customer in one sentence, in manner {number}: {{ticket}}"
                    candidate = Candidate({"scale.instruction": text})
                    await board.run(candidate, "train", data.ids[:16], traces="all")  # as for proposals from it
                    await board.run_many([candidate], "validation", data.ids)
            store.flush()
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        wall = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rss_mb": peak, "before_mb": before, "store_mb": size / 1e6, "rate": candidates * examples / wall}


def worker(*arguments: str, timeout: float = 560) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", *arguments]
    env = os.environ | {"PYTHONPATH": str(HERE.parent)}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", timeout=timeout, env=env, cwd=folder
        )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# --- the comparison ---------------------------------------------------------------------------


def repeated(seeds: int, target: str, executor: str, workers: str, points: dict[int, int]) -> dict[int, Any]:
    """Median and range over processes, by how many run at once."""
    from _report import middle

    found = [worker(target, executor, workers, json.dumps(points)) for _ in range(seeds)]
    return {at_once: middle([one[str(at_once)] for one in found]) for at_once in points}


def latency_rows(quick: bool, seeds: int) -> tuple[list[Any], dict[str, list[tuple[float, float]]]]:
    from _report import Row

    ways = {"local": ("local", ""), "Ray, 1 worker": ("ray", "1"), "Ray, 2 workers": ("ray", "2")}
    goals = {("local", 64): ">= 0.8", ("local", 256): ">= 0.5", ("Ray, 2 workers", 64): ">= 0.8"}
    points = {at_once: at_once * (5 if quick else 15) for at_once in ((2, 64) if quick else AT_ONCE)}
    rows: list[Any] = []
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, (executor, workers) in ways.items():
        least = int(workers or 1)  # every worker has at least one rollout
        mine = {at_once: rollouts for at_once, rollouts in points.items() if at_once >= least}
        for at_once, (rate, (low, high)) in repeated(seeds, "ask", executor, workers, mine).items():
            ideal = at_once / LATENCY
            curves.setdefault(name, []).append((at_once, rate))
            rows += [
                Row(f"{name}, {at_once} at once", rate, "rollouts/s", (low, high)),
                Row(f"{name}, {at_once} at once: share of the ideal {ideal:g}/s", rate / ideal, "x",
                    (low / ideal, high / ideal), goal=goals.get((name, at_once))),
            ]  # fmt: skip
            print(f"{name}, {at_once} at once: {rate:.1f}/s, {rate / ideal:.0%} of the ideal", flush=True)
    curves["ideal"] = [(at_once, at_once / LATENCY) for at_once in points]
    return rows, curves


def cpu_rows(quick: bool, seeds: int) -> list[Any]:
    from _report import Row

    count = 60 if quick else 300
    one = repeated(seeds, "compute", "local", "", {2: count})[2]
    ray_one = repeated(seeds, "compute", "ray", "1", {2: count})[2]
    ray_two = repeated(seeds, "compute", "ray", "2", {4: count})[4]
    cores = len(os.sched_getaffinity(0))
    return [
        Row("CPU-bound, local", one[0], "rollouts/s", one[1]),
        Row("CPU-bound, Ray, 1 worker", ray_one[0], "rollouts/s", ray_one[1]),
        Row("CPU-bound, Ray, 2 workers", ray_two[0], "rollouts/s", ray_two[1]),
        Row("CPU-bound: 2 Ray workers against local", ray_two[0] / one[0], "x", goal=">= 1.5",
            note=f"on {cores} cores, which the driver and whatever else runs on the machine share"),
    ]  # fmt: skip


def large_rows(quick: bool) -> list[Any]:
    from _report import Row

    candidates = 8 if quick else CANDIDATES
    found = worker("large", str(candidates), str(EXAMPLES))
    name = f"{EXAMPLES:,} examples x {candidates} candidates"
    return [
        Row(f"{name}: peak memory", found["rss_mb"], "MB", goal="<= 1000",
            note=f"resident set of the whole process, {found['before_mb']:.0f} MB of it before the first rollout"),
        Row(f"{name}: store", found["store_mb"], "MB", goal="<= 200",
            note="rows, replies with their requests, and 16 traces per candidate"),
        Row(f"{name}: rollouts per second", found["rate"], "1/s"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few points, one repeat")
    parser.add_argument("--seeds", type=int, default=3, help="repeats")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        first, *rest = options.worker
        if first == "large":
            found = asyncio.run(large(int(rest[0]), int(rest[1])))
        else:
            executor, workers, points = rest
            count = int(workers) if workers else None
            wanted = {int(at_once): rollouts for at_once, rollouts in json.loads(points).items()}
            found = asyncio.run(measure(first, executor, count, wanted))
        print(json.dumps(found))
        return
    from _curve import write_curve
    from _report import RESULTS, write_results

    seeds = 1 if options.quick else options.seeds
    rows = large_rows(options.quick)
    latency, curves = latency_rows(options.quick, seeds)
    rows = [*latency, *cpu_rows(options.quick, seeds), *rows]
    write_results("scale", rows, quick=options.quick)
    if not options.quick:
        title = f"Rollouts per second, a model that takes {LATENCY * 1000:.0f} ms"
        write_curve(RESULTS / "scale.svg", title, "rollouts at once", "rollouts / s", curves, dashed=("ideal",))
        print(f"written: {(RESULTS / 'scale.svg').relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
