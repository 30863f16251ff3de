"""The model that is tuned, and which of its weights are.

full     all weights of the model
lora     float32 adapters beside the frozen (and maybe quantized) base
prefix   virtual tokens before the row
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentopt.errors import UserError
from agentopt.evaluation import seed_number
from agentopt.weights import load
from agentopt.weights.finetuning._options import FinetuneOptions
from agentopt.weights.load import need
from agentopt.weights.zeroth._fingerprint import fingerprint

_WORTH_COLLECTING = 1 << 26
"""Bytes from which on it pays to look for what nobody holds any more: that takes half a second."""


@dataclass
class Subject:
    """A loaded model with what is trained of it."""

    options: FinetuneOptions
    model: Any
    """What a forward pass calls."""
    inner: Any
    """The transformers model inside."""
    tokenizer: Any
    handle: Any
    """The attached adapter or prefix; None when all weights are tuned."""
    base_hash: str
    weight_bytes: int
    """Of the frozen and trained weights as they are held."""
    total: int
    """Weights of the model as it came."""
    device: Any
    """Where it is."""

    def trained(self) -> dict[str, Any]:
        """The trained tensors by their names in the model."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def trained_count(self) -> int:
        """How many numbers are trained."""
        return sum(weight.numel() for weight in self.trained().values())

    def copy_of_trained(self) -> dict[str, Any]:
        """The trained tensors as they are now."""
        return {name: weight.detach().clone() for name, weight in self.trained().items()}

    def release(self) -> None:
        """Let go of the model, so that another can be loaded in its place."""
        self.model = self.inner = self.handle = None
        if self.weight_bytes > _WORTH_COLLECTING:
            gc.collect()

    def put(self, state: Mapping[str, Any]) -> None:
        """Set the trained tensors."""
        torch = need("torch")
        with torch.no_grad():
            for name, weight in self.trained().items():
                weight.copy_(state[name])


def prepare(options: FinetuneOptions) -> Subject:
    """Load the model and attach what is trained.

    Raises:
        UserError: the model cannot be loaded, the adapter does not fit it, or what is asked for needs weights where the
            model has codes.
    """
    model, tokenizer = load.model(options.model, dtype=options.dtype, device=options.device)
    if getattr(model, "is_quantized", False):
        _check_quantized(options)
    digest = fingerprint(model.named_parameters())
    total = sum(weight.numel() for weight in model.parameters())
    if options.quantize_base == "int8":
        from agentopt.weights import int8

        int8.quantize_(model)
    model.requires_grad_(False)
    outer, handle = _attach(model, options)
    held = {id(tensor): tensor for tensor in (*outer.parameters(), *outer.buffers())}
    size = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    device = next(model.parameters()).device
    return Subject(options, outer.eval(), model, tokenizer, handle, digest, size, total, device)


def _attach(model: Any, options: FinetuneOptions) -> tuple[Any, Any]:
    """What a forward pass calls, and the handle of the adapter."""
    if options.weights == "lora":
        from agentopt.weights import adapters

        handle = adapters.attach(model, rank=options.rank, alpha=2 * options.rank, seed=_seed(options))
        return model, handle
    if options.weights == "prefix":
        from agentopt.weights import prefix

        wrapper = prefix.attach(model, tokens=options.prefix_tokens, seed=_seed(options))
        return wrapper, wrapper
    model.requires_grad_(True)
    return model, None


def _check_quantized(options: FinetuneOptions) -> None:
    """What a model of codes cannot do."""
    wrong = {
        "they cannot be tuned themselves: use --tune lora or --tune prefix": options.weights == "full",
        "no adapter can be added into them: leave out --merge": options.merge,
        f"they need no --quantize-base {options.quantize_base}: leave it out": options.quantize_base is not None,
    }
    for why, held in wrong.items():
        if held:
            raise UserError(
                f"finetune: the weights of {options.model!r} are quantized; {why}, or give the model that they were "
                "made from."
            )


def _seed(options: FinetuneOptions) -> int:
    return seed_number("finetune adapter", options.seed)
