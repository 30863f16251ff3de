"""Folding against reading: the study that docs/fold_study.md set down before it ran.

    python benchmarks/fold_reasoning.py [--part main|ablation|proofwriter|longer] [--quick] [--seeds 3] [--minutes M]
                                        [--shard i/n] [--table] [--data DIR] [--model small|embedded] [--steps N]

Small models on a CPU, trained from scratch by the script: knowledge folded into LoRA factors by a meta-learned inner
loop, and fine-tuned in-context reasoning (FT-ICR) of the same base, trained until it converges. `--model embedded` runs
the same on the 135M base (for a GPU; `--steps N` says how long). ProofWriter is not part of this project: `--data`
names a folder with proofwriter/*.json.

Every run appends one line to results/fold_reasoning.jsonl; a run that is there already is not repeated.
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
from _fold_runs import Size, Variant, proofwriter, run, smaller
from _fold_worlds import World, wording_alone, world
from _report import RESULTS, ROOT, Row, write_results
from _zeroth_runs import Cell, Runs, add_options, interval

FOLD_LR, READ_LR = 3e-3, 2e-3
MAIN = {"fold": Variant("fold", FOLD_LR), "FT-ICR": Variant("read", READ_LR)}
LONGER = {"FT-ICR, twice the steps": Variant("read", READ_LR, times=2)}
"""Whether the readers of kinship had converged."""
ABLATIONS = {
    "fold": Variant("fold", FOLD_LR),
    "static rates": Variant("fold", FOLD_LR, {"learn_lr": False}),
    "T = 0 (first order)": Variant("fold", FOLD_LR, {"unroll": 0}),
    "single-task": Variant("fold", FOLD_LR, multi_task=False),
    "rank 4": Variant("fold", FOLD_LR, {"rank": 4}),
    "T = 1": Variant("fold", FOLD_LR, {"unroll": 1}),
    "T = 3 (all)": Variant("fold", FOLD_LR, {"unroll": 3}),
    "rank 64": Variant("fold", FOLD_LR, {"rank": 64}),
    "sum over facts": Variant("fold", FOLD_LR, {"sum_over": "row", "lr": 0.02}),
    "frozen base": Variant("fold", FOLD_LR, {"trains": "init"}),
    "all weights (RECKONING)": Variant("fold", FOLD_LR, {"adapts": "all", "trains": "all", "lr": 0.01}),
}
PROOFWRITER = {
    "fold": Variant("fold", FOLD_LR, multi_task=False),
    "FT-ICR": Variant("read", READ_LR, multi_task=False),
}
WORLDS = {"chains": "rule chains", "kinship": "kinship", "theories": "rule theories"}
SIZE = Size()
SIZES = {
    "kinship": smaller(SIZE, pretrain=1200, steps=1000, icr_steps=6000),
    "proofwriter": smaller(SIZE, pretrain=200, steps=150, icr_steps=600, minutes=3, test=30),
}
"""Kinship has a composition to learn beside the recall."""
ABLATION = smaller(SIZE, tasks=4000, pretrain=300, steps=250, test=48, tested=("clean", "all", "4x"), longer=False)
PARTS = ("main", "ablation", "proofwriter", "longer")
CONVERGED = 0.9
"""Readers below this validation accuracy are no converged baseline, and a gap to them proves nothing."""
UNIT = "accuracy, mean of seeds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--part", choices=PARTS, nargs="*")
    parser.add_argument("--world", choices=tuple(WORLDS), nargs="*", default=list(WORLDS))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", default="small", help='"small", or a model that Folder takes ("embedded")')
    parser.add_argument("--steps", type=int, help="steps of folding (and most steps of reading), for --model")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    parts = options.part or PARTS
    with tempfile.TemporaryDirectory() as folder:
        small = options.quick or options.model != "small"
        name = "fold_reasoning.quick.jsonl" if small else "fold_reasoning.jsonl"
        runs = Runs((Path(folder) if small else RESULTS) / name)
        if not options.table:
            runs.go_on([[cell] for cell in cells(parts, options)], lambda unit: [_run(unit[0], options)], options)
        rows = rows_of(runs, options.data)
        if not small:
            draw(runs)
        write_results("fold_reasoning", rows, quick=small, extra=extra(runs))


def cells(parts: Sequence[str], options: argparse.Namespace) -> list[Cell]:
    """Every run, the most important first."""
    seeds = range(1 if options.quick or options.model != "small" else options.seeds)
    found: list[Cell] = []
    if "main" in parts:
        names = [name for name in WORLDS if name in options.world]
        found += [
            Cell(name, method, variant.lr, seed)
            for name in (names[:1] if options.quick else names)
            for seed in seeds
            for method, variant in MAIN.items()
        ]
    if options.quick:
        return found
    if "ablation" in parts:
        found += [Cell("ablation", method, variant.lr, seed) for seed in seeds for method, variant in ABLATIONS.items()]
    if "longer" in parts:
        order = (2, 0, 1)  # the reader that was furthest from converging first
        found += [
            Cell("kinship", method, variant.lr, seed)
            for seed in order
            if seed in seeds
            for method, variant in LONGER.items()
        ]
    if "proofwriter" in parts:
        if (options.data / "proofwriter").exists():
            found += [
                Cell("proofwriter", method, variant.lr, seed)
                for seed in seeds
                for method, variant in PROOFWRITER.items()
            ]
        else:
            print(f"proofwriter: no data in {options.data.name}/; give --data DIR; nothing ran")
    return found


def _run(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    variant = {"ablation": ABLATIONS, "proofwriter": PROOFWRITER}.get(cell.part, MAIN | LONGER)[cell.method]
    size = ABLATION if cell.part == "ablation" else SIZES.get(cell.part, SIZE)
    if options.quick:
        size = smaller(size, tasks=200, pretrain=5, steps=3, icr_steps=4, documents=4, test=2, minutes=0.1)
        if options.model != "small":
            size = smaller(size, steps=1, icr_steps=1, documents=1, test=1, tested=("clean",), longer=False)
    elif options.steps:
        size = smaller(size, steps=options.steps, icr_steps=options.steps)
    place = "chains" if cell.part == "ablation" else cell.part
    return run(place, variant, cell.seed, size, options.data, options.model)


# --- the table -------------------------------------------------------------------------------------------------------


def rows_of(runs: Runs, data: Path) -> list[Row]:
    """Folding beside reading in every world, then the ablations and the external set."""
    rows: list[Row] = []
    for name, label in WORLDS.items():
        rows += _compared(runs, name, label)
    plain = _seeds(runs, "ablation", "fold")
    for method in ABLATIONS:
        found = _seeds(runs, "ablation", method)
        for what in ("clean", "all", "4x"):
            values = [_of(record, "chains", what, 0) for record in found.values()]
            if values:
                against = [_of(plain[seed], "chains", what, 0) for seed in found if seed in plain]
                note = (
                    f"n = {len(values)}; exact recall {_percent([_of(r, 'chains', what, 1) for r in found.values()])}"
                )
                rows.append(
                    Row(
                        f"ablation ({ABLATION.steps} steps): {method}, {what}",
                        statistics.fmean(values),
                        UNIT,
                        interval(values),
                        peer="fold, same seeds" if method != "fold" and against else None,
                        peer_value=statistics.fmean(against) if method != "fold" and against else None,
                        note=note,
                    )
                )
    wording = None
    if (data / "proofwriter").exists():
        train, _, cells, _ = proofwriter(data, SIZES["proofwriter"])
        wording = wording_alone(train, cells["all|0"])
    for method in PROOFWRITER:
        values = [record["scores"]["all|0"][0] for record in _seeds(runs, "proofwriter", method).values()]
        if values:
            rows.append(
                Row(
                    f"ProofWriter D5: {method}",
                    statistics.fmean(values),
                    UNIT,
                    interval(values),
                    peer="the question's wording alone",
                    peer_value=wording,
                    note=f"n = {len(values)} seeds; labels alone, no proofs",
                )
            )
    return rows


def _best_readers(runs: Runs, name: str, usual: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Of every seed, the reader that is better on validation, where one was trained for longer."""
    found = dict(usual)
    for method in LONGER:
        for seed, record in _seeds(runs, name, method).items():
            if seed in found and record["val"] > found[seed]["val"]:
                found[seed] = record
    return found


