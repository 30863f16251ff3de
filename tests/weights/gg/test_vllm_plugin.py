"""The plug-in for vLLM without vLLM: what is registered, which layers are ours, what is refused, what is computed."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights.gg import vllm_plugin
from agentopt.weights.gg._checkpoint import Checkpoint
from tests.weights.gg import fake_vllm

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from agentopt.weights.gg import _codec, kernels  # noqa: E402

BOOKS = _codec.encode(torch.ones(1, 1)).books
assert BOOKS is not None
LISTS = tuple(tuple(book[:255].tolist()) for book in BOOKS)
FORMATS = ("rf8", "rf8-strict", "e3m4", "rf8-gg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def methods(folder: Path) -> Iterator[Any]:
    """The plug-in's module over a fake vLLM, registered through the entry point's function."""
    with pytest.MonkeyPatch.context() as patch:
        fake_vllm.install(patch, str(folder))
        vllm_plugin.register()
        yield sys.modules[fake_vllm.METHODS]
        sys.modules.pop(fake_vllm.METHODS, None)


def checkpoint(format: Any = "rf8-gg", **more: Any) -> Checkpoint:
    return Checkpoint(format=format, books=LISTS if format == "rf8-gg" else (), **more)


def config(methods: Any, format: str = "rf8-gg", **more: Any) -> Any:
    found = methods.RF8Config.from_config(checkpoint(format, **more).to_dict())
    found.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return found


def encoded(rows: int, columns: int, format: Any, seed: int = 0) -> tuple[dict[str, Any], Any]:
    """The tensors of a file, and the weight that they stand for. Rows of several shapes choose several books."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[::2] **= 3
    found = _codec.encode(weight, format)
    tensors = {"qweight": found.codes, "weight_scale": found.scale, "book_id": found.book_id}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}, _codec.decode(found)


def write(folder: Path, *names: str) -> None:
    safetensors.save_file({name: torch.zeros(1) for name in names}, str(folder / "model.safetensors"))


# --- registration ----------------------------------------------------------------------------------------------------


