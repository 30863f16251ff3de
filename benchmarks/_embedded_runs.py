"""The embedded part of `optimizers.py`: the optimizers that ask no model, on public classification tasks.

The unit is one run: one task, seed, optimizer and driver, `SEARCH` rollouts of search, then one test of start and
winner on the test rows. Runs of one task and seed share a store: replies that another run already paid for are cached.

`--data DIR` names a folder with classification/sst2 and classification/trec (the few-shot-learning collection) and
bbh/bbh/*.json (BIG-Bench Hard). Of the rows nothing goes into the results but counts and scores.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_public import MODEL, draw, reading, sst2, trec, with_cue

import agentopt as ao

SEARCH = 300
"""Rollouts of one search, the baseline's included."""
SIZES = (50, 30, 100)
"""Rows of train, validation and test; BBH has 250 in all."""
SCREEN = 10
"""Rows of a minibatch: with the default of 16 such a budget buys hardly five proposals."""
NOT_RUN = "not run"
DRIVERS = ("greedy", "pareto", "bayes", "islands")
OPTIMIZERS = ("auto", "instructions-free", "demonstrations", "bootstrap", "values", "tpe")
FIRST = (
    ("auto", "greedy"),
    ("auto", "bayes"),
    ("demonstrations", "greedy"),
    ("auto", "pareto"),
    ("instructions-free", "greedy"),
    ("values", "greedy"),
    ("auto", "islands"),
    ("bootstrap", "bayes"),
)
"""Pairs that are run before the others, so that a part that is cut short says something of each."""

boolean_instruction = ao.prompt("Is the expression true or false?", name="boolean.instruction")
boolean_cue = ao.prompt("", name="boolean.cue")
boolean_calibrate = ao.choice(["none", "content_free"], name="boolean.calibrate")
boolean_examples = ao.demos(name="boolean.examples", max_items=8)
navigate_instruction = ao.prompt("Do you return to the starting point?", name="navigate.instruction")
navigate_cue = ao.prompt("", name="navigate.cue")
navigate_calibrate = ao.choice(["none", "content_free"], name="navigate.calibrate")
navigate_examples = ao.demos(name="navigate.examples", max_items=8)


@ao.agent
async def boolean_expressions(expression: str) -> str:
    turns, options = with_cue(expression, str(boolean_cue)), reading(boolean_calibrate.value)
    reply = await ao.lm("agent").complete(
        turns, system=boolean_instruction, demos=boolean_examples, choices=["True", "False"], options=options
    )
    return reply.text


@ao.agent
async def navigate(steps: str) -> str:
    turns, options = with_cue(steps, str(navigate_cue)), reading(navigate_calibrate.value)
    reply = await ao.lm("agent").complete(
        turns, system=navigate_instruction, demos=navigate_examples, choices=["Yes", "No"], options=options
    )
    return reply.text


@dataclass(frozen=True)
class Task:
    """One program and where its rows come from; `field` is set for BBH."""

    program: Any
    field: str = ""


TASKS: dict[str, Task] = {
    "sst2": Task(sst2),
    "trec": Task(trec),
    "boolean_expressions": Task(boolean_expressions, "expression"),
    "navigate": Task(navigate, "steps"),
}


def rows_of(name: str, data: Path, seed: int) -> tuple[list[dict[str, Any]], ...]:
    """Train, validation and test rows of one seed."""
    task = TASKS[name]
    if not task.field:
        rows = draw(name, data / "classification", seed, SIZES)
        return rows.train, rows.val, rows.test
    found = json.loads((data / "bbh" / "bbh" / f"{name}.json").read_text(encoding="utf-8"))["examples"]
    rows = [
        {task.field: item["input"].partition("\nOptions:")[0].strip(), "expected": item["target"]} for item in found
    ]
    rows = list({row[task.field]: row for row in rows}.values())
    random.Random(seed).shuffle(rows)
    train, val, test = SIZES
    return rows[:train], rows[train : train + val], rows[train + val : train + val + test]


