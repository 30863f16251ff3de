"""Language gradients: from the last call of a failing case to the first, what each node should do differently.

The unit is one case. Every call that read a tunable parameter is asked about once, with what the calls after it demand
of it; it answers a suggestion for itself and a demand on what came before. Calls without a tunable parameter pass the
demands on unasked, so the number of language model calls is linear in the recorded run, and bounded besides.
Gradients of a batch are gathered by node NAME: runs may differ in length and branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentopt.models import side_by_side
from agentopt.optimizers._feedback import cut
from agentopt.optimizers._problem import cases_of
from agentopt.optimizers.symbolic._loss import Loss, facts, inputs_text, language_loss, output_text
from agentopt.optimizers.symbolic._show import value_text
from agentopt.optimizers.symbolic._trajectory import Trajectory, Visit, trajectory_of
from agentopt.optimizers.symbolic._work import TEXT, Work, object_schema, words_of

if TYPE_CHECKING:
    from agentopt.evaluation import Rollout

SOURCE = "symbolic.gradients"
_SAME_FEEDBACK = 2
_DEMANDS = 4


@dataclass(frozen=True, slots=True)
class Gradient:
    """What one call of one node suggests."""

    node: str
    call_index: int
    suggestion: str
    """For the node itself."""
    demand_on_previous: str
    """For whatever gave this node its inputs."""
    evidence: tuple[int, ...]
    """Ids of the records that it was read from, in the case's trace."""
    example_id: str = ""
    parameters: tuple[str, ...] = ()
    """Tunable parameters that this call read."""


@dataclass(frozen=True, slots=True)
class CaseRun:
    """One failing case: its rollout, its trajectory, its loss."""

    rollout: Rollout
    trajectory: Trajectory
    asked: tuple[int, ...]
    """Ids of the visits that get a gradient."""
    loss: Loss | None = None


