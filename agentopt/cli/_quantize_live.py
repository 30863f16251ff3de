"""The live view of a quantization or an archive: the tensor that was just done, megabytes a second, time left."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from agentopt.cli._console import count
from agentopt.cli._training_live import LiveTraining, duration, size

NAME = 26
"""Columns of a tensor's name in the moving line."""


def tail(name: str, width: int) -> str:
    """The end of a dotted name, which tells tensors apart; what was cut is marked, at a dot where there is one."""
    if len(name) <= width:
        return name
    end = name[1 - width :]
    whole = name[-width] == "."
    _, dot, rest = end.partition(".")
    return f"…{end}" if whole or not dot else f"…{rest}"


def remaining(seconds: float) -> str:
    """The time left; nothing for the last second, in which a figure only flickers."""
    return f"{duration(seconds)} left" if seconds >= 1 else ""


class LiveQuantize(LiveTraining):
    """Prints a run as its events arrive; use as a context manager."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        super().__init__(quiet=quiet, console=console)
        self.warnings: list[str] = []
        self._done = 0.0
        self._weights, self._planned = 0, -1
        self._speed = ""
        self._start: float | None = None

    # --- one method per kind of event --------------------------------------------------------------------------------

    def on_working(self, event: Any) -> None:
        if self._planned == event.total and " " not in event.what:  # a layer is begun
            note = f"{tail(event.what, NAME)} {self._speed}".strip()
            self.show(f"tensor {event.done + 1}/{event.total}", done=event.done, total=event.total, note=note)
            return
        note = "" if event.total is None else f"{event.done:,}/{event.total:,}"
        self.show(event.what, done=event.done, total=event.total, note=note)

    def on_resumed(self, event: Any) -> None:
        self.line("resumed", f"the complete files of a run before this one are kept ({event.step:,} layers)")

    def on_planned(self, event: Any) -> None:
        self._weights, self._planned = event.weights, event.tensors
        self.line(
            "plan",
            f"{event.tensors:,} linear layers with {count(event.weights)} weights; {event.kept:,} other tensors stay "
            f"as they are; {size(event.bytes_before)} in all",
        )

    def on_tensor(self, event: Any) -> None:
        report = event.report
        weights = math.prod(report.shape)
        if event.resumed:
            self._weights -= weights
        else:
            if self._start is None:
                self._start = time.monotonic() - report.seconds
            self._done += weights
        self._speed = self._pace(report.stored_bits / 8)
        self.show(
            f"tensor {event.done}/{event.total}",
            done=event.done,
            total=event.total,
            note=f"{tail(report.name, NAME)} {self._speed}".strip(),
        )

    def on_shard(self, event: Any) -> None:
        self.line("written", f"{Path(event.path).name}, {size(event.bytes)}")

    def on_packed(self, event: Any) -> None:
        self._step(event.info.name, event.info.bytes, event.done, event.total)

    def on_unpacked(self, event: Any) -> None:
        self._step(event.name, event.bytes, event.done, event.total)

    def on_verified(self, event: Any) -> None:
        self._step(event.name, 0, event.done, event.total)

    def _step(self, name: str, written: int, done: int, total: int) -> None:
        """A tensor of an archive; how fast is told in bytes that were written."""
        self._start = self._start or time.monotonic()
        self._done += written
        took = time.monotonic() - self._start
        pace = f"{self._done / took / 1e6:.1f} MB/s" if written and took > 0.5 else ""
        left = remaining(took / done * (total - done)) if took > 0.5 else ""
        note = " ".join(part for part in (tail(name, NAME), pace, left) if part)
        self.show(f"tensor {done}/{total}", done=done, total=total, note=note)

    def on_warned(self, event: Any) -> None:
        self.warnings.append(event.message)
        self.line("warning", event.message, "yellow")

    def _pace(self, bytes_each: float) -> str:
        if self._start is None or not self._done:
            return ""
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        left = remaining((self._weights - self._done) / rate)
        return f"{rate * bytes_each / 1e6:.1f} MB/s {left}".rstrip()
