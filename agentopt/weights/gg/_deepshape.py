"""DeepShape: trained weights are moved onto a generalized Gaussian that takes fewer bits, in the order they have.

After arXiv 2506.00486 v3 (v4 dropped it). The published form moves all weights of a model onto one grid and shrinks
them to 0.6 of their width, which asks for training afterwards (`mode="reference"`). Ours moves every tensor on its own,
keeps its width, can go part of the way, and leaves a tensor alone when its outputs would change too much.
Imports torch.
"""

# torch's own annotations are partial: its values are checked by the tests, not by the type checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agentopt.errors import UserError
from agentopt.weights.gg import _density, _fit
from agentopt.weights.gg._rates import bits_per_weight

Mode = Literal["tensor", "reference"]
TARGET = 0.8
"""The target shape as a multiple of the fitted one."""
REFERENCE_WIDTH, REFERENCE_GRID, REFERENCE_COUNT = 0.6, 2**13, 1000
ROWS = 512
"""Calibration rows that are kept per layer."""
GUARD = 0.1
"""Largest relative change of a layer's outputs, unless another one is given."""
_KNOTS = 8192
_ALONE = (None, 1.0, 1.0, True, False)
"""nu, strength and the like where nothing was asked."""


@dataclass(frozen=True, slots=True)
class Reshaped:
    """What became of one weight.

    Attributes:
        name: the layer.
        nu: the fitted shape before.
        target: the shape it was moved towards.
        bits_before, bits_after: entropy of the weight rounded to the grid, bits per weight.
        error: relative change: root mean square of the change of the layer's outputs on the calibration rows over that
            of the outputs; of the weights themselves where there was no calibration.
        applied: False where the error is above the guard: the weight is as it was.
    """

    name: str
    nu: float
    target: float
    bits_before: float
    bits_after: float
    error: float
    applied: bool


def deepshape(
    tensor: Tensor,
    nu: float | None = None,
    strength: float = 1.0,
    *,
    std_scale: float = 1.0,
    symmetric: bool = True,
    restore_rows: bool = False,
    mode: Mode = "tensor",
) -> Tensor:
    """The tensor moved towards a generalized Gaussian: `(1 - t) w + t T(w)`, T rising.

    Args:
        tensor: floating-point weights.
        nu: target shape; None for 0.8 of the fitted one.
        strength: t, from 0 (nothing) to 1 (all the way).
        std_scale: standard deviation of T(w) over that of w.
        symmetric: T moves magnitudes and keeps signs (zeros stay); False moves signed values.
        restore_rows: scale every row (first axis) back to the norm it had; the order then holds within rows only.
        mode: "reference": as published, on a grid of 2^-13, with nu and beta 0.8 and 0.6 of the fitted ones on the
            part of the histogram above 1000 counts; `nu`, `strength`, `std_scale` and the rest must be left alone.

    Returns:
        A new tensor of the same dtype and shape.

    Raises:
        UserError: values out of range, or a tensor without elements or with NaN or infinity.
    """
    if mode == "reference":
        if (nu, strength, std_scale, symmetric, restore_rows) != _ALONE:
            raise UserError("deepshape: found other options beside mode='reference', expected none.")
        return _reference(tensor)
    if mode != "tensor":
        raise UserError(f"mode: found {mode!r}, expected 'tensor' or 'reference'.")
    if not 0 <= strength <= 1:
        raise UserError(f"strength: found {strength}, expected a number from 0 to 1.")
    if not (math.isfinite(std_scale) and std_scale > 0):
        raise UserError(f"std_scale: found {std_scale}, expected a positive number.")
    if nu is not None:
        _density.beta_of(float(nu))
    fitted = _fit.fit(tensor)
    if strength == 0 or fitted.sigma == 0:
        return tensor.detach().clone()
    flat = tensor.detach().double().flatten()
    moved = _specified(flat, TARGET * fitted.nu if nu is None else float(nu), symmetric)
    norm = moved.norm()
    if float(norm) > 0:
        moved = moved * (std_scale * flat.norm() / norm)
    found = torch.lerp(flat, moved, strength).reshape(tensor.shape)
    if restore_rows and found.ndim > 1:
        found = _with_row_norms(found, tensor.detach().double())
    return found.to(tensor.dtype)


