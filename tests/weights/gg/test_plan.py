"""Which tensors of a checkpoint are linear layers, by the architecture and not by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights.gg import QuantizeOptions
from agentopt.weights.gg._plan import plan
from agentopt.weights.gg._source import SINGLE, open_source
from tests.weights.gg import folders

torch: Any = pytest.importorskip("torch")

PARTS = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{one}_proj" for one in "kqvo"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head is its own."""
    folder = tmp_path_factory.mktemp("plan") / "llama"
    folders.write(folder)
    return folder


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A model whose head is the embedding."""
    folders.write(tmp_path / "tied", tied=True)
    return tmp_path / "tied"


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a folder."""
    from safetensors.torch import save_file

    tensors = folders.stored(folder)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def test_linear_layers_are_quantized_and_the_rest_is_kept(llama: Path) -> None:
    found = plan(open_source(llama))
    assert {layer.name for layer in found.layers} == {f"model.layers.{at}.{part}" for at in (0, 1) for part in PARTS}
    assert next(x for x in found.layers if x.name.endswith("0.mlp.up_proj")).shape == (64, 32)
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= set(found.kept)
    assert (found.skip, found.head, found.tied, found.warnings) == (("lm_head",), "lm_head", False, ())


def test_skip_takes_names_and_parts_of_names(llama: Path) -> None:
    found = plan(open_source(llama), skip=["layers.0", "model.layers.1.mlp.down_proj"], head=True)
    left = {f"model.layers.1.{part}" for part in PARTS} - {"model.layers.1.mlp.down_proj"}
    assert {layer.name for layer in found.layers} == {*left, "lm_head"}
    assert found.skip == ("layers.0", "model.layers.1.mlp.down_proj")
    with pytest.raises(UserError, match=r"skip: found 'mlp\.down_pro'.*such as .*down_proj"):
        plan(open_source(llama), skip=["mlp.down_pro"])
    with pytest.raises(UserError, match="no linear layer left"):
        plan(open_source(llama), skip=["layers"])
    letters: Any = "down_proj"
    with pytest.raises(UserError, match="skip: found the text 'down_proj', expected a tuple of names"):
        QuantizeOptions(skip=letters)


@pytest.mark.parametrize("head", [False, True])
def test_only_layers_that_are_not_in_the_checkpoint_are_told_as_missing(tmp_path: Path, head: bool) -> None:
    folders.write(tmp_path)
    assert plan(open_source(tmp_path), skip=["up_proj", "down_proj"], head=head).warnings == ()
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    found = plan(open_source(tmp_path), skip=["layers.0"], head=head)
    assert "model.layers.1.mlp.up_proj" in found.skip
    (told,) = found.warnings
    assert told.startswith("1 linear layer of") and told.endswith("(model.layers.1.mlp.up_proj).")


def test_conv1d_is_turned_and_a_missing_prefix_is_no_obstacle(tmp_path: Path) -> None:
    folders.write(tmp_path, kind="gpt2")

    def bare(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    rewrite(tmp_path, bare)
    found = plan(open_source(tmp_path), head=True)
    layers = {layer.name: layer for layer in found.layers}
    assert layers["h.0.attn.c_attn"].shape == (96, 32) and layers["h.0.attn.c_attn"].transposed
    assert layers["h.0.attn.c_attn"].module == "transformer.h.0.attn.c_attn"
    assert layers["wte"].embedding and layers["wte"].module == "transformer.wte" and not layers["wte"].transposed
    assert "h.0.attn.c_attn.bias" in found.kept and "wpe.weight" in found.kept and found.skip == ()
    assert plan(open_source(tmp_path)).skip == ("lm_head",)


def test_a_tied_head_is_its_embedding(tied: Path) -> None:
    found = plan(open_source(tied), head=True)
    assert found.tied and [x.name for x in found.layers if x.embedding] == ["model.embed_tokens"]
    assert not any(layer.embedding for layer in plan(open_source(tied)).layers)


def test_a_second_copy_of_a_tied_head_is_left_out_only_if_it_is_one(tied: Path) -> None:
    rewrite(tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert plan(open_source(tied), head=True).dropped == ("lm_head.weight",)
    assert "lm_head.weight" in plan(open_source(tied)).kept
    rewrite(tied, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match=r"ties the head to the embedding, but .* differ"):
        plan(open_source(tied), head=True)


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(tied: Path) -> None:
    config = tied / "config.json"
    for changes, words in (
        ({"tie_word_embeddings": False}, r"found no lm_head\.weight"),
        (
            {"tie_word_embeddings": True, "intermediate_size": 65},
            r"has the shape \(64, 32\), config\.json says \(65, 32\)",
        ),
        ({"intermediate_size": "many"}, "does not describe a model"),
        ({"intermediate_size": 64, "architectures": ["LlamaForSequenceClassification"]}, "expected a causal language"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "expected a causal language model"),
        ({"model_type": "no_such"}, "'no_such', which transformers .* does not have"),
    ):
        folders.edit(config, **changes)
        with pytest.raises(UserError, match=words):
            plan(open_source(tied))


def test_names_of_another_program_are_shown_beside_those_that_were_expected(tied: Path) -> None:
    def renamed(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace("model.layers", "_orig_mod.blocks")] = tensors.pop(name)

    rewrite(tied, renamed)
    with pytest.raises(UserError, match=r"found such as _orig_mod\.blocks\.0.*expected such as model\.layers\.0"):
        plan(open_source(tied))


def test_weights_that_are_numbers_of_another_kind_are_refused(tied: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(tied, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(UserError, match=r"up_proj\.weight holds int8, expected numbers of 16 or 32 bits"):
        plan(open_source(tied))


def test_experts_are_kept_and_told_of(tmp_path: Path) -> None:
    folders.write(tmp_path, kind="mixtral")
    found = plan(open_source(tmp_path))
    assert {layer.name.rpartition(".")[2] for layer in found.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert any(".experts." in name for name in found.kept)
    assert len(found.warnings) == 1 and "expert weights" in found.warnings[0]
