"""`ZerothOrder`: weights tuned by measuring a loss at shifted weights, at the memory of inference.

    zo = ZerothOrder(model, lr=1e-6, eps=1e-3, mask="small", density=0.5)
    for batch in batches:
        result = zo.step(lambda model: loss_of(model, batch))

A step draws directions from (seed, step), measures the loss at a few variants of the weights, turns the losses into one
coefficient per direction, writes those to the log if there is one, and moves the weights. The move is a pure function
of the log record, so the weights of any step can be made again from the first ones and the log.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from agentopt.errors import RunError, UserError
from agentopt.weights.load import need
from agentopt.weights.zeroth import _estimators
from agentopt.weights.zeroth._philox import probe_seed
from agentopt.weights.zeroth._rules import estimator, rule
from agentopt.weights.zeroth._schedule import Schedule
from agentopt.weights.zeroth._sites import check_mode
from agentopt.weights.zeroth._types import Exchange, Mask, MaskUpdate, Probe, Shift, StepResult, Variant

_RIGHT = 1 << 22
"""Number, past any population, of the seeds of right factors."""
_FEW = 10_000_000
"""Tuned weights below which a pass on a CPU carries both sides of a probe."""


class NonFiniteLoss(RunError):
    """A loss came out as NaN or infinite; the weights are those before the step.

    Attributes:
        step: number of the step.
    """

    def __init__(self, step: int, message: str) -> None:
        super().__init__(f"step {step}: {message}")
        self.step = step


class ZerothOrder:
    """Zeroth-order optimizer: MeZO (arXiv 2305.17333), Sparse-MeZO (2402.15751) and their kin in one class.

    The weights are never perturbed in place: each module builds its perturbed weight inside its forward pass, tile by
    tile, in a scratch that all modules share. Only the update writes to the weights, with stochastic rounding when they
    have 16 bits.

    Args:
        model: a torch module; its parameters that require a gradient are tuned.
        lr: learning rate.
        eps: length of a shift.
        mask: which weights move: "none" (all), "small" or "large" (by magnitude), "random", "block" (whole layers).
        density: share of each matrix that moves; for "block" the share of the blocks per step.
        probe: how the loss is felt out.
        mask_update: "fixed" keeps the mask of the start, "dynamic" follows the weights.
        schedule: learning rate over the run: a `Schedule`, or "constant".
        method: how losses become a step: "sgd", "sign", "momentum", "adam", "hizoo", "conservative", or "jvp" (the
            forward gradient: an exact directional derivative in one forward-mode pass, arXiv 2202.08587).
        hyper: settings of the method, such as `{"beta": 0.95}`.
        seed: every direction and every random bit is a function of it.
        weight_decay: of the matrices; norm scales and biases never decay.
        trainable: which parameter names to tune; None for those that require a gradient.
        copies: variants measured in one forward pass when the loss can (see `Objective`); 1 measures one by one. None
            for 2 on a GPU and for few tuned weights, where passes cost more than what they compute, else 1.
        exchange: connection to workers that hold the same weights and measure other examples of the same batch.
        log: takes a record per step before the weights move.
        kernels: use the Triton kernels on CUDA.

    Raises:
        UserError: a setting is out of range, settings exclude each other, or there is nothing to tune.
    """

    def __init__(
        self,
        model: Any,
        *,
        lr: float,
        eps: float = 1e-3,
        mask: Mask = "none",
        density: float = 0.5,
        probe: Probe | None = None,
        mask_update: MaskUpdate = "fixed",
        schedule: Schedule | str = "constant",
        method: str = "sgd",
        hyper: Mapping[str, float] | None = None,
        seed: int = 0,
        weight_decay: float = 0.0,
        trainable: Callable[[str], bool] | None = None,
        copies: int | None = None,
        exchange: Exchange | None = None,
        log: Any = None,
        kernels: bool = True,
    ) -> None:
        need("torch")
        from agentopt.weights.zeroth._directions import Directions
        from agentopt.weights.zeroth._flipout import ExampleProber
        from agentopt.weights.zeroth._masks import MaskRule
        from agentopt.weights.zeroth._probing import Prober
        from agentopt.weights.zeroth._sites import find_sites
        from agentopt.weights.zeroth._update import Updater

        self.model = model
        self.lr, self.eps, self.seed = _positive("lr", lr, zero=True), _positive("eps", eps), int(seed)
        self.probe = probe or Probe()
        self.schedule = Schedule(kind=schedule) if isinstance(schedule, str) else schedule  # type: ignore[arg-type]
        self.method, self.estimator, self.rule = method, estimator(method), rule(method, hyper)
        self.mask = MaskRule(mask, density, mask_update, self.seed)
        self.weight_decay = _positive("weight_decay", weight_decay, zero=True)
        self.copies = 1 if copies is None else copies
        self.exchange, self.log = exchange, log
        self.step_number = 0
        self._check()
        self.sites = find_sites(model, trainable)
        if copies is None and (self.sites[0].tensor.is_cuda or sum(site.size for site in self.sites) < _FEW):
            self.copies = 2
        self.mask.prepare(self.sites)
        self._directions = Directions(self.probe.kind, self.probe.rank)
        prober = ExampleProber if self.probe.per_example else Prober
        self._prober = prober(model, self.sites, self._directions, self.mask, kernels=kernels)
        self._updater = Updater(self._directions, self.mask, self.rule, self.seed, self.weight_decay, kernels)
        self._state = self._fresh_state()
        if self.estimator == "hessian":
            self._prober.scale = self._scale

    # --- public -------------------------------------------------------------------------------------------------------

    @classmethod
    def preset(
        cls, name: str, model: Any, *, tune: Literal["full", "lora", "prefix"] = "full", **settings: Any
    ) -> ZerothOrder:
        """A published method by name (`agentopt.weights.zeroth.PRESETS`); `settings` override its own.

        Args:
            name: such as "mezo", "sparse-mezo" or "fzoo".
            model: a torch module.
            tune: what is tuned, for the learning rate and eps that the preset recommends.
            settings: arguments of `ZerothOrder`.
        """
        from agentopt.weights.zeroth._presets import preset

        weights = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
        return cls(model, **{**preset(name).settings(tune, weights), **settings})

    @property
    def parameters(self) -> list[str]:
        """Names of the tuned tensors."""
        return [site.name for site in self.sites]

    @property
    def scalars_per_step(self) -> int | None:
        """Numbers that a step logs (k); None when it depends on the batch (a direction per example)."""
        if self.probe.per_example:
            return None
        return 2 if self.estimator == "hessian" else self.probe.population

    def step(self, loss_fn: Callable[[Any], Any]) -> StepResult:
        """Measure, decide, log, move.

        Args:
            loss_fn: `(model) -> float | Tensor`, lower is better: a number, or a tensor with one loss per example.
                It must give the same examples each time it is called within a step. One that is an `Objective` is
                measured for several variants in one forward pass. Any scalar serves: a cross-entropy, an error rate, an
                agent's reward with its sign turned. The model has its shifted weights in its forward passes only, and
                wherever else the very first call read a tensor (`model.head.weight`); it is called once more then.

        Returns:
            What was measured. `moved` is false when all coefficients are zero.

        Raises:
            NonFiniteLoss: a loss is NaN or infinite; the weights are as before, and nothing was logged.
            UserError: the model drops units or gathers statistics (training mode): its measurements would not compare.
        """
        step = self.step_number
        check_mode(self.model)
        shifts = self._shifts(step)
        active = self.mask.active(self.sites, step)
        lr = self.schedule.lr(step, self.lr)
        with need("torch").no_grad():
            measured, coefficients, forwards = self._coefficients(loss_fn, step, shifts, active, lr)
        scalars = tuple(float(value) for value in coefficients)
        if self.log is not None:
            self.log.append(step, probe_seed(self.seed, step, 0), lr, scalars)
        self.update(step, probe_seed(self.seed, step, 0), scalars, lr)
        means = tuple(_estimators.means(measured)) if len(measured) else ()
        loss = means[0] if means and self.probe.sides == 1 else math.fsum(means) / max(len(means), 1)
        return StepResult(step, loss, means, scalars, lr, forwards, any(scalars))

    def update(self, step: int, seed: int, scalars: Sequence[float], lr: float) -> None:
        """Move the weights as step `step` did; what a replay of the log calls.

        Args:
            step: number of the step; must be the next one.
            seed: seed of the step's first direction, as logged.
            scalars: the step's coefficients.
            lr: the step's learning rate.

        Raises:
            UserError: the step is not the next one, or the seed is not that of this run.
        """
        if step != self.step_number:
            raise UserError(f"the next step is {self.step_number}, found a record of step {step}.")
        if seed != probe_seed(self.seed, step, 0):
            raise UserError(f"step {step}: the record's seed is not that of a run with seed {self.seed}.")
        shifts = self._shifts(step)
        flips = self._flips(len(scalars) // len(shifts)) if self.probe.per_example else None
        if any(scalars) or self.rule.slots or self.weight_decay:
            with need("torch").no_grad():
                self._updater.apply(
                    step,
                    shifts,
                    scalars,
                    lr,
                    self.mask.active(self.sites, step),
                    self._state,
                    self._prober.scratch(self.sites[0].tensor.device),
                    flips,
                )
        self._directions.forget()
        self.step_number = step + 1

    def state(self) -> dict[str, Any]:
        """The method's own tensors by name (`"<parameter>.<slot>"`), such as momentum; empty for sgd and sign."""
        return {f"{name}.{slot}": tensor for name, slots in self._state.items() for slot, tensor in slots.items()}

    # --- inside -------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        probe = self.probe
        if self.copies < 1:
            raise UserError(f"copies: found {self.copies!r}, expected a whole number of at least 1.")
        if probe.kind == "lowrank" and self.mask.kind not in ("none", "block"):
            raise UserError(
                f"mask: found {self.mask.kind!r} with a low-rank probe, which moves whole matrices; "
                "use 'none' or 'block'."
            )
        if self.method == "conservative" and (probe.per_example or self.weight_decay):
            raise UserError(
                "method conservative: leave out per_example and weight_decay: it measures the step it takes."
            )
        if self.method == "jvp" and (probe.per_example or probe.sides == 1):
            raise UserError("method jvp: leave out per_example and sides=1: a directional derivative has no sides.")
        if self.method == "hizoo" and (probe.kind != "normal" or probe.population != 1 or probe.per_example):
            raise UserError("method hizoo: found another probe, expected Probe(kind='normal') with population 1.")

    def _fresh_state(self) -> dict[str, dict[str, Any]]:
        import torch

        return {
            site.name: {
                slot: torch.full(
                    site.tensor.shape, self.rule.initial[slot], dtype=torch.float32, device=site.tensor.device
                )
                for slot in self.rule.slots
            }
            for site in self.sites
            if self.rule.slots
        }

    def _scale(self, site: Any, start: int, stop: int) -> Any:
        tiles = {slot: tensor.view(-1)[start:stop] for slot, tensor in self._state[site.name].items()}
        return self.rule.scale(tiles)

    def _shifts(self, step: int) -> list[Shift]:
        """The step's directions, with `eps` as their length."""
        right_step = step // self.probe.lazy
        return [
            Shift(probe_seed(self.seed, step, k), self.eps, probe_seed(self.seed, right_step, _RIGHT + k))
            for k in range(self.probe.population)
        ]

    def _flips(self, examples: int) -> Any:
        from agentopt.weights.zeroth._flipout import Flips

        return Flips(self._directions, examples)

    def _coefficients(
        self, loss_fn: Any, step: int, shifts: Sequence[Shift], active: Sequence[Any], lr: float
    ) -> tuple[Any, Any, int]:
        """Measured losses (variants, examples), coefficients, and forward passes."""
        seeds, rights = [shift.seed for shift in shifts], [shift.right_seed for shift in shifts]
        if self.estimator == "jvp":
            losses, slopes = self._derivatives(loss_fn, step, shifts, active)
            return losses, _estimators.from_derivatives(self.probe, slopes), 2 * len(shifts)
        if self.estimator == "hessian":
            variants = _estimators.hessian_plan(self.probe, self.eps, seeds, rights)
            losses = self._measure(loss_fn, variants, step, active)
            return losses, _estimators.hessian_coefficients(self.eps, losses), len(variants)
        variants = _estimators.plan(self.probe, self.eps, seeds, rights)
        losses = self._measure(loss_fn, variants, step, active)
        found = _estimators.coefficients(self.probe, self.eps, losses)
        if self.estimator == "difference":
            return losses, found, len(variants)
        candidates = _estimators.conservative_plan(seeds, rights, list(found), lr)
        tried = self._measure(loss_fn, candidates, step, active, finite=False)
        return losses, _estimators.conservative_pick(found, tried), len(variants) + len(candidates)

    def _measure(
        self, loss_fn: Any, variants: Sequence[Variant], step: int, active: Sequence[Any], *, finite: bool = True
    ) -> Any:
        """Losses (variants, examples) in float64, over the examples of all workers in the order of their ranks."""
        found = self._retried(lambda: self._here(loss_fn, variants, step, active))
        losses = _merge(self.exchange, found, per_example=self.probe.per_example)
        if finite:
            _check_finite(step, losses)
        return losses

    def _here(self, loss_fn: Any, variants: Sequence[Variant], step: int, active: Sequence[Any]) -> Any:
        """Losses (variants, examples) of this worker's examples."""
        together = self.copies if callable(getattr(loss_fn, "losses", None)) and not self._prober.alone else 1
        parts: list[Any] = []
        for first in range(0, len(variants), together):
            group = variants[first : first + together]
            if self.probe.per_example:
                self._prepare_examples(loss_fn)
            with self._prober.at(group, step, active):
                found = loss_fn.losses(self.model, len(group)) if together > 1 else loss_fn(self.model)
            parts.append(_as_rows(found, len(group), per_example=self.probe.per_example))
        return np.concatenate(parts)

    def _retried(self, measure: Callable[[], Any]) -> Any:
        """A measurement; made again, in another way, when the first pass shows that the model needs one."""
        from agentopt.weights.zeroth._rows import Again

        while True:
            try:
                return measure()
            except Again:
                continue

    def _derivatives(
        self, loss_fn: Any, step: int, shifts: Sequence[Shift], active: Sequence[Any]
    ) -> tuple[Any, list[float]]:
        from agentopt.weights.zeroth._forward_gradient import derivative

        rows: list[Any] = []
        for shift in shifts:
            rows += self._retried(functools.partial(derivative, self._prober, loss_fn, shift, step, active))
        table = _merge(self.exchange, np.stack(rows))
        _check_finite(step, table)
        return table[0::2], [math.fsum(row) / len(row) for row in table[1::2]]

    # --- a direction per example --------------------------------------------------------------------------------------

    def _prepare_examples(self, loss_fn: Any) -> None:
        """In what portions the forward passes will bring the examples of this worker."""
        sizes = getattr(loss_fn, "pass_sizes", None)
        world, rank = (self.exchange.world, self.exchange.rank) if self.exchange is not None else (1, 0)
        self._prober.begin(None if sizes is None else list(sizes), world, rank)  # type: ignore[attr-defined]


