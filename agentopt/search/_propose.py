"""Ask the optimizer, and turn whatever comes back into a recorded outcome and legal candidates."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import anyio.to_thread

from agentopt.errors import UserError
from agentopt.graph import Candidate, IllegalEdit, ParameterSpec, apply_edits, edit_from_dict
from agentopt.models import BudgetExhausted, LMError
from agentopt.optimizers import Optimizer, ProposeContext, Update
from agentopt.search._board import guarded
from agentopt.search._budget import Ledger, OutOfBudget, usage_calls, usage_tokens
from agentopt.search._events import CandidateRejected, ProposalMade
from agentopt.search._leaks import LeakGuard


@dataclass(frozen=True, slots=True)
class Proposal:
    """A legal child that is worth measuring."""

    candidate: Candidate
    parent: Candidate
    update: Update


def update_to_dict(update: Update) -> dict[str, Any]:
    """JSON form of an update."""
    return {
        "edits": [edit.to_dict() for edit in update.edits],
        "rationale": update.rationale,
        "source": update.source,
    }


def update_from_dict(data: Mapping[str, Any]) -> Update:
    """The inverse of `update_to_dict`."""
    return Update(
        edits=tuple(edit_from_dict(edit) for edit in data["edits"]),
        rationale=str(data.get("rationale", "")),
        source=str(data.get("source", "")),
    )


async def ask(optimizer: Optimizer, context: ProposeContext, ledger: Ledger) -> ProposalMade:
    """One call of the optimizer. Every failure but bad configuration becomes an outcome, never an exception.

    Raises:
        OutOfBudget: the optimizer's own calls no longer fit.
        UserError: the optimizer cannot work as configured.
    """
    outcome, detail, transient = "ok", "", False
    updates: list[dict[str, Any]] = []
    with guarded(ledger) as meter:
        try:
            updates, outcome, detail = _read(await call_optimizer(optimizer, context), context.count)
        except BudgetExhausted as error:
            ledger.charge_optimizer(meter.cost, usage_tokens(meter.usage), usage_calls(meter.usage))
            raise OutOfBudget(str(error)) from error
        except IllegalEdit as error:
            outcome, detail = "garbage", str(error)
        except UserError:
            raise
        except LMError as error:
            outcome, detail, transient = "error", _line(error), error.retryable
        except Exception as error:  # noqa: BLE001  (a recorded outcome; k of them in a row end the run)
            outcome, detail = "error", f"{type(error).__name__}: {_line(error)}"
    return ProposalMade(
        iteration=context.iteration,
        parent=context.parent.hash,
        outcome=outcome,
        detail=detail,
        updates=updates,
        usd=meter.cost,
        tokens=usage_tokens(meter.usage),
        transient=transient,
        dropped=[asdict(drop) for drop in context.dropped],
        calls=usage_calls(meter.usage),
    )


async def call_optimizer(optimizer: Optimizer, context: ProposeContext) -> object:
    """What `propose` answers, off the event loop when it is a plain function."""
    if inspect.iscoroutinefunction(optimizer.propose):
        return await optimizer.propose(context)
    # A sync optimizer may call a model and block; the worker thread carries this context, meter and guard included.
    answer: object = await anyio.to_thread.run_sync(optimizer.propose, context)
    return await answer if inspect.isawaitable(answer) else answer


def _read(answer: object, count: int) -> tuple[list[dict[str, Any]], str, str]:
    if answer is None:
        return [], "none", "the optimizer answered None"
    kind = type(answer).__name__
    if isinstance(answer, str | bytes | Mapping) or not isinstance(answer, Iterable):
        return [], "garbage", f"the optimizer answered {kind}; expected a list of Update"
    items = list(cast("Iterable[object]", answer))
    if not items:
        return [], "empty", "nothing to propose"
    updates = [item for item in items if isinstance(item, Update) and item.edits]
    if not updates:
        return [], "garbage", f"the optimizer answered {len(items)} items, none of them an Update with edits"
    kept = [update_to_dict(update) for update in updates[:count]]
    wrong = len(items) - len(updates)
    return kept, "ok", f"{wrong} of {len(items)} items were no Update with edits" if wrong else ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


class Checker:
    """Edits → candidate: legal, not leaking, not seen before."""

    def __init__(
        self, specs: Mapping[str, ParameterSpec], leaks: LeakGuard, reject: Callable[[CandidateRejected], None]
    ) -> None:
        self._specs = specs
        self._leaks = leaks
        self._reject = reject
        self.seen: set[str] = set()

    def candidates(
        self,
        made: ProposalMade,
        parent: Candidate,
        *,
        again: bool = False,
        retry: Collection[str] = (),
        specs: Mapping[str, ParameterSpec] | None = None,
    ) -> tuple[list[Proposal], int]:
        """The proposals worth measuring, and how many of the updates were illegal or leaking.

        `again` lets pass what was proposed before, `retry` only these hashes of it; `specs` are the parameters that may
        be touched, None for all.
        """
        allowed = self._specs if specs is None else specs
        good: list[Proposal] = []
        refused = 0
        for data in made.updates:
            source = str(data.get("source", ""))
            try:
                update = update_from_dict(data)
                child = apply_edits(parent, update.edits, allowed)
            except UserError as error:  # IllegalEdit, or an edit that cannot even be read
                refused += 1
                self._say(made, "", source, "edit", str(error))
                continue
            if child.hash in self.seen and not again and child.hash not in retry:
                self._say(made, child.hash, source, "duplicate", "equal to a candidate that was already tried")
                continue
            leak = self._leaks.check(child)
            if leak is not None:
                refused += 1
                self._say(made, child.hash, source, "leak", leak)
                continue
            self.seen.add(child.hash)
            good.append(Proposal(child, parent, update))
        return good, refused

    def _say(self, made: ProposalMade, candidate: str, source: str, stage: str, reason: str) -> None:
        self._reject(
            CandidateRejected(
                iteration=made.iteration,
                candidate=candidate,
                parent=made.parent,
                source=source,
                stage=stage,
                reason=reason,
            )
        )