def deepshape_(
    model: Any,
    nu: float | None = None,
    strength: float = 1.0,
    *,
    calibrate: Iterable[Any] | None = None,
    guard: float = GUARD,
    step: float = 2.0**-10,
    std_scale: float = 1.0,
    symmetric: bool = True,
    restore_rows: bool = False,
    mode: Mode = "tensor",
) -> list[Reshaped]:
    """Move every linear layer's weight in place, but for those whose outputs would change by more than the guard.

    A weight that is tied to an embedding is left alone. `mode="reference"` moves all parameters of the model at once,
    embeddings, norms and biases included, has no guard and reports one entry for the whole model.

    Args:
        model: a torch module.
        nu: as for `deepshape`.
        strength: as for `deepshape`.
        calibrate: inputs of the model (mappings are passed as keywords); their activations weigh the change. None
            takes the change of the weights themselves.
        guard: largest relative change of a layer's outputs that is accepted.
        step: of the grid on which bits are counted.
        std_scale: as for `deepshape`.
        symmetric: as for `deepshape`.
        restore_rows: as for `deepshape`.
        mode: as for `deepshape`.

    Raises:
        UserError: values out of range, a model without linear layers, or calibration that reaches none of them.
    """
    if not guard > 0:
        raise UserError(f"guard: found {guard}, expected a positive number.")
    if mode == "reference":
        if (nu, strength, std_scale, symmetric, restore_rows) != _ALONE or calibrate is not None or guard != GUARD:
            raise UserError("deepshape_: found other options beside mode='reference', expected none but step.")
        return [_reference_model(model, step)]
    if mode != "tensor":
        raise UserError(f"mode: found {mode!r}, expected 'tensor' or 'reference'.")
    layers = _layers(model)
    if not layers:
        raise UserError("deepshape_: found no linear layer in the model, expected one or more.")
    inputs = _activations(model, layers, calibrate) if calibrate is not None else {}
    found: list[Reshaped] = []
    for name, layer in layers.items():
        weight = layer.weight.detach().clone()
        new = deepshape(weight, nu, strength, std_scale=std_scale, symmetric=symmetric, restore_rows=restore_rows)
        fitted = _fit.fit(weight).nu
        error = _change(weight, new, inputs.get(name), transposed=not isinstance(layer, nn.Linear))
        applied = error <= guard
        if applied:
            with torch.no_grad():
                layer.weight.copy_(new)
        found.append(
            Reshaped(
                name=name,
                nu=fitted,
                target=TARGET * fitted if nu is None else float(nu),
                bits_before=bits_per_weight(weight, step).entropy,
                bits_after=bits_per_weight(new, step).entropy,
                error=error,
                applied=applied,
            )
        )
    return found


def _specified(flat: Tensor, nu: float, symmetric: bool) -> Tensor:
    """The values with the same ranks (equal values share their middle rank) under the target, up to a factor."""
    keys = flat.abs() if symmetric else flat
    _, where, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    middle = (ends - counts / 2) / len(flat)
    if symmetric:
        sizes = _half_quantile(middle, nu)
        return torch.where(flat == 0, 0.0, torch.copysign(sizes[where], flat))
    sizes = _half_quantile((2 * middle - 1).abs(), nu)
    return torch.where(middle < 0.5, -sizes, sizes)[where]


def _half_quantile(u: Tensor, nu: float) -> Tensor:
    """The magnitude (beta = 1) that a share u of draws stays below; rising, from a table where there are many."""
    a = torch.tensor(1 / nu, dtype=torch.float64)
    u = u.clamp(0.0, 1 - 1e-16)
    if len(u) <= 2 * _KNOTS:
        return _density.gamma_tail_inverse(a, 1 - u) ** a
    # Between knots that are even in the logit of u, the logarithm of the magnitude is nearly straight.
    logit = torch.logit(u.clamp_min(1e-9))
    low, high = float(logit.min()), float(logit.max())
    knots = torch.linspace(low, high, _KNOTS, dtype=torch.float64, device=u.device)
    values = a * _density.gamma_tail_inverse(a, torch.sigmoid(-knots)).log()
    place = ((logit - low) / (high - low) * (_KNOTS - 1)).clamp(0, _KNOTS - 1)
    left = place.floor().long().clamp_max(_KNOTS - 2)
    return torch.lerp(values[left], values[left + 1], place - left).exp()


