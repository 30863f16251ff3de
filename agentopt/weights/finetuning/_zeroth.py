"""Training without gradients: `ZerothOrder` with a log, from which a resumed run goes on bit for bit.

Nothing but the log is kept of a run: the weights after any step are the base's plus the log's first records, so a
checkpoint is a number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentopt.errors import UserError
from agentopt.evaluation import resolve_metric
from agentopt.weights.finetuning._options import FinetuneOptions
from agentopt.weights.finetuning._subject import Subject
from agentopt.weights.zeroth._log import Log, Record
from agentopt.weights.zeroth._log_header import header_of
from agentopt.weights.zeroth._optimizer import ZerothOrder
from agentopt.weights.zeroth._presets import PRESETS, Preset, preset
from agentopt.weights.zeroth._replay import replay
from agentopt.weights.zeroth._schedule import Schedule
from agentopt.weights.zeroth._types import Exchange, StepResult


def chosen(options: FinetuneOptions) -> Preset:
    """The preset that the options name.

    Raises:
        UserError: there is none, or an option does nothing for it.
    """
    from agentopt.weights.finetuning._options import FIRST_ORDER

    if options.method not in PRESETS:
        known = ", ".join((*PRESETS, *FIRST_ORDER))
        raise UserError(f"method: found {options.method!r}, expected one of {known}; see --list-methods.")
    found = preset(options.method)
    if options.density is not None and found.mask == "none":
        raise UserError(f"--density does nothing with --method {found.name}, which masks nothing; leave it out.")
    if options.mask_update is not None and found.mask not in ("small", "large"):
        raise UserError(f"--mask-update is for masks by magnitude, found --method {found.name}; leave it out.")
    if found.estimator == "jvp" and options.objective != "loss":
        raise UserError(f"--method {found.name} differentiates, and --objective {options.objective} has no derivative.")
    if options.objective not in ("loss", "accuracy"):
        check_metric(options.objective)
    if found.estimator == "jvp" and options.eps is not None:
        raise UserError(f"--eps does nothing with --method {found.name}, whose derivatives are exact; leave it out.")
    if found.method == "hizoo" and (options.population or 1) > 1:
        raise UserError("--population does not go with --method hizoo, which measures one direction; leave it out.")
    if found.method == "conservative" and options.weight_decay:
        raise UserError(f"--weight-decay does not go with --method {found.name}: it measures the step it takes.")
    return found


def cautions(options: FinetuneOptions) -> list[str]:
    """What to tell before a run that is allowed and rarely wanted."""
    if options.first_order or options.weights == "full" or chosen(options).mask == "none":
        return []
    return [
        f"--method {options.method} masks weights, which costs progress where so few are trained; with --tune "
        f"{options.weights} take --method mezo or fzoo."
    ]


def check_metric(name: str) -> None:
    """Refuse an objective that no rows could be judged by.

    Raises:
        UserError: there is no such metric.
    """
    try:
        resolve_metric(name)
    except UserError as error:
        raise UserError(f"--objective {name}: expected loss, accuracy or a metric; {error}") from error


def settings(options: FinetuneOptions, weights: int | None = None) -> dict[str, Any]:
    """The arguments of `ZerothOrder`: the preset's for so many trained weights, with what the options override."""
    found = chosen(options).settings(options.weights, weights)
    if options.eps is not None:
        found["eps"] = options.eps
    if options.density is not None:
        found["density"] = options.density
    if options.mask_update is not None:
        found["mask_update"] = options.mask_update
    if options.population is not None:
        found["probe"] = replace(found["probe"], population=options.population)
    if isinstance(options.lr, float):
        found["lr"] = options.lr
    return {**found, "seed": options.seed, "weight_decay": options.weight_decay}


def schedule_of(options: FinetuneOptions) -> Schedule:
    """The learning rate over the run."""
    return Schedule(options.schedule, options.warmup, None if options.schedule == "constant" else options.steps)


def forwards_per_step(options: FinetuneOptions) -> int:
    """Forward passes over a batch."""
    found = chosen(options)
    if options.population is None:
        return found.forwards
    return replace(found, probe=replace(found.probe, population=options.population)).forwards


class Zeroth:
    """`ZerothOrder` on a subject, writing to a log or following one."""

    def __init__(
        self,
        subject: Subject,
        options: FinetuneOptions,
        path: Path,
        *,
        lr: float,
        data: str,
        exchange: Exchange | None = None,
    ) -> None:
        self.path = path
        self.log: Log | None = None
        given: dict[str, Any] = {**settings(options), "lr": lr}
        self.optimizer = ZerothOrder(subject.model, **given, schedule=schedule_of(options), exchange=exchange)
        k = self.optimizer.scalars_per_step or options.batch
        self.header = header_of(self.optimizer, base=subject.base_hash, k=k, data=data)

    def open(self) -> int:
        """Take the log for writing; the steps it holds."""
        self.log = Log.resume(self.path, self.header)
        self.optimizer.log = self.log
        return len(self.log)

    def close(self) -> None:
        """Give the log free."""
        if self.log is not None:
            self.log.close()
            self.log = None

    def step(self, loss_fn: Callable[[Any], Any]) -> StepResult:
        """Measure, log, move."""
        return self.optimizer.step(loss_fn)

    def records(self) -> Iterator[Record]:
        """The steps that the log holds."""
        if self.log is not None:
            yield from self.log.records()

    def reading(self, steps: int) -> Iterator[Record]:
        """The first steps of a log that another process writes."""
        if steps:
            with closing(Log.read(self.path, self.header)) as log:
                yield from itertools.islice(log.records(), steps)

    def apply(self, record: Record) -> None:
        """One step of the log again."""
        self.optimizer.update(record.step, record.seed, record.scalars, record.lr)

    def replay(self, upto: int) -> None:
        """From the base to the weights after `upto` steps, for a subject that was just prepared."""
        with closing(Log.read(self.path, self.header)) as log:
            replay(self.optimizer, log, upto)
