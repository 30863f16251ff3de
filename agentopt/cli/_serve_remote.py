"""`agentopt serve status|variants|adapters|drain`: asks a server that runs, through its admin side, and prints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentopt.cli._console import count, err, hanging, out, seconds, short
from agentopt.cli._training_live import WIDTH, duration, size
from agentopt.errors import UserError

if TYPE_CHECKING:
    from agentopt.serving.admin import AdminClient

PHASE_COLOURS = {"ready": "green", "starting": "cyan", "restarting": "yellow", "failed": "red", "stopped": "red"}
_WARN = "yellow"
_MODELS = 8


@dataclass(frozen=True, slots=True)
class Where:
    """Which server: by the address of its admin side, its port or its run folder; else the only one that runs here."""

    admin: str | None = None
    port: int | None = None
    run_dir: str | None = None

    def client(self) -> AdminClient:
        """What asks it.

        Raises:
            UserError: there is none, or several.
        """
        from agentopt.serving.admin import AdminClient

        return AdminClient.find(admin=self.admin, port=self.port, run_dir=self.run_dir)


# --- status ----------------------------------------------------------------------------------------------------------


def status_command(where: Where, *, as_json: bool = False) -> int:
    """Print what runs and how it does; 1 when its engine has failed for good."""
    found = where.client().get("/status")
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_status(found, out())
    return 1 if found["engine"]["phase"] == "failed" else 0


def print_status(found: Mapping[str, Any], console: Console) -> None:
    """Name and value, a line each; what is wrong last."""
    engine, totals = found["engine"], found["totals"]
    phase = str(engine["phase"])
    state = "draining" if found["draining"] else phase
    restarts = max(0, int(engine["generation"]) - 1)
    again = f", started {restarts + 1} times" if restarts else ""
    console.print(
        Text.assemble(
            ("engine".ljust(WIDTH), "bold"), f"{engine['name']} ", (state, PHASE_COLOURS.get(state, _WARN)), again
        )
    )
    _named(console, "model", str(found["model"]))
    _named(console, "base URL", str(found["base_url"]))
    _named(console, "up", duration(float(found["uptime"])))
    _named(
        console,
        "requests",
        f"{totals['requests']:,} done, {found['in_flight']:,} under way, {totals['errors']:,} failed, "
        f"{totals['refused']:,} refused",
    )
    _named(console, "tokens", f"{count(totals['prompt_tokens'])} prompt, {count(totals['completion_tokens'])} reply")
    names = [str(name) for name in found["models"]]
    more = len(names) - _MODELS
    _named(console, "models", ", ".join(names[:_MODELS]) + (f" and {more:,} more" if more > 0 else ""))
    if found["adapters"] is not None:
        _named(console, "adapters", f"{found['adapters']['known']:,} known, {found['adapters']['resident']:,} resident")
    _named(console, "keys", "none asked for" if found["keys"] is None else f"{found['keys']['valid']:,} valid")
    capture = found["capture"]
    if capture is not None:
        lost = f", {capture['dropped']:,} lost" if capture.get("dropped") else ""
        _named(console, "capture", f"{capture['captured']:,} stored{lost}, run {capture['run_id']}")
    for warning in found["warnings"]:
        _named(console, "warning", str(warning), _WARN)


# --- variants --------------------------------------------------------------------------------------------------------


def variants_command(where: Where, *, as_json: bool = False) -> int:
    """Print what each tuned prompt was asked and how its replies were liked."""
    found = where.client().get("/variants")
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_variants(found["variants"], out())
    return 0


def print_variants(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A table for each virtual model; below it what its feedback shows, and no more than that."""
    if not rows:
        console.print("no virtual models; `agentopt serve MODEL --candidate NAME=best.json` serves one")
    for place, model in enumerate(dict.fromkeys(str(row["model"]) for row in rows)):
        if place:
            console.print()
        console.print(Text(short(model, console.width), style="bold"))
        own = [row for row in rows if row["model"] == model]
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        table.add_column("variant", overflow="ellipsis", no_wrap=True, max_width=18)
        for title in ("share", "requests", "errors", "tokens", "mean time", "rated", "score"):
            table.add_column(title, justify="right", no_wrap=True)
        for row in own:
            liked, mean = row["feedback"], row["mean_ms"]
            table.add_row(
                str(row["variant"]),
                f"{float(row['weight']):.0%}",
                count(row["requests"]),
                count(row["errors"]),
                count(row["prompt_tokens"] + row["completion_tokens"]),
                seconds(None if mean is None else float(mean) / 1000),
                count(liked["n"]),
                "-" if liked["mean"] is None else f"{liked['mean']:+.2f}",
            )
        console.print(table)
        for row in own:
            if row.get("against"):
                for line in hanging(against_text(row), console.width):
                    console.print(line)


