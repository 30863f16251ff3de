"""report.md: what was found, beside what could be had without training, and how it was made."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import cast

from agentopt.weights.finetuning._memory import size
from agentopt.weights.finetuning._options import FinetuneOptions
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
    lines += ["", "## How it was made", "", "```console", f"$ {command(result)}", "```"]
    return "\n".join(lines) + "\n"


def _scores(result: FinetuneResult) -> list[str]:
    rows = [
        [name, *("-" if value is None else f"{value:.3f}" for value in (validation, test))]
        for name, validation, test in result.table()
    ]
    notes = [
        "",
        "*Zero-shot* is the model as it came; *majority* always says the most frequent training label; *calibrated* is "
        "the untrained model with its label bias removed by an empty text, *prior-matched* by the shares of the "
        "training labels. Validation chose the step, so its scores are no claim.",
    ]
    return [*_table([result.metric, "validation", "test"], rows), *notes]


def _training(result: FinetuneResult) -> list[str]:
    eps = "" if result.eps is None else f", eps {result.eps:g}"
    what = {"full": "all weights", "lora": "a LoRA adapter", "prefix": "a prefix"}[result.tune]
    best = f"best after step {result.best_step}" if result.best_step else "none better than the start"
    lines = [
        f"- rows: {', '.join(f'{number:,} {name}' for name, number in result.rows.items())}",
        f"- {result.method} on {what}, learning rate {result.lr:g}{eps}",
        *([f"- the rate was measured: {_escaped(result.rate)}"] if result.rate else []),
        f"- {result.steps_done} steps in {result.seconds:.{0 if result.seconds >= 10 else 1}f} s, {result.work} over "
        f"batches, peak memory {size(result.memory)}; {'the rate, ' if result.rate else ''}baselines, validations and "
        "tests come on top",
        f"- stopped: {result.stop_reason}; {best}",
    ]
    if result.log_bytes:
        lines.append(f"- log steps.zo: {size(result.log_bytes)}, from which the weights of any step can be made again")
    if result.checked:
        lines.append(f"- checked: {result.checked}")
    if result.usage:
        lines += ["", "```python", result.usage, "```"]
    return lines


def command(result: FinetuneResult) -> str:
    """The command line that makes this run again, without what is the default."""
    words = ["agentopt", "finetune", str(result.options.get("model", result.model))]
    for name, field in FinetuneOptions.model_fields.items():
        value = result.options.get(name)
        if name == "model" or value is None or value == field.default:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, dict):
            value = ",".join(f"{label}={word}" for label, word in cast("dict[str, str]", value).items())
        if value is not True:
            words.append(str(value).replace("\n", "\\n"))
    return shlex.join([*words, "--out", result.folder])


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
