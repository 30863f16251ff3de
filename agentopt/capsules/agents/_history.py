"""An agent's history that only grows: what was sent stays byte for byte, so a provider's prompt cache keeps working.

New messages are appended as they are. Old ones are compacted at epochs only: when the hard budget demands it, or when
the pricing rule says that rewriting what is cached costs less than reading it again and again. What an epoch decides is
a function of the messages alone: a call is known to have been made before each assistant turn, so a history that is
read again from its messages, in this process or another, sends the same bytes.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules.agents._compact import LAST_USER, Compaction, Compactor, Rules
from agentopt.capsules.agents._counter import Counter
from agentopt.capsules.agents._entry import enter
from agentopt.capsules.agents._epochs import ASSUMED, Sent, extra_cost, leftover_cost, read_tokens, rule_to_dict
from agentopt.capsules.agents._originals import Originals
from agentopt.capsules.agents._steps import Facts, check_keep_last, read_all, read_facts
from agentopt.capsules.counting._parts import check_messages
from agentopt.capsules.counting._tokens import TokenBudget, Tokenizer
from agentopt.capsules.gating._caching import CachingRule
from agentopt.errors import UserError

Message = dict[str, Any]
_COUNTS = ("tokens", "steps", "turns", "shortened")
"""What of a compaction decides the next one."""


@dataclass(frozen=True)
class HistoryOptions:
    """Everything about a history that has a sensible default.

    Raises:
        UserError: a value outside its range.
    """

    extract: bool = True
    """Whether old prose may lose units where masking and leaving out old steps is not enough."""
    query: str | None = LAST_USER
    """What units are valued by: "last user turn", a text, or None."""
    longest: int | None = None
    """Tool results and user turns with more tokens are shortened when they come in; None for never."""
    room: float = 0.25
    """The share of the budget that an epoch leaves free where it can."""
    caching: CachingRule | None = None
    """How the provider caches; None for an assumed rule."""
    early: bool = True
    """Also below the budget, mask old observations when the pricing rule says that it pays."""
    dearer: Literal["compress", "pass"] = "compress"
    """Above the budget, when compressing costs more than it saves: hold the budget, or send what is longer."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.room < 1:
            raise UserError(f"room: found {self.room}, expected a share of at least 0 and below 1.")
        if self.longest is not None and self.longest < 1:
            raise UserError(f"longest: found {self.longest}, expected at least 1.")
        if self.dearer not in ("compress", "pass"):
            raise UserError(f"dearer: found {self.dearer!r}, expected 'compress' or 'pass'.")


@dataclass(frozen=True, slots=True)
class HistoryUsage:
    """What was sent so far, in tokens; sums over calls."""

    calls: int = 0
    original: int = 0
    """What the calls would have had without any compression."""
    sent: int = 0
    read: int = 0
    """Of `sent`: found in the provider's cache."""
    written: int = 0
    """Of `sent`: not found there."""
    epochs: int = 0
    passed: int = 0
    """Calls over the budget, sent as they were because compressing would have cost more."""


@dataclass(frozen=True, slots=True)
class Emission:
    """The messages of one call and how they came about."""

    messages: tuple[Message, ...]
    tokens: int
    original_tokens: int
    read: int
    """Tokens that the provider has in its cache."""
    epoch: Literal["", "budget", "price"] = ""
    """Why what was sent before was rewritten; empty when it was not."""
    passed: bool = False
    compaction: Compaction | None = None
    """The compaction in force (of one from before `from_dict` the counts); None when nothing was compressed so far."""


@dataclass(frozen=True, slots=True)
class State:
    """A history as a value: everything that the next call depends on."""

    messages: tuple[Message, ...] = ()
    facts: tuple[Facts, ...] = ()
    sent: tuple[Message, ...] = ()
    """The last call's messages; they stand for the first `covered` of `messages`."""
    covered: int = 0
    usage: HistoryUsage = HistoryUsage()
    waste: float = 0.0
    """What reading that could have left has cost since the last epoch, in tokens at the plain price."""
    compaction: Compaction | None = None


