"""The live view of a tuning run: what is running, done of total, score so far, spend so far, time left.

Unit: one typed event in, a few words out. In a terminal one line moves at the bottom and each finished stage leaves one
line above it; piped into a file only the finished stages are written. Everything goes to stderr.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from agentopt.cli._console import err, seconds, short, spent


def _knowledge_lines(names: Sequence[str]) -> list[str]:
    """What is known of each knowledge parameter before anything is tried."""
    from agentopt.graph import describe_knowledge, find_parameter

    lines: list[str] = []
    for name in names:
        spec = find_parameter(name)
        if spec is not None and spec.knowledge is not None:
            number = len(spec.knowledge.documents)
            how = f", or folded with {spec.knowledge.folder}" if spec.knowledge.folder else ""
            lines.append(
                f"{name}: {number} {'document' if number == 1 else 'documents'}, "
                f"{describe_knowledge(spec.default, name)}; may become a capsule{how}"
            )
    return lines


def _form_lines(event: Any) -> list[str]:
    """Forms of knowledge that are proposed, and what was folded in vain."""
    made = [str(update["rationale"]) for update in event.updates if str(update["source"]).startswith("knowledge.")]
    failed = [drop for drop in event.dropped if str(drop["source"]).startswith("knowledge.")]
    return [*(f"tries {line}" for line in made), *(f"not folded: {drop['problem']}" for drop in failed)]


def given_up(number: int) -> str:
    """How much an optimizer gave up before anything was measured: unreadable answers and illegal edits."""
    return "1 answer or edit given up" if number == 1 else f"{number} answers or edits given up"


class LiveView:
    """A moving line at the bottom, permanent ones above it; subclasses have an `on_KIND` per kind of event."""

    progress: Progress
    quiet: bool

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, event: Any) -> None:
        """Take one event; unknown kinds are ignored, so a newer loop does not break an older view."""
        handler = getattr(self, f"on_{event.kind}", None)
        if handler is not None:
            handler(event)

    def say(self, *parts: str | tuple[str, str]) -> None:
        """One permanent line."""
        if not self.quiet:
            self.progress.console.print(Text.assemble(*parts))


class LiveRun(LiveView):
    """Prints a run as its events arrive; use as a context manager."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or err()
        self.quiet = quiet
        self.best: float | None = None
        self.start = time.monotonic()
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=18),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.task: TaskID | None = None
        self.total: int | None = None
        self.told: set[str] = set()
        self.run_id: str | None = None
        self.rollouts = 0
        self.spent: float | None = 0.0

    def show(self, description: str) -> None:
        """Say at the bottom line what is running."""
        if self.task is None:
            self.task = self.progress.add_task(description, total=self.total, note="")
        self.progress.update(
            self.task, description=description, completed=self.rollouts, total=self.total, note=self.note()
        )

    # One method per event kind.

    def on_run_started(self, event: Any) -> None:
        self.run_id = event.run_id
        self.say(("run ", "dim"), (event.run_id, "bold"), (f"  {event.program}", ""))
        self.say((f"  optimizer {event.optimizer}, driver {event.driver} ({event.driver_reason})", "dim"))
        self.show("baseline on validation")

    def on_baseline_done(self, event: Any) -> None:
        self.best = event.mean
        errors = f", {event.errors} failed" if event.errors else ""
        self.say(("baseline ", "bold"), f"{event.mean:.3f} on {event.rows} validation rows{errors}")
        self.say((f"  tunes {', '.join(event.tunable)}", "dim"))
        for line in _knowledge_lines(event.tunable):
            self.say((f"  {line}", "dim"))
        if event.tools:
            calls = ", ".join(f"{name} ({mean:.1f} per run)" for name, mean in event.tools.items())
            self.say((f"  calls tools: {calls}", "dim"))
        if text := event.plan.get("text"):
            self.say((f"  {text}", "dim"))
        search = event.plan.get("search")
        self.total = None if search is None else self.rollouts + search
        self.show("asking the optimizer")

    def on_proposal_made(self, event: Any) -> None:
        number = len(event.updates)
        dropped = event.dropped
        if event.outcome != "ok":
            why = f"{event.outcome}: {short(event.detail, 80)}"
            if event.outcome == "empty" and dropped:
                why = f"{given_up(len(dropped))}: {short(dropped[-1]['problem'], 100)}"
            self.say((f"round {event.iteration + 1}: ", "bold"), (f"no proposal ({why})", "yellow"))
        for line in _form_lines(event):
            if line not in self.told:
                self.told.add(line)
                self.say((f"  {line}", "dim"))
        self.show(f"round {event.iteration + 1}: screening {number}")

    def on_screen_done(self, event: Any) -> None:
        self.say(
            (f"round {event.iteration + 1}: ", "bold"),
            f"{len(event.passed)} of {len(event.scores)} proposals beat their parent on {event.rows} examples",
        )
        self.show(f"round {event.iteration + 1}: racing")

    def on_gate_progress(self, event: Any) -> None:
        self.show(f"round {event.iteration + 1}: {len(event.live)} racing, row {event.rows} of {event.total}")

    def on_gate_done(self, event: Any) -> None:
        self.show("comparing")

    def on_candidate_accepted(self, event: Any) -> None:
        self.best = max(self.best or event.validation, event.validation)
        self.say(
            ("  accepted ", "green"),
            f"{event.candidate[:8]} {event.previous_best:.3f} -> {event.validation:.3f} (selection estimate)",
            (f"  {event.source}", "dim"),
        )

    def on_row_done(self, event: Any) -> None:
        if not event.cached:
            self.rollouts += 1
            self.spent = None if event.cost is None or self.spent is None else self.spent + event.cost
        if self.total is not None and self.rollouts > self.total:
            self.total = None  # what the search may use is used; these rows are the test's
            self.show("final test")
        if self.task is not None:
            self.progress.update(self.task, completed=self.rollouts, total=self.total, note=self.note())

    def on_spend(self, event: Any) -> None:
        self.total = None if event.left is None else self.rollouts + event.left
        self.show("asking the optimizer")

    def on_warning(self, event: Any) -> None:
        self.say(("warning: ", "yellow"), event.message)

    def on_test_done(self, event: Any) -> None:
        self.show("writing the report")

    @property
    def elapsed(self) -> float:
        """Seconds since the view was made."""
        return time.monotonic() - self.start

    def note(self) -> str:
        """Rollouts done, score so far, spend so far, time left."""
        parts = [f"{self.rollouts}" if self.total is None else f"{self.rollouts}/{self.total}"]
        parts.append("" if self.best is None else f"best {self.best:.3f}")
        parts.append(spent(self.spent))
        if self.total and self.rollouts >= 20:
            pace = self.elapsed / self.rollouts
            parts.append(f"~{seconds(pace * max(0, self.total - self.rollouts))} left")
        return "  ".join(part for part in parts if part)
