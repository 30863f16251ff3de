"""Byte kernels in Triton's interpreter beside the reference; prints one JSON line per case: error over what is allowed.

A program of its own: the interpreter has to be chosen before Triton is first imported, and would then be used by every
other test of the process.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch

from agentopt.weights.gg import _tables
from agentopt.weights.gg.kernels import _dispatch, decode, linear
from agentopt.weights.gg.kernels._dispatch import Config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALLOWED = {"float32": 1e-6, "bfloat16": 1.2e-2, "float16": 1e-3}
"""Of the norm. The interpreter cuts bfloat16 off where a GPU rounds."""

DICE = torch.Generator().manual_seed(3)


def books(count: int) -> Any:
    levels, _ = torch.sort(torch.randn(count, 256, generator=DICE))
    levels[:, 255] = 0.0  # books of 255 levels
    return levels


def layer(format: str, height: int, width: int, count: int = 3) -> tuple[Any, Any, Any, Any]:
    """Codes, scale, table, book_id."""
    codes = torch.randint(0, 255 if format == "rf8-gg" else 256, (height, width), generator=DICE, dtype=torch.uint8)
    scale = torch.rand(height, 1, generator=DICE) + 0.1
    if format != "rf8-gg":
        return codes, scale, _tables.table(format), None
    book_id = torch.randint(0, count, (height, 1), generator=DICE, dtype=torch.uint8)
    return codes, scale, books(count), None if count == 1 else book_id


def reference(codes: Any, scale: Any, table: Any, book_id: Any) -> Any:
    """Value by value, as the format is defined."""
    book = torch.zeros(len(codes), 1, dtype=torch.long) if book_id is None else book_id.long()
    return table[book, codes.long()] * scale


def code_cases() -> Iterator[tuple[str, float]]:
    """Every code in every place of a word, decoded and multiplied by columns of one-hot rows."""
    every = torch.stack([torch.arange(256, dtype=torch.uint8).roll(turn) for turn in range(4)])
    for format, name in itertools.product(("rf8", "rf8-strict", "e3m4", "rf8-gg"), DTYPES):
        table = books(2) if format == "rf8-gg" else _tables.table(format)
        book_id = torch.tensor([[0], [1], [1], [0]], dtype=torch.uint8) if format == "rf8-gg" else None
        scale = torch.tensor([[1.0], [0.37], [1e-3], [4.0]])
        wanted = reference(every, scale, table, book_id).to(DTYPES[name])
        found = decode(every, scale, table, book_id, dtype=DTYPES[name], format=format)
        yield f"codes decode {format} {name}", 0.0 if torch.equal(found, wanted) else 9.0
    for format in ("rf8", "e3m4", "rf8-gg"):
        codes, scale, table, book_id = every[:2], torch.ones(2, 1), _tables.table("rf8"), None
        if format == "rf8-gg":
            table, book_id = books(2), torch.tensor([[1], [0]], dtype=torch.uint8)
        elif format == "e3m4":
            table = _tables.table("e3m4")
        for part in range(0, 256, 16):  # few tokens at a time: what is tested is the way that decodes in the product
            hot = torch.eye(256)[part : part + 16]
            found = linear(hot, codes, scale, table, book_id, format=format)
            wanted = reference(codes, scale, table, book_id).t()[part : part + 16]
            yield f"codes hot {format} {part}", 0.0 if torch.equal(found, wanted) else 9.0


def linear_cases() -> Iterator[tuple[str, float]]:
    tokens = [1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 24, 31, 32, 33, 40]
    shapes = [(37, 600), (16, 512), (70, 33), (1, 1), (5, 2050)]
    formats = itertools.cycle(("rf8", "e3m4", "rf8-gg"))
    names = itertools.cycle(("bfloat16", "float32", "bfloat16", "float16"))
    for count, (height, width) in zip(tokens, itertools.cycle(shapes), strict=False):
        yield one(count, height, width, next(formats), next(names), bias=count % 2 == 1)
    yield one(70, 20, 40, "e3m4", "bfloat16")
    yield one(200, 24, 70, "rf8-gg", "float16")
    yield one(300, 150, 40, "rf8", "bfloat16")
    yield one(300, 20, 40, "rf8-gg", "float32")
    yield one(5, 40, 130, "rf8-gg", "float32", books=1)
    yield one(5, 40, 130, "rf8-gg", "bfloat16", books=20)


def one(
    tokens: int, height: int, width: int, format: str, name: str, bias: bool = True, books: int = 3, wide: bool = False
) -> tuple[str, float]:
    weight = layer(format, height, width, books)
    x = torch.randn(tokens, 2 * width if wide else width, generator=DICE).to(DTYPES[name])
    x = x[:, ::2] if wide else x
    shift = torch.randn(height, generator=DICE).to(DTYPES[name]) if bias else None
    wanted = x.double() @ reference(*weight).double().t() + (0 if shift is None else shift.double())
    found = linear(x, *weight, shift, format=format)
    error = float((found.double() - wanted).norm() / wanted.norm())
    fits = found.shape == wanted.shape and found.dtype == x.dtype
    where = f"{tokens} {height}x{width} {format} {name} {books} books"
    return f"linear {where}{' strided' if wide else ''}", error / ALLOWED[name] if fits else 9.0


def way_cases() -> Iterator[tuple[str, float]]:
    """Ways that sizes like these would not choose: shared columns, and slices of the scratch."""
    for split, columns in ((2, 64), (4, 16)):
        _dispatch.OVERRIDES[(3, 20, 300)] = Config("few", 16, 8, columns, 2, 2, split)
        yield one(3, 20, 300, "rf8", "float32")
        _dispatch.OVERRIDES[(6, 20, 300)] = Config("tiled", 16, 16, columns, 4, 2, split)
        yield one(6, 20, 300, "rf8-gg", "bfloat16")
    before, _dispatch.SCRATCH_BYTES = _dispatch.SCRATCH_BYTES, 1
    yield one(300, 150, 40, "rf8-gg", "float16")
    _dispatch.SCRATCH_BYTES = before
    yield one(4, 20, 60, "e3m4", "float32", wide=True)
    yield one(300, 20, 60, "e3m4", "float32", wide=True)
    _dispatch.OVERRIDES.clear()


def edge_cases() -> Iterator[tuple[str, float]]:
    codes, scale, table, book_id = layer("rf8-gg", 6, 10)
    for shape in ((0, 10), (3, 0, 10)):
        found = linear(torch.zeros(shape), codes, scale, table, book_id, format="rf8-gg")
        yield f"edge empty {shape}", 0.0 if found.shape == (*shape[:-1], 6) else 9.0
    nothing = linear(torch.zeros(2, 0), codes[:, :0], scale, table, book_id, torch.arange(6.0), format="rf8-gg")
    yield "edge no columns", 0.0 if torch.equal(nothing, torch.arange(6.0).expand(2, 6)) else 9.0
    x = torch.randn(2, 3, 10, generator=DICE)
    found = linear(x.transpose(0, 1), codes, scale, table, book_id, format="rf8-gg")
    wanted = x.transpose(0, 1) @ reference(codes, scale, table, book_id).t()
    yield "edge transposed", float((found - wanted).abs().max()) / 1e-5
    first, second = (linear(x, codes, scale, table, book_id, format="rf8-gg") for _ in range(2))
    yield "edge same twice", 0.0 if torch.equal(first, second) else 9.0
    x.requires_grad_()
    out = linear(x, codes, scale, table, book_id, format="rf8-gg")
    weigh = torch.randn(out.shape, generator=DICE)
    (gradient,) = torch.autograd.grad((out * weigh).sum(), x)
    wanted = weigh @ reference(codes, scale, table, book_id)
    yield "edge gradient", float((gradient - wanted).abs().max()) / 1e-5


def main() -> None:
    torch.set_num_threads(1)
    for name, error in itertools.chain(code_cases(), linear_cases(), way_cases(), edge_cases()):
        print(json.dumps({"name": name, "error": error}))


if __name__ == "__main__":
    main()
