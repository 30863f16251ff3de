"""Code parameters rewritten by the optimizer's language model, and tried in the sandbox before they are proposed.

The unit is one function. The model sees its source, what it may use, its recorded calls and the feedback of their runs.
Every version it writes is compiled and run on recorded inputs first; a version that crashes, hangs or has another
signature goes back to the model with the error text, and after three such rounds it is dropped and recorded.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from agentopt.errors import UserError
from agentopt.evaluation import seed_number
from agentopt.graph import ALLOWED_MODULES, SetCode, apply_edits, code_unit
from agentopt.models import LMOptions
from agentopt.optimizers._calls import RecordedCall, calls_of, try_calls
from agentopt.optimizers._feedback import cut
from agentopt.optimizers._legal import Proposals, current_value, strip_fence
from agentopt.optimizers._memory import render_memory
from agentopt.optimizers._protocol import ProposeContext
from agentopt.optimizers._repair import Draft, Turns, propose_legal
from agentopt.optimizers._reply import parse_reply
from agentopt.optimizers._templates import load_templates

if TYPE_CHECKING:
    from agentopt.graph import CodeUnit, Edit, ParameterSpec
    from agentopt.models import LM, Message
    from agentopt.optimizers._protocol import Update

_FENCED = re.compile(r"```[\w-]*[ \t]*\n(.*?)```", re.DOTALL)
_BEGINS = re.compile(r"^(?:async def |def |import |from |class |@)", re.MULTILINE)
_SHOWN_GOOD = 2
"""Calls of good runs that are shown beside the failing ones."""
_SCHEMA = {
    "type": "object",
    "properties": {"reasoning": {"type": "string"}, "source": {"type": "string"}},
    "required": ["reasoning", "source"],
    "additionalProperties": False,
}


class CodeRepair:
    """Proposes new bodies for functions that are parameters.

    Args:
        template: a file that overrides fragments of the shipped meta-prompts.
        max_calls: recorded calls that are shown, and that a new version is tried on.
        repairs: times that a version which does not run is sent back.

    Raises:
        UserError: the template file cannot be used, or a number is out of range.
    """

    name = "code"

    def __init__(self, *, template: str | Path | None = None, max_calls: int = 8, repairs: int = 3) -> None:
        if max_calls < 1 or repairs < 0:
            raise UserError(f"CodeRepair: max_calls must be at least 1 and repairs 0, found {max_calls}, {repairs}.")
        self._max_calls = max_calls
        self._repairs = repairs
        self.templates = load_templates(None if template is None else Path(template))

    async def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates, each of one function; [] without a model or without a recorded run.

        Raises:
            LMError: the model could not be reached.
        """
        specs = [spec for spec in context.specs.values() if spec.kind == "code"]
        if context.lm is None or not specs or not context.rollouts:
            return []
        calls = {spec.name: calls_of(context.rollouts, spec.name) for spec in specs}
        called = [spec for spec in specs if calls[spec.name]] or specs
        called.sort(key=lambda spec: min((call.rank for call in calls[spec.name]), default=(True, 0.0)))
        proposals = Proposals(context)
        for place in range(context.count):
            if proposals.done:
                break
            spec = called[place % len(called)]
            again = place >= len(called)
            proposals.take(await self._one(context, context.lm, spec, calls[spec.name], place, again=again))
        return proposals.updates

    async def _one(
        self,
        context: ProposeContext,
        lm: LM,
        spec: ParameterSpec,
        calls: Sequence[RecordedCall],
        place: int,
        *,
        again: bool,
    ) -> Update | None:
        unit = code_unit(spec)
        options = LMOptions(
            temperature=0.8 if again else 0.0,
            max_tokens=2048,
            seed=seed_number("code", context.seed, context.iteration, context.parent.hash, spec.name, place),
            sample=place,
        )
        return await propose_legal(
            context,
            lm,
            self.messages(context, spec, calls),
            options=options,
            read=functools.partial(_read, context, spec),
            source=self.name,
            schema=_SCHEMA,
            repairs=self._repairs,
            turns=Turns(self.templates["repair.unreadable"], self.templates["code.illegal"], spec.name),
            trial=None if unit is None else _Trial(context, unit, calls, self._max_calls),
        )

    def messages(self, context: ProposeContext, spec: ParameterSpec, calls: Sequence[RecordedCall]) -> list[Message]:
        """What the model is asked about one function. A pure function of its arguments."""
        unit = code_unit(spec)
        bad = [call for call in calls if call.failed_run or call.error is not None]
        good = [call for call in calls if not (call.failed_run or call.error is not None)]
        chosen = [*bad[: self._max_calls], *good[: max(_SHOWN_GOOD, self._max_calls - len(bad))]]
        said = list(dict.fromkeys(call.feedback for call in chosen))
        tried = [past for past in context.history if any(edit.name == spec.name for edit in past.update.edits)]
        fields = {
            "name": spec.name,
            "source": str(current_value(context, spec)),
            "signature": f"{unit.name}{unit.signature}" if unit is not None else "(as it is)",
            "documentation": cut(_purpose(spec), 600) or "(not said)",
            "visible": ", ".join(f"{used.name} ({used.kind})" for used in unit.uses) if unit and unit.uses else "none",
            "modules": ", ".join(sorted(_modules(unit))),
            "calls": "\n".join(f"- {call.text(300)}" for call in chosen) or "(none recorded)",
            "feedback": "\n".join(f"- {cut(text, 500)}" for text in said[: self._max_calls]) or "(nothing)",
            "memory": render_memory(tried, 800),
            "summary": cut(context.program_summary or context.program_name, 1000),
        }
        return [
            {"role": "system", "content": self.templates["code.system"].fill({"objective": context.objective}).strip()},
            {"role": "user", "content": self.templates["code.task"].fill(fields)},
        ]


