"""The published methods by name."""

from __future__ import annotations

from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights.zeroth import _estimators as estimators
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
