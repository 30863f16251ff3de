"""The learning rate range test, on a quadratic and with trainers that break."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agentopt.errors import RunError, UserError
from agentopt.weights.zeroth import _estimators as estimators
from agentopt.weights.zeroth._lr_range import LrTrial, Snapshot, grid, lr_range
from agentopt.weights.zeroth._optimizer import ZerothOrder
from agentopt.weights.zeroth._types import Probe, StepResult

SIZE = 20
ROWS = np.random.default_rng(0).normal(size=(64, SIZE))
TRUE = np.random.default_rng(1).normal(size=SIZE)
LABELS = ROWS @ TRUE + np.random.default_rng(2).normal(scale=0.1, size=64)


class Toy:
    """Least squares with a zeroth-order step; the smallest thing with the shape of a run."""

    def __init__(self, dtype: Any = torch.float32) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(SIZE, dtype=dtype))
        self.made: list[float] = []

    def losses(self, rows: slice, shift: Any = 0.0) -> Any:
        weights = self.weight.detach().double().numpy() + shift
        return (ROWS[rows] @ weights - LABELS[rows]) ** 2

    def make(self, lr: float) -> Any:
        self.made.append(lr)
        return Trainer(self, lr)

    def held_out(self) -> Any:
        return self.losses(slice(32, 64))

    def run(self, rates: Any, **options: Any) -> Any:
        start = Snapshot([self.weight])
        return lr_range(
            self.make,
            lambda step: slice(step % 4 * 8, step % 4 * 8 + 8),
            self.held_out,
            start.restore,
            rates=rates,
            **options,
        )


class Trainer:
    def __init__(self, toy: Toy, lr: float) -> None:
        self.toy, self.lr, self.step_number = toy, lr, 0

    def step(self, loss_fn: Any, /) -> StepResult:
        z = np.random.default_rng(self.step_number).choice([-1.0, 1.0], SIZE)
        losses = np.stack([self.toy.losses(loss_fn, 1e-3 * z), self.toy.losses(loss_fn, -1e-3 * z)])
        scalars = estimators.coefficients(Probe(), 1e-3, losses)
        moved = self.toy.weight.detach().double() - self.lr * float(scalars[0]) * torch.from_numpy(z)
        self.toy.weight.detach().copy_(moved)
        self.step_number += 1
        means = estimators.means(losses)
        return StepResult(self.step_number - 1, means[0], tuple(means), tuple(scalars), self.lr, 2, True)


def test_it_picks_a_rate_that_trains_and_says_what_it_saw() -> None:
    toy = Toy()
    found = toy.run(grid(1e-3, decades=3, per_decade=1), steps=40)
    assert found.clear
    assert 1e-3 <= found.recommended <= 1e-2
    chosen = next(trial for trial in found.trials if trial.lr == found.recommended)
    assert chosen.stable
    assert chosen.gain > 2 * chosen.error
    assert chosen.gain == max(trial.gain for trial in found.trials)
    assert "no other gained more" in found.reason
    assert found.forwards == 2 * sum(trial.steps for trial in found.trials)
    verdicts = [row["verdict"] for row in found.table()]
    assert verdicts.count("chosen") == 1
    assert "the loss" in verdicts[-1]
    assert found.tried == tuple(lr for lr, _ in found.curve) == tuple(toy.made)


def test_a_rate_next_to_breaking_has_to_be_clearly_better() -> None:
    found = Toy().run(grid(1e-3, decades=2, per_decade=2), steps=40)
    assert found.recommended == 3.16e-3
    assert "0.01 gained more" in found.reason


def test_large_rates_are_left_out_after_two_that_broke() -> None:
    toy = Toy()
    found = toy.run([1e-3, 1.0, 10.0, 100.0, 1000.0])
    assert toy.made == [1e-3, 1.0, 10.0]
    assert [trial.stable for trial in found.trials] == [True, False, False]
    assert found.trials[1].steps < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_are_put_back_bit_for_bit(dtype: Any) -> None:
    toy = Toy(dtype)
    toy.weight.detach().copy_(torch.linspace(-0.3, 0.3, SIZE))
    before = toy.weight.detach().clone()
    starts: list[Any] = []
    make = toy.make

    def watch(lr: float) -> Any:
        starts.append(toy.weight.detach().clone())
        return make(lr)

    toy.make = watch  # type: ignore[method-assign]
    toy.run([1e-4, 1e-3, 1e-2])
    assert len(starts) == 3
    assert all(torch.equal(start, before) for start in starts)
    assert torch.equal(toy.weight.detach(), before)


def test_the_weights_are_put_back_when_a_trial_is_interrupted() -> None:
    toy = Toy()

    def interrupt(trial: LrTrial) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.run([1e-3, 1e-2], on_trial=interrupt)
    assert not toy.weight.detach().any()


def test_the_same_test_gives_the_same_answer() -> None:
    assert Toy().run(grid(1e-3)) == Toy().run(grid(1e-3))


def test_no_gain_beyond_noise_is_said() -> None:
    toy = Toy()
    found = toy.run([1e-12, 1e-11, 3e1], steps=4)
    assert not found.clear
    assert found.recommended == 1e-12
    assert "beyond its noise" in found.reason
    assert "a notch below the first to break" in found.reason


def test_the_largest_rate_tried_is_pointed_out() -> None:
    assert "a larger one may be better" in Toy().run([1e-4, 3e-4]).reason


def test_when_every_rate_breaks_the_run_fails_with_advice() -> None:
    toy = Toy()
    with pytest.raises(RunError, match=r"every learning rate from 1 to 10 broke.*below 1"):
        toy.run([1.0, 10.0])
    assert not toy.weight.detach().any()


def test_a_step_that_fails_counts_as_broken() -> None:
    class Failing(Trainer):
        def step(self, loss_fn: Any, /) -> StepResult:
            if self.lr > 1e-3:
                raise RunError("the loss is nan")
            return super().step(loss_fn)

    toy = Toy()
    toy.make = lambda lr: Failing(toy, lr)  # type: ignore[method-assign]
    found = toy.run([1e-3, 1e-2])
    assert found.recommended == 1e-3
    assert "the loss is nan" in found.trials[1].note
    assert found.table()[1]["gain"] == "-"


def test_wrong_input_is_refused() -> None:
    toy = Toy()
    with pytest.raises(UserError, match="must be > 0"):
        toy.run([])
    with pytest.raises(UserError, match="must be > 0"):
        toy.run([-1.0])
    with pytest.raises(UserError, match="fewer than 2"):
        lr_range(toy.make, lambda step: slice(8), lambda: [1.0], lambda: None, rates=[1e-3])
    with pytest.raises(RunError, match="before any step"):
        lr_range(toy.make, lambda step: slice(8), lambda: [1.0, float("nan")], lambda: None, rates=[1e-3])


def test_a_grid_is_geometric_and_centred() -> None:
    assert grid(1e-6, decades=1, per_decade=2) == (1e-7, 3.16e-7, 1e-6, 3.16e-6, 1e-5)
    with pytest.raises(UserError, match="above 0"):
        grid(0.0)


def test_a_snapshot_says_its_size() -> None:
    assert Snapshot([torch.zeros(10), torch.zeros(6, dtype=torch.bfloat16)]).bytes == 52


def test_it_works_on_the_optimizer_itself() -> None:
    model = torch.nn.Linear(SIZE, 1, bias=False)
    model.weight.detach().zero_()
    rows, wanted = torch.from_numpy(ROWS).float(), torch.from_numpy(LABELS).float()

    def losses(net: Any, chosen: slice) -> Any:
        return (net(rows[chosen])[:, 0] - wanted[chosen]) ** 2

    found = lr_range(
        lambda lr: ZerothOrder.preset("mezo", model, lr=lr),
        lambda step: lambda net: losses(net, slice(step % 4 * 8, step % 4 * 8 + 8)),
        lambda: losses(model, slice(32, 64)).tolist(),
        Snapshot(model.parameters()).restore,
        rates=[1e-3, 1e-2, 1.0],
    )
    assert found.recommended in (1e-3, 1e-2)
    assert not found.trials[-1].stable
    assert not model.weight.detach().any()