def one(name: str, optimizer: str, driver: str, seed: int, data: Path, store: Path) -> dict[str, Any]:
    """One run: scores on the test rows and what the search took."""
    train, val, test = rows_of(name, data, seed)
    began = time.monotonic()
    result = ao.tune(
        TASKS[name].program,
        train=train,
        val=val,
        test=test,
        metric="exact_match",
        optimizer=optimizer,
        driver=driver,
        budget=ao.Budget(rollouts=SEARCH + 2 * len(test)),
        seed=seed,
        options=ao.TuneOptions(capture=False, screen_size=SCREEN),
        models={"agent": MODEL},
        store=str(store),
    )
    claim = result.claim
    tested = len(test) * (1 if claim.status == "kept_baseline" else 2)
    return {
        "score": claim.tuned_mean,
        "start": claim.baseline_mean,
        "status": claim.status,
        "rows": len(test),
        "proposals": int(result.cost["proposals"]),
        "rollouts": int(result.cost["rollouts"]) - tested,
        "calls": 0,
        "tokens": int(result.cost["tokens"]),
        "seconds": round(time.monotonic() - began, 1),
    }


def wilson(mean: float, count: int) -> tuple[float, float]:
    """95 % interval of a share over `count` rows."""
    z = 1.96
    middle = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def pairs(seeds: int, only: Sequence[str]) -> Iterable[tuple[int, str, str, str]]:
    """(seed, optimizer, driver, task) in the order in which they are run."""
    rest = [(optimizer, driver) for optimizer in OPTIMIZERS for driver in DRIVERS]
    for seed in range(seeds):
        for optimizer, driver in dict.fromkeys([*FIRST, *rest]):
            for name in TASKS:
                if not only or name in only:
                    yield seed, optimizer, driver, name


def cells_of(done: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One cell per task, optimizer and driver from what was run so far."""
    found: list[dict[str, Any]] = []
    for name in TASKS:
        for optimizer in OPTIMIZERS:
            for driver in DRIVERS:
                runs = [run for key, run in done.items() if key.rpartition("|")[0] == f"{name}|{optimizer}|{driver}"]
                head = {"problem": name, "quality": None, "optimizer": optimizer, "driver": driver}
                if not runs:
                    found.append({**head, "reason": NOT_RUN})
                    continue
                means: dict[str, Any] = {
                    key: round(statistics.fmean(run[key] for run in runs), 4)
                    for key in ("score", "start", "proposals", "rollouts", "calls", "tokens")
                }
                low, high = wilson(means["score"], sum(run["rows"] for run in runs))
                interval = [round(low, 4), round(high, 4)]
                statuses = [run["status"] for run in runs]
                found.append({**head, **means, "interval": interval, "seeds": len(runs), "statuses": statuses})
    return found


def embedded(options: argparse.Namespace, keep: Callable[[Sequence[dict[str, Any]]], None]) -> None:
    """Run what is not done yet, keeping the results after every run."""
    if not (options.data / "classification" / "sst2").exists():
        print(f"optimizers: no data in {options.data.name}/; give --data DIR (see _embedded_runs.py)")
        return
    began = time.monotonic()
    only = [name for name in options.only if name in TASKS]
    seeds = options.seeds or 1
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        log = work / "cells.json"
        done: dict[str, dict[str, Any]] = json.loads(log.read_text(encoding="utf-8")) if log.exists() else {}
        try:
            for seed, optimizer, driver, name in pairs(seeds, only):
                key = f"{name}|{optimizer}|{driver}|{seed}"
                if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                    print("embedded: out of time; what was done is kept")
                    break
                if key in done:
                    continue
                done[key] = one(name, optimizer, driver, seed, options.data, work / f"{name}-{seed}.db")
                log.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
                print(f"{key}: {done[key]}", flush=True)
        finally:
            keep(cells_of(done))
