"""Questions of several knowledge bases: adapters side by side in one batch, the facts read where the gate says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from agentopt.errors import UserError
from agentopt.weights.fold._adapter import Adapter
from agentopt.weights.fold._answers import Answer, Written
from agentopt.weights.fold._types import Question
from agentopt.weights.load import need

if TYPE_CHECKING:
    from agentopt.weights.fold._folder import Folder

Pair = tuple[Adapter, Question]

_AT_ONCE = 64
"""Questions of a batch."""


def answer_pairs(
    folder: Folder, asked: Sequence[Pair], context: Sequence[str], *, gate: bool, max_new: int | None
) -> list[Answer]:
    """The answers in order; see `Folder.ask_pairs`."""
    thresholds = folder.gate if gate else None
    found: dict[int, Answer] = {}
    reading: dict[int, str] = {}
    folded: list[int] = []
    for place, (adapter, _) in enumerate(asked):
        decision = None if thresholds is None else thresholds.decide(adapter.recall)
        if decision is not None and not decision.accepted:
            reading[place] = decision.reason
        else:
            folded.append(place)
    said = _folded(folder, [asked[place] for place in folded], context, max_new)
    for place, one in zip(folded, said, strict=True):
        adapter = asked[place][0]
        decision = None if thresholds is None else thresholds.decide(adapter.recall, one.margin)
        reason = "the gate is off" if not gate else "no gate" if decision is None else decision.reason
        found[place] = _answer(one, adapter, reason)
        if decision is not None and not decision.accepted:
            reading[place] = reason
    for adapter in dict.fromkeys(asked[place][0] for place in reading):
        mine = {place: why for place, why in reading.items() if asked[place][0] is adapter}
        found |= _read(folder, adapter, {place: asked[place][1] for place in mine}, mine, found, context, max_new)
    return [found[place] for place in range(len(asked))]


def _folded(folder: Folder, asked: Sequence[Pair], context: Sequence[str], max_new: int | None) -> list[Written]:
    torch = need("torch")
    kit = folder.kit
    written: list[Written] = []
    for at in range(0, len(asked), _AT_ONCE):
        part = asked[at : at + _AT_ONCE]
        adapters = list(dict.fromkeys(adapter for adapter, _ in part))
        number = {adapter: place for place, adapter in enumerate(adapters)}
        state = {name: torch.stack([adapter.state[name] for adapter in adapters]) for name in adapters[0].state}
        written += kit.write(
            state,
            [number[adapter] for adapter, _ in part],
            [kit.encoder.prompt(question.text, context) for _, question in part],
            [question.choices for _, question in part],
            max_new,
        )
    return written


def _read(
    folder: Folder,
    adapter: Adapter,
    questions: Mapping[int, Question],
    why: Mapping[int, str],
    folded: Mapping[int, Answer],
    context: Sequence[str],
    max_new: int | None,
) -> dict[int, Answer]:
    """The answers of questions that the gate turned away, from the facts in the prompt."""
    try:
        with folder.base_in_use():
            reader, facts = folder.reader(max_new), folder.prefix(adapter)
            read = reader.ask_many(facts, list(questions.values()), context=context)
    except UserError as error:  # longer than the window: what is folded is all there is
        missing = [place for place in questions if place not in folded]
        written = _folded(folder, [(adapter, questions[place]) for place in missing], context, max_new)
        late = {place: _answer(one, adapter, "") for place, one in zip(missing, written, strict=True)}
        every = {**folded, **late}
        return {
            place: replace(every[place], reason=f"{why[place]}; but {error}; so this is the folded answer")
            for place in questions
        }
    return {place: replace(one, reason=why[place]) for place, one in zip(questions, read, strict=True)}


def _answer(one: Written, adapter: Adapter, reason: str) -> Answer:
    return Answer(one.text, "folded", one.recalled, one.margin, adapter.recall, one.logprob, reason)
