"""TextGrad: criticism of a result goes backward through the recorded graph, call by call (arXiv 2406.07496).

The unit is one failing rollout. Each edge from a call to something it was made from gets one textual gradient; what
arrives at a node over several edges is merged there, once, before it goes further. So the model calls of a rollout are
the edges of its subgraph and never the paths through it, which double with every diamond. Then one call per parameter
turns what was gathered over the rollouts into a new value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from agentopt.errors import UserError
from agentopt.evaluation import seed_number
from agentopt.models import LMOptions
from agentopt.optimizers._ask import ask
from agentopt.optimizers._feedback import cut, shown
from agentopt.optimizers._legal import Proposals, current_value, merged
from agentopt.optimizers._memory import render_memory
from agentopt.optimizers._optoprime import EDITABLE, read_values, reply_schema, tidy
from agentopt.optimizers._problem import Case, cases_of, constraint_line
from agentopt.optimizers._protocol import DroppedEdit, ProposeContext, Update
from agentopt.optimizers._repair import Turns, propose_legal
from agentopt.optimizers._reply import parse_text
from agentopt.optimizers._templates import load_templates

if TYPE_CHECKING:
    from agentopt.graph import OpRecord, Subgraph
    from agentopt.models import LM, Message


@dataclass(frozen=True, slots=True)
class TextGradOptions:
    """Settings of `TextGrad`."""

    max_calls: int = 32
    """Model calls of one `propose` at most, repairs of illegal values not counted. Edges beyond it pass their
    criticism on unchanged."""
    cases: int = 4
    """Failing rollouts that gradients are made for."""
    gradient_tokens: int = 300
    reply_tokens: int = 2048
    memory_tokens: int = 500
    temperature: float = 0.7
    """Of the second and later updates from the same gradients; the first is asked at temperature 0."""
    repairs: int = 3
    value_chars: int = 800
    """Longest recorded value shown of a call."""

    def __post_init__(self) -> None:
        for name in ("max_calls", "cases", "gradient_tokens", "reply_tokens", "value_chars"):
            if getattr(self, name) < 1:
                raise UserError(f"TextGradOptions: {name} must be at least 1, found {getattr(self, name)!r}.")


Gradients = dict[str, list[str]]
"""Parameter name → what was found, one text for each rollout that blames it."""


class TextGrad:
    """Proposes new values from textual gradients."""

    name = "textgrad"

    def __init__(self, options: TextGradOptions | None = None, *, template: str | Path | None = None) -> None:
        """`template` is a file that overrides fragments of the shipped meta-prompts.

        Raises:
            UserError: the template file cannot be used.
        """
        self.options = options or TextGradOptions()
        self.templates = load_templates(None if template is None else Path(template))

    async def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates from one set of gradients; [] when nothing failed or nothing was traced.

        Raises:
            LMError: the model could not be reached.
        """
        names = [name for name, spec in context.specs.items() if spec.kind in EDITABLE]
        if context.lm is None or not names:
            return []
        turn = context.iteration % len(names)
        names = [*names[turn:], *names[:turn]][: self.options.max_calls]
        left = self.options.max_calls - len(names)
        gradients, left = await self._gradients(context, context.lm, names, left)
        wanted = [name for name in names if gradients.get(name)]
        left += len(names) - len(wanted)
        proposals = Proposals(context)
        for place in range(context.count if wanted else 0):
            if proposals.done or (place and left < len(wanted)):
                break
            left -= len(wanted) if place else 0
            updates = [await self._update(context, context.lm, name, gradients[name], place) for name in wanted]
            update = merged([update for update in updates if update is not None], self.name)
            proposals.take(update)
        return proposals.updates

    # --- backward --------------------------------------------------------------------------------------------------

    async def _gradients(
        self, context: ProposeContext, lm: LM, names: Sequence[str], left: int
    ) -> tuple[Gradients, int]:
        """Gradients of the most informative failing rollouts, and how many calls are left."""
        found: Gradients = {}
        failing = [case for case in cases_of(context.rollouts, context.graphs, names) if case.failed and case.graph]
        for case in failing[: self.options.cases]:
            if case.graph is None or (left <= 0 and found):
                break
            walk = _Backward(self, context, lm, case, left)
            for name, text in (await walk.run(case.graph)).items():
                found.setdefault(name, []).append(text)
            left = walk.left
        return found, left

    def gradient_messages(self, op: OpRecord, parent: OpRecord, criticism: str) -> list[Message]:
        """What is asked for one edge."""
        limit = self.options.value_chars
        inputs = [f"{name} = {cut(shown(value), limit)}" for name, value in op.inputs.items()]
        failed = None if op.error is None else f"nothing: it failed with {op.error.type}: {op.error.message}"
        fields = {
            "call": op.op,
            "documentation": str((op.meta or {}).get("description") or "").strip(),
            "inputs": cut("\n".join(inputs), 3 * limit) or "(nothing else)",
            "output": cut(failed or _plain(op.output), limit),
            "criticism": criticism,
            "variable": _variable(parent),
            "value": cut(_plain(parent.output), 2 * limit),
        }
        return [
            {"role": "system", "content": self.templates["textgrad.gradient_system"].text},
            {"role": "user", "content": tidy(self.templates["textgrad.gradient"].fill(fields))},
        ]

    # --- update ----------------------------------------------------------------------------------------------------

    async def _update(
        self, context: ProposeContext, lm: LM, name: str, gradients: Sequence[str], place: int
    ) -> Update | None:
        options = LMOptions(
            temperature=0.0 if place == 0 else self.options.temperature,
            max_tokens=self.options.reply_tokens,
            seed=seed_number("textgrad", context.seed, context.iteration, context.parent.hash, name, place),
            sample=place,
        )
        turns = Turns(self.templates["optoprime.unreadable"], self.templates["optoprime.illegal"], name)
        return await propose_legal(
            context,
            lm,
            self.update_messages(context, name, gradients),
            options=options,
            read=lambda reply: read_values(context, reply, [name]),
            source=self.name,
            schema=reply_schema([name]),
            repairs=self.options.repairs,
            turns=turns,
        )

    def update_messages(self, context: ProposeContext, name: str, gradients: Sequence[str]) -> list[Message]:
        """What is asked for one parameter."""
        spec = context.specs[name]
        past = [past for past in context.history if any(edit.name == name for edit in past.update.edits)]
        fields = {
            "summary": cut(context.program_summary or context.program_name, 1000),
            "name": name,
            "value": _plain(current_value(context, spec)),
            "constraint": constraint_line(spec),
            "cases": str(len(gradients)),
            "gradients": merge(gradients, 4 * len(gradients) * self.options.gradient_tokens),
            "memory": render_memory(past, self.options.memory_tokens),
            "output_format": self.templates["optoprime.output_format"].fill({"names": name}),
        }
        system = self.templates["textgrad.update_system"].fill({"objective": context.objective}).strip()
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": tidy(self.templates["textgrad.update"].fill(fields))},
        ]


