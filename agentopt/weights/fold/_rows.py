"""Rows of tokens, a block of them per document: what an inner step learns and what a question is asked with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from agentopt.errors import UserError


@dataclass(frozen=True, slots=True)
class Rows:
    """`E` documents of `R` rows of `L` tokens, padded on the right.

    No attention mask is needed: causal attention never sees the padding that follows a token. A document with fewer
    rows has rows of weight 0.
    """

    ids: Any
    """(E, R, L) int64."""
    weight: Any
    """(E, R, L) float32: place t weighs the prediction OF token t, 0 where it is padding or prompt.
    A row's first token is never predicted, whatever stands there."""

    def __post_init__(self) -> None:
        if self.ids.dim() != 3 or self.ids.shape != self.weight.shape:
            raise UserError(
                f"rows: found ids of shape {tuple(self.ids.shape)} and weights of shape {tuple(self.weight.shape)}, "
                "expected (documents, rows, tokens) for both."
            )

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return int(self.ids.shape[0])

    def to(self, device: Any) -> Rows:
        """The same on another device."""
        return Rows(self.ids.to(device), self.weight.to(device))

    def part(self, start: int, stop: int) -> Rows:
        """Documents `start` to `stop`, without `stop`."""
        return Rows(self.ids[start:stop], self.weight[start:stop])

    def scaled(self, to: Literal["row", "root", "document"]) -> Rows:
        """Weights that sum to 1 over every row (a document's loss is then the sum of its rows' means), or over every
        document (its mean), or the sum of its rows' means over the root of their number.

        With "row", a fact is written as strongly among many facts as among few, and what facts have in common as often
        as there are facts: a step that suits ten facts goes too far with forty. "root" stands between the two.
        """
        weight = self.weight.clone()
        weight[:, :, 0] = 0
        total = weight.sum((1, 2) if to == "document" else (2,), keepdim=True)
        scaled = weight / total.clamp_min(1e-12)
        if to == "root":
            rows = (total > 0).sum(1, keepdim=True).clamp_min(1)
            scaled = scaled / rows**0.5
        return Rows(self.ids, scaled)


@dataclass(slots=True)
class Work:
    """Rows as the engines use them: cut to what is needed, the predicted tokens picked out."""

    ids: Any
    """(E, R, T): inputs, without the last token, which predicts nothing."""
    places: Any
    """(K,): places in the flattened (E, R, T) at which a weighted token is predicted."""
    targets: Any
    """(K,): those tokens."""
    weight: Any
    """(K,)"""
    document: Any
    """(K,): to which document each belongs."""
    first: int
    """The first column with such a place: a head that cannot pick computes from here."""
    below: Any = None
    """Hidden states under the lowest adapted layer, once they are known; see `LoraEngine`."""


def work(rows: Rows, device: Any) -> Work:
    """Prepare rows for a model on `device`."""
    here = rows.to(device)
    weighted = here.weight != 0
    weighted[:, :, 0] = False
    e, r, t = weighted.nonzero(as_tuple=True)
    inputs = int(t.max()) if t.numel() else 1
    return Work(
        ids=here.ids[:, :, :inputs].contiguous(),
        places=(e * here.ids.shape[1] + r) * inputs + t - 1,
        targets=here.ids[e, r, t],
        weight=here.weight[e, r, t],
        document=e,
        first=int(t.min()) - 1 if t.numel() else 0,
    )


def unpack(values: Any, rows: Rows) -> Any:
    """Values (K, ...) of the weighted tokens, in the order of `Work`, back in (E, R, L, ...); 0 elsewhere."""
    weighted = (rows.weight != 0).to(values.device)
    weighted[:, :, 0] = False
    places = weighted.reshape(-1).nonzero().squeeze(1)
    every = values.new_zeros(weighted.numel(), *values.shape[1:]).index_copy(0, places, values)
    return every.reshape(*weighted.shape, *values.shape[1:])
