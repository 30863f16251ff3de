"""A batch whose first axis holds several copies: which rows belong to which, cut into copies and put together again."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

from agentopt.errors import UserError


class Again(Exception):
    """The pass showed that the model has to be measured in another way; the prober knows it now."""


class Indivisible(Exception):
    """What a module was given cannot be cut into copies."""


def split_rows(rows: int, copies: int) -> int:
    """Rows of each copy of what a loss gave to the model."""
    if rows % copies:
        raise UserError(
            f"the batch has {rows} rows, which {copies} copies do not divide: repeat the whole batch per copy."
        )
    return rows // copies


def batch_rows(values: Any) -> int:
    """Rows of the batch: the largest first axis among the tensors of a call, those of one axis (positions) aside."""
    sizes = _first_axes(values)
    return max((size for size, axes in sizes if axes > 1), default=max((size for size, _ in sizes), default=0))


def _first_axes(values: Any) -> list[tuple[int, int]]:
    """Size of the first axis and number of axes of every tensor."""
    if is_tensor(values):
        return [(int(values.shape[0]), int(values.dim()))] if values.dim() else []
    inner: list[Any] = []
    if isinstance(values, Mapping):
        inner = list(cast("Mapping[str, Any]", values).values())
    elif isinstance(values, list | tuple):
        inner = list(cast("Sequence[Any]", values))
    return [size for value in inner for size in _first_axes(value)]


def alike(values: Any, rows: int, copies: int) -> bool:
    """Whether all copies were given the same indices (token ids); what each wrote itself while generating differs."""
    if is_tensor(values):
        if values.is_floating_point() or values.dim() < 2 or values.shape[0] != rows:
            return True
        parts = values.reshape(copies, -1)
        return bool((parts == parts[0]).all())
    if isinstance(values, Mapping):
        values = list(cast("Mapping[str, Any]", values).values())
    if isinstance(values, list | tuple):
        return all(alike(value, rows, copies) for value in cast("Sequence[Any]", values))
    return True


def per_row(ids: Any, rows: int | None, copies: int, *, same: bool = True) -> Any:
    """Indices with the batch as their first axis: those that all rows share (positions) are repeated for each.

    Args:
        ids: (rows, ...), or shared: (1, n) or (n,).
        rows: rows of the pass, all copies together; None where that is not known.
        copies: copies among them.
        same: whether the copies were given the same: then indices that differ between them belong to something else.

    Raises:
        Indivisible: they are neither (distances between tokens, say).
    """
    if rows is None:
        if ids.dim() and not ids.shape[0] % copies:
            return ids
        raise Indivisible
    if ids.dim() == 1:
        return ids if _is_flat_batch(ids, rows, copies) else ids.expand(rows, -1)
    if ids.dim() and ids.numel() and not ids.shape[0] % rows:
        parts = ids.reshape(copies, -1)
        if not same or bool((parts == parts[0]).all()):
            return ids
    if ids.shape[:1] == (1,):
        return ids.expand(rows, *ids.shape[1:])
    raise Indivisible


def _is_flat_batch(ids: Any, rows: int, copies: int) -> bool:
    """Whether indices of one axis are those of a batch: not steps of one, as positions are, nor all the same."""
    if not ids.numel() or ids.numel() % rows or bool((ids.diff() == 1).all()):
        return False
    if ids.numel() == rows:
        return True
    parts = ids.view(copies, -1)
    return copies > 1 and bool((parts == parts[0]).all()) and bool((ids != ids[0]).any())


def part_of(values: Any, *, copy: int, copies: int, total: int) -> Any:
    """The rows of one copy, in every tensor of a call that has all rows."""
    if copies == 1:
        return values
    if is_tensor(values):
        if values.dim() == 0 or values.shape[0] != total:
            return values
        each = total // copies
        return values[copy * each : (copy + 1) * each]
    part = functools.partial(part_of, copy=copy, copies=copies, total=total)
    if isinstance(values, dict):
        return {name: part(value) for name, value in cast("dict[str, Any]", values).items()}
    if type(values) in (list, tuple):
        return type(values)(part(value) for value in values)
    return values


def can_part(values: Any) -> bool:
    """Whether all that a call was given can be cut into copies: no key-value cache or other object with rows inside."""
    if isinstance(values, Mapping):
        return all(can_part(value) for value in cast("Mapping[str, Any]", values).values())
    if isinstance(values, list | tuple):
        return all(can_part(value) for value in cast("Sequence[Any]", values))
    return values is None or is_tensor(values) or isinstance(values, bool | int | float | str)


def join(results: Sequence[Any]) -> Any:
    """Outputs of the copies, put together along the first axis."""
    import torch

    first = results[0]
    if is_tensor(first):
        return torch.cat(list(results)) if first.dim() else torch.stack(list(results))
    if isinstance(first, dict):
        joined: dict[str, Any] = {name: join([result[name] for result in results]) for name in list(cast("Any", first))}
        return joined if type(cast("Any", first)) is dict else type(cast("Any", first))(**joined)
    if type(first) in (list, tuple):
        return type(first)(join(list(group)) for group in zip(*results, strict=True))
    return first


def is_tensor(value: Any) -> bool:
    """Whether this is a torch tensor."""
    import torch

    return isinstance(value, torch.Tensor)
