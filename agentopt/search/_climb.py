"""The climb driver: steps on small minibatches, validation only for where a chain of steps has led.

With a model that writes well most steps that pass their minibatch are real, and a full validation after each of them
(as in the Pareto search) is most of the bill. Here a child that beats its parent on the minibatch is the next parent at
once; after a few such links the end of the chain races the incumbent on all of validation. Chains grow while that goes
well and shrink when it does not. Only what has all validation rows is ever kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentopt.errors import UserError
from agentopt.graph import Candidate
from agentopt.search._events import GateDone
from agentopt.search._objectives import better

if TYPE_CHECKING:
    from agentopt.search._lab import Lab
    from agentopt.search._propose import Proposal


@dataclass(frozen=True, slots=True, kw_only=True)
class Climb:
    """Settings of the search.

    Raises:
        UserError: a number below one.
    """

    minibatch: int = 3
    """Training rows of one step."""
    links: int = 2
    """Steps of the first chain; doubled after a chain that helped, halved after one that did not."""
    longest: int = 8
    """Most steps between two validations."""
    tries: int = 8
    """Proposals in a row that fail on their minibatch before what the chain has is validated."""
    patience: int = 40
    """Turns without a better validation mean; most cost a minibatch or two."""
    name: str = "climb"

    def __post_init__(self) -> None:
        for label in ("minibatch", "links", "longest", "tries", "patience"):
            if getattr(self, label) < 1:
                raise UserError(f"Climb: {label} must be at least 1; found {getattr(self, label)!r}.")

    async def run(self, lab: Lab) -> str:
        """Search to the end and say why it ended."""
        return await _Run(self, lab).search()


@dataclass
class _Run:
    settings: Climb
    lab: Lab
    chain: list[Proposal] = field(default_factory=list["Proposal"])
    """Links since the last validation, oldest first."""
    failed: int = 0
    """Proposals in a row without a gain."""
    solved: int = 0
    """Minibatches in a row that the tip solved."""
    missed: int = 0
    """Chains in a row that validation refused."""
    batch: list[str] = field(default_factory=list[str])
    drawn: int = 0

    def __post_init__(self) -> None:
        self.base = self.lab.baseline
        self.length = min(self.settings.links, self.settings.longest)

    @property
    def tip(self) -> Candidate:
        return self.chain[-1].candidate if self.chain else self.base

    async def search(self) -> str:
        lab = self.lab
        while True:
            reason = lab.stop(self.settings.patience) or self._unaffordable()
            if reason is not None:
                await self._last(reason)
                return reason
            async with lab.turn():
                await self._step()
                if self._due():
                    await self._validate()

    def _unaffordable(self) -> str | None:
        # A step, and the validation that shows what it is worth.
        needed = (2 * self.settings.minibatch + self.lab.sizes.validation) * self.lab.options.repeats
        if self.lab.affords(needed):
            return None
        return f"budget: {self.lab.left} rollouts left, one more step and its validation take up to {needed}"

    def _due(self) -> bool:
        if not self.chain:
            return False
        return len(self.chain) >= self.length or self.failed >= self.settings.tries or self.solved >= 2

    async def _last(self, reason: str) -> None:
        """Validate what the chain still has, where that fits."""
        lab = self.lab
        if not self.chain:
            return
        if lab.affords(lab.sizes.validation * lab.options.repeats):
            async with lab.turn():
                await self._validate()
        for link in self.chain:
            lab.reject(link, "gate", f"not validated: {reason}")
        self.chain.clear()

    # --- one step ---

    async def _step(self) -> None:
        lab, tip = self.lab, self.tip
        if not self.batch or (self._known(tip) and lab.perfect(tip, self.batch)) or self.failed:
            self._next_batch()
        rollouts = await lab.rollouts(tip, self.batch)
        if lab.perfect(tip, self.batch):
            self.solved += 1
            lab.skip(tip, len(self.batch))
            return
        self.solved = 0
        proposals = await lab.propose(tip, 1, rollouts, batch=self.batch)
        if not proposals:
            self.failed += 1
            return
        child = proposals[0]
        # With traces: if the child becomes the tip, the next step learns from these same rollouts.
        await lab.measure_traced(child.candidate, "train", self.batch)
        gain = sum(lab.board.paired(tip, child.candidate, "train", self.batch))
        names = lab.options.objectives
        passed = gain > 0 or (len(names) > 1 and better(lab.board, child.candidate, tip, names, self.batch))
        lab.screened(len(self.batch), {child.candidate.hash: gain / len(self.batch)}, [child.candidate] * passed)
        if passed:
            self.failed = 0
            self.chain.append(child)
        else:
            self.failed += 1
            lab.reject(child, "screen", f"no gain over its parent on the minibatch ({gain:+.3f} in sum)")

    def _known(self, tip: Candidate) -> bool:
        return not self.lab.board.missing(tip, "train", self.batch)

    def _next_batch(self) -> None:
        """The next rows of the run's shuffled training order; a solved or exhausted minibatch teaches nothing more."""
        size = min(self.settings.minibatch, self.lab.sizes.train)
        whole = self.lab.minibatches
        rows: list[str] = []
        while len(rows) < size:
            place, offset = divmod(self.drawn, whole.size)
            row_id = whole.batch(place)[offset]
            self.drawn += 1
            if row_id not in rows:
                rows.append(row_id)
        self.batch = rows

    # --- validation ---

    async def _validate(self) -> None:
        """Race the tip against the incumbent; if it loses, the middle of a long chain gets a try as well."""
        self.failed = self.solved = 0
        lab, chain = self.lab, list(self.chain)
        self.chain.clear()
        tried: list[int] = []
        kept: int | None = None
        for at in [len(chain) - 1] + ([(len(chain) - 1) // 2] if len(chain) > 2 else []):
            if not lab.affords(lab.sizes.validation * lab.options.repeats):
                break
            tried.append(at)
            if await self._holds(chain[at]):
                kept = at
                break
        refused = "its successor did not hold on validation" if tried else "the budget did not cover its validation"
        for at, link in enumerate(chain):
            if kept is not None and at < kept:
                lab.reject(link, "gate", "built upon: its successor was validated instead")
            elif at != kept and at not in tried:
                lab.reject(link, "gate", refused)
        if kept is None:
            self.length = max(1, self.length // 2)
            self.missed += 1
            self._restart()
        else:
            self.missed = 0
            self.length = min(self.settings.longest, 2 * self.length)

    async def _holds(self, link: Proposal) -> bool:
        lab, child = self.lab, link.candidate
        race = await lab.race([child], lab.sizes.validation)
        finished = {one.hash: lab.board.mean(one, "validation") for one in race.finished}
        lab.emit(GateDone(iteration=lab.iteration, means=finished))
        if child.hash not in finished:
            lab.reject(link, "gate", race.dropped[child.hash][1])
            return False
        before, after = lab.board.mean(self.base, "validation"), finished[child.hash]
        reason = f"validation {after:.3f}, where its chain began {before:.3f}"
        if not better(lab.board, child, self.base, lab.options.objectives):
            lab.reject(link, "gate", reason)
            return False
        lab.accept(link, reason)
        self.base = child
        return True

    def _restart(self) -> None:
        """After a chain that failed go on from the best; every third failure in a row from the runner-up."""
        top = self.lab.pool.top(2)
        self.base = top[-1 if self.missed % 3 == 0 else 0].candidate
        self.batch = []
