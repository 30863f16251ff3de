"""What a driver is, and from what a user wrote (`"auto"`, `"pareto"`, an object) to one.

A driver is a whole search strategy: a coroutine over the lab's building blocks. A planner is the simpler kind: it only
says which parents get how many proposals, and standard rounds do the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from agentopt.errors import UserError
from agentopt.graph import Candidate
from agentopt.optimizers import PastProposal
from agentopt.search._auto_driver import Facts, choose
from agentopt.search._options import TuneOptions
from agentopt.search._plan import Sizes
from agentopt.search._pool import Pool

if TYPE_CHECKING:
    from agentopt.search._lab import Lab


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
class Planner(Protocol):
    """A search strategy made of standard rounds. It must be a pure function of the state: a resumed run asks again."""

    @property
    def name(self) -> str:
        """Shown in the report."""
        ...

    def next(self, state: SearchState) -> Step | str:
        """The next round, or the reason to stop."""
        ...


@runtime_checkable
class Driver(Protocol):
    """A search strategy of its own.

    What it decides must follow from the lab alone: a resumed run calls it again and every block answers as before.
    """

    @property
    def name(self) -> str:
        """Shown in the report."""
        ...

    async def run(self, lab: Lab) -> str:
        """Search until `lab.stop()` gives a reason, and return it. `OutOfBudget` may pass through: it ends the search.

        Every iteration is one `async with lab.turn():` block.
        """
        ...


def _greedy() -> Planner:
    from agentopt.search._greedy import Greedy

    return Greedy()


def _beam() -> Planner:
    from agentopt.search._beam import Beam

    return Beam()


def _climb() -> Driver:
    from agentopt.search._climb import Climb

    return Climb()


def _ucb() -> Driver:
    from agentopt.search._ucb import UCB

    return UCB()


def _pareto() -> Driver:
    from agentopt.search._pareto import Pareto

    return Pareto()


def _bayes() -> Driver:
    from agentopt.search._bayes import Bayes

    return Bayes()


def _islands() -> Driver:
    from agentopt.search._islands import Islands

    return Islands()


_BY_NAME: dict[str, Callable[[], Driver | Planner]] = {
    "greedy": _greedy,
    "climb": _climb,
    "beam": _beam,
    "ucb": _ucb,
    "pareto": _pareto,
    "bayes": _bayes,
    "islands": _islands,
}

DRIVER_NAMES: tuple[str, ...] = tuple(_BY_NAME)


def resolve_driver(spec: str | Driver | Planner, facts: Facts | None = None) -> tuple[Driver | Planner, str]:
    """The driver and why it was chosen.

    Args:
        spec: "auto", a name of `DRIVER_NAMES`, or an object.
        facts: what "auto" decides by; None for the choice that needs no facts.

    Raises:
        UserError: an unknown name, or an object with neither `run` nor `next`.
    """
    names = ", ".join(DRIVER_NAMES)
    if isinstance(spec, str):
        if spec == "auto":
            if facts is None:
                return _greedy(), "auto: nothing is known about the run; each round builds on the best"
            name, reason = choose(facts)
            return _BY_NAME[name](), f"auto: {reason}"
        if spec in _BY_NAME:
            return _BY_NAME[spec](), "as asked"
        raise UserError(f"Unknown driver {spec!r}: expected auto, {names}, or an object with run(lab) or next(state).")
    given: object = spec
    if not any(callable(getattr(given, method, None)) for method in ("run", "next")) or not hasattr(given, "name"):
        raise UserError(
            f"driver={spec!r} must have a name and a run(lab) or next(state) method; or give one of: auto, {names}."
        )
    return spec, "as given"
