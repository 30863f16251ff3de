"""What zeroth-order tuning learns: the study that docs/zeroth_study.md set down before it ran.

    python benchmarks/zeroth_quality.py [--part a|b] [--quick] [--seeds 3] [--minutes M] [--shard i/n] [--table]
                                        [--data DIR]

Part (a) tunes a small GPT that the script pre-trains (`_zeroth_small.py`); part (b) the embedded 135M model on SST-2
and TREC (`_zeroth_embedded.py`), whose rows are not part of this project: `--data` names a folder with
classification/sst2/stsa.binary.{train,test} and classification/trec/{train,test}.txt. Part (c) is zeroth_precision.py.

Every run appends one line to results/zeroth_quality.jsonl; a run that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _curves import curves
from _report import RESULTS, ROOT, Row, write_results
from _zeroth_runs import Best, Runs, add_options, best, interval

UNIT = "test accuracy, mean of seeds"
AGAINST_RANDOM = (
    ("main: small 50 %", "main: random 50 %"),
    ("main: small 25 %", "main: random 25 %"),
    ("kept: small 50 %, mask follows the weights", "main: random 50 %"),
    ("kept: small 50 %, stored mask", "main: random 50 %"),
    ("kept: small 25 %, stored mask", "main: random 25 %"),
)
"""Hypothesis 2: does it matter that the weights are small?"""
PARTS = {"a": "small GPT", "sst2": "135M, SST-2", "trec": "135M, TREC"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--part", choices=("a", "b"), nargs="*", default=["a", "b"])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    name = "zeroth_quality.quick.jsonl" if options.quick else "zeroth_quality.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs((Path(folder) if options.quick else RESULTS) / name)
        if not options.table:
            work = Path(folder) if options.quick else ROOT / ".agentopt" / "zeroth_quality"
            go_on(runs, work, options)
    rows = [row for part in PARTS for row in rows_of(runs, part)]
    if not options.quick:
        draw(runs)
    write_results("zeroth_quality", rows, quick=options.quick, extra=extra(runs))


def go_on(runs: Runs, work: Path, options: argparse.Namespace) -> None:
    """The runs of both parts that are missing."""
    if "a" in options.part:
        import _zeroth_small

        forwards, pretraining = (24, 60) if options.quick else (_zeroth_small.FORWARDS, 1500)
        units = _zeroth_small.units(1 if options.quick else options.seeds)
        if options.quick:
            units = [units[0][:3], units[1][:1], units[2][:1], *units[3:6]]
            _zeroth_small.compare(work, pretraining)
        left = runs.go_on(units, lambda unit: _zeroth_small.run(unit, work, forwards, pretraining), options)
        print(f"part a: {left} units of runs are missing" if left else "part a: complete")
    if "b" in options.part and not options.quick:
        import _zeroth_embedded

        if not (options.data / "classification").exists():
            print(f"part b: no data in {options.data.name}/; give --data DIR; nothing ran")
            return
        left = runs.go_on(
            [[cell] for cell in _zeroth_embedded.cells(options.seeds)],
            lambda unit: [_zeroth_embedded.run(unit[0], options.data)],
            options,
        )
        print(f"part b: {left} runs are missing" if left else "part b: complete")


def rows_of(runs: Runs, part: str) -> list[Row]:
    """A row per method at its best learning rate, then differences on the same seeds."""
    found = {method: best(runs.of(part, method)) for method in runs.methods(part)}
    if not found:
        return []
    label = PARTS[part]
    zero = {
        (cell["seed"], cell.get("labels")): cell["zero_shot"] for key, cell in runs.records.items() if key[0] == part
    }
    rows = []
    if part == "a":
        for aligned, group in ((True, "main"), (False, "unaligned")):
            values = [
                record["zero_shot"]
                for key, record in sorted(runs.records.items())
                if key[0] == part and key[1] == f"{group}: full" and key[2] == 1e-3
            ]
            if values:
                words = "known label words" if aligned else "other words"
                rows.append(Row(f"{label}: zero-shot, {words}", statistics.fmean(values), UNIT, interval(values)))
    elif zero:
        values = list(zero.values())
        rows.append(Row(f"{label}: zero-shot", statistics.fmean(values), UNIT, interval(values)))
    for method, at in found.items():
        rows.append(Row(f"{label}: {title(method)}", at.test, UNIT, interval(at.tests), note=at.note()))
    return [*rows, *stability(label, found), *differences(label, found)]


def stability(label: str, found: dict[str, Best]) -> list[Row]:
    """How wide the range of learning rates is that are nearly as good as the best (the grid's five only)."""
    return [
        Row(
            f"{label}: stable learning rates, {title(method)}",
            at.decades,
            "decades",
            note=f"{min(at.stable):g} to {max(at.stable):g} of {', '.join(f'{rate:g}' for rate in at.rates)}",
        )
        for method, at in found.items()
        if len(at.rates) >= 5
    ]


def differences(label: str, found: dict[str, Best]) -> list[Row]:
    """Each method at its best rate minus full weights at theirs, small masks minus random ones; on the same seeds."""
    pairs: list[tuple[str, str]] = []
    for method in found:
        group, _, name = method.partition(": ")
        base = {"main": "main: full", "kept": "main: full", "unaligned": "unaligned: full"}.get(group, "full")
        if base in found and method != base and (not name or group in ("main", "kept", "unaligned")):
            pairs.append((method, base))
    pairs += [pair for pair in AGAINST_RANDOM if all(one in found for one in pair)]
    rows: list[Row] = []
    for one, two in pairs:
        other = dict(zip(found[two].seeds, found[two].tests, strict=True))
        mine = zip(found[one].seeds, found[one].tests, strict=True)
        gaps = [test - other[seed] for seed, test in mine if seed in other]
        if gaps:
            note = f"sd {statistics.stdev(gaps):.3f}, n = {len(gaps)}" if len(gaps) > 1 else "one seed"
            name = f"{label}: {title(one)} minus {title(two)}"
            rows.append(Row(name, statistics.fmean(gaps), "test accuracy, same seeds", interval(gaps), note=note))
    return rows


def title(method: str) -> str:
    """A method's name as a reader knows it."""
    group, _, name = method.partition(": ")
    return f"{name}, other label words" if group == "unaligned" else name or method


def extra(runs: Runs) -> dict[str, Any]:
    """Every method's whole grid: learning rate, mean of dev, mean and sd of test, seeds."""
    grid: dict[str, Any] = {}
    for part in PARTS:
        for method in runs.methods(part):
            grid[f"{part} | {method}"] = {
                f"{lr:g}": {
                    "dev": round(statistics.fmean(record["dev"] for record in records), 4),
                    "test": [round(record["test"], 4) for record in records],
                    "seeds": [record["seed"] for record in records],
                    "diverged": sum(record.get("failed_at") is not None for record in records),
                }
                for lr, records in sorted(runs.of(part, method).items())
            }
    return {"synthetic": {"a": True, "sst2": False, "trec": False}, "runs": len(runs.records), "grid": grid}


def draw(runs: Runs) -> None:
    """Part (a): test accuracy by learning rate, mean and range of the seeds."""
    series: dict[str, Sequence[tuple[float, float, float, float]]] = {}
    for method in runs.methods("a"):
        if method.startswith("main: "):
            points = []
            for number, (_, records) in enumerate(sorted(runs.of("a", method).items())):
                tests = [record["test"] for record in records]
                points.append((number, statistics.fmean(tests), min(tests), max(tests)))
            series[title(method)] = points
    if series:
        label = "learning rate: 0 = 1e-4, 1 = 3e-4, 2 = 1e-3, 3 = 3e-3, 4 = 1e-2"
        path = RESULTS / "zeroth_quality.svg"
        curves(path, "Synthetic: small GPT, test accuracy after 1,200 forward passes", label, "accuracy", series)


if __name__ == "__main__":
    main()
