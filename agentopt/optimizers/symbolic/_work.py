"""What the parts of one symbolic step share: context, bound, wording, and a language model with a limit on its calls.

The unit is one call of `propose`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

from agentopt.evaluation import seed_number
from agentopt.models import LMError, LMOptions
from agentopt.optimizers._ask import ask
from agentopt.optimizers._feedback import cut
from agentopt.optimizers._optoprime import tidy
from agentopt.optimizers._protocol import DroppedEdit, ProposeContext
from agentopt.optimizers._repair import propose_legal, repair_turns
from agentopt.optimizers._reply import _objects as objects_in
from agentopt.optimizers._reply import parse_reply, parse_text

if TYPE_CHECKING:
    from agentopt.graph import Edit
    from agentopt.models import LM, Message, Reply
    from agentopt.optimizers._protocol import Update
    from agentopt.optimizers._repair import Draft, Trial
    from agentopt.optimizers._templates import Templates
    from agentopt.optimizers.symbolic._bound import EditBound
    from agentopt.optimizers.symbolic._gradients import CaseRun, Gradient
    from agentopt.optimizers.symbolic._options import SymbolicOptions

T = TypeVar("T")
_MAX_TEXT = 200_000
OPTIMIZER = "symbolic"


class CallsUsedUp(Exception):
    """The limit on language model calls of one `propose` is reached; what was made so far is used."""


class LimitedLM:
    """A language model that is asked at most `limit` times.

    A question is asked again in plain words when its form cannot be had, so it takes two calls at most; the backward
    pass plans with a third of the limit and so leaves a third for the updates, whatever the model can do.
    """

    def __init__(self, lm: LM, limit: int) -> None:
        self._lm = lm
        self.left = limit

    @property
    def sequential(self) -> bool:
        """Whether the client's answers depend on the order of the questions."""
        return bool(getattr(getattr(self._lm, "client", self._lm), "sequential", False))

    async def complete(self, messages: Any = None, **given: Any) -> Reply:
        """As `LM.complete`.

        Raises:
            CallsUsedUp: the limit is reached; nothing was asked.
        """
        if self.left <= 0:
            raise CallsUsedUp
        self.left -= 1
        return await self._lm.complete(messages, **given)


