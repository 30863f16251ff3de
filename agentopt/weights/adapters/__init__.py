"""Low-rank adapters (LoRA, arXiv 2106.09685) for any causal model: one row of a batch, one adapter.

    from agentopt.weights import adapters
    held = adapters.attach(model, rank=8, copies=4)     # four adapters side by side; the base is frozen
    with held.rows([2, 0, 0, 3]):                       # the adapter of each row of the batch
        logits = model(**batch).logits
    held.save("out", copy=2)                            # a folder that peft, transformers and vLLM load

The factors are float32 parameters whatever the base is: `nn.Linear`, the `Conv1D` of GPT-2, `Int8Linear`, the
`RF8Linear` of a folder of codes, layers of bitsandbytes. `Adapters.use` puts other tensors in their place, through
which gradients flow. Importing this loads no torch.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agentopt.errors import UserError
from agentopt.evaluation import seed_number
from agentopt.weights.adapters import _files
from agentopt.weights.adapters._attached import Adapters
from agentopt.weights.load import need

if TYPE_CHECKING:
    from agentopt.weights.adapters._layer import LoraLinear as LoraLinear
    from agentopt.weights.adapters._layer import lora_delta as lora_delta

__all__ = ["Adapters", "LoraLinear", "attach", "load", "lora_delta"]

ALL_LINEAR = "all-linear"


def attach(
    model: Any,
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: str | Sequence[str] = ALL_LINEAR,
    copies: int = 1,
    dropout: float = 0.0,
    seed: int = 0,
) -> Adapters:
    """Freeze a model and put adapters beside its linear layers; the model computes what it did before.

    Args:
        model: changed in place.
        rank: columns of the factors.
        alpha: the adapters' output is multiplied by `alpha / rank`.
        targets: `"all-linear"` for every linear layer but the output head, or the names of layers: whole
            (`model.layers.0.mlp.up_proj`) or their ends (`q_proj`).
        copies: adapters side by side.
        dropout: share of the adapters' inputs that is dropped in training mode (drawn by torch's own generator).
        seed: of the random `lora_A` (uniform, variance 1 / (3 in)); `lora_B` starts at zero.

    Raises:
        UserError: a number out of range, a target that names nothing or no linear layer, or adapters that are there
            already.
    """
    need("torch")
    _check_numbers(rank=rank, copies=copies)
    if not alpha > 0 or not 0 <= dropout < 1:
        raise UserError(
            f"adapters: found alpha {alpha!r} and dropout {dropout!r}, expected alpha > 0, 0 <= dropout < 1."
        )
    names = _targets(model, targets)
    return _wrap(model, dict.fromkeys(names, (rank, float(alpha))), copies=copies, dropout=dropout, seed=seed)


def load(model: Any, folder: str | Path) -> Adapters:
    """Attach the adapter that a folder of peft (or of `Adapters.save`) holds, with its own layers, ranks and alphas.

    Raises:
        UserError: the folder cannot be read, or it does not fit the model.
    """
    need("torch")
    stored = _files.load(folder)
    linear = set(_linear(model))
    strange = [name for name in stored if name not in linear]
    if strange:
        raise UserError(
            f"adapter {str(folder)!r}: has factors for {strange[0]}, and this model has no such linear layer."
        )
    held = _wrap(
        model, {name: (factors.rank, factors.alpha) for name, factors in stored.items()}, copies=1, dropout=0.0, seed=0
    )
    try:
        held.fill(stored, str(folder))
    except UserError:
        held.detach_model()
        raise
    return held


def _check_numbers(**numbers: Any) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"adapters: {name} is {value!r}, expected a whole number of at least 1.")


def _targets(model: Any, targets: str | Sequence[str]) -> list[str]:
    """Names of the layers to wrap, in the model's order."""
    modules: dict[str, Any] = dict(model.named_modules())
    linear = _linear(model)
    if targets == ALL_LINEAR:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        found = [name for name in linear if modules[name] is not head]
        if not found:
            raise UserError(f"adapters: {type(model).__name__} has no linear layer.")
        return found
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise UserError(f"adapters: targets is empty, expected {ALL_LINEAR!r} or names of layers.")
    for target in wanted:
        if not any(_meant(name, target) for name in linear):
            raise UserError(_unknown(target, modules, linear))
    return [name for name in linear if any(_meant(name, target) for target in wanted)]


def _linear(model: Any) -> list[str]:
    """Names of all layers that can be wrapped."""
    from agentopt.weights.adapters._layer import LoraLinear, is_linear

    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise UserError("adapters: this model has adapters already; call merge_() or detach_model() on them first.")
    return [name for name, module in model.named_modules() if name and is_linear(module)]


def _meant(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _unknown(target: str, modules: dict[str, Any], linear: Sequence[str]) -> str:
    other = next((type(module).__name__ for name, module in modules.items() if _meant(name, target)), None)
    found = f"it names a {other}" if other else "no layer has this name"
    ends = sorted({name.rpartition(".")[2] for name in linear if not re.fullmatch(r"\d+", name.rpartition(".")[2])})
    return f"adapters: found the target {target!r} ({found}), expected {ALL_LINEAR!r} or one of {', '.join(ends)}."


def _wrap(model: Any, plan: dict[str, tuple[int, float]], *, copies: int, dropout: float, seed: int) -> Adapters:
    from agentopt.weights.adapters._layer import LoraLinear

    torch = need("torch")
    thawed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    layers: dict[str, LoraLinear] = {}
    for name, (rank, alpha) in plan.items():
        parent, _, last = name.rpartition(".")
        layer = LoraLinear(model.get_submodule(name), rank, alpha, dropout, copies)
        if layers:
            layer.selection = next(iter(layers.values())).selection
        with torch.no_grad():
            layer.lora_A.copy_(torch.from_numpy(_draw(seed, name, tuple(layer.lora_A.shape))))
        setattr(model.get_submodule(parent), last, layer.train(model.training))
        layers[name] = layer
    return Adapters(model, layers, thawed)


def _draw(seed: int, name: str, shape: tuple[int, ...]) -> Any:
    """Uniform between plus and minus 1 / sqrt(in): the same on every machine and for any other layers beside it."""
    bits = np.random.Philox(key=seed_number("lora", seed, name))
    values = np.random.Generator(bits).random(shape, dtype=np.float32)
    return (values * 2 - 1) * np.float32(shape[-1] ** -0.5)


def __getattr__(name: str) -> object:
    if name in ("LoraLinear", "lora_delta"):
        need("torch")
        return getattr(importlib.import_module("agentopt.weights.adapters._layer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
