"""Prefix tuning (arXiv 2101.00190): virtual tokens whose keys and values, in every layer, are all that is trained.

    from agentopt.weights import prefix
    tuned = prefix.attach(model, tokens=5)      # a module that is called as the model is, `generate` too
    tuned.save("out")                           # a folder that peft loads

The prefix begins as the keys and values of real tokens (MeZO, arXiv 2305.17333). Importing this loads no torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from agentopt.errors import UserError
from agentopt.evaluation import seed_number
from agentopt.weights import _peft_files
from agentopt.weights.load import need

if TYPE_CHECKING:
    from agentopt.weights._prefix_module import Prefix as Prefix

__all__ = ["Prefix", "attach", "load"]

Init = Literal["activations", "random"]


def attach(model: Any, tokens: int = 5, seed: int = 0, init: Init = "activations") -> Prefix:
    """Freeze a model and put a prefix before everything it reads.

    Args:
        model: stays as it is, but frozen; call the result in its place.
        tokens: virtual tokens.
        seed: of the real tokens, or of the numbers.
        init: `"activations"` starts from what the model itself computes for `tokens` tokens of its vocabulary drawn at
            random; `"random"` from normal numbers of standard deviation 0.02.

    Raises:
        UserError: a number out of range, or a model whose layers do not all cache keys and values of one shape.
    """
    torch = need("torch")
    if not isinstance(tokens, int) or tokens < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"prefix: tokens is {tokens!r}, expected a whole number of at least 1.")
    if init not in ("activations", "random"):
        raise UserError(f"prefix: init is {init!r}, expected 'activations' or 'random'.")
    draws = np.random.Generator(np.random.Philox(key=seed_number("prefix", seed)))
    words = draws.integers(0, model.get_input_embeddings().weight.shape[0], size=(1, tokens))
    start, heads = _activations(model, torch.from_numpy(words))
    if init == "random":
        numbers = draws.standard_normal(tuple(start.shape), dtype=np.float32) * np.float32(0.02)
        start = torch.from_numpy(numbers).to(start.device)
    from agentopt.weights._prefix_module import Prefix

    return Prefix(model, start, heads)


def load(model: Any, folder: str | Path) -> Prefix:
    """A prefix that a folder of peft (or of `Prefix.save`) holds.

    Raises:
        UserError: the folder cannot be read, or it does not fit the model.
    """
    tensors, _ = _peft_files.read(folder, "PREFIX_TUNING")
    stored = tensors.get("prompt_embeddings")
    tuned = attach(model, int(stored.shape[0]) if stored is not None else 1, init="random")
    try:
        tuned.load(folder)
    except UserError:
        tuned.detach_model()
        raise
    return tuned


def _activations(model: Any, words: Any) -> tuple[Any, int]:
    """Keys and values of these tokens as one float32 row per token, and the heads that they have."""
    torch = need("torch")
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            cache = model(
                input_ids=words.to(model.get_input_embeddings().weight.device), use_cache=True
            ).past_key_values
    finally:
        model.train(training)
    pairs = [
        (layer.keys, layer.values) for layer in getattr(cache, "layers", ()) if getattr(layer, "keys", None) is not None
    ]
    shapes = {tuple(part.shape) for pair in pairs for part in pair}
    if len(shapes) != 1 or len(pairs) != model.config.get_text_config().num_hidden_layers:
        raise UserError(f"prefix: the layers of {type(model).__name__} do not all cache keys and values of one shape.")
    # Each part is (1, heads, tokens, size).
    rows = [part[0].transpose(0, 1).reshape(words.shape[1], -1) for pair in pairs for part in pair]
    return torch.cat(rows, dim=1).float(), int(pairs[0][0].shape[1])


def __getattr__(name: str) -> object:
    if name == "Prefix":
        need("torch")
        return importlib.import_module("agentopt.weights._prefix_module").Prefix
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
