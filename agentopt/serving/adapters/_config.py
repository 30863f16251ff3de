"""`adapter_config.json`: what may stand there, and what an engine would compute otherwise than it says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LARGEST_CONFIG = 1 << 20
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "a bias in its factors",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "factors for parameters that are no layers",
    "megatron_config": "Megatron's layers",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What of an adapter's configuration decides what it computes."""

    rank: int
    alpha: float
    rooted: bool
    """Divides by the root of the rank (arXiv 2312.03732)."""
    targets: tuple[str, ...] | str
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def rank_of(self, layer: str) -> int:
        """The rank that the configuration gives a layer."""
        return _match(self.ranks, layer, self.rank)

    def to_dict(self, layers: list[str]) -> dict[str, Any]:
        """As an engine gets it: nothing but what was checked.

        Short names for the layers: of whole ones, vLLM leaves out every layer that it packs.
        """
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha.is_integer() else self.alpha,
            "lora_dropout": 0.0,
            "use_rslora": self.rooted,
            "bias": "none",
            "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
            "rank_pattern": dict(self.ranks),
            "alpha_pattern": dict(self.alphas),
        }


def read_config(folder: Path, text: bytes) -> LoraConfig:
    """Read and check a configuration.

    Raises:
        UserError: it is no LoRA adapter's, or one that asks for more than plain LoRA.
    """
    held = _object(folder, text)
    kind = held.get("peft_type")
    if kind != "LORA":
        raise UserError(_wrong(folder, f"peft_type is {kind!r:.60}, expected 'LORA'"))
    _refuse(folder, held)
    rank = _whole(folder, "r", held.get("r"))
    alpha = _number(folder, "lora_alpha", held.get("lora_alpha", 8))
    targets: Any = held.get("target_modules") or ()
    if not isinstance(targets, str) and not _names(targets):
        raise UserError(_wrong(folder, "target_modules is no list of names"))
    ranks = {key: _whole(folder, f"rank_pattern of {key}", one) for key, one in _patterns(folder, held, "rank_pattern")}
    alphas = {
        key: _number(folder, f"alpha_pattern of {key}", one) for key, one in _patterns(folder, held, "alpha_pattern")
    }
    named = targets if isinstance(targets, str) else tuple(targets)
    return LoraConfig(rank, alpha, bool(held.get("use_rslora")), named, ranks, alphas)


def _object(folder: Path, text: bytes) -> dict[str, Any]:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(_wrong(folder, "it is not JSON")) from None
    if not isinstance(found, dict):
        raise UserError(_wrong(folder, "it holds no JSON object"))
    return cast("dict[str, Any]", found)


def _refuse(folder: Path, held: Mapping[str, Any]) -> None:
    for option, what in _REFUSED.items():
        if held.get(option):
            raise UserError(_wrong(folder, f"it uses {what} ({option}), expected plain LoRA"))
    saved = held.get("modules_to_save")
    if saved:
        raise UserError(_wrong(folder, f"modules_to_save is {saved!r:.80}: whole layers are not loaded as an adapter"))
    if held.get("bias", "none") != "none":
        raise UserError(_wrong(folder, f"bias is {held['bias']!r:.40}, expected 'none'"))
    start = held.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        how = "convert it to plain LoRA when saving with peft (path_initial_model_for_weight_conversion)"
        raise UserError(_wrong(folder, f"init_lora_weights {start!r:.40} changes the base model; {how}"))


def _patterns(folder: Path, held: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    found: Any = held.get(key) or {}
    if not isinstance(found, dict):
        raise UserError(_wrong(folder, f"{key} is no JSON object"))
    entries = list(cast("dict[str, Any]", found).items())
    for name, _ in entries:
        # Engines read a key as a regular expression: of names with dots alone, none takes for ever to match.
        if len(name) > 256 or not re.fullmatch(r"[\w.\\^$-]*", name):
            raise UserError(_wrong(folder, f"{key} has the key {name!r:.60}, expected names of layers"))
        try:
            re.compile(name)
        except re.error:
            raise UserError(_wrong(folder, f"{key} has the key {name!r:.60}, which is no name of a layer")) from None
    return entries


def _match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    for key, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({key})", name):
            return value
    return default


def _whole(folder: Path, key: str, found: Any) -> int:
    if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= 1 << 16:
        raise UserError(_wrong(folder, f"{key} is {found!r:.60}, expected a whole number of at least 1"))
    return found


def _number(folder: Path, key: str, found: Any) -> float:
    whole = isinstance(found, int | float) and not isinstance(found, bool)
    if not whole or not abs(found) < 1e9 or not math.isfinite(found):
        raise UserError(_wrong(folder, f"{key} is {found!r:.60}, expected a finite number"))
    return float(found)


def _names(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(one, str) for one in cast("list[object]", found))


def _wrong(folder: Path, why: str) -> str:
    return f"adapter {str(folder)!r}: {CONFIG}: {why}."
