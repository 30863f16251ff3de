"""The learning rate of symbolic learning: how much one update may change, as numbers that are checked.

The unit is one update. A `LearningRate` gives each iteration an `EditBound`: how many edits, what share of a text's
words, how many added tokens, and a phrase that says so to the language model. The phrase alone binds nobody: `keep`
takes the edits that stay within the bound and says of each other one what is wrong, so that it can be sent back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from agentopt.errors import UserError
from agentopt.graph import apply_edits
from agentopt.optimizers._problem import estimate_tokens

if TYPE_CHECKING:
    from agentopt.graph import Candidate, Edit, ParameterSpec

Schedule = Literal["constant", "linear", "cosine"]
_SHORT = 40
"""A text shorter than this many words counts as this long: a sentence can always be added to a very short prompt."""
_MAX_CELLS = 4_000_000


@dataclass(frozen=True, slots=True)
class EditBound:
    """What one update may change."""

    edits: int
    """Edits of one update, at most."""
    ratio: float
    """Word edits (insert, delete, replace) per word of a text that is rewritten, from 0 to 1."""
    tokens: int
    """Tokens that an update may add in all (estimated)."""
    wording: str = "moderate"
    """"bold", "moderate" or "careful": which fragment `symbolic.rate.*` words it."""

    def keep(
        self, parent: Candidate, edits: Sequence[Edit], specs: Mapping[str, ParameterSpec]
    ) -> tuple[list[Edit], list[str]]:
        """The edits that stay within the bound, in order, and what is wrong with the others.

        Edits that cannot be applied at all are kept: their own checks have clearer words for them. An edit that changes
        no text (counters of principles) does not count.
        """
        kept: list[Edit] = []
        problems: list[str] = []
        changes = added = 0
        current = parent
        for edit in edits:
            try:
                child = apply_edits(current, [edit], specs)
            except UserError:
                kept.append(edit)
                continue
            before: Any = current.get(edit.name, specs[edit.name].default)
            after: Any = child.get(edit.name)
            growth = _size(after) - _size(before)
            counts = list(_texts(before, "")) != list(_texts(after, ""))
            problem = self._problem(changes, added + growth, before, after) if counts else ""
            if problem:
                problems.append(f"{edit.name}: {problem}")
                continue
            kept.append(edit)
            changes += counts
            added += growth
            current = child
        return kept, problems

    def _problem(self, edits: int, tokens: int, before: Any, after: Any) -> str:
        if edits >= self.edits:
            return f"too many changes at once; at most {self.edits} are allowed now, keep the most important ones"
        if tokens > self.tokens:
            return f"adds about {tokens} tokens in all; at most {self.tokens} may be added now, be briefer"
        for old, new in _rewritten(before, after):
            share = change_ratio(old, new)
            if share > self.ratio:
                return (
                    f"changes {share:.0%} of the text's words; at most {self.ratio:.0%} may change now, keep more of "
                    "the present wording"
                )
        return ""


@dataclass(frozen=True, slots=True)
class LearningRate:
    """How bold updates are, and how that falls over the iterations."""

    edits: int = 6
    ratio: float = 0.9
    tokens: int = 800
    schedule: Schedule = "cosine"
    steps: int = 20
    """Iterations until the lowest rate; it stays there."""
    floor: float = 0.3
    """The lowest rate as a share of the first."""

    def __post_init__(self) -> None:
        if self.edits < 1 or self.tokens < 1 or self.steps < 1:
            raise UserError("LearningRate: edits, tokens and steps must be at least 1.")
        if not 0 < self.ratio <= 1 or not 0 < self.floor <= 1:
            raise UserError(
                f"LearningRate: ratio and floor must lie above 0 and be at most 1, found {self.ratio!r} and "
                f"{self.floor!r}."
            )
        if self.schedule not in get_args(Schedule):
            raise UserError(
                f"LearningRate: schedule must be one of {', '.join(get_args(Schedule))}, found {self.schedule!r}."
            )

    def factor(self, iteration: int) -> float:
        """The share of the first rate that is left at `iteration` (0-based)."""
        done = min(1.0, max(0, iteration) / max(1, self.steps - 1))
        match self.schedule:
            case "constant":
                return 1.0
            case "linear":
                return 1.0 - (1.0 - self.floor) * done
            case "cosine":
                return self.floor + (1.0 - self.floor) * (1.0 + math.cos(math.pi * done)) / 2.0

    def at(self, iteration: int) -> EditBound:
        """The bound of one iteration."""
        factor = self.factor(iteration)
        return EditBound(
            edits=max(1, round(self.edits * factor)),
            ratio=self.ratio * factor,
            tokens=max(1, round(self.tokens * factor)),
            wording="bold" if factor > 0.8 else "moderate" if factor > 0.5 else "careful",
        )


def change_ratio(old: str, new: str) -> float:
    """Word edits from `old` to `new`, by the length of the longer one (at least 40 words); 0 equal, 1 all new."""
    one, two = old.split(), new.split()
    longest = max(len(one), len(two), _SHORT)
    if len(one) * len(two) > _MAX_CELLS:  # very long texts are compared by lines
        one, two = old.splitlines(), new.splitlines()
        longest = max(len(one), len(two), 1)
    return min(1.0, _distance(one, two) / longest)


def _distance(one: Sequence[str], two: Sequence[str]) -> int:
    start = 0
    while start < min(len(one), len(two)) and one[start] == two[start]:
        start += 1
    end = 0
    while end < min(len(one), len(two)) - start and one[-1 - end] == two[-1 - end]:
        end += 1
    one, two = one[start : len(one) - end], two[start : len(two) - end]
    row = list(range(len(two) + 1))
    for i, word in enumerate(one, start=1):
        corner, row[0] = row[0], i
        for j, other in enumerate(two, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (word != other))
    return row[-1]


def _size(value: Any) -> int:
    return sum(estimate_tokens(text) for _, text in _texts(value, ""))


def _rewritten(before: Any, after: Any) -> Iterator[tuple[str, str]]:
    """(old, new) of every text that is there before and after and differs. Parts are known by id or name."""
    old = dict(_texts(before, ""))
    for path, text in _texts(after, ""):
        if path in old and old[path] != text and old[path].strip() and text.strip():
            yield old[path], text


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every text of a value with where it stands; a list of texts is one text."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[str, Any]", value).items():
            yield from _texts(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        if items and all(isinstance(item, str) for item in items):
            yield path, "\n".join(cast("Sequence[str]", items))
            return
        for place, item in enumerate(items):
            known: Mapping[str, Any] = cast("Mapping[str, Any]", item) if isinstance(item, Mapping) else {}
            yield from _texts(item, f"{path}/{known.get('id') or known.get('name') or place}")
