"""The live view of a server: its start, the address with a line that works, what it does, how it ends.

Progress and remarks go to stderr, the address to stdout. In a terminal one line moves at the bottom.
"""

from __future__ import annotations

import json
import os
import shlex
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from agentopt.cli._console import count, err, out, seconds
from agentopt.cli._progress import LiveView
from agentopt.serving._options import loopback
from agentopt.serving._run_folder import ROOT

WIDTH = 10
"""Columns of the words at the beginning of lines."""
KEY_VARIABLE = "AGENTOPT_KEY"
LINE = 78
_SHOWN_MODELS = 6


def number_of(what: str, number: float) -> str:
    """1 request, 2 requests."""
    return f"{count(number)} {what}{'' if number == 1 else 's'}"


def curl_line(base_url: str, model: str, *, keys: bool) -> str:
    """A request that can be pasted into a shell as it stands."""
    lines = [f"curl {base_url}/chat/completions", "  -H 'Content-Type: application/json'"]
    if keys:
        lines.append(f'  -H "Authorization: Bearer ${KEY_VARIABLE}"')
    messages = '"messages": [{"role": "user", "content": "Say hello."}]'
    body = [f'{{"model": {json.dumps(model)},', f"{messages}}}"]
    # A quoted text may go over lines; JSON does not mind.
    between = " " if len(body[0]) + len(body[1]) <= LINE - 8 else "\n      "
    return " \\\n".join([*lines, f"  -d {shlex.quote(between.join(body))}"])


class _State(ProgressColumn):
    """Counts of the server, asked whenever the line is drawn."""

    def __init__(self, live: LiveServer) -> None:
        super().__init__()
        self.live = live

    def render(self, task: Any) -> Text:
        """The moving line's text."""
        return Text(self.live.state_line() or task.fields["note"], style="dim")


