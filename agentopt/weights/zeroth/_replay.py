"""From a base and a log to the tuned weights: the same updates in the same order, without any forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from agentopt.errors import UserError
from agentopt.weights.zeroth._exchange import verify
from agentopt.weights.zeroth._log import Log
from agentopt.weights.zeroth._log_header import header_of, pack_header
from agentopt.weights.zeroth._types import Exchange


class Replayable(Protocol):
    """What can apply a step again (`ZerothOrder`)."""

    @property
    def step_number(self) -> int:
        """Number of the next step."""
        ...

    def update(self, step: int, seed: int, scalars: Any, lr: float) -> Any:
        """Apply one step to the weights."""
        ...


def replay(optimizer: Replayable, log: Log, upto: int | None = None) -> int:
    """Apply the log's steps, from the optimizer's own step number on; returns how many were applied.

    Args:
        optimizer: made with the base's weights and the settings of the run.
        log: opened with the header that the optimizer expects.
        upto: number of steps after which to stop; None for all of them.

    Raises:
        UserError: the log is shorter than asked for, or damaged.
    """
    end = len(log) if upto is None else upto
    first = optimizer.step_number
    if end > len(log) or first > end:
        raise UserError(
            f"{log.path}: holds {len(log)} steps, expected at least {max(end, first)} (the weights have {first} steps "
            "already); give the log that belongs to them."
        )
    for record in log.records(first):
        if record.step >= end:
            break
        optimizer.update(record.step, record.seed, record.scalars, record.lr)
    return end - first


def resume(optimizer: Replayable, log: Log, exchange: Exchange | None = None) -> int:
    """Replay all of the log, cut to the shortest of the workers' logs when there are several; returns the steps.

    A worker that died may have written one step less than the others; that step is measured again by all.
    """
    if exchange is not None:
        log.cut(int(min(values[0] for values in exchange.gather([float(len(log))]))))
    return replay(optimizer, log)


def log_to(optimizer: Any, path: str | Path, *, base: str | None = None, k: int | None = None, data: str = "") -> int:
    """Log a `ZerothOrder` to `path` from now on; a run that the file holds already is replayed first.

    Workers of one run each have a file of their own; they must begin with the same weights and settings, which is
    checked, and with logs of which none is more than a step ahead.

    Args:
        optimizer: fresh, with the base's weights.
        path: the file, by custom `steps.zo`.
        base: fingerprint of the base, where it is known; see `header_of`.
        k: coefficients per step, where every example has a direction of its own.
        data: fingerprint of the training data; see `header_of`.

    Returns:
        The steps that were replayed: `optimizer.step_number`.

    Raises:
        UserError: the file is the log of another run, is damaged, or another process writes it.
        RunError: the disk is full, or the workers do not agree.
    """
    header = header_of(optimizer, base=base, k=k, data=data)
    log = Log.resume(path, header)
    try:
        if optimizer.exchange is not None:
            verify(optimizer.exchange, pack_header(header).hex())
        steps = resume(optimizer, log, optimizer.exchange)
    except BaseException:
        log.close()
        raise
    optimizer.log = log
    return steps
