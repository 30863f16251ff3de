"""What transformers asks of a quantization method: its configuration, and the layers that it puts in place.

Importing this imports transformers. Written for 5.19 to 5.23; hooks that a version does not have are not called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from agentopt.errors import UserError
from agentopt.weights.gg import _hf_layers as layers
from agentopt.weights.gg._checkpoint import BOOK, CODES, METHOD, SCALE, VERSION, Checkpoint
from agentopt.weights.gg._codec import encode
from agentopt.weights.gg._guard import GUARD
from agentopt.weights.gg._hf_files import check_codes, survey
from agentopt.weights.gg._types import Format, Scale


class RF8Config(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint, or what `from_pretrained` is told to quantize to while it loads.

    Args:
        format: of the codes.
        keep_packed: decode at every call instead of keeping decoded weights: memory before speed. Not saved.
        modules_to_not_convert: linear layers to leave as they are: names, or dotted parts of names. While quantizing,
            the output head is added unless `head`.
        head: whether the head holds codes, and with it the embedding that it is tied to.
        scale: "channel" or "tensor_pow2".
        version: of the layout of the checkpoint.
        found: the other keys of config.json.

    Raises:
        UserError: an unknown version or format, or books that are none.
    """

    def __init__(
        self,
        format: Format = "rf8-gg",
        keep_packed: bool = False,
        modules_to_not_convert: Sequence[str] | None = None,
        head: bool = False,
        scale: Scale = "channel",
        version: int = VERSION,
        **found: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.keep_packed = keep_packed
        if format == "rf8-gg" and not found.get("codebooks") and "quant_method" not in found:
            found |= _default_books()
        found |= {"format": format, "head": head, "scale": scale, "version": version}
        self.checkpoint = Checkpoint.from_dict({**found, "modules_to_not_convert": modules_to_not_convert})

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What stands in config.json: nothing may be left out there.

        Raises:
            UserError: something is, or it is unknown.
        """
        Checkpoint.from_dict(config_dict)
        base: Any = super()
        return base.from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return self.checkpoint.to_dict()

    def get_loading_attributes(self) -> dict[str, Any]:
        """What an object that is given to `from_pretrained` changes about a checkpoint that is quantized already."""
        return {"keep_packed": self.keep_packed}


def _default_books() -> dict[str, Any]:
    from agentopt.weights.gg._books import NUS, default_books

    books: Any = default_books()[:, :255]
    return {
        "codebooks": books.tolist(),
        "book_grid": [None if nu == float("inf") else nu for nu in NUS],
    }


class RF8Quantizer(HfQuantizer):
    """Puts layers of codes into a model before its weights are read, and checks them afterwards."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        base: Any = super()
        base.__init__(quantization_config, **kwargs)
        self._config: RF8Config = quantization_config
        self._quantizes = not kwargs.get("pre_quantized", True)
        self._dtype: Any = torch.float32
        self._values = layers.tables_of(self.checkpoint)
        self._failed: UserError | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """What config.json says."""
        return self._config.checkpoint

    def update_attn_implementation(self, config: Any) -> Any:
        """Called with the model's config before the files are looked up: here the guard is taken away."""
        held = getattr(config, GUARD, None)
        if isinstance(held, str) and not held.endswith((".safetensors", ".safetensors.index.json")):
            delattr(config, GUARD)
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._dtype = kwargs.get("dtype") or torch.get_default_dtype()
        if self._quantizes:
            return self._choose(model)
        names = layers.linear_layers(model, self.checkpoint.skip)
        files = kwargs.get("checkpoint_files")
        tied = layers.embedding_of_head(model) if self.checkpoint.head else None
        if files:
            stored = survey(files)
            check_codes(stored, self.checkpoint)
            names = layers.check_layers(model, stored, names, model.config.architectures or [])
        several = len(self.checkpoint.books) > 1
        for name in names:
            self._put(model, name, layers.empty(model.get_submodule(name), several))
        if tied is not None:
            held = layers.empty(model.get_submodule(tied), several)
            self._put(model, tied, held)
            layers.tie(model, str(layers.head_of(model)), tied, held)
        if not any(layers.packed(model)):
            raise UserError(f"{type(model).__name__}: found no linear layer that holds codes; is this its checkpoint?")
        return model

    def _put(self, model: Any, name: str, held: dict[str, Any]) -> None:
        how: dict[str, Any] = {"format": self.checkpoint.format, "dtype": self._dtype}
        if isinstance(model.get_submodule(name), nn.Embedding):
            layers.put_embedding(model, name, held, self._values, **how)
        else:
            layers.put_linear(model, name, held, self._values, keep_packed=self._config.keep_packed, **how)
        model.get_submodule(name).pretend()

    # --- quantizing while loading ------------------------------------------------------------------------------------

    def _choose(self, model: Any) -> Any:
        """Settle what stays as it is."""
        head = layers.head_of(model)
        skip = list(self.checkpoint.skip)
        if not self.checkpoint.head and head is not None and head not in skip:
            skip = [head, *skip]
        self._config.checkpoint = dataclasses.replace(self.checkpoint, skip=tuple(skip))
        tied = layers.embedding_of_head(model) if self.checkpoint.head else None
        # A tied head becomes codes when its embedding is there.
        chosen = [name for name in layers.linear_layers(model, skip) if tied is None or name != head]
        self._chosen = {f"{name}.weight" for name in chosen}
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this weight becomes codes while the checkpoint is read."""
        return self._quantizes and param_name in self._chosen

    def get_quantize_ops(self) -> Any:
        """What transformers runs for each such weight."""
        return _Encode(self)

    def quantize(self, model: Any, name: str, weight: Any) -> dict[str, Any]:
        """Put codes of this weight (out, in) in the place of the layer; returns its tensors."""
        books = self._values if self.checkpoint.books else None
        found = encode(weight, self.checkpoint.format, scale=self.checkpoint.scale, books=books, name=f"{name}.weight")
        held = {CODES: found.codes, SCALE: found.scale.expand(weight.shape[0], 1).contiguous()}
        if found.book_id is not None:
            held[BOOK] = found.book_id
        self._put(model, name, held)
        return held

    # --- after loading -----------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._failed is not None:
            raise self._failed
        if self._quantizes and self.checkpoint.head:
            self._quantize_tied(model)
        layers.check_values(model, self.checkpoint)
        for _, module in layers.packed(model):
            module.reveal()
            for name in (CODES, SCALE, BOOK):
                if getattr(module, name) is not None:
                    getattr(module, name).requires_grad_(False)
            if hasattr(module, "decoded") and not module.keep_packed and module.qweight.device.type == "cpu":
                module.decoded(self._dtype)
        return model

    def _quantize_tied(self, model: Any) -> None:
        tied, head = layers.embedding_of_head(model), layers.head_of(model)
        if tied is None or head is None:
            return
        held = self.quantize(model, tied, model.get_submodule(tied).weight.detach())
        shared = {name: getattr(model.get_submodule(tied), name) for name in held}
        self._put(model, head, {name: tensor.detach() for name, tensor in shared.items()})
        for name, tensor in shared.items():
            setattr(model.get_submodule(head), name, tensor)
        layers.tie(model, head, tied, held)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        # Saving leaves the number type in the config as text.
        layers.unpack(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype or self._dtype)
        return model

    # --- what transformers wants to know -----------------------------------------------------------------------------

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`save_pretrained` writes a checkpoint of ours."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adapters on top can be trained; codes cannot."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile traces the layers."""
        return True


class _Encode(ConversionOps):
    """Turns the weight of one layer into codes, as soon as it is read."""

    def __init__(self, hf_quantizer: RF8Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Codes go straight into the model: nothing is left to be put there."""
        model, name = kwargs["model"], str(kwargs["full_layer_name"])
        value: Any = next(iter(input_dict.values()))
        weight: Any = cast("list[Any]", value)[0] if isinstance(value, list) else value
        layer = name.removesuffix(".weight")
        try:
            conv = layers.is_conv(model.get_submodule(layer))
            self.hf_quantizer.quantize(model, layer, weight.detach().mT if conv else weight.detach())
        except UserError as error:
            # transformers would turn it into a line of its report.
            self.hf_quantizer._failed = self.hf_quantizer._failed or error  # pyright: ignore[reportPrivateUsage]
        if kwargs.get("missing_keys") is not None:
            kwargs["missing_keys"].discard(name)
        return {}
