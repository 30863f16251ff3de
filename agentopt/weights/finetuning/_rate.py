"""`--lr auto`: the range test of the zeroth-order room on this model and these rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentopt.weights.finetuning._material import Material
from agentopt.weights.finetuning._options import FinetuneOptions
from agentopt.weights.finetuning._subject import Subject
from agentopt.weights.finetuning._zeroth import settings
from agentopt.weights.load import need
from agentopt.weights.zeroth._lr_range import LrRange, LrTrial, Snapshot, grid, lr_range
from agentopt.weights.zeroth._optimizer import ZerothOrder

STEPS = 20
"""Steps of one trial."""


def find_rate(
    subject: Subject, material: Material, options: FinetuneOptions, working: Callable[[str, int, int | None], None]
) -> LrRange:
    """Try rates around the method's own; the weights are afterwards what they were, bit for bit."""
    given: dict[str, Any] = settings(options, subject.trained_count())
    rates = grid(float(given["lr"]))
    snapshot = Snapshot(subject.trained().values())
    done: list[LrTrial] = []

    def restore() -> None:
        with need("torch").no_grad():
            snapshot.restore()

    def on_trial(trial: LrTrial) -> None:
        done.append(trial)
        working("trying learning rates", len(done), len(rates))

    def make(rate: float) -> ZerothOrder:
        at_rate: dict[str, Any] = {**given, "lr": rate}
        return ZerothOrder(subject.model, **at_rate)

    return lr_range(
        make,
        lambda step: material.objective(step, 0, 1),
        lambda: material.held_out(subject.model),
        restore,
        rates=rates,
        steps=min(STEPS, options.steps),
        on_trial=on_trial,
    )
