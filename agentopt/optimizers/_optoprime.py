"""OptoPrime: a language model reads the recorded problem and suggests new parameter values (arXiv 2406.16218).

The unit is one proposal: a conversation of at most one question, one repair of an unreadable answer, and three repairs
of illegal values. What is still illegal then is dropped and recorded; the legal rest of the proposal is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentopt.errors import UserError
from agentopt.evaluation import seed_number
from agentopt.models import LMOptions
from agentopt.optimizers._feedback import cut
from agentopt.optimizers._legal import Proposals, current_value, edit_for
from agentopt.optimizers._memory import render_memory
from agentopt.optimizers._problem import cases_of, render_problem
from agentopt.optimizers._protocol import ProposeContext, Update
from agentopt.optimizers._repair import Draft, Turns, propose_legal
from agentopt.optimizers._reply import parse_reply
from agentopt.optimizers._templates import load_templates

if TYPE_CHECKING:
    from agentopt.graph import Edit
    from agentopt.models import LM, Message

EDITABLE = frozenset({"prompt", "tool_text", "code", "number", "choice", "value"})
_OBJECTIVE = "Change the variables so that the program's outputs get better feedback."


@dataclass(frozen=True, slots=True)
class OptoPrimeOptions:
    """Settings of `OptoPrime`. Token numbers are estimates (a quarter of the bytes)."""

    problem_tokens: int = 3000
    memory_tokens: int = 800
    reply_tokens: int = 2048
    """Upper bound of generated tokens."""
    temperature: float = 0.7
    """Of the second and later proposals of one call; the first is asked at temperature 0."""
    repairs: int = 3
    """Times that illegal values are sent back."""
    memory: bool = True

    def __post_init__(self) -> None:
        for name in ("problem_tokens", "reply_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"OptoPrimeOptions: {name} must be at least 1, found {getattr(self, name)!r}.")


class OptoPrime:
    """Proposes new values for every text, code, number and choice parameter from the trace and its feedback."""

    name = "optoprime"

    def __init__(self, options: OptoPrimeOptions | None = None, *, template: str | Path | None = None) -> None:
        """`template` is a file that overrides fragments of the shipped meta-prompts.

        Raises:
            UserError: the template file cannot be used.
        """
        self.options = options or OptoPrimeOptions()
        self.templates = load_templates(None if template is None else Path(template))

    async def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates; [] without a model, without rollouts or without an editable parameter.

        Raises:
            LMError: the model could not be reached and nothing was proposed.
        """
        names = [name for name, spec in context.specs.items() if spec.kind in EDITABLE]
        if context.lm is None or not names or not context.rollouts:
            return []
        proposals = Proposals(context)
        for place in range(context.count):
            if not proposals.done:
                proposals.take(await self._one(context, context.lm, names, place))
        return proposals.updates

    def messages(self, context: ProposeContext) -> list[Message]:
        """The conversation's first two turns: what this optimizer knows, as text. A pure function of the context."""
        specs = {name: spec for name, spec in context.specs.items() if spec.kind in EDITABLE}
        values = {name: current_value(context, spec) for name, spec in specs.items()}
        objective = context.objective or _OBJECTIVE
        problem = render_problem(
            cases_of(context.rollouts, context.graphs, specs),
            values,
            specs,
            template=self.templates["optoprime.problem"],
            instruction=objective,
            budget=self.options.problem_tokens,
        )
        memory = render_memory(context.history, self.options.memory_tokens) if self.options.memory else ""
        names = ", ".join(specs)
        output_format = self.templates["optoprime.output_format"].fill({"names": names})
        fields = {
            "problem": problem,
            "memory": memory,
            "output_format": output_format,
            "summary": cut(context.program_summary, 1200),
            "objective": objective,
            "names": names,
        }
        system = self.templates["optoprime.system"].fill({"objective": objective})
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": tidy(self.templates["optoprime.task"].fill(fields))},
        ]

    async def _one(self, context: ProposeContext, lm: LM, names: list[str], place: int) -> Update | None:
        options = LMOptions(
            temperature=0.0 if place == 0 else self.options.temperature,
            max_tokens=self.options.reply_tokens,
            seed=seed_number("optoprime", context.seed, context.iteration, context.parent.hash, place),
            sample=place,
        )
        return await propose_legal(
            context,
            lm,
            self.messages(context),
            options=options,
            read=lambda reply: read_values(context, reply, names),
            source=self.name,
            schema=reply_schema(names),
            repairs=self.options.repairs,
            turns=self.turns(names),
        )

    def turns(self, names: Sequence[str]) -> Turns:
        """What is sent back after an answer that cannot be used."""
        return Turns(self.templates["optoprime.unreadable"], self.templates["optoprime.illegal"], ", ".join(names))


def read_values(context: ProposeContext, reply: Any, names: Sequence[str]) -> Draft:
    """New parameter values as edits; empty values and those equal to the present ones are left out."""
    parsed = parse_reply(reply, names)
    if parsed.problem is not None:
        return Draft(unreadable=parsed.problem)
    edits: list[Edit] = []
    for name, value in parsed.suggestion.items():
        spec = context.specs[name]
        if value is None or (isinstance(value, str) and not value.strip() and spec.kind != "value"):
            continue
        edit = edit_for(spec, value)
        if edit != edit_for(spec, current_value(context, spec)):
            edits.append(edit)
    return Draft(edits, parsed.reasoning)


def reply_schema(names: list[str]) -> dict[str, Any]:
    """JSON schema of the answer: reasoning, and name-value pairs; also valid where providers want all keys required."""
    pair = {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": names}, "value": {"type": "string"}},
        "required": ["name", "value"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"reasoning": {"type": "string"}, "suggestion": {"type": "array", "items": pair}},
        "required": ["reasoning", "suggestion"],
        "additionalProperties": False,
    }


def tidy(text: str) -> str:
    """Blank lines that empty sections left behind are folded."""
    lines: list[str] = []
    for line in text.split("\n"):
        if line.strip() or (lines and lines[-1].strip()):
            lines.append(line)
    return "\n".join(lines).strip()
