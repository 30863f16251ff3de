"""Update rules: each one lowers a quadratic, and a replay gives the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from agentopt.errors import UserError
from agentopt.weights.zeroth import _estimators as estimators
from agentopt.weights.zeroth._rules import METHODS, Rule, estimator, rule
from agentopt.weights.zeroth._types import Probe

SIZE = 37
CURVATURE = torch.logspace(-1, 1, SIZE)
RATES = {"sgd": 3e-3, "sign": 2e-2, "momentum": 3e-3, "adam": 2e-2, "hizoo": 3e-3}


def loss_of(weight: Any) -> float:
    return float((0.5 * CURVATURE.double() * weight.double() ** 2).sum())


def noise(seed: int, kind: str = "normal") -> Any:
    draw = np.random.default_rng(seed)
    values = draw.normal(size=SIZE) if kind == "normal" else draw.choice([-1.0, 1.0], SIZE)
    return torch.from_numpy(values.astype(np.float32))


def fresh(chosen: Rule, size: int = SIZE) -> dict[str, Any]:
    return {slot: torch.full((size,), chosen.initial[slot]) for slot in chosen.slots}


def train(name: str, lr: float, steps: int, hyper: Mapping[str, float] | None = None) -> list[float]:
    chosen, eps = rule(name, hyper), 1e-3
    weight, state = torch.ones(SIZE), fresh(chosen)
    curve = [loss_of(weight)]
    for step in range(steps):
        u = noise(step)
        factor = chosen.scale(state)
        z = u if factor is None else u * factor
        sides = [[loss_of(weight)], [loss_of(weight + eps * z)], [loss_of(weight - eps * z)]]
        if chosen.wants == "direction":
            given, scalars = u, estimators.hessian_coefficients(eps, sides)
        else:
            scalars = estimators.coefficients(Probe(kind="normal"), eps, sides[1:])
            given = z * float(scalars[0])
        weight = chosen.apply(weight, given, state, lr, 0.0, step, [float(value) for value in scalars])
        curve.append(loss_of(weight))
    return curve


@pytest.mark.parametrize("name", list(RATES))
def test_every_rule_lowers_a_quadratic(name: str) -> None:
    curve = train(name, RATES[name], 300)
    assert curve[-1] < 0.3 * curve[0]


def test_hizoo_learns_which_weights_are_steep() -> None:
    """In few dimensions and with a large alpha the learned curvature orders the weights as the true one."""
    chosen, eps, size = rule("hizoo", {"alpha": 0.003}), 1e-2, 4
    curvature = torch.tensor([0.1, 0.1, 10.0, 10.0], dtype=torch.float64)
    state = fresh(chosen, size)
    for step in range(2000):
        u = torch.from_numpy(np.random.default_rng(step).normal(size=size).astype(np.float32))
        factor = chosen.scale(state)
        assert factor is not None
        z = (u * factor).double()
        bend = float((0.5 * curvature * z * z).sum())
        losses = [[0.0], [eps * eps * bend], [eps * eps * bend]]
        scalars = [float(value) for value in estimators.hessian_coefficients(eps, losses)]
        chosen.apply(torch.zeros(size), u, state, 0.0, 0.0, step, scalars)
    assert float(state["h"][2:].min()) > 3 * float(state["h"][:2].max())


@pytest.mark.parametrize("name", list(RATES))
def test_a_replay_gives_the_same_bits_however_the_weights_are_cut(name: str) -> None:
    """Whole tensor, tiles of odd sizes, and a second run: one set of bits."""
    chosen = rule(name)

    def run(cuts: list[int]) -> bytes:
        weight, state = noise(100).clone(), fresh(chosen)
        for step in range(5):
            given = noise(step) * 0.37
            bounds = [0, *cuts, SIZE]
            for start, stop in itertools.pairwise(bounds):
                tile = {slot: buffer[start:stop] for slot, buffer in state.items()}
                weight[start:stop] = chosen.apply(
                    weight[start:stop], given[start:stop], tile, 3e-3, 0.1, step, [0.7, 1.3]
                )
        return torch.cat([weight, *state.values()]).numpy().tobytes()

    whole = run([])
    assert run([]) == whole
    assert run([1, 9, 30]) == whole
    assert run(list(range(1, SIZE))) == whole


def test_rules_agree_with_their_formulas() -> None:
    """Against float64, over several steps."""
    lr, decay = 0.05, 0.2
    estimates = [noise(step) for step in range(6)]
    w64 = {name: np.full(SIZE, 0.5) for name in ("sgd", "sign", "momentum", "adam")}
    m, am, v = np.zeros(SIZE), np.zeros(SIZE), np.zeros(SIZE)
    for step, given in enumerate(estimates):
        g = given.double().numpy()
        m = 0.9 * m + 0.1 * g
        am, v = 0.9 * am + 0.1 * g, 0.999 * v + 0.001 * g * g
        root = np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8
        moves = {"sgd": g, "sign": np.sign(g), "momentum": m, "adam": am / (1 - 0.9 ** (step + 1)) / root}
        for name, move in moves.items():
            w64[name] = w64[name] * (1 - lr * decay) - lr * move
    for name, expected in w64.items():
        chosen = rule(name)
        weight, state = torch.full((SIZE,), 0.5), fresh(chosen)
        for step, given in enumerate(estimates):
            weight = chosen.apply(weight, given, state, lr, decay, step)
        np.testing.assert_allclose(weight.numpy(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["sgd", "sign", "momentum", "adam"])
def test_weights_that_a_mask_leaves_out_stay(name: str) -> None:
    chosen = rule(name)
    weight, state = noise(1), fresh(chosen)
    given = noise(2)
    given[:10] = 0.0
    moved = chosen.apply(weight, given, state, 0.1, 0.0, 0)
    assert (moved[:10] == weight[:10]).all()
    assert (moved[10:] != weight[10:]).all()


@pytest.mark.parametrize("name", list(RATES))
def test_a_rate_of_zero_changes_no_bit_and_inputs_stay_as_they_are(name: str) -> None:
    chosen = rule(name)
    weight, given, state = noise(1), noise(2), fresh(chosen)
    before, asked = weight.clone(), given.clone()
    moved = chosen.apply(weight, given, state, 0.0, 0.1, 0, [1.0, 1.0])
    assert torch.equal(moved, before)
    chosen.apply(weight, given, state, 0.5, 0.1, 1, [1.0, 1.0])
    assert torch.equal(weight, before)
    assert torch.equal(given, asked)


def test_what_a_rule_stores() -> None:
    stored = {name: rule(name).bytes_per_weight for name in METHODS}
    assert stored == {"sgd": 0, "sign": 0, "momentum": 4, "adam": 8, "hizoo": 4, "jvp": 0, "conservative": 0}


def test_the_estimator_of_a_method() -> None:
    assert estimator("adam") == "difference"
    assert (estimator("hizoo"), estimator("jvp"), estimator("conservative")) == ("hessian", "jvp", "conservative")


def test_only_hizoo_scales_its_directions() -> None:
    assert all(rule(name).scale({}) is None for name in METHODS if name != "hizoo")
    factor = rule("hizoo").scale({"h": torch.tensor([1.0, 4.0])})
    assert factor is not None
    assert factor.tolist() == [1.0, 0.5]


def test_wrong_names_and_settings_are_refused() -> None:
    with pytest.raises(UserError, match=r"'lion'.*sgd, sign"):
        rule("lion")
    with pytest.raises(UserError, match=r"'gamma'.*beta"):
        rule("momentum", {"gamma": 0.5})
    with pytest.raises(UserError, match=r"beta is 1\.5"):
        rule("momentum", {"beta": 1.5})
    with pytest.raises(UserError, match="expected the 2"):
        rule("hizoo").apply(torch.ones(2), torch.ones(2), {"h": torch.ones(2)}, 0.1, 0.0, 0)
