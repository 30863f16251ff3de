"""GG initialisation: variances, names, seeds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from agentopt.errors import UserError
from agentopt.weights import gg
from tests.weights.tiny import tiny


def test_variance_is_xi_over_the_inputs() -> None:
    layer = nn.Linear(256, 64)
    for xi, variance in ((2.0, 2.0), ("relu", 2.0), ("linear", 1.0), (0.5, 0.5)):
        sigmas = gg.init_(layer, nu=1.0, xi=xi)
        assert sigmas == {"weight": pytest.approx(math.sqrt(variance / 256))}
        assert float(layer.weight.detach().var()) == pytest.approx(variance / 256, rel=0.05)
    assert gg.fit(layer.weight).nu == pytest.approx(1.0, abs=0.08)
    assert float(layer.bias.detach().abs().max()) == 0.0


def test_variance_within_two_percent_for_many_weights() -> None:
    layer = nn.Linear(1000, 400, bias=False)
    gg.init_(layer, nu=2.0)
    assert float(layer.weight.detach().var()) == pytest.approx(2 / 1000, rel=0.02)


def test_reference_takes_the_first_dimension() -> None:
    layer = nn.Linear(256, 64)
    fan_in = gg.init_(layer)["weight"]
    reference = gg.init_(layer, mode="reference")["weight"]
    assert reference**2 == pytest.approx(4 * fan_in**2)
    model = nn.Sequential(nn.Embedding(100, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight.fill_(7.0)  # pyright: ignore[reportArgumentType, reportCallIssue]
    sigmas = gg.init_(model, mode="reference")
    assert sigmas == {"0.weight": pytest.approx(math.sqrt(2 / 100)), "2.weight": pytest.approx(0.5)}
    state = model.state_dict()
    assert state["1.weight"].tolist() == [1.0] * 8
    assert state["2.bias"].tolist() == [0.0] * 8


def test_a_transformer_is_drawn_by_parts() -> None:
    model, _ = tiny(width=64, layers=2)
    norm = model.model.norm.weight.clone()
    sigmas = gg.init_(model, nu=1.0, xi=1.0)
    block = "model.layers.0."
    assert sigmas["model.embed_tokens.weight"] == 0.02
    assert sigmas[block + "self_attn.q_proj.weight"] == pytest.approx(1 / 8)
    # Two blocks write into the residual stream four times.
    assert sigmas[block + "self_attn.o_proj.weight"] == pytest.approx(1 / 8 / 2)
    assert sigmas[block + "mlp.down_proj.weight"] == pytest.approx(1 / math.sqrt(128) / 2)
    assert gg.init_(model, xi=1.0, residual_scaling=False)[block + "self_attn.o_proj.weight"] == pytest.approx(1 / 8)
    assert torch.equal(model.model.norm.weight, norm)


def test_a_tied_head_is_the_embedding_and_a_conv1d_has_its_inputs_first() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    sigmas = gg.init_(model, xi=1.0)
    assert "lm_head.weight" not in sigmas
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sigmas["transformer.h.0.attn.c_attn.weight"] == pytest.approx(1 / 4)
    assert sigmas["transformer.h.0.mlp.c_proj.weight"] == pytest.approx(1 / 8 / math.sqrt(2))


def test_a_draw_depends_on_seed_and_name() -> None:
    one, more = nn.ModuleDict({"a": nn.Linear(8, 8)}), nn.ModuleDict({"z": nn.Linear(4, 4), "a": nn.Linear(8, 8)})
    before = torch.get_rng_state()
    gg.init_(one, seed=3)
    gg.init_(more, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    weights = [model["a"].weight for model in (one, more)]
    assert torch.equal(weights[0], weights[1])  # pyright: ignore[reportArgumentType]
    gg.init_(more, seed=4)
    assert not torch.equal(weights[0], weights[1])  # pyright: ignore[reportArgumentType]


def test_very_heavy_tails_are_cut() -> None:
    layer = nn.Linear(500, 500)
    sigma = gg.init_(layer, nu=0.2)["weight"]
    assert float(layer.weight.detach().abs().max()) <= 8 * sigma
    half = nn.Linear(20, 20, dtype=torch.bfloat16)
    gg.init_(half)
    assert half.weight.dtype == torch.bfloat16


def test_mistakes_are_named() -> None:
    for call in (
        lambda: gg.init_(nn.Linear(2, 2), nu=0.0),
        lambda: gg.init_(nn.Linear(2, 2), xi=-1.0),
        lambda: gg.init_(nn.Linear(2, 2), xi="swish"),
        lambda: gg.init_(nn.Linear(2, 2), mode="fan_out"),  # pyright: ignore[reportArgumentType]
        lambda: gg.init_(nn.LayerNorm(3)),
    ):
        with pytest.raises(UserError, match="found"):
            call()
