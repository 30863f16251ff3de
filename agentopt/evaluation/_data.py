"""Examples and datasets as values: what is asked, what is expected, and a content id that follows the content.

The unit is one `Example`; a `Dataset` is an ordered, named, immutable sequence of them. Ids are hashes of the content,
so the same row has the same id in every file and no two different rows share one: a cache keyed by them never crosses
two datasets (gepa PR #425). Reading files is in `_readers`; nothing here does I/O.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, overload

from agentopt.errors import UserError

SPLIT = (0.5, 0.25, 0.25)
"""Shares of train, validation and test when one file is given."""
GROUP = "agentopt.group"
"""Key of `Example.meta`: rows with the same value there are never split up."""
MIN_TEST_ROWS = 30
"""Below this many test rows no claim can be made."""


def content_hash(value: object) -> str:
    """16 hex characters that follow `value`'s content: equal content, equal hash, in every process.

    Raises:
        UserError: `value` holds something that has no stable textual form.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=plain)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def plain(value: object) -> object:
    """Turn a value that JSON does not know into one it does (dates, decimals, bytes, arrays, models, dataclasses).

    Raises:
        UserError: no such form is known for its type.
    """
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, (set, frozenset)):
        return sorted(cast("Iterable[object]", value), key=repr)
    if isinstance(value, Mapping):
        return dict(cast("Mapping[object, object]", value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    for name in ("isoformat", "model_dump", "tolist", "as_posix"):  # dates, pydantic, numpy, paths
        method: object = getattr(value, name, None)
        if callable(method):
            return cast("Callable[[], object]", method)()
    kind = type(value)
    if kind.__str__ is not object.__str__:  # Decimal, UUID, Fraction: their text is their content
        return str(value)
    raise UserError(
        f"a dataset row holds a value of type {kind.__name__}, which has no stable content; "
        "use text, numbers, lists and maps, or give the example an id: Example(id=...)."
    )


@dataclass(frozen=True)
class Example:
    """One row: keyword arguments for the program, the expected answer (None when there is none), and other columns.

    `id` is a hash of inputs and expected answer unless one is given. In a `Dataset` a repeated row gets `-2`, `-3`, ...
    appended, so ids are unique there.
    """

    id: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    expected: Any = None
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", content_hash([self.inputs, self.expected]))

    def __hash__(self) -> int:
        return hash(self.id)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: id, inputs, expected, meta."""
        return {"id": self.id, "inputs": dict(self.inputs), "expected": self.expected, "meta": dict(self.meta)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Example:
        """The inverse of `to_dict`."""
        return cls(data.get("id") or "", data["inputs"], data.get("expected"), data.get("meta") or {})


class Dataset(Sequence[Example]):
    """Examples in order, with unique ids and a content id.

    `id` does not depend on the order or the name: a shuffled file is the same dataset. `duplicates` is how many rows
    repeat an earlier one.
    """

    def __init__(self, name: str, examples: Iterable[Example]) -> None:
        self.name = name
        seen: dict[str, int] = {}
        rows: list[Example] = []
        for example in examples:
            count = seen[example.id] = seen.get(example.id, 0) + 1
            rows.append(example if count == 1 else dataclasses.replace(example, id=f"{example.id}-{count}"))
        self.examples: tuple[Example, ...] = tuple(rows)
        self.duplicates = len(rows) - len(seen)
        self._by_id = {example.id: example for example in rows}
        self.id = content_hash(sorted([row.id, content_hash([row.inputs, row.expected])] for row in rows))

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Example | Dataset:
        return Dataset(self.name, self.examples[index]) if isinstance(index, slice) else self.examples[index]

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {len(self)} examples, id={self.id!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dataset) and self.examples == other.examples

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def ids(self) -> list[str]:
        """The examples' ids, in order."""
        return [example.id for example in self.examples]

    def get(self, example_id: str) -> Example:
        """The example with this id.

        Raises:
            UserError: there is none.
        """
        try:
            return self._by_id[example_id]
        except KeyError:
            raise UserError(f"dataset {self.name!r} has no example {example_id!r}.") from None

    def take(self, ids: Iterable[str], *, name: str | None = None) -> Dataset:
        """The examples with these ids, in the order of `ids`, as a dataset of their own."""
        return Dataset(name or self.name, [self.get(example_id) for example_id in ids])

    def split(self, seed: int = 0, shares: tuple[float, float, float] = SPLIT) -> tuple[Dataset, Dataset, Dataset]:
        """See `split_dataset`."""
        return split_dataset(self, seed, shares)


def split_dataset(
    dataset: Dataset, seed: int = 0, shares: tuple[float, float, float] = SPLIT
) -> tuple[Dataset, Dataset, Dataset]:
    """Split into train, validation and test by a seeded hash of each row's inputs.

    Membership follows content, not position, so it survives a shuffled file; rows with equal inputs always land on the
    same side, so none leaks; so do rows of one captured conversation. Each part keeps the order of the file.

    Raises:
        UserError: fewer than 4 rows with different inputs, which cannot be split three ways.
    """
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(dataset):
        groups.setdefault(str(example.meta.get(GROUP) or content_hash(example.inputs)), []).append(index)
    if len(groups) < 4:
        raise UserError(
            f"dataset {dataset.name!r}: found {len(groups)}, expected at least 4 rows with different inputs or "
            "conversations: too few to split into train, validation and test; add rows, or give each part its own file."
        )
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    total = sum(shares)
    # At least one group for validation and test each, so that no part is empty.
    test_from = min(round(len(order) * (shares[0] + shares[1]) / total), len(order) - 1)
    val_from = min(round(len(order) * shares[0] / total), test_from - 1)
    parts = (order[:val_from], order[val_from:test_from], order[test_from:])
    names = ("train", "val", "test")

    def part(name: str, keys: list[str]) -> Dataset:
        indices = sorted(index for key in keys for index in groups[key])
        return Dataset(f"{dataset.name}:{name}", [dataset.examples[index] for index in indices])

    train, val, test = (part(name, keys) for name, keys in zip(names, parts, strict=True))
    return train, val, test


def overlap(a: Sequence[Example], b: Sequence[Example]) -> list[str]:
    """Ids of the examples of `b` whose inputs also occur in `a`, whatever their label: these leak."""
    known = {content_hash(example.inputs) for example in a}
    return [example.id for example in b if content_hash(example.inputs) in known]
