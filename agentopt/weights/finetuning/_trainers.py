"""The two ways to train behind one interface: with a log and no gradients, or with gradients and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agentopt.weights.finetuning._first_order import FirstOrder
from agentopt.weights.finetuning._folder import LOG
from agentopt.weights.finetuning._material import Material
from agentopt.weights.finetuning._options import FIRST_ORDER_RATES, FinetuneOptions
from agentopt.weights.finetuning._subject import Subject, prepare
from agentopt.weights.finetuning._zeroth import Zeroth, forwards_per_step, schedule_of, settings
from agentopt.weights.zeroth._log import Record
from agentopt.weights.zeroth._optimizer import NonFiniteLoss
from agentopt.weights.zeroth._types import Exchange


@dataclass(frozen=True, slots=True)
class Measured:
    """What one step saw."""

    loss: float
    lr: float
    equal: bool
    """All measured losses were the same number."""
    moved: bool

    @property
    def finite(self) -> bool:
        """Whether the loss is a number."""
        return math.isfinite(self.loss)


class Trainer(Protocol):
    """Steps on a subject. Steps count from 1: after step n the weights have had n updates."""

    begin: int
    """Steps that `open` has put back already."""
    cost: int
    """Forward passes over a batch per step."""
    eps: float | None
    lr: float

    def open(self) -> int:
        """Take the files; the steps that they hold."""
        ...

    def again(self, step: int) -> bool:
        """Apply a step that is known; False when it must be measured."""
        ...

    def step(self, step: int, material: Material) -> Measured:
        """Measure a step and move; a loss that is no number comes back as NaN, with nothing changed."""
        ...

    def keep(self, *, best: bool) -> None:
        """After a validation: make sure that these weights can be had again."""
        ...

    def agree(self, go_on: bool) -> bool:
        """What rank 0 decides, on all workers."""
        ...

    def at_best(self, step: int) -> Subject:
        """The subject with the weights after `step`, which was kept as the best."""
        ...

    def close(self) -> None:
        """Give the files free."""
        ...

    def release(self) -> None:
        """Hold the model no longer: another is about to be loaded."""
        ...

    def clean(self) -> None:
        """Delete what only a resume needs; the run is done."""
        ...


def make_trainer(
    subject: Subject, options: FinetuneOptions, folder: Path, *, lr: float, data: str, exchange: Exchange | None
) -> Trainer:
    """The trainer for the method."""
    if options.first_order:
        return WithGradients(subject, options, folder)
    return WithoutGradients(subject, options, folder, lr=lr, data=data, exchange=exchange)


def rate_of(options: FinetuneOptions, weights: int) -> float | None:
    """The learning rate for so many trained weights, as far as it is known before measuring one."""
    if options.lr == "auto":
        return None
    if isinstance(options.lr, float):
        return options.lr
    return FIRST_ORDER_RATES[options.weights] if options.first_order else float(settings(options, weights)["lr"])


class WithoutGradients:
    """Zeroth order."""

    begin = 0

    def __init__(
        self,
        subject: Subject,
        options: FinetuneOptions,
        folder: Path,
        *,
        lr: float,
        data: str,
        exchange: Exchange | None,
    ) -> None:
        self.subject, self.options, self.exchange = subject, options, exchange
        self.lr, self.data = lr, data
        self.path = folder / LOG
        self.zeroth = Zeroth(subject, options, self.path, lr=lr, data=data, exchange=exchange)
        self.cost = forwards_per_step(options)
        self.eps: float | None = self.zeroth.optimizer.eps
        self._records: Iterator[Record] = iter(())
        self._known = 0

    def open(self) -> int:
        """Take the log; tell the other workers how long it is."""
        self._known = self.zeroth.open()
        self._records = self.zeroth.records()
        if self.exchange is not None:
            self.exchange.gather([float(self._known)])
        return self._known

    def follow(self) -> None:
        """Be a worker other than 0: read its log, write none."""
        assert self.exchange is not None
        self._known = int(self.exchange.gather([0.0])[0][0])
        self._records = self.zeroth.reading(self._known)

    def again(self, step: int) -> bool:
        """Apply the log's record of this step, if there is one."""
        if step > self._known:
            return False
        self.zeroth.apply(next(self._records))
        return True

    def step(self, step: int, material: Material) -> Measured:
        """Measure, log, move."""
        rank, world = (0, 1) if self.exchange is None else (self.exchange.rank, self.exchange.world)
        try:
            result = self.zeroth.step(material.objective(step - 1, rank, world))
        except NonFiniteLoss:
            return Measured(math.nan, self.lr, equal=False, moved=False)
        equal = len(result.losses) > 1 and len(set(result.losses)) == 1 and not any(result.scalars)
        return Measured(result.loss, result.lr, equal, result.moved)

    def keep(self, *, best: bool) -> None:
        """The log has it all; the disk should too."""
        if self.zeroth.log is not None:
            self.zeroth.log.sync()

    def agree(self, go_on: bool) -> bool:
        """Rank 0 tells."""
        if self.exchange is None:
            return go_on
        return bool(self.exchange.gather([float(go_on)])[0][0])

    def at_best(self, step: int) -> Subject:
        """The base again, and the log's first records on it."""
        self.release()
        self.subject = prepare(self.options)
        zeroth = Zeroth(self.subject, self.options, self.path, lr=self.lr, data=self.data)
        zeroth.replay(step)
        return self.subject

    def close(self) -> None:
        """Give the log free."""
        self.zeroth.close()

    def release(self) -> None:
        """Drop the optimizer, which knows every layer."""
        if hasattr(self, "zeroth"):
            del self.zeroth
        self.subject.release()

    def clean(self) -> None:
        """The log stays: it is the run."""


class WithGradients:
    """First order."""

    cost = 3  # a forward pass, and a backward pass of twice its work
    eps: float | None = None

    def __init__(self, subject: Subject, options: FinetuneOptions, folder: Path) -> None:
        self.first = FirstOrder(subject, options, schedule_of(options), folder)
        self.begin = 0
        self.lr = self.first.lr

    def open(self) -> int:
        """Go on from the checkpoint."""
        self.begin = self.first.resume()
        return self.begin

    def again(self, step: int) -> bool:
        """Nothing is known of a single step."""
        return False

    def step(self, step: int, material: Material) -> Measured:
        """Forward, backward, move."""
        rate = self.first.rate
        loss, moved = self.first.step(material.parts(step - 1))
        return Measured(loss, rate, equal=False, moved=moved)

    def keep(self, *, best: bool) -> None:
        """Write the checkpoint."""
        self.first.keep(best=best)

    def agree(self, go_on: bool) -> bool:
        """There is one worker."""
        return go_on

    def at_best(self, step: int) -> Subject:
        """The weights that were kept."""
        self.first.to_best()
        return self.first.subject

    def close(self) -> None:
        """No file is held open."""

    def release(self) -> None:
        """Drop the optimizer with its moments."""
        self.first.release()

    def clean(self) -> None:
        """Checkpoints are as large as the weights."""
        self.first.clean()