def _with_row_norms(found: Tensor, before: Tensor) -> Tensor:
    rows = tuple(range(1, found.ndim))
    was = torch.linalg.vector_norm(before, 2, dim=rows, keepdim=True)
    now = torch.linalg.vector_norm(found, 2, dim=rows, keepdim=True)
    return torch.where(now > 0, found * (was / now.clamp_min(1e-300)), found)


def _reference(tensor: Tensor) -> Tensor:
    """Histogram specification on a grid, as published: counts are rounded down, what is left over stays as it is."""
    _fit.fit(tensor)  # refuses what cannot be fitted
    flat = tensor.detach().double().flatten()
    grid = torch.round(flat * REFERENCE_GRID).long()
    reach = _reach(grid)
    inside = (grid.abs() <= reach).nonzero()[:, 0]
    part = flat[inside]
    fitted = _fit.fit(part, trim=0.0)
    if fitted.sigma == 0:
        return tensor.detach().clone()
    nu, beta = TARGET * fitted.nu, REFERENCE_WIDTH * fitted.beta * REFERENCE_GRID
    values = torch.arange(-reach, reach + 1, dtype=torch.float64)
    mass = torch.exp(-(((values - part.mean() * REFERENCE_GRID).abs() / beta) ** nu))
    counts = (mass / mass.sum() * len(part)).floor().long()
    handed = torch.repeat_interleave(values, counts) / REFERENCE_GRID
    order = torch.argsort(part, stable=True)[: len(handed)]
    flat[inside[order]] = handed
    return flat.reshape(tensor.shape).to(tensor.dtype)


def _reach(grid: Tensor) -> int:
    """The smallest positive grid value that occurs 1000 times at most; above the largest value it occurs 0 times."""
    counts = torch.bincount(grid[grid > 0].clamp_max(1 << 24), minlength=2)[1:]
    rare = (counts <= REFERENCE_COUNT).nonzero()
    return int(rare[0, 0]) + 1 if len(rare) else len(counts) + 1


def _reference_model(model: Any, step: float) -> Reshaped:
    parameters = [one for one in model.parameters() if one.numel()]
    if not parameters:
        raise UserError("deepshape_: found no parameter in the model, expected one or more.")
    before = torch.cat([one.detach().flatten().float() for one in parameters])
    after = _reference(before)
    with torch.no_grad():
        for one, part in zip(parameters, after.split([one.numel() for one in parameters]), strict=True):
            one.copy_(part.reshape(one.shape))
    fitted = _fit.fit(before).nu
    bits = [bits_per_weight(one, step).entropy for one in (before, after)]
    return Reshaped("all parameters", fitted, TARGET * fitted, *bits, error=_change(before, after, None), applied=True)


def _layers(model: Any) -> dict[str, Any]:
    embeddings = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Embedding)}
    return {
        name: layer
        for name, layer in model.named_modules()
        if (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D")
        and layer.weight.numel()
        and id(layer.weight) not in embeddings
    }


@torch.no_grad()
def _activations(model: Any, layers: Mapping[str, Any], calibrate: Iterable[Any]) -> dict[str, Tensor]:
    """Up to `ROWS` input rows of every layer."""
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keeper(name: str) -> Any:
        def keep(_: Any, inputs: tuple[Any, ...]) -> None:
            missing = ROWS - sum(len(part) for part in kept[name])
            if missing > 0:
                kept[name].append(inputs[0].detach().flatten(0, -2)[:missing].clone())

        return keep

    hooks = [layer.register_forward_pre_hook(keeper(name)) for name, layer in layers.items()]
    training = model.training
    model.eval()
    try:
        for batch in calibrate:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    missing = [name for name, parts in kept.items() if not parts]
    if missing:
        raise UserError(f"calibrate: found no activation of {missing[0]!r}, expected inputs that reach every layer.")
    return {name: torch.cat(parts) for name, parts in kept.items()}


def _change(before: Tensor, after: Tensor, rows: Tensor | None, *, transposed: bool = False) -> float:
    """Root mean square of the change over that of the original: of outputs where there are rows, else of weights."""
    old, new = before.double(), after.double() - before.double()
    if rows is not None:
        wide = rows.double()
        old, new = (wide @ (one if transposed else one.T) for one in (old, new))
    norm = float(old.norm())
    return float(new.norm()) / norm if norm > 0 else 0.0
