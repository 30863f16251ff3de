"""Claim: what a capsule keeps is worth more to its reader than what other ways of shortening keep, at equal length.

Two readers. A solver (part `solver`): ProofWriter theories, compressed for their question, read by a parser with
forward chaining: exact, and no language model. The embedded 135M model (part `embedded`): few-shot prompts of SST-2,
TREC and one BIG-Bench Hard task, compressed once without a question; labels are scored. Beside ours: truncation, random
units, random words, BM25 (for a question), self-information, LLMLingua 0.2.2 with the reader's own weights, and the
prompt without any demonstration.

    python benchmarks/capsule_utility.py [--quick] [--part solver|embedded] [--data DIR] [--seeds 2] [--rows 60]
        [--only METHOD ...] [--minutes M] [--work DIR]

Cells that were measured are kept under `--work` and not measured again. Intervals: 95 % bootstrap
over rows (theories for the solver); they do not cover the draw of the demonstrations, for which `by_seed` is there. A
seed counts once everything of it was measured. "The best of the others" is among those that kept to the budget.
`--data` names the folder with proofwriter/, classification/ and bbh/; its rows are not copied into the results.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _capsule_solver
from _capsule_cells import Cell, Cells, difference, mean_of, notes_of, summary
from _capsule_embedded import embedded
from _curves import curves
from _report import RESULTS, ROOT, Row, write_results

OURS = "ours"
UNITS = {_capsule_solver.TASK: "words"}
MAIN = "ours, extract"
MARGIN = 0.05
"""How much lower than the original's the accuracy of the embedded reader may be."""
DELETION = ("random words", "words by self-information (bigrams)", "self-information (phrases)", "LLMLingua 0.2.2")
"""Methods that delete below the sentence."""


def main() -> int:
    """Measure, then report everything that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows, two methods of ours")
    parser.add_argument("--part", choices=("solver", "embedded"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, help="where cells are kept between runs")
    parser.add_argument("--seeds", type=int, default=2, help="draws of demonstrations and test rows")
    parser.add_argument("--rows", type=int, default=60, help="test rows of a draw")
    parser.add_argument("--only", nargs="*", default=[], help="methods of the embedded part")
    parser.add_argument("--minutes", type=float, default=60.0, help="the embedded part stops after so long")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        cells = Cells(work / f"cells{'.quick' * options.quick}.jsonl")
        if options.part != "embedded":
            _capsule_solver.solver(options.data, cells, quick=options.quick)
        if options.part != "solver":
            only = options.only or (["truncation", "random demonstrations", MAIN] if options.quick else [])
            seeds, rows = (1, 12) if options.quick else (options.seeds, options.rows)
            embedded(options.data, work, cells, seeds=seeds, rows=rows, only=only, minutes=options.minutes)
        if cells.tasks():
            report(cells, quick=options.quick)
    return 0


def report(cells: Cells, *, quick: bool) -> None:
    """Table, result file and one chart per task."""
    rows: list[Row] = []
    extra: dict[str, Any] = {}
    for task in cells.tasks():
        rows += rows_of(cells, task)
        extra[task] = {
            f"{method} {ratio:g}": summary(found)
            for method in cells.methods(task)
            for ratio in (1.0, *cells.ratios(task), 0.0)
            if (found := cells.of(task, method, ratio))
        }
        if not quick:
            chart(cells, task)
    write_results("capsule_utility", rows, quick=quick, extra=extra)


def rows_of(cells: Cells, task: str) -> list[Row]:
    """The rows of one task: every method at every ratio, then ours against the best of the others."""
    rows: list[Row] = []
    unit = UNITS.get(task, "tokens")
    for name, ratio in (("original", 1.0), ("none", 0.0)):
        if found := cells.of(task, name, ratio):
            value, bounds = mean_of(found)
            goal = ">= 1" if name == "original" and task in UNITS else None
            length = sum(cell.length for cell in found) / len(found)
            shown = "without context" if task in UNITS else "instruction only"
            what = "original" if name == "original" else shown
            rows.append(Row(f"{task}: {what}, {length:.0f} {unit}", value, "accuracy", bounds, goal))
    for ratio in cells.ratios(task):
        measured = {name: read(cells.of(task, name, ratio)) for name in cells.methods(task)}
        for name, found in measured.items():
            if found:
                rows.append(_row(task, name, ratio, unit, found, cells.of(task, name, ratio)))
            elif failed := cells.of(task, name, ratio):
                rows.append(Row(f"{task}: {name}, {ratio:.0%}", None, "accuracy", note="; ".join(notes_of(failed))))
        found = {name: each for name, each in measured.items() if each}
        rows += _against(task, ratio, found, cells.of(task, "original", 1.0))
    return rows


def read(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with something to read."""
    return [cell for cell in cells if cell.scores]


