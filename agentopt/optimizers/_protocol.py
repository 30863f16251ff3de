"""What an optimizer is: an object that looks at one parent and its rollouts and proposes typed edits.

Unit: one call of `propose` for one parent in one iteration. An optimizer never runs the program, never scores
anything and never decides what is kept; the search loop measures every update it proposes. Everything an optimizer may
know is in the `ProposeContext`; two equal contexts (and a language model that is a pure function of its request) give
equal updates.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from agentopt.evaluation import Dataset, Rollout
    from agentopt.graph import Candidate, Edit, ParameterSpec, Subgraph
    from agentopt.models import LM


@dataclass(frozen=True, slots=True)
class Update:
    """A list of edits proposed together: applied to the parent as a whole or not at all."""

    edits: tuple[Edit, ...]
    rationale: str = ""
    """Why, in one or two sentences, for the report and for later rounds."""
    source: str = ""
    """Which optimizer (and which part of it) made this, for example `instructions.frame`."""


@dataclass(frozen=True, slots=True)
class PastProposal:
    """What happened to one earlier proposal, with its measured scores."""

    candidate_hash: str
    parent_hash: str
    update: Update
    screen: float | None = None
    """Mean score on the screening minibatch, or None when it was not reached."""
    validation: float | None = None
    """Mean score on the validation rows seen so far, or None when the screen stopped it."""
    accepted: bool = False
    reason: str = ""
    screen_parent: float | None = None
    """The parent's mean on the same screening minibatch."""


@dataclass(frozen=True, slots=True)
class DroppedEdit:
    """A proposal that was given up before anything was measured, and why; the search loop may report it."""

    source: str
    problem: str
    tries: int = 1


@dataclass(frozen=True)
class ProposeContext:
    """All that an optimizer may look at when it proposes."""

    program_name: str
    parent: Candidate
    """The candidate to edit: a full map of the tunable parameters' values."""
    specs: Mapping[str, ParameterSpec]
    """The tunable parameters only; an edit of any other name is illegal."""
    train: Dataset
    """The only data demonstrations and data descriptions may come from."""
    rollouts: Sequence[Rollout] = ()
    """The parent on the minibatch, with traces where they were kept."""
    history: Sequence[PastProposal] = ()
    """Oldest first."""
    seed: int = 0
    iteration: int = 0
    """0-based."""
    count: int = 1
    """How many updates are wanted; fewer, or none, is a legal answer."""
    lm: LM | None = None
    """The optimizer-role language model, or None when there is none."""
    optimizer_model: str = ""
    """The optimizer model's name as the user wrote it; decides how much is asked of it."""
    program_summary: str = ""
    metric_name: str = ""
    budget_left: int | None = None
    """Rollouts the run may still spend, when known."""
    objective: str = ""
    """What "better" means beyond the score, in the user's words."""
    objectives: tuple[str, ...] = ("score",)
    """What "better" is measured by (`TuneOptions.objectives`), the score first."""
    files: str = ""
    """A folder in which optimizers may keep what they make (adapters); '' for `.agentopt` in the working directory."""
    taken: frozenset[str] = frozenset()
    """Hashes of candidates that need not be proposed, besides those in `history` (an open race, another optimizer)."""
    retry: frozenset[str] = frozenset()
    """Hashes from `history` that may be proposed again: they were rejected on other rows than these rollouts'."""
    dropped: list[DroppedEdit] = field(default_factory=list[DroppedEdit], compare=False)
    """Written by the optimizer: what it gave up on in this call."""

    @cached_property
    def graphs(self) -> Sequence[Mapping[str, Subgraph]]:
        """For each rollout: parameter name → subgraph of its feedback; empty for a rollout without a trace."""
        from agentopt.optimizers._feedback import graphs_of

        return graphs_of(self.rollouts)

    def subgraphs(self) -> dict[str, list[Subgraph]]:
        """For each parameter its subgraphs, one for every rollout that read it, in rollout order."""
        found: dict[str, list[Subgraph]] = {}
        for graph in self.graphs:
            for name, subgraph in graph.items():
                found.setdefault(name, []).append(subgraph)
        return found


@runtime_checkable
class Optimizer(Protocol):
    """Anything with a name and `propose`, sync or async."""

    @property
    def name(self) -> str:
        """Shown in the report and in `Update.source`."""
        ...

    def propose(self, context: ProposeContext) -> list[Update] | Awaitable[list[Update]]:
        """Up to `context.count` updates of `context.parent`, best first; an empty list when there is nothing left."""
        ...
