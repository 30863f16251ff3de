"""The Bayes driver: MIPROv2's search (arXiv 2406.11695) over combinations of proposed values, by Optuna's TPE.

The optimizer fills a menu for each parameter once; then each trial is one combination that TPE suggests. Instead of a
blind minibatch a trial races the best combination on the same validation rows in blocks and leaves when it is behind
by a Wilcoxon test. `racing=False` gives the reference's schedule of minibatches and full evaluations.
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentopt.errors import UserError
from agentopt.graph import Candidate
from agentopt.search._menus import Menus, child_hash, make_menus
from agentopt.search._objectives import better
from agentopt.search._propose import Proposal
from agentopt.search._racing import behind

if TYPE_CHECKING:
    from agentopt.search._lab import Lab

SIZES = (18, 12, 6, 3)
"""Values per parameter that the driver considers, most first; 6, 12 and 18 are the reference's light, medium, heavy."""
PATIENCE = 10**6
"""Turns without a gain are no reason to stop here: trials are bounded, and a generation without a gain is the end."""
RACED = 0.45
"""Share of validation that one raced trial takes on average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bayes:
    """Settings of the search.

    Raises:
        UserError: Optuna is not installed, or a number out of its range.
    """

    candidates: int | None = None
    """Values per parameter, the original included; None for as many as the budget carries."""
    trials: int | None = None
    """None for the reference's max(2 * variables * log2(candidates), 1.5 * candidates)."""
    racing: bool = True
    minibatch: int = 35
    """Without racing: validation rows of one trial, drawn anew each time."""
    full_every: int = 5
    """Without racing: trials between two full evaluations of the best mean so far."""
    name: str = "bayes"

    def __post_init__(self) -> None:
        for label in ("candidates", "trials", "minibatch", "full_every"):
            value = getattr(self, label)
            if value is not None and value < 1:
                raise UserError(f"Bayes: {label} must be at least 1; found {value!r}.")
        if importlib.util.find_spec("optuna") is None:
            raise UserError("the bayes driver needs Optuna: pip install 'agentopt[optuna]', or use another --driver")

    async def run(self, lab: Lab) -> str:
        """Search to the end and say why it ended."""
        while True:
            reason = lab.stop(PATIENCE)
            if reason is not None:
                return reason
            base = lab.pool.best.candidate if self.racing else lab.baseline
            size = self.candidates or self._size(lab)
            menus = await make_menus(lab, base, size)
            if menus.variables == 0:
                continue  # the lab counts failures and empty answers, and says when it is enough
            search = _Run(self, lab, base, menus, self.trials or self._trials(lab, menus, size))
            if not self.racing:
                return await search.minibatches()
            # What budget is left goes into new menus around the best combination.
            reason = await search.race() or lab.stop(PATIENCE)
            if reason is not None:
                return reason
            if lab.pool.best.candidate == base:
                return "a whole generation of combinations brought no gain"

    def _trials(self, lab: Lab, menus: Menus, size: int) -> int:
        """The reference's number of trials; a number counts as a menu of `size` values."""
        if lab.left is not None and all(len(menu) == 1 for menu in menus.values.values()):
            return max(2, lab.left)  # no menu could be written anew: the study goes on for as long as it can
        widths = [len(menu) for menu in menus.values.values()]
        widths += [len(spec.options) if spec.kind == "choice" else size for spec in menus.free.values()]
        widest = max(2, *widths)
        return max(2, int(max(2 * menus.variables * math.log2(widest), 1.5 * widest)))

    def _size(self, lab: Lab) -> int:
        """The largest menu whose trials the budget carries."""
        if lab.left is None:
            return SIZES[0]
        rows = lab.sizes.validation * lab.options.repeats
        for size in SIZES:
            trials = max(2 * len(lab.specs) * math.log2(size), 1.5 * size)
            cost = trials * RACED * rows if self.racing else trials * (self.minibatch + rows / self.full_every)
            if cost + len(lab.specs) * lab.sizes.batch <= lab.left:
                return size
        return SIZES[-1]


