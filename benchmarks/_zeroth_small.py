"""Part (a) of the study: every method on the small GPT, at an equal number of forward passes.

A run costs 1,200 forward passes over a batch of 16: 600 steps of a two-sided method. A forward-mode derivative counts
as two passes, a backward pass as two more than its forward pass.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from _zeroth_ensemble import Ensemble, Member, check
from _zeroth_peers import InPlace, LoraAdam
from _zeroth_runs import RATES, Cell
from _zeroth_toy import CrossEntropy, Errors, Task, TinyGPT, accuracy, make_task, pretrained

from agentopt.weights import zeroth
from agentopt.weights.zeroth import ZerothOrder

FORWARDS = 1200
CHECKS = 4


@dataclass(frozen=True)
class Method:
    """How to make the optimizer of a run."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    preset: str = ""
    forwards: int = 2
    objective: Any = CrossEntropy
    rates: tuple[float, ...] = RATES
    kind: str = "zo"
    group: str = "main"
    aligned: bool = True
    stored: bool = False

    def make(self, model: Any, lr: float, seed: int) -> Any:
        """An optimizer with `.step(loss_fn)`."""
        if self.kind == "in-place":
            return InPlace(model, lr, seed=seed)
        if self.kind == "lora-adam":
            return LoraAdam(model, lr, seed=seed)
        if self.preset:
            return ZerothOrder.preset(self.preset, model, lr=lr, seed=seed, copies=self.forwards, **self.settings)
        return ZerothOrder(model, lr=lr, seed=seed, **self.settings)


def _last_block(name: str) -> bool:
    return name.startswith("blocks.1.")


def _full(**settings: Any) -> dict[str, Any]:
    return {"eps": 1e-3, **settings}


MAIN = (
    Method("full", _full()),
    Method("small 50 %", _full(mask="small", density=0.5)),
    Method("small 25 %", _full(mask="small", density=0.25)),
    Method("random 50 %", _full(mask="random", density=0.5)),
    Method("random 25 %", _full(mask="random", density=0.25)),
    Method("large 25 %", _full(mask="large", density=0.25)),
    Method("last block", _full(trainable=_last_block)),
)
KEPT = (
    Method("small 50 %, mask follows the weights", _full(mask="small", mask_update="dynamic"), group="kept"),
    Method("small 50 %, stored mask", _full(mask="small"), stored=True, group="kept"),
    Method("small 25 %, stored mask", _full(mask="small", density=0.25), stored=True, group="kept"),
    Method("small 75 %, stored mask", _full(mask="small", density=0.75), stored=True, group="kept"),
    Method("large 25 %, stored mask", _full(mask="large", density=0.25), stored=True, group="kept"),
)
"""Added after the first runs: do masks lose because of which weights they choose, or of how they are kept?"""
UNALIGNED = tuple(
    replace(method, aligned=False, group="unaligned") for method in MAIN if method.name in ("full", "small 50 %")
)
ERRORS = (
    Method("full, error rate", _full(eps=1e-2), objective=Errors, group="errors", rates=RATES[:3]),
    Method("small 50 %, error rate", _full(eps=1e-2, mask="small"), objective=Errors, group="errors", rates=RATES[1:4]),
)
BOUNDS = (
    Method("forward gradient", {}, "forward-gradient", group="bound", rates=RATES[:3]),
    Method("AdamW, LoRA", kind="lora-adam", forwards=3, group="bound", rates=RATES[2:]),
    Method("AdamW, LoRA, other labels", kind="lora-adam", forwards=3, group="bound", rates=RATES[2:], aligned=False),
)
OTHERS = (
    Method("MeZO in place, normal noise", kind="in-place", group="other", rates=RATES[:3]),
    Method("fzoo", {"eps": 1e-3}, "fzoo", 9, group="other", rates=RATES[2:]),
    Method("grzo", {"eps": 1e-3}, "grzo", group="other", rates=RATES[2:]),
    Method("zo-adam", {"eps": 1e-3}, "zo-adam", group="other", rates=RATES[1:4]),
    Method("lozo", {"eps": 1e-3}, "lozo", group="other", rates=RATES[:3]),
    Method("zo-momentum", {"eps": 1e-3}, "zo-momentum", group="other", rates=RATES[1:4]),
    Method("hizoo", {"eps": 1e-3}, "hizoo", 3, group="other", rates=RATES[1:4]),
    Method("zo-conservative", {"eps": 1e-3}, "zo-conservative", 5, group="other", rates=RATES[1:4]),
)
METHODS = {f"{one.group}: {one.name}": one for one in (*MAIN, *KEPT, *UNALIGNED, *ERRORS, *BOUNDS, *OTHERS)}
TOGETHER = ("main", "kept", "unaligned", "errors")
"""Groups whose runs of one seed go side by side (`_zeroth_ensemble.py`)."""


