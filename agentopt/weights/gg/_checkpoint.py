"""The `quantization_config` of a checkpoint in our formats, and the names of its tensors. No torch here.

A quantized layer `P` is stored as `P.qweight` uint8 (out, in), `P.weight_scale` float32 (out, 1) and, where the model
has several books, `P.book_id` uint8 (out, 1); its bias is as before. The codes are not called `weight`: a loader that
does not know the format must miss the weights rather than read codes as numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.weights.gg._types import FORMATS, SCALES, Format, Scale

METHOD = "rf8"
"""`quant_method` in config.json: what transformers and vLLM choose the plug-in by."""
VERSION = 1
CODES, SCALE, BOOK = "qweight", "weight_scale", "book_id"
BOOK_SIZES = (255, 256)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What config.json says about the weights.

    Attributes:
        format: of all quantized layers.
        scale: how the scales were chosen; they are stored per row in any case.
        books: levels of unit variance, one list of 255 or 256 per book; empty but for `rf8-gg`.
        nus: the shape each book was made for; infinity is the uniform one.
        skip: linear layers that were not quantized.
        head: whether the output head was quantized (and with it the embedding it is tied to).
        gg: the fit over all quantized weights: nu, estimator, per.
        source_sha256: of the weights that were quantized.
    """

    format: Format
    scale: Scale = "channel"
    books: tuple[tuple[float, ...], ...] = ()
    nus: tuple[float, ...] = ()
    skip: tuple[str, ...] = ("lm_head",)
    head: bool = False
    gg: Mapping[str, Any] = field(default_factory=dict[str, Any])
    source_sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values, as they stand in config.json under `quantization_config`."""
        return {
            "quant_method": METHOD,
            "version": VERSION,
            "format": self.format,
            "scale": self.scale,
            "scale_dtype": "float32",
            "codebooks": [list(book) for book in self.books] or None,
            "book_grid": [nu if math.isfinite(nu) else None for nu in self.nus] or None,
            "modules_to_not_convert": list(self.skip),
            "head": self.head,
            "gg": dict(self.gg),
            "source_sha256": self.source_sha256,
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], where: str = "quantization_config") -> Checkpoint:
        """Read and check what `to_dict` wrote.

        Raises:
            UserError: another method, a version or a format that is not known here, or books that are no books.
        """
        method, version = found.get("quant_method", METHOD), found.get("version")
        _check(str(getattr(method, "value", method)) == METHOD, where, "quant_method", method, repr(METHOD))
        _check(version == VERSION, where, "version", version, f"{VERSION}; a newer agentopt may read it")
        format, scale = found.get("format"), found.get("scale", "channel")
        _check(format in FORMATS, where, "format", format, ", ".join(FORMATS))
        _check(scale in SCALES, where, "scale", scale, " or ".join(SCALES))
        books = _books(found.get("codebooks") or (), where)
        _check(bool(books) == (format == "rf8-gg"), where, "codebooks", len(books), "books for rf8-gg and for no other")
        nus: Any = found.get("book_grid") or ()
        gg: Any = found.get("gg") or {}
        _check(_numbers(nus, None), where, "book_grid", nus, "a list of numbers")
        _check(isinstance(gg, Mapping), where, "gg", gg, "an object")
        skip = found.get("modules_to_not_convert") or ()
        _check(_texts(skip), where, "modules_to_not_convert", skip, "a list of names")
        return cls(
            format=format,  # pyright: ignore[reportArgumentType]  # checked above
            scale=scale,
            books=books,
            nus=tuple(math.inf if nu is None else float(nu) for nu in nus),
            skip=tuple(skip),
            head=bool(found.get("head", False)),
            gg=dict(cast("Mapping[str, Any]", gg)),
            source_sha256=found.get("source_sha256"),
        )

    def skips(self, name: str) -> bool:
        """Whether the layer of this name was left as it is."""
        return matches(name, self.skip)


def matches(name: str, parts: Iterable[str]) -> bool:
    """Whether one of the entries is a run of whole components of a dotted name: "lm_head" is not in "my_lm_head"."""
    return any(f".{part}." in f".{name}." for part in parts if part)


def _texts(found: Any) -> bool:
    if not isinstance(found, Sequence) or isinstance(found, str):
        return False
    return all(isinstance(one, str) for one in cast("Sequence[object]", found))


def _numbers(found: Any, *others: object) -> bool:
    """Whether this is a list of numbers, or of one of the others."""
    if not isinstance(found, Sequence) or isinstance(found, str):
        return False
    numbers = (isinstance(one, int | float) or one in others for one in cast("Sequence[object]", found))
    return all(numbers)


def _books(found: Any, where: str) -> tuple[tuple[float, ...], ...]:
    listed = isinstance(found, Sequence) and all(_numbers(book) for book in cast("Sequence[object]", found))
    _check(listed, where, "codebooks", "something else", "lists of numbers")
    books = tuple(tuple(float(level) for level in book) for book in cast("Sequence[Sequence[float]]", found))
    _check(len(books) <= 256, where, "codebooks", f"{len(books)} books", "at most 256")
    for book in books:
        _check(len(book) in BOOK_SIZES, where, "codebooks", f"{len(book)} levels", "255 or 256")
        rising = all(low < high for low, high in itertools.pairwise(book))
        _check(rising and all(map(math.isfinite, book)), where, "codebooks", "other levels", "finite, rising levels")
    return books


def _check(held: bool, where: str, key: str, found: Any, expected: str) -> None:
    if not held:
        raise UserError(f"{where}: {key}: found {found!r}, expected {expected}.")
