"""Claim: every optimizer finds a known optimum under every driver, when its model answers well.

Synthetic part: problems whose best score is 1 (numbers, a function with bugs, hidden rules, and structured values), and
one scripted oracle that answers every optimizer in its own form with one step of improvement, rightly with a given
probability. So the table says what optimizer and driver make of equally good answers, not whose meta-prompt brings more
out of a real model. Embedded part: the embedded model on SST-2, TREC and two BBH tasks, tuned without another model.

    python benchmarks/optimizers.py [--part synthetic|embedded] [--only PROBLEM ...] [--drivers D ...]
                                    [--optimizers O ...] [--seeds 5] [--quick] [--data DIR] [--work DIR] [--minutes N]

Results go to results/optimizers.json and, for people, results/optimizers.md; a run of one part, problem or driver
replaces only its own cells. Embedded: the data is not part of this project (see `_embedded_runs.py`); `--work DIR`
keeps the stores, so that a second run replays the replies it finds, and `--minutes` ends the part after that time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _embedded_runs import DRIVERS as TASK_DRIVERS
from _embedded_runs import OPTIMIZERS, TASKS, embedded
from _optimizer_runs import DRIVERS, QUALITIES, SKIPPED, cells, run, summary
from _optimizer_tables import document
from _problems import PROBLEMS
from _report import RESULTS, ROOT, Row, write_results

from agentopt.graph import use_code_runner
from agentopt.sandbox import ProcessRunner

PARTS = ("synthetic", "embedded")


def synthetic(problem: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every cell of one problem, each over all seeds."""
    found: list[dict[str, Any]] = []
    seeds = options.seeds or (1 if options.quick else 5)
    drivers = options.drivers or (("greedy", "pareto", "bayes") if options.quick else DRIVERS)
    qualities = (1.0, 0.5) if options.quick else QUALITIES
    # One warm worker for all runs: the code is the oracle's own, and a worker for each candidate takes its time.
    with ProcessRunner() as runner, use_code_runner(runner):
        for cell in cells(qualities, drivers):
            if cell.problem != problem or (options.optimizers and cell.optimizer not in options.optimizers):
                continue
            began = time.monotonic()
            runs = [] if cell.reason else [run(cell, seed) for seed in range(seeds)]
            found.append(summary(cell, runs))
            if runs:
                took = time.monotonic() - began
                print(f"{cell.key}: {found[-1]['score']:.3f} ({took:.1f} s)", flush=True)
    return found


def known(path: Path) -> list[dict[str, Any]]:
    """Cells of an earlier run."""
    return json.loads(path.read_text(encoding="utf-8"))["extra"]["cells"] if path.exists() else []


def merged(before: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All cells, the new ones in the place of older ones of the same name; cells that are no more are left out."""
    both = {_name(cell): cell for cell in (*before, *new)}
    order = [(cell.problem, cell.quality, cell.optimizer, cell.driver) for cell in cells()]
    order += [(task, None, optimizer, driver) for task in TASKS for optimizer in OPTIMIZERS for driver in TASK_DRIVERS]
    return [both[name] for name in order if name in both]


def _name(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[key] for key in ("problem", "quality", "optimizer", "driver"))


def rows(found: Sequence[dict[str, Any]]) -> list[Row]:
    """For each problem and optimizer the best and the worst driver; a goal where the model is perfect."""
    groups: dict[tuple[str, float | None, str], list[dict[str, Any]]] = {}
    for cell in found:
        if "score" in cell:
            groups.setdefault((cell["problem"], cell["quality"], cell["optimizer"]), []).append(cell)
    made: list[Row] = []
    for (problem, quality, optimizer), group in groups.items():
        scores = [cell["score"] for cell in group]
        best = max(group, key=lambda cell: (cell["score"], -cell["rollouts"]))
        title = f"{problem}{'' if quality is None else f', quality {quality:g}'}: {optimizer}, mean over drivers"
        goal = ">= 0.9" if quality == 1.0 else None
        note = f"best driver {best['driver']}: {best['score']:.3f} with {best['rollouts']:.0f} rollouts"
        made.append(Row(title, statistics.fmean(scores), "score", (min(scores), max(scores)), goal=goal, note=note))
    return made


def main() -> int:
    """Run the parts and write both result files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--only", nargs="*", default=[], choices=[*PROBLEMS, *TASKS], help="problems or tasks")
    parser.add_argument("--drivers", nargs="*", choices=DRIVERS, help="of the synthetic part")
    parser.add_argument("--optimizers", nargs="*", default=[], help="of the synthetic part")
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--work", type=Path, help="keep the stores of the embedded part here")
    parser.add_argument("--minutes", type=float, help="the most the embedded part may take")
    parser.add_argument("--table", action="store_true", help="only rewrite the table from the results")
    options = parser.parse_args()
    path = RESULTS / ("optimizers.quick.json" if options.quick else "optimizers.json")

    def keep(new: Sequence[dict[str, Any]]) -> None:
        found = merged(known(path), new)  # read anew: another part may have written meanwhile
        sys.argv[1:] = ["--quick"] if options.quick else ["--data", "DIR"]  # what makes the whole table, not this part
        write_results("optimizers", rows(found), quick=options.quick, extra={"cells": found})
        target = path.with_suffix(".md")
        target.write_text(document(found, SKIPPED), encoding="utf-8")
        print(f"written: {target.relative_to(ROOT)}")

    if options.table:
        keep([])
        return 0
    if options.part != "embedded":
        for problem in PROBLEMS:
            if not options.only or problem in options.only:
                keep(synthetic(problem, options))
    if options.part != "synthetic" and (options.part or options.data.exists()):
        embedded(options, keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