@dataclass
class Work:
    """One symbolic step on one parent."""

    context: ProposeContext
    limited: LimitedLM
    templates: Templates
    options: SymbolicOptions
    bound: EditBound
    cases: list[CaseRun] = field(default_factory=list["CaseRun"])
    gradients: Mapping[str, list[Gradient]] = field(default_factory=dict[str, "list[Gradient]"])
    """Node name → what its calls in the failing cases suggest."""
    answered: int = 0
    failures: list[LMError] = field(default_factory=list[LMError])

    @property
    def lm(self) -> LM:
        """The limited model, for what wants an `LM` and calls only `complete`."""
        return cast("LM", self.limited)

    @property
    def task(self) -> str:
        """What the program is for, for any question."""
        context = self.context
        parts = [cut(context.program_summary or context.program_name, 1500)]
        if context.objective:
            parts.append(f"What is wanted: {cut(context.objective, 500)}")
        return "\n".join(parts)

    def messages(self, fragment: str, fields: Mapping[str, str]) -> list[Message]:
        """The question that `symbolic.FRAGMENT` words, with the shared system text."""
        given = {"task": self.task, **fields}
        return [
            {"role": "system", "content": self.templates["symbolic.system"].fill(given)},
            {"role": "user", "content": tidy(self.templates[f"symbolic.{fragment}"].fill(given))},
        ]

    def sampling(self, place: int, *parts: str | int) -> LMOptions:
        """How to sample answer number `place` of the question that `parts` name."""
        context = self.context
        return LMOptions(
            temperature=0.0 if place == 0 else self.options.temperature,
            max_tokens=self.options.reply_tokens,
            seed=seed_number(OPTIMIZER, context.seed, context.parent.hash, place, *parts),
            sample=place,
        )

    def rate_text(self, edits: int) -> str:
        """The learning rate in words."""
        bound = self.bound
        wording = self.templates[f"symbolic.rate.{bound.wording}"].text
        fields = {"wording": wording, "edits": str(edits), "percent": f"{bound.ratio:.0%}", "tokens": str(bound.tokens)}
        return self.templates["symbolic.rate"].fill(fields)

    async def answer(
        self,
        source: str,
        messages: Sequence[Message],
        schema: dict[str, Any],
        *parts: str | int,
        place: int = 0,
    ) -> Any | None:
        """One answer without any repair; None (and a recorded drop) when the model refuses this question for good.

        Raises:
            LMError: the model cannot be reached at present.
            BudgetExhausted: the budget does not cover the call.
        """
        try:
            reply = (await ask(self.lm, messages, options=self.sampling(place, source, *parts), schema=schema)).reply
        except LMError as error:
            if error.retryable:
                raise
            self.failures.append(error)
            self.drop(source, f"{' '.join(map(str, parts))}: the language model failed: {error}")
            return None
        self.answered += 1
        return reply

    async def propose(
        self,
        messages: Sequence[Message],
        *,
        source: str,
        schema: dict[str, Any],
        read: Callable[[Any], Draft],
        place: int,
        parts: Sequence[str],
        before: Sequence[Edit] = (),
        trial: Trial | None = None,
    ) -> Update | None:
        """One legal update within the learning rate; what is illegal or too bold is sent back, then dropped.

        Args:
            messages: the question.
            source: who proposes.
            schema: JSON schema of the answer.
            read: reads one answer.
            place: which answer to this question.
            parts: what the question is about, for the seed.
            before: edits that the same update has already.
            trial: tries a legal edit out before it is proposed.

        Raises:
            CallsUsedUp: the limit on calls is reached.
            LMError: the call could not be completed.
            BudgetExhausted: the budget does not cover the call.
        """
        context = self.context

        def bounded(reply: Any) -> Draft:
            draft = read(reply)
            kept, problems = self.bound.keep(context.parent, [*before, *draft.edits], context.specs)
            draft.edits = kept[len(before) :]
            draft.problems = [*draft.problems, *problems]
            return draft

        return await propose_legal(
            context,
            self.lm,
            messages,
            options=self.sampling(place, source, context.iteration, *parts),
            read=bounded,
            source=source,
            schema=schema,
            repairs=self.options.repairs,
            turns=repair_turns(self.templates),
            trial=trial,
        )

    def drop(self, source: str, problem: str, tries: int = 1) -> None:
        """Record what was given up."""
        self.context.dropped.append(DroppedEdit(source, cut(problem, 600), tries))


def fields_of(reply: Any, keys: Sequence[str]) -> Mapping[str, Any] | None:
    """The object with at least one of `keys` that a reply holds, however badly formed the reply is."""
    if isinstance(reply, Mapping):
        known = cast("Mapping[str, Any]", reply)
        return known if any(key in known for key in keys) else None
    if not isinstance(reply, str):
        return None
    text = reply[:_MAX_TEXT]
    for found in objects_in(text):
        if any(key in found for key in keys):
            return found
    return parse_reply(text, keys).suggestion or None


def words_of(reply: Any, key: str) -> str:
    """One text of a reply: the value of `key`, else the reply itself where it can be one; '' for junk."""
    found = fields_of(reply, [key])
    value = found.get(key) if found is not None else parse_text(reply, key)
    return value.strip() if isinstance(value, str) else ""


def object_schema(**properties: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema of an object with exactly these properties, in the form that every provider takes."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT: dict[str, Any] = {"type": "string"}
TEXTS: dict[str, Any] = {"type": "array", "items": {"type": "string"}}


def strings(value: Any) -> list[str] | None:
    """The non-empty texts of a list, stripped; None when it is no list."""
    if not isinstance(value, list):
        return None
    items = cast("list[Any]", value)
    return [item.strip() for item in items if isinstance(item, str) and item.strip()]
