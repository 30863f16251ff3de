"""As much of vLLM as the plug-in touches, so that it can be tested where vLLM is not installed."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

METHODS = "agentopt.weights.gg._vllm_method"


class Parameter(nn.Parameter):
    """Both kinds of parameter: they keep what they were made with."""

    def __new__(cls, data: Tensor, **kept: Any) -> Parameter:
        return super().__new__(cls, data, requires_grad=False)  # pyright: ignore[reportReturnType]

    def __init__(self, data: Tensor, **kept: Any) -> None:
        for name, value in kept.items():
            setattr(self, name, value)


class Base:
    packed_modules_mapping: dict[str, list[str]]

    def __init__(self) -> None:
        self.packed_modules_mapping = {}


class MethodBase:
    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        raise NotImplementedError


class Unquantized(MethodBase):
    """What an unquantized layer does; counts how often it was asked to pack its weight."""

    packed = 0

    def process_weights_after_loading(self, layer: Any) -> None:
        self.packed += 1

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, layer.weight, bias)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        return functional.embedding(input_, layer.weight)


class UnquantizedLinear(Unquantized):
    pass


class Linear(nn.Module):
    """A linear layer, whole or one that others are fused into; `rank` of `ranks` splits its rows."""

    def __init__(self, columns: int, *rows: int) -> None:
        super().__init__()
        self.output_sizes, self.output_size, self.columns = rows, sum(rows), columns

    def weight_loader(self, param: Any, loaded_weight: Tensor, loaded_shard_id: int | None = None) -> None:
        low = 0 if loaded_shard_id is None else sum(self.output_sizes[:loaded_shard_id])
        param.data[low : low + len(loaded_weight)] = loaded_weight

    def make(self, method: Any, dtype: torch.dtype = torch.float32) -> Any:
        """Ask the method for the parameters, as vLLM does when the model is built."""
        method.create_weights(
            self,
            self.columns,
            list(self.output_sizes),
            self.columns,
            self.output_size,
            dtype,
            weight_loader=self.weight_loader,
        )
        self.quant_method = method
        return self


class Embedding(Linear):
    """Its rows are filled up with zeros to a multiple of 64."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, -(-rows // 64) * 64)
        self.org_vocab_size = self.num_org_embeddings_per_partition = rows

    def weight_loader(self, param: Any, loaded_weight: Tensor, loaded_shard_id: int | None = None) -> None:
        param.data[: len(loaded_weight)] = loaded_weight
        param.data[len(loaded_weight) :] = 0


class Head(Embedding):
    pass


def load(layer: Any, tensors: dict[str, Tensor], shard: int | None = None) -> None:
    """Give every tensor to the loader of the parameter of its name."""
    for name, tensor in tensors.items():
        param = getattr(layer, name)
        param.weight_loader(param, tensor, *(() if shard is None else (shard,)))


def install(patch: pytest.MonkeyPatch, folder: str, *, tied: bool = False) -> SimpleNamespace:
    """Put the fake into `sys.modules`; gives its module of quantizations."""
    text = SimpleNamespace(tie_word_embeddings=tied)
    current = SimpleNamespace(
        model_config=SimpleNamespace(model=folder, hf_config=SimpleNamespace(get_text_config=lambda: text))
    )
    registry: dict[str, Any] = {}
    known = ["fp8"]

    def register(name: str) -> Any:
        def keep(cls: Any) -> Any:
            known.append(name)
            registry[name] = cls
            return cls

        return keep

    contents: dict[str, dict[str, Any]] = {
        "config": {"get_current_vllm_config": lambda: current},
        "model_executor.parameter": {"ModelWeightParameter": Parameter, "ChannelQuantScaleParameter": Parameter},
        "model_executor.layers.quantization": {
            "QUANTIZATION_METHODS": known,
            "register_quantization_config": register,
            "get_quantization_config": registry.__getitem__,
            "registry": registry,
        },
        "model_executor.layers.quantization.base_config": {
            "QuantizationConfig": Base,
            "QuantizeMethodBase": MethodBase,
        },
        "model_executor.layers.linear": {
            "LinearBase": Linear,
            "LinearMethodBase": MethodBase,
            "UnquantizedLinearMethod": UnquantizedLinear,
            "register_weight_loader_v2_supported_method": lambda cls: cls,
        },
        "model_executor.layers.vocab_parallel_embedding": {
            "VocabParallelEmbedding": Embedding,
            "ParallelLMHead": Head,
            "UnquantizedEmbeddingMethod": Unquantized,
        },
    }
    for name, values in contents.items():
        module = ModuleType(f"vllm.{name}")
        module.__dict__.update(values)
        patch.setitem(sys.modules, f"vllm.{name}", module)
    patch.delitem(sys.modules, METHODS, raising=False)
    return SimpleNamespace(**contents["model_executor.layers.quantization"])
