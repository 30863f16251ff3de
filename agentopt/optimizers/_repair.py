"""From a model's answer to a legal update: read it, judge its edits, send back what is wrong, drop what stays wrong.

The unit is one proposal: a conversation of at most one question, one repair of an unreadable answer, and a few repairs
of illegal edits. How an answer is read is the caller's business (`read`); everything that can go wrong with what was
read is handled here, so that no junk of a small model ever becomes an exception.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentopt.optimizers._ask import ask, text_of
from agentopt.optimizers._feedback import cut
from agentopt.optimizers._legal import problems_of
from agentopt.optimizers._protocol import DroppedEdit, ProposeContext, Update
from agentopt.optimizers._templates import Fragment, Templates, load_templates

if TYPE_CHECKING:
    from agentopt.graph import Edit
    from agentopt.models import LM, LMOptions, Message

Trial = Callable[["Edit"], Awaitable[list[str]]]
"""What running an edit's value shows to be wrong with it, one line each; code is tried in the sandbox like this."""
_SAID = 6000
"""Characters of the model's own answer that are shown to it again."""


@dataclass(slots=True)
class Draft:
    """What was read from one answer. No edits and no problems: the model wants no change."""

    edits: list[Edit] = field(default_factory=list["Edit"])
    rationale: str = ""
    problems: list[str] = field(default_factory=list[str])
    """Parts that could not become edits, one line each; they are sent back beside the illegal edits."""
    unreadable: str = ""
    """Why nothing at all could be read; '' when the answer had the form that was asked for."""


@dataclass(frozen=True, slots=True)
class Turns:
    """The texts that are sent back; `names` fills the placeholder of that name."""

    unreadable: Fragment
    illegal: Fragment
    names: str = ""


async def propose_legal(
    context: ProposeContext,
    lm: LM,
    messages: Sequence[Message],
    *,
    options: LMOptions,
    read: Callable[[Any], Draft],
    source: str,
    schema: dict[str, Any] | None = None,
    repairs: int = 3,
    turns: Turns | None = None,
    trial: Trial | None = None,
) -> Update | None:
    """Ask once and return the legal part of the answer; None when there is none. Drops go to `context.dropped`.

    A repaired answer replaces the edits of those parameters that had a problem; the others stay as they were. An
    answer without any edit takes the illegal ones back.

    Args:
        context: what is proposed for.
        lm: whom to ask.
        messages: the question.
        options: how to sample; the repairs are asked with the same.
        read: reads one reply (text, or an object when `schema` was kept to). Must not raise on strange replies.
        source: who proposes, for the update and the drops.
        schema: JSON schema of the first answer, if there is one.
        repairs: times that illegal edits are sent back.
        turns: other words for the repair turns; None for the shipped ones.
        trial: tries a legal edit out before it is proposed; what it says is wrong is sent back like an illegal edit.

    Raises:
        LMError: the call could not be completed.
        BudgetExhausted: the budget does not cover the call.
    """
    turns = turns or repair_turns(load_templates())
    talk = list(messages)
    answer = await ask(lm, talk, options=options, schema=schema)
    draft = read(answer.reply)
    if draft.unreadable and not answer.repaired:
        talk = _continued(talk, answer.reply, turns.unreadable.fill({"error": draft.unreadable, "names": turns.names}))
        answer = await ask(lm, talk, options=options, schema=None)
        draft = read(answer.reply)
    if draft.unreadable:
        problem = f"the answer could not be read, repair round included: {draft.unreadable}"
        context.dropped.append(DroppedEdit(source, problem, 2))
        return None
    reply, tries = answer.reply, 1
    good, bad = await _judge(context, draft, trial)
    while bad and tries <= repairs:
        names = ", ".join(dict.fromkeys(edit.name for edit in draft.edits)) or turns.names
        lines = "\n".join(f"- {line}" for _, line in bad)
        talk = _continued(talk, reply, turns.illegal.fill({"problems": lines, "names": names}))
        reply = (await ask(lm, talk, options=options, schema=None)).reply
        tries += 1
        again = read(reply)
        if again.unreadable:
            continue
        if not again.edits and not again.problems:
            break  # the model takes them back
        _amend(draft, again, bad)
        good, bad = await _judge(context, draft, trial)
    context.dropped.extend(DroppedEdit(source, line, tries) for _, line in bad)
    return Update(tuple(good), cut(draft.rationale, 600), source) if good else None


async def _judge(
    context: ProposeContext, draft: Draft, trial: Trial | None
) -> tuple[list[Edit], list[tuple[str, str]]]:
    """Edits that can be applied in order and pass their trial, and (parameter or '', what is wrong) of the others."""
    good, bad = _legal(context, draft)
    if trial is None:
        return good, bad
    kept: list[Edit] = []
    for edit in good:
        found = await trial(edit)
        if found:
            bad.append((edit.name, "; ".join(found)))
        else:
            kept.append(edit)
    return kept, bad


def _legal(context: ProposeContext, draft: Draft) -> tuple[list[Edit], list[tuple[str, str]]]:
    """Edits that can be applied in order, and (parameter or '', what is wrong) of the others."""
    good: list[Edit] = []
    bad: list[tuple[str, str]] = [("", line) for line in draft.problems]
    if not problems_of(context, draft.edits):
        return list(draft.edits), bad
    for edit in draft.edits:
        problems = problems_of(context, [*good, edit])
        if problems:
            bad.append((edit.name, "; ".join(problems)))
        else:
            good.append(edit)
    return good, bad


def _amend(draft: Draft, again: Draft, bad: Sequence[tuple[str, str]]) -> None:
    """Take over the repaired edits of every parameter that had a problem (of all, where it is unknown whose it was)."""
    wrong = {name for name, _ in bad}
    fresh = [edit for edit in again.edits if "" in wrong or edit.name in wrong]
    renewed = {edit.name for edit in fresh}
    draft.edits = [*(edit for edit in draft.edits if edit.name not in renewed), *fresh]
    draft.problems = list(again.problems)


def repair_turns(templates: Templates) -> Turns:
    """The turns of `templates`, a user's own words included."""
    return Turns(templates["repair.unreadable"], templates["repair.illegal"])


def _continued(messages: Sequence[Message], reply: Any, turn: str) -> list[Message]:
    said = cut(text_of(reply), _SAID) or "(no answer)"
    return [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": turn}]