class Engine:
    """Moves states on; pure, and safe to use from several threads."""

    def __init__(self, counter: Counter, rules: Rules, options: HistoryOptions) -> None:
        self.counter = counter
        self.options = options
        self.rules = rules
        self.compactor = Compactor(counter, rules)
        self.rule = options.caching or ASSUMED

    def append(self, state: State, message: Message) -> tuple[State, tuple[str, ...]]:
        """The state with one more message, and the texts to be kept behind handles."""
        message = copy.deepcopy(message)  # what is sent again must not change in anybody's hands
        kept: tuple[str, ...] = ()
        if message.get("role") == "assistant" and state.covered < len(state.messages):
            state, kept = self._answered(state)
        called = {call: tool for fact in state.facts for call, tool in fact.calls}
        fact = read_facts(message, called)
        entered = enter(
            message,
            fact,
            longest=self.options.longest,
            tokenizer=self.counter.tokenizer,
            keep=self.rules.keep,
            query=self._query(state),
            seed=self.options.seed,
        )
        if entered.originals:
            fact = read_facts(entered.message, called)
        state = replace(state, messages=(*state.messages, entered.message), facts=(*state.facts, fact))
        return state, (*kept, *entered.originals)

    def emit(self, state: State) -> tuple[State, Emission]:
        """What to send now, and the state in which that was sent.

        Raises:
            BudgetInfeasible: what must stay does not fit.
        """
        grown = (*state.sent, *state.messages[state.covered :])
        old = Sent(self._size(state.sent), self.counter.total(grown))
        over = old.tokens > self.counter.limit
        compaction = self._compacted(state, old.tokens)
        if compaction is None:
            return self._sent(state, grown, old, passed=over)
        new = Sent(self._size(self._shared(state.sent, compaction.messages)), compaction.tokens)
        pays = extra_cost(self.rule, old, new) <= state.waste
        if not pays and not (over and self.options.dearer == "compress"):
            state = replace(state, waste=state.waste + leftover_cost(self.rule, old, new))
            return self._sent(state, grown, old, passed=over)
        state = replace(state, compaction=compaction, waste=0.0)
        return self._sent(state, compaction.messages, new, reason="budget" if over else "price")

    def _answered(self, state: State) -> tuple[State, tuple[str, ...]]:
        """The state after the call that an assistant turn answers."""
        try:
            state, emission = self.emit(state)
        except BudgetInfeasible:  # then it was made over the budget: an answer is there
            grown = (*state.sent, *state.messages[state.covered :])
            old = Sent(self._size(state.sent), self.counter.total(grown))
            state, emission = self._sent(state, grown, old, passed=True)
        return state, texts_of(emission)

    def _compacted(self, state: State, tokens: int) -> Compaction | None:
        """What could be sent in place of a prompt that only grows, and has `tokens` now."""
        if tokens > self.counter.limit:
            return self.compactor.compact(state.messages, state.facts, self.counter.limit)
        if not (self.options.early and self.rules.mask):
            return None
        if not any(fact.observation for fact in state.facts[: state.covered]):
            return None
        compaction = self.compactor.masked(state.messages, state.facts, state.compaction)
        return compaction if compaction is not None and compaction.tokens < tokens else None

    def _sent(
        self,
        state: State,
        messages: tuple[Message, ...],
        sent: Sent,
        *,
        reason: Literal["", "budget", "price"] = "",
        passed: bool = False,
    ) -> tuple[State, Emission]:
        tokens, read = sent.tokens, read_tokens(self.rule, sent)
        original = self.counter.total(state.messages)
        usage = state.usage
        usage = HistoryUsage(
            usage.calls + 1,
            usage.original + original,
            usage.sent + tokens,
            usage.read + read,
            usage.written + tokens - read,
            usage.epochs + bool(reason),
            usage.passed + passed,
        )
        emission = Emission(messages, tokens, original, read, reason, passed, state.compaction)
        return replace(state, sent=messages, covered=len(state.messages), usage=usage), emission

    @staticmethod
    def _shared(before: Sequence[Message], after: Sequence[Message]) -> Sequence[Message]:
        """The messages at the beginning that did not change."""
        count = 0
        for one, other in zip(before, after, strict=False):
            if one != other:
                break
            count += 1
        return after[:count]

    def _size(self, messages: Sequence[Message]) -> int:
        return self.counter.base + sum(self.counter.size(message) for message in messages) if messages else 0

    def _query(self, state: State) -> str | None:
        if self.options.query != LAST_USER:
            return self.options.query
        for fact in reversed(state.facts):
            if fact.role == "user" and not fact.observation:
                return fact.text or None
        return None


def texts_of(emission: Emission) -> tuple[str, ...]:
    """The texts behind the handles of an emission that was compacted just now."""
    return emission.compaction.originals if emission.epoch and emission.compaction is not None else ()


