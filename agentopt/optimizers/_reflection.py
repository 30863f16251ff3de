"""Reflective mutation, the proposer of GEPA (arXiv 2507.19457): records of what one component did, one new text.

The unit is one component, a text or code parameter. A model reads the component's text and, for every rollout of the
minibatch, what went into the calls that use it, what they generated and the feedback on the result; it answers with
the whole new text. Against the two known complaints about the method, the model is told what program the component
belongs to (gepa#380) and is asked for rules instead of facts of single cases (gepa#261).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agentopt.errors import UserError
from agentopt.evaluation import seed_number
from agentopt.models import LMOptions
from agentopt.optimizers._demonstrations import last_user_message, reply_text
from agentopt.optimizers._feedback import cut, shown
from agentopt.optimizers._legal import TEXT_KINDS, Proposals, current_value, edit_for, headline, merged, with_variables
from agentopt.optimizers._optoprime import tidy
from agentopt.optimizers._problem import Case, cases_of, constraint_line, estimate_tokens
from agentopt.optimizers._protocol import ProposeContext, Update
from agentopt.optimizers._repair import Draft, Turns, propose_legal
from agentopt.optimizers._reply import parse_reply
from agentopt.optimizers._space import calls_in
from agentopt.optimizers._templates import load_templates

if TYPE_CHECKING:
    from agentopt.graph import ParameterSpec
    from agentopt.models import LM, Message

COMPONENT_KINDS = TEXT_KINDS | {"code"}
_FENCE = re.compile(r"^[ \t]*```[^\n`]*$", re.MULTILINE)
_CALLS_SHOWN = 3
"""Calls of one rollout that are shown; an agent's loop may make many."""


