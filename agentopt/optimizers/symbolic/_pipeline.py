"""The pipeline optimizer: look at the whole pipeline and its failing runs first, then write the edits.

The unit is one pipeline parameter. Each edit leaves a pipeline whose end is reachable, without orphans and with bounded
cycles, or it is sent back with the reason; routes that nobody changed stay as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from agentopt.graph import (
    AddNode,
    DeleteNode,
    MoveNode,
    RewireNodes,
    SetEdges,
    SetNodeDescription,
    SetRoute,
)
from agentopt.optimizers._feedback import cut
from agentopt.optimizers._legal import current_value
from agentopt.optimizers._memory import render_memory
from agentopt.optimizers._repair import Draft
from agentopt.optimizers.symbolic._gradients import Gradient, suggestion_lines, suggestions_for
from agentopt.optimizers.symbolic._prompt import losses_text
from agentopt.optimizers.symbolic._show import pipeline_text
from agentopt.optimizers.symbolic._work import TEXT, TEXTS, Work, fields_of, object_schema, strings, words_of

if TYPE_CHECKING:
    from agentopt.graph import Edit, JSONValue, ParameterSpec
    from agentopt.optimizers._protocol import Update

SOURCE = "symbolic.pipeline"
OPERATIONS = ("add_node", "delete_node", "move_node", "set_edges", "set_route", "set_description")
_CASES = 3


class PipelineOptimizer:
    """Edits of the structure of a pipeline."""

    kind = "pipeline"

    def applies(self, specs: Mapping[str, ParameterSpec]) -> bool:
        """Whether there is a pipeline to edit."""
        return any(spec.kind == "pipeline" for spec in specs.values())

    async def update(self, work: Work, place: int) -> Update | None:
        """Edits of one pipeline, within the learning rate; None when none are wanted or none are legal.

        Raises:
            CallsUsedUp: the limit on calls is reached.
            LMError: the model cannot be reached at present.
            BudgetExhausted: the budget does not cover the call.
        """
        specs = [spec for spec in work.context.specs.values() if spec.kind == "pipeline"]
        concerned = [(spec, suggestions_for(work.gradients, [spec.name])) for spec in specs]
        concerned = [(spec, gradients) for spec, gradients in concerned if gradients]
        if not concerned:
            return None
        spec, gradients = concerned[(work.context.iteration + place) % len(concerned)]
        limit = work.options.text_chars
        value = current_value(work.context, spec)
        fields = {
            "name": spec.name,
            "pipeline": cut(pipeline_text(value), 2 * limit),
            "runs": _runs(work, limit),
            "suggestions": suggestion_lines(gradients, limit),
            "demands": demand_lines(gradients, limit // 2),
            "losses": losses_text(work, limit // 2),
            "past": render_memory(work.context.history, 600),
            "rate": work.rate_text(work.bound.edits),
            "form": work.templates["symbolic.form.pipeline"].text,
        }
        analysis = await self._analyse(work, spec, fields, place)
        if analysis is None:
            return None
        return await work.propose(
            work.messages("pipeline.edit", {**fields, "analysis": analysis}),
            source=SOURCE,
            schema=_EDITS,
            read=partial(_read, spec.name),
            place=place,
            parts=(spec.name, "edit"),
        )

    async def _analyse(self, work: Work, spec: ParameterSpec, fields: Mapping[str, str], place: int) -> str | None:
        """What is wrong with the structure; None when nothing is, or the answer cannot be read."""
        messages = work.messages("pipeline", fields)
        reply = await work.answer(SOURCE, messages, _ANALYSIS, spec.name, work.context.iteration, place=place)
        if reply is None:
            return None
        found = fields_of(reply, ["change"])
        if found is not None and found.get("change") is False:
            return None
        analysis = words_of(reply, "analysis")
        if not analysis:
            work.drop(SOURCE, f"{spec.name}: the answer holds no analysis")
            return None
        return analysis


def demand_lines(gradients: list[Gradient], limit: int) -> str:
    """What nodes demand of those before them."""
    lines = [f"- [{gradient.node}] {cut(gradient.demand_on_previous, 400)}" for gradient in gradients]
    kept = [line for line, gradient in zip(lines, gradients, strict=True) if gradient.demand_on_previous]
    return cut("\n".join(dict.fromkeys(kept)), limit) or "(none)"


def _runs(work: Work, limit: int) -> str:
    shown_cases = work.cases[:_CASES]
    size = max(200, limit // max(1, len(shown_cases)))
    return "\n\n".join(
        f"run {number}:\n{case.trajectory.render(size)}" for number, case in enumerate(shown_cases, start=1)
    )


# --- reading answers -------------------------------------------------------------------------------------------------

_ANALYSIS = object_schema(analysis=TEXT, change={"type": "boolean"})
_EDITS = object_schema(
    operations={
        "type": "array",
        "items": object_schema(
            operation={"type": "string", "enum": list(OPERATIONS)},
            node=TEXT,
            after=TEXT,
            to=TEXTS,
            description=TEXT,
            role=TEXT,
            task=TEXT,
            output_format=TEXT,
            route=TEXT,
            route_prompt=TEXT,
            route_field=TEXT,
            route_cases={"type": "array", "items": object_schema(value=TEXT, to=TEXT)},
            max_visits={"type": "integer"},
        ),
    }
)
Operation = Mapping[str, Any]


def _read(name: str, reply: Any) -> Draft:
    found = fields_of(reply, ["operations", "operation"])
    items: Any = found.get("operations", [found]) if found is not None else None
    if not isinstance(items, list):
        return Draft(unreadable='expected a JSON object with the list "operations"')
    edits: list[Edit] = []
    problems: list[str] = []
    for place, item in enumerate(cast("list[Any]", items), start=1):
        operation: Operation = cast("Operation", item) if isinstance(item, Mapping) else {}
        edit = _edit(name, operation)
        if edit is None:
            problems.append(
                f"{name}: operation {place} ({operation.get('operation')!r:.60}) is none of {', '.join(OPERATIONS)}"
            )
        else:
            edits.append(edit)
    return Draft(_rewired(name, edits), _text(found or {}, "analysis"), problems)


def _edit(name: str, given: Operation) -> Edit | None:
    node = _text(given, "node")
    match given.get("operation"):
        case "add_node":
            to = tuple(strings(given.get("to")) or ())
            return AddNode(name, node, _definition(given), _text(given, "after"), to)
        case "delete_node":
            return DeleteNode(name, node)
        case "move_node":
            return MoveNode(name, node, _text(given, "after"))
        case "set_edges":
            return SetEdges(name, node, tuple(strings(given.get("to")) or ()), _visits(given), _route(given))
        case "set_route":
            return SetRoute(name, node, _route(given) or {})
        case "set_description":
            return SetNodeDescription(name, node, _text(given, "description"))
        case _:
            return None


def _definition(given: Operation) -> dict[str, JSONValue]:
    definition: dict[str, JSONValue] = {
        "description": _text(given, "description"),
        "role": _text(given, "role"),
        "prompt": {"task": _text(given, "task"), "output_format": _text(given, "output_format")},
    }
    visits, route = _visits(given), _route(given)
    if visits is not None:
        definition["max_visits"] = visits
    if route is not None:
        definition["route"] = route
    return definition


def _visits(given: Operation) -> int | None:
    visits = given.get("max_visits")
    return visits if isinstance(visits, int) and not isinstance(visits, bool) and visits > 0 else None


def _route(given: Operation) -> dict[str, JSONValue] | None:
    kind = _text(given, "route")
    if not kind:
        return None
    cases = given.get("route_cases")
    items = cast("list[Any]", cases) if isinstance(cases, list) else []
    named = {
        str(item.get("value", "")): str(item.get("to", ""))
        for item in (cast("Operation", item) for item in items if isinstance(item, Mapping))
    }
    route: dict[str, JSONValue] = {"kind": kind, "prompt": _text(given, "route_prompt")}
    if named or _text(given, "route_field"):
        route |= {"field": _text(given, "route_field"), "cases": cast("JSONValue", named)}
    return route


def _rewired(name: str, edits: list[Edit]) -> list[Edit]:
    """Several plain changes of edges become one: half-way they could be an illegal pipeline."""
    plain = [edit for edit in edits if isinstance(edit, SetEdges) and edit.max_visits is None and edit.route is None]
    if len(plain) < 2:
        return edits
    joined = RewireNodes(name, {edit.node: list(edit.to) for edit in plain})
    rest = [joined if edit is plain[-1] else edit for edit in edits]
    return [edit for edit in rest if edit is joined or edit not in plain]


def _text(given: Operation, key: str) -> str:
    value = given.get(key)
    return value.strip() if isinstance(value, str) else ""
