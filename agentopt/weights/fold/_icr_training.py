"""Fine-tuned in-context reasoning (FT-ICR, the baseline of RECKONING, arXiv 2305.06349): train a model to read.

The same target as a folder's (relevant facts, then the answer), with all facts of the task in the prompt, in a new
order every time. Training goes on until neither accuracy nor loss on the validation tasks gets better, and the best
weights are kept: a baseline that stopped early proves nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from agentopt.errors import RunError, UserError
from agentopt.evaluation import seed_number
from agentopt.weights import adapters
from agentopt.weights.fold._icr_loss import Group, ReadingLoss, Row
from agentopt.weights.fold._incontext import InContext
from agentopt.weights.fold._types import FoldFormat, FoldTask, Question, options_from
from agentopt.weights.load import need
from agentopt.weights.tasks._predictions import measuring
from agentopt.weights.zeroth._schedule import Schedule

if TYPE_CHECKING:
    from agentopt.weights.adapters import Adapters
    from agentopt.weights.fold._codec import Codec


_PROGRESS = 0.999
"""A validation loss below so much of the lowest one is progress."""


class IcrOptions(BaseModel):
    """How a reader is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["full", "lora"] = "full"
    rank: int = Field(default=16, ge=1)
    """Of the LoRA factors."""
    alpha: float | None = Field(default=None, gt=0)
    """None for the rank."""
    targets: str | tuple[str, ...] = "all-linear"
    steps: int = Field(default=2000, ge=1)
    """Most steps."""
    lr: float = Field(default=1e-3, gt=0)
    documents: int = Field(default=8, ge=1)
    """Tasks in a step."""
    questions: int = Field(default=4, ge=1)
    """Questions of each, drawn anew every time."""
    warmup: int = Field(default=20, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    weight_decay: float = Field(default=0.0, ge=0)
    multi_task: bool = True
    recall_weight: float = Field(default=1.0, ge=0)
    """Weight of the recalled facts' loss beside the answer's, each a mean over tokens."""
    context_weight: float = Field(default=0.0, ge=0)
    """Weight of the loss on facts and question themselves."""
    shuffle: bool = True
    """A new order of the facts every time; False keeps the task's order."""
    curriculum: int = Field(default=0, ge=0)
    """Over so many first steps the tasks with few facts come first, more and more of the others join (competence-based
    curriculum, arXiv 1903.09848). Looking up one fact among many is hard to find, among two it is not."""
    share_context: bool = True
    """Questions about the same facts share the forward pass over them: the same loss, faster. (Not with
    `context_weight`.)"""
    eval_every: int = Field(default=100, ge=1)
    eval_tasks: int = Field(default=64, ge=1)
    eval_questions: int = Field(default=4, ge=1)
    """At most so many of each validation task, the first ones."""
    patience: int = Field(default=20, ge=0)
    """Validations without progress in accuracy or loss after which the training has converged; 0 makes all steps. A
    model that still guesses among the facts' values can stay there for thousands of steps before it finds out how to
    look them up: fewer validations than that would call it converged. None are counted during the curriculum."""
    max_tokens: int = Field(default=16384, ge=64)
    """Tokens of one forward pass; larger steps are made in parts, with the same gradient."""
    max_new: int = Field(default=96, ge=1)
    """Most tokens of recalled facts in a validation."""
    format: FoldFormat = FoldFormat()
    seed: int = Field(default=0, ge=0, lt=2**31)


@dataclass(frozen=True, slots=True)
class IcrPoint:
    """One validation."""

    step: int
    train_loss: float
    """Mean since the last validation."""
    val_loss: float
    val_accuracy: float
    val_recall: float | None
    """Share of questions whose relevant facts were recalled exactly; None in the single-task form."""
    seconds: float
    """Since the start, validations included."""


@dataclass(frozen=True, slots=True)
class IcrResult:
    """A trained reader."""

    steps: int
    best: IcrPoint
    """Highest validation accuracy, of equal ones the lowest loss; the model has the weights of this step."""
    curve: tuple[IcrPoint, ...]
    stopped: Literal["converged", "steps", "stopped"]
    seconds: float
    reader: InContext
    adapters: Adapters | None
    """Attached to the model; None when all weights were trained."""

    @property
    def best_step(self) -> int:
        """Steps after which validation was best."""
        return self.best.step


class Stopping(Protocol):
    """Such as `agentopt.weights.finetuning.Stop`."""

    wanted: bool


def train_incontext(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[FoldTask],
    *,
    val: Sequence[FoldTask],
    options: IcrOptions | None = None,
    on_point: Callable[[IcrPoint], None] | None = None,
    stop: Stopping | None = None,
    **fields: Any,
) -> IcrResult:
    """Train a model to answer from facts in its prompt, until it has converged.

    Args:
        model: changed in place; it ends with the best weights.
        tokenizer: its tokenizer.
        tasks: to train on.
        val: to stop by and to choose the best weights.
        options: all of them; or give single ones by name.
        on_point: called after each validation.
        stop: ends the training after the step that runs when its `wanted` becomes true.
        **fields: of `IcrOptions`.

    Raises:
        UserError: an option that does not exist, no tasks, or a task that is longer than the model's window.
        RunError: the loss is no number.
    """
    if options is not None and fields:
        raise UserError("train_incontext: found options= and single options; give one or the other.")
    settings = options or options_from(IcrOptions, fields, "train_incontext")
    for name, given in (("tasks", tasks), ("val", val)):
        if not any(task.questions for task in given):
            raise UserError(f"train_incontext: {name} has no questions, expected at least one task with a question.")
    return _Training(model, tokenizer, tasks, val, settings).run(on_point, stop)


class _Training:
    def __init__(
        self, model: Any, tokenizer: Any, tasks: Sequence[FoldTask], val: Sequence[FoldTask], options: IcrOptions
    ) -> None:
        self.torch = need("torch")
        self.model, self.options = model, options
        self.tasks = [task for task in tasks if task.questions]
        self.val = [task for task in val if task.questions][: options.eval_tasks]
        self.reader = InContext(
            model, tokenizer, format=options.format, multi_task=options.multi_task, max_new=options.max_new
        )
        self.codec: Codec = self.reader.codec
        self.schedule = Schedule(
            options.schedule, options.warmup, None if options.schedule == "constant" else options.steps
        )
        self.loss = ReadingLoss(
            model,
            self.codec.pad,
            recall=options.recall_weight,
            context=options.context_weight,
            share=options.share_context,
            max_tokens=options.max_tokens,
        )
        self.easy = sorted(range(len(self.tasks)), key=lambda number: len(self.tasks[number].facts))
        self.epoch = (-1, list[int]())
        """The number of an epoch and its order of tasks."""
        self.adapters: Adapters | None = None
        self.frozen: list[Any] = []

    def _begin(self) -> list[Any]:
        """The tensors that are trained."""
        options = self.options
        if options.method == "lora":
            alpha = options.alpha or float(options.rank)
            self.adapters = adapters.attach(
                self.model, rank=options.rank, alpha=alpha, targets=options.targets, seed=options.seed
            )
            return list(self.adapters.parameters().values())
        # A model that was loaded for something else may be frozen: its state is given back at the end.
        self.frozen = [weight for weight in self.model.parameters() if not weight.requires_grad]
        return [weight.requires_grad_(True) for weight in self.model.parameters() if weight.is_floating_point()]

    def run(self, on_point: Callable[[IcrPoint], None] | None, stop: Stopping | None) -> IcrResult:
        begin = time.perf_counter()
        first = self.options.eval_questions
        validation = [self._group(task, task.questions[:first], range(len(task.facts))) for task in self.val]
        weights = self._begin()
        try:
            curve, reason = self._loop(weights, validation, begin, on_point, stop)
        finally:
            for weight in weights:
                weight.grad = None
            for weight in self.frozen:
                weight.requires_grad_(False)
        best = max(curve, key=_merit)
        seconds = time.perf_counter() - begin
        return IcrResult(curve[-1].step, best, tuple(curve), reason, seconds, self.reader, self.adapters)

    def _loop(
        self,
        weights: list[Any],
        validation: list[Group],
        begin: float,
        on_point: Callable[[IcrPoint], None] | None,
        stop: Stopping | None,
    ) -> tuple[list[IcrPoint], Literal["converged", "steps", "stopped"]]:
        options = self.options
        optimizer = self.torch.optim.AdamW(weights, lr=options.lr, weight_decay=options.weight_decay)
        watch = _Watch(options.patience)
        kept = [weight.detach().clone() for weight in weights]
        losses: list[float] = []
        curve: list[IcrPoint] = []
        reason: Literal["converged", "steps", "stopped"] = "steps"
        for step in range(options.steps):
            losses.append(self._step(step, weights, optimizer))
            stopped = stop is not None and stop.wanted
            if (step + 1) % options.eval_every and step + 1 < options.steps and not stopped:
                continue
            point = self._validate(step + 1, losses, validation, begin)
            curve.append(point)
            losses = []
            if watch.see(point):
                kept = [weight.detach().clone() for weight in weights]
            if step < options.curriculum:
                watch.waited = 0
            if on_point is not None:
                on_point(point)
            if stopped or watch.converged:
                reason = "converged" if watch.converged else "stopped"
                break
        with self.torch.no_grad():
            for weight, best in zip(weights, kept, strict=True):
                weight.copy_(best)
        return curve, reason

    # --- a step ------------------------------------------------------------------------------------------------------

    def _step(self, step: int, weights: list[Any], optimizer: Any) -> float:
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.lr(step, self.options.lr)
        optimizer.zero_grad(set_to_none=True)
        training = bool(self.model.training)
        # Dropout would draw from a generator that is not ours.
        self.model.eval()
        total = 0.0
        try:
            with self.torch.enable_grad():
                for loss, share in self.loss.parts(self._drawn(step)):
                    (loss * share).backward()
                    total += float(loss.detach()) * share
        finally:
            self.model.train(training)
        norm = float(self.torch.nn.utils.clip_grad_norm_(weights, self.options.clip))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise RunError(f"in-context training: the loss of step {step + 1} is {total}; lower lr={self.options.lr}.")
        optimizer.step()
        return total

    def _drawn(self, step: int) -> list[Group]:
        """Tasks of a step: epochs in an order of their own, then questions and the order of the facts."""
        options, count = self.options, len(self.tasks)
        groups: list[Group] = []
        for place in range(step * options.documents, (step + 1) * options.documents):
            draw = _generator("in-context", options.seed, place)
            if step < options.curriculum:
                known = max(1, math.ceil(count * (step + 1) / options.curriculum))
                task = self.tasks[self.easy[int(draw.integers(known))]]
            else:
                epoch, at = divmod(place, count)
                task = self.tasks[self._order(epoch)[at]]
            asked: list[int] = draw.permutation(len(task.questions))[: options.questions].tolist()
            order = draw.permutation(len(task.facts)).tolist() if options.shuffle else range(len(task.facts))
            groups.append(self._group(task, [task.questions[number] for number in asked], order))
        return groups

    def _order(self, epoch: int) -> list[int]:
        if self.epoch[0] != epoch:
            order = _generator("in-context order", self.options.seed, epoch).permutation(len(self.tasks)).tolist()
            self.epoch = (epoch, order)
        return self.epoch[1]

    def _group(self, task: FoldTask, questions: Sequence[Question], order: Sequence[int]) -> Group:
        rows: list[Row] = []
        for question in questions:
            asked, response = self.codec.question(question.text), self.codec.response(question, task.facts)
            rows.append(Row([*asked, *response.ids], len(asked), response.recalled))
        group = Group(self.codec.context([task.facts[number] for number in order]), rows)
        window = self.reader.window
        if window is not None and group.longest > window:
            raise UserError(
                f"task {task.id!r}: facts, question and answer have {group.longest} tokens and the model's window has "
                f"{window}; leave the task out, or fold it instead."
            )
        return group

    # --- validation --------------------------------------------------------------------------------------------------

    def _validate(self, step: int, losses: Sequence[float], groups: list[Group], begin: float) -> IcrPoint:
        with measuring(self.model):
            loss = sum(float(part) * share for part, share in self.loss.parts(groups))
        scores = self.reader.evaluate(self.val, questions=self.options.eval_questions)
        return IcrPoint(
            step=step,
            train_loss=sum(losses) / len(losses),
            val_loss=loss,
            val_accuracy=scores.accuracy,
            val_recall=scores.recall_exact,
            seconds=time.perf_counter() - begin,
        )


class _Watch:
    """Knows the best validation and whether there is still progress in accuracy or in loss."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best: IcrPoint | None = None
        self.lowest = math.inf
        self.waited = 0

    def see(self, point: IcrPoint) -> bool:
        """Take note of a validation; whether it is the best."""
        better = self.best is None or _merit(point) > _merit(self.best)
        risen = self.best is None or point.val_accuracy > self.best.val_accuracy
        # Where nothing is left to win, the loss can go on shrinking for ever.
        perfect = point.val_accuracy >= 1 and point.val_recall in (1, None)
        fallen = point.val_loss < self.lowest * _PROGRESS and not perfect
        self.waited = 0 if risen or fallen else self.waited + 1
        self.lowest = min(self.lowest, point.val_loss)
        if better:
            self.best = point
        return better

    @property
    def converged(self) -> bool:
        """Whether it is time to stop."""
        return 0 < self.patience <= self.waited


def _merit(point: IcrPoint) -> tuple[float, float]:
    return point.val_accuracy, -point.val_loss


def _generator(*parts: str | int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed_number(*parts)))
