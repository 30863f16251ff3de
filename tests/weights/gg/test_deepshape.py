"""DeepShape: ranks kept, width kept, a guard that holds."""

from __future__ import annotations

import math

import pytest
import torch

from agentopt.errors import UserError
from agentopt.weights import gg
from tests.weights.tiny import tiny


def ordered(before: torch.Tensor, after: torch.Tensor) -> bool:
    return bool((after.flatten()[before.flatten().argsort(stable=True)].diff() >= 0).all())


@pytest.mark.parametrize("count", [2000, 40_000])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_shape_moves_and_ranks_and_width_stay(count: int, symmetric: bool) -> None:
    weight = gg.sample((count // 100, 100), 2.0, 0.02, generator=1)
    found = gg.deepshape(weight, 1.0, symmetric=symmetric)
    assert ordered(weight, found)
    assert float(found.norm()) == pytest.approx(float(weight.norm()), rel=1e-5)
    assert gg.fit(found).nu == pytest.approx(1.0, abs=0.02)
    assert gg.fit(gg.deepshape(weight, symmetric=symmetric)).nu == pytest.approx(0.8 * gg.fit(weight).nu, rel=0.03)
    half = gg.deepshape(weight, 1.0, 0.5, symmetric=symmetric)
    assert ordered(weight, half)
    assert torch.allclose(half, (weight + found) / 2, atol=1e-7)
    assert torch.equal(gg.deepshape(weight, 1.0, 0.0), weight)
    assert gg.deepshape(weight, std_scale=0.6).norm() == pytest.approx(0.6 * float(weight.norm()), rel=1e-5)


def test_zeros_stay_and_equal_values_stay_equal() -> None:
    weight = torch.tensor([0.0, 0.0, 0.5, -0.5, 0.5, 2.0, -3.0, 0.0])
    found = gg.deepshape(weight, 0.7)
    assert found[[0, 1, 7]].tolist() == [0.0] * 3
    assert float(found[2]) == float(found[4]) == -float(found[3])
    assert torch.equal(gg.deepshape(torch.zeros(3, 3)), torch.zeros(3, 3))


def test_rows_get_their_norm_back() -> None:
    weight = gg.sample((6, 50), 2.0, generator=2) * torch.arange(6)[:, None]
    found = gg.deepshape(weight.bfloat16(), 1.0, restore_rows=True)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float().norm(dim=1), weight.norm(dim=1), rtol=0.01)


def test_the_published_form_matches_the_histogram_and_narrows_it() -> None:
    weight = gg.sample((400, 1000), 2.0, 0.006, generator=3)
    found = gg.deepshape(weight, mode="reference")
    on_grid = found * 2**13
    moved = found != weight
    assert torch.equal(on_grid[moved], on_grid[moved].round())
    # Where counts are below 1000 nothing moves.
    reach = weight[moved].abs().max()
    assert torch.equal(found[weight.abs() > reach], weight[weight.abs() > reach])
    assert 0.5 < float(found.std() / weight.std()) < 0.97
    assert gg.bits_per_weight(found, 2**-10).entropy < gg.bits_per_weight(weight, 2**-10).entropy - 0.3


def test_the_guard_leaves_layers_alone() -> None:
    model, _ = tiny()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    rows = [{"input_ids": torch.arange(12)[None]}, {"input_ids": torch.arange(3, 15)[None]}]
    refused = gg.deepshape_(model, 0.5, calibrate=rows, guard=0.01)
    assert not any(one.applied for one in refused)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert len(refused) == 2 * 7 + 1
    found = {one.name: one for one in gg.deepshape_(model, 0.5, calibrate=rows, guard=10.0, step=2**-7)}
    assert all(one.applied and one.bits_after < one.bits_before for one in found.values())
    assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    # The reported error is that of the outputs of the first layer, whose inputs did not change.
    first = "model.layers.0.self_attn.q_proj"
    with torch.no_grad():
        inputs = torch.cat([model.model.embed_tokens(row["input_ids"])[0] for row in rows])
        inputs = model.model.layers[0].input_layernorm(inputs)
    old, new = before[first + ".weight"], model.state_dict()[first + ".weight"]
    error = float((inputs @ (new - old).T).norm() / (inputs @ old.T).norm())
    assert found[first].error == pytest.approx(error, rel=1e-4)
    assert not model.training


def test_without_calibration_the_weights_are_compared_and_the_whole_model_can_be_moved() -> None:
    model, _ = tiny()
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    found = {one.name: one for one in gg.deepshape_(model, strength=0.5)}["model.layers.0.mlp.up_proj"]
    moved = model.model.layers[0].mlp.up_proj.weight
    assert found.error == pytest.approx(float((moved.detach() - weight).norm() / weight.norm()), rel=1e-4)
    (whole,) = gg.deepshape_(model, mode="reference")
    assert whole.name == "all parameters"


def test_mistakes_are_named() -> None:
    one = torch.ones(2, 2)
    model, _ = tiny()
    for call in (
        lambda: gg.deepshape(one, strength=1.5),
        lambda: gg.deepshape(one, nu=-1.0),
        lambda: gg.deepshape(one, std_scale=0.0),
        lambda: gg.deepshape(torch.tensor([math.nan])),
        lambda: gg.deepshape(one, 1.0, mode="reference"),
        lambda: gg.deepshape(one, mode="model"),  # pyright: ignore[reportArgumentType]
        lambda: gg.deepshape_(model, guard=0.0),
        lambda: gg.deepshape_(model, calibrate=[]),
        lambda: gg.deepshape_(torch.nn.LayerNorm(3)),
    ):
        with pytest.raises(UserError, match="found"):
            call()