def test_the_entry_point_registers_once(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    vllm = fake_vllm.install(monkeypatch, str(folder))
    vllm_plugin.register()
    vllm_plugin.register()
    assert vllm.QUANTIZATION_METHODS == ["fp8", "rf8"]
    made = vllm.get_quantization_config("rf8")
    assert made.__module__ == fake_vllm.METHODS
    sys.modules.pop(fake_vllm.METHODS, None)


def test_a_method_of_that_name_by_others_is_left_and_told(
    monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vllm = fake_vllm.install(monkeypatch, str(folder))
    vllm.register_quantization_config("rf8")(str)
    vllm_plugin.register()
    assert vllm.get_quantization_config("rf8") is str
    assert "another plug-in" in caplog.text


def test_the_plugin_is_light() -> None:
    """vLLM imports it in every process, also for models that are not ours."""
    import subprocess

    code = "import sys, agentopt.weights.gg.vllm_plugin; print({'torch', 'transformers', 'vllm'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set `VLLM_PLUGINS` is a list of what may be loaded; vLLM splits it at commas and strips nothing."""

    class Found:
        names = frozenset({vllm_plugin.NAME})

    monkeypatch.setattr(vllm_plugin, "entry_points", lambda group: Found)
    vllm_plugin.check_environment({})
    vllm_plugin.check_environment({"VLLM_PLUGINS": "lora_filesystem_resolver,agentopt_rf8"})
    for value in ("lora_filesystem_resolver", "", "lora_filesystem_resolver, agentopt_rf8"):
        with pytest.raises(UserError, match=r"Unset the variable, or set VLLM_PLUGINS=.*agentopt_rf8"):
            vllm_plugin.check_environment({"VLLM_PLUGINS": value})
    Found.names = frozenset()
    with pytest.raises(UserError, match="Install agentopt again"):
        vllm_plugin.check_environment({})


def test_the_package_declares_the_entry_point() -> None:
    import tomllib

    text = Path(__file__).parents[3].joinpath("pyproject.toml").read_text(encoding="utf-8")
    declared = tomllib.loads(text)["project"]["entry-points"][vllm_plugin.GROUP]
    module, _, function = declared[vllm_plugin.NAME].partition(":")
    assert getattr(importlib.import_module(module), function) is vllm_plugin.register


# --- what config.json says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [({"version": 2}, "version"), ({"format": "int4"}, "format"), ({"codebooks": None}, "codebooks")],
    ids=lambda value: str(value),
)
def test_a_config_of_something_else_is_refused(methods: Any, change: dict[str, Any], text: str) -> None:
    """Twice: early, where vLLM reads config.json, and when the model is built. vLLM shows a ValueError in one piece."""
    bad = {**checkpoint().to_dict(), **change}
    with pytest.raises(ValueError, match=text):
        methods.RF8Config.from_config(bad)
    with pytest.raises(ValueError, match=text):
        methods.RF8Config.override_quantization_method(bad, None, hf_config=None)


def test_checkpoints_of_others_are_not_taken_over(methods: Any) -> None:
    take = methods.RF8Config.override_quantization_method
    assert take({"quant_method": "fp8"}, None) is None
    assert take(None, "rf8", hf_config=object()) is None
    assert take(checkpoint().to_dict(), None, hf_config=None) is None


# --- which layers are ours -------------------------------------------------------------------------------------------


def test_names_in_the_list_are_whole_components(methods: Any) -> None:
    found = config(methods, skip=("layers.1.mlp", "gate", "out"))
    ours = {
        name: isinstance(found.get_quant_method(fake_vllm.Linear(4, 4), name), methods.RF8LinearMethod)
        for name in (
            "model.layers.1.mlp.down_proj",
            "model.layers.11.mlp.down_proj",
            "model.layers.0.mlp.gate",
            "model.layers.0.mlp.gate_up_proj",
            "model.layers.0.self_attn.out_proj",
        )
    }
    assert [*ours.values()] == [False, True, False, True, True]


def test_a_fused_layer_is_skipped_with_its_parts_and_only_with_all(methods: Any) -> None:
    layer = fake_vllm.Linear(4, 4, 4, 4)
    found = config(methods, skip=("q_proj", "k_proj", "v_proj"))
    assert isinstance(found.get_quant_method(layer, "model.layers.0.self_attn.qkv_proj"), fake_vllm.UnquantizedLinear)
    found = config(methods, skip=("layers.0.self_attn.k_proj",))
    with pytest.raises(ValueError, match=r"k_proj left as it was.*all or none of q_proj, k_proj, v_proj"):
        found.get_quant_method(layer, "model.layers.0.self_attn.qkv_proj")
    assert isinstance(found.get_quant_method(layer, "model.layers.1.self_attn.qkv_proj"), methods.RF8LinearMethod)


def test_the_tensors_in_the_files_decide_before_the_list(methods: Any, folder: Path) -> None:
    """A router is a linear layer to vLLM and none to transformers, so it is in no list."""
    write(folder, "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.down_proj.qweight", "lm_head.weight")
    found = config(methods, skip=("lm_head", "down_proj"))
    ours = [
        type(found.get_quant_method(fake_vllm.Linear(4, 4), f"model.layers.0.mlp.{name}")).__name__
        for name in ("gate", "down_proj", "unknown")
    ]
    assert ours == ["UnquantizedLinear", "RF8LinearMethod", "RF8LinearMethod"]


def test_names_come_from_the_index_of_many_files_or_not_at_all(folder: Path) -> None:
    from agentopt.weights.gg._vllm_names import stored_layers

    assert stored_layers("some-user/a-model") == (frozenset(), frozenset())
    index = {
        "weight_map": {"a.qweight": "1.safetensors", "a.weight_scale": "1.safetensors", "b.weight": "2.safetensors"}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert stored_layers(str(folder)) == ({"a"}, {"b"})


def test_names_that_the_model_changes_are_followed(methods: Any, folder: Path) -> None:
    class Mapper:
        def apply_list(self, names: list[str]) -> list[str]:
            return [name.replace("model.language_model.", "language_model.model.") for name in names]

    write(folder, "model.language_model.a.qweight", "model.language_model.b.weight")
    found = config(methods, skip=("model.language_model.c",))
    found.apply_vllm_mapper(Mapper())
    ours = [
        isinstance(
            found.get_quant_method(fake_vllm.Linear(4, 4), f"language_model.model.{name}"), methods.RF8LinearMethod
        )
        for name in "abc"
    ]
    assert ours == [True, False, False]


@pytest.mark.parametrize(("head", "tied"), [(False, True), (True, True), (True, False)])
def test_heads_and_embeddings(folder: Path, head: bool, tied: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fake_vllm.install(patch, str(folder), tied=tied)
        vllm_plugin.register()
        methods: Any = sys.modules[fake_vllm.METHODS]
        stored = "lm_head.qweight" if head and not tied else f"model.embed_tokens.{'qweight' if head else 'weight'}"
        write(folder, stored, "model.per_layer.weight")
        found = config(methods, head=head, skip=())
        of_head = found.get_quant_method(fake_vllm.Head(4, 10), "lm_head")
        of_embedding = found.get_quant_method(fake_vllm.Embedding(4, 10), "")
        assert found.get_quant_method(fake_vllm.Embedding(4, 10), "model.per_layer") is None
        sys.modules.pop(fake_vllm.METHODS, None)
    assert isinstance(of_head, methods.RF8EmbeddingMethod) == head
    assert isinstance(of_embedding, methods.RF8EmbeddingMethod) == (head and tied)


def test_quantized_experts_are_refused_and_plain_ones_left_to_vllm(methods: Any, folder: Path) -> None:
    write(folder, "model.layers.0.mlp.experts.3.w1.qweight", "model.layers.1.mlp.experts.3.w1.weight")
    found = config(methods)
    experts = torch.nn.Module()
    assert found.get_quant_method(experts, "model.layers.1.mlp.experts.routed_experts") is None
    assert found.get_quant_method(experts, "model.layers.0.self_attn.attn") is None
    with pytest.raises(ValueError, match="quantized experts"):
        found.get_quant_method(experts, "model.layers.0.mlp.experts.routed_experts")


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["decoded", "packed"])
@pytest.mark.parametrize("format", FORMATS)
def test_fused_layers_stack_rows_scales_and_books(
    methods: Any, monkeypatch: pytest.MonkeyPatch, format: str, packed: bool
) -> None:
    monkeypatch.setattr(kernels, "usable", lambda tensor: packed)
    layer = fake_vllm.Linear(24, 7, 3, 5).make(methods.RF8LinearMethod(config(methods, format), "qkv_proj"))
    parts = [encoded(rows, 24, format, seed) for seed, rows in enumerate((7, 3, 5))]
    for shard in (2, 0, 1):
        fake_vllm.load(layer, parts[shard][0], shard)
    layer.quant_method.process_weights_after_loading(layer)
    weight = torch.cat([part[1] for part in parts])
    x, bias = torch.randn(2, 3, 24), torch.randn(15)
    torch.testing.assert_close(layer.quant_method.apply(layer, x, bias), torch.nn.functional.linear(x, weight, bias))
    if packed:
        assert layer.qweight.dtype == torch.uint8
        assert not hasattr(layer, "weight")
        assert "rf8_table" not in layer.state_dict()
    else:
        assert torch.equal(layer.weight, weight)
        assert [name for name, _ in layer.named_parameters()] == ["weight"], "the codes are freed"
        assert layer.quant_method.plain.packed == 1


def test_the_weight_has_the_type_of_the_model(methods: Any) -> None:
    layer = fake_vllm.Linear(8, 4).make(methods.RF8LinearMethod(config(methods, "rf8"), "o_proj"), torch.bfloat16)
    tensors, weight = encoded(4, 8, "rf8")
    fake_vllm.load(layer, tensors)
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer.weight, weight.to(torch.bfloat16))


@pytest.mark.parametrize("packed", [False, True], ids=["decoded", "packed"])
@pytest.mark.parametrize("tie", ["of the method", "of the layer"])
def test_a_tied_head_reads_the_embedding(methods: Any, monkeypatch: pytest.MonkeyPatch, packed: bool, tie: str) -> None:
    """Also where vLLM is too old to ask the method. Rows beyond the vocabulary are zeros."""
    monkeypatch.setattr(kernels, "usable", lambda tensor: packed)
    if tie == "of the layer":
        monkeypatch.delattr(fake_vllm.MethodBase, "tie_weights")
    shared = config(methods)
    embedding = fake_vllm.Embedding(16, 50).make(methods.RF8EmbeddingMethod(shared, "embed_tokens"))
    head = fake_vllm.Head(16, 50).make(methods.RF8EmbeddingMethod(shared, "lm_head"))
    ties = head.tie_weights if tie == "of the layer" else lambda other: head.quant_method.tie_weights(head, other)
    assert ties(embedding) is head
    assert head.qweight is embedding.qweight, "one place to load to"
    tensors, weight = encoded(50, 16, "rf8-gg")
    fake_vllm.load(embedding, tensors)
    for layer in (head, embedding):
        layer.quant_method.process_weights_after_loading(layer)
    ids = torch.tensor([0, 49, 7])
    torch.testing.assert_close(embedding.quant_method.embedding(embedding, ids), weight[ids])
    logits = head.quant_method.apply(head, weight[ids])
    torch.testing.assert_close(logits[:, :50], weight[ids] @ weight.T)
    assert not logits[:, 50:].any()
    name = "qweight" if packed else "weight"
    assert getattr(head, name).data_ptr() == getattr(embedding, name).data_ptr()


def test_what_is_computed_is_traced_whole(methods: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile meets no break: so nothing depends on data, and CUDA graphs can capture it."""
    monkeypatch.setattr(kernels, "usable", lambda tensor: True)
    layer = fake_vllm.Embedding(16, 64).make(methods.RF8EmbeddingMethod(config(methods), "embed_tokens"))
    tensors, weight = encoded(64, 16, "rf8-gg")
    fake_vllm.load(layer, tensors)
    layer.quant_method.process_weights_after_loading(layer)

    @torch.compile(backend="eager", fullgraph=True)
    def both(ids: Any) -> Any:
        return layer.quant_method.apply(layer, layer.quant_method.embedding(layer, ids))

    ids = torch.tensor([3, 1, 2])
    with torch.inference_mode():
        torch.testing.assert_close(both(ids), weight[ids] @ weight.T)


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("qweight", lambda found: found.float(), "torch.float32"),
        ("qweight", lambda found: found[:, :-1], r"\(4, 7\), expected torch.uint8 \(4, 8\)"),
        ("qweight", lambda found: found[:-1], r"\(3, 8\)"),
        ("weight_scale", lambda found: found[:, 0], r"\(4,\)"),
        ("weight_scale", lambda found: found.bfloat16(), "bfloat16"),
        ("book_id", lambda found: found.int(), "int32"),
    ],
)
def test_a_tensor_of_another_shape_or_type_is_refused(methods: Any, name: str, change: Any, text: str) -> None:
    """vLLM's own loaders convert types and cut off rows without a word."""
    layer = fake_vllm.Linear(8, 4).make(methods.RF8LinearMethod(config(methods), "model.o_proj"))
    tensors, _ = encoded(4, 8, "rf8-gg")
    with pytest.raises(ValueError, match=f"model.o_proj: {name}: found .*{text}"):
        fake_vllm.load(layer, {name: change(tensors[name])})


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("qweight", 255, "found 255 in row 2"),
        ("weight_scale", 0.0, "found 0.0 in row 2"),
        ("weight_scale", -1.0, "above 0"),
        ("weight_scale", float("nan"), "nan"),
        ("weight_scale", float("inf"), "inf"),
        ("book_id", len(LISTS), f"below {len(LISTS)}"),
    ],
)
def test_numbers_that_no_encoder_writes_are_refused(methods: Any, name: str, value: float, text: str) -> None:
    layer = fake_vllm.Linear(8, 4).make(methods.RF8LinearMethod(config(methods), "model.o_proj"))
    tensors, _ = encoded(4, 8, "rf8-gg")
    tensors[name][2, 0] = value
    fake_vllm.load(layer, tensors)
    with pytest.raises(ValueError, match=f"model.o_proj: {name}: .*{text}.*damaged"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("missing", ["qweight", "weight_scale"])
def test_a_tensor_that_was_not_in_the_files_is_missed(methods: Any, format: str, missing: str) -> None:
    """vLLM does not look whether a quantized model's parameters were all loaded."""
    layer = fake_vllm.Linear(8, 4, 4).make(methods.RF8LinearMethod(config(methods, format), "gate_up_proj"))
    tensors, _ = encoded(4, 8, format)
    fake_vllm.load(layer, tensors, 0)
    fake_vllm.load(layer, {name: tensor for name, tensor in tensors.items() if name != missing}, 1)
    with pytest.raises(ValueError, match=f"gate_up_proj: {missing}: .* in row 4, .*lacks this tensor"):
        layer.quant_method.process_weights_after_loading(layer)


def test_every_code_decodes_as_the_reference(methods: Any) -> None:
    """All 256 codes of the formats of a formula, all levels of every book."""
    for format in FORMATS:
        shared = config(methods, format)
        rows = len(LISTS) if format == "rf8-gg" else 1
        codes = torch.arange(256, dtype=torch.uint8).expand(rows, 256)
        codes = codes[:, :255] if format == "rf8-gg" else codes
        made: dict[str, Any] = {"qweight": codes, "weight_scale": torch.full((rows, 1), 0.37)}
        if format == "rf8-gg":
            made["book_id"] = torch.arange(rows, dtype=torch.uint8)[:, None]
        layer = fake_vllm.Linear(codes.shape[1], rows).make(methods.RF8LinearMethod(shared, "o_proj"))
        fake_vllm.load(layer, made)
        layer.quant_method.process_weights_after_loading(layer)
        reference = replace(
            _codec.encode(torch.ones(1, 1), format),
            codes=codes,
            scale=made["weight_scale"],
            book_id=made.get("book_id"),
        )
        assert torch.equal(layer.weight, _codec.decode(reference)), format
