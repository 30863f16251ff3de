"""`agentopt runs ls|show|diff` and `agentopt export`: what the store knows about finished and interrupted runs."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from agentopt.cli._console import err, out, print_diff, seconds, short, usd
from agentopt.cli._progress import given_up
from agentopt.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from agentopt.graph import Candidate
    from agentopt.store import RunRow, Store

STATUS_COLOURS = {"improved": "green", "running": "cyan", "interrupted": "yellow", "failed": "red", "worse": "red"}


def open_store(path: str | None) -> Store:
    """The store at `path`, at $AGENTOPT_DB, or in the current folder; looking never creates one.

    Raises:
        UserError: there is no store there.
    """
    from agentopt.store import DEFAULT_PATH, Store

    chosen = Path(path or os.environ.get("AGENTOPT_DB") or DEFAULT_PATH)
    if not chosen.exists():
        raise UserError(f"{chosen}: no store here; run `agentopt tune` first, or give --store PATH.")
    return Store.open(chosen)


def find_run(store: Store, reference: str) -> RunRow:
    """A run by id or unique prefix; `last` is the newest.

    Raises:
        UserError: unknown or ambiguous.
    """
    runs = store.runs()
    if reference == "last" and runs:
        return max(runs, key=lambda run: run.created)
    found = store.run(reference)
    if found is None:
        close = [run.id for run in runs][-5:]
        known = f"the newest runs are {', '.join(close)}" if close else "the store is empty"
        raise UserError(f"run {reference!r}: not in {store.path}; {known}.")
    return found


def when(timestamp: float) -> str:
    """Local time to the minute."""
    return datetime.fromtimestamp(timestamp).strftime("%Y-%m-%d %H:%M")


def list_runs(store_path: str | None, *, as_json: bool) -> None:
    """Print one line per run, newest first."""
    with open_store(store_path) as store:
        runs = sorted(store.runs(), key=lambda run: -run.created)
    if as_json:
        print(json.dumps([_row(run) for run in runs], indent=2))
        return
    if not runs:
        out().print("no runs yet")
        return
    table = Table(box=None, pad_edge=False)
    for title, right in (
        ("run", False),
        ("when", False),
        ("program", False),
        ("status", False),
        ("baseline", True),
        ("tuned", True),
    ):
        table.add_column(title, justify="right" if right else "left", no_wrap=title != "program")
    for run in runs:
        claim = claim_of(run)
        status = _status(run)
        table.add_row(
            run.id,
            when(run.created)[5:],  # the id holds the year
            short(str(run.config.get("program", "")), 28),
            Text(status, style=STATUS_COLOURS.get(status, "")),
            _score(claim.get("baseline_mean")),
            _score(claim.get("tuned_mean")),
        )
    out().print(table)


def claim_of(run: RunRow) -> dict[str, Any]:
    """The run's claim; empty while it has none."""
    return run.summary.get("claim") or {}


def _status(run: RunRow) -> str:
    claim = claim_of(run)
    return str(claim.get("status") or run.status)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _row(run: RunRow) -> dict[str, Any]:
    return {
        "id": run.id,
        "created": run.created,
        "updated": run.updated,
        "status": run.status,
        "program": run.config.get("program"),
        "claim": run.summary.get("claim"),
    }


def show_run(reference: str, store_path: str | None, *, as_json: bool) -> None:
    """Print one run: claim, what changed, every proposal, spend, traces."""
    with open_store(store_path) as store:
        run = find_run(store, reference)
        events = store.events(run.id)
        if as_json:
            payload = {
                **_row(run),
                **search_of(run, [event.payload for event in events]),
                "config": run.config,
                "summary": run.summary,
                "events": [{"seq": event.seq, "time": event.time, **event.payload} for event in events],
                "candidates": store.candidates(run.id),
                "traces": store.traces(run.id),
            }
            print(json.dumps(payload, indent=2, ensure_ascii=False))
            return
        traces = store.traces(run.id)
        said = store.feedback(run_id=run.id)
    console = out()
    console.print(
        Text.assemble((run.id, "bold"), f"  {run.config.get('program', '')}  {when(run.created)}  "), Text(_status(run))
    )
    if run.config.get("kind") == "serve":
        _show_traffic(run, traces, said, console)
        return
    found = search_of(run, [event.payload for event in events])
    reason = f" ({found['driver_reason']})" if found["driver_reason"] else ""
    console.print(f"optimizer {found['optimizer']}, driver {found['driver']}{reason}", style="dim")
    if text := claim_of(run).get("text"):
        console.print(text)
    elif run.status != "done":
        console.print(f"not finished: `agentopt runs resume {run.id}` continues it", style="yellow")
    from agentopt.observe import proposals_of

    rows = proposals_of([event.payload for event in events])
    if rows:
        table = Table(box=None, pad_edge=False)
        for title in ("candidate", "by", "screen", "validation", "outcome"):
            table.add_column(
                title, justify="right" if title in ("screen", "validation") else "left", no_wrap=title != "outcome"
            )
        for row in rows:
            screen = "-" if row.screen is None else f"{row.screen:+.3f}"
            outcome = Text("accepted", style="green") if row.accepted else Text(short(row.reason, 60), style="dim")
            table.add_row(row.candidate[:8], short(row.source, 24), screen, _score(row.validation), outcome)
        console.print(table)
    if dropped := _given_up([event.payload for event in events]):
        example = f"{dropped[-1].get('source')}: {short(dropped[-1].get('problem'), 100)}"
        console.print(f"{given_up(len(dropped))} before measuring, for example {example}", style="yellow")
    best, baseline = run.summary.get("best"), run.summary.get("baseline")
    if best and baseline:
        print_diff(console, baseline["values"], best["values"])
    cost: dict[str, Any] = run.summary.get("cost") or {}
    if cost:
        money = "cost unknown" if cost.get("usd") is None else f"spent {usd(cost['usd'])}"
        console.print(
            f"{money}, {int(cost.get('rollouts', 0))} rollouts, "
            f"{seconds(run.updated - run.created)} between first and last write"
        )
    if traces:
        ids = [str(trace) for trace in traces]
        console.print(f"{len(ids)} traces kept, for example: agentopt trace show {ids[-1]}", style="dim")


