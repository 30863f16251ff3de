"""`workers`: processes that hold the same weights, share the rows of every step, and tell each other only losses.

Worker 0 does all that a run alone does (baselines, validation, files); the others make the same steps on their rows
and write nothing. What worker 0 has to say comes to the starting process as one JSON line per event.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agentopt.weights.finetuning import _events as events
from agentopt.weights.finetuning._folder import RunFolder
from agentopt.weights.finetuning._material import Material
from agentopt.weights.finetuning._options import FinetuneOptions, make_options, portable
from agentopt.weights.finetuning._result import FinetuneResult
from agentopt.weights.finetuning._run import Run, Stop, context_of, threads
from agentopt.weights.finetuning._subject import prepare
from agentopt.weights.finetuning._trainers import WithoutGradients
from agentopt.weights.zeroth._exchange import SocketExchange
from agentopt.weights.zeroth._executor import run_local

TARGET = "agentopt.weights.finetuning._workers:work"
MARK = "agentopt-event "
PATIENCE = 6 * 3600.0
"""Seconds that the others wait while worker 0 measures baselines or validates; a worker that dies is seen at once."""


def run_workers(options: FinetuneOptions, folder: Path, tell: Callable[[events.Event], None]) -> FinetuneResult:
    """The run in `options.workers` processes of this machine.

    Raises:
        UserError, RunError: as for a run alone; the message names the worker.
    """
    kinds = events.event_kinds()

    def heard(rank: int, line: str) -> None:
        if rank == 0 and line.startswith(MARK):
            data: dict[str, Any] = json.loads(line.removeprefix(MARK))
            tell(kinds[data.pop("kind")](**data))

    spec = {
        "options": portable(options),
        "out": str(folder.resolve()),
        "threads": max(1, (os.cpu_count() or 1) // options.workers),
    }
    done = run_local(TARGET, spec, options.workers, timeout=PATIENCE, on_output=heard)
    return FinetuneResult.from_dict(done[0].value)


def work(spec: Mapping[str, Any], exchange: SocketExchange) -> dict[str, Any]:
    """What one worker does."""
    options = make_options(dict(spec["options"]))
    threads(spec["threads"])
    if exchange.rank:
        _follow(options, Path(spec["out"]), exchange)
        return {}
    with RunFolder(spec["out"]) as folder:
        resumed = folder.open(options, resume=False)
        return Run(options, folder, _print_event, Stop(), exchange).go(resumed=resumed).to_dict()


def _print_event(event: events.Event) -> None:
    print(MARK + json.dumps(event.to_dict(), ensure_ascii=False), flush=True)  # noqa: T201


def _follow(options: FinetuneOptions, folder: Path, exchange: SocketExchange) -> None:
    """The same steps as worker 0's, on other rows."""
    material = Material.load(options)
    subject = prepare(options)
    material.encode(subject.tokenizer, context_of(subject))
    rate = exchange.gather([0.0])[0][0]
    trainer = WithoutGradients(subject, options, folder, lr=rate, data=material.identity, exchange=exchange)
    trainer.follow()
    for step in range(1, options.steps + 1):
        if not trainer.again(step) and not trainer.step(step, material).finite:
            return  # worker 0 sees the same and tells it
        if (step % options.eval_every == 0 or step == options.steps) and not trainer.agree(True):
            return
