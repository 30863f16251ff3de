"""An 8-bit base: how far a weight moves, what it weighs, what flows through it, adapters on top."""

from __future__ import annotations

from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights import adapters, int8
from tests.weights.test_adapters import IDS, close, gpt2, llama, logits

torch = pytest.importorskip("torch")


def bytes_of(model: Any) -> int:
    return sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_no_weight_moves_by_more_than_half_a_level(make: Any) -> None:
    model, before = make(), {name: one.detach().clone() for name, one in make().named_parameters()}
    assert int8.quantize_(model) is model
    layers = {name: one for name, one in model.named_modules() if isinstance(one, int8.Int8Linear)}
    assert layers
    assert not any("lm_head" in name for name in layers)
    for name, layer in layers.items():
        weight = before[f"{name}.weight"]
        weight = weight.T if make is gpt2 else weight
        level = weight.abs().amax(dim=1, keepdim=True) / 127
        assert bool(((layer.dequantize() - weight).abs() <= level * 0.5001).all())
    plain = make()
    for name, layer in layers.items():
        weight = layer.dequantize()
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(weight.T if make is gpt2 else weight)
    close(logits(model), logits(plain))


def test_memory_is_a_quarter_and_rows_of_zeros_stay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(512, 256), torch.nn.Linear(256, 256, bias=False))
    with torch.no_grad():
        model[1].weight[3] = 0
        model[1].weight[4] = 1e-44
    before = bytes_of(model)
    int8.quantize_(model)
    assert bytes_of(model) < 0.27 * before
    assert not [one for one in model.parameters() if one.requires_grad]
    assert bool((model[1](torch.ones(2, 256))[:, 3:5] == 0).all())


def test_several_tiles_sixteen_bit_and_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    from agentopt.weights import _int8_linear

    monkeypatch.setattr(_int8_linear, "TILE", 12)
    random = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(5, 7).double()
    int8_layer = int8.quantize_(torch.nn.Sequential(layer))[0]
    x = torch.randn(2, 3, 5, generator=random, dtype=torch.float64).requires_grad_()
    weight = int8_layer.dequantize().double()
    torch.testing.assert_close(int8_layer(x), x @ weight.T + layer.bias, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(int8_layer, (x,))
    assert torch.autograd.gradgradcheck(lambda x: int8_layer(x).tanh(), (x,))
    mapped = torch.func.vmap(torch.func.grad(lambda row: int8_layer(row).square().sum()))(x.detach())
    (slope,) = torch.autograd.grad(int8_layer(x).square().sum(), (x,))
    torch.testing.assert_close(mapped, slope)
    for dtype in (torch.bfloat16, torch.float16):
        y = int8_layer(x.detach().to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), int8_layer(x.detach()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_adapters_learn_on_top(make: Any) -> None:
    model = int8.quantize_(make())
    base = logits(model)
    held = adapters.attach(model, rank=4)
    assert torch.equal(logits(model), base)
    optimizer = torch.optim.AdamW(held.parameters().values(), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
    with pytest.raises(UserError, match="is quantized"):
        held.merge_()
    held.detach_model()
    assert torch.equal(logits(model), base)


def test_refusals() -> None:
    with pytest.raises(UserError, match="no linear layer to quantize"):
        int8.quantize_(torch.nn.Sequential(torch.nn.ReLU()))
    with pytest.raises(UserError, match="expected a list"):
        int8.quantize_(llama(), skip="lm_head")
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="up_proj has weights that are not finite"):
        int8.quantize_(model)