class _Trial:
    """Runs a proposed body on recorded inputs; each body once, however often it is judged."""

    def __init__(self, context: ProposeContext, unit: CodeUnit, calls: Sequence[RecordedCall], limit: int) -> None:
        self._context = context
        self._unit = unit
        self._calls = calls
        self._limit = limit
        self._known: dict[str, list[str]] = {}

    async def __call__(self, edit: Edit) -> list[str]:
        if not isinstance(edit, SetCode):
            return []
        if edit.source not in self._known:
            child = apply_edits(self._context.parent, [edit], self._context.specs)
            # In a thread: the worker may take seconds to say that a call hangs.
            self._known[edit.source] = await anyio.to_thread.run_sync(
                try_calls, self._unit, edit.source, self._calls, child, self._limit
            )
        return self._known[edit.source]


def _read(context: ProposeContext, spec: ParameterSpec, reply: Any) -> Draft:
    """One reply as an edit of `spec`; the present source, or nothing, means no change."""
    unit = code_unit(spec)
    source, reasoning, problem = find_source(reply, spec.name, unit.name if unit is not None else "")
    if source is None:
        return Draft(unreadable=problem) if problem else Draft(rationale=reasoning)
    if source == current_value(context, spec):
        return Draft(rationale=reasoning)
    return Draft([SetCode(spec.name, source)], reasoning)


def find_source(reply: Any, name: str, function: str) -> tuple[str | None, str, str]:
    """(source, reasoning, problem) of a reply: the value of "source", a fenced block, or a text that is code.

    No source and no problem means that the model wants no change.
    """
    if isinstance(reply, str) and not reply.lstrip().startswith("{"):
        for piece in (*(match.group(1) for match in _FENCED.finditer(reply)), reply):
            begins = _BEGINS.search(piece)
            if begins is not None and f"def {function}" in piece:
                return _bare(strip_fence(piece[begins.start() :]), function), "", ""
    parsed = parse_reply(reply, ["source", name])
    value = parsed.suggestion.get("source", parsed.suggestion.get(name))
    if isinstance(value, str) and value.strip():
        return _bare(strip_fence(value), function), parsed.reasoning, ""
    return None, parsed.reasoning, parsed.problem or ""


def _bare(source: str, function: str) -> str:
    """`source` without the decorators of its function; they stay where the function is."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return source.strip("\n")
    lines = source.split("\n")
    for node in reversed(tree.body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == function and node.decorator_list:
            del lines[node.decorator_list[0].lineno - 1 : node.lineno - 1]
    return "\n".join(lines).strip("\n")


def _purpose(spec: ParameterSpec) -> str:
    """What is known of the function's purpose: its declaration's words, else its docstring."""
    if spec.description:
        return spec.description
    try:
        tree = ast.parse(str(spec.default))
    except (SyntaxError, ValueError):
        return ""
    node = next((node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))), None)
    return (ast.get_docstring(node) or "") if node is not None else ""


def _modules(unit: CodeUnit | None) -> set[str]:
    used = {str(item.content).partition(".")[0] for item in unit.uses if item.kind == "module"} if unit else set[str]()
    return set(ALLOWED_MODULES) | used
