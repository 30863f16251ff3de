"""Tensor-parallel shards of quantized layers, cut by vLLM's own loaders: together they are the whole layer."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agentopt.weights.gg import _codec, kernels, vllm_plugin
from agentopt.weights.gg._checkpoint import Checkpoint

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-serve"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]

WIDTH, HEADS, KEYS, SIZE, WORDS = 64, 4, 2, 16, 90
LAYERS = "vllm.model_executor.layers."


@pytest.fixture(scope="module")
def methods() -> Any:
    vllm_plugin.register()
    return importlib.import_module("agentopt.weights.gg._vllm_method")


@pytest.fixture(params=[1, 2, 4], ids="of {}".format)
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The `rank` that vLLM's layers are told they are made on, and how many there are."""
    told = SimpleNamespace(rank=0, ranks=request.param)
    for name in (f"{LAYERS}linear", f"{LAYERS}vocab_parallel_embedding", "vllm.model_executor.parameter"):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: told.rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: told.ranks)
    config: Any = importlib.import_module("vllm.config")
    with config.set_current_vllm_config(config.VllmConfig()):
        yield told


def encoded(rows: int, columns: int = WIDTH, seed: int = 0) -> tuple[dict[str, Any], Any]:
    """The tensors of a file in rf8-gg with several books, and the weight that they stand for."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[::2] **= 3
    found = _codec.encode(weight, "rf8-gg")
    assert found.book_id is not None
    assert len(found.book_id.unique()) > 1
    return {"qweight": found.codes, "weight_scale": found.scale, "book_id": found.book_id}, _codec.decode(found)


def config(methods: Any, head: bool = False, tied: bool = False) -> Any:
    books = _codec.encode(torch.ones(1, 1)).books
    assert books is not None
    found = methods.RF8Config(
        Checkpoint("rf8-gg", books=tuple(tuple(book[:255].tolist()) for book in books), skip=(), head=head)
    )
    found.layers = methods.Layers(())
    found._tied = lambda: tied
    return found


def load(layer: Any, parts: dict[Any, dict[str, Any]]) -> None:
    """As a model's `load_weights` does: a shard is named where the layer is fused of several."""
    for shard, tensors in parts.items():
        for name, tensor in tensors.items():
            param = getattr(layer, name)
            param.weight_loader(param, tensor, *(() if shard is None else (shard,)))
    layer.quant_method.process_weights_after_loading(layer)


def made(methods: Any, kind: str, quantization: Any) -> Any:
    linear: Any = importlib.import_module(f"{LAYERS}linear")
    more = {"bias": False, "quant_config": quantization, "prefix": f"layers.0.{kind}", "params_dtype": torch.float32}
    if kind == "qkv":
        layer = linear.QKVParallelLinear(WIDTH, SIZE, HEADS, KEYS, **more)
    elif kind == "merged":
        layer = linear.MergedColumnParallelLinear(WIDTH, [48, 80], **more)
    elif kind == "column":
        layer = linear.ColumnParallelLinear(WIDTH, 48, **more)
    elif kind == "row":
        layer = linear.RowParallelLinear(WIDTH, 48, reduce_results=False, **more)
    else:
        layer = linear.ReplicatedLinear(WIDTH, 48, **more)
    assert isinstance(layer.quant_method, methods.RF8LinearMethod)
    return layer


def output(layer: Any, x: Any) -> Any:
    return layer.quant_method.apply(layer, x)


@pytest.mark.parametrize("packed", [False, True], ids=["decoded", "packed"])
def test_all_kinds_of_linear_layers(methods: Any, ranks: Any, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "usable", lambda tensor: packed)
    quantization = config(methods)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(9))
    q, k, v = (encoded(heads * SIZE, seed=seed) for seed, heads in enumerate((HEADS, KEYS, KEYS)))
    gate, up, plain = encoded(48, seed=4), encoded(80, seed=5), encoded(48, seed=6)
    found: dict[str, list[Any]] = {}
    for rank in range(ranks.ranks):
        ranks.rank = rank
        for kind, parts in (
            ("qkv", {"q": q[0], "k": k[0], "v": v[0]}),
            ("merged", {0: gate[0], 1: up[0]}),
            ("column", {None: plain[0]}),
            ("row", {None: plain[0]}),
            ("replicated", {None: plain[0]}),
        ):
            layer = made(methods, kind, quantization)
            load(layer, parts)
            cut = WIDTH // ranks.ranks
            mine = x[:, rank * cut : (rank + 1) * cut] if kind == "row" else x
            found.setdefault(kind, []).append(output(layer, mine))
    for rank, outputs in enumerate(found["qkv"]):
        sizes = [HEADS // ranks.ranks * SIZE, *[max(1, KEYS // ranks.ranks) * SIZE] * 2]
        for weight, part, heads in zip((q, k, v), outputs.split(sizes, 1), (HEADS, KEYS, KEYS), strict=True):
            # With more ranks than keys, several ranks hold the same ones.
            place = rank if heads == HEADS else rank * min(KEYS, ranks.ranks) // ranks.ranks
            rows = slice(place * part.shape[1], (place + 1) * part.shape[1])
            torch.testing.assert_close(part, x @ weight[1][rows].T)
    halves = [outputs.split([48 // ranks.ranks, 80 // ranks.ranks], 1) for outputs in found["merged"]]
    torch.testing.assert_close(torch.cat([half[0] for half in halves], 1), x @ gate[1].T)
    torch.testing.assert_close(torch.cat([half[1] for half in halves], 1), x @ up[1].T)
    torch.testing.assert_close(torch.cat(found["column"], 1), x @ plain[1].T)
    torch.testing.assert_close(sum(found["row"]), x @ plain[1].T)
    for outputs in found["replicated"]:
        torch.testing.assert_close(outputs, x @ plain[1].T)


@pytest.mark.parametrize("packed", [False, True], ids=["decoded", "packed"])
def test_a_vocabulary_is_cut_and_filled_up(
    methods: Any, ranks: Any, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """90 rows are filled up to 128: the last of four ranks has none of its own. The head is tied to the embedding."""
    monkeypatch.setattr(kernels, "usable", lambda tensor: packed)
    vocabulary: Any = importlib.import_module(f"{LAYERS}vocab_parallel_embedding")
    quantization = config(methods, head=True, tied=True)
    tensors, weight = encoded(WORDS)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(9))
    ids = torch.arange(WORDS)
    rows: Any = 0
    logits: list[Any] = []
    for rank in range(ranks.ranks):
        ranks.rank = rank
        more = {"params_dtype": torch.float32, "quant_config": quantization}
        embedding = vocabulary.VocabParallelEmbedding(WORDS, WIDTH, **more)
        head = vocabulary.ParallelLMHead(WORDS, WIDTH, prefix="lm_head", **more).tie_weights(embedding)
        load(embedding, {None: tensors})
        head.quant_method.process_weights_after_loading(head)
        embedding.reduce_results = False
        rows = rows + embedding(ids)
        logits.append(output(head, x))
    torch.testing.assert_close(rows, weight)
    torch.testing.assert_close(torch.cat(logits, 1)[:, :WORDS], x @ weight.T)


def test_rows_that_do_not_belong_to_the_layer_are_refused(methods: Any, ranks: Any) -> None:
    """Without a word, vLLM's loaders would take the first rows of a tensor that has too many."""
    layer = made(methods, "qkv", config(methods))
    with pytest.raises(ValueError, match=r"layers.0.qkv \(k\): qweight: found .*\(48, 64\), expected .*\(32, 64\)"):
        load(layer, {"k": encoded(48)[0]})
