"""`agentopt finetune`: options in, one run, what a person reads while it goes on and when it is done.

Progress and remarks go to stderr, the result to stdout. Ctrl-C ends the run after the step it is in, with everything
kept; a second Ctrl-C ends it at once, which loses no more than that step.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentopt.cli._console import err, out, short
from agentopt.cli._finetune_live import LiveFinetune
from agentopt.cli._settings import table_of
from agentopt.cli._training_live import duration, interruptible
from agentopt.errors import UserError

if TYPE_CHECKING:
    from agentopt.weights.finetuning import FinetuneOptions, FinetuneResult

STYLES = {"improved": "bold green", "worse": "bold red"}


def finetune_command(
    values: dict[str, Any],
    *,
    folder: str | None,
    resume: bool,
    list_methods: bool,
    config: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Run (or go on with) a fine-tuning run; returns the exit code."""
    from agentopt.weights.finetuning import Stop, finetune, options_of

    if list_methods:
        return print_methods(as_json=as_json)
    given = {key: value for key, value in values.items() if value is not None}
    table = table_of(config, "finetune", paths=("data", "val", "test", "out"))
    folder = folder or table.pop("out", None)
    if folder is None:
        raise UserError("--out is missing: give the folder that the model and the report go to, e.g. --out tuned.")
    if resume:  # what is given beside it must say the same, which the folder is asked about
        table = options_of(folder).model_dump()
    options = _options(table, given)
    stop = Stop()
    live = LiveFinetune(quiet=quiet or as_json)
    try:
        with live, interruptible(stop, live):
            result = finetune(options, out=folder, resume=resume, on_event=live, stop=stop)
    except KeyboardInterrupt:
        _say_how_to_go_on(folder)
        sys.exit(130)
    if as_json:
        print(json.dumps(result.to_dict(), ensure_ascii=False, indent=2))
    else:
        print_result(result, out())
    return 0


def _options(table: dict[str, Any], given: dict[str, Any]) -> FinetuneOptions:
    """The options of the configuration file, and above them those of the command line."""
    from agentopt.weights.finetuning import make_options

    for name, option, example in (
        ("model", "MODEL", "embedded, a model folder or a hub id"),
        ("data", "--data", "a JSONL file of rows"),
    ):
        if name not in given and name not in table:
            raise UserError(f"{option} is missing: give {example}.")
    if isinstance(given.get("labels"), str):
        given["labels"] = labels_of(given["labels"])
    if "lr" in given:
        given["lr"] = _rate(given["lr"])
    if "prompt" in given:  # a shell hands "\\n" on as two characters
        given["prompt"] = given["prompt"].replace("\\n", "\n").replace("\\t", "\t")
    return make_options({**table, **given}, "finetune" if table else "command line")


def labels_of(text: str) -> dict[str, str]:
    """`0=terrible,1=great` as a mapping from label to word.

    Raises:
        UserError: a part that is no LABEL=WORD, or a label that comes twice.
    """
    labels: dict[str, str] = {}
    for part in text.split(","):
        label, sign, word = part.partition("=")
        label, word = label.strip(), word.strip()
        if not sign or not label or not word:
            raise UserError(
                f'--labels: found {part!r}, expected LABEL=WORD, for example --labels "0=terrible,1=great".'
            )
        if label in labels:
            raise UserError(f"--labels: found label {label!r} twice, expected one word for each.")
        labels[label] = word
    return labels


def _rate(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _say_how_to_go_on(folder: str) -> None:
    command = f"agentopt finetune --resume --out {shlex.quote(folder)}"
    kept = (Path(folder) / "run.json").exists()
    told = f"every finished step is kept; go on with: {command}" if kept else "nothing was trained yet"
    err().print(Text(f"agentopt: interrupted; {told}"), soft_wrap=True)


# --- methods ---------------------------------------------------------------------------------------------------------


def print_methods(*, as_json: bool) -> int:
    """The methods, what each does, and where it comes from."""
    from agentopt.weights.finetuning import methods

    found = methods()
    if as_json:
        print(json.dumps([method.to_dict() for method in found], ensure_ascii=False, indent=2))
        return 0
    console = out()
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    table.add_column("method", no_wrap=True)
    table.add_column("what it does", overflow="fold")
    table.add_column("from", no_wrap=True, style="dim")
    for method in found:
        table.add_row(method.name, method.description, method.source)
    console.print(table)
    return 0


# --- the end ---------------------------------------------------------------------------------------------------------


def print_result(result: FinetuneResult, console: Console) -> None:
    """The claim, the scores side by side, what it cost, where the model is and how to use it."""
    head, colon, figures = result.claim.text.partition(":")
    console.print()
    console.print(Text.assemble((head + colon, STYLES.get(result.claim.status, "bold yellow")), figures))
    console.print()
    console.print(_scores(result))
    console.print()
    console.print(
        f"{result.steps_done} steps in {duration(result.seconds)}, "
        f"{f'best after {result.best_step}' if result.best_step else 'none better than the start'}; "
        f"{result.work}; peak memory {result.memory_text}"
    )
    console.print(f"stopped: {result.stop_reason}", style="dim")
    for warning in result.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    shown = os.path.relpath(result.folder)
    saved = f"{result.what_is_saved} in {shown}, checked by loading it back; " if result.best_step else ""
    console.print(Text(f"{saved}report: {shown}/report.md"))
    for line in result.usage.splitlines():
        console.print(Text(f"  {line}", style="dim"), soft_wrap=True)


def _scores(result: FinetuneResult) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(result.metric)
    table.add_column("validation", justify="right")
    table.add_column("test", justify="right")
    for name, validation, test in result.table():
        bold = "bold" if name == "tuned" else ""
        cells = (short(name, 40), *("-" if value is None else f"{value:.3f}" for value in (validation, test)))
        table.add_row(*cells, style=bold)
    return table