def _positive(name: str, value: float, *, zero: bool = False) -> float:
    number = float(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise UserError(f"{name}: found {value!r}, expected a number {'of at least' if zero else 'above'} 0.")
    return number


def _as_rows(found: Any, copies: int, *, per_example: bool) -> Any:
    """What a loss returned as float64 (copies, examples); a number counts as one example."""
    import torch

    values = found.detach().double().cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found, float)
    if copies > 1 and (values.ndim != 2 or len(values) != copies):
        raise UserError(
            f"loss: losses(model, {copies}) gave the shape {values.shape}, expected ({copies}, examples): the batch "
            "repeated copy by copy; give an objective that does so, or set copies=1."
        )
    table = values.reshape(copies, -1)
    if not table.size:
        raise UserError("loss: found no value, expected a number or one loss per example.")
    if per_example and table.shape[1] == 1:
        raise UserError("per_example: the loss gave one number, expected one per example.")
    return table


def _check_finite(step: int, losses: Any) -> None:
    bad = np.argwhere(~np.isfinite(losses))
    if len(bad):
        variant, example = (int(number) for number in bad[0])
        raise NonFiniteLoss(
            step,
            f"the loss of example {example} is {losses[variant, example]}; the weights are those before the step. "
            "Take a learning rate ten times smaller, a smaller eps, or 32-bit weights.",
        )


def _merge(exchange: Exchange | None, losses: Any, *, per_example: bool = False) -> Any:
    """The examples of all workers side by side, in the order of ranks."""
    if exchange is None or exchange.world == 1:
        return losses
    shares = exchange.gather([float(value) for value in losses.reshape(-1)])
    if per_example and len({len(share) for share in shares}) > 1:
        counts = ", ".join(str(len(share) // len(losses)) for share in shares)
        raise UserError(
            f"per_example: workers measured {counts} examples, expected as many each; fit the batch to that."
        )
    return np.concatenate([np.asarray(share, dtype=np.float64).reshape(len(losses), -1) for share in shares], axis=1)