def failing_cases(work: Work) -> list[CaseRun]:
    """The failing cases to look at, most informative first, cut so that the backward pass stays within its calls."""
    context, options = work.context, work.options
    names = list(context.specs)
    owners = [name for name, spec in context.specs.items() if spec.kind == "pipeline"]
    left = max(2, options.max_calls // 3)
    same: dict[str, int] = {}
    chosen: list[CaseRun] = []
    for case in cases_of(context.rollouts, context.graphs, names):
        if not case.failed or len(chosen) >= options.cases or left <= 1:
            break
        same[case.feedback] = same.get(case.feedback, 0) + 1
        if same[case.feedback] > _SAME_FEEDBACK:
            continue
        trajectory = trajectory_of(case.rollout, names, owners, context.program_name)
        reading = trajectory.reading()
        if not reading:
            continue
        left -= options.loss == "lm"
        wanted = min(options.visits, left)
        asked = reading[-wanted:]
        left -= len(asked)
        if len(reading) > len(asked):
            rest = len(reading) - len(asked)
            work.drop(
                SOURCE, f"example {case.rollout.example.id}: {rest} earlier calls get no gradient (limit {wanted})"
            )
        chosen.append(CaseRun(case.rollout, trajectory, tuple(visit.id for visit in asked)))
    return chosen


async def backward(work: Work) -> None:
    """Fill `work.cases` with losses and `work.gradients` with what the failing cases suggest.

    Raises:
        LMError: the model cannot be reached, or refused every question.
        BudgetExhausted: the budget does not cover the calls.
    """
    planned = failing_cases(work)
    dropped = work.context.dropped
    before = len(dropped)

    async def one(case: CaseRun) -> tuple[CaseRun, list[Gradient]]:
        loss = await language_loss(work, case.rollout, case.trajectory)
        with_loss = CaseRun(case.rollout, case.trajectory, case.asked, loss)
        return with_loss, await gradients_of(work, with_loss)

    limit = 1 if work.limited.sequential else work.options.concurrency
    done = await side_by_side([lambda case=case: one(case) for case in planned], limit)
    dropped[before:] = sorted(dropped[before:], key=lambda drop: drop.problem)  # whichever case ended first
    if done and not work.answered and work.failures:
        raise work.failures[0]
    work.cases = [case for case, _ in done]
    work.gradients = gathered(gradient for _, found in done for gradient in found)


async def gradients_of(work: Work, case: CaseRun) -> list[Gradient]:
    """The gradients of one case, in the time order of its calls.

    Raises:
        LMError: the model cannot be reached at present.
        BudgetExhausted: the budget does not cover the calls.
    """
    wanted = _tunable(case.trajectory)
    demands: dict[int, list[str]] = {}
    found: list[Gradient] = []
    for visit in reversed(case.trajectory.visits):
        if visit.id not in wanted:
            continue
        incoming = list(dict.fromkeys(demands.pop(visit.id, [])))[-_DEMANDS:]
        outgoing = incoming
        if visit.id in case.asked:
            gradient = await _ask(work, case, visit, incoming)
            if gradient is not None:
                found.append(gradient)
                outgoing = [f"{visit.node}: {gradient.demand_on_previous}"] if gradient.demand_on_previous else []
        for number in visit.previous:
            if number in wanted:
                demands.setdefault(number, []).extend(outgoing)
    return found[::-1]


def gathered(gradients: Iterable[Gradient]) -> dict[str, list[Gradient]]:
    """Node name → its gradients over the batch: by case, calls in time order, repeated suggestions once."""
    found: dict[str, list[Gradient]] = {}
    seen: set[tuple[str, str, str]] = set()
    for gradient in gradients:
        key = (gradient.node, _plain(gradient.suggestion), _plain(gradient.demand_on_previous))
        if key not in seen:
            seen.add(key)
            found.setdefault(gradient.node, []).append(gradient)
    return found


def suggestions_for(gradients: Mapping[str, Sequence[Gradient]], parameters: Iterable[str]) -> list[Gradient]:
    """The gradients of calls that read one of `parameters`, by node."""
    wanted = set(parameters)
    return [gradient for found in gradients.values() for gradient in found if wanted & set(gradient.parameters)]


def suggestion_lines(gradients: Sequence[Gradient], limit: int) -> str:
    """Suggestions as a list, within `limit` characters."""
    lines: list[str] = []
    for size in (800, 400, 200, 100):
        lines = [f"- [{gradient.node}] {cut(gradient.suggestion, size)}" for gradient in gradients]
        if sum(map(len, lines)) <= limit:
            break
    return cut("\n".join(lines), limit) or "(none)"


def _tunable(trajectory: Trajectory) -> set[int]:
    """The visits that read a tunable parameter, or depend on one that did."""
    found: set[int] = set()
    for visit in trajectory.visits:
        if visit.reads or any(number in found for number in visit.previous):
            found.add(visit.id)
    return found


async def _ask(work: Work, case: CaseRun, visit: Visit, demands: Sequence[str]) -> Gradient | None:
    context = work.context
    size = work.options.text_chars // 4
    example = case.rollout.example.id
    comments = case.loss.comments if case.loss is not None else facts(work, case.rollout)
    calls = [f"asked: {cut(question, size)}\nanswered: {cut(answer, size)}" for question, answer in visit.asked]
    settings = [
        f"{name} ({context.specs[name].kind}) =\n{value_text(context, context.specs[name], visit.node, 2 * size)}"
        for name in visit.reads
    ]
    fields = {
        "node": visit.node,
        "call": str(visit.call_index + 1),
        "settings": "\n".join(settings),
        "given": "\n".join(f"{name} = {cut(repr(value), size)}" for name, value in visit.inputs.items()) or "(nothing)",
        "result": cut(visit.result, size),
        "calls": "\n".join(calls) or "(none)",
        "demands": "\n".join(f"- {cut(line, 600)}" for line in demands) or "(none: nothing came after it)",
        "comments": cut(comments, 2000),
        "inputs": inputs_text(case.rollout, size),
        "output": output_text(case.rollout, size),
        "trajectory": case.trajectory.render(work.options.text_chars // 2),
    }
    schema = object_schema(suggestion=TEXT, demand_on_previous=TEXT)
    reply = await work.answer(SOURCE, work.messages("gradient", fields), schema, example, visit.node, visit.call_index)
    if reply is None:
        return None
    suggestion, demand = words_of(reply, "suggestion"), words_of_key(reply, "demand_on_previous")
    if not suggestion and not demand:
        work.drop(SOURCE, f"example {example}, {visit.node}: the answer holds no suggestion")
        return None
    return Gradient(visit.node, visit.call_index, suggestion, demand, visit.ops, example, visit.reads)


def words_of_key(reply: object, key: str) -> str:
    """A text that must stand under its key; '' otherwise."""
    from agentopt.optimizers.symbolic._work import fields_of

    found = fields_of(reply, [key])
    value = found.get(key) if found is not None else None
    return value.strip() if isinstance(value, str) else ""


def _plain(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())