@dataclass(frozen=True, slots=True)
class ReflectionOptions:
    """Settings of `Reflection`."""

    components: Literal["round-robin", "all"] = "round-robin"
    """One component per proposal, in turn over iterations; or all of them in one update, one call each."""
    record_tokens: int = 4000
    """Estimated tokens of all records; values are cut, then the least informative records left out."""
    reply_tokens: int = 2048
    temperature: float = 1.0
    repairs: int = 3

    def __post_init__(self) -> None:
        if self.components not in ("round-robin", "all"):
            raise UserError(f"ReflectionOptions: components must be 'round-robin' or 'all', found {self.components!r}.")
        for name in ("record_tokens", "reply_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"ReflectionOptions: {name} must be at least 1, found {getattr(self, name)!r}.")


@dataclass(frozen=True, slots=True)
class Record:
    """What one component did in one rollout."""

    inputs: str
    outputs: str
    feedback: str


class Reflection:
    """Proposes whole new texts of single components."""

    name = "reflection"

    def __init__(self, options: ReflectionOptions | None = None, *, template: str | Path | None = None) -> None:
        """`template` is a file that overrides fragments of the shipped meta-prompts.

        Raises:
            UserError: the template file cannot be used.
        """
        self.options = options or ReflectionOptions()
        self.templates = load_templates(None if template is None else Path(template))

    async def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates; [] without a model, rollouts or a component.

        Raises:
            LMError: the model could not be reached.
        """
        specs = [spec for spec in context.specs.values() if spec.kind in COMPONENT_KINDS]
        if context.lm is None or not specs or not context.rollouts:
            return []
        proposals = Proposals(context)
        for place in range(context.count):
            if proposals.done:
                break
            turn = (context.iteration + place) % len(specs)
            chosen = specs if self.options.components == "all" else [specs[turn]]
            updates = [await self._one(context, context.lm, spec, place) for spec in chosen]
            update = merged([update for update in updates if update is not None], self.name)
            proposals.take(update)
        return proposals.updates

    async def _one(self, context: ProposeContext, lm: LM, spec: ParameterSpec, place: int) -> Update | None:
        options = LMOptions(
            temperature=self.options.temperature,
            max_tokens=self.options.reply_tokens,
            seed=seed_number("reflection", context.seed, context.iteration, context.parent.hash, spec.name, place),
            sample=place,
        )
        return await propose_legal(
            context,
            lm,
            self.messages(context, spec),
            options=options,
            read=lambda reply: read_text(context, spec, reply),
            source=self.name,
            repairs=self.options.repairs,
            turns=Turns(self.templates["reflection.unreadable"], self.templates["reflection.illegal"], spec.name),
        )

    def messages(self, context: ProposeContext, spec: ParameterSpec) -> list[Message]:
        """The one question about a component. A pure function of the context."""
        about = cut(context.program_summary, 1500)
        summary = f"You improve the program {context.program_name}. {about}".strip()
        rule = constraint_line(spec)
        fields = {
            "summary": summary,
            "name": spec.name,
            "current": str(current_value(context, spec)),
            "records": self.rendered(records_of(context, spec)),
            "constraint": "" if rule.endswith(": any text") else f"Rules for the text: {rule}",
            "objective": context.objective,
        }
        return [{"role": "user", "content": tidy(self.templates["reflection.task"].fill(fields))}]

    def rendered(self, records: Sequence[Record]) -> str:
        """The records as text, within the token budget."""
        kept = list(records)
        while kept:
            for limit in (4000, 1500, 600, 300):
                text = "\n\n".join(self._record(number, record, limit) for number, record in enumerate(kept, start=1))
                if estimate_tokens(text) <= self.options.record_tokens:
                    return text
            if len(kept) == 1:
                return cut(self._record(1, kept[0], 300), 3 * self.options.record_tokens)
            kept = kept[: max(1, len(kept) * 3 // 4)]
        return "(none)"

    def _record(self, number: int, record: Record, limit: int) -> str:
        fields = {
            "number": str(number),
            "inputs": cut(record.inputs, limit),
            "outputs": cut(record.outputs, limit),
            "feedback": cut(record.feedback, max(200, limit)),
        }
        return self.templates["reflection.record"].fill(fields)


def records_of(context: ProposeContext, spec: ParameterSpec) -> list[Record]:
    """One record per rollout, failing ones first.

    Inputs and outputs are those of the language model calls that read the component; of a component that none reads
    (a tool's code), those of the operations that do; of an untraced rollout, the example's inputs and the output.
    """
    return [_record_of(case, spec) for case in cases_of(context.rollouts, context.graphs, [spec.name])]


def _record_of(case: Case, spec: ParameterSpec) -> Record:
    example, row = case.rollout.example, case.rollout.row
    inputs: list[str] = []
    outputs: list[str] = []
    for op in calls_in(case.graph, spec.name)[:_CALLS_SHOWN]:
        message = last_user_message(op)
        inputs.append(message if message is not None else _fields(op.inputs))
        outputs.append(reply_text(op) or "(nothing)")
    if not inputs and case.graph is not None:
        ops = case.graph.trace.ops
        for op in case.graph.ops:
            if len(inputs) < _CALLS_SHOWN and any(ops[parent].op == spec.name for parent, _ in op.parents):
                inputs.append(_fields(op.inputs))
                outputs.append("(it failed)" if op.error is not None else shown(op.output))
    if not inputs:
        inputs.append(_fields(example.inputs))
        outputs.append("(the run failed)" if row.error else shown(row.output))
    return Record(_joined(inputs), _joined(outputs), case.feedback)


def _fields(values: Any) -> str:
    return "\n".join(f"{headline(str(name))}: {value}" for name, value in dict(values).items()) or "(none)"


def _joined(texts: Sequence[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"(call {number}) {text}" for number, text in enumerate(texts, start=1))


def read_text(context: ProposeContext, spec: ParameterSpec, reply: Any) -> Draft:
    """The new text of a component from a reply; placeholders that it lost are put back at its end."""
    found = fenced(reply)
    if found is None:
        found = parse_reply(reply, [spec.name]).suggestion.get(spec.name)
    if not isinstance(found, str):
        return Draft(unreadable="there is no text between two lines of three backticks")
    text = found.strip()
    if not text:
        return Draft(unreadable="the text between the backticks is empty")
    if spec.variables:
        text = with_variables(spec, text)
    edit = edit_for(spec, text)
    return Draft([] if edit == edit_for(spec, current_value(context, spec)) else [edit])


def fenced(reply: Any) -> str | None:
    """What stands between the first and the last fence line; a block that was never closed ends with the reply."""
    if not isinstance(reply, str):
        return None
    marks = list(_FENCE.finditer(reply))
    if not marks:
        return None
    end = marks[-1].start() if len(marks) > 1 else len(reply)
    return reply[marks[0].end() : end].strip("\n")
