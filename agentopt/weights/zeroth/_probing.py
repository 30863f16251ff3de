"""Forward passes at weights that are not there: each module builds its own perturbed weight, uses it and forgets it.

The model's tensors are never written to, so nothing drifts in 16 bit and a dynamic mask sees the true weights. One pass
can carry several variants of the weights, copy by copy along the batch: a module then works on each copy's rows with
that copy's weight, and what does not differ (attention, activations, frozen modules) runs once for all rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentopt.weights.load import need
from agentopt.weights.zeroth._direct import replaced, swapped, unwatched, watched
from agentopt.weights.zeroth._directions import Directions
from agentopt.weights.zeroth._masks import MaskRule
from agentopt.weights.zeroth._rows import (
    Again,
    Indivisible,
    alike,
    batch_rows,
    can_part,
    join,
    part_of,
    per_row,
    split_rows,
)
from agentopt.weights.zeroth._sites import Site, owners_of
from agentopt.weights.zeroth._types import Shift, Variant

TILE = 1 << 20
"""Weights perturbed at a time: two float32 scratch tiles of this size are all the extra memory."""

Scale = Callable[[Site, int, int], Any]
"""A multiplier of the direction: (site, start, stop) to a float32 tile, or None (HiZOO's inverse root curvature)."""


@dataclass(slots=True)
class Plan:
    """What the patched modules need to know of the pass that is running."""

    variants: Sequence[Variant]
    step: int
    noise: Any
    weight: Any
    held: tuple[object, ...] | None = None
    """What the noise tile holds now, so that the other sign of a pair need not make it again."""
    rows: int | None = None
    """Rows of the pass, all copies together; None where the loss calls parts of the model, not the model."""
    same: bool = True
    """Whether all copies were given the same token ids."""


class Prober:
    """Runs a model's forward pass at variants of its weights.

    Args:
        model: the module whose forward pass a loss calls.
        sites: its tuned tensors.
        directions: makes the noise.
        mask: which weights the noise reaches.
        kernels: use the Triton kernels where they can be used.

    Attributes:
        alone: whether a pass can carry only one variant, as its first pass showed.
        direct: ids of the tensors that others than their own modules read (see `_direct`).
    """

    def __init__(
        self, model: Any, sites: Sequence[Site], directions: Directions, mask: MaskRule, *, kernels: bool = True
    ) -> None:
        self.model = model
        self.sites = list(sites)
        self.directions = directions
        self.mask = mask
        self.scale: Scale | None = None
        self.kernels = kernels
        self.owners = owners_of(self.sites)
        self.alone = False
        self.direct: set[int] = set()
        self._known = False
        self._scratch: dict[Any, tuple[Any, Any]] = {}

    def scratch(self, device: Any) -> tuple[Any, Any]:
        """Two float32 tiles, made once per device: the noise, and the perturbed weight."""
        import torch

        found = self._scratch.get(device)
        if found is None:
            size = min(TILE, max(128, *(site.size for site in self.sites)))
            found = (torch.empty(size, device=device), torch.empty(size, device=device))
            self._scratch[device] = found
        return found

    @contextlib.contextmanager
    def at(self, variants: Sequence[Variant], step: int, active: Sequence[Site]) -> Generator[None]:
        """Inside, a forward pass measures `variants`, copy by copy along the first axis of what it is given.

        Args:
            variants: one per copy; the rows of a batch are split into as many equal parts.
            step: number of the step, for the mask.
            active: the sites that move at this step.

        Raises:
            Again: this model cannot be measured like that, and `alone` or `direct` say so now.
        """
        if all(not variant for variant in variants):
            yield
            return
        plan = Plan(variants, step, *self.scratch(self.sites[0].tensor.device))
        whole = [site for site in active if site.id in self.direct]
        if whole and len(variants) > 1:
            raise self._again()
        entering = self.model.register_forward_pre_hook(functools.partial(self._enter, plan), with_kwargs=True)
        try:
            with (
                self.patched(active, functools.partial(self._forward, plan)),
                swapped(in_place(whole, lambda site: self.whole(plan, site, variants[0]))),
            ):
                yield
        finally:
            entering.remove()

    @contextlib.contextmanager
    def patched(self, active: Sequence[Site], forward: Callable[..., Any]) -> Generator[None]:
        """Inside, modules that own active sites run `forward(module, their sites, own forward, *args, **kwargs)`.

        Args:
            active: the sites that move.
            forward: what they run.

        Raises:
            Again: in the first pass, when a tensor was read past its module.
        """
        moving = {site.id for site in active} - self.direct
        forwards: dict[Any, Callable[..., Any]] = {}
        for module, sites in self.owners.items():
            mine = {name: site for name, site in sites.items() if site.id in moving}
            if mine:
                forwards[module] = functools.partial(forward, module, mine, module.forward)
            elif not self._known:
                forwards[module] = functools.partial(_plainly, module, module.forward)
        used = set[int]()
        try:
            with replaced(forwards), contextlib.nullcontext() if self._known else watched(self.owners, used):
                yield
        except Indivisible as error:
            raise self._again() from error
        if not self._known:
            self._known = True
            if used:
                self.direct = used
                raise self._again()

    def _again(self) -> Again:
        self.alone = True
        return Again()

    # --- one module ---------------------------------------------------------------------------------------------------

    def _enter(self, plan: Plan, _model: Any, args: Any, kwargs: Any) -> None:
        """Before each forward pass of the whole model: how many rows it has."""
        plan.rows = batch_rows((args, kwargs)) or None
        copies = len(plan.variants)
        split_rows(plan.rows or 0, copies)
        plan.same = copies == 1 or alike((args, kwargs), plan.rows or 0, copies)

    def _forward(
        self, plan: Plan, module: Any, sites: Mapping[str, Site], original: Any, *args: Any, **kwargs: Any
    ) -> Any:
        with unwatched(module):
            if _runs(original, "Linear"):
                return self._linear(plan, module, sites, *args, *kwargs.values())
            if _runs(original, "Embedding") and module.max_norm is None:
                return self._embedding(plan, module, sites["weight"], *args, *kwargs.values())
            if hasattr(module, "functional") and {"lora_A", "lora_B"} >= set(sites) and module.copies == 1:
                return self._adapter(plan, module, sites, *args, **kwargs)
            return self._any(plan, module, sites, original, args, kwargs)

    def _share(self, plan: Plan, rows: int) -> int:
        """Rows of each copy in the input of a module, whose first axis must be that of the batch."""
        copies = len(plan.variants)
        if copies > 1 and (not rows or rows % copies or (plan.rows is not None and rows % plan.rows)):
            raise Indivisible
        return rows // copies

    def _linear(self, plan: Plan, module: Any, sites: Mapping[str, Site], x: Any) -> Any:
        """One tile of rows of W at a time."""
        import torch

        weight, copies = module.weight, len(plan.variants)
        rows = self._share(plan, x.shape[0])
        site = sites.get("weight")
        biases = self._biases(plan, module, sites)
        if site is not None and self._fits_kernel(plan, weight, x):
            return self._fused_linear(plan, module, site, biases, x, rows)
        flat = x.reshape(copies, -1, x.shape[-1])
        out = torch.empty((copies, flat.shape[1], weight.shape[0]), dtype=x.dtype, device=x.device)
        if site is None:
            torch.matmul(flat, weight.t(), out=out)
        elif self.directions.kind == "lowrank":
            torch.matmul(flat, weight.t(), out=out)
            self._add_lowrank(plan, site, flat, out)
        else:
            self._dense(plan, site, weight, flat, out)
        for copy, bias in enumerate(biases):
            if bias is not None:
                out[copy] += bias
        return out.reshape(*x.shape[:-1], weight.shape[0])

    def _dense(self, plan: Plan, site: Site, weight: Any, flat: Any, out: Any) -> None:
        import torch

        height, width = weight.shape
        step = tile_rows(height, width)
        for first in range(0, height, step):
            last = min(first + step, height)
            for copy, variant in enumerate(plan.variants):
                tile = self.perturbed(plan, site, variant, first * width, last * width)
                tile = tile.view(last - first, width)
                if first == 0 and last == height:
                    torch.mm(flat[copy], tile.t(), out=out[copy])
                else:
                    out[copy, :, first:last] = flat[copy] @ tile.t()

    def _add_lowrank(self, plan: Plan, site: Site, flat: Any, out: Any) -> None:
        """Low-rank shifts run as a batch of LoRA adapters, one per copy (EGGROLL): the weight is read once."""
        for copy, variant in enumerate(plan.variants):
            for shift in variant:
                left, right = self.directions.factors(site, shift)
                inner = (flat[copy] @ right.to(flat.dtype)) * shift.scale
                out[copy].addmm_(inner, left.to(flat.dtype).t())

    def _biases(self, plan: Plan, module: Any, sites: Mapping[str, Site]) -> list[Any]:
        site, bias = sites.get("bias"), module.bias
        if site is None:
            return [bias] * len(plan.variants)
        return [self.whole(plan, site, variant) for variant in plan.variants]

    def _embedding(self, plan: Plan, module: Any, site: Site, ids: Any) -> Any:
        """Rows that the batch looks up, and no others, are perturbed."""
        torch: Any = need("torch")

        copies = len(plan.variants)
        if copies > 1:
            ids = per_row(ids, plan.rows, copies, same=plan.same)
        unique, place = torch.unique(ids, return_inverse=True)
        table = module.weight[unique]
        noises: dict[int, Any] = {}
        out: list[Any] = []
        for variant, where in zip(plan.variants, place.reshape(copies, -1), strict=True):
            perturbed = table.float()
            for shift in variant:
                if shift.seed not in noises:
                    noise = self.directions.rows(site, shift, unique, 1.0)
                    if self.scale is not None:
                        self._scale_rows(site, noise, unique)
                    self.mask.apply_rows_(site, table, noise, unique, plan.step)
                    noises[shift.seed] = noise
                perturbed = perturbed + noises[shift.seed] * shift.scale
            out.append(perturbed.to(table.dtype)[where])
        return torch.stack(out).reshape(*ids.shape, table.shape[1])

    def _scale_rows(self, site: Site, noise: Any, rows: Any) -> None:
        width = noise.shape[1]
        for place, row in enumerate(rows.tolist()):
            scale = self.scale(site, row * width, (row + 1) * width) if self.scale else None
            if scale is not None:
                noise[place] *= scale

    def _adapter(self, plan: Plan, module: Any, sites: Mapping[str, Site], x: Any) -> Any:
        """Every copy its own adapter; the base layer runs once over all rows."""
        import torch

        copies = len(plan.variants)
        self._share(plan, x.shape[0])
        stacks: list[Any] = []
        for name in ("lora_A", "lora_B"):
            tensor, site = getattr(module, name), sites.get(name)
            if site is None:
                values = [tensor] * copies
            else:
                values = [self.whole(plan, site, variant) for variant in plan.variants]
            stacks.append(torch.stack([value.reshape(value.shape[-2:]) for value in values]))
        return module.functional(x, stacks[0], stacks[1], None)

    def _any(self, plan: Plan, module: Any, sites: Mapping[str, Site], original: Any, args: Any, kwargs: Any) -> Any:
        """Any other module that owns tuned tensors: its forward pass, once per copy, with the tensors swapped."""
        variants, copies = plan.variants, len(plan.variants)
        total = batch_rows((args, kwargs))
        if copies > 1 and (not can_part((args, kwargs)) or not self._share(plan, total)):
            raise Indivisible
        before = plan.rows
        results: list[Any] = []
        try:
            for copy, variant in enumerate(variants):
                # Modules inside of this one see one copy.
                plan.variants, plan.rows = [variant], None
                part = functools.partial(part_of, copy=copy, copies=copies, total=total)
                with swapped({(module, name): self.whole(plan, site, variant) for name, site in sites.items()}):
                    results.append(original(*part(args), **part(kwargs)))
        finally:
            plan.variants, plan.rows = variants, before
        return results[0] if copies == 1 else join(results)

    # --- perturbed weights --------------------------------------------------------------------------------------------

    def perturbed(self, plan: Plan, site: Site, variant: Variant, start: int, stop: int) -> Any:
        """Weights `start` to `stop` (flat) of a variant, in the tensor's own format; valid until the next call."""
        tile = site.tensor.detach().view(-1)[start:stop]
        if not variant:
            return tile
        out = plan.weight[: stop - start]
        source = tile
        for shift in variant:
            noise = self._noise(plan, site, shift, tile, start)
            out = _add(source, noise, shift.scale < 0, out)
            source = out
        return out if tile.dtype == out.dtype else out.to(tile.dtype)

    def _noise(self, plan: Plan, site: Site, shift: Shift, tile: Any, start: int) -> Any:
        """|scale| times the masked direction, from the scratch when it is there already."""
        noise = plan.noise[: tile.numel()]
        key = (site.id, shift.seed, shift.right_seed, abs(shift.scale), start, tile.numel())
        if plan.held != key:
            self.directions.fill(site, shift, start, abs(shift.scale), noise)
            if self.scale is not None and (scale := self.scale(site, start, start + tile.numel())) is not None:
                noise.mul_(scale)
            self.mask.apply_(site, tile, noise, start, plan.step)
            plan.held = key
        return noise

    def fill_direction(self, plan: Plan, site: Site, shift: Shift, out: Any) -> None:
        """Write the masked direction of a whole tensor, without its scale, into the flat `out`."""
        flat = site.tensor.detach().view(-1)
        for start in range(0, site.size, TILE):
            tile = flat[start : start + TILE]
            unit = Shift(shift.seed, 1.0, shift.right_seed)
            out[start : start + tile.numel()] = self._noise(plan, site, unit, tile, start)

    def whole(self, plan: Plan, site: Site, variant: Variant) -> Any:
        """A whole perturbed tensor of its own, for what is small or used in ways that cannot be tiled."""
        import torch

        out = torch.empty_like(site.tensor)
        flat = out.view(-1)
        for start in range(0, site.size, TILE):
            stop = min(start + TILE, site.size)
            flat[start:stop] = self.perturbed(plan, site, variant, start, stop)
        return out

    # --- Triton -------------------------------------------------------------------------------------------------------

    def _fits_kernel(self, plan: Plan, weight: Any, x: Any) -> bool:
        from agentopt.weights.zeroth import _kernels

        return (
            self.kernels
            and self.directions.kind == "rademacher"
            and self.scale is None
            and self.mask.update != "stored"
            and all(len(variant) <= 1 for variant in plan.variants)
            and x.dtype == weight.dtype
            and _kernels.usable(weight)
        )

    def _fused_linear(self, plan: Plan, module: Any, site: Site, biases: list[Any], x: Any, rows: int) -> Any:
        from agentopt.weights.zeroth import _kernels

        shifts = [variant[0] if variant else Shift(0, 0.0) for variant in plan.variants]
        applies = self.mask.applies(site)
        y = _kernels.linear(
            x,
            module.weight,
            None,
            [shift.seed for shift in shifts],
            [shift.scale for shift in shifts],
            rows,
            site.id,
            mask=self.mask.kind if applies else "none",
            threshold=site.threshold or 0.0,
            mask_seed=self.mask.mask_seed(plan.step) if applies else 0,
            density=self.mask.density,
        )
        for copy, bias in enumerate(biases):
            if bias is not None:
                y[copy * rows : (copy + 1) * rows] += bias
        return y


def _add(source: Any, noise: Any, negative: bool, out: Any) -> Any:
    import torch

    wide = source if source.dtype == out.dtype else source.float()
    return torch.sub(wide, noise, out=out) if negative else torch.add(wide, noise, out=out)


def tile_rows(height: int, width: int) -> int:
    """Rows of a matrix in one tile; tiles begin at multiples of 128 weights."""
    if height * width <= TILE:
        return height
    rows = max(1, TILE // width)
    while rows * width % 128 and rows > 1:
        rows -= 1
    return rows


def in_place(sites: Sequence[Site], make: Callable[[Site], Any]) -> dict[tuple[Any, str], Any]:
    """What `swapped` takes: for every place of a site one and the same tensor."""
    return {owner: tensor for site in sites for tensor in [make(site)] for owner in site.owners}


def _plainly(module: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    with unwatched(module):
        return original(*args, **kwargs)


def _runs(original: Any, name: str) -> bool:
    """Whether a forward pass is that of `torch.nn.<name>`, with nobody's own in its place."""
    import torch

    return getattr(original, "__func__", None) is getattr(torch.nn, name).forward
