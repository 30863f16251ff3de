"""A direction for every example of a batch: one drawn for all, its signs flipped by rows and by columns per example.

Example b of a batch sees W + eps * (Z o r_b s_b^T), with Z the shared direction and r_b, s_b vectors of signs (flipout,
arXiv 1803.04386; for zeroth-order tuning GRZO, arXiv 2606.02857). A matrix product handles all examples at once:
y_b = x_b W^T + eps * ((x_b o s_b) Z^T) o r_b; and so does the update: sum_b c_b Z o r_b s_b^T = Z o (R^T diag(c) S).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentopt.errors import UserError
from agentopt.weights.load import need
from agentopt.weights.zeroth import _noise
from agentopt.weights.zeroth._direct import swapped
from agentopt.weights.zeroth._directions import Directions
from agentopt.weights.zeroth._probing import Plan, Prober, tile_rows
from agentopt.weights.zeroth._rows import Again, Indivisible, batch_rows, can_part, join, part_of, per_row, split_rows
from agentopt.weights.zeroth._sites import Site
from agentopt.weights.zeroth._types import Shift, Variant


@dataclass(slots=True)
class Flips:
    """The signs of the examples of a batch.

    Attributes:
        directions: makes the shared direction.
        examples: examples in the whole batch, over all workers.
    """

    directions: Directions
    examples: int
    _known: dict[tuple[int, int, int], Any] = field(default_factory=dict[tuple[int, int, int], Any])

    def of(self, site: Site, shift: Shift, axis: int) -> Any:
        """Signs over an axis of a tensor: float32 (examples, length of the axis)."""
        key = (shift.seed, site.id, axis)
        found = self._known.get(key)
        if found is None:
            tensor = site.tensor
            rows = tensor.shape[0] if tensor.dim() else 1
            size = rows if axis == 0 else tensor.numel() // rows
            found = _noise.example_signs(shift.seed, site.id, axis, self.examples, size, tensor.device)
            self._known[key] = found
        return found

    def estimate(
        self, site: Site, shifts: Sequence[Shift], coefficients: Sequence[float], start: int, out: Any, spare: Any
    ) -> None:
        """Write sum_k sum_b c_kb Z_k o r_b s_b^T from flat index `start` on into `out`."""
        import torch

        table = torch.tensor(list(coefficients), dtype=torch.float32, device=out.device).view(len(shifts), -1)
        stop = start + out.numel()
        for number, shift in enumerate(shifts):
            target = spare if number else out
            self.directions.fill(site, shift, start, 1.0, target)
            weighted = (self.of(site, shift, 0) * table[number].unsqueeze(1)).t()
            if site.is_matrix:
                right = self.of(site, shift, 1)
                width = right.shape[1]
                first, last = start // width, (stop - 1) // width + 1
                factors = (weighted[first:last] @ right).reshape(-1)[start - first * width : stop - first * width]
            else:
                factors = weighted[start:stop].sum(1)
            target.mul_(factors)
            if number:
                out.add_(spare)


class ExampleProber(Prober):
    """Forward passes in which every example of the batch has weights of its own."""

    _sizes: Sequence[int] | None = None
    _world = 1
    _rank = 0
    _passes = 0
    _flips: Flips | None = None
    _here: Any = None

    def begin(self, sizes: Sequence[int] | None, world: int, rank: int) -> None:
        """Say what the next forward passes carry.

        Args:
            sizes: examples of each pass, in order; None for one pass with one row per example.
            world: workers that share the batch in equal parts.
            rank: which of them this is.
        """
        self._sizes, self._world, self._rank, self._passes = sizes, world, rank, 0
        self._here = None
        self._flips = None if sizes is None else Flips(self.directions, sum(sizes) * world)

    @contextlib.contextmanager
    def at(self, variants: Sequence[Variant], step: int, active: Sequence[Site]) -> Generator[None]:
        """As `Prober.at`; each pass first finds out which examples it carries."""
        if any(site.id in self.direct for site in active):
            raise UserError(
                f"per_example: {self._direct_names()} is read past its own module, where the rows of a batch cannot be "
                "told apart; leave it out with trainable=, or probe without per_example."
            )
        try:
            with super().at(variants, step, active):
                yield
        except Again as again:
            if self.direct:
                raise
            raise UserError(
                "per_example: a module of this model is given something else than the rows of the batch along the "
                "first axis (a cache, say); leave its weights out with trainable=, or probe without per_example."
            ) from again

    def _direct_names(self) -> str:
        return ", ".join(site.name for site in self.sites if site.id in self.direct)

    def _enter(self, plan: Plan, _model: Any, args: Any, kwargs: Any) -> None:
        """The rows of a pass are told apart."""
        import torch

        super()._enter(plan, _model, args, kwargs)
        rows = split_rows(plan.rows or 0, len(plan.variants))
        if self._sizes is None and self._passes == 0:
            self._flips = Flips(self.directions, rows * self._world)
            first, count = rows * self._rank, rows
        elif self._sizes is None or self._passes >= len(self._sizes):
            raise UserError(
                "per_example: the loss made more forward passes than it says; give an objective of "
                "agentopt.weights.tasks, or one with pass_sizes (examples of each pass, in order)."
            )
        else:
            first = sum(self._sizes) * self._rank + sum(self._sizes[: self._passes])
            count = self._sizes[self._passes]
        if rows % count:
            raise UserError(
                f"per_example: a forward pass had {rows} rows for {count} examples; a loss measured per example "
                "needs the same number of consecutive rows for each of them."
            )
        self._passes += 1
        device = self.sites[0].tensor.device
        self._here = torch.arange(first, first + count, device=device).repeat_interleave(rows // count)

    def _share(self, plan: Plan, rows: int) -> int:
        if self._here is None or self._flips is None:
            raise UserError(
                "per_example: the loss calls parts of the model, expected it to call the model itself, whose rows tell "
                "the examples apart."
            )
        each, left = divmod(rows, len(plan.variants) * len(self._here))
        if not each or left:
            raise Indivisible
        return each * len(self._here)

    def _signs(self, site: Site, shift: Shift, axis: int, rows: int | None = None) -> Any:
        """Signs of each row of a copy; where tokens were made rows, of each of those."""
        assert self._flips is not None
        here = self._here if rows is None else self._here.repeat_interleave(rows // len(self._here))
        return self._flips.of(site, shift, axis)[here]

    def _linear(self, plan: Plan, module: Any, sites: Mapping[str, Site], x: Any) -> Any:
        import torch

        copies = len(plan.variants)
        rows = self._share(plan, x.shape[0])
        parts = x.reshape(copies, rows, -1, x.shape[-1])
        out = torch.matmul(parts, module.weight.t())
        if module.bias is not None:
            out += module.bias
        for copy, variant in enumerate(plan.variants):
            for shift in variant:
                if (site := sites.get("weight")) is not None:
                    self._shifted(plan, site, shift, parts[copy], out[copy])
                if (site := sites.get("bias")) is not None:
                    noise = self._whole_noise(plan, site, shift)
                    out[copy] += (self._signs(site, shift, 0, rows) * noise).unsqueeze(1).to(out.dtype)
        return out.reshape(*x.shape[:-1], module.weight.shape[0])

    def _shifted(self, plan: Plan, site: Site, shift: Shift, x: Any, out: Any) -> None:
        height, width = site.tensor.shape
        left = self._signs(site, shift, 0, len(x)).unsqueeze(1).to(x.dtype)
        turned = x * self._signs(site, shift, 1, len(x)).unsqueeze(1).to(x.dtype)
        step = tile_rows(height, width)
        flat = site.tensor.detach().view(-1)
        for first in range(0, height, step):
            last = min(first + step, height)
            tile = flat[first * width : last * width]
            noise = self._noise(plan, site, shift, tile, first * width).view(last - first, width).to(x.dtype)
            change = (turned @ noise.t()) * left[..., first:last]
            out[..., first:last] += -change if shift.scale < 0 else change

    def _embedding(self, plan: Plan, module: Any, site: Site, ids: Any) -> Any:
        torch: Any = need("torch")

        copies = len(plan.variants)
        ids = per_row(ids, plan.rows, copies, same=plan.same)
        rows = self._share(plan, ids.shape[0])
        out: list[Any] = []
        for variant, part in zip(plan.variants, ids.reshape(copies, -1, *ids.shape[1:]), strict=True):
            values = module.weight[part].float()
            unique, where = torch.unique(part, return_inverse=True)
            for shift in variant:
                noise = self.directions.rows(site, shift, unique, shift.scale)
                self.mask.apply_rows_(site, module.weight[unique], noise, unique, plan.step)
                left = self._signs(site, shift, 0, rows).gather(1, part.reshape(part.shape[0], -1)).reshape(part.shape)
                right = self._signs(site, shift, 1, rows)
                right = right.reshape(part.shape[0], *[1] * (part.dim() - 1), -1)
                values = values + noise[where] * left.unsqueeze(-1) * right
            out.append(values.to(module.weight.dtype))
        return torch.cat(out)

    def _adapter(self, plan: Plan, module: Any, sites: Mapping[str, Site], x: Any) -> Any:
        import torch

        times = self._share(plan, x.shape[0]) // len(self._here)
        stacks: list[Any] = []
        for name in ("lora_A", "lora_B"):
            tensor, site = getattr(module, name), sites.get(name)
            rows: list[Any] = []
            for variant in plan.variants:
                values = tensor.detach().reshape(tensor.shape[-2:]).unsqueeze(0)
                values = values.expand(len(self._here), -1, -1)
                if site is not None:
                    for shift in variant:
                        values = values + self._flipped(plan, site, shift).reshape(values.shape)
                rows.append(values)
            stacks.append(torch.cat(rows))
        return module.functional(x, stacks[0], stacks[1], torch.arange(x.shape[0] // times, device=x.device))

    def _flipped(self, plan: Plan, site: Site, shift: Shift) -> Any:
        """The shift of every row of a copy: (rows, *shape), for tensors that are small."""
        noise = self._whole_noise(plan, site, shift)
        left = self._signs(site, shift, 0)
        if not site.is_matrix:
            return (left * noise).view(len(left), *site.tensor.shape)
        shape = (len(left), *site.tensor.shape)
        right = self._signs(site, shift, 1)
        return (noise.view(left.shape[1], -1) * left.unsqueeze(2) * right.unsqueeze(1)).view(shape)

    def _whole_noise(self, plan: Plan, site: Site, shift: Shift) -> Any:
        flat = site.tensor.detach().view(-1)
        if flat.numel() > plan.noise.numel():
            raise UserError(f"{site.name}: too large for a module of this kind; probe it without per_example.")
        noise = self._noise(plan, site, shift, flat, 0)
        return (-noise if shift.scale < 0 else noise.clone()).view(site.tensor.shape)

    def _any(self, plan: Plan, module: Any, sites: Mapping[str, Site], original: Any, args: Any, kwargs: Any) -> Any:
        """Any other module: once per row, with that row's tensors. Meant for norms, which are cheap."""
        import torch

        total = batch_rows((args, kwargs))
        rows = self._share(plan, total)
        if not can_part((args, kwargs)):
            raise Indivisible
        here = self._here
        moved: dict[str, list[Any]] = {}
        for name, site in sites.items():
            moved[name] = []
            for variant in plan.variants:
                total = site.tensor.detach().unsqueeze(0).expand(len(here), *site.tensor.shape).float()
                for shift in variant:
                    total = total + self._flipped(plan, site, shift)
                moved[name].append(total.to(site.tensor.dtype))
        norm = type(module).__name__.endswith("RMSNorm") and type(module) is not torch.nn.RMSNorm
        if norm and args and rows == len(here):
            return self._broadcast(module, original, args, kwargs, moved)
        return self._one_by_one(plan, module, original, args, kwargs, moved)

    def _broadcast(self, module: Any, original: Any, args: Any, kwargs: Any, moved: Mapping[str, Sequence[Any]]) -> Any:
        """A norm written in plain multiplications takes a weight per row, in one call."""
        import torch

        middle = [1] * (args[0].dim() - 2)
        stacked = {name: torch.cat(list(values)) for name, values in moved.items()}
        with swapped({(module, name): one.view(len(one), *middle, *one.shape[1:]) for name, one in stacked.items()}):
            return original(*args, **kwargs)

    def _one_by_one(
        self, plan: Plan, module: Any, original: Any, args: Any, kwargs: Any, moved: Mapping[str, Sequence[Any]]
    ) -> Any:
        variants, here, rows = plan.variants, self._here, plan.rows
        total, count = batch_rows((args, kwargs)), len(variants) * len(here)
        results: list[Any] = []
        try:
            for number in range(count):
                copy, row = divmod(number, len(here))
                # Modules inside of this one see one row.
                plan.variants, plan.rows, self._here = [variants[copy]], None, here[row : row + 1]
                part = functools.partial(part_of, copy=number, copies=count, total=total)
                with swapped({(module, name): values[copy][row] for name, values in moved.items()}):
                    results.append(original(*part(args), **part(kwargs)))
        finally:
            plan.variants, plan.rows, self._here = variants, rows, here
        return join(results)
