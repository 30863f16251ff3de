"""How vLLM holds and multiplies our weights. Imports vLLM and registers on import: only `vllm_plugin.register` does it.

One byte per weight is loaded into `qweight`, a float32 per row into `weight_scale`, and with several books a byte per
row into `book_id`. Everything but the codes' columns goes by rows: layers that vLLM fuses (q, k, v; gate, up) and
tensor-parallel shards of rows stack, shards of columns split the codes alone. After loading the numbers are checked;
then a GPU keeps the codes, and every other platform decodes them once into a plain `weight` (a table look-up per step
is many times slower there than reading the wide weights).

Written against vLLM 0.32; what differs between versions is asked of the classes, not of the version.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from agentopt.errors import UserError
from agentopt.weights.gg import _tables, kernels
from agentopt.weights.gg._checkpoint import BOOK, CODES, METHOD, SCALE, Checkpoint
from agentopt.weights.gg._vllm_names import Layers, stored_layers


def _vllm(module: str) -> Any:
    return importlib.import_module(f"vllm.{module}")


_base = _vllm("model_executor.layers.quantization.base_config")
_embedding = _vllm("model_executor.layers.vocab_parallel_embedding")
_linear = _vllm("model_executor.layers.linear")
_parameter = _vllm("model_executor.parameter")
_quantization = _vllm("model_executor.layers.quantization")
_config = _vllm("config")

NOT_LOADED = 0x80
"""What codes are before loading, in the formats of a formula: minus zero, which no encoder writes."""


# --- which layers are ours -------------------------------------------------------------------------------------------


@_quantization.register_quantization_config(METHOD)
class RF8Config(_base.QuantizationConfig):
    """What `quantization_config` in config.json says, and which of vLLM's layers are therefore ours."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]  # of vLLM
        self.checkpoint = checkpoint
        self.layers: Layers | None = None
        self._tables: dict[torch.device, Tensor] = {}

    def __repr__(self) -> str:
        return f"RF8Config(format={self.checkpoint.format}, books={len(self.checkpoint.books)})"

    def get_name(self) -> str:
        """The quantization's name in vLLM."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Number formats of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere: the kernels multiply in bfloat16. Not asked on a CPU."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RF8Config:
        """Read `quantization_config`.

        Raises:
            ValueError: it is not one of ours, or of a newer version.
        """
        return cls(_checkpoint(config))

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, *_: Any, **__: Any) -> None:
        """Take no other checkpoint over; refuse a bad one of ours here, before any process is started for it."""
        if isinstance(hf_quant_cfg, dict) and hf_quant_cfg.get("quant_method") == METHOD:  # pyright: ignore[reportUnknownMemberType]
            _checkpoint(hf_quant_cfg)  # pyright: ignore[reportUnknownArgumentType]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Learn the names that the model has in vLLM."""
        self._layers().rename(hf_to_vllm_mapper.apply_list)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Our method for what is stored as codes; for the rest vLLM's own."""
        layers = self._layers()
        if isinstance(layer, _embedding.VocabParallelEmbedding):
            head = isinstance(layer, _embedding.ParallelLMHead)
            ours = self.checkpoint.head and prefix not in layers.plain
            ours = ours and (self._tied() or (head and layers.quantized(prefix or "lm_head")))
            return RF8EmbeddingMethod(self, prefix or "the embedding") if ours else None
        if isinstance(layer, _linear.LinearBase):
            ours = layers.quantized(prefix, self.packed_modules_mapping)
            return RF8LinearMethod(self, prefix) if ours else _linear.UnquantizedLinearMethod()
        before, experts, _ = f"{prefix}.".partition(".experts.")
        if experts and layers.inside(f"{before}.experts"):
            raise ValueError(
                f"{prefix}: found quantized experts, expected experts as they were: this plug-in has no kernel for "
                "them. Quantize again with `experts` skipped."
            )
        return None

    def table(self, device: torch.device) -> Tensor:
        """The value of every code, (books, 256) float32: one tensor for all layers."""
        if device not in self._tables:
            books = [[*book, 0.0][:256] for book in self.checkpoint.books]
            found = _tables.table(self.checkpoint.format, torch.tensor(books) if books else None)
            self._tables[device] = found.to(device)
        return self._tables[device]

    def _layers(self) -> Layers:
        if self.layers is None:
            model = _config.get_current_vllm_config().model_config
            self.layers = Layers(self.checkpoint.skip, *stored_layers(str(model.model)))
        return self.layers

    def _tied(self) -> bool:
        config = _config.get_current_vllm_config().model_config.hf_config
        return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def _checkpoint(config: dict[str, Any]) -> Checkpoint:
    try:
        return Checkpoint.from_dict(config)
    except UserError as wrong:
        raise ValueError(str(wrong)) from wrong  # vLLM shows a ValueError of a config as one sentence


