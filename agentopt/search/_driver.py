"""Drivers decide which parents are worked on, how many proposals are asked for, and how much a round may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

from agentopt.errors import UserError
from agentopt.graph import Candidate
from agentopt.optimizers import PastProposal
from agentopt.search._options import TuneOptions
from agentopt.search._plan import Sizes
from agentopt.search._pool import Pool


@dataclass(frozen=True, slots=True)
class SearchState:
    """What a driver may look at. `left` is rollouts before the reserve for the test, None when unbounded."""

    iteration: int
    seed: int
    pool: Pool
    left: int | None
    proposals_left: int | None
    sizes: Sizes
    options: TuneOptions
    history: Sequence[PastProposal]


@dataclass(frozen=True, slots=True)
class Step:
    """One round: parents with the number of proposals wanted from each, and the rollouts it may take."""

    parents: tuple[tuple[Candidate, int], ...]
    allotment: int


@runtime_checkable
class Driver(Protocol):
    """A search strategy. It must be a pure function of the state: a resumed run asks it again."""

    @property
    def name(self) -> str:
        """Shown in the report."""
        ...

    def next(self, state: SearchState) -> Step | str:
        """The next round, or the reason to stop."""
        ...


DRIVER_NAMES = ("greedy",)


def resolve_driver(spec: str | Driver) -> tuple[Driver, str]:
    """The driver and, for `"auto"`, why it was chosen.

    Raises:
        UserError: an unknown name or an object without `next`.
    """
    from agentopt.search._greedy import Greedy

    if isinstance(spec, str):
        if spec == "auto":
            return Greedy(), "auto: one program, one objective; races each round's proposals and builds on the best"
        if spec == "greedy":
            return Greedy(), "as asked"
        raise UserError(
            f"Unknown driver {spec!r}: expected auto, {', '.join(DRIVER_NAMES)}, or an object with next(state)."
        )
    if not callable(getattr(cast("object", spec), "next", None)) or not hasattr(spec, "name"):
        raise UserError(f"driver={spec!r} must have a name and a next(state) method; or give one of: auto, greedy.")
    return spec, "as given"
