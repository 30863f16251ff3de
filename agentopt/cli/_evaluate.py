"""`agentopt evaluate`: a program (or a saved candidate of it) on a data set, with interval, errors and cost."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from agentopt.cli._console import count, err, out, short, spent
from agentopt.cli._settings import load_settings
from agentopt.errors import UserError

if TYPE_CHECKING:
    from agentopt.evaluation import EvaluationResult, EvaluationRow


def evaluate_command(
    config: str | None, overrides: dict[str, Any], *, candidate: str | None, as_json: bool, quiet: bool
) -> int:
    """Evaluate and print; exit code 1 when every row failed with an exception."""
    from agentopt._api import evaluate
    from agentopt.evaluation import EvaluationOptions, load_dataset, load_program
    from agentopt.graph import load
    from agentopt.sandbox import sandboxed

    settings = load_settings(config, overrides)
    for name, value, given in (
        ("target", settings.target, "TARGET"),
        ("data", settings.test, "--data"),
        ("metric", settings.metric, "--metric"),
    ):
        if not value:
            raise UserError(f"{name} is missing: give {given}, or set it in agentopt.toml.")
    program = load_program(str(settings.target))
    dataset = load_dataset(
        str(settings.test),
        name="data",
        inputs=settings.inputs,
        label=settings.label,
        signature=program.signature,
        store=settings.store,
    )
    console = err()
    progress = Progress(
        TextColumn("evaluating"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("score {task.fields[score]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or as_json or not console.is_terminal,
    )
    total = 0.0
    done = 0
    with progress, sandboxed(settings.sandbox):
        task = progress.add_task("evaluating", total=len(dataset) * settings.repeats, score="-")

        def on_row(row: EvaluationRow) -> None:
            nonlocal total, done
            total += row.score
            done += 1
            progress.update(task, advance=1, score=f"{total / done:.3f}")

        result = evaluate(
            program,
            dataset,
            str(settings.metric),
            candidate=load(candidate) if candidate else None,
            options=EvaluationOptions(
                concurrency=settings.concurrency, timeout=settings.timeout, repeats=settings.repeats, seed=settings.seed
            ),
            models=settings.models or None,
            store=settings.store,
            output_field=settings.output_field,
            capture=settings.capture,
            executor=settings.executor,
            workers=settings.workers,
            on_row=on_row,
        )
    if as_json:
        print(json.dumps(_payload(result), ensure_ascii=False, indent=2, default=str))
    else:
        _print(result)
    return int(bool(result.rows) and all(row.error for row in result.rows))


def _payload(result: EvaluationResult) -> dict[str, Any]:
    return {
        "mean": result.mean,
        "interval": list(result.interval),
        "n": len(result.scores),
        "errors": sum(row.error is not None for row in result.rows),
        "cost": result.cost,
        "usage": result.usage.to_dict(),
        "rows": [row.to_dict() for row in result.rows],
    }


def _print(result: EvaluationResult) -> None:
    console = out()
    low, high = result.interval
    number = len(result.scores)
    head = f"  95 % interval {low:.3f} to {high:.3f}, {number} {'row' if number == 1 else 'rows'}"
    console.print(Text.assemble((f"{result.mean:.3f}", "bold"), head))
    usage = result.usage
    tokens = usage.input_tokens + usage.output_tokens
    latencies = sorted(row.latency for row in result.rows)
    middle = latencies[len(latencies) // 2] if latencies else 0.0
    console.print(
        f"{spent(result.cost)}, {usage.calls} LM calls ({usage.cached_calls} cached), {count(tokens)} tokens, "
        f"median {middle:.2f} s a row"
    )
    errors = Counter((row.error or "").splitlines()[0] for row in result.rows if row.error)
    if errors:
        console.print(Text(f"{sum(errors.values())} rows failed:", style="red"))
        for message, number in errors.most_common(3):
            console.print(f"  {number} x {short(message, max(40, console.width - 8))}")
    wrong = [row for row in result.rows if row.feedback and not row.error][:3]
    if wrong:
        console.print("for example:", style="dim")
        for row in wrong:
            console.print(Text(f"  {short(row.feedback or '', max(40, console.width - 4))}", style="dim"))
