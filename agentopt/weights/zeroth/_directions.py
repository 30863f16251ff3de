"""Directions in the space of the weights, made tile by tile from a seed: signs, normals, or low-rank products."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from agentopt.weights.zeroth import _noise
from agentopt.weights.zeroth._philox import philox
from agentopt.weights.zeroth._sites import Site
from agentopt.weights.zeroth._types import Kind, Shift

_SIGNS, _NORMALS = 0, 1
_SMALL = 1 << 17
"""Weights of a tensor whose signs are kept, packed, from a step's probes to its update. (A tile holds more.)"""


@dataclass(slots=True)
class Directions:
    """Makes the entries of a direction, never a whole one.

    A low-rank direction is U V^T / sqrt(rank) for a matrix, with unit variance per entry, and signs for a vector.

    Attributes:
        kind: "rademacher", "normal" or "lowrank".
        rank: columns of the low-rank factors.
    """

    kind: Kind
    rank: int = 1
    _factors: dict[tuple[int, int, int], tuple[Any, Any]] = field(default_factory=dict[tuple[int, int, int], Any])

    _words: dict[tuple[int, int], Any] = field(default_factory=dict[tuple[int, int], Any])

    def fill(self, site: Site, shift: Shift, start: int, scale: float, out: Any) -> None:
        """Write `scale` times the direction's entries from flat index `start` on into `out`.

        Args:
            site: the tensor.
            shift: whose direction.
            start: flat index.
            scale: factor; `shift.scale` is not used.
            out: float32 tile, contiguous, one-dimensional.
        """
        stop = start + out.numel()
        if self.kind == "lowrank" and site.is_matrix:
            out.copy_(self._product(site, shift, start, stop)).mul_(scale)
        elif self.kind == "normal":
            _noise.fill_normals(shift.seed, site.id, start, stop, scale, out)
        elif site.size <= _SMALL:
            _noise.fill_signs(self._words_of(site, shift), scale, out)
        else:
            _noise.fill_sign_range(shift.seed, site.id, start, stop, scale, out)

    def rows(self, site: Site, shift: Shift, rows: Any, scale: float) -> Any:
        """`scale` times the direction at some rows of a matrix.

        Args:
            site: a matrix of shape (n, width).
            shift: whose direction.
            rows: int64 tensor of row numbers, any length.
            scale: factor.

        Returns:
            float32 of shape (rows, width).
        """
        if self.kind == "lowrank":
            left, right = self.factors(site, shift)
            return (left[rows] @ right.T) * scale
        index = flat_index(rows, site.tensor.shape[1])
        if self.kind == "normal":
            return normals_at(shift.seed, site.id, index) * scale
        return signs_at(shift.seed, site.id, index) * scale

    def factors(self, site: Site, shift: Shift) -> tuple[Any, Any]:
        """Left (rows, rank) and right (columns, rank) factors, scaled so that the product's entries have variance 1."""
        key = (shift.seed, shift.right_seed, site.id)
        found = self._factors.get(key)
        if found is None:
            tensor = site.tensor
            rows = tensor.shape[0]
            left, right = _noise.factors(
                shift.seed, shift.right_seed, site.id, rows, tensor.numel() // rows, self.rank, tensor.device
            )
            found = (left / self.rank**0.5, right)
            self._factors[key] = found
        return found

    def forget(self) -> None:
        """Drop what was kept for the last step."""
        self._factors.clear()
        self._words.clear()

    def _words_of(self, site: Site, shift: Shift) -> Any:
        """The packed signs of a small tensor, kept for the step: its probes and its update need the same."""
        key = (shift.seed, site.id)
        found = self._words.get(key)
        if found is None:
            found = _noise.sign_words(shift.seed, site.id, 0, site.size, site.tensor.device)
            self._words[key] = found
        return found

    def _product(self, site: Site, shift: Shift, start: int, stop: int) -> Any:
        left, right = self.factors(site, shift)
        width = right.shape[0]
        first, last = start // width, (stop - 1) // width + 1
        return (left[first:last] @ right.T).reshape(-1)[start - first * width : stop - first * width]


def flat_index(rows: Any, width: int) -> Any:
    """Flat indices (rows, width) of whole rows."""
    import torch

    return rows.long().unsqueeze(1) * width + torch.arange(width, device=rows.device)


def words_at(seed: int, identity: int, stream: int, block: Any) -> Any:
    """The four Philox words of each block: int32 of the blocks' shape plus an axis of 4."""
    return philox(seed, block.reshape(-1), identity, stream).view(*block.shape, 4)


def signs_at(seed: int, identity: int, index: Any) -> Any:
    """Signs (float32 +1 or -1) at rows of consecutive flat indices: those that `fill` gives there."""
    import torch

    first = index[:, :1] // 128
    last = int((index[:, -1:] // 128 - first).max()) + 1 if index.numel() else 1
    blocks = first + torch.arange(last, device=index.device)
    words = words_at(seed, identity, _SIGNS, blocks).view(index.shape[0], -1)
    place = index - first * 128
    word = words.gather(1, place // 32)
    return ((word >> (place % 32).to(torch.int32)) & 1).float().mul_(2).sub_(1)


def normals_at(seed: int, identity: int, index: Any) -> Any:
    """Standard normals at rows of consecutive flat indices: those that `fill` gives there."""
    import torch

    first = index[:, :1] // 4
    last = int((index[:, -1:] // 4 - first).max()) + 1 if index.numel() else 1
    blocks = first + torch.arange(last, device=index.device)
    words = words_at(seed, identity, _NORMALS, blocks).view(-1, 4)
    values = _noise._box_muller(torch, words).view(index.shape[0], -1)
    return values.gather(1, index - first * 4)
