"""report.md: what was found, beside what could be had without training, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Sequence

from agentopt.weights.finetuning._memory import size
from agentopt.weights.finetuning._result import FinetuneResult

_BLOCKS = "▁▂▃▄▅▆▇█"


def render(result: FinetuneResult) -> str:
    """The report as Markdown."""
    lines = [f"# Fine-tuning {_cell(result.model)} with {result.method}", "", _escaped(result.claim.text), ""]
    lines += _scores(result)
    lines += ["", "## Training", ""]
    lines += _training(result)
    if result.curve:
        lines += ["", "## Validation by step", ""]
        lines += _table(
            ["step", result.metric, "loss", "best"],
            [
                [
                    f"{point['step']:.0f}",
                    f"{point['score']:.3f}",
                    f"{point['loss']:.4f}",
                    "best" if point["step"] == result.best_step else "",
                ]
                for point in result.curve
            ],
        )
        lines += ["", f"    {result.metric} {sparkline([point['score'] for point in result.curve])}"]
    if result.warnings:
        lines += ["", "## Warnings", "", *(f"- {_escaped(warning)}" for warning in result.warnings)]
    lines += ["", "## How it was made", "", "```json", json.dumps(result.options, ensure_ascii=False, indent=1), "```"]
    return "\n".join(lines) + "\n"


def _scores(result: FinetuneResult) -> list[str]:
    rows = [
        [name, *("-" if value is None else f"{value:.3f}" for value in (validation, test))]
        for name, validation, test in result.table()
    ]
    notes = [
        "",
        "*Zero-shot* is the model as it came; *majority* always says the most frequent training label; *calibrated* is "
        "the untrained model with its label bias removed. Validation chose the step, so its scores are no claim.",
    ]
    return [*_table([result.metric, "validation", "test"], rows), *notes]


def _training(result: FinetuneResult) -> list[str]:
    eps = "" if result.eps is None else f", eps {result.eps:g}"
    lines = [
        f"- {result.method} on {result.tune} weights, learning rate {result.lr:g}{eps}",
        f"- {result.steps_done} steps in {result.seconds:.0f} s, {result.forwards:,} forward passes over batches, peak "
        f"memory {size(result.memory)}",
        f"- stopped: {result.stop_reason}; best after step {result.best_step}",
    ]
    if result.log_bytes:
        lines.append(f"- log steps.zo: {size(result.log_bytes)}, from which the weights of any step can be made again")
    if result.checked:
        lines.append(f"- checked: {result.checked}")
    if result.usage:
        lines += ["", "```python", result.usage, "```"]
    return lines


def sparkline(values: Sequence[float]) -> str:
    """A curve in one line of text."""
    low, high = min(values), max(values)
    span = high - low or 1.0
    return "".join(_BLOCKS[min(7, int((value - low) / span * 8))] for value in values) + f"  {low:.3f} to {high:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(['---', *['---:'] * (len(head) - 1)])}|"]
    return lines + [f"| {' | '.join(map(_cell, row))} |" for row in rows]


def _cell(text: str) -> str:
    return _escaped(text).replace("|", "\\|").replace("\n", " ")


def _escaped(text: str) -> str:
    """User text as text: no headings, links or HTML of its own."""
    return text.replace("<", "&lt;").replace("[", "\\[")
