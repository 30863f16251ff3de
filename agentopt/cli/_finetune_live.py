"""The live view of a fine-tuning run: step, smoothed loss, validation, steps/s, peak memory, time left.

In a terminal one line moves at the bottom and every validation leaves a line above it; piped into a file only the
finished lines are written. Everything goes to stderr.
"""

from __future__ import annotations

import textwrap
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from agentopt.cli._console import count, err, seconds
from agentopt.cli._progress import LiveView

WIDTH = 10
"""Columns of the names at the beginning of lines."""


def size(number: float) -> str:
    """Bytes as a person reads them."""
    from agentopt.weights.finetuning._memory import size as text

    return text(number)


def duration(value: float) -> str:
    """A time span as a person says it."""
    if value < 100:
        return seconds(value)
    minutes = value / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


class LiveFinetune(LiveView):
    """Prints a run as its events arrive; use as a context manager."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or err()
        self.quiet = quiet
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.task: TaskID | None = None
        self.steps = 0
        self.losses: list[float] = []
        self.begun: tuple[int, float] | None = None
        self.spent = 0.0
        self.metric = "accuracy"
        self.score: float | None = None

    def show(self, description: str, *, done: int = 0, total: int | None = None, note: str = "") -> None:
        """The moving line."""
        if self.task is None:
            self.task = self.progress.add_task(description, total=total, note=note)
        self.progress.update(self.task, description=description, completed=done, total=total, note=note)

    # --- one method per kind of event --------------------------------------------------------------------------------

    def on_working(self, event: Any) -> None:
        note = "" if event.total is None else f"{event.done}/{event.total}"
        self.show(event.what, done=event.done, total=event.total, note=note)

    def on_planned(self, event: Any) -> None:
        self.steps, self.metric = event.steps, event.metric
        rows = ", ".join(f"{number:,} {name}" for name, number in event.rows.items())
        split = " (split by content)" if event.split else ""
        self.line("model", f"{event.model}: {count(event.total)} weights, {size(event.weight_bytes)} in memory")
        self.line("rows", rows + split)
        if event.labels:
            self.line("labels", ", ".join(f"{label} = {word}" for label, word in event.labels.items()))
        if event.truncated:
            self.line("", f"{event.truncated:,} rows are too long and lose their beginning; see --max-tokens", "yellow")
        self.line("method", f"{event.method}: {event.description}")
        share = event.trained / max(event.total, 1)
        what = {"full": "all weights", "lora": "a LoRA adapter", "prefix": "a prefix"}[event.tune]
        more = "" if event.tune == "full" else f", {share:.2%} of the model"
        self.line("trains", f"{what}: {count(event.trained)} numbers{more}")
        self.line("plan", _plan(event))

    def line(self, name: str, text: str, style: str = "") -> None:
        """A line of the plan, its continuation under its beginning."""
        pieces = textwrap.wrap(text, max(30, self.console.width - WIDTH - 1), break_on_hyphens=False) or [""]
        for place, piece in enumerate(pieces):
            self.say((("" if place else name).ljust(WIDTH), "bold"), (piece, style))

    def on_baselines_done(self, event: Any) -> None:
        self.score = event.validation["zero-shot"]
        shown = ", ".join(f"{name} {value:.3f}" for name, value in event.validation.items())
        self.line("baselines", f"on validation: {shown}")

    def on_rate_found(self, event: Any) -> None:
        self.line("rate", event.reason)

    def on_resumed(self, event: Any) -> None:
        self.line("resumed", f"after step {event.step:,}")

    def on_stepped(self, event: Any) -> None:
        self.losses = [*self.losses[-19:], event.loss]
        if self.begun is None:
            self.begun = (event.step - 1, time.monotonic() - event.seconds)
            self.spent = 0.0
        self.spent += event.seconds
        pace = (event.step - self.begun[0]) / max(self.spent, 1e-9)
        left = (time.monotonic() - self.begun[1]) / (event.step - self.begun[0]) * (self.steps - event.step)
        score = "" if self.score is None else f"{self.metric[:3]} {self.score:.3f} "
        note = (
            f"loss {sum(self.losses) / len(self.losses):.3f} {score}{_pace(pace)} {size(event.memory)} "
            f"{duration(left)} left"
        )
        self.show(f"step {event.step}/{self.steps}", done=event.step, total=self.steps, note=note)

    def on_validated(self, event: Any) -> None:
        loss = sum(self.losses) / len(self.losses) if self.losses else None
        self.score = event.score
        train = "" if loss is None else f"train loss {loss:.3f}, "
        parts: list[str | tuple[str, str]] = [
            (f"step {event.step}".ljust(WIDTH), "bold"),
            f"{train}validation {self.metric} {event.score:.3f}, loss {event.loss:.3f}",
        ]
        self.say(*parts, ("  best" if event.best else "", "green"))

    def on_warned(self, event: Any) -> None:
        self.line("warning", event.message, "yellow")

    def on_finished(self, event: Any) -> None:
        self.progress.stop()


def _plan(event: Any) -> str:
    steps = f"{event.steps:,} steps of {event.batch} rows"
    if event.forwards_per_step is None:
        work = "one backward pass each"
    else:
        each = event.forwards_per_step
        work = f"{each} forward passes each ({event.steps * each:,} in all)"
    rate = "learning rate: measured first" if event.lr is None else f"learning rate {event.lr:g}"
    eps = "" if event.eps is None else f", eps {event.eps:g}"
    workers = f", {event.workers} workers" if event.workers > 1 else ""
    return f"{steps}, {work}; {rate}{eps}{workers}"


def _pace(steps: float) -> str:
    return f"{steps:.1f} steps/s" if steps >= 1 else f"{1 / max(steps, 1e-9):.1f} s/step"
