"""Adapters on codes: peft's and ours; what trains, what is saved, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights import adapters, load
from agentopt.weights.gg._linear import RF8Linear
from tests.weights.gg.quantized import logits, make, write
from tests.weights.tiny import tiny

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("agentopt.weights.gg.transformers_plugin")

pytestmark = [
    # peft asks transformers for names that will change.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]

IDS = torch.tensor([[3, 7, 1, 12, 5, 20, 2, 9], [4, 4, 28, 0, 15, 16, 11, 6]])


def opened(folder: Path, **arguments: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_trains_saves_loads_and_does_not_merge_into_codes(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "codes", make(kind, bias=True))
    base = peft.prepare_model_for_kbit_training(opened(tmp_path / "codes", dtype=torch.bfloat16))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses: list[float] = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.02
    after = {
        name.replace("base_layer.", ""): tensor for name, tensor in base.state_dict().items() if "lora" not in name
    }
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model.eval().save_pretrained(tmp_path / "adapter")
    again = peft.prepare_model_for_kbit_training(opened(tmp_path / "codes", dtype=torch.bfloat16))
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    for safe in (False, True):
        with pytest.raises(UserError, match=r"8-bit codes: .*\(found `data`\)"):
            again.merge_and_unload(safe_merge=safe)
    assert torch.equal(logits(again), logits(model))
    plain = peft.PeftModel.from_pretrained(opened(tmp_path / "codes").dequantize(), tmp_path / "adapter")
    expected = logits(plain)
    merged = plain.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert not hasattr(merged.config, "quantization_config")


def test_our_adapters_over_codes_equal_those_over_the_decoded_weights(tmp_path: Path) -> None:
    rebuilt = write(tmp_path / "codes", make("llama", bias=True))
    model = opened(tmp_path / "codes")
    held, other = (adapters.attach(one, rank=2, copies=2, seed=5) for one in (model, rebuilt))
    for one in (held, other):
        with torch.no_grad():
            for name, factor in one.parameters().items():
                if name.endswith("lora_B"):
                    factor.copy_(torch.linspace(-0.1, 0.1, factor.numel()).view(factor.shape))
    assert torch.equal(logits(model), logits(rebuilt))
    found = [one(IDS, labels=IDS).loss for one in (model, rebuilt)]
    for loss in found:
        loss.backward()
    for name, factor in held.parameters().items():
        assert torch.equal(factor.grad, other.parameters()[name].grad)
    with pytest.raises(UserError, match="is quantized, so nothing can be added to it without loss"):
        held.merge_()
    held.save(tmp_path / "adapter", copy=1)
    again = adapters.load(held.detach_model(), tmp_path / "adapter")
    with other.rows([1, 1]):
        torch.testing.assert_close(logits(again.model), logits(rebuilt), rtol=1e-5, atol=1e-6)


def layer(*, packed: bool, out: int = 7, wide: int = 5) -> RF8Linear:
    from agentopt.weights.gg._books import default_books

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 255, (out, wide), dtype=torch.uint8, generator=generator)
    book = torch.randint(0, 8, (out, 1), dtype=torch.uint8, generator=generator)
    scale = torch.rand(out, 1, generator=generator) + 0.1
    bias = torch.randn(out, generator=generator)
    return RF8Linear(codes, scale, default_books(), book, bias, format="rf8-gg", keep_packed=packed)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_both_orders_and_vmap(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentopt.weights.gg import _linear

    monkeypatch.setattr(_linear, "TILE", 12)
    held = layer(packed=packed)
    with torch.inference_mode():
        held(torch.zeros(1, 5))
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(held, [x])
    assert torch.autograd.gradgradcheck(lambda one: held(one).tanh(), [x])
    torch.testing.assert_close(held(x), x @ held.dequantize().double().mT + held.bias.double())
    assert torch.equal(torch.func.vmap(held)(x.detach()), held(x.detach()))


def test_the_fused_kernels_compute_what_the_layer_does() -> None:
    from agentopt.weights.gg import kernels

    held, x = layer(packed=False), torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    found = kernels.linear(x, held.qweight, held.weight_scale, held.table, held.book_id, held.bias, format=held.format)
    torch.testing.assert_close(found, held(x))


def test_compiles_in_one_graph() -> None:
    held, x = layer(packed=False), torch.randn(3, 5)
    expected = held(x)
    assert torch.equal(torch.compile(held, backend="eager", fullgraph=True)(x), expected)


def test_new_codes_replace_what_was_decoded() -> None:
    held, other = layer(packed=False), layer(packed=False)
    x = torch.randn(3, 5)
    before = held(x)
    state = {name: tensor.flip(0).contiguous() for name, tensor in other.state_dict().items()}
    assert set(state) == {"qweight", "weight_scale", "book_id", "bias"}
    held.load_state_dict(state)
    torch.testing.assert_close(held(x), before.flip(1))


def test_finetuning_and_folding_take_a_folder_of_codes(tmp_path: Path) -> None:
    from agentopt.weights.finetuning._options import make_options
    from agentopt.weights.finetuning._subject import prepare
    from agentopt.weights.fold import Folder

    model, tokenizer = tiny()
    write(tmp_path / "codes", model)
    tokenizer.save_pretrained(tmp_path / "codes")
    name = str(tmp_path / "codes")
    settings = {"model": name, "method": "mezo", "data": "rows.jsonl"}
    wrong = [("full", {}, "cannot be tuned"), ("lora", {"merge": True}, "leave out --merge")]
    for tune, more, words in [*wrong, ("lora", {"quantize_base": "int8"}, "leave it out")]:
        with pytest.raises(UserError, match=words):
            prepare(make_options({**settings, "tune": tune, **more}))
    subject = prepare(make_options({**settings, "tune": "lora"}))
    assert all(name.endswith(("lora_A", "lora_B")) for name in subject.trained())
    hashes: list[str] = []
    for changes in (0, 0, 1):
        base, _ = load.model(name)
        base.get_submodule("model.layers.0.mlp.up_proj").qweight[0, 0] ^= changes
        with Folder(base, tokenizer, rank=2, layers=1, inner_steps=1) as folder:
            adapter = folder.fold(["red blue one", "green two three"])
            hashes.append(adapter.base_hash)
    assert hashes[0] == hashes[1] != hashes[2]
    with Folder(name, rank=2, layers=1, inner_steps=1) as folder:
        assert folder.base_hash == hashes[0]