class LiveServer(LiveView):
    """Prints a server's life as its events arrive; use as a context manager."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None, results: Console | None = None) -> None:
        self.console = console or err()
        self.results = results or out()
        self.quiet = quiet
        self.serving: Any = None
        self.told = False
        self.stopping = False
        self.elsewhere = False
        """The engine is started and stopped by somebody else."""
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            _State(self),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            refresh_per_second=2,
            disable=quiet or not self.console.is_terminal,
        )
        self.task: Any = None

    def show(self, description: str, note: str = "") -> None:
        """The moving line."""
        if self.task is None:
            self.task = self.progress.add_task(description, total=None, note=note)
        room = max(10, self.console.width - len(description) - 14)
        shown = Text(" ".join(note.split()))
        shown.truncate(room, overflow="ellipsis")
        self.progress.update(self.task, description=description, note=shown.plain)

    def line(self, name: str, text: str, style: str = "") -> None:
        """A permanent line, its continuation under its beginning."""
        pieces = textwrap.wrap(text, max(30, self.console.width - WIDTH - 1), break_on_hyphens=False) or [""]
        for place, piece in enumerate(pieces):
            self.say((("" if place else name).ljust(WIDTH), "bold"), (piece, style))

    def state_line(self) -> str:
        """What the server has done and does, or nothing before it serves."""
        if self.serving is None:
            return ""
        state = self.serving.state()
        parts = [number_of("request", state["requests"]), f"{state['in_flight']} running"]
        parts += [number_of("token", state["tokens"])]
        parts += [f"{count(state['errors'])} failed"] if state["errors"] else []
        return ", ".join(parts)

    # --- one method per kind of event --------------------------------------------------------------------------------

    def on_engine_chosen(self, event: Any) -> None:
        self.elsewhere = event.engine == "external"
        self.line("engine", f"{event.engine}: {event.why}")
        self.show("preparing", event.model)

    def on_working(self, event: Any) -> None:
        if not self.told and not event.what.startswith("reading "):
            self.told = True
            what = event.what if event.what.startswith("fetching") else "the model is converted or quantized, minutes"
            self.line("preparing", f"{what}; the result is kept for the next start")
        done = "" if event.total is None else f" {event.done:,}/{event.total:,}"
        self.show("preparing", f"{event.what}{done}")

    def on_model_ready(self, event: Any) -> None:
        path = str(event.path)
        path = os.path.relpath(path) if os.path.exists(path) else path
        made = not event.cached and event.seconds >= 1
        shown = os.path.basename(path) if path.startswith("..") else path
        self.line("model", f"{shown} (prepared in {seconds(event.seconds)})" if made else shown)

    def on_listening(self, event: Any) -> None:
        self.line("listening", f"{event.base_url}, admin side {event.admin_url}")

    def on_starting(self, event: Any) -> None:
        again = "" if event.attempt == 1 else f", attempt {event.attempt}"
        self.show("starting", f"{event.engine}, process {event.pid}{again}")

    def on_progress(self, event: Any) -> None:
        self.show("starting", event.what)

    def on_ready(self, event: Any) -> None:
        again = "" if event.generation == 1 else " again"
        after = "" if self.elsewhere else f", after {seconds(event.seconds)}"
        self.line("ready", f"{event.engine} answers{again}{after}", "green")
        if self.serving is not None:
            self.show("serving")

    def on_serving(self, event: Any) -> None:
        self.serving = event
        self.progress.stop()  # the moving line would stay above what goes to stdout
        self.print_address(event)
        self.progress.start()
        self.show("serving")

    def on_died(self, event: Any) -> None:
        if self.stopping:
            return
        if self.elsewhere:
            self.line("lost", event.why, "red")
        else:
            self.line("died", f"{event.engine} after {seconds(event.after)}: {event.why}", "red")

    def on_hung(self, event: Any) -> None:
        self.line("hung", f"{event.engine}: {event.why}; it is started again", "red")

    def on_waiting(self, event: Any) -> None:
        if self.stopping:
            return
        if self.elsewhere:
            self.line("waiting", f"for the engine: {event.why}", "yellow")
        else:
            self.line("waiting", f"{seconds(event.seconds)} before start {event.attempt}", "yellow")

    def on_warned(self, event: Any) -> None:
        self.line("warning", event.message, "yellow")

    def on_draining(self, event: Any) -> None:
        self.stopping = True
        if event.in_flight:
            what = number_of("request", event.in_flight)
            self.line("stopping", f"{what} may end within {seconds(event.seconds)}; Ctrl-C again to stop at once")
        self.show("stopping")

    def on_ended(self, event: Any) -> None:
        state = "" if self.serving is None else f" after {self.state_line().replace(', 0 running', '')}"
        cut = f"; {event.cut_off} cut off" if event.cut_off else ""
        self.line("stopped", f"cleanly{state}{cut}" if not event.cut_off else f"at once{state}{cut}")

    # --- the address -------------------------------------------------------------------------------------------------

    def print_address(self, event: Any) -> None:
        """Where it is, a line that works, and what to do next."""
        names = ", ".join(event.models[:_SHOWN_MODELS])
        more = len(event.models) - _SHOWN_MODELS
        names += f" and {more} more" if more > 0 else ""
        print_ = self.results.print
        print_()
        print_(Text.assemble("serving ", (names, "bold"), " at ", (event.base_url, "bold")), soft_wrap=True)
        print_()
        line = curl_line(event.base_url, event.model, keys=event.keys is not None)
        print_(Text(textwrap.indent(line, "  ")), soft_wrap=True)
        print_()
        for note in self._next(event):
            print_(Text(note, style="dim"))

    @staticmethod
    def _next(event: Any) -> list[str]:
        port = event.base_url.rpartition(":")[2].removesuffix("/v1")
        if Path(event.run_dir) != ROOT / port:
            which = f" --run-dir {shlex.quote(event.run_dir)}"
        else:
            which = "" if port == "8000" else f" --port {port}"
        key = '"none"' if event.keys is None else f'os.environ["{KEY_VARIABLE}"]'
        client = "python: OpenAI("
        notes = [f'{client}base_url="{event.base_url}",', f"api_key={key})"]
        fits = len(" ".join(notes)) <= LINE
        notes = [" ".join(notes)] if fits else [notes[0], " " * len(client) + notes[1]]
        if event.keys == 0:
            notes.append(
                "no key is valid yet: agentopt serve keys create NAME --keys FILE, then export " + KEY_VARIABLE
            )
        elif event.keys is not None:
            notes.append(f"{KEY_VARIABLE}: a key that agentopt serve keys create showed ({event.keys} valid)")
        else:
            who = "anybody on this machine" if loopback(event.host) else f"anybody who reaches {event.host}:{port}"
            notes.append(f"{who} may ask; --keys FILE changes that")
        if event.captured_as:
            notes.append(f"captured: agentopt runs show {event.captured_as}")
        notes.append(f"look: agentopt serve status{which}; logs: {event.run_dir}")
        notes.append("Ctrl-C stops it")
        return notes
