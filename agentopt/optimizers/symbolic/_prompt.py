"""The prompt optimizer: one question per component of a prompt, with the gradients of every call that read it.

The unit is one component: task, principles, demonstrations, output format or extra. A plain prompt is its own task
component, the parameters of `ao.components` are the parts of one prompt, and each node of a pipeline has a prompt of
its own. Template variables stay: an answer that loses one is sent back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from agentopt.graph import (
    AddDemo,
    AddPrinciple,
    CountPrinciples,
    DropDemo,
    DropPrinciple,
    MergePrinciples,
    RewritePrinciple,
    SetNodePrompt,
    node_placeholders,
)
from agentopt.optimizers._demonstrations import Demonstrations
from agentopt.optimizers._feedback import cut
from agentopt.optimizers._legal import current_value, edit_for
from agentopt.optimizers._memory import render_memory
from agentopt.optimizers._protocol import Update
from agentopt.optimizers._repair import Draft
from agentopt.optimizers._reply import parse_text
from agentopt.optimizers.symbolic._gradients import Gradient, suggestion_lines, suggestions_for
from agentopt.optimizers.symbolic._options import Component
from agentopt.optimizers.symbolic._show import demos_text, principles_text
from agentopt.optimizers.symbolic._work import TEXT, TEXTS, CallsUsedUp, Work, fields_of, object_schema, strings

if TYPE_CHECKING:
    from agentopt.graph import Edit, ParameterSpec
    from agentopt.optimizers._demonstrations import Demo

SOURCE = "symbolic.prompt"
KINDS = frozenset({"prompt", "principles", "demos", "pipeline"})
_STOCK = 16
_NODE_PARTS: tuple[Component, ...] = ("task", "principles", "output_format", "extra")


@dataclass(frozen=True, slots=True)
class Part:
    """One component of one prompt."""

    owner: str
    """The prompt: its owner's name, its own name, or `PIPELINE.NODE`."""
    component: Component
    spec: ParameterSpec
    value: Any
    node: str = ""
    """The pipeline's node, '' for a parameter of its own."""

    def text(self, limit: int) -> str:
        """The present value as the model is shown it."""
        if self.node:
            return cut(
                self.value if isinstance(self.value, str) else "\n".join(f"- {rule}" for rule in self.value), limit
            )
        if self.spec.kind == "principles":
            return cut(principles_text(self.value), limit)
        if self.spec.kind == "demos":
            return demos_text(self.value, limit)
        return cut(str(self.value), limit)

    @property
    def variables(self) -> tuple[str, ...]:
        """Template variables that the text must keep."""
        if not self.node:
            return self.spec.variables
        return _placeholders(self.value) if isinstance(self.value, str) else ()