def _show_traffic(run: RunRow, traces: Sequence[str], said: Sequence[Mapping[str, Any]], console: Console) -> None:
    """What a server captured, and what users said of it."""
    drops: dict[str, int] = run.summary.get("dropped") or {}
    dropped = sum(drops.values())
    captured = run.summary.get("captured", 0)
    console.print(f"exchanges captured: {captured}, dropped: {dropped}; pieces of feedback: {len(said)}")
    share = run.config.get("sample", 1.0)
    taken = ", ".join(run.config.get("redacted") or ()) or "nothing"
    console.print(f"{share:.0%} of the traffic; taken out before it was stored: {taken}", style="dim")
    if days := run.config.get("days"):
        text = f"exchanges are deleted after {days:g} days; while this server ran: {run.summary.get('forgotten', 0)}"
        console.print(text, style="dim")
    for trace in traces[-5:]:
        console.print(Text(f"agentopt trace show {trace}"))
    if len(traces) > 5:
        console.print(f"the newest 5 of {len(traces)} traces; --json lists the others", style="dim")
    if said:
        for line in _tune_lines(run, said):
            console.print(Text(line), style="dim", soft_wrap=True)


def _tune_lines(run: RunRow, said: Sequence[Mapping[str, Any]]) -> list[str]:
    """A command that tunes what was served: on its model, not on the default one."""
    # A tuned prompt's name would put that prompt around the one to be tuned: there, the model behind it.
    model = next((row.get("asked") for row in reversed(said) if not row.get("variant")), said[-1].get("model"))
    lines = ["agentopt tune agentopt.serving.chat:reply --train captured --metric f1"]
    if run.config.get("base_url") and model:
        lines[0] += " \\"
        lines.append("  --model " + shlex.quote(f"agent=openai-compatible:{run.config['base_url']}#{model}"))
    return lines


def search_of(run: RunRow, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which optimizer and driver a run has, and why that driver."""
    none: Mapping[str, Any] = {}
    started = next((event for event in events if event.get("kind") == "run_started"), none)
    return {
        "optimizer": run.config.get("optimizer", ""),
        "driver": run.config.get("driver", ""),
        "driver_reason": started.get("driver_reason", ""),
    }


def search_of_run(store_path: str | None, run_id: str) -> dict[str, Any]:
    """As `search_of`, for a run that is in the store."""
    with open_store(store_path) as store:
        run = find_run(store, run_id)
        return search_of(run, [event.payload for event in store.events(run.id)])


def _given_up(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What an optimizer gave up before anything was measured: unreadable answers and illegal edits."""
    found: list[Mapping[str, Any]] = []
    for event in events:
        if event.get("kind") == "proposal_made":
            found += event.get("dropped") or []
    return found


def values_of(store: Store, run: RunRow, which: str) -> Mapping[str, Any]:
    """Parameter values of `best`, `baseline`, or a candidate hash (a unique prefix is enough).

    Raises:
        UserError: the run has no such candidate.
    """
    if run.config.get("kind") == "serve":
        raise UserError(f"run {run.id} is the traffic of a server: it has no candidates; give the id of a tuning run.")
    if which in ("best", "baseline"):
        found = run.summary.get(which)
        if not found:
            raise UserError(
                f"run {run.id}: it has no {which} candidate yet; `agentopt runs resume {run.id}` continues it."
            )
        return found["values"]
    candidates = store.candidates(run.id)
    matches = [hash_ for hash_ in candidates if hash_.startswith(which)]
    if len(matches) != 1:
        problem = "no candidate" if not matches else f"{len(matches)} candidates"
        raise UserError(
            f"run {run.id}: {problem} with a hash that starts with {which!r}; `agentopt runs show {run.id}` lists them."
        )
    return candidates[matches[0]]["values"]


def diff_runs(reference: str, other: str | None, store_path: str | None) -> None:
    """Print the difference between a run's baseline and best, or between the best of two runs."""
    with open_store(store_path) as store:
        run = find_run(store, reference)
        if other is None:
            before, after = values_of(store, run, "baseline"), values_of(store, run, "best")
        else:
            before, after = values_of(store, run, "best"), values_of(store, find_run(store, other), "best")
    print_diff(out(), before, after)


def export_candidate(reference: str, path: str, which: str, store_path: str | None) -> None:
    """Write a candidate's values as plain JSON or TOML."""
    from agentopt.graph import Candidate

    if Path(path).suffix not in (".json", ".toml"):
        raise UserError(f"--out {path}: expected a name that ends in .json or .toml.")
    with open_store(store_path) as store:
        run = find_run(store, reference)
        candidate: Candidate = Candidate(dict(values_of(store, run, which)))
    candidate.save(path)
    err().print(f"wrote {path}: load it with ao.load({path!r}).install()")
