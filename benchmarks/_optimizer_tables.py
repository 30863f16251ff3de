"""The table that a person reads: results/optimizers.md from the cells of `optimizers.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from _embedded_runs import NOT_RUN, SEARCH, SIZES

Cell = Mapping[str, Any]

TITLES = {
    "numbers": "Three numbers of a traced chain of arithmetic must meet a curve (as the numeric problem of Trace)",
    "code": "A function with four planted bugs; every row is a unit test",
    "rules": "An instruction that must state four hidden rules",
    "examples": "Six hidden rules; a demonstration does what stating its rule does, but four (0.67) are the most",
    "principles": "The four rules in a list of principles, with one that does harm at the start",
    "pipeline": "A pipeline of one node that lacks three steps",
    "tools": "The function with four bugs as a tool of a toolbox",
    "sst2": "Embedded model: SST-2",
    "trec": "Embedded model: TREC",
    "boolean_expressions": "Embedded model: BBH boolean expressions",
    "navigate": "Embedded model: BBH navigate",
}

_HEAD = """# Every optimizer with every driver

Made by `python benchmarks/optimizers.py`; all numbers are in `optimizers.json`. Scores are means over seeds with a 95 %
bootstrap interval over them; proposals, rollouts, calls (of the optimizer's model, repairs included) and tokens are
means of one run. "-" means that the pair does not apply; the reason stands below the table.

In the synthetic part the best possible score is 1, the true score is computed and not sampled, a run may use at most
600 rollouts, train and validation have 16 rows each, and the optimizer's model is one scripted oracle: with probability
*quality* it answers with one step of improvement in the form that the optimizer asks for, else with random words,
nothing, a cut-off answer or a refusal. Its answers are equally good for all, so the table compares what optimizers and
drivers make of answers; it does not say whose meta-prompt brings more out of a real model. Tokens are words here.
"""

_EMBEDDED = f"""## The embedded model on public tasks

One small model (SmolLM2 135M, on the CPU) does the task, and no other model is there: only the optimizers that ask none
are run. A search may use {SEARCH} rollouts; {SIZES[0]} rows for training, {SIZES[1]} for validation, {SIZES[2]} for
the test that is reported (start and result). Intervals are Wilson intervals over the test rows: with one seed they say
nothing about other draws of the data. Empty cells were not run for want of time; with `--work DIR` the next run goes
on where the last one stopped.
"""


def document(cells: Sequence[Cell], skipped: Mapping[str, Mapping[str, str]]) -> str:
    """The whole page."""
    lines = [_HEAD.strip(), *short(cells)]
    for problem in dict.fromkeys(cell["problem"] for cell in cells):
        mine = [cell for cell in cells if cell["problem"] == problem]
        if ("start" in mine[0] or mine[0].get("reason") == NOT_RUN) and _EMBEDDED.strip() not in lines:
            lines += ["", _EMBEDDED.strip()]
        lines += ["", f"## {problem}", "", TITLES.get(problem, "") + "."]
        qualities = sorted({cell["quality"] for cell in mine if cell["quality"] is not None}, reverse=True) or [None]
        for quality in qualities:
            # What asks no model is shown once, beside the best quality.
            here = [c for c in mine if c["quality"] == quality or (c["quality"] is None and quality == qualities[0])]
            if quality is not None:
                lines += ["", f"### {problem}, quality {quality:g}"]
            lines += matrix(here, skipped.get(problem, {}) if quality == qualities[0] else {})
            lines += reasons(here, skipped.get(problem, {}) if quality == qualities[0] else {})
            lines += details(here)
    return "\n".join(lines) + "\n"


def short(cells: Sequence[Cell]) -> list[str]:
    """One line per driver and per optimizer: means over everything that a model of quality 1 was asked about."""
    mine = [cell for cell in cells if cell["quality"] == 1.0 and "score" in cell]
    lines: list[str] = ["", "Optimizers stand for different problems here: compare them within a problem, below."]
    for kind in ("driver", "optimizer"):
        lines += ["", f"| {kind} (model of quality 1) | pairs | score | at the optimum | rollouts | calls |"]
        lines.append("|---|---|---|---|---|---|")
        for name in dict.fromkeys(cell[kind] for cell in mine):
            group = [cell for cell in mine if cell[kind] == name]
            score, rollouts, calls = (fmean(cell[key] for cell in group) for key in ("score", "rollouts", "calls"))
            solved, runs = (sum(cell[key] for cell in group) for key in ("solved", "seeds"))
            lines.append(f"| {name} | {len(group)} | {score:.3f} | {solved} of {runs} | {rollouts:.0f} | {calls:.0f} |")
    return ["", "## In short", *lines] if mine else []


def matrix(cells: Sequence[Cell], skipped: Mapping[str, str]) -> list[str]:
    """Optimizers by drivers: the score, and in how many seeds the optimum was found where that is known."""
    drivers = list(dict.fromkeys(cell["driver"] for cell in cells))
    lines = ["", "| score | " + " | ".join(drivers) + " |", "|---" * (len(drivers) + 1) + "|"]
    by = {(cell["optimizer"], cell["driver"]): cell for cell in cells}
    for optimizer in dict.fromkeys(cell["optimizer"] for cell in cells):
        texts = [_short(by.get((optimizer, driver))) for driver in drivers]
        lines.append(f"| {optimizer} | " + " | ".join(texts) + " |")
    lines += [f"| {optimizer} | " + " | ".join("-" for _ in drivers) + " |" for optimizer in skipped]
    return lines


def _short(cell: Cell | None) -> str:
    if cell is not None and cell.get("reason") == NOT_RUN:
        return ""
    if cell is None or "score" not in cell:
        return "-"
    solved = f" ({cell['solved']}/{cell['seeds']})" if "solved" in cell else f" (from {cell['start']:.2f})"
    return f"{cell['score']:.2f}{solved}"


def reasons(cells: Sequence[Cell], skipped: Mapping[str, str]) -> list[str]:
    """Why pairs do not apply."""
    why: dict[str, list[str]] = {}
    for optimizer, reason in skipped.items():
        why.setdefault(reason, []).append(optimizer)
    for cell in cells:
        if cell.get("reason") not in (None, NOT_RUN):
            why.setdefault(cell["reason"], []).append(f"{cell['optimizer']} x {cell['driver']}")
    return ["", *(f"- {', '.join(names)}: {reason}." for reason, names in why.items())] if why else []


def details(cells: Sequence[Cell]) -> list[str]:
    """Every pair with its costs, folded."""
    lines = [
        "",
        "<details><summary>intervals, proposals, rollouts, calls, tokens</summary>",
        "",
        "| optimizer | driver | score | 95 % | start | seeds | proposals | rollouts | calls | tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        if "score" not in cell:
            continue
        low, high = cell["interval"]
        start = f"{cell['start']:.3f}" if "start" in cell else ""
        costs = " | ".join(f"{cell[name]:,.0f}" for name in ("proposals", "rollouts", "calls", "tokens"))
        lines.append(
            f"| {cell['optimizer']} | {cell['driver']} | {cell['score']:.3f} | {low:.3f} to {high:.3f} | {start} "
            f"| {cell['seeds']} | {costs} |"
        )
    return [*lines, "", "</details>"]
