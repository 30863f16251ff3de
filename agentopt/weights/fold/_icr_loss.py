"""The loss of reading: facts and questions of several tasks as rows of one or two forward passes.

Questions about the same facts share the pass over them: the rows continue from its keys and values, through which the
gradient flows back. It is the same loss as that of rows with the facts in front of each, for a fraction of the work.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentopt.weights.fold._answers import Memory, forward
from agentopt.weights.load import need


@dataclass(frozen=True, slots=True)
class Row:
    """One question and what should follow it."""

    ids: list[int]
    question: int
    """So many ids are the question."""
    recalled: int
    """So many after them are recalled facts."""


@dataclass(frozen=True, slots=True)
class Group:
    """Questions about the same facts, in the same order."""

    context: list[int]
    rows: list[Row]

    @property
    def longest(self) -> int:
        """Tokens of its longest row, facts included."""
        return len(self.context) + max(len(row.ids) for row in self.rows)


@dataclass(frozen=True, slots=True)
class ReadingLoss:
    """Mean over rows of the weighted means over each row's answer, recalled facts and what was read.

    Attributes:
        model: a causal language model.
        pad: token id that fills short rows; it is never read.
        recall: weight of the recalled facts beside the answer.
        context: weight of facts and question themselves; then every row is read by itself.
        share: questions about the same facts share the pass over them.
        max_tokens: most tokens of a pass.
    """

    model: Any
    pad: int
    recall: float
    context: float
    share: bool
    max_tokens: int

    def parts(self, groups: Sequence[Group]) -> Iterator[tuple[Any, float]]:
        """The loss of each part of the rows, and its share of all of them: to be summed, or gone back through."""
        total = sum(len(group.rows) for group in groups)
        for part in self._split(groups):
            shared = self.share and not self.context and any(len(group.rows) > 1 for group in part)
            yield self._shared(part) if shared else self._apart(part), sum(len(one.rows) for one in part) / total

    def _split(self, groups: Sequence[Group]) -> list[list[Group]]:
        """Groups of about the same length that go through the model together."""
        parts: list[list[Group]] = []
        rows = 0
        for group in sorted(groups, key=lambda one: one.longest):
            rows += len(group.rows)
            if not parts or rows * group.longest > self.max_tokens:
                parts.append([])
                rows = len(group.rows)
            parts[-1].append(group)
        return parts

    def _apart(self, groups: Sequence[Group]) -> Any:
        """Every row with its facts in front."""
        rows = [(group.context, row) for group in groups for row in group.rows]
        weight = self._weights(rows, facts=True)
        first = int(np.flatnonzero(weight.any(0))[0])
        # Right padding and no mask: causal attention never looks at what comes after.
        ids = self._padded([context + row.ids for context, row in rows])
        keep = {"logits_to_keep": ids.shape[1] - first + 1}
        takes = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        logits = self.model(input_ids=ids, use_cache=False, **(keep if takes else {})).logits
        return self._mean(logits, ids, weight, first)

    def _shared(self, groups: Sequence[Group]) -> Any:
        """The facts of each group once; its rows go on from there."""
        torch = need("torch")
        width = max(len(group.context) for group in groups)
        mask = tuple((0,) * (width - len(one.context)) + (1,) * len(one.context) for one in groups)
        contexts = self._padded([group.context for group in groups], left=True)
        read = forward(self.model, contexts, torch.tensor(mask, device=contexts.device), None, keep=1)
        index = [number for number, group in enumerate(groups) for _ in group.rows]
        rows = [(group.context, row) for group in groups for row in group.rows]
        weight = self._weights(rows, facts=False)
        ids = self._padded([row.ids for _, row in rows])
        # Padding after a row needs no mask, padding before its facts does.
        seen = torch.tensor([mask[number] + (1,) * ids.shape[1] for number in index], device=ids.device)
        first = int(np.flatnonzero(weight.any(0))[0])
        cache = Memory(read.past_key_values, mask).taken(index)
        logits = forward(self.model, ids, seen, cache, keep=ids.shape[1] - first + 1).logits
        return self._mean(logits, ids, weight, first)

    def _weights(self, rows: Sequence[tuple[list[int], Row]], *, facts: bool) -> NDArray[np.float32]:
        """What each predicted token counts."""
        before = [len(context) if facts else 0 for context, _ in rows]
        width = max(start + len(row.ids) for start, (_, row) in zip(before, rows, strict=True))
        weight = np.zeros((len(rows), width), dtype=np.float32)
        for number, (start, (_, row)) in enumerate(zip(before, rows, strict=True)):
            recall = start + row.question
            answer, end = recall + row.recalled, start + len(row.ids)
            weight[number, answer:end] = 1 / (end - answer)
            weight[number, recall:answer] = self.recall / max(1, row.recalled)
            weight[number, 1:recall] = self.context / max(1, recall - 1)
        return weight

    def _padded(self, rows: Sequence[list[int]], *, left: bool = False) -> Any:
        torch = need("torch")
        width = max(map(len, rows))
        fill = [[self.pad] * (width - len(row)) for row in rows]
        device = next(iter(self.model.parameters())).device
        return torch.tensor([a + b if left else b + a for a, b in zip(fill, rows, strict=True)], device=device)

    def _mean(self, logits: Any, ids: Any, weight: NDArray[np.float32], first: int) -> Any:
        """Log-odds end with the last token's; tokens from `first` on are predicted."""
        torch = need("torch")
        logits = logits[:, first - 1 - ids.shape[1] : -1].float()
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, first:].flatten(), reduction="none")
        counts = torch.from_numpy(weight[:, first:]).to(ids.device)
        return (nll.reshape(len(weight), -1) * counts).sum() / len(weight)
