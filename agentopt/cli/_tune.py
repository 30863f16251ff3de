"""`agentopt tune` and `agentopt runs resume`: settings in, one run, the report a person reads, the files it leaves."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from agentopt.cli._console import count, err, out, print_diff, seconds, usd
from agentopt.cli._progress import LiveRun
from agentopt.cli._settings import Settings, load_settings
from agentopt.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from agentopt.search import TuneResult

USUAL_STORE = os.path.join(".agentopt", "agentopt.db")
STYLES = {"improved": "bold green", "worse": "bold red"}


def tune_command(
    config: str | None, overrides: dict[str, Any], *, resume: str | None, as_json: bool, quiet: bool
) -> int:
    """Run (or continue) a tuning run from file, environment and options; returns the exit code."""
    if resume is not None and not any(value for key, value in overrides.items() if key != "store"):
        return resume_command(resume, overrides.get("store"), as_json=as_json, quiet=quiet)
    settings = load_settings(config, overrides)
    return _run(settings, resume=resume, as_json=as_json, quiet=quiet)


def resume_command(reference: str, store: str | None, *, as_json: bool, quiet: bool) -> int:
    """Continue a run with the settings it was started with.

    Raises:
        UserError: unknown run, or one that was started from Python.
    """
    from agentopt.cli._runs import find_run, open_store

    with open_store(store) as opened:
        run = find_run(opened, reference)
        path = opened.path
    if run.config.get("kind") == "serve":
        raise UserError(f"run {run.id} is the traffic of a server: there is nothing to continue; give the id of a run.")
    origin: dict[str, Any] = run.config.get("origin") or {}
    saved = origin.get("settings")
    if not saved:
        raise UserError(
            f"run {run.id} was started from Python: continue it there with ao.tune(..., resume={run.id!r}), or give "
            f"the same options again with `agentopt tune ... --resume {run.id}`."
        )
    settings = Settings.model_validate({**saved, "store": path})
    return _run(settings, resume=run.id, as_json=as_json, quiet=quiet)


def _say_how_to_go_on(run: str, store: str | None) -> None:
    where = f" --store {shlex.quote(os.path.relpath(store))}" if store and os.path.relpath(store) != USUAL_STORE else ""
    how = f"nothing already paid for is lost; go on with: agentopt runs resume {run}{where}"
    err().print(Text(f"agentopt: interrupted; {how}"), soft_wrap=True)


def _run(settings: Settings, *, resume: str | None, as_json: bool, quiet: bool) -> int:
    from agentopt._api import tune
    from agentopt.cli._runs import search_of_run
    from agentopt.evaluation import load_dataset, load_program

    for name in ("target", "train", "metric"):
        if not getattr(settings, name):
            given = "TARGET" if name == "target" else f"--{name}"
            raise UserError(f"{name} is missing: give {given}, or set {name} in agentopt.toml.")
    program = load_program(str(settings.target))
    data = {
        part: load_dataset(
            path,
            name=part,
            inputs=settings.inputs,
            label=settings.label,
            signature=program.signature,
            store=settings.store,
        )
        for part in ("train", "val", "test")
        if (path := getattr(settings, part))
    }
    live = LiveRun(quiet=quiet or as_json)
    try:
        with live:
            result = tune(
                program,
                train=data["train"],
                val=data.get("val"),
                test=data.get("test"),
                metric=str(settings.metric),
                optimizer=settings.optimizer,
                driver=settings.driver,
                budget=_budget(settings),
                seed=settings.seed,
                resume=resume,
                on_event=live,
                options=_options(settings),
                models=settings.models or None,
                store=settings.store,
                output_field=settings.output_field,
                origin={"settings": _portable(settings)},
            )
    except KeyboardInterrupt:
        if live.run_id is None:
            raise
        _say_how_to_go_on(live.run_id, settings.store)
        sys.exit(130)
    if as_json:
        payload = {**result.to_dict(), **search_of_run(settings.store, result.run_id)}
        print(json.dumps(payload, ensure_ascii=False, indent=2, default=str))
    else:
        print_result(result, _folder(settings, result.run_id), out(), elapsed=live.elapsed)
    return 0


def _portable(settings: Settings) -> dict[str, Any]:
    """The settings as saved with the run: paths made absolute, so that it can be resumed from any folder."""
    saved = settings.model_dump(mode="json", exclude_defaults=True)
    for key in Settings.PATHS:
        if key in saved:
            saved[key] = str(Path(saved[key]).resolve())
    target = str(settings.target)
    if ".py:" in target:
        file, _, name = target.rpartition(":")
        saved["target"] = f"{Path(file).resolve()}:{name}"
    return saved


def _folder(settings: Settings, run_id: str) -> Path:
    from agentopt.store import DEFAULT_PATH

    return Path(settings.store or os.environ.get("AGENTOPT_DB") or DEFAULT_PATH).parent / "runs" / run_id


def _budget(settings: Settings) -> Any:
    from agentopt.search import Budget

    limits = settings.budget.model_dump(exclude_none=True)
    return Budget(**limits) if limits else None


def _options(settings: Settings) -> Any:
    from agentopt.search import TuneOptions

    return TuneOptions(
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        repeats=settings.repeats,
        screen_size=settings.screen_size,
        tune=tuple(settings.tune),
        freeze=tuple(settings.freeze),
        objectives=tuple(settings.objectives) or ("score",),
        allow_effects=settings.allow_effects,
        capture=settings.capture,
        template=Path(settings.template) if settings.template else None,
        executor=settings.executor,
        workers=settings.workers,
        sandbox=settings.sandbox,
    )


def print_result(result: TuneResult, folder: Path | None, console: Console, *, elapsed: float | None = None) -> None:
    """The end of a run: the claim, what it cost, what changed, where the files are. `elapsed` is in seconds."""
    claim = result.claim
    head, colon, figures = claim.text.partition(":")
    console.print()
    console.print(Text.assemble((head + colon, STYLES.get(claim.status, "bold yellow")), figures))
    validation = result.validation
    console.print(
        f"selection estimate (validation, not a claim): {validation['baseline']:.3f} -> {validation['best']:.3f}",
        style="dim",
    )
    console.print()
    console.print(_cost_table(result, elapsed))
    console.print()
    print_diff(console, result.baseline.values, result.best.values)
    console.print()
    front = [item for item in result.trade_offs if item["on_front"]]
    if len(front) > 1:
        console.print(_front_table(result, front))
        console.print()
    console.print(f"stopped: {result.stop_reason}", style="dim")
    for warning in result.warnings:
        console.print(f"warning: {warning}", style="yellow")
    if folder is not None:
        shown = os.path.relpath(folder)
        console.print(f"best.json, config.json and report.html are in {shown}")
        console.print(f'use it: ao.load("{shown}/best.json").install()', style="dim")
    if claim.status == "no_claim":
        err().print("agentopt: no claim could be made; see the sentence above.", style="yellow")


def _cost_table(result: TuneResult, elapsed: float | None) -> Table:
    cost = result.cost
    table = Table(box=None, pad_edge=False)
    for title in ("cost", "usd", "tokens", "LM calls", "time"):
        table.add_column(title, justify="left" if title == "cost" else "right")
    minutes = seconds(elapsed)
    table.add_row(
        f"tuning, {int(cost['rollouts'])} rollouts",
        usd(cost["usd"]),
        count(cost["tokens"]),
        count(cost["calls"]),
        minutes,
    )
    for key, title in (("per_run_before", "one run before"), ("per_run_after", "one run after")):
        per = cost.get(key)
        if per:
            table.add_row(
                title, usd(per["usd"]), count(per["tokens"]), f"{per['calls']:.1f}", seconds(per.get("latency"))
            )
    return table


def _front_table(result: TuneResult, front: list[dict[str, Any]]) -> Table:
    """Candidates of which none is better in everything: what a point of score costs."""
    table = Table(box=None, pad_edge=False)
    for title in ("on the front", "score", "usd", "prompt tokens", "latency"):
        table.add_column(title, justify="left" if title == "on the front" else "right")
    names = {result.baseline.hash: " baseline", result.best.hash: " best"}
    for item in front[:8]:
        key = str(item["candidate"]["hash"])
        table.add_row(
            key[:8] + names.get(key, ""),
            f"{item['score']:.3f}",
            usd(item["usd"]),
            f"{item['prompt_tokens']:.0f}",
            seconds(item["latency"]),
        )
    return table
