"""The published methods by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agentopt.errors import UserError
from agentopt.weights.zeroth import _estimators as estimators
from agentopt.weights.zeroth._optimizer import ZerothOrder
from agentopt.weights.zeroth._presets import PRESETS, Preset, preset


def test_all_methods_are_there() -> None:
    assert list(PRESETS) == [
        "mezo",
        "sparse-mezo",
        "zo-sgd-sign",
        "zo-momentum",
        "zo-adam",
        "zo-conservative",
        "forward-gradient",
        "block-wise",
        "fzoo",
        "hizoo",
        "lozo",
        "grzo",
        "lowrank-population",
    ]


@pytest.mark.parametrize("one", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("trained", ["full", "lora", "prefix"])
def test_settings_are_usable(one: Preset, trained: Any) -> None:
    found = one.settings(trained)
    assert set(found) == {"lr", "eps", "mask", "density", "mask_update", "probe", "method"}
    assert 0 < found["lr"] < 0.1
    assert 0 < found["eps"] <= 0.1
    assert 0 < found["density"] <= 1


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "forward-gradient"])
def test_the_plan_of_a_preset_costs_what_its_line_says(name: str) -> None:
    one = PRESETS[name]
    seeds = list(range(one.probe.population))
    plan = estimators.hessian_plan if one.estimator == "hessian" else estimators.plan
    variants = len(plan(one.probe, 1e-3, seeds, seeds))
    if one.estimator == "conservative":
        variants += len(estimators.conservative_plan(seeds, seeds, [1.0] * len(seeds), 0.1))
    assert one.forwards == variants
    assert f"[{variants} forwards/step" in one.line()
    assert one.line().startswith(f"{one.name}: ")
    assert "arXiv" in one.line()


def test_the_rates_of_mezo_are_the_papers_own() -> None:
    assert [PRESETS["mezo"].settings(kind)["lr"] for kind in ("full", "lora", "prefix")] == [1e-6, 1e-4, 1e-2]
    assert [PRESETS["mezo"].settings(kind)["eps"] for kind in ("full", "lora", "prefix")] == [1e-3, 1e-2, 1e-1]
    assert [name for name, one in PRESETS.items() if one.tuned] == ["mezo"]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"'adamw'.*mezo, sparse-mezo"):
        preset("adamw")
    with pytest.raises(UserError, match=r"'all'.*full, lora, prefix"):
        preset("mezo").settings("all")  # pyright: ignore[reportArgumentType]


# The others are trained in test_optimizer.
RATES = {
    "sparse-mezo": 2e-2,
    "zo-sgd-sign": 5e-3,
    "zo-momentum": 2e-2,
    "block-wise": 2e-2,
    "hizoo": 2e-2,
    "lowrank-population": 0.1,
}


@pytest.mark.parametrize(("name", "lr"), RATES.items())
def test_a_method_trains_a_small_network(name: str, lr: float) -> None:
    draw = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    for parameter in model.parameters():
        parameter.detach().copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    rows = torch.randn(16, 6, generator=draw)
    wanted = rows[:, :1] - 0.5 * rows[:, 1:2]

    def loss(net: Any) -> Any:
        return ((net(rows) - wanted) ** 2).mean(1)

    optimizer = ZerothOrder.preset(name, model, lr=lr, eps=1e-3)
    steps = 5 if PRESETS[name].forwards > 5 else 30
    results = [optimizer.step(loss) for _ in range(steps)]
    assert results[0].forwards == PRESETS[name].forwards
    assert results[-1].loss < 0.9 * results[0].loss


def test_block_wise_moves_one_layer_a_step() -> None:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)])})
    layers: Any = model["layers"]

    def loss(net: Any) -> Any:
        x = torch.ones(2, 4)
        for layer in layers:
            x = layer(x)
        return (x**2).mean(1)

    before = [layer.weight.detach().clone() for layer in layers]
    ZerothOrder.preset("block-wise", model, lr=1e-2).step(loss)
    assert [torch.equal(layer.weight.detach(), old) for layer, old in zip(layers, before, strict=True)].count(
        False
    ) == 1


def test_rates_for_full_weights_grow_with_the_root_of_what_a_model_is_smaller() -> None:
    mezo = PRESETS["mezo"]
    assert mezo.settings("full", 13_000_000_000)["lr"] == mezo.settings("full", 70_000_000_000)["lr"] == 1e-6
    assert mezo.settings("full", 130_000_000)["lr"] == 1e-5
    assert mezo.settings("lora", 1_000_000)["lr"] == mezo.settings("lora")["lr"]