def _compared(runs: Runs, name: str, label: str) -> list[Row]:
    fold, read = _seeds(runs, name, "fold"), _seeds(runs, name, "FT-ICR")
    seeds = sorted(set(fold) & set(read))
    if not seeds:
        return []
    usual, read = read, _best_readers(runs, name, read)
    reached = [read[seed]["val"] for seed in seeds]
    converged = min(reached) >= CONVERGED
    verdict = None if converged else f"no verdict: readers had not converged, validation {_percent(reached)}"
    place, rows = world(name), []
    for what, count in place.distractors().items():
        mine = [_of(fold[seed], name, what, 0) for seed in seeds]
        theirs = [_of(read[seed], name, what, 0) for seed in seeds]
        exact = [_of(fold[seed], name, what, 1) for seed in seeds]
        exact_read = [_of(read[seed], name, what, 1) for seed in seeds]
        gap = [100 * (one - two) for one, two in zip(mine, theirs, strict=True)]
        goal = {"clean": ">= -1", "all": ">= 10"}.get(what) if converged else None
        where = f"{label}, trained lengths, {what} ({count} distractors)"
        note = f"exact recall {_percent(exact)}, FT-ICR {_percent(exact_read)}; FT-ICR {_percent(theirs)}"
        peer = {"peer": "FT-ICR", "peer_value": statistics.fmean(theirs)}
        rows.append(Row(f"{where}: fold", statistics.fmean(mine), UNIT, interval(mine), note=note, **peer))
        rows.append(
            Row(f"{where}: fold minus FT-ICR", statistics.fmean(gap), "points", interval(gap), goal=goal, note=verdict)
        )
    for method, found in (("fold", fold), ("FT-ICR", read)):
        drop = [100 * (_of(found[seed], name, "4x", 0) - _of(found[seed], name, "all", 0)) for seed in seeds]
        rows.append(
            Row(
                f"{label}: {method}, change from all to 4x the trained distractors",
                statistics.fmean(drop),
                "points",
                interval(drop),
                goal=">= -2" if method == "fold" else None,
            )
        )
    for method in LONGER:
        for seed, record in _seeds(runs, name, method).items():
            for what in ("clean", "all", "4x") if seed in seeds else ():
                note = f"validation {record['val']:.3f}, with the usual steps {usual[seed]['val']:.3f}"
                rows.append(
                    Row(
                        f"{label}, trained lengths, {what}, seed {seed}: {method}",
                        _of(record, name, what, 0),
                        "accuracy",
                        peer="fold, same seed",
                        peer_value=_of(fold[seed], name, what, 0),
                        note=note,
                    )
                )
    return [*rows, *_lengths(place, label, [(fold[seed], read[seed]) for seed in seeds])]