def units(seeds: int) -> list[list[Cell]]:
    """Every run, the most important first; runs that go side by side are one unit."""
    found: list[list[Cell]] = []
    for group in ("main", "errors", "kept", "bound", "unaligned", "other"):
        names = [name for name, method in METHODS.items() if method.group == group]
        for seed in range(seeds):
            runs = [Cell("a", name, lr, seed) for name in names for lr in METHODS[name].rates]
            found += [runs] if group in TOGETHER else [[cell] for cell in runs]
    return found


@functools.cache
def _start(seed: int, folder: Path, steps: int) -> tuple[TinyGPT, float]:
    return pretrained(seed, folder, steps)


def run(unit: Sequence[Cell], folder: Path, forwards: int = FORWARDS, pretraining: int = 1500) -> list[dict[str, Any]]:
    """The runs of one unit, with dev accuracy on the way and test accuracy at the end."""
    method, seed = METHODS[unit[0].method], unit[0].seed
    start, known = _start(seed, folder, pretraining)
    task = make_task(seed, method.aligned)
    zero_shot = accuracy(start, task.test, task.candidates)
    if method.group in TOGETHER:
        ends = _side_by_side(start, unit, task, forwards)
    else:
        ends = [_alone(start, method, task, unit[0], forwards)]
    used = forwards // method.forwards * method.forwards
    return [
        {
            "zero_shot": zero_shot,
            "dev": curve[-1],
            "test": accuracy(model, task.test, task.candidates),
            "curve": curve,
            "forwards": used,
            "failed_at": failed,
            "labels_known": known,
        }
        for model, curve, failed in ends
    ]


def compare(folder: Path, pretraining: int) -> None:
    """Hold the runs that go side by side against ZerothOrder itself; the quick form does this.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    start, task = _start(0, folder, pretraining)[0], make_task(0, True)

    def loss(step: int) -> CrossEntropy:
        return CrossEntropy(task.batch(step), task.candidates)

    for method in (*MAIN, *KEPT):
        if method.stored:
            continue
        difference = check(start, Member(tuple(method.settings.items()), 1e-3), 5, loss, 4)
        assert difference < 1e-5, f"{method.name}: weights differ by {difference:g} from those of ZerothOrder"


def _side_by_side(
    start: TinyGPT, unit: Sequence[Cell], task: Task, forwards: int
) -> list[tuple[Any, list[float], int | None]]:
    members = [
        Member(tuple(METHODS[cell.method].settings.items()), cell.lr, METHODS[cell.method].stored) for cell in unit
    ]
    ensemble = Ensemble(start, members, unit[0].seed)
    steps = forwards // 2
    curves: list[list[float]] = [[] for _ in members]
    for step in range(steps):
        ensemble.step(METHODS[unit[0].method].objective(task.batch(step), task.candidates))
        if _is_check(step, steps):
            for number, curve in enumerate(curves):
                curve.append(accuracy(ensemble.member(number), task.dev, task.candidates))
            print(f"{unit[0].method.partition(':')[0]}, seed {unit[0].seed}: step {step + 1}", flush=True)
    return [(ensemble.member(n), curve, ensemble.failed[n]) for n, curve in enumerate(curves)]


def _alone(
    start: TinyGPT, method: Method, task: Task, cell: Cell, forwards: int
) -> tuple[Any, list[float], int | None]:
    model = copy.deepcopy(start)
    steps = forwards // method.forwards
    optimizer = method.make(model, cell.lr, cell.seed)
    curve: list[float] = []
    for step in range(steps):
        try:
            optimizer.step(method.objective(task.batch(step), task.candidates))
        except (zeroth.NonFiniteLoss, FloatingPointError):
            return model, [*curve, accuracy(model, task.dev, task.candidates)], step
        if _is_check(step, steps):
            curve.append(accuracy(model, task.dev, task.candidates))
    return model, curve, None


def _is_check(step: int, steps: int) -> bool:
    """Whether a quarter of the run has just ended."""
    return (step + 1) * CHECKS // steps > step * CHECKS // steps
