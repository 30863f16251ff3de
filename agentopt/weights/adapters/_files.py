"""LoRA factors as peft, transformers and vLLM store them."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentopt.errors import UserError
from agentopt.weights import _peft_files

_PREFIX = "base_model.model."
# Each changes what the layer computes, or the base's weights at load time.
_UNSUPPORTED = ("use_dora", "use_qalora", "lora_bias", "layer_replication", "alora_invocation_tokens")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class Factors:
    """One layer of a stored adapter."""

    a: Any
    """(rank, in)"""
    b: Any
    """(out, rank)"""
    alpha: float

    @property
    def rank(self) -> int:
        """Columns of the factors."""
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank


def save(folder: str | Path, model: Any, layers: dict[str, Any], copy: int) -> Path:
    """Write one adapter of these layers."""
    tensors: dict[str, Any] = {}
    for name, layer in layers.items():
        for factor in ("lora_A", "lora_B"):
            value: Any = getattr(layer, factor)
            # A copy of its own: a slice would write the storage of all of them.
            tensors[f"{_PREFIX}{name}.{factor}.weight"] = (value if value.dim() == 2 else value[copy]).detach().clone()
    return _peft_files.write(folder, tensors, _config(model, layers))


def _config(model: Any, layers: dict[str, Any]) -> dict[str, Any]:
    from agentopt.weights.adapters._layer import is_conv

    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    first: Any = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _peft_files.base_name(model),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": float(getattr(first.dropout, "p", 0.0)),
        "target_modules": _targets(model, layers),
        "fan_in_fan_out": any(is_conv(layer.base) for layer in layers.values()),
        "bias": "none",
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
    }


def _targets(model: Any, layers: dict[str, Any]) -> list[str]:
    """The short names when they mean exactly these layers, else the whole names."""
    short = {name.rpartition(".")[2] for name in layers}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if meant == set(layers) else layers)


def load(folder: str | Path) -> dict[str, Factors]:
    """The stored adapter, layer by layer.

    Raises:
        UserError: it holds something that `LoraLinear` does not compute.
    """
    tensors, config = _peft_files.read(folder, "LORA")
    _check(folder, config)
    pairs: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, _, factor = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if factor not in ("lora_A", "lora_B") or tensor.dim() != 2:
            raise UserError(f"adapter {str(folder)!r}: found the tensor {key!r}, expected lora_A and lora_B alone.")
        pairs.setdefault(name, {})[factor] = tensor
    found: dict[str, Factors] = {}
    for name, pair in pairs.items():
        if len(pair) != 2 or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            raise UserError(f"adapter {str(folder)!r}: the factors of {name} do not fit each other, or one is missing.")
        rank = int(pair["lora_A"].shape[0])
        alpha = float(_pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8)))
        # Rank-stabilised LoRA divides by the root of the rank (arXiv 2312.03732): the same with another alpha.
        found[name] = Factors(pair["lora_A"], pair["lora_B"], alpha * math.sqrt(rank) if _rooted(config) else alpha)
    if not found:
        raise UserError(f"adapter {str(folder)!r}: holds no factors.")
    return found


def _rooted(config: dict[str, Any]) -> bool:
    return bool(config.get("use_rslora"))


def _check(folder: str | Path, config: dict[str, Any]) -> None:
    for option in _UNSUPPORTED:
        if config.get(option):
            raise UserError(f"adapter {str(folder)!r}: uses {option}, expected plain LoRA.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise UserError(
            f"adapter {str(folder)!r}: init_lora_weights {start!r} changes the base model; convert it to plain LoRA "
            "when saving with peft (path_initial_model_for_weight_conversion)."
        )


def _pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value for this layer; a key is a regular expression for the layer's whole name or for the end of it."""
    for key, value in patterns.items():
        try:
            if re.fullmatch(rf"(.*\.)?({key})", name):
                return value
        except re.error as error:
            raise UserError(f"adapter: the pattern {key!r} in its configuration is no regular expression.") from error
    return default
