"""Model folders to quantize: small, and with the names and shapes of real ones."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from agentopt.weights._events import Event
from tests.weights.tiny import tiny


def write(folder: Path, *, kind: str = "llama", tied: bool = False, dtype: str = "float32", shard: str = "50GB") -> Any:
    """Write a random model with a tokenizer; returns the model."""
    import torch

    model, tokenizer = tiny()
    if kind != "llama" or tied:
        model = _other(kind, tied=tied, vocabulary=model.config.vocab_size)
    model = model.to(getattr(torch, dtype)).eval()
    with _no_bar():
        model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return model


def _other(kind: str, *, tied: bool, vocabulary: int) -> Any:
    import torch
    import transformers

    common: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 1}
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
    }
    few: dict[str, Any] = {**common, **sizes, "num_hidden_layers": 1, "num_local_experts": 2}
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: transformers.LlamaConfig(**common, **sizes, tie_word_embeddings=tied, pad_token_id=0),
        "gpt2": lambda: transformers.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "mixtral": lambda: transformers.MixtralConfig(**few),
    }
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return transformers.AutoModelForCausalLM.from_config(configs[kind]())


@contextlib.contextmanager
def _no_bar() -> Generator[None]:
    import transformers

    logging = transformers.utils.logging
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one away."""
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def stored(folder: Path) -> dict[str, Any]:
    """All tensors of a folder."""
    from safetensors.torch import load_file

    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


class Heard(list[Event]):
    """Events, kept."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    def of(self, kind: type[Any]) -> list[Any]:
        """Of one type."""
        return [event for event in self if isinstance(event, kind)]
