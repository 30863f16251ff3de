"""Layers of a model by kind and depth, from their names: what tables of hundreds of weights are summed up by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentopt.weights.gg import TensorReport

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer stands in a model.

    Attributes:
        kind: what all blocks have one of, such as `q_proj`.
        depth: of its block; None outside of the blocks.
    """

    kind: str
    depth: int | None


def places(names: Iterable[str]) -> dict[str, Place]:
    """Kind and depth of every name.

    The first number in a dotted name is the depth; what follows it without numbers is the kind, as short as it can be:
    the last part, or all of it where two kinds end alike (GPT-2 has `attn.c_proj` and `mlp.c_proj`). A name without
    such a number is a kind of its own.
    """
    split = {name: _split(name) for name in names}
    ends: dict[str, set[str]] = {}
    for kind, depth in split.values():
        if depth is not None:
            ends.setdefault(kind.rpartition(".")[2], set()).add(kind)
    found: dict[str, Place] = {}
    for name, (kind, depth) in split.items():
        last = kind.rpartition(".")[2]
        short = depth is not None and last and len(ends[last]) == 1
        found[name] = Place(last if short else kind, depth)
    return found


def _split(name: str) -> tuple[str, int | None]:
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts) if _NUMBER.fullmatch(part)), None)
    if at is None or at == len(parts) - 1:
        return name, None
    kind = ".".join(part for part in parts[at + 1 :] if not _NUMBER.fullmatch(part))
    return kind or name, int(parts[at])


def by_kind(tensors: Sequence[TensorReport]) -> dict[str, list[TensorReport]]:
    """The weights of each kind, kinds and weights in the order in which they come."""
    where = places(tensor.name for tensor in tensors)
    groups: dict[str, list[TensorReport]] = {}
    for tensor in tensors:
        groups.setdefault(where[tensor.name].kind, []).append(tensor)
    return groups