@dataclass
class _Run:
    settings: Bayes
    lab: Lab
    base: Candidate
    """What the menus were written for; combinations are edits of it."""
    menus: Menus
    trials: int
    made: dict[str, Proposal] = field(default_factory=dict[str, Proposal])
    """Every combination tried, by hash."""
    settled: set[str] = field(default_factory=set[str])
    """Combinations that were reported as accepted or rejected."""
    seen: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        import optuna

        self.optuna = optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=self.lab.seed, multivariate=True)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        self.spaces = self._spaces()
        self._told(
            dict.fromkeys(self.menus.values, 0),
            self.lab.board.mean(self.base, "validation", self.lab.board.splits["validation"].ids),
        )

    # --- the space ---

    def _spaces(self) -> dict[str, Any]:
        kinds = self.optuna.distributions
        spaces: dict[str, Any] = {
            name: kinds.CategoricalDistribution(list(range(len(menu)))) for name, menu in self.menus.values.items()
        }
        for name, spec in self.menus.free.items():
            if spec.kind == "choice":
                spaces[name] = kinds.CategoricalDistribution(list(range(len(spec.options))))
            elif spec.integer:
                spaces[name] = kinds.IntDistribution(int(spec.low or 0), int(spec.high or 0))
            else:
                spaces[name] = kinds.FloatDistribution(spec.low or 0.0, spec.high or 0.0)
        return spaces

    def _told(self, places: Mapping[str, int], value: float) -> None:
        """Add a finished trial for the baseline's own numbers and choices and the given places of the menus."""
        params: dict[str, Any] = dict(places)
        for name, spec in self.menus.free.items():
            own = self.base.get(name, spec.default)
            params[name] = spec.options.index(own) if spec.kind == "choice" else own
        self.study.add_trial(self.optuna.trial.create_trial(params=params, distributions=self.spaces, value=value))

    def _chosen(self, params: Mapping[str, Any]) -> dict[str, Any]:
        chosen: dict[str, Any] = {name: menu[params[name]] for name, menu in self.menus.values.items()}
        for name, spec in self.menus.free.items():
            chosen[name] = spec.options[params[name]] if spec.kind == "choice" else params[name]
        return chosen

    def _candidate(self, params: Mapping[str, Any]) -> Proposal | Candidate | None:
        """The combination: the baseline itself, one tried before, a new one, or None when it may not be used."""
        lab = self.lab
        update = self.menus.update(self.base, lab.specs, self._chosen(params))
        if not update.edits:
            return self.base
        key = child_hash(self.base, update, lab.specs)
        if key is None:
            return None
        if key == self.base.hash:
            return self.base
        if key not in self.made:
            proposal = lab.offer(self.base, update, again=True)
            if proposal is None:
                return None
            self.made[key] = proposal
        return self.made[key]

    # --- with racing ---

    async def race(self) -> str | None:
        """Trials that leave as soon as they are behind; a combination drawn again goes on where it stopped.

        A draw that runs nothing, such as the base itself, is no trial: a small menu would be left half untried.

        Returns:
            Why the search is over, or None when only this generation's trials are done.
        """
        lab, idle, done = self.lab, 0, 0
        while done < self.trials:
            reason = lab.stop(PATIENCE) or self._unaffordable()
            if reason is not None:
                self._close()
                return reason
            before = lab.board.ledger.rollouts
            async with lab.turn():
                trial = self.study.ask(self.spaces)
                proposal = self._candidate(trial.params)
                if proposal is None:
                    self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
                elif isinstance(proposal, Candidate):
                    self.study.tell(trial, lab.board.mean(proposal, "validation"))
                else:
                    self.study.tell(trial, await self._raced(proposal))
            ran = lab.board.ledger.rollouts > before
            done, idle = done + ran, 0 if ran else idle + 1
            if idle >= 10 or (len(self.made) + 1 >= self.menus.combinations and idle):
                break
        self._close()
        return None

    def _unaffordable(self) -> str | None:
        needed = self.lab.sizes.validation * self.lab.options.repeats
        if self.lab.affords(needed):
            return None
        return f"budget: {self.lab.left} rollouts left, one more trial takes up to {needed}"

    async def _raced(self, proposal: Proposal) -> float:
        """The trial's value: its mean, or for one that left the race the leader's plus the paired difference."""
        lab, child = self.lab, proposal.candidate
        block, leader = lab.options.block_size, lab.pool.best.candidate
        done = len(lab.board.scores(child, "validation"))
        while done < len(lab.order):
            done = min(done + block, len(lab.order))
            await lab.measure([child], "validation", lab.order[:done])
            diffs = lab.board.paired(leader, child, "validation", lab.order[:done])
            if done < len(lab.order) and behind(diffs, lab.options.drop_alpha):
                gap = sum(diffs) / len(diffs)
                self._settle(proposal, f"behind the leader by {-gap:.3f} on {done} validation rows")
                return lab.board.mean(leader, "validation") + gap
        self._settle(proposal, "")
        return lab.board.mean(child, "validation")

    def _settle(self, proposal: Proposal, behind_by: str) -> None:
        """Report a combination once it is decided; one that comes back may still be accepted later."""
        lab, child = self.lab, proposal.candidate
        if lab.board.complete(child, "validation"):
            if child.hash in self.settled:
                return
            self.settled.add(child.hash)
            mean, before = (lab.board.mean(c, "validation") for c in (child, self.base))
            reason = f"validation {mean:.3f}, what it is made from {before:.3f}"
            if better(lab.board, child, self.base, lab.options.objectives):
                lab.accept(proposal, reason)
            else:
                lab.reject(proposal, "gate", reason)
        elif behind_by and child.hash not in self.seen:
            self.seen.add(child.hash)
            lab.reject(proposal, "gate", behind_by)

    def _close(self) -> None:
        for proposal in self.made.values():
            if proposal.candidate.hash not in self.settled | self.seen:
                self.lab.reject(proposal, "gate", "not all of its validation rows were run")

    # --- the reference's schedule ---

    async def minibatches(self) -> str:
        """Each trial is scored on its own random minibatch; now and then the best mean gets all of validation."""
        lab, rng = self.lab, random.Random(self.lab.seed)
        size, step = min(self.settings.minibatch, len(lab.order)), self.settings.full_every
        total = self.trials + self.trials // step + 1 + (self.trials % step != 0)
        ids = lab.board.splits["validation"].ids
        scores: dict[str, list[float]] = {}
        params: dict[str, dict[str, Any]] = {}
        for _ in range(self.trials):
            reason = lab.stop(PATIENCE) or self._unaffordable()
            if reason is not None:
                self._close()
                return reason
            async with lab.turn():
                trial = self.study.ask(self.spaces)
                proposal = self._candidate(trial.params)
                batch = [ids[at] for at in rng.sample(range(len(ids)), size)]
                if proposal is None:
                    self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
                    continue
                child = proposal if isinstance(proposal, Candidate) else proposal.candidate
                await lab.measure([child], "validation", batch)
                value = lab.board.mean(child, "validation", batch)
                scores.setdefault(child.hash, []).append(value)
                params.setdefault(child.hash, dict(trial.params))
                number = trial.number + 1
                if number % (step + 1) == 0 or number == total - 1:
                    await self._full(scores, params)
                self.study.tell(trial, value)
        self._close()
        return f"{self.trials} trials done"

    async def _full(self, scores: Mapping[str, list[float]], params: Mapping[str, dict[str, Any]]) -> None:
        """Run the best mean that was not fully evaluated on all rows, and tell the sampler as one more trial."""
        lab = self.lab
        means = {key: sum(values) / len(values) for key, values in scores.items() if key not in self.settled}
        if not means:
            return
        key = max(means, key=lambda one: means[one])
        if key == self.base.hash:
            child = self.base
            self.settled.add(key)
        else:
            child = self.made[key].candidate
            await lab.measure([child], "validation", lab.order)
            self._settle(self.made[key], "")
        value = lab.board.mean(child, "validation", lab.board.splits["validation"].ids)
        self.study.add_trial(self.optuna.trial.create_trial(params=params[key], distributions=self.spaces, value=value))
