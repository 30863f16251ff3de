"""Proposals made on a worker: the optimizer's context crosses as JSON, and its updates come back.

Unit: one `propose`. Equal contexts give equal updates, so it does not matter where an optimizer runs. The worker has
the program and with it the parameters' declarations; the driver has the models, the reply cache and the budget. Only
optimizers given by name can cross; one given as an object stays in the driver's process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from agentopt.evaluation import Dataset, EvaluationRow, Example, RemoteExecutor, Rollout
from agentopt.graph import Candidate, IllegalEdit, Trace, declared_parameters
from agentopt.models import LMError, resolve
from agentopt.optimizers import DroppedEdit, Optimizer, PastProposal, ProposeContext, Update, resolve_optimizer
from agentopt.search._propose import call_optimizer, update_from_dict, update_to_dict

_PLAIN = (
    "program_name", "seed", "iteration", "count", "optimizer_model", "program_summary", "metric_name", "budget_left",
    "objective", "files",
)  # fmt: skip


class RemoteOptimizer:
    """An optimizer whose `propose` runs on some worker of an executor."""

    def __init__(self, spec: str, template: Path | None, local: Optimizer, executor: RemoteExecutor) -> None:
        self.name = local.name
        self._spec = spec
        self._template = None if template is None else str(template.resolve())
        self._executor = executor

    async def propose(self, context: ProposeContext) -> list[Update]:
        """The updates that the same optimizer would give here.

        Raises:
            LMError, IllegalEdit, UserError, BudgetExhausted: as the optimizer.
            RunError: any other exception of it.
        """
        payload = {"optimizer": self._spec, "template": self._template, "context": context_to_dict(context)}
        answer: Mapping[str, Any] = await self._executor.call(f"{__name__}:propose", payload)
        context.dropped.extend(DroppedEdit(**item) for item in answer.get("dropped", ()))
        if "lm_error" in answer:
            failed = answer["lm_error"]
            raise LMError(str(failed["text"]), retryable=bool(failed["retryable"]))
        if "illegal" in answer:
            raise _illegal(str(answer["illegal"]))
        return [update_from_dict(item) for item in answer["updates"]]


def _illegal(text: str) -> IllegalEdit:
    error = IllegalEdit(())
    error.args = (text,)
    return error


async def propose(payload: Mapping[str, Any]) -> dict[str, Any]:
    """On the worker: what `RemoteOptimizer.propose` asks for."""
    optimizer = _optimizer(str(payload["optimizer"]), payload["template"])
    context = context_from_dict(payload["context"])
    answer: dict[str, Any]
    try:
        updates = cast("list[Update]", await call_optimizer(optimizer, context))
        answer = {"updates": [update_to_dict(update) for update in updates]}
    except IllegalEdit as error:
        answer = {"illegal": str(error)}
    except LMError as error:
        answer = {"lm_error": {"text": str(error), "retryable": error.retryable}}
    return answer | {"dropped": [asdict(item) for item in context.dropped]}


@lru_cache(maxsize=4)
def _optimizer(spec: str, template: str | None) -> Optimizer:
    return resolve_optimizer(spec, template=template)


# ---- the context as JSON


def context_to_dict(context: ProposeContext) -> dict[str, Any]:
    """Everything an optimizer may look at; parameters by name, traces as they are stored."""
    return {
        **{name: getattr(context, name) for name in _PLAIN},
        "parent": context.parent.to_dict(),
        "specs": list(context.specs),
        "formatted": [name for name, spec in context.specs.items() if spec.formatted],
        "train": {"name": context.train.name, "examples": [example.to_dict() for example in context.train]},
        "rollouts": [_rollout_to_dict(rollout) for rollout in context.rollouts],
        "history": [_past_to_dict(past) for past in context.history],
        "lm": context.lm is not None,
        "objectives": list(context.objectives),
        "taken": sorted(context.taken),
        "retry": sorted(context.retry),
    }


def context_from_dict(data: Mapping[str, Any]) -> ProposeContext:
    """The inverse of `context_to_dict`, in a process that has loaded the program and configured the models."""
    declared = declared_parameters()
    for name in data["formatted"]:
        declared[name].formatted = True
    train = data["train"]
    return ProposeContext(
        **{name: data[name] for name in _PLAIN},
        parent=Candidate.from_dict(data["parent"]),
        specs={name: declared[name] for name in data["specs"]},
        train=Dataset(train["name"], [Example.from_dict(item) for item in train["examples"]]),
        rollouts=[_rollout_from_dict(item) for item in data["rollouts"]],
        history=[_past_from_dict(item) for item in data["history"]],
        lm=resolve("optimizer") if data["lm"] else None,
        objectives=tuple(data["objectives"]),
        taken=frozenset(data["taken"]),
        retry=frozenset(data["retry"]),
    )


def _rollout_to_dict(rollout: Rollout) -> dict[str, Any]:
    trace = rollout.trace
    return {
        "example": rollout.example.to_dict(),
        "row": rollout.row.to_dict(),
        "trace": None if trace is None else trace.to_dict(),
    }


def _rollout_from_dict(data: Mapping[str, Any]) -> Rollout:
    trace = None if data["trace"] is None else Trace.from_dict(data["trace"])
    return Rollout(Example.from_dict(data["example"]), EvaluationRow.from_dict(data["row"]), trace)


def _past_to_dict(past: PastProposal) -> dict[str, Any]:
    values: dict[str, Any] = {field.name: getattr(past, field.name) for field in fields(past)}
    return values | {"update": update_to_dict(past.update)}


def _past_from_dict(data: Mapping[str, Any]) -> PastProposal:
    values: dict[str, Any] = {**data, "update": update_from_dict(data["update"])}
    return PastProposal(**values)
