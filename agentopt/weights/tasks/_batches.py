"""Which rows a step sees: a pure function of a seed and the step's number, cut into micro-batches of fixed make-up."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from agentopt.errors import UserError
from agentopt.evaluation import seeded
from agentopt.weights.tasks._encode import Encoded, EncodedExample


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one step.

    A micro-batch is padded by itself and runs in one forward pass, so the loss of a row is the same, bit for bit,
    whoever computes it: one worker alone, or several that share the micro-batches.

    Attributes:
        micro: rows by micro-batch.
        pad: token id that fills short rows.
        mean: compare candidates by their mean log-probability per token.
        first: number of the first row here within the step's batch (a share begins further in).
    """

    micro: tuple[tuple[EncodedExample, ...], ...]
    pad: int
    mean: bool
    first: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.micro))

    @property
    def examples(self) -> tuple[EncodedExample, ...]:
        """Every row, in order."""
        return tuple(example for part in self.micro for example in part)

    @property
    def tokens(self) -> int:
        """Tokens of the rows, without padding."""
        return sum(example.length for example in self.examples)

    def split(self) -> tuple[Batch, ...]:
        """A batch for each micro-batch."""
        parts: list[Batch] = []
        first = self.first
        for part in self.micro:
            parts.append(replace(self, micro=(part,), first=first))
            first += len(part)
        return tuple(parts)

    def share(self, rank: int, world: int) -> Batch:
        """The micro-batches of one worker of `world`: consecutive ones, so that shares in order make up the batch.

        Raises:
            UserError: there are fewer micro-batches than workers.
        """
        if len(self.micro) < world:
            raise UserError(
                f"batch: {len(self.micro)} micro-batches cannot be shared by {world} workers; set micro_batch to "
                f"{max(1, len(self) // world)} or less."
            )
        start, stop = (len(self.micro) * one // world for one in (rank, rank + 1))
        return replace(self, micro=self.micro[start:stop], first=self.first + sum(map(len, self.micro[:start])))

    @classmethod
    def of(cls, encoded: Encoded, examples: Sequence[EncodedExample] | None = None) -> Batch:
        """These rows (all of `encoded` by default) as one batch of one micro-batch."""
        rows = tuple(encoded.examples if examples is None else examples)
        return cls((rows,) if rows else (), encoded.pad, encoded.mean)


class Batches:
    """The batch of every step, from 0 on without end: seeded shuffles of the rows, one after the other.

    Rows of a batch are sorted by length, so that micro-batches need little padding.
    """

    def __init__(self, encoded: Encoded, batch: int = 16, seed: int = 0, micro_batch: int | None = None) -> None:
        if not len(encoded):
            raise UserError(f"{encoded.name}: no rows to train on; expected at least one.")
        for name, value in (("batch", batch), ("micro_batch", 1 if micro_batch is None else micro_batch)):
            if value < 1:
                raise UserError(f"{name}: found {value}, expected a whole number of at least 1.")
        self.encoded, self.batch, self.seed = encoded, batch, seed
        self.micro_batch = min(micro_batch or batch, batch)
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def at(self, step: int) -> Batch:
        """The batch of this step."""
        count = len(self.encoded)
        places = range(step * self.batch, (step + 1) * self.batch)
        chosen = [self._order(place // count)[place % count] for place in places]
        rows = [self.encoded[number] for number in sorted(chosen, key=lambda one: (self.encoded[one].length, one))]
        micro = tuple(tuple(rows[at : at + self.micro_batch]) for at in range(0, len(rows), self.micro_batch))
        return Batch(micro, self.encoded.pad, self.encoded.mean)

    def __iter__(self) -> Iterator[Batch]:
        step = 0
        while True:
            yield self.at(step)
            step += 1

    def _shuffled(self, epoch: int) -> tuple[int, ...]:
        order = list(range(len(self.encoded)))
        seeded("batches", self.seed, epoch).shuffle(order)
        return tuple(order)