class History:
    """An append-only agent history under a hard budget. Safe to use from several threads.

    What stays, always: the system and other messages that are no turns, the last user turn, the last `keep_last` steps,
    errors that were not resolved since, what binds in a user's turn ("do not", "always", "from now on", ...), keep
    spans. What leaves can be read back from `originals` by the handle that stands in its place.

    Args:
        budget: the limit of what `messages()` gives, in the reader's tokens.
        keep_last: how many of the last steps stay as they are.
        mask: whether old tool results may give way to a line.
        keep: regular expressions; what they match is never dropped.
        tools: definitions of the tools that are sent along; they count.
        originals: where what leaves is kept; in memory when None.
        options: everything else.
    """

    def __init__(
        self,
        budget: TokenBudget,
        *,
        keep_last: int = 3,
        mask: bool = True,
        keep: Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        originals: Originals | None = None,
        options: HistoryOptions | None = None,
    ) -> None:
        self.budget = budget
        self.options = options or HistoryOptions()
        self.originals = originals if originals is not None else Originals(tokenizer=budget.tokenizer)
        self.tools = tuple(dict(tool) for tool in tools)
        rules = rules_of(keep_last, mask, keep, self.options)
        self._engine = Engine(Counter(budget, self.tools), rules, self.options)
        self._state = State()
        self._last: Emission | None = None
        self._lock = threading.RLock()

    def append(self, message: Mapping[str, Any]) -> None:
        """Add one chat message in OpenAI form.

        Raises:
            UserError: it is none.
        """
        plain = check_messages([message])[0]
        with self._lock:
            self._state, texts = self._engine.append(self._state, plain)
            self._keep(texts)

    def extend(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """`append` each."""
        for message in messages:
            self.append(message)

    def messages(self) -> list[Message]:
        """What to send now. It begins with what was sent before, byte for byte, unless this call is an epoch.

        Raises:
            BudgetInfeasible: what must stay does not fit.
        """
        with self._lock:
            if self._state.messages and self._state.covered < len(self._state.messages):
                self._state, self._last = self._engine.emit(self._state)
                self._keep(texts_of(self._last))
            return copy.deepcopy(list(self._state.sent))

    @property
    def usage(self) -> HistoryUsage:
        """What was sent so far, and how much of it a provider's cache had."""
        return self._state.usage

    @property
    def last(self) -> Emission | None:
        """How the messages of the last call came about."""
        return self._last

    def __len__(self) -> int:
        return len(self._state.messages)

    def _keep(self, texts: Sequence[str]) -> None:
        for text in texts:
            self.originals.put(text)

    def to_dict(self) -> dict[str, Any]:
        """A JSON value from which `from_dict` goes on with the same bytes; originals in memory are part of it.

        Raises:
            UserError: the tokenizer has no name by which it could be found again.
        """
        tokenizer = self.budget.tokenizer
        if isinstance(tokenizer, Tokenizer):
            raise UserError(f"tokenizer: found an object ({tokenizer.name}), expected a name or a path to be saved.")
        rules, state = self._engine.rules, self._state
        compaction = state.compaction
        options = {name: getattr(self.options, name) for name in self.options.__dataclass_fields__}
        options["caching"] = None if self.options.caching is None else rule_to_dict(self.options.caching)
        return {
            "version": 1,
            "budget": {"limit": self.budget.limit, "tokenizer": str(tokenizer)},
            "keep_last": rules.keep_last,
            "mask": rules.mask,
            "keep": list(rules.keep),
            "tools": list(self.tools),
            "options": options,
            "messages": list(state.messages),
            "sent": list(state.sent),
            "covered": state.covered,
            "usage": asdict(state.usage),
            "waste": state.waste,
            "compaction": None if compaction is None else {name: getattr(compaction, name) for name in _COUNTS},
            "originals": self.originals.in_memory(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, originals: Originals | None = None) -> History:
        """The inverse of `to_dict`.

        Raises:
            UserError: `data` has another shape.
        """
        try:
            options = dict(data["options"])
            if options["caching"] is not None:
                options["caching"] = CachingRule(**options["caching"])
            history = cls(
                TokenBudget(**data["budget"]),
                keep_last=data["keep_last"],
                mask=data["mask"],
                keep=data["keep"],
                tools=data["tools"],
                originals=originals,
                options=HistoryOptions(**options),
            )
            messages = tuple(check_messages(data["messages"]))
            sent, covered = tuple(check_messages(data["sent"])), int(data["covered"])
            usage, waste = HistoryUsage(**data["usage"]), float(data["waste"])
            counts = data["compaction"]
            compaction = None
            if counts is not None:
                tokens, steps, turns, shortened = (int(counts[name]) for name in _COUNTS)
                compaction = Compaction((), tokens, (), steps, turns, shortened)
            texts = cast("list[str]", list(data["originals"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"history: found another shape than `to_dict` gives ({error!r}).") from error
        history._keep(texts)
        history._state = State(messages, tuple(read_all(messages)), sent, covered, usage, waste, compaction)
        return history


def rules_of(keep_last: int, mask: bool, keep: Sequence[str], options: HistoryOptions) -> Rules:
    """The rules of compactions.

    Raises:
        UserError: a value outside its range, or a pattern that is none.
    """
    from agentopt.capsules.units._spans import find_keep

    check_keep_last(keep_last)
    find_keep("", keep)  # unusable patterns are named now, not in the middle of a run
    return Rules(keep_last, mask, options.extract, tuple(keep), options.query, options.room, options.seed)