class PromptOptimizer:
    """Edits of prompts, one component at a time."""

    kind = "prompt"

    def applies(self, specs: Mapping[str, ParameterSpec]) -> bool:
        """Whether there is a prompt to edit."""
        return any(spec.kind in KINDS for spec in specs.values())

    async def update(self, work: Work, place: int) -> Update | None:
        """One update of every prompt that gradients speak of, within the learning rate; None when there is none.

        Raises:
            LMError: the model cannot be reached at present.
            BudgetExhausted: the budget does not cover the call.
        """
        edits: list[Edit] = []
        reasons: list[str] = []
        questions = self._questions(work, place)
        for part, whole, gradients in questions:
            if len(edits) >= work.bound.edits:
                break
            try:
                update = await self._ask(work, place, (part, whole, gradients), edits)
            except CallsUsedUp:
                if not edits:
                    raise
                break
            if update is not None:
                edits.extend(update.edits)
                reasons.append(update.rationale)
        kept, _ = work.bound.keep(work.context.parent, edits, work.context.specs)
        reason = cut(" ".join(filter(None, reasons)), 600)
        return Update(tuple(kept), reason, SOURCE) if kept else None

    def _questions(self, work: Work, place: int) -> list[tuple[Part, list[Part], list[Gradient]]]:
        """(component, all components of its prompt, gradients), beginning with another one each time."""
        found: list[tuple[Part, list[Part], list[Gradient]]] = []
        for owner, parts in prompts_of(work).items():
            if parts[0].node:
                gradients = list(work.gradients.get(owner, ()))
            else:
                gradients = suggestions_for(work.gradients, [part.spec.name for part in parts])
            if gradients:
                found.extend((part, parts, gradients) for part in parts if part.component in work.options.components)
        if not found:
            return []
        # The first update begins with the first component: the task is what a first step should look at.
        many = min(work.options.questions, len(found))
        step = many if many < len(found) else 1
        turn = (work.context.iteration + place) * step % len(found)
        return [*found[turn:], *found[:turn]][:many]

    async def _ask(
        self, work: Work, place: int, question: tuple[Part, list[Part], list[Gradient]], before: Sequence[Edit]
    ) -> Update | None:
        part, whole, gradients = question
        stock = self._stock(work, part)
        if part.spec.kind == "demos" and not stock and not part.value:
            return None
        limit = work.options.text_chars
        variables = ", ".join("{" + name + "}" for name in part.variables)
        fields = {
            "owner": part.owner,
            "component": part.component,
            "guide": work.templates[f"symbolic.prompt.{part.component}"].text,
            "parts": _headed(work, "parts", _parts(whole, limit // 2) if len(whole) > 1 else ""),
            "current": part.text(2 * limit) or "(empty)",
            "description": part.spec.description or "(none)",
            "variables": variables or "(none)",
            "suggestions": suggestion_lines(gradients, limit),
            "losses": losses_text(work, limit // 2),
            "stock": _headed(work, "stock", demos_text([demo.item() for demo in stock], limit) if stock else ""),
            "past": render_memory(work.context.history, 600),
            "rate": work.rate_text(work.bound.edits - len(before)),
        }
        form, schema, read = self._form(work, part, stock)
        fields["form"] = work.templates[f"symbolic.form.{form}"].text
        return await work.propose(
            work.messages("prompt", fields),
            source=SOURCE,
            schema=schema,
            read=read,
            place=place,
            parts=(part.owner, part.component),
            before=before,
        )

    @staticmethod
    def _stock(work: Work, part: Part) -> list[Demo]:
        """Demonstrations that can be added, those of failing cases first."""
        if part.spec.kind != "demos":
            return []
        present = {str(item["input"]) for item in part.value}
        failing = {case.rollout.example.id for case in work.cases}
        stock = [demo for demo in Demonstrations().stock(work.context, part.spec) if demo.input not in present]
        return sorted(stock, key=lambda demo: demo.source not in failing)[:_STOCK]

    @staticmethod
    def _form(work: Work, part: Part, stock: Sequence[Demo]) -> tuple[str, dict[str, Any], Any]:
        """Name of the answer's form, its schema, and what reads it."""
        if part.spec.kind == "demos":
            return "demos", _DEMOS, partial(_read_demos, part, stock)
        if part.spec.kind == "principles":
            return "principles", _PRINCIPLES, partial(_read_principles, part)
        if part.component == "principles":
            return "rules", _RULES, partial(_read_rules, part)
        return "text", _TEXT, partial(_read_text, part)


def prompts_of(work: Work) -> dict[str, list[Part]]:
    """Prompt → its components, in the order of declaration."""
    found: dict[str, list[Part]] = {}
    for spec in work.context.specs.values():
        value = current_value(work.context, spec)
        if spec.kind == "pipeline":
            for node, definition in value["nodes"].items():
                prompt = definition["prompt"]
                owner = f"{spec.name}.{node}"
                found[owner] = [Part(owner, component, spec, prompt[component], node) for component in _NODE_PARTS]
        elif spec.kind in KINDS:
            default = {"principles": "principles", "demos": "demos"}.get(spec.kind, "task")
            component = cast("Component", spec.component or default)
            owner = spec.owner or spec.name
            found.setdefault(owner, []).append(Part(owner, component, spec, value))
    return found


def _headed(work: Work, name: str, text: str) -> str:
    """A section with its heading, '' for an empty one."""
    return work.templates[f"symbolic.prompt.{name}"].fill({name: text}) if text else ""


def _parts(whole: Sequence[Part], limit: int) -> str:
    return "\n".join(f"<{part.component}>\n{part.text(limit) or '(empty)'}" for part in whole)


def _placeholders(text: str) -> tuple[str, ...]:
    """The placeholders of one text of a pipeline's node."""
    prompt: dict[str, Any] = {"task": text, "principles": [], "output_format": "", "extra": ""}
    return node_placeholders({"role": "", "prompt": prompt, "route": {"prompt": ""}})


def losses_text(work: Work, limit: int) -> str:
    """The comments on the failing cases, within `limit` characters."""
    lines = [case.loss.comments for case in work.cases if case.loss is not None]
    size = max(80, limit // max(1, len(lines)))
    return "\n".join(f"- {cut(line, size)}" for line in dict.fromkeys(lines)) or "(none)"


# --- reading answers -------------------------------------------------------------------------------------------------

_TEXT = object_schema(analysis=TEXT, text=TEXT)
_RULES = object_schema(analysis=TEXT, rules=TEXTS)
_DEMOS = object_schema(
    analysis=TEXT,
    add={"type": "array", "items": {"type": "integer"}},
    drop={"type": "array", "items": {"type": "integer"}},
)
_PRINCIPLES = object_schema(
    analysis=TEXT,
    add=TEXTS,
    rewrite={"type": "array", "items": object_schema(id=TEXT, text=TEXT)},
    merge={"type": "array", "items": object_schema(ids=TEXTS, text=TEXT)},
    drop=TEXTS,
    helpful=TEXTS,
    harmful=TEXTS,
)


def _read_text(part: Part, reply: Any) -> Draft:
    found = fields_of(reply, ["text", "analysis"])
    text: Any = found.get("text") if found is not None else _fenced(reply)
    if not isinstance(text, str):
        return Draft(unreadable='expected a JSON object with "analysis" and "text"')
    reason = str(found.get("analysis", "")) if found is not None else ""
    text = text.strip()
    if not text or text == str(part.value).strip():
        return Draft(rationale=reason)
    if not part.node:
        return Draft([edit_for(part.spec, text)], reason)
    lost = [name for name in part.variables if name not in _placeholders(text)]
    if lost:
        names = ", ".join("{" + name + "}" for name in lost)
        return Draft([], reason, [f"{part.owner}: the text loses {names}; every placeholder must stay"])
    return Draft([SetNodePrompt(part.spec.name, part.node, part.component, text)], reason)


def _fenced(reply: Any) -> str | None:
    """A text that stands in a code fence; other words without the form that was asked for are talk, not a prompt."""
    return parse_text(reply, "text") if isinstance(reply, str) and "```" in reply else None


def _read_rules(part: Part, reply: Any) -> Draft:
    found = fields_of(reply, ["rules", "analysis"])
    rules = strings(found.get("rules")) if found is not None else None
    if found is None or rules is None:
        return Draft(unreadable='expected a JSON object with "analysis" and a list "rules"')
    reason = str(found.get("analysis", ""))
    if not rules or rules == list(part.value):
        return Draft(rationale=reason)
    return Draft([SetNodePrompt(part.spec.name, part.node, part.component, tuple(rules))], reason)


def _read_demos(part: Part, stock: Sequence[Demo], reply: Any) -> Draft:
    found = fields_of(reply, ["add", "drop", "analysis"])
    if found is None:
        return Draft(unreadable='expected a JSON object with "analysis" and the lists "add" and "drop"')
    name = part.spec.name
    problems: list[str] = []
    add, drop = _numbers(found.get("add")), _numbers(found.get("drop"))
    edits: list[Edit] = [DropDemo(name, number) for number in sorted(set(drop), reverse=True)]
    for number in dict.fromkeys(add):
        if 0 <= number < len(stock):
            edits.append(AddDemo(name, stock[number].item()))
        else:
            problems.append(f"{name}: there is no example [{number}] to add; the last one is [{len(stock) - 1}]")
    return Draft(edits, str(found.get("analysis", "")), problems)


def _read_principles(part: Part, reply: Any) -> Draft:
    keys = ("add", "rewrite", "merge", "drop")
    found = fields_of(reply, [*keys, "analysis"])
    if found is None:
        return Draft(unreadable='expected a JSON object with "analysis", "add", "rewrite", "merge" and "drop"')
    name = part.spec.name
    edits: list[Edit] = [DropPrinciple(name, number) for number in strings(found.get("drop")) or ()]
    for item in _objects(found.get("merge")):
        edits.append(MergePrinciples(name, tuple(strings(item.get("ids")) or ()), str(item.get("text", ""))))
    for item in _objects(found.get("rewrite")):
        edits.append(RewritePrinciple(name, str(item.get("id", "")), str(item.get("text", ""))))
    edits.extend(AddPrinciple(name, text) for text in strings(found.get("add")) or ())
    left = {str(item["id"]) for item in part.value} - {edit.id for edit in edits if isinstance(edit, DropPrinciple)}
    helpful, harmful = (
        tuple(number for number in strings(found.get(key)) or () if number in left) for key in ("helpful", "harmful")
    )
    if edits and not any(isinstance(edit, MergePrinciples) for edit in edits) and (helpful or harmful):
        # Counting alone would be a candidate that behaves as its parent does.
        edits.append(CountPrinciples(name, helpful, harmful))
    return Draft(edits, str(found.get("analysis", "")))


def _numbers(value: Any) -> list[int]:
    items = cast("list[Any]", value) if isinstance(value, list) else []
    return [item for item in items if isinstance(item, int) and not isinstance(item, bool)]


def _objects(value: Any) -> list[Mapping[str, Any]]:
    items = cast("list[Any]", value) if isinstance(value, list) else []
    return [cast("Mapping[str, Any]", item) for item in items if isinstance(item, Mapping)]
