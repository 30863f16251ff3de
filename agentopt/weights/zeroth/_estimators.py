"""From losses to coefficients: where a step measures, and what each direction weighs in the estimate of the gradient.

The estimate of a step is `sum_k c_k z_k`. This file decides at which variants of the weights the loss is measured and
computes the `c_k`; it never sees a weight. Every sum over examples is exactly rounded (`math.fsum`), so the same losses
give the same coefficients whichever worker measured them and in whatever order they arrive.

Four ways to a coefficient:
    differences of losses (`plan`, `coefficients`): MeZO and most of its kin;
    differences and curvature (`hessian_plan`, `hessian_coefficients`): HiZOO, three measurements;
    exact directional derivatives (`from_derivatives`): the forward gradient;
    try the step before taking it (`conservative_plan`, `conservative_pick`): ZO-SGD-Cons, three more measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentopt.errors import RunError, UserError
from agentopt.weights.zeroth._types import Probe, Shift, Variant

Losses = NDArray[np.float64]
Coefficients = NDArray[np.float32]


def plan(probe: Probe, eps: float, seeds: Sequence[int], rights: Sequence[int] = ()) -> list[Variant]:
    """The variants to measure at.

    Two sides: `+eps z_1, -eps z_1, +eps z_2, ...`. One side: the weights themselves first, then `+eps z_1, +eps z_2,
    ...`. With `per_example` the shift of a seed stands for every example's own flip of that direction.

    Args:
        probe: how to measure.
        eps: length of a shift.
        seeds: one per direction.
        rights: seeds of the right factors of low-rank directions, one per direction; empty for none.
    """
    _check(probe, eps, seeds, rights)
    pairs = list(zip(seeds, rights or [0] * len(seeds), strict=True))
    if probe.sides == 1:
        return [(), *((Shift(seed, eps, right),) for seed, right in pairs)]
    return [(Shift(seed, sign * eps, right),) for seed, right in pairs for sign in (1.0, -1.0)]


def coefficients(probe: Probe, eps: float, losses: Any) -> Coefficients:
    """What each direction weighs in the estimate, from the losses of `plan`'s variants.

    Without normalisation, with `l` the mean loss over the examples and n the population:
        two sides: `c_k = (l+_k - l-_k) / (2 eps n)`; one side: `c_k = (l_k - l_0) / (eps n)`.

    `per_example`: example b has a direction of its own per seed, weighed by its own measurements divided by the number
    of examples; the numbers come direction by direction, examples within (index `k * examples + b`).

    `normalize="std"` divides by the standard deviation sigma of the step's measured losses instead of by eps (FZOO,
    arXiv 2506.09034). Why that makes the learning rate free of scale:
        1. for small eps, `l(w + eps z) - l(w)` is about `eps g.z`, whose standard deviation over draws of z is
           `eps |g|`;
        2. so `(l_k - l_0) / sigma` is about `z_k.g / |g|`: eps and the unit of the loss cancel;
        3. and as `E[z z'] = I`, the expected step is `lr g / |g|`: lr is its length, whatever the loss measures.
    sigma has divisor n and is taken over all measured losses of the step, the one at the weights themselves included.
    (FZOO leaves that one out; then probes that happen to agree would give a step without bound. It also keeps the
    division by eps, so its lr is ours times eps.) One direction with two sides thus gives +1 or -1: a step of fixed
    size. A zero sigma gives a zero step.

    With `per_example`, sigma is the root of the mean, over the examples, of the variance of the example's own
    measurements, so a hard example does not pass for a steep one. GRZO (arXiv 2606.02857) takes the standard deviation
    of the examples' differences; their mean is zero in expectation, and taken about zero it is this sigma (two sides).

    Args:
        probe: how was measured.
        eps: length of a shift.
        losses: shape (variants, examples), in the order of `plan`; only the mean over examples counts unless
            `per_example`.

    Raises:
        RunError: a loss is not a finite number.
    """
    table = _table(losses)
    _check_finite(table)
    if not probe.per_example:
        table = np.array([[mean] for mean in means(table)])
    base = 1 if probe.sides == 1 else 0
    population, left = divmod(len(table) - base, probe.sides)
    if left or population < 1:
        raise UserError(
            f"losses: found {len(table)} variants, expected those of plan() for a probe with {probe.sides} side(s)."
        )
    change = (table[1:] - table[0]) if base else (table[0::2] - table[1::2]) / 2.0
    unit = eps if probe.normalize == "none" else _spread(table)
    if not unit:
        return np.zeros(change.size, dtype=np.float32)
    with np.errstate(over="ignore"):
        return _narrow((change / unit / change.size).ravel())


def means(losses: Any) -> list[float]:
    """Mean loss of each variant; exactly rounded sums, so it does not matter in which order the examples came."""
    table = _table(losses)
    return [math.fsum(row) / table.shape[1] if np.isfinite(row).all() else math.nan for row in table]


def hessian_plan(probe: Probe, eps: float, seeds: Sequence[int], rights: Sequence[int] = ()) -> list[Variant]:
    """HiZOO's three measurements: at the weights, at `+eps z` and at `-eps z`, where `z = u / sqrt(h)`.

    The shift names u; whoever fills the direction multiplies it by `rule("hizoo").scale(state)`, that is `h ** -0.5` of
    the state before the step.

    Raises:
        UserError: the probe draws signs (the square of every sign is 1, so no weight's curvature shows), is low-rank,
            per example or normalised, or has more than one direction.
    """
    _check(probe, eps, seeds, rights)
    if probe.kind != "normal" or probe.per_example or probe.population != 1 or probe.normalize != "none":
        raise UserError(
            f"method hizoo: found {probe}, expected Probe(kind='normal') with population 1, without per_example and "
            "normalize: it learns a weight's curvature from the square of its own noise, and signs all have square 1."
        )
    return [(), (Shift(seeds[0], eps),), (Shift(seeds[0], -eps),)]


def hessian_coefficients(eps: float, losses: Any) -> Coefficients:
    """HiZOO's two numbers: the derivative along z, `(l+ - l-) / (2 eps)`, and `|l+ + l- - 2 l_0| / (2 eps^2)`.

    The second is half the curvature along z. Both go to the log and to `Rule.apply` (arXiv 2402.15173).
    """
    table = _table(losses)
    _check_finite(table)
    if len(table) != 3:
        raise UserError(f"losses: found {len(table)} variants, expected the 3 of hessian_plan().")
    here, plus, minus = means(table)
    slope, bend = (plus - minus) / (2.0 * eps), abs(plus + minus - 2.0 * here) / (2.0 * eps * eps)
    return _narrow(np.array([slope, bend]))


def from_derivatives(probe: Probe, derivatives: Sequence[float]) -> Coefficients:
    """Coefficients from exact directional derivatives `g.z_k`: the forward gradient (arXiv 2202.08587).

    The derivatives take the place of the differences: `c_k = d_k / n`. With `normalize="std"` each is divided by their
    root mean square (they have mean zero over draws of z), as the losses are in `coefficients`.
    """
    values = np.asarray(derivatives, dtype=np.float64)
    if not np.isfinite(values).all():
        raise RunError(f"the derivative along a direction is {_first_bad(values)}: {_ADVICE}")
    if probe.normalize == "std":
        spread = math.sqrt(math.fsum(values * values) / len(values))
        values = values / spread if spread else np.zeros_like(values)
    return _narrow(values / len(values))


def conservative_plan(
    seeds: Sequence[int], rights: Sequence[int], scalars: Sequence[float], lr: float
) -> list[Variant]:
    """The candidates of a conservative step: stay, step, the opposite step (ZO-SGD-Cons, arXiv 2402.11592).

    Measured on the batch of the step. Candidates are made for the rule `sgd`, without weight decay.
    """
    terms = list(zip(seeds, rights or [0] * len(seeds), scalars, strict=True))
    step = [(seed, float(np.float32(lr * float(scalar))), right) for seed, right, scalar in terms]
    return [(), *(tuple(Shift(seed, sign * size, right) for seed, size, right in step) for sign in (-1.0, 1.0))]


def conservative_pick(scalars: Sequence[float] | Coefficients, losses: Any) -> Coefficients:
    """The coefficients of the best of `conservative_plan`'s candidates: unchanged, negated, or all zero when it stays.

    These are the numbers to log: a replay then needs no measurement. A tie is a reason to stay, and a candidate whose
    loss is not a number is never taken.
    """
    here, step, opposite = (loss if math.isfinite(loss) else math.inf for loss in means(losses))
    values = np.asarray(scalars, dtype=np.float32)
    if min(step, opposite) >= here:
        return np.zeros_like(values)
    return values if step <= opposite else -values


_ADVICE = "take a smaller learning rate or eps, or 32-bit weights."


def _check(probe: Probe, eps: float, seeds: Sequence[int], rights: Sequence[int]) -> None:
    if not (math.isfinite(eps) and eps > 0):
        raise UserError(f"eps: found {eps!r}, expected a number above 0.")
    if len(seeds) != probe.population or (rights and len(rights) != len(seeds)):
        found = f"{len(seeds)} seeds and {len(rights)} right seeds"
        raise UserError(f"probe: found {found}, expected one per direction of the population ({probe.population}).")


def _table(losses: Any) -> Losses:
    table = np.asarray(losses, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise UserError(f"losses: found shape {table.shape}, expected (variants, examples), both at least 1.")
    return table


def _check_finite(table: Losses) -> None:
    bad = np.argwhere(~np.isfinite(table))
    if len(bad):
        variant, example = (int(index) for index in bad[0])
        raise RunError(f"the loss of example {example} at variant {variant} is {table[variant, example]}: {_ADVICE}")


def _narrow(values: Losses) -> Coefficients:
    """As the log keeps them: float32, in which a loss that exploded no longer fits."""
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise RunError(f"the losses differ by too much for a step ({values[~np.isfinite(narrow)][0]:.3g}): {_ADVICE}")
    return narrow


def _first_bad(values: Losses) -> float:
    return float(values[~np.isfinite(values)][0])


def _spread(table: Losses) -> float:
    """Root of the mean, over columns, of the variance (divisor n) within the column."""
    variances: list[float] = []
    for column in table.T:
        # Centring on a member first keeps equal losses at exactly zero.
        centred = column - column[0]
        mean = math.fsum(centred) / len(centred)
        variances.append(math.fsum((value - mean) ** 2 for value in centred) / len(centred))
    return math.sqrt(math.fsum(variances) / len(variances))
