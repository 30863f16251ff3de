"""The one place that writes to the weights: one pass per tensor, tile by tile, a pure function of a log record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from agentopt.weights.zeroth._directions import Directions
from agentopt.weights.zeroth._masks import MaskRule, choose_
from agentopt.weights.zeroth._philox import probe_seed
from agentopt.weights.zeroth._probing import TILE
from agentopt.weights.zeroth._rounding import round_
from agentopt.weights.zeroth._sites import Site
from agentopt.weights.zeroth._types import Shift

_ROUNDING = 1 << 21
"""Number, past any population, of the seed that a step's stochastic rounding draws from."""


class Estimate(Protocol):
    """Writes a tile of sum_k c_k z_k (unmasked, float32)."""

    def __call__(self, site: Site, start: int, out: Any, spare: Any) -> None:
        """Fill `out` from flat index `start` on; `spare` is a scratch tile of the same size."""
        ...


@dataclass(slots=True)
class Updater:
    """Applies the update of a step.

    Attributes:
        directions: makes the noise.
        mask: which weights move.
        rule: what is done with the estimate; its state tiles are float32 tensors per site.
        seed: the run's seed.
        weight_decay: share of a matrix's moving weights taken off per unit of learning rate.
        kernels: use the Triton kernel where it can be used.
    """

    directions: Directions
    mask: MaskRule
    rule: Any
    seed: int
    weight_decay: float = 0.0
    kernels: bool = True

    def apply(
        self,
        step: int,
        shifts: Sequence[Shift],
        coefficients: Sequence[float],
        lr: float,
        sites: Sequence[Site],
        state: Mapping[str, Mapping[str, Any]],
        scratch: tuple[Any, Any],
        flips: Any = None,
    ) -> None:
        """Move the weights.

        Args:
            step: number of the step.
            shifts: the directions.
            coefficients: c_k, one per direction (with `flips`: one per example).
            lr: learning rate; rounded to float32, as the log holds it.
            sites: the tensors that move.
            state: per site name, the rule's state tensors by slot.
            scratch: two float32 tiles.
            flips: per-example signs, or None.
        """
        plain = self.rule.name == "sgd" and flips is None
        rate = np.float32(lr)
        steps = [float(rate * np.float32(value)) for value in coefficients]
        if plain and not any(steps) and not self.weight_decay * lr:
            return  # w - (-0.0) would turn a weight of -0.0 into 0.0
        for site in sites:
            decay = float(np.float32(1) - rate * np.float32(self.weight_decay)) if site.is_matrix else 1.0
            if plain and self._fits_kernel(site):
                self._kernel(step, site, shifts, steps, decay)
                continue
            for start in range(0, site.size, TILE):
                stop = min(start + TILE, site.size)
                noise, spare = (one[: stop - start] for one in scratch)
                old = site.tensor.detach().view(-1)[start:stop]
                if plain:
                    self._sum(site, shifts, steps, start, noise, spare)
                elif flips is not None:
                    flips.estimate(site, shifts, coefficients, start, noise, spare)
                elif self.rule.wants == "direction":
                    self._sum(site, shifts, [1.0], start, noise, spare)
                else:
                    self._sum(site, shifts, [float(np.float32(c)) for c in coefficients], start, noise, spare)
                self.mask.apply_(site, old, noise, start, step)
                if plain:
                    new = self._moved(site, old, noise, spare, decay, step, start)
                else:
                    tiles = {slot: one.view(-1)[start:stop] for slot, one in state.get(site.name, {}).items()}
                    new = self._ruled(site, old, noise, tiles, coefficients, float(rate), step, start)
                self._store(site, old, new, step, start)

    def _sum(
        self, site: Site, shifts: Sequence[Shift], factors: Sequence[float], start: int, out: Any, spare: Any
    ) -> None:
        for number, (shift, factor) in enumerate(zip(shifts, factors, strict=True)):
            target = spare if number else out
            self.directions.fill(site, shift, start, factor, target)
            if number:
                out.add_(spare)

    def _moved(self, site: Site, old: Any, noise: Any, spare: Any, decay: float, step: int, start: int) -> Any:
        """Weights minus noise that already carries the learning rate; in place where nothing else touches them."""
        import torch

        if decay == 1.0 and old.dtype == torch.float32 and not self._holds(site):
            return old.sub_(noise)
        spare.copy_(old)
        if decay != 1.0:
            moves = self.mask.moves(site, old, start, step)
            spare.mul_(decay) if moves is None else choose_(spare, spare * decay, moves)
        spare.sub_(noise)
        self.mask.hold_(site, old, spare)
        return spare

    def _ruled(
        self,
        site: Site,
        old: Any,
        noise: Any,
        tiles: Mapping[str, Any],
        scalars: Sequence[float],
        lr: float,
        step: int,
        start: int,
    ) -> Any:
        wide = old.float()
        decay = self.weight_decay if site.is_matrix else 0.0
        new = self.rule.apply(wide, noise, tiles, lr, decay, step, scalars)
        # A rule may move a weight whose estimate is zero (momentum): those outside the mask stay.
        moves = self.mask.moves(site, old, start, step)
        if moves is not None:
            choose_(new, wide, moves.bitwise_not_())
        self.mask.hold_(site, old, new)
        return new

    def _holds(self, site: Site) -> bool:
        return self.mask.update == "fixed" and self.mask.applies(site) and site.threshold is not None

    def _store(self, site: Site, old: Any, new: Any, step: int, start: int) -> None:
        if new.data_ptr() == old.data_ptr():
            return
        if old.dtype == new.dtype:
            old.copy_(new)
        else:
            round_(old, new, probe_seed(self.seed, step, _ROUNDING), site.id, start)

    # --- Triton -------------------------------------------------------------------------------------------------------

    def _fits_kernel(self, site: Site) -> bool:
        from agentopt.weights.zeroth import _kernels

        if not self.kernels or self.directions.kind != "rademacher" or self.mask.update == "stored":
            return False
        return _kernels.usable(site.tensor)

    def _kernel(self, step: int, site: Site, shifts: Sequence[Shift], steps: Sequence[float], decay: float) -> None:
        from agentopt.weights.zeroth import _kernels

        applies = self.mask.applies(site)
        _kernels.update_(
            site.tensor.detach(),
            [shift.seed for shift in shifts],
            list(steps),
            decay,
            site.id,
            threshold=site.threshold or 0.0,
            mask=self.mask.kind if applies else "none",
            mask_seed=self.mask.mask_seed(step) if applies else 0,
            density=self.mask.density,
            clamp=self._holds(site),
            round_seed=probe_seed(self.seed, step, _ROUNDING),
        )