class _Backward:
    """One rollout's walk from its output to the parameters."""

    def __init__(self, optimizer: TextGrad, context: ProposeContext, lm: LM, case: Case, left: int) -> None:
        self.left = left
        self._optimizer = optimizer
        self._context = context
        self._lm = lm
        self._case = case
        self._limit = 4 * optimizer.options.gradient_tokens

    async def run(self, graph: Subgraph) -> dict[str, str]:
        """Parameter name → the merged gradient that reached it."""
        ops = graph.trace.ops
        wanted = graph.parameters
        leaves = {op.id: op.op for op in ops if op.kind == "parameter" and op.op in wanted}
        members = {op.id: op for op in graph.ops}
        used = {number for op in graph.ops for number, kind in op.parents if kind not in ("nested", "after")}
        arrived: dict[int, list[str]] = {op.id: [self._case.feedback] for op in graph.outputs}
        for number in sorted(members, reverse=True):  # every op stands after what it was made from
            texts = arrived.get(number)
            if not texts:
                continue
            criticism = merge(texts, self._limit)
            op = members[number]
            for parent in _blamed(op, used):
                if parent not in members and parent not in leaves:
                    continue
                arrived.setdefault(parent, []).append(await self._edge(op, ops[parent], criticism))
        found: dict[str, list[str]] = {}
        for leaf, name in leaves.items():
            found.setdefault(name, []).extend(arrived.get(leaf, ()))
        return {name: merge(texts, self._limit) for name, texts in found.items() if texts}

    async def _edge(self, op: OpRecord, parent: OpRecord, criticism: str) -> str:
        """The gradient of one edge; where an op only handed on a result, or for a junk reply, the criticism itself."""
        if self.left <= 0 or (parent.kind != "parameter" and _hands_on(op, parent)):
            return criticism
        self.left -= 1
        options = LMOptions(
            max_tokens=self._optimizer.options.gradient_tokens,
            seed=seed_number("gradient", self._context.seed, self._case.rollout.example.id, op.id, parent.id),
        )
        messages = self._optimizer.gradient_messages(op, parent, criticism)
        answer = await ask(self._lm, messages, options=options, schema=None)
        text = parse_text(answer.reply, "gradient", max_chars=8 * self._limit)
        if text is None:
            problem = f"no gradient from {op.op} to {parent.op}: the answer is empty, a refusal or no text"
            self._context.dropped.append(DroppedEdit(self._optimizer.name, problem))
            return criticism
        return cut(text, self._limit)


def _blamed(op: OpRecord, used: Collection[int]) -> list[int]:
    """What an op was made from, each once. An inner call whose result goes on to another op hears from that one."""
    return list(
        dict.fromkeys(
            number for number, kind in op.parents if kind != "after" and not (kind == "nested" and number in used)
        )
    )


def merge(texts: Sequence[str], limit: int) -> str:
    """Several criticisms as one, at most about `limit` characters: repeated ones once, each with its fair share."""
    distinct = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if len(distinct) <= 1:
        return cut(distinct[0], limit) if distinct else ""
    share = max(80, limit // len(distinct))
    return "\n".join(f"- {cut(text, share)}" for text in distinct)


def _hands_on(op: OpRecord, parent: OpRecord) -> bool:
    """Whether an op returned just what it got from `parent`: there is nothing in between to blame."""
    mine, other = _plain(op.output), _plain(parent.output)
    return op.error is None and parent.error is None and len(mine) > 0 and mine == other


def _variable(parent: OpRecord) -> str:
    return f"the value {parent.op}" if parent.kind == "parameter" else f"the result of {parent.op}"


def _plain(value: Any) -> str:
    """A recorded value as text; of a language model's reply its text."""
    if isinstance(value, Mapping):
        text = cast("Mapping[str, Any]", value).get("text")
        value = text if isinstance(text, str) else cast("Mapping[str, Any]", value)
    return value if isinstance(value, str) else shown(value)
