"""The screen: proposals against their parents on the same minibatch, same examples, same seeds.

A pool of more than four is thinned on the first half of the minibatch; who is left runs the whole of it and passes with
a mean paired difference above zero. Rows that a candidate shows as demonstrations are left out of its comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from agentopt.search._board import Board
from agentopt.search._objectives import better
from agentopt.search._propose import Proposal
from agentopt.search._racing import KEEP, behind, first_look, keep_best


@dataclass(slots=True)
class ScreenResult:
    """Who passed, best first; mean difference to the parent by hash; why the others did not."""

    passed: list[Proposal] = field(default_factory=list[Proposal])
    scores: dict[str, float] = field(default_factory=dict[str, float])
    reasons: dict[str, str] = field(default_factory=dict[str, str])


SECOND_LOOK = 4
"""Near misses that are looked at again when fewer than `WANTED` passed."""
WANTED = 2
_FAR = 0.2


async def screen(
    board: Board,
    proposals: Sequence[Proposal],
    batch: Sequence[str],
    more: Sequence[str] = (),
    objectives: Sequence[str] = ("score",),
) -> ScreenResult:
    """Run the screen. `more` are the rows of a second look, empty for none.

    With further `objectives` also a proposal passes that is not shown to score lower and is better in one of them.

    A parent that happens to be lucky on 16 rows beats everybody. When hardly anyone passes, the best few that are not
    significantly behind get as many rows again, parent included, and pass with a gain over all of them.

    Raises:
        OutOfBudget: the minibatch no longer fits.
    """
    result = ScreenResult()
    by_hash = {proposal.candidate.hash: proposal for proposal in proposals}
    running = [proposal.candidate for proposal in proposals]
    look = first_look(len(batch), len(running))
    if look < len(batch):
        await board.run_many(running, "train", batch[:look])
        standing = board.standing(running, "train", batch[:look])
        count = max(4, math.ceil(len(running) * KEEP))
        kept = set(keep_best(standing, list(by_hash), count))
        for candidate in running:
            if candidate.hash not in kept:
                result.scores[candidate.hash] = _mean_difference(board, by_hash[candidate.hash], batch[:look])[0]
                result.reasons[candidate.hash] = f"not among the best {count} of {len(running)} after {look} rows"
        running = [candidate for candidate in running if candidate.hash in kept]
    await board.run_many(running, "train", batch)
    standing = board.standing(running, "train", batch)
    for key in keep_best(standing, [candidate.hash for candidate in running], len(running)):
        difference, rows = _mean_difference(board, by_hash[key], batch)
        result.scores[key] = difference
        # With most of the minibatch shown as demonstrations there is little left to compare: no loss is enough.
        enough = difference > 0 or (rows < len(batch) / 2 and difference >= 0)
        if enough or (
            len(objectives) > 1 and better(board, by_hash[key].candidate, by_hash[key].parent, objectives, batch)
        ):
            result.passed.append(by_hash[key])
        else:
            result.reasons[key] = f"no gain over its parent on the minibatch ({difference:+.3f} on {rows} rows)"
    near = [
        proposal
        for candidate in running
        if candidate.hash in result.reasons
        and not behind(board.paired((proposal := by_hash[candidate.hash]).parent, candidate, "train", batch), _FAR)
    ]
    if more and near and len(result.passed) < WANTED:
        near.sort(key=lambda proposal: -standing[proposal.candidate.hash])  # stable: the earlier proposal wins a tie
        await _second_look(board, near[:SECOND_LOOK], [*batch, *more], result)
    return result


async def _second_look(board: Board, near: Sequence[Proposal], ids: Sequence[str], result: ScreenResult) -> None:
    parents = {proposal.parent.hash: proposal.parent for proposal in near}
    await board.run_many([*parents.values(), *(proposal.candidate for proposal in near)], "train", ids)
    for proposal in near:
        key = proposal.candidate.hash
        difference, rows = _mean_difference(board, proposal, ids)
        result.scores[key] = difference
        if difference > 0:
            result.passed.append(proposal)
            del result.reasons[key]
        else:
            result.reasons[key] = f"no gain over its parent on the minibatch ({difference:+.3f} on {rows} rows)"
    result.passed.sort(key=lambda proposal: -result.scores[proposal.candidate.hash])


def _mean_difference(board: Board, proposal: Proposal, ids: Sequence[str]) -> tuple[float, int]:
    diffs = board.paired(proposal.parent, proposal.candidate, "train", ids)
    return (sum(diffs) / len(diffs) if diffs else 0.0), len(diffs)
