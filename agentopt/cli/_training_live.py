"""What the live views of training runs share: one moving line, permanent lines above it, and a Ctrl-C that waits.

In a terminal one line moves at the bottom and every validation leaves a line above it; piped into a file only the
finished lines are written. Everything goes to stderr.
"""

from __future__ import annotations

import os
import signal
import textwrap
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from agentopt.cli._console import err, seconds
from agentopt.cli._progress import LiveView

if TYPE_CHECKING:
    from agentopt.weights.finetuning import Stop

WIDTH = 10
"""Columns of the names at the beginning of lines."""
WINDOW = 20
"""Steps over which the shown loss is averaged."""


def size(number: float) -> str:
    """Bytes as a person reads them."""
    from agentopt.weights.finetuning._memory import size as text

    return text(number)


def shown_path(name: str) -> str:
    """A model's name, or its path as seen from here where that is shorter."""
    return min(name, os.path.relpath(name), key=len) if os.path.exists(name) else name


def duration(value: float) -> str:
    """A time span as a person says it."""
    if value < 100:
        return seconds(value)
    minutes = value / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def pace(steps: float) -> str:
    """Steps in a second, or seconds for a step, whichever is above one."""
    return f"{steps:.1f} steps/s" if steps >= 1 else f"{1 / max(steps, 1e-9):.1f} s/step"


class LiveTraining(LiveView):
    """The moving line, the lines of the plan, and the pace; use as a context manager."""

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
        self._begun: tuple[int, float] | None = None
        self._spent = 0.0

    def show(self, description: str, *, done: int = 0, total: int | None = None, note: str = "") -> None:
        """The moving line."""
        if self.task is None:
            self.task = self.progress.add_task(description, total=total, note=note)
        self.progress.update(self.task, description=description, completed=done, total=total, note=note)

    def line(self, name: str, text: str, style: str = "") -> None:
        """A line of the plan, its continuation under its beginning."""
        pieces = textwrap.wrap(text, max(30, self.console.width - WIDTH - 1), break_on_hyphens=False) or [""]
        for place, piece in enumerate(pieces):
            self.say((("" if place else name).ljust(WIDTH), "bold"), (piece, style))

    @property
    def loss(self) -> float | None:
        """Of the last steps, averaged."""
        return sum(self.losses) / len(self.losses) if self.losses else None

    def advance(self, step: int, loss: float, took: float) -> tuple[float, float]:
        """Take a step; steps per second, and seconds that are left (validations included)."""
        self.losses = [*self.losses[1 - WINDOW :], loss]
        if self._begun is None:
            self._begun = (step - 1, time.monotonic() - took)
            self._spent = 0.0
        self._spent += took
        done = step - self._begun[0]
        left = (time.monotonic() - self._begun[1]) / done * (self.steps - step)
        return done / max(self._spent, 1e-9), left


@contextmanager
def interruptible(stop: Stop, live: LiveTraining) -> Generator[None]:
    """The first SIGINT inside a step lets the step end; any other ends the run at once."""

    def on_signal(_number: int, _frame: Any) -> None:
        if stop.busy and not stop.wanted:
            stop.wanted = True
            live.say(("stopping ", "yellow"), "after this step; Ctrl-C again to stop at once")
        else:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
