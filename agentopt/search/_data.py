"""The three splits of a run: made where missing, checked where given."""

from __future__ import annotations

from agentopt.errors import UserError
from agentopt.evaluation import Dataset, overlap, split_dataset
from agentopt.search._board import Split


def make_splits(train: Dataset, val: Dataset | None, test: Dataset | None, seed: int) -> dict[Split, Dataset]:
    """Train, validation and, where there is one, test.

    Without validation the rows of `train` are split by a seeded content hash: 50/25/25, or, when a test set is given,
    three quarters for training. With validation and without test there is no test set, and no claim.

    Raises:
        UserError: a split is empty.
    """
    splits: dict[Split, Dataset] = {}
    if val is None:
        first, second, third = split_dataset(train, seed)
        splits["train"], splits["validation"] = first, second
        if test is None:
            test = third
        else:
            splits["train"] = Dataset(f"{train.name}/train", [*first, *third])
    else:
        splits["train"], splits["validation"] = train, val
    if test is not None and len(test) > 0:
        splits["test"] = test
    for name in ("train", "validation"):
        if len(splits[name]) < 2:
            raise UserError(
                f"the {name} set has {len(splits[name])} rows; at least 2 are needed"
                + (f" (from {len(train)} rows of {train.name!r}, split 50/25/25)" if val is None else "")
            )
    return splits


def check_splits(splits: dict[Split, Dataset]) -> list[str]:
    """Warnings about equal and overlapping sets: what is measured on rows that were trained on is no gain."""
    found: list[str] = []
    names: list[Split] = [name for name in ("train", "validation", "test") if name in splits]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = splits[first], splits[second]
            if a is b or a.id == b.id:
                found.append(
                    f"The {first} and {second} sets are the same rows: gains on {second} say nothing about new inputs; "
                    "give different rows."
                )
                continue
            common = overlap(a, b)
            if common:
                found.append(
                    f"{len(common)} rows are in both the {first} and the {second} set, for example {common[0]!r}."
                )
    test = splits.get("test")
    if test is None:
        found.append("There is no test set, so no claim can be made.")
    elif len(test) < 30:
        found.append(f"The test set has {len(test)} rows; with fewer than 30 no claim is made.")
    return found
