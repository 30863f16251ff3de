"""A model folder and adapters for it, written byte by byte: no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentopt.errors import UserError
from agentopt.serving.adapters import BaseFacts, BaseHashes, check_adapter

WIDTH, WIDE = 8, 16
LAYERS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "mlp.up_proj": (WIDE, WIDTH),
    "mlp.down_proj": (WIDTH, WIDE),
}
"""(out, in)"""


def write(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    """A safetensors file."""
    header: dict[str, Any] = {}
    place = 0
    for name, values in tensors.items():
        kind = {"float32": "F32", "float16": "F16", "uint16": "BF16", "uint8": "U8", "int64": "I64"}[values.dtype.name]
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [place, place + values.nbytes]}
        place += values.nbytes
    return raw(path, json.dumps(header).encode(), b"".join(values.tobytes() for values in tensors.values()))


def raw(path: Path, header: bytes, rest: bytes, *, length: int | None = None) -> Path:
    """The same from its parts."""
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + rest)
    return path


def base_folder(folder: Path, *, kind: str = "llama", packed: bool = False, blocks: int = 2) -> Path:
    """A model whose weights are zeros."""
    folder.mkdir(parents=True)
    tensors: dict[str, np.ndarray[Any, Any]] = {"model.embed_tokens.weight": np.zeros((5, WIDTH), np.float32)}
    for block in range(blocks):
        for name, shape in LAYERS.items():
            layer = f"model.layers.{block}.{name}"
            tensors[f"{layer}.{'qweight' if packed else 'weight'}"] = np.zeros(
                shape, np.uint8 if packed else np.float32
            )
            if packed:
                tensors[f"{layer}.weight_scale"] = np.ones((shape[0], 1), np.float32)
        tensors[f"model.layers.{block}.input_layernorm.weight"] = np.ones(WIDTH, np.float32)
    tensors["lm_head.weight"] = np.zeros((5, WIDTH), np.float32)
    write(folder / "model.safetensors", tensors)
    config: dict[str, Any] = {"model_type": kind}
    if packed:
        config["quantization_config"] = {"quant_method": "rf8"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def base(folder: Path, *, max_rank: int = 8, **options: Any) -> BaseFacts:
    """The same, read."""
    return BaseFacts.of(base_folder(folder, **options), max_rank)


def factors(rank: int = 2, *, names: tuple[str, ...] = ("self_attn.q_proj",), value: float = 0.5) -> dict[str, Any]:
    """Tensors of an adapter for both blocks."""
    found: dict[str, Any] = {}
    for block in range(2):
        for name in names:
            out, inner = LAYERS[name]
            key = f"base_model.model.model.layers.{block}.{name}"
            found[f"{key}.lora_A.weight"] = np.full((rank, inner), value, np.float32)
            found[f"{key}.lora_B.weight"] = np.full((out, rank), value, np.float32)
    return found


def adapter(
    folder: Path, tensors: Mapping[str, Any] | None = None, *, card: Mapping[str, Any] | None = None, **config: Any
) -> Path:
    """An adapter folder as peft writes it; `card` is its fold.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "adapter_model.safetensors", factors() if tensors is None else tensors)
    held = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(held), encoding="utf-8")
    if card is not None:
        (folder / "fold.json").write_text(json.dumps(card), encoding="utf-8")
    return folder


def assert_refused(folder: Path, known: BaseFacts, says: str, *, hashes: BaseHashes | None = None) -> None:
    """It is refused with one sentence that says this."""
    with pytest.raises(UserError) as caught:
        check_adapter(folder, known, hashes=hashes)
    text = str(caught.value)
    assert says in text, text
    assert "\n" not in text, text
    assert len(text) < 500, text