# --- what they hold and compute --------------------------------------------------------------------------------------


class _Method:
    """What linear layers and the head have in common; `plain` is vLLM's method for a layer that is not quantized."""

    plain: Any

    def __init__(self, config: RF8Config, name: str) -> None:
        self.config, self.name = config, name
        self.format = config.checkpoint.format
        self.books = len(config.checkpoint.books)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Room for the rows and columns that this rank loads."""
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        empty = 255 if self.format == "rf8-gg" else NOT_LOADED
        layer.rf8_dtype, layer.rf8_packed, layer.rf8_tied = params_dtype, False, ()
        loader = functools.partial(_checked, extra_weight_attrs["weight_loader"], self.name, layer)
        layer.register_parameter(
            CODES,
            _parameter.ModelWeightParameter(
                data=torch.full((rows, columns), empty, dtype=torch.uint8),
                input_dim=1,
                output_dim=0,
                weight_loader=loader(CODES, (torch.uint8, input_size)),
            ),
        )
        of_rows: list[tuple[str, Tensor]] = [(SCALE, torch.full((rows, 1), torch.nan, dtype=torch.float32))]
        if self.books > 1:
            of_rows.append((BOOK, torch.zeros(rows, 1, dtype=torch.uint8)))
        for name, data in of_rows:
            made = _parameter.ChannelQuantScaleParameter(
                data=data, output_dim=0, weight_loader=loader(name, (data.dtype, 1))
            )
            layer.register_parameter(name, made)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded; then keep it for the kernels, or decode it.

        Raises:
            ValueError: codes, scales or books that no encoder writes, or that are missing.
        """
        if not hasattr(layer, CODES) or layer.rf8_packed:
            return
        codes, scale, book = layer.qweight.data, layer.weight_scale.data, getattr(layer, BOOK, None)
        book = None if book is None else book.data
        # Rows that vLLM adds to fill a vocabulary up are zeros, scale included: they decode to zeros.
        rows = int(getattr(layer, "num_org_embeddings_per_partition", len(codes)))
        levels = [len(book) for book in self.config.checkpoint.books]
        _validate(self.name, codes[:rows], scale[:rows], None if book is None else book[:rows], levels)
        table = self.config.table(codes.device)
        _forget(layer)
        if not kernels.usable(codes.new_empty((1, codes.shape[1]), dtype=layer.rf8_dtype)):
            weight = kernels.decode(codes, scale, table, book, dtype=layer.rf8_dtype, format=self.format)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.plain.process_weights_after_loading(layer)
            return
        layer.rf8_packed = True
        layer.qweight = nn.Parameter(codes.contiguous(), requires_grad=False)
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)
        layer.book_id = None if book is None else nn.Parameter(book, requires_grad=False)
        layer.register_buffer("rf8_table", table, persistent=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x W^T + bias`, (..., rows of this rank) in the type of `x`."""
        if not layer.rf8_packed:
            return self.plain.apply(layer, x, bias)
        return kernels.linear(
            x, layer.qweight, layer.weight_scale, layer.rf8_table, layer.book_id, bias, format=self.format
        )


@_linear.register_weight_loader_v2_supported_method
class RF8LinearMethod(_Method, _linear.LinearMethodBase):
    """A linear layer of codes. Its class's name is on vLLM's list: without that its parameters would be cut wrongly."""

    def __init__(self, config: RF8Config, name: str) -> None:
        super().__init__(config, name)
        self.plain = _linear.UnquantizedLinearMethod()


class RF8EmbeddingMethod(_Method, _base.QuantizeMethodBase):
    """An output head of codes, or the embedding that a head is tied to."""

    def __init__(self, config: RF8Config, name: str) -> None:
        super().__init__(config, name)
        self.plain = _embedding.UnquantizedEmbeddingMethod()

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        """Room for the rows and columns that this rank loads."""
        super().create_weights(layer, *sizes, **more)
        if not hasattr(_base.QuantizeMethodBase, "tie_weights"):  # an older vLLM ties `weight` without asking
            layer.tie_weights = functools.partial(self.tie_weights, layer)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """The rows of these tokens, decoded."""
        if not layer.rf8_packed:
            return self.plain.embedding(layer, input_)
        book = 0 if layer.book_id is None else layer.book_id[input_].long()
        return (layer.rf8_table[book, layer.qweight[input_].long()] * layer.weight_scale[input_]).to(layer.rf8_dtype)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let the head read the embedding's tensors."""
        for name in (CODES, SCALE, BOOK):
            if hasattr(embed_tokens, name):
                setattr(layer, name, getattr(embed_tokens, name))
        layer.rf8_tied = (embed_tokens,)  # in a tuple: not a module of the head
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """As for a linear layer; a tied head takes what its embedding has become."""
        for owner in layer.rf8_tied:
            owner.quant_method.process_weights_after_loading(owner)
            _forget(layer)
            if not owner.rf8_packed:
                layer.weight = owner.weight
                self.plain.process_weights_after_loading(layer)
                return
            layer.qweight, layer.weight_scale, layer.book_id = owner.qweight, owner.weight_scale, owner.book_id
            layer.register_buffer("rf8_table", owner.rf8_table, persistent=False)
            layer.rf8_packed, layer.weight = True, owner.weight
            return
        super().process_weights_after_loading(layer)
        if layer.rf8_packed:
            # LoRA asks an embedding for the device of its `weight`.
            none = torch.empty(0, dtype=layer.rf8_dtype, device=layer.qweight.device)
            layer.weight = nn.Parameter(none, requires_grad=False)


def _forget(layer: Any) -> None:
    for name in (CODES, SCALE, BOOK):
        if hasattr(layer, name):
            delattr(layer, name)


def _checked(
    loader: Callable[..., Any], name: str, layer: Any, tensor: str, expected: tuple[torch.dtype, int]
) -> Callable[..., Any]:
    """The loader of a parameter, which would convert other types and cut off rows that are too many."""

    @functools.wraps(loader)
    def load(param: Any, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        shard = args[0] if args else kwargs.get("loaded_shard_id")
        rows = _rows(layer, shard)
        wanted = (rows or int(loaded_weight.shape[0]) if loaded_weight.ndim else rows, expected[1])
        if loaded_weight.dtype != expected[0] or tuple(loaded_weight.shape) != wanted:
            raise ValueError(
                f"{name}{'' if shard is None else f' ({shard})'}: {tensor}: found {loaded_weight.dtype} "
                f"{tuple(loaded_weight.shape)}, expected {expected[0]} {wanted}: the checkpoint is damaged."
            )
        return loader(param, loaded_weight, *args, **kwargs)

    return load


def _rows(layer: Any, shard: object) -> int | None:
    """Rows on disk of a layer, or of what is fused into it; None where vLLM alone knows."""
    if shard in ("q", "k", "v"):
        heads = layer.total_num_heads if shard == "q" else layer.total_num_kv_heads
        return int(heads * (getattr(layer, "v_head_size", layer.head_size) if shard == "v" else layer.head_size))
    if isinstance(shard, int):
        return int(layer.output_sizes[shard])
    if shard is not None or hasattr(layer, "total_num_kv_heads"):
        return None
    return int(getattr(layer, "org_vocab_size", layer.output_size))


def _validate(name: str, codes: Tensor, scale: Tensor, book: Tensor | None, levels: list[int]) -> None:
    """Refuse what no encoder writes, and what was never loaded. `levels`: of every book; empty for a formula."""
    if not codes.numel():
        return
    _refuse(name, SCALE, scale, ~(scale.isfinite() & (scale > 0)), "a finite number above 0")
    limit = torch.tensor(levels or [256], device=codes.device)
    if book is not None:
        _refuse(name, BOOK, book, book >= len(limit), f"a book below {len(limit)}")
        limit = limit[book[:, 0].long()]
    low, high = torch.aminmax(codes, dim=1)
    _refuse(name, CODES, high, high >= limit, "codes below the number of the book's levels")
    if not levels:
        _refuse(name, CODES, high, (low == NOT_LOADED) & (high == NOT_LOADED), "codes of a row that was loaded")


def _refuse(name: str, tensor: str, values: Tensor, wrong: Tensor, expected: str) -> None:
    if bool(wrong.any()):
        row = int(wrong.flatten().nonzero()[0, 0])
        raise ValueError(
            f"{name}: {tensor}: found {values.flatten()[row].item()} in row {row}, expected {expected}: the "
            "checkpoint is damaged, or lacks this tensor. Quantize the model again."
        )
