"""The two passes over a checkpoint: rows of every weight for the books, then every weight to bytes.

Both hold a few million weights at a time, whatever the size of the tensors.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from agentopt.errors import UserError
from agentopt.weights.gg import _books
from agentopt.weights.gg._coders import Coder
from agentopt.weights.gg._fit import fit
from agentopt.weights.gg._plan import Layer
from agentopt.weights.gg._shards import ShardWriter, numbers, raw_bytes
from agentopt.weights.gg._source import WeightSource
from agentopt.weights.gg._types import GGFit, Histogram, TensorReport

TILE = 1 << 22
"""Weights that are worked on at once."""
BINS = 121
"""Of a histogram; odd, so that zeros have the middle one."""
SPAN = 6.0
"""Standard deviations to each side of it."""
_SAMPLED = 1 << 21
_ROWS = (2, 64)


def sample(source: WeightSource, layer: Layer, rows: int, seed: int) -> Tensor:
    """Rows of a weight, drawn without replacement: float32 (at most rows, in), in their order."""
    out = layer.shape[0]
    if rows >= out:
        return check_finite(layer, _oriented(source, layer).float(), 0)
    digest = hashlib.sha256(f"{seed} {layer.tensor}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    chosen: list[int] = numbers(torch.randperm(out, generator=generator)[:rows].sort().values)
    if layer.transposed:
        found = source.read(layer.tensor).T[chosen]
    else:
        found = torch.cat([source.rows(layer.tensor, row, row + 1) for row in chosen])
    for at, row in enumerate(chosen):
        check_finite(layer, found[at : at + 1], row)
    return found.float()


def refined_books(source: WeightSource, layers: Sequence[Layer], *, seed: int, columns: Mapping[str, Tensor]) -> Tensor:
    """The default books, moved towards the model's weights: about two million of them, of every layer alike."""
    width = sum(layer.shape[1] for layer in layers)
    rows = min(max(_SAMPLED // width, _ROWS[0]), _ROWS[1])
    samples = [sample(source, layer, rows, seed) for layer in layers]
    weights = [columns.get(layer.name) for layer in layers]
    return _books.refine(_books.default_books(), samples, column_weights=weights)


def check_finite(layer: Layer, rows: Tensor, start: int) -> Tensor:
    """Rows without NaN and infinity.

    Raises:
        UserError: naming the tensor and the row.
    """
    bad = ~torch.isfinite(rows).all(1)
    if bool(bad.any()):
        row = start + int(bad.nonzero()[0])
        raise UserError(f"{layer.tensor}: found NaN or an infinite number in row {row}, expected finite weights.")
    return rows


def tiles(source: WeightSource, layer: Layer) -> Iterator[tuple[int, Tensor]]:
    """A weight as (first row, rows), at most `TILE` numbers at a time, in the number type of the source."""
    out, columns = layer.shape
    step = max(1, TILE // columns)
    if layer.transposed or step >= out:
        whole = _oriented(source, layer)
        for start in range(0, out, step):
            yield start, check_finite(layer, whole[start : start + step], start)
        return
    for start in range(0, out, step):
        yield start, check_finite(layer, source.rows(layer.tensor, start, min(start + step, out)), start)


def _oriented(source: WeightSource, layer: Layer) -> Tensor:
    whole = source.read(layer.tensor)
    return whole.T if layer.transposed else whole


@dataclass
class _Tally:
    """Sums over the tiles of one weight."""

    sigma: float
    signal: float = 0.0
    noise: float = 0.0
    codes: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.int64))
    bins: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))

    @property
    def reach(self) -> float:
        return SPAN * self.sigma or 1.0

    def add(self, weight: Tensor, codes: Tensor, decoded: Tensor) -> None:
        exact = weight.double()
        self.signal += float(exact.square().sum())
        self.noise += float((exact - decoded.double()).square_().sum())
        self.codes += torch.bincount(codes.flatten(), minlength=256)
        place = ((weight / self.reach + 1) * (BINS / 2)).clamp_(0, BINS - 1).to(torch.int32)
        self.bins += torch.bincount(place.flatten(), minlength=BINS)

    def sqnr(self) -> float:
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    def entropy(self) -> float:
        share = self.codes[self.codes > 0].double() / int(self.codes.sum())
        return float(-(share * share.log2()).sum()) + 0.0


def quantize_layer(source: WeightSource, layer: Layer, coder: Coder, writer: ShardWriter) -> tuple[TensorReport, str]:
    """Encode one weight into a file.

    Returns:
        What became of it, and the sha256 of its bytes in the source.
    """
    began = time.perf_counter()
    digest = hashlib.sha256()
    fitted = _fit(source, layer)
    tally = _Tally(fitted.sigma)
    peak = _peak(source, layer) if coder.needs_peak else None
    for start, raw in tiles(source, layer):
        digest.update(raw_bytes(raw))
        weight = raw.float()
        coded = coder.encode(layer, weight, peak)
        for end, part in coded.parts.items():
            writer.put(f"{layer.name}.{end}", part, start)
        tally.add(weight, coded.codes, coded.decoded)
    for end, part in coder.whole(layer).items():
        writer.put(f"{layer.name}.{end}", part)
    weights = math.prod(layer.shape)
    low = tally.reach
    report = TensorReport(
        name=layer.name,
        shape=layer.shape,
        nu=fitted.nu,
        beta=fitted.beta,
        sigma=fitted.sigma,
        sqnr_db=tally.sqnr(),
        entropy_bits=tally.entropy(),
        stored_bits=8 * sum(entry.bytes for entry in coder.entries(layer)) / weights,
        seconds=time.perf_counter() - began,
        histogram=Histogram(-low, low, tuple(numbers(tally.bins))),
    )
    return report, digest.hexdigest()


def copy_tensor(source: WeightSource, name: str, writer: ShardWriter) -> str:
    """Copy a tensor as it is; returns the sha256 of its bytes."""
    shape = source.shape(name)
    digest = hashlib.sha256()
    step = max(1, TILE // max(1, math.prod(shape[1:])))
    if len(shape) < 1 or step >= shape[0]:
        whole = source.read(name)
        writer.put(name, whole)
        digest.update(raw_bytes(whole))
        return digest.hexdigest()
    for start in range(0, shape[0], step):
        part = source.rows(name, start, min(start + step, shape[0]))
        writer.put(name, part, start)
        digest.update(raw_bytes(part))
    return digest.hexdigest()


def _fit(source: WeightSource, layer: Layer) -> GGFit:
    """Of the whole weight where it is small enough, else of rows drawn from it."""
    found = fit(sample(source, layer, max(1, TILE // layer.shape[1]), 0))
    return GGFit(float(found.nu), float(found.beta), float(found.sigma))


def _peak(source: WeightSource, layer: Layer) -> float:
    return max(float(rows.abs().max()) for _, rows in tiles(source, layer))