def _row(task: str, name: str, ratio: float, unit: str, found: Sequence[Cell], asked: Sequence[Cell]) -> Row:
    value, bounds = mean_of(found)
    length = sum(cell.length for cell in found) / len(found)
    share = sum(cell.length / cell.original for cell in found) / len(found)
    notes = notes_of(asked)
    if len(found) < len(asked):
        notes.insert(0, f"{len(asked) - len(found)} of {len(asked)} prompts gave nothing")
    return Row(
        f"{task}: {name}, asked {ratio:.0%}, got {share:.0%} ({length:.0f} {unit})",
        value,
        "accuracy",
        bounds,
        note="; ".join(notes)[:400] or None,
    )


def _against(task: str, ratio: float, measured: dict[str, list[Cell]], cells: Sequence[Cell]) -> list[Row]:
    """Ours minus the best that kept to the budget, the best such that deletes below the sentence, the original."""
    rows: list[Row] = []
    others = {
        name: found
        for name, found in measured.items()
        if not name.startswith(OURS) and not any(cell.over for cell in found)
    }
    goal, note = (">= 0", None) if task in UNITS else (None, "the best is chosen after the fact, which favours it")
    for what, names in (("the best of the others", tuple(others)), ("the best deletion", DELETION)):
        known = {name: mean_of(others[name])[0] for name in names if name in others}
        if known and MAIN in measured:
            best = max(known, key=lambda name: known[name])
            value, bounds = difference(measured[MAIN], others[best])
            name = f"{task}: {MAIN} minus {what}, {ratio:.0%}"
            rows.append(Row(name, value, "accuracy", bounds, goal, best, known[best], note))
    for ours in (MAIN, "ours, trained"):
        if task not in UNITS and ours in measured and (whole := read(cells)):
            value, bounds = difference(measured[ours], whole)
            name = f"{task}: {ours} minus the original, {ratio:.0%}"
            rows.append(Row(name, value, "accuracy", bounds, f">= {-MARGIN}", "original", mean_of(whole)[0]))
    return rows


def chart(cells: Cells, task: str) -> None:
    """Accuracy over the length that came out: ours first, and with bands, where many bands would hide one another."""
    whole, none = cells.of(task, "original", 1.0), cells.of(task, "none", 0.0)
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    names = [name for name in cells.methods(task) if name not in ("original", "none")]
    for name in sorted(names, key=lambda name: not name.startswith(OURS)):
        found = [each for ratio in cells.ratios(task) if (each := read(cells.of(task, name, ratio)))]
        if found and not all(cell.note.startswith("fell back") for each in found for cell in each):
            lines[name] = [_point(each, band=name.startswith(OURS) or task in UNITS) for each in found]
    if not whole or not lines:
        return
    shortest = min(point[0] for points in lines.values() for point in points)
    end = _point(whole, band=False)
    lines["original"] = [(shortest, *end[1:]), end]
    if none:
        lines["none"] = [_point(none, band=False)]
    slug = "_".join("".join(letter if letter.isalnum() else " " for letter in task.lower()).split())
    unit = UNITS.get(task, "tokens")
    title = f"{task}: accuracy over {unit} (bands: 95 %{'' if task in UNITS else ', ours only'})"
    path = RESULTS / f"capsule_utility_{slug}.svg"
    curves(path, title, f"{unit} of the prompt", "accuracy", lines, dashed=["original"])


def _point(cells: Sequence[Cell], *, band: bool) -> tuple[float, float, float, float]:
    value, bounds = mean_of(cells)
    return (sum(cell.length for cell in cells) / len(cells), value, *(bounds if band else (value, value)))


if __name__ == "__main__":
    sys.exit(main())
