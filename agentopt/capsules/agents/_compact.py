"""One compaction of an agent's messages: what leaves, in which order, until the budget holds.

From the least loss to the most: old observations become lines, old steps leave as a whole, old prose loses units, old
turns leave as a whole. Each stage is counted as it would be sent, and the next is entered only when the budget asks for
it. Always made from the originals, never from an earlier compaction, so nothing drifts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules._types import Document
from agentopt.capsules.agents._counter import Counter, Memo
from agentopt.capsules.agents._groups import Message, Plan, built, gone, step_groups, turn_groups
from agentopt.capsules.agents._masking import Masked, mask_one
from agentopt.capsules.agents._steps import Anatomy, Facts, anatomy
from agentopt.capsules.counting._parts import Part, parts_of
from agentopt.capsules.counting._tokens import Meter
from agentopt.capsules.units._spans import find_keep


@dataclass(frozen=True, slots=True)
class Rules:
    """What a compaction may do."""

    keep_last: int = 3
    mask: bool = True
    extract: bool = True
    """Whether old prose may lose units."""
    keep: tuple[str, ...] = ()
    query: str | None = None
    """What the units of old prose are valued by; `LAST_USER` for the last user turn."""
    room: float = 0.25
    """The share of the budget that a compaction leaves free where it can, so that the next one is not due at once."""
    seed: int = 0


LAST_USER = "last user turn"
_LONG_TURN = 20_000  # characters


@dataclass(frozen=True, slots=True)
class Compaction:
    """The messages to send, and what happened to the others."""

    messages: tuple[Message, ...]
    tokens: int
    masked: tuple[Masked, ...] = ()
    steps: int = 0
    """Steps that left."""
    turns: int = 0
    """Turns that left."""
    shortened: int = 0
    """Messages that lost units."""
    originals: tuple[str, ...] = ()
    """Texts to be kept, so that the handles in the messages lead somewhere."""


@dataclass(frozen=True)
class _PlanMeter(Meter):
    """Counts the messages of a plan with the parts of its old prose replaced."""

    built: Callable[[Sequence[str]], list[Message]] = lambda parts: []
    counter: Callable[[Sequence[Message]], int] = len

    def total(self, parts: Sequence[str]) -> int:
        return self.counter(self.built(parts))


class Compactor:
    """Makes compactions under one budget and one set of rules; what it remembers never changes a result."""

    def __init__(self, counter: Counter, rules: Rules) -> None:
        self.counter = counter
        self.rules = rules
        self._lines = Memo[tuple[str, str], tuple[tuple[Masked, Any] | None]]()
        self._kept = Memo[tuple[str, str], tuple[str, ...]]()

    def masked(
        self, messages: Sequence[Message], facts: Sequence[Facts], before: Compaction | None = None
    ) -> Compaction | None:
        """Only old observations as lines; what `before` left out stays out. None after prose was shortened."""
        if before is not None and before.shortened:
            return None
        what = anatomy(facts, self.rules.keep_last)
        new, masked = self._mask(messages, facts, what)
        plan = self._plan(new, facts, what)
        steps, turns = (0, 0) if before is None else (before.steps, before.turns)
        done, left = built(plan, steps, turns, None)
        texts = (*(one.text for one in masked), *left)
        return Compaction(tuple(done), self.counter.total(done), tuple(masked), steps, turns, originals=texts)

    def compact(self, messages: Sequence[Message], facts: Sequence[Facts], limit: int) -> Compaction:
        """The messages within `limit`.

        Raises:
            BudgetInfeasible: what must stay does not fit.
        """
        target = max(1, int(limit * (1 - self.rules.room)))
        what = anatomy(facts, self.rules.keep_last)
        new, masked = self._mask(messages, facts, what) if self.rules.mask else (list(messages), [])
        plan = self._plan(new, facts, what)
        steps = _least(len(plan.steps), lambda n: self.counter.total(built(plan, n, 0, None)[0]) <= target)
        done, left = built(plan, steps, 0, None)
        total = self.counter.total(done)
        turns = shortened = 0
        if total > limit:
            done, left, turns, shortened = self._shorter(plan, steps, limit, target)
            total = self.counter.total(done)
        texts = (*(one.text for one in masked), *left)
        return Compaction(tuple(done), total, tuple(masked), steps, turns, shortened, texts)

    # ---- stages

    def _plan(self, messages: Sequence[Message], facts: Sequence[Facts], what: Anatomy) -> Plan:
        return Plan(messages, facts, what, step_groups(facts, what), turn_groups(facts, what), self._spans)

    def _spans(self, fact: Facts) -> Sequence[str]:
        """The keep spans of a message: of its texts, and what the user's patterns match in its calls."""
        place = (fact.text, fact.extra)
        known = self._kept.get(place)
        if known is not None:
            return known
        found = [span.of(fact.text) for span in find_keep(fact.text, self.rules.keep)]
        calls = find_keep(fact.extra, self.rules.keep) if self.rules.keep and fact.extra else []
        found += [span.of(fact.extra) for span in calls if span.kind == "pattern"]
        return self._kept.put(place, tuple(found), len(fact.text))

    def _mask(
        self, messages: Sequence[Message], facts: Sequence[Facts], what: Anatomy
    ) -> tuple[list[Message], list[Masked]]:
        new: list[Message] = []
        masked: list[Masked] = []
        for index, (message, fact) in enumerate(zip(messages, facts, strict=True)):
            found = None
            if fact.observation and not what.stays(index, fact):
                found = self._line(index, message, fact)
            new.append(message if found is None else {**message, "content": found[1]})
            if found is not None:
                masked.append(replace(found[0], index=index))
        return new, masked

    def _line(self, index: int, message: Message, fact: Facts) -> tuple[Masked, Any] | None:
        if isinstance(message.get("content"), list):
            return mask_one(index, message, fact, keep=self.rules.keep, count=self.counter.tokenizer.count)
        place = (fact.text, fact.tool)
        known = self._lines.get(place)
        if known is None:
            line = mask_one(index, message, fact, keep=self.rules.keep, count=self.counter.tokenizer.count)
            known = self._lines.put(place, (line,), len(fact.text))
        return known[0]

    def _shorter(
        self, plan: Plan, steps: int, limit: int, target: int
    ) -> tuple[list[Message], tuple[str, ...], int, int]:
        """Old prose loses units; where little would be left of it, the oldest turns leave first."""

        def leaves_something(turns: int) -> bool:
            nothing = {part: "" for part in self._prose(plan, gone(plan, steps, turns))}
            return 2 * self.counter.total(built(plan, steps, turns, nothing)[0]) <= target

        turns = _least(len(plan.turns), leaves_something)
        try:
            done, left, shortened = self._extracted(plan, steps, turns, limit, target)
        except BudgetInfeasible:
            if turns == len(plan.turns):
                raise
            turns = len(plan.turns)
            done, left, shortened = self._extracted(plan, steps, turns, limit, target)
        return done, left, turns, shortened

    def _extracted(
        self, plan: Plan, steps: int, turns: int, limit: int, target: int
    ) -> tuple[list[Message], tuple[str, ...], int]:
        done, left = built(plan, steps, turns, None)
        total = self.counter.total(done)
        if total <= limit:
            return done, left, 0
        prose = self._prose(plan, gone(plan, steps, turns))
        if not prose:
            raise BudgetInfeasible(
                minimum=total, limit=limit, tokenizer=self.counter.tokenizer.name, because=_MUST_STAY
            )
        documents = [self._document(plan, part) for part in prose]
        query = self._query(plan)

        def with_parts(texts: Sequence[str]) -> list[Message]:
            return built(plan, steps, turns, dict(zip(prose, texts, strict=True)))[0]

        def extracted(room: int) -> Sequence[str]:
            from agentopt.capsules.extraction._extract import extract

            meter = _PlanMeter(room, self.counter.tokenizer, built=with_parts, counter=self.counter.total)
            return extract(documents, meter, query=query, seed=self.rules.seed).texts

        try:
            texts = extracted(target)
        except BudgetInfeasible as error:
            if error.minimum > limit:
                raise BudgetInfeasible(
                    minimum=error.minimum, limit=limit, tokenizer=error.tokenizer, because=_MUST_STAY
                ) from error
            texts = extracted(limit)
        changed = [part for part, text in zip(prose, texts, strict=True) if part.text != text]
        originals = tuple(part.text for part in changed)
        return with_parts(texts), (*left, *originals), len({part.message for part in changed})

    def _prose(self, plan: Plan, left: set[int]) -> list[Part]:
        """The texts that may lose units."""
        if not self.rules.extract:
            return []
        found: list[Part] = []
        for part in parts_of(plan.messages):
            fact = plan.facts[part.message]
            masked = (self.rules.mask and fact.observation) or _binds(fact)
            if part.message not in left and not masked and not plan.what.stays(part.message, fact) and part.text:
                found.append(part)
        return found

    def _document(self, plan: Plan, part: Part) -> Document:
        from agentopt.capsules.units._units import parse

        binding = [re.escape(sentence) for sentence in plan.facts[part.message].constraints]
        return parse(part.text, (*self.rules.keep, *binding), role=part.role)

    def _query(self, plan: Plan) -> str | None:
        if self.rules.query != LAST_USER:
            return self.rules.query
        return plan.facts[plan.what.last_user].text or None if plan.what.last_user >= 0 else None


_MUST_STAY = (
    "the system, the last user turn, the last steps, unresolved errors, constraints and keep spans; the option longest "
    "shortens long tool results and turns as they come in"
)


def _binds(fact: Facts) -> bool:
    """Whether a long turn is mostly made of what binds, so that nothing would be gained by taking it apart."""
    return len(fact.text) > _LONG_TURN and 2 * sum(map(len, fact.constraints)) >= len(fact.text)


def _least(most: int, enough: Callable[[int], bool]) -> int:
    """The smallest number for which `enough` holds (it holds for all above), or `most`."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return low
