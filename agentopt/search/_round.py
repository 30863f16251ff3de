"""The standard round: ask for proposals on a minibatch, screen them against their parents, race the best on validation.

Planners (greedy, beam) only say which parents get how many proposals and how much the round may take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentopt.search._driver import Planner, Step
from agentopt.search._events import GateDone
from agentopt.search._gate import GateResult
from agentopt.search._lab import Lab
from agentopt.search._objectives import better
from agentopt.search._propose import Proposal
from agentopt.search._racing import gate_cost, screen_cost
from agentopt.search._screen import SECOND_LOOK, ScreenResult, screen


@dataclass(frozen=True, slots=True)
class Planned:
    """The driver that a planner makes: standard rounds until the planner or the lab says stop."""

    planner: Planner

    @property
    def name(self) -> str:
        """The planner's."""
        return self.planner.name

    async def run(self, lab: Lab) -> str:
        """Search to the end and say why it ended."""
        while True:
            reason = lab.stop()
            if reason is not None:
                return reason
            step = self.planner.next(lab.state())
            if isinstance(step, str):
                return step
            async with lab.turn():
                await standard_round(lab, step)


async def standard_round(lab: Lab, step: Step) -> None:
    """One round inside a turn.

    Raises:
        OutOfBudget: the round no longer fits.
    """
    ledger, repeats = lab.board.ledger, lab.options.repeats
    spent_before = ledger.rollouts
    batch = _batch(lab, step)
    proposals: list[Proposal] = []
    for parent, count in step.parents:
        rollouts = await lab.rollouts(parent, batch)
        if lab.perfect(parent, batch):
            lab.skip(parent, len(batch))
            continue
        proposals += await lab.propose(parent, count, rollouts)
    if not proposals:
        return
    more = _second_rows(lab, step, batch, len(proposals), ledger.rollouts - spent_before)
    found = await screen(lab.board, proposals, batch, more, lab.options.objectives)
    lab.screened(len(batch), found.scores, [proposal.candidate for proposal in found.passed])
    gate = await _gate(lab, found, (step.allotment - (ledger.rollouts - spent_before)) / repeats)
    _settle(lab, proposals, found, gate)


def _batch(lab: Lab, step: Step) -> list[str]:
    if lab.skips < 3:
        return lab.minibatch()
    known = lab.board.scores(step.parents[0][0], "train")
    return lab.minibatch(first=[row_id for row_id, score in known.items() if score < lab.options.perfect_score])


def _second_rows(lab: Lab, step: Step, batch: Sequence[str], proposals: int, spent: int) -> Sequence[str]:
    """Rows for a second look of the screen, where the round can afford them beside one full validation."""
    fresh = [row_id for row_id in lab.minibatch(lab.iteration + 1) if row_id not in batch]
    each = screen_cost(len(batch)) if proposals > 4 else len(batch)
    repeats = lab.options.repeats
    cost = (proposals * each + (SECOND_LOOK + len(step.parents)) * len(fresh)) * repeats
    full = lab.sizes.validation * repeats
    return fresh if proposals > 1 and spent + cost + full <= step.allotment else ()


async def _gate(lab: Lab, screened: ScreenResult, allotment: float) -> GateResult:
    if not screened.passed:
        return GateResult()
    places = max(1, int(allotment / gate_cost(lab.sizes.validation)))
    for late in screened.passed[places:]:
        screened.reasons[late.candidate.hash] = f"passed the screen, but the gate had only {places} places"
    return await lab.race([proposal.candidate for proposal in screened.passed[:places]], allotment)


def _settle(lab: Lab, proposals: Sequence[Proposal], screened: ScreenResult, gate: GateResult) -> None:
    finished = {candidate.hash: lab.board.mean(candidate, "validation") for candidate in gate.finished}
    lab.emit(GateDone(iteration=lab.iteration, means=finished))
    for proposal in proposals:
        key = proposal.candidate.hash
        if key not in finished:
            dropped = gate.dropped.get(key)
            stage, reason = ("gate", dropped[1]) if dropped else ("screen", screened.reasons.get(key, ""))
            lab.reject(proposal, stage, reason)
            continue
        before = lab.board.mean(proposal.parent, "validation")
        reason = f"validation {finished[key]:.3f}, its parent {before:.3f}"
        if better(lab.board, proposal.candidate, proposal.parent, lab.options.objectives):
            lab.accept(proposal, reason)
        else:
            lab.reject(proposal, "gate", reason)