def _lengths(place: World, label: str, runs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[Row]:
    """Every length by itself, longer ones than trained among them."""
    rows: list[Row] = []
    for what in ("clean", "all"):
        for depth in place.tested:
            key = f"{what}|{depth}"
            pairs = [(one["scores"].get(key), two["scores"].get(key)) for one, two in runs]
            known = [(one, two) for one, two in pairs if one and two]
            if known:
                mine, theirs = [one[0] for one, _ in known], [two[0] for _, two in known]
                longer = ", longer than trained" if depth > place.trained[1] else ""
                rows.append(
                    Row(
                        f"{label}, length {depth}{longer}, {what}: fold",
                        statistics.fmean(mine),
                        UNIT,
                        interval(mine),
                        peer="FT-ICR",
                        peer_value=statistics.fmean(theirs),
                        note=f"exact recall {_percent([one[1] for one, _ in known])}, "
                        f"FT-ICR {_percent([two[1] for _, two in known])}",
                    )
                )
    return rows


def _seeds(runs: Runs, part: str, method: str) -> dict[int, dict[str, Any]]:
    """The runs of a method by seed; the rate that is best on validation where there are several."""
    by_rate = runs.of(part, method)
    if not by_rate:
        return {}
    most = max(len(records) for records in by_rate.values())
    whole = {lr: records for lr, records in by_rate.items() if len(records) == most}
    chosen = max(whole, key=lambda lr: statistics.fmean(record["val"] for record in whole[lr]))
    return {record["seed"]: record for record in whole[chosen]}


def _of(record: dict[str, Any], name: str, what: str, column: int) -> float:
    """Mean over the trained lengths."""
    low, high = world(name).trained
    values = [record["scores"].get(f"{what}|{depth}", [None])[column : column + 1] for depth in range(low, high + 1)]
    known = [value[0] for value in values if value and value[0] is not None]
    return statistics.fmean(known) if known else float("nan")


def _percent(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None and value == value]
    if not known:
        return "none"
    return f"{100 * statistics.fmean(known):.1f} % ({100 * min(known):.1f} to {100 * max(known):.1f})"


def extra(runs: Runs) -> dict[str, Any]:
    """Every run: how it was trained and what it scored on validation."""
    kept = ("steps", "best_step", "stopped", "val", "val_loss", "train_s", "parameters")
    return {
        "synthetic": True,
        "runs": [
            {
                "part": key[0],
                "method": key[1],
                "lr": key[2],
                "seed": key[3],
                **{name: record.get(name) for name in kept},
            }
            for key, record in runs.records.items()
        ],
    }


def draw(runs: Runs) -> None:
    """Accuracy by the number of distractors, mean and range of the seeds."""
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for name, label in WORLDS.items():
        for method in MAIN:
            found = _seeds(runs, name, method)
            for what, count in world(name).distractors().items() if found else ():
                values = [_of(record, name, what, 0) for record in found.values()]
                point = (count, statistics.fmean(values), min(values), max(values))
                series.setdefault(f"{label}: {method}", []).append(point)
    if series:
        curves(
            RESULTS / "fold_reasoning.svg",
            "Synthetic: trained with 0 to D distractors (8, kinship 6), tested to 4 D",
            "distractors",
            "accuracy",
            series,
        )


if __name__ == "__main__":
    main()
