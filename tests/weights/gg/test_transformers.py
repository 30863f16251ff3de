"""Folders of codes in transformers: the same numbers as the decoded model, saved as they were, made while loading."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights import gg
from agentopt.weights.gg._guard import GUARD
from tests.weights.gg.quantized import logits, make, write

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
plugin = pytest.importorskip("agentopt.weights.gg.transformers_plugin")


@pytest.fixture(autouse=True)
def quiet() -> Any:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def load(folder: Path, **arguments: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


CASES = [
    ("llama", "rf8-gg", False, False),
    ("llama", "rf8-gg", False, True),
    ("llama", "rf8", True, False),
    ("llama", "rf8-strict", True, True),
    ("gpt2", "rf8-gg", True, True),
    ("gpt2", "e3m4", False, False),
    ("gpt_neox", "rf8-gg", True, True),
]


@pytest.mark.parametrize(("kind", "format", "tied", "head"), CASES)
def test_logits_are_those_of_the_decoded_model_and_survive_saving(
    tmp_path: Path, kind: str, format: str, tied: bool, head: bool
) -> None:
    rebuilt = write(tmp_path / "codes", make(kind, tied=tied, bias=True), format, head=head)
    saved(rebuilt, tmp_path / "plain")
    for dtype in (torch.float32, torch.bfloat16):
        model, info = load(tmp_path / "codes", dtype=dtype, output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(logits(model), logits(load(tmp_path / "plain", dtype=dtype)))
        saved(model, tmp_path / f"again-{dtype}")
        again = load(tmp_path / f"again-{dtype}", dtype=dtype)
        assert torch.equal(logits(again), logits(model))
        first, second = (
            json.loads((tmp_path / one / "config.json").read_text()) for one in ("codes", f"again-{dtype}")
        )
        assert first["quantization_config"] == second["quantization_config"]
        assert GUARD in second
    names = set(model.state_dict())
    assert {name.rpartition(".")[2] for name in names} <= {"weight", "bias", "qweight", "weight_scale", "book_id"}
    assert any(name.endswith("book_id") for name in names) == (format == "rf8-gg")


def test_what_quantize_writes_loads_and_quantizing_while_loading_writes_the_same(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = saved(make("gpt2", tied=True), tmp_path / "source")
    options = gg.QuantizeOptions(refine=False, head=True)
    gg.quantize(source, tmp_path / "file", options=options)
    flown = load(source, quantization_config=plugin.RF8Config(format="rf8-gg", head=True))
    assert torch.equal(logits(flown), logits(load(tmp_path / "file")))
    saved(flown, tmp_path / "flown")
    first, second = (load_file(tmp_path / one / "model.safetensors") for one in ("file", "flown"))
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((tmp_path / one / "config.json").read_text()) for one in ("file", "flown")]
    about, other = (config["quantization_config"] for config in configs)
    assert {key: about[key] for key in about if key not in ("gg", "source_sha256")} == {
        key: other[key] for key in other if key not in ("gg", "source_sha256")
    }
    assert torch.equal(logits(load(tmp_path / "flown")), logits(flown))


def test_a_weight_that_is_not_a_number_stops_quantizing_while_loading(tmp_path: Path) -> None:
    model = make("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    saved(model, tmp_path / "source")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight: found NaN"):
        load(tmp_path / "source", quantization_config=plugin.RF8Config(format="rf8"))


def test_without_the_plug_in_loading_fails_with_words_that_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "codes", make("llama"), "rf8")
    saved(load(tmp_path / "codes"), tmp_path / "again")
    monkeypatch.delitem(plugin.auto.AUTO_QUANTIZER_MAPPING, "rf8")
    monkeypatch.delitem(plugin.auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "rf8")
    for folder in ("codes", "again"):
        with pytest.raises(ValueError, match=r"run `import agentopt\.weights\.gg\.transformers_plugin` before"):
            load(tmp_path / folder)


def test_registering_twice_does_nothing_and_a_taken_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    monkeypatch.setitem(plugin.auto.AUTO_QUANTIZER_MAPPING, "rf8", object)
    with pytest.raises(UserError, match="'rf8' is taken by object"):
        plugin.register()


def test_tokens_are_those_of_the_decoded_model(tmp_path: Path) -> None:
    rebuilt = write(tmp_path / "codes", make("llama"))
    model, ids = load(tmp_path / "codes", device_map="cpu"), torch.tensor([[3, 7, 1]])
    for how in ({"do_sample": False}, {"do_sample": False, "use_cache": False}, {"do_sample": True, "top_k": 5}):
        found = []
        for one in (model, rebuilt):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                found.append(one.generate(ids, max_new_tokens=8, pad_token_id=0, **how))
        assert torch.equal(*found)
        assert found[0].shape[1] == 11


def test_other_heads_may_be_put_on_the_base(tmp_path: Path) -> None:
    rebuilt = write(tmp_path / "codes", make("llama"))
    base = transformers.AutoModel.from_pretrained(tmp_path / "codes")
    ids = torch.tensor([[3, 7, 1]])
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, rebuilt.model(ids).last_hidden_state)


def test_a_dequantized_model_is_an_ordinary_one(tmp_path: Path) -> None:
    for kind in ("llama", "gpt2", "gemma3_text"):
        rebuilt = write(tmp_path / kind, make(kind, tied=True, bias=True), head=True)
        model = load(tmp_path / kind)
        before = logits(model)
        assert torch.equal(before, logits(rebuilt))
        saved(model, tmp_path / f"{kind}-codes")
        plain = saved(model.dequantize(), tmp_path / f"{kind}-plain")
        assert torch.equal(logits(model), before)
        assert "quantization_config" not in (config := json.loads((plain / "config.json").read_text()))
        assert GUARD not in config
        again = load(plain)
        assert torch.equal(logits(again), before)
        assert again.lm_head.weight is again.get_input_embeddings().weight


def test_packed_weights_take_a_byte_each_and_give_the_same(tmp_path: Path) -> None:
    write(tmp_path / "codes", make("llama", bias=True))
    fast = load(tmp_path / "codes")
    with pytest.warns(UserWarning, match="keep_packed"):
        small = load(tmp_path / "codes", quantization_config=plugin.RF8Config(keep_packed=True))
    assert small.config.quantization_config.to_dict() == fast.config.quantization_config.to_dict()
    torch.testing.assert_close(logits(small), logits(fast), rtol=1e-5, atol=1e-6)
    layers = {type(module).__name__: module for module in small.modules()}
    assert layers["RF8Linear"]._decoded is None


def test_casting_the_model_keeps_codes_and_scales(tmp_path: Path) -> None:
    rebuilt = write(tmp_path / "codes", make("llama", tied=True, bias=True), head=True)
    saved(rebuilt, tmp_path / "plain")
    wide = load(tmp_path / "codes", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in wide.state_dict().items() if "q_proj" in name}
    for number in (torch.float16, torch.bfloat16, torch.float64):
        cast = copy.deepcopy(wide).to(number)
        for name, tensor in before.items():
            if not name.endswith("bias"):
                assert torch.equal(cast.state_dict()[name], tensor)
                assert cast.state_dict()[name].dtype == tensor.dtype
        assert cast.model.embed_tokens(torch.tensor([1])).dtype == cast.model.norm.weight.dtype
        assert cast.lm_head.qweight is cast.model.embed_tokens.qweight
    layer = wide.model.layers[0].mlp.up_proj.to(torch.float16)
    weight = layer.decoded(torch.float16)
    assert torch.equal(weight, rebuilt.model.layers[0].mlp.up_proj.weight.half())
    with pytest.raises(UserError, match="nothing can be added to it without loss"):
        layer.weight.add_(1)


def test_only_the_guard_is_taken_away() -> None:
    config = transformers.LlamaConfig(**{GUARD: "sentence"})
    quantizer = plugin.RF8Quantizer(plugin.RF8Config(format="rf8"), pre_quantized=True)
    assert not hasattr(quantizer.update_attn_implementation(config), GUARD)
    own = transformers.LlamaConfig(**{GUARD: "adapter.safetensors"})
    assert quantizer.update_attn_implementation(own).transformers_weights == "adapter.safetensors"
