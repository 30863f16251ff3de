"""Fine-tuning from rows to a checked model: baselines, training without gradients (or with), one honest claim.

    from agentopt.weights.finetuning import finetune, make_options
    options = make_options({"model": "embedded", "data": "sst2.jsonl", "method": "sparse-mezo", "steps": 500})
    result = finetune(options, out="tuned")
    print(result.claim.text)

The same call again goes on where an interrupted run stopped, bit for bit. Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentopt.weights.finetuning._claim import FinetuneClaim
from agentopt.weights.finetuning._events import Event, event_kinds
from agentopt.weights.finetuning._folder import RunFolder, options_of
from agentopt.weights.finetuning._options import FIRST_ORDER, FinetuneOptions, make_options
from agentopt.weights.finetuning._result import FinetuneResult
from agentopt.weights.finetuning._run import Run, Stop, finished
from agentopt.weights.finetuning._saving import load_finetuned
from agentopt.weights.finetuning._zeroth import chosen

__all__ = [
    "Event",
    "FinetuneClaim",
    "FinetuneOptions",
    "FinetuneResult",
    "Method",
    "Stop",
    "event_kinds",
    "finetune",
    "load_finetuned",
    "make_options",
    "methods",
    "options_of",
]


def finetune(
    options: FinetuneOptions,
    *,
    out: str | Path,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
    stop: Stop | None = None,
) -> FinetuneResult:
    """Tune a model on rows and write it with its log, report and result.

    Args:
        options: what to do; see `make_options`.
        out: the folder; one that holds the same run is gone on with, and one that holds its end gives its result.
        resume: expect such a run.
        on_event: told of everything as it happens.
        stop: set its `wanted` to end after the step that is being made, with everything kept.

    Raises:
        UserError: options, rows, model or folder do not fit; the sentence says what was found and expected.
        RunError: the loss is no number or never moves, memory or disk ran out, or what was written does not load back.
        KeyboardInterrupt: `stop.wanted` was set.
    """
    if not options.first_order:
        chosen(options)
    with RunFolder(out) as folder:
        resumed = folder.open(options, resume=resume)
        done = finished(folder.path)
        if done is not None:
            return done
        tell = on_event or _silent
        if options.workers > 1:
            from agentopt.weights.finetuning._workers import run_workers

            folder.close()
            return run_workers(options, folder.path, tell)
        return Run(options, folder, tell, stop or Stop(), None).go(resumed=resumed)


def _silent(event: Event) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Method:
    """A way to train."""

    name: str
    description: str
    source: str
    forwards: int | None
    """Forward passes over a batch per step; None with gradients."""
    caution: str
    """What its user should know."""
    lr: dict[str, float]
    """Recommended rate by what is trained."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def methods() -> list[Method]:
    """All methods, those with gradients last."""
    from agentopt.weights.finetuning._options import FIRST_ORDER_RATES
    from agentopt.weights.zeroth._presets import PRESETS

    found = [
        Method(one.name, one.summary, one.source, one.forwards, one.caution, dict(one.lr)) for one in PRESETS.values()
    ]
    source = {"lora": "arXiv 2106.09685", "adamw": "arXiv 1711.05101"}
    found += [Method(name, text, source[name], None, "", FIRST_ORDER_RATES) for name, text in FIRST_ORDER.items()]
    return found