def against_text(row: Mapping[str, Any]) -> str:
    """How a variant's feedback compares with the first one's."""
    against = row["against"]
    pair = f"{row['variant']} against {against['variant']}"
    if against["difference"] is None:
        return f"{pair}: no feedback to compare"
    text = f"{pair}: {against['difference']:+.3f}"
    if against["interval"] is None:
        return f"{text}, too little feedback to tell"
    low, high = against["interval"]
    return f"{text}, 95 % interval {low:+.3f} to {high:+.3f}{'' if against.get('shown') else ': no difference shown'}"


# --- adapters --------------------------------------------------------------------------------------------------------


def adapters_command(where: Where, *, as_json: bool = False) -> int:
    """Print the adapters that can be asked for."""
    found = where.client().get("/adapters")
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_adapters(found["adapters"], out())
    return 0


def print_adapters(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A line for each; notes and problems below the table."""
    if not rows:
        console.print("no adapters; `agentopt serve adapters add NAME=DIR` adds one")
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("name", overflow="ellipsis", no_wrap=True, max_width=22)
    for title in ("rank", "size", "resident", "in use", "loads", "facts", "recall"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        recall = row.get("recall")
        table.add_row(
            str(row["name"]),
            str(row["rank"]),
            size(float(row["bytes"])),
            "yes" if row["resident"] else "no",
            count(row["users"]),
            count(row["loads"]),
            count(row["facts"]) if row.get("folded") else "-",
            "-" if recall is None else f"{recall:.3f}",
        )
    console.print(table)
    for row in rows:
        remarks = [*row.get("notes", ()), *([row["problem"]] if row.get("problem") else [])]
        for line in (piece for remark in remarks for piece in hanging(f"{row['name']}: {remark}", console.width)):
            console.print(Text(line, style=_WARN))


def add_adapter_command(where: Where, spec: str, *, as_json: bool = False) -> int:
    """Have the server check an adapter and serve it.

    Raises:
        UserError: it is no NAME=DIR, or the adapter is no good.
    """
    name, equals, folder = spec.partition("=")
    if not name or not equals or not folder:
        raise UserError(f"{spec!r}: expected NAME=DIR, for example handbook=./handbook.")
    if where.admin is None:
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: expected the folder of an adapter, found {_kind(folder)}.")
        folder = os.path.abspath(folder)
    elif not os.path.isabs(folder):
        raise UserError(f"{folder}: with --admin give the absolute path, as that server sees it.")
    found = where.client().post("/adapters", {"name": name, "path": folder}, seconds=600)
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    console = out()
    rank = f" (rank {found['rank']}, {size(float(found['bytes']))})" if "rank" in found else ""
    _lines(console, f"added {name}{rank}: ask for it as model {name}")
    for note in found.get("notes", ()):
        _lines(console, f"note: {note}", _WARN)
    return 0


def remove_adapter_command(where: Where, name: str, *, as_json: bool = False) -> int:
    """Serve an adapter no longer."""
    found = where.client().delete(f"/adapters/{name}")
    if as_json:
        print(json.dumps(found))
    else:
        _lines(out(), f"removed {name}; its files are where they were")
    return 0


# --- drain -----------------------------------------------------------------------------------------------------------


def drain_command(where: Where, *, seconds: float = 30.0, as_json: bool = False) -> int:
    """Take no new requests, wait for those under way, end the server; 1 when some were cut off."""
    if not (math.isfinite(seconds) and seconds >= 0):
        raise UserError(f"--timeout {seconds}: expected seconds, 0 or more.")
    client = where.client()
    if not as_json:
        waiting = int(client.get("/status")["in_flight"])
        if waiting:
            _lines(err(), f"waiting for {waiting:,} requests, at most {seconds:g} s")
    found = client.post("/drain", {"seconds": seconds, "stop": True}, seconds=seconds + 30)
    if as_json:
        print(json.dumps(found))
    elif found["drained"]:
        _lines(out(), f"drained{'; the server ends' if found['stops'] else ''}")
    else:
        _lines(
            out(), f"{found['in_flight']:,} requests were still under way after {seconds:g} s and are cut off", _WARN
        )
    return 0 if found["drained"] else 1


def _named(console: Console, name: str, text: str, style: str = "") -> None:
    for place, piece in enumerate(hanging(text, console.width - WIDTH)):
        console.print(Text.assemble((("" if place else name).ljust(WIDTH), "bold"), (piece, style)))


def _lines(console: Console, text: str, style: str = "") -> None:
    for line in hanging(text, console.width):
        console.print(Text(line, style=style))


def _kind(path: str) -> str:
    return "a file" if os.path.exists(path) else "nothing"
