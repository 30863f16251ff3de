"""Which steps and turns of an agent's messages may leave as a whole, and the messages without them.

A step is an assistant turn with the observations that answer it; a turn is what a person said and everything that
followed. Where several leave in a row, one stays in their place to say so, because providers want each call answered
and roles to alternate. What must never be lost (keep spans) is repeated in that note.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from agentopt.capsules.agents._originals import handle_of
from agentopt.capsules.agents._steps import Anatomy, Facts, text_of
from agentopt.capsules.counting._parts import OMITTED, Part

Message = dict[str, Any]
Group = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """The messages after masking, and which groups of them may leave, oldest first."""

    messages: Sequence[Message]
    facts: Sequence[Facts]
    """Of the messages before masking."""
    what: Anatomy
    steps: Sequence[Group]
    turns: Sequence[Group]
    spans: Callable[[Facts], Sequence[str]]
    """The keep spans of a message."""


def step_groups(facts: Sequence[Facts], what: Anatomy) -> list[Group]:
    """Old steps that may leave as a whole: an assistant turn and the observations that answer it."""
    groups: list[Group] = []
    index = 0
    while index < len(facts):
        end = index + 1
        if facts[index].role == "assistant":
            while end < len(facts) and facts[end].observation:
                end += 1
            if end > index + 1 and not any(what.stays(place, facts[place]) for place in range(index, end)):
                groups.append((index, end))
        index = end
    return groups


def turn_groups(facts: Sequence[Facts], what: Anatomy) -> list[Group]:
    """Old turns that may leave as a whole: what a person said without binding anybody, and everything that followed."""
    starts = [index for index, fact in enumerate(facts) if fact.role == "user" and not fact.observation]
    groups: list[Group] = []
    for start, end in pairwise([*starts, len(facts)]):
        answered = facts[end - 1].role == "assistant" and not facts[end - 1].calls
        if facts[start].constraints or not answered or end == start + 1:
            continue
        if not any(what.stays(place, facts[place]) for place in range(start, end)):
            groups.append((start, end))
    return groups


def gone(plan: Plan, steps: int, turns: int) -> set[int]:
    """The messages that are in a step or a turn that leaves."""
    groups = [*plan.steps[:steps], *plan.turns[:turns]]
    return {place for start, end in groups for place in range(start, end)}


def built(
    plan: Plan, steps: int, turns: int, texts: Mapping[Part, str] | None
) -> tuple[list[Message], tuple[str, ...]]:
    """The messages without the oldest steps and turns, and the texts that left with them.

    Of several steps in a row one stays to say so, the shortest: providers want each call answered and roles to
    alternate, so a note cannot stand by itself. Of several turns in a row likewise.
    """
    new: dict[int, Message] = dict(enumerate(plan.messages))
    for part, text in (texts or {}).items():
        new[part.message] = _replaced(new[part.message], part, text)
    left: list[str] = []
    in_turns = {place for start, end in plan.turns[:turns] for place in range(start, end)}
    for run in _runs([group for group in plan.steps[:steps] if group[0] not in in_turns]):
        if len(run) > 1:
            left.append(_transcript(plan, run))
            _drop_steps(new, plan, run, handle_of(left[-1]))
    for run in _runs(plan.turns[:turns]):
        left.append(_transcript(plan, run))
        _drop_turns(new, plan, run, handle_of(left[-1]))
    return [new[place] for place in sorted(new)], tuple(left)


def _runs(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that follow one another without anything between."""
    runs: list[list[Group]] = []
    for group in groups:
        if runs and runs[-1][-1][1] == group[0]:
            runs[-1].append(group)
        else:
            runs.append([group])
    return runs


def _drop_steps(new: dict[int, Message], plan: Plan, run: Sequence[Group], handle: str) -> None:
    def length(group: Group) -> int:
        shown = plan.messages[group[0] : group[1]]
        extra = sum(len(fact.extra) for fact in plan.facts[group[0] : group[1]])
        return extra + sum(len(text_of(message)) for message in shown)

    stays = min(run, key=lambda group: (length(group), group))
    for start, end in run:
        for place in range(start, end):
            if (start, end) != stays:
                del new[place]
    first = next(place for place in range(*stays) if plan.facts[place].observation)
    kept = _kept(plan, [group for group in run if group != stays])
    note = "\n".join([f"[{len(run)} steps around here left out; capsule handle {handle}]", *kept])
    old = text_of(plan.messages[first])
    new[first] = {**new[first], "content": f"{note}\n{old}" if old else note}


def _drop_turns(new: dict[int, Message], plan: Plan, run: Sequence[Group], handle: str) -> None:
    start, end = run[0][0], run[-1][1]
    note = "\n".join([f"[{len(run)} earlier turns left out; capsule handle {handle}]", *_kept(plan, run)])
    for place in range(start, end):
        new.pop(place, None)
    new[start] = {"role": "user", "content": note}
    new[end - 1] = {"role": "assistant", "content": OMITTED}


def _kept(plan: Plan, groups: Sequence[Group]) -> list[str]:
    """The keep spans of what leaves, each once."""
    spans = (span for start, end in groups for fact in plan.facts[start:end] for span in plan.spans(fact))
    return list(dict.fromkeys(spans))


def _transcript(plan: Plan, run: Sequence[Group]) -> str:
    """What left, as a text to be read back."""
    return "\n\n".join(fact.transcript for fact in plan.facts[run[0][0] : run[-1][1]])


def _replaced(message: Message, part: Part, text: str) -> Message:
    """A message with one of its texts replaced; a text that has gone leaves a short line, so that roles alternate."""
    shown = text or ("" if message.get("tool_calls") else OMITTED)
    if part.entry is None:
        return {**message, "content": shown}
    content = list(message["content"])
    content[part.entry] = {**content[part.entry], "text": shown or OMITTED}
    return {**message, "content": content}
