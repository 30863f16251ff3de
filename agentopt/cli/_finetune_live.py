"""The live view of a fine-tuning run: step, smoothed loss, validation, steps/s, peak memory, time left."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from agentopt.cli._console import count
from agentopt.cli._training_live import WIDTH, LiveTraining, duration, pace, size


class LiveFinetune(LiveTraining):
    """Prints a run as its events arrive; use as a context manager."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        super().__init__(quiet=quiet, console=console)
        self.metric = "accuracy"
        self.score: float | None = None

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

    def on_baselines_done(self, event: Any) -> None:
        self.score = event.validation["zero-shot"]
        shown = ", ".join(f"{name} {value:.3f}" for name, value in event.validation.items())
        self.line("baselines", f"on validation: {shown}")

    def on_rate_found(self, event: Any) -> None:
        self.line("rate", event.reason)

    def on_resumed(self, event: Any) -> None:
        self.line("resumed", f"after step {event.step:,}")

    def on_stepped(self, event: Any) -> None:
        rate, left = self.advance(event.step, event.loss, event.seconds)
        score = "" if self.score is None else f"{self.metric[:3]} {self.score:.3f} "
        note = f"loss {self.loss:.3f} {score}{pace(rate)} {size(event.memory)} {duration(left)} left"
        self.show(f"step {event.step}/{self.steps}", done=event.step, total=self.steps, note=note)

    def on_validated(self, event: Any) -> None:
        self.score = event.score
        train = "" if self.loss is None else f"train loss {self.loss:.3f}, "
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
