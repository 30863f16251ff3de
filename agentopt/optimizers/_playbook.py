"""Principles kept like a playbook (ACE, arXiv 2510.04618): small changes of single rules, never a new list.

The unit is one list of principles. A reflector reads failing and good runs, tags rules as helpful or harmful and draws
lessons; a curator turns the lessons into edits of single rules, which are merged here without doubles. The program is
ACE's generator. Rules that were harmful more often than helpful are proposed for dropping without any model.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from agentopt.errors import UserError
from agentopt.evaluation import seed_number
from agentopt.graph import CountPrinciples, DropPrinciple
from agentopt.models import LMOptions
from agentopt.optimizers._ask import ask
from agentopt.optimizers._deltas import Findings, merge_operations, operations_in, read_reflection
from agentopt.optimizers._feedback import cut
from agentopt.optimizers._legal import Proposals, current_value
from agentopt.optimizers._memory import render_memory
from agentopt.optimizers._problem import cases_of, render_problem
from agentopt.optimizers._protocol import DroppedEdit, ProposeContext, Update
from agentopt.optimizers._repair import Draft, propose_legal, repair_turns
from agentopt.optimizers._reply import parse_reply
from agentopt.optimizers._templates import load_templates

if TYPE_CHECKING:
    from agentopt.graph import Edit, ParameterSpec
    from agentopt.models import LM, Message

_REFLECTION = {
    "type": "object",
    "properties": {
        "reasoning": {"type": "string"},
        **{key: {"type": "array", "items": {"type": "string"}} for key in ("lessons", "helpful", "harmful")},
    },
    "required": ["reasoning", "lessons", "helpful", "harmful"],
    "additionalProperties": False,
}
_OPERATION = {
    "type": "object",
    "properties": {
        "op": {"type": "string", "enum": ["add", "rewrite", "merge", "drop"]},
        "ids": {"type": "array", "items": {"type": "string"}},
        "text": {"type": "string"},
    },
    "required": ["op", "ids", "text"],
    "additionalProperties": False,
}
_CURATION = {
    "type": "object",
    "properties": {"reasoning": {"type": "string"}, "operations": {"type": "array", "items": _OPERATION}},
    "required": ["reasoning", "operations"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class PlaybookOptions:
    """Settings of `Playbook`."""

    max_edits: int = 6
    """Rules that one update may touch, new ones included."""
    harm_margin: int = 2
    """A rule is proposed for dropping when it harmed at least this many times more often than it helped."""
    max_calls: int = 4
    """Curator's answers of one `propose`, at most; the reflector is asked once."""
    run_tokens: int = 2500
    """Estimated tokens of the runs shown."""
    reply_tokens: int = 1200
    repairs: int = 3

    def __post_init__(self) -> None:
        for name in ("max_edits", "harm_margin", "max_calls", "run_tokens", "reply_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"PlaybookOptions: {name} must be at least 1, found {getattr(self, name)!r}.")


class Playbook:
    """Proposes edits of single principles.

    Args:
        options: settings.
        template: a file that overrides fragments of the shipped meta-prompts.

    Raises:
        UserError: the template file cannot be used.
    """

    name = "playbook"

    def __init__(self, options: PlaybookOptions | None = None, *, template: str | Path | None = None) -> None:
        self.options = options or PlaybookOptions()
        self.templates = load_templates(None if template is None else Path(template))

    async def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates: drops of harmful rules first, then what the model writes.

        Raises:
            LMError: the model could not be reached.
        """
        specs = [spec for spec in context.specs.values() if spec.kind == "principles"]
        proposals = Proposals(context)
        for spec in specs:
            for update in self.harmful(context, spec):
                proposals.offer(update)
        if context.lm is None or not context.rollouts or not specs:
            return proposals.updates
        seen: dict[str, Findings] = {}
        for place in range(min(context.count, self.options.max_calls)):
            if proposals.full:
                break
            spec = specs[(context.iteration + place) % len(specs)]
            if spec.name not in seen:
                seen[spec.name] = await self._reflect(context, context.lm, spec)
            update = await self._curate(context, context.lm, spec, seen[spec.name], place)
            if update is not None:
                proposals.offer(update)
        return proposals.updates

    def harmful(self, context: ProposeContext, spec: ParameterSpec) -> list[Update]:
        """One update for each rule that did more harm than good, the worst first. No model is asked."""
        counts = _counted(context, spec)
        worst = sorted(counts, key=lambda name: counts[name][0] - counts[name][1])
        return [
            Update(
                (DropPrinciple(spec.name, name),),
                f"{name} was harmful {counts[name][1]} times and helpful {counts[name][0]} times",
                self.name,
            )
            for name in worst
            if counts[name][1] - counts[name][0] >= self.options.harm_margin
        ]

    async def _reflect(self, context: ProposeContext, lm: LM, spec: ParameterSpec) -> Findings:
        options = LMOptions(
            temperature=0.0,
            max_tokens=self.options.reply_tokens,
            seed=seed_number("playbook.reflector", context.seed, context.iteration, context.parent.hash, spec.name),
        )
        answer = await ask(lm, self.reflector_messages(context, spec), options=options, schema=_REFLECTION)
        found = read_reflection(answer.reply, [item["id"] for item in items_of(context, spec)])
        if not found:
            problem = f"{spec.name}: the reflector's answer holds no lesson and no tag"
            context.dropped.append(DroppedEdit(self.name, problem))
        return found

    def reflector_messages(self, context: ProposeContext, spec: ParameterSpec) -> list[Message]:
        """What the reflector is asked. A pure function of the context."""
        cases = cases_of(context.rollouts, context.graphs, [spec.name])
        runs = render_problem(
            cases, {}, {}, template=self.templates["playbook.runs"], instruction="", budget=self.options.run_tokens
        )
        fields = {
            "name": spec.name,
            "summary": _summary(context),
            "task": _task(context, spec),
            "principles": _listed(items_of(context, spec)),
            "runs": runs,
        }
        return self._messages("reflector", context, fields)

    def curator_messages(self, context: ProposeContext, spec: ParameterSpec, found: Findings) -> list[Message]:
        """What the curator is asked. A pure function of its arguments."""
        counts = _counted(context, spec, found)
        tried = [past for past in context.history if any(edit.name == spec.name for edit in past.update.edits)]
        fields = {
            "name": spec.name,
            "summary": _summary(context),
            "principles": _listed(items_of(context, spec), counts),
            "max_items": str(spec.max_items or "any number of"),
            "max_edits": str(self.options.max_edits),
            "lessons": "\n".join(f"- {lesson}" for lesson in found.lessons) or "(none)",
            "memory": render_memory(tried, 600),
        }
        return self._messages("curator", context, fields)

    def _messages(self, role: str, context: ProposeContext, fields: Mapping[str, str]) -> list[Message]:
        system = self.templates[f"playbook.{role}_system"].fill({"objective": context.objective}).strip()
        task = self.templates[f"playbook.{role}_task"].fill(fields)
        return [{"role": "system", "content": system}, {"role": "user", "content": re.sub(r"\n{3,}", "\n\n", task)}]

    async def _curate(
        self, context: ProposeContext, lm: LM, spec: ParameterSpec, found: Findings, place: int
    ) -> Update | None:
        if not found:
            return None
        options = LMOptions(
            temperature=0.0 if place == 0 else 0.8,
            max_tokens=self.options.reply_tokens,
            seed=seed_number("playbook", context.seed, context.iteration, context.parent.hash, spec.name, place),
            sample=place,
        )
        heard: set[str] = set()
        update = await propose_legal(
            context,
            lm,
            self.curator_messages(context, spec, found),
            options=options,
            read=functools.partial(self._read, context, spec, heard),
            source=self.name,
            schema=_CURATION,
            repairs=self.options.repairs,
            turns=repair_turns(self.templates),
        )
        edits: list[Edit] = list(update.edits) if update is not None else []
        if update is None and "no change" not in heard:
            edits = self._lessons_as_they_are(context, spec, found)
        if not edits:
            return None
        if found.helpful or found.harmful:  # before the edits, which may take a counted rule out
            edits.insert(0, CountPrinciples(spec.name, found.helpful, found.harmful))
        why = update.rationale if update is not None else found.reasoning
        return Update(tuple(edits), cut(why or "lessons of the latest runs", 600), self.name)

    def _lessons_as_they_are(self, context: ProposeContext, spec: ParameterSpec, found: Findings) -> list[Edit]:
        """New rules straight from the reflector, for a model that reflects better than it keeps a form."""
        operations = [{"op": "add", "text": lesson} for lesson in found.lessons]
        room = len(operations) if spec.max_items is None else spec.max_items - len(items_of(context, spec))
        return merge_operations(items_of(context, spec), operations, spec.name, self.options.max_edits)[0][
            : max(0, room)
        ]

    def _read(self, context: ProposeContext, spec: ParameterSpec, heard: set[str], reply: Any) -> Draft:
        parsed = parse_reply(reply, ["operations"])
        operations = operations_in(parsed.suggestion.get("operations"))
        if operations is None:
            return Draft(unreadable=parsed.problem or "it holds no list of operations", rationale=parsed.reasoning)
        heard.add("operations" if operations else "no change")
        items = items_of(context, spec)
        edits, left_out, problems = merge_operations(items, operations, spec.name, self.options.max_edits)
        context.dropped.extend(DroppedEdit(self.name, line) for line in left_out)
        return Draft(edits, parsed.reasoning, problems)


# --- facts -----------------------------------------------------------------------------------------------------------


def items_of(context: ProposeContext, spec: ParameterSpec) -> list[dict[str, Any]]:
    """The parent's principles."""
    value = current_value(context, spec)
    return cast("list[dict[str, Any]]", value) if isinstance(value, list) else []


def _counted(context: ProposeContext, spec: ParameterSpec, found: Findings | None = None) -> dict[str, tuple[int, int]]:
    """Id → (helpful, harmful): the counters, and the tags of proposals from this very list that were not kept."""
    helpful: Counter[str] = Counter()
    harmful: Counter[str] = Counter()
    tags = {  # proposals of one round share their tags: counted once
        (edit.helpful, edit.harmful)
        for past in context.history
        for edit in past.update.edits
        if past.parent_hash == context.parent.hash and isinstance(edit, CountPrinciples) and edit.name == spec.name
    }
    for good, bad in [*sorted(tags), *([(found.helpful, found.harmful)] if found else [])]:
        helpful.update(good)
        harmful.update(bad)
    return {
        item["id"]: (item["helpful"] + helpful[item["id"]], item["harmful"] + harmful[item["id"]])
        for item in items_of(context, spec)
    }


def _listed(items: Sequence[Mapping[str, Any]], counts: Mapping[str, tuple[int, int]] | None = None) -> str:
    lines: list[str] = []
    for item in items:
        counted = f" (+{counts[item['id']][0]} -{counts[item['id']][1]})" if counts else ""
        lines.append(f"[{item['id']}]{counted} {item['text']}")
    return "\n".join(lines) or "(none yet)"


def _summary(context: ProposeContext) -> str:
    return cut(context.program_summary or context.program_name, 1000)


def _task(context: ProposeContext, spec: ParameterSpec) -> str:
    """What the principles are about: their description, and the task of the prompt they are a component of."""
    parts = [spec.description]
    beside = context.parent.get(f"{spec.owner}.task", None) if spec.owner else None
    if isinstance(beside, str):
        parts.append(f"The task they stand beside:\n{cut(beside, 800)}")
    return "\n".join(part for part in parts if part)
