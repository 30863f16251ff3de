"""Generalized-Gaussian initialisation: weights start with the shape that training and a cheap code like.

After arXiv 2506.00486 v3. The published rule takes the first dimension of every matrix for n; ours the fan-in, as
Kaiming's rule does (arXiv 1502.01852), and leaves embeddings at their usual width. Imports torch.
"""

# torch's own annotations are partial: its values are checked by the tests, not by the type checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agentopt.errors import UserError
from agentopt.weights.gg import _density

Mode = Literal["fan_in", "reference"]
XI = {"linear": 1.0, "sigmoid": 1.0, "relu": 2.0, "leaky_relu": 2 / (1 + 0.01**2)}
"""The activation coefficient by name; for a leaky ReLU of slope k it is `2 / (1 + k^2)`."""
EMBEDDING = 0.02
"""Standard deviation of embeddings in the mode `fan_in`."""
HEAVY, CLIP = 0.3, 8.0
"""Below this nu, draws beyond this many standard deviations are drawn again (the fourth moment explodes)."""
RESIDUAL = ("o_proj", "down_proj", "out_proj", "c_proj", "fc2", "wo", "w2", "dense_4h_to_h")
"""Last name of the layers that write into the residual stream."""


def init_(
    model: Any,
    nu: float = 2.0,
    xi: float | str = 2.0,
    *,
    mode: Mode = "fan_in",
    seed: int = 0,
    residual_scaling: bool = True,
) -> dict[str, float]:
    """Draw the weights of a model anew, in place: variance `xi / n`, shape nu.

    The draw of a tensor depends on the seed and on its name alone. Tied weights are drawn once.

    Args:
        model: a torch module.
        nu: shape; 2 is a Gaussian.
        xi: the activation coefficient, or the name of the activation: linear, sigmoid, relu or leaky_relu.
        mode: "fan_in": weights of linear layers (transformers' Conv1D too) and of convolutions with n the number of
            inputs, biases of these layers 0, embeddings a standard deviation of 0.02, everything else as it was.
            "reference": as published: every 2-D parameter with n its first dimension; of the others those with
            "weight" in their name become 1, those with "bias" become 0.
        seed: of the draws.
        residual_scaling: "fan_in" only: layers that write into the residual stream (by name: `o_proj`, `down_proj`,
            `c_proj` and the like) get their standard deviation divided by the square root of their number, which is
            1/sqrt(2 L) in a transformer of L blocks.

    Returns:
        The standard deviation of every tensor that was drawn, by name.

    Raises:
        UserError: nu or xi is not positive, an unknown name or mode, or a model with nothing to draw.
    """
    _density.beta_of(float(nu))
    variance = _coefficient(xi)
    if mode not in ("fan_in", "reference"):
        raise UserError(f"mode: found {mode!r}, expected 'fan_in' or 'reference'.")
    with torch.no_grad():
        plan = _reference(model, variance) if mode == "reference" else _fan_in(model, variance, residual_scaling)
        if not plan:
            raise UserError("init_: found no weight to draw in the model, expected linear layers or embeddings.")
        for name, (tensor, sigma) in plan.items():
            tensor.copy_(_draw(tuple(tensor.shape), nu, sigma, f"{seed}:{name}"))
    return {name: sigma for name, (_, sigma) in plan.items()}


def _coefficient(xi: float | str) -> float:
    if isinstance(xi, str):
        if xi not in XI:
            raise UserError(f"xi: found {xi!r}, expected a number or one of {', '.join(XI)}.")
        return XI[xi]
    if not (math.isfinite(xi) and xi > 0):
        raise UserError(f"xi: found {xi}, expected a positive number.")
    return float(xi)


def _reference(model: Any, variance: float) -> dict[str, tuple[Tensor, float]]:
    plan: dict[str, tuple[Tensor, float]] = {}
    for name, tensor in model.named_parameters():
        if tensor.ndim == 2 and tensor.numel():
            plan[name] = (tensor, math.sqrt(variance / tensor.shape[0]))
        elif "weight" in name:
            tensor.fill_(1.0)
        elif "bias" in name:
            tensor.zero_()
    return plan


def _fan_in(model: Any, variance: float, residual_scaling: bool) -> dict[str, tuple[Tensor, float]]:
    layers = {name: layer for name, layer in model.named_modules() if _inputs(layer) or isinstance(layer, nn.Embedding)}
    outputs = sum(_writes_residual(name) for name, layer in layers.items() if _inputs(layer))
    # A tied head is drawn as the embedding it is.
    ordered = sorted(layers.items(), key=lambda item: not isinstance(item[1], nn.Embedding))
    plan: dict[str, tuple[Tensor, float]] = {}
    seen: set[int] = set()
    for name, layer in ordered:
        weight, inputs = layer.weight, _inputs(layer)
        if id(weight) in seen or not weight.numel():
            continue
        seen.add(id(weight))
        sigma = math.sqrt(variance / inputs) if inputs else EMBEDDING
        if inputs and residual_scaling and _writes_residual(name):
            sigma /= math.sqrt(outputs)
        plan[f"{name}.weight" if name else "weight"] = (weight, sigma)
        bias: Any = getattr(layer, "bias", None)
        if inputs and bias is not None:
            bias.zero_()
    return plan


def _inputs(layer: Any) -> int:
    """Number of inputs of one output; 0 for what is no linear layer and no convolution."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if type(layer).__name__ == "Conv1D" and getattr(layer, "weight", None) is not None and layer.weight.ndim == 2:
        return layer.weight.shape[0]
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer.weight[0].numel()
    return 0


def _writes_residual(name: str) -> bool:
    return name.rpartition(".")[2] in RESIDUAL


def _draw(shape: tuple[int, ...], nu: float, sigma: float, key: str) -> Tensor:
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(number)
    drawn = _density.sample(shape, nu, sigma, generator=generator)
    while nu < HEAVY and bool((beyond := drawn.abs() > CLIP * sigma).any()):
        drawn[beyond] = _density.sample((int(beyond.sum()),), nu, sigma, generator=generator)
    return drawn
