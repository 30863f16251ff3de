"""The live view of meta-training: plan, what can be had without it, then step, loss, validation, pace, time left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from agentopt.cli._console import count
from agentopt.cli._training_live import WIDTH, LiveTraining, duration, pace, shown_path, size

if TYPE_CHECKING:
    from agentopt.cli._fold_run import Parts
    from agentopt.weights.fold import Folder, FoldOptions, MetaOptions

STEP, STEP_UNROLLED, STEP_RECOMPUTED = 3, 9, 12
"""Forward passes that an inner step is worth: without a graph, with second-order terms, with these recomputed."""


class LiveFold(LiveTraining):
    """Prints a run as its events arrive; use as a context manager."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        super().__init__(quiet=quiet, console=console)
        self.accuracy: float | None = None
        self.recall: float | None = None

    def plan(self, folder: Folder, parts: Parts, options: MetaOptions) -> None:
        """Everything that is known before anything is computed."""
        self.steps = options.steps
        weights = list(folder.model.parameters())
        total = sum(weight.numel() for weight in weights)
        stored = sum(weight.numel() * weight.element_size() for weight in weights)
        self.line(
            "model", f"{shown_path(folder.base_name or 'a model')}: {count(total)} weights, {size(stored)} in memory"
        )
        self.line("tasks", parts.text())
        for note in parts.notes:
            self.line("", note, "yellow")
        moved = sum(tensor.numel() for tensor in folder.meta.init.values())
        self.line("adapts", _adapts(folder.options, moved))
        self.line("learns", _learns(folder.options))
        self.line("plan", _plan(folder.options, options, moved * 4))

    def baselines(self, found: dict[str, float], tasks: int, questions: int) -> None:
        """What can be had without training."""
        self.accuracy = found.get("folded, untrained")
        shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        self.line("baselines", f"{shown} ({questions:,} questions about {tasks:,} validation tasks)")

    # --- one method per kind of event --------------------------------------------------------------------------------

    def on_working(self, event: Any) -> None:
        note = "" if event.total is None else f"{event.done}/{event.total}"
        self.show(event.what, done=event.done, total=event.total, note=note)

    def on_resumed(self, event: Any) -> None:
        self.line("resumed", f"after step {event.step:,}")

    def on_stepped(self, event: Any) -> None:
        rate, left = self.advance(event.step, event.loss, event.seconds)
        accuracy = "" if self.accuracy is None else f"acc {self.accuracy:.3f} "
        recall = "" if self.recall is None else f"rec {self.recall:.2f} "
        note = f"loss {self.loss:.3f} {accuracy}{recall}{pace(rate)} {duration(left)} left"
        self.show(f"step {event.step}/{self.steps}", done=event.step, total=self.steps, note=note)

    def on_validated(self, event: Any) -> None:
        self.accuracy, self.recall = event.accuracy, event.recall
        train = "" if self.loss is None else f"loss {self.loss:.3f}, "
        recall = f"recall {event.recall:.2f}"
        if event.recall_set is not None:
            recall += f", exact {event.recall_set:.2f}"
        self.say(
            (f"step {event.step}".ljust(WIDTH), "bold"),
            f"{train}validation accuracy {event.accuracy:.3f}, {recall}",
            ("  best" if event.best else "", "green"),
        )

    def on_warned(self, event: Any) -> None:
        self.line("warning", event.message, "yellow")

    def on_finished(self, event: Any) -> None:
        self.progress.stop()


def _adapts(options: FoldOptions, moved: int) -> str:
    if options.adapts == "all":
        return f"all weights: {count(moved)} numbers for each knowledge base"
    where = "all layers" if options.layers is None else f"the topmost {options.layers} layers"
    return f"LoRA of rank {options.rank} in {where}: {count(moved)} numbers for each knowledge base"


def _learns(options: FoldOptions) -> str:
    learnt = ["where the adapters start" if options.adapts == "lora" else "all weights"]
    if options.adapts == "lora" and options.trains == "all":
        learnt.append("the base's weights")
    if options.learn_lr:
        learnt.append(f"a rate for each tensor and each of {options.inner_steps} inner steps ({options.rule})")
    if options.token_weights:
        learnt.append("weights of tokens")
    if len(learnt) > 1:
        learnt[-1] = f"and {learnt[-1]}"
    text = (", " if len(learnt) > 2 else " ").join(learnt)
    frozen = options.trains != "all"
    return f"{text}; the base stays as it is" if frozen else text


def passes(options: FoldOptions) -> int:
    """Forward passes over the facts of a knowledge base that one meta-step is worth."""
    unrolled = options.inner_steps if options.unroll is None else min(options.unroll, options.inner_steps)
    each = STEP_RECOMPUTED if options.checkpoint else STEP_UNROLLED
    return STEP * (options.inner_steps - unrolled) + each * unrolled


def _plan(fold: FoldOptions, options: MetaOptions, factor_bytes: int) -> str:
    batch = f"{options.documents} knowledge bases x {options.questions} questions"
    if options.accumulate > 1:
        batch = f"{options.accumulate} x {batch}"
    unrolled = fold.inner_steps if fold.unroll is None else min(fold.unroll, fold.inner_steps)
    order = f"second order through {unrolled} of {fold.inner_steps} inner steps" if unrolled else "first order"
    every = options.steps * options.documents * options.accumulate
    kept = factor_bytes * options.documents * (fold.inner_steps + 1)
    return (
        f"{options.steps:,} steps of {batch}; {order}: about {passes(fold)} forward passes over each knowledge base "
        f"({count(every * passes(fold))} in all); learning rate {options.lr:g}; {size(kept)} for adapted tensors, and "
        "the activations of one inner step"
    )
