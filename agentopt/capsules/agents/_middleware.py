"""`CapsuleLM`: a language model that compresses what it is sent, live, within the promises of the capsulator.

It stands wherever a client stands. Below the budget nothing is changed; above it, the messages of the request are
compacted as an append-only history: tools, schemas, choices, calls and ids are never touched, and the same messages
always give the same bytes, whatever was asked before and in whichever process, so replies may be cached. What a
conversation looked like before is remembered by its beginning, which saves work and decides nothing.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, cast

import anyio.to_thread

from agentopt import graph
from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules.agents._compact import LAST_USER
from agentopt.capsules.agents._counter import Counter
from agentopt.capsules.agents._history import Emission, Engine, HistoryOptions, State, rules_of, texts_of
from agentopt.capsules.agents._originals import Originals
from agentopt.capsules.counting._parts import check_messages
from agentopt.capsules.counting._tokenizers import resolve_tokenizer
from agentopt.capsules.counting._tokens import TokenBudget
from agentopt.capsules.gating._caching import CachingRule, default_caching
from agentopt.errors import UserError
from agentopt.models import LM, Client, LMSettings, PriceTable, Reply, Request, UnknownModel, connect, default_prices
from agentopt.models._doubles import DirectLM
from agentopt.models._knowledge import adapter_problem

LiveMode = Literal["auto", "mask", "extract"]
_MODES = ("auto", "mask", "extract")
_VERSION = 1  # part of the name, which is part of every cache key
_REMEMBERED = 256  # conversations
_ENGINES = 32  # sets of tools
_LONG = 200_000  # characters from which the work leaves the event loop


@dataclass(frozen=True)
class LiveOptions:
    """Everything about a `CapsuleLM` that has a sensible default.

    Raises:
        UserError: a value outside its range.
    """

    keep_last: int = 3
    """How many of the last steps stay as they are."""
    longest: int | None = None
    """Tool results and user turns with more tokens are shortened when they come in; None for never."""
    room: float = 0.25
    """The share of the budget that an epoch leaves free where it can."""
    caching: CachingRule | None = None
    """How the provider caches; None for the shipped rule of the model's provider."""
    prices: PriceTable | None = None
    """Says which models have a known price; the shipped table when None."""
    dearer: Literal["compress", "pass"] = "compress"
    """Over the budget, when compressing costs more than it saves at known prices: hold the budget, or (where the budget
    is about money alone) send what is longer."""
    originals: Originals | None = None
    """Where what leaves is kept; in memory when None, so give a process that runs for long one with a store."""
    seed: int = 0

    def __post_init__(self) -> None:
        HistoryOptions(longest=self.longest, room=self.room, dearer=self.dearer)


@dataclass(frozen=True, slots=True)
class LiveReport:
    """What a `CapsuleLM` did, summed over requests; tokens of its budget's tokenizer."""

    requests: int = 0
    unchanged: int = 0
    compressed: int = 0
    passed: int = 0
    """Over the budget, sent as they were: compressing would have cost more than it saves."""
    infeasible: int = 0
    """Over the budget, and what must stay does not fit."""
    original_tokens: int = 0
    tokens: int = 0
    read: int = 0
    """Of `tokens`: expected in the provider's cache, because they were sent before in the same conversation."""
    epochs: int = 0
    """Requests in which what was sent before was rewritten."""
    masked: int = 0
    """Tool results that were shown as a line, over requests."""
    steps: int = 0
    """Steps that were left out, over requests."""
    turns: int = 0
    shortened: int = 0
    """Messages that were shown without some of their units, over requests."""

    def plus(self, other: LiveReport) -> LiveReport:
        """The sum."""
        return LiveReport(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def to_dict(self) -> dict[str, int]:
        """A JSON value."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class _Known:
    """A conversation up to one request: before and after it was sent."""

    before: State
    after: State
    emission: Emission


class CapsuleLM(DirectLM):
    """A client that compresses its requests before another client sends them. Safe to use concurrently.

    Args:
        model: a model spec, a client, or an `LM` (its client is used, and its settings for direct calls).
        budget: the most tokens that the messages, tools and schema of a request may have.
        keep: regular expressions; what they match is never dropped.
        query: what old prose is valued by: "last user turn", a text, or None.
        mode: "mask" only masks old tool results and leaves out old steps; "extract" shortens texts instead of masking;
            "auto" masks first.
        history: treat requests as an append-only history, so that what was sent stays in the provider's cache; False
            compresses each request for itself.
        on_infeasible: when what must stay does not fit, raise BudgetInfeasible, or send the request as it is.
        options: everything else.

    Raises:
        UserError: an unusable argument.
    """

    def __init__(
        self,
        model: str | Client | LM,
        budget: TokenBudget,
        *,
        keep: Sequence[str] = (),
        query: str | None = LAST_USER,
        mode: LiveMode = "auto",
        history: bool = True,
        on_infeasible: Literal["raise", "pass"] = "raise",
        options: LiveOptions | None = None,
    ) -> None:
        if mode not in _MODES:
            raise UserError(f"mode: found {mode!r}, expected one of {', '.join(_MODES)}.")
        if on_infeasible not in ("raise", "pass"):
            raise UserError(f"on_infeasible: found {on_infeasible!r}, expected 'raise' or 'pass'.")
        self.options = options or LiveOptions()
        self.budget = budget
        self.originals = self.options.originals or Originals(tokenizer=budget.tokenizer)
        self._settings = model.settings if isinstance(model, LM) else LMSettings()
        self._how = HistoryOptions(
            extract=mode != "mask",
            query=query,
            longest=self.options.longest,
            room=self.options.room,
            early=False,
            seed=self.options.seed,
        )
        self._rules = rules_of(self.options.keep_last, mode != "extract", keep, self._how)
        self._history = history
        self._pass_infeasible = on_infeasible == "pass"
        self._report = LiveReport()
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        self._lock = threading.Lock()
        self._model: str | Client = model.client if isinstance(model, LM) else model
        self._client: Client | None = None
        try:
            self._adopt(connect(self._model))
        except UnknownModel:  # a key may be set later: as with any spec, the first call tells
            self._adopt(None)

    def _adopt(self, client: Client | None) -> None:
        """Take what depends on the client behind it; compressing is a pure function, so the rest is as it is there."""
        behind = str(self._model) if client is None else client.name
        prices = self.options.prices or default_prices()
        self._how = replace(
            self._how,
            caching=self.options.caching or default_caching().of(behind),
            dearer=self.options.dearer if prices.of(behind) is not None else "compress",
        )
        self.name = f"capsule:{self._digest()}#{behind}"
        self.deterministic = client is not None and client.deterministic
        self.cacheable = bool(getattr(client, "cacheable", True))
        self.own_timeout = bool(getattr(client, "own_timeout", self.deterministic))
        self.sequential = bool(getattr(client, "sequential", False))
        self._client = client

    # ---- a client

    @property
    def client(self) -> Client:
        """The client that sends what was compressed.

        Raises:
            UnknownModel: the spec names no reachable model.
        """
        if self._client is None:
            self._adopt(connect(self._model))
        return cast("Client", self._client)

    async def send(self, request: Request) -> Reply:
        """One try with the compressed request.

        Raises:
            BudgetInfeasible: what must stay does not fit, and `on_infeasible` is "raise".
        """
        return await self.client.send(await self._compressed(request))

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        """The reply to the compressed request, in pieces.

        Raises:
            BudgetInfeasible: what must stay does not fit, and `on_infeasible` is "raise".
        """
        source = self.client.stream(await self._compressed(request))
        if isinstance(source, AsyncGenerator):
            async with aclosing(cast("AsyncGenerator[str | Reply, None]", source)):
                async for piece in source:
                    yield piece
        else:
            async for piece in source:
                yield piece

    def adapter_problem(self, adapter: str) -> str | None:
        """What the client behind it says."""
        return adapter_problem(self.client, adapter)

    async def aclose(self) -> None:
        """Close the client behind it."""
        if self._client is not None:
            await self._client.aclose()

    @cached_property
    def _direct(self) -> LM:
        return LM(self, settings=self._settings)

    # ---- what it does

    def report(self) -> LiveReport:
        """What was done so far."""
        with self._lock:
            return self._report

    def compress(self, request: Request) -> Request:
        """The request as it is sent.

        Raises:
            BudgetInfeasible: what must stay does not fit, and `on_infeasible` is "raise".
        """
        messages = check_messages(request.messages)
        engine, place = self._engine(request)
        with graph.operation("capsule", kind="op") as op:
            try:
                emission = self._emission(engine, place, messages)
            except BudgetInfeasible as error:
                self._count(LiveReport(requests=1, infeasible=1))
                op.annotate(limit=error.limit, minimum=error.minimum, infeasible=True)
                if not self._pass_infeasible:
                    raise
                return replace(request, model=self.client.name)
            done = _report_of(emission, messages)
            self._count(done)
            op.annotate(limit=self.budget.limit, **{name: value for name, value in done.to_dict().items() if value})
        for text in texts_of(emission) if not self._history else ():
            self.originals.put(text)
        if done.unchanged:  # also bytes that only equal: what was given is what is sent
            return replace(request, model=self.client.name)
        return replace(request, model=self.client.name, messages=emission.messages)

    async def _compressed(self, request: Request) -> Request:
        if sum(len(str(message.get("content"))) for message in request.messages) < _LONG:
            return self.compress(request)
        return await anyio.to_thread.run_sync(self.compress, request)

    def _emission(self, engine: Engine, place: str, messages: list[dict[str, Any]]) -> Emission:
        if not self._history:
            state = State()
            for message in messages:
                state, texts = engine.append(replace(state, covered=len(state.messages)), message)
                self._keep(texts)
            return engine.emit(replace(state, covered=0))[1]
        keys = _chain(place, messages)
        with self._lock:
            known = self._known.get(keys[-1])
            if known is not None:
                self._known.move_to_end(keys[-1])
                return known.emission
            start, state = self._nearest(keys, messages)
        for message in messages[start:]:
            state, texts = engine.append(state, message)
            self._keep(texts)
        after, emission = engine.emit(state)
        self._keep(texts_of(emission))
        with self._lock:
            self._known[keys[-1]] = _Known(state, after, emission)
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return emission

    def _nearest(self, keys: Sequence[str], messages: Sequence[dict[str, Any]]) -> tuple[int, State]:
        """The longest beginning that is known, and the state after it.

        The state in which it was sent counts only where an assistant turn follows: that is what the messages alone say.
        """
        for count in range(len(keys) - 1, 0, -1):
            known = self._known.get(keys[count - 1])
            if known is not None:
                return count, known.after if messages[count]["role"] == "assistant" else known.before
        return 0, State()

    def _engine(self, request: Request) -> tuple[Engine, str]:
        """What compacts requests with these tools and this schema, and the beginning of their conversations' keys."""
        more = "" if request.schema is None else json.dumps(request.schema)
        more += "" if request.choices is None else json.dumps(request.choices)
        place = hashlib.sha256(json.dumps([request.tools, more], default=str).encode()).hexdigest()
        with self._lock:
            engine = self._engines.get(place)
            if engine is None:
                counter = Counter(self.budget, request.tools, more)
                engine = self._engines[place] = Engine(counter, self._rules, self._how)
                while len(self._engines) > _ENGINES:
                    self._engines.popitem(last=False)
            self._engines.move_to_end(place)
            return engine, place

    def _keep(self, texts: Sequence[str]) -> None:
        for text in texts:
            self.originals.put(text)

    def _count(self, more: LiveReport) -> None:
        with self._lock:
            self._report = self._report.plus(more)

    def _digest(self) -> str:
        """Of everything that decides what is sent for a request: two that differ never share cached replies."""
        tokenizer = resolve_tokenizer(self.budget.tokenizer).name
        parts = [_VERSION, self.budget.limit, tokenizer, repr(self._rules), repr(self._how), self._history]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _chain(place: str, messages: Sequence[dict[str, Any]]) -> list[str]:
    """For each number of messages, a key of the conversation up to there."""
    keys: list[str] = []
    for message in messages:
        text = json.dumps(message, sort_keys=True, default=str)
        place = hashlib.sha256(f"{place}{text}".encode()).hexdigest()
        keys.append(place)
    return keys


def _report_of(emission: Emission, messages: Sequence[dict[str, Any]]) -> LiveReport:
    changed = list(emission.messages) != list(messages)
    what = emission.compaction if changed else None
    return LiveReport(
        requests=1,
        unchanged=int(not changed and not emission.passed),
        compressed=int(changed and not emission.passed),
        passed=int(emission.passed),
        original_tokens=emission.original_tokens,
        tokens=emission.tokens,
        read=emission.read,
        epochs=int(bool(emission.epoch)),
        masked=0 if what is None else len(what.masked),
        steps=0 if what is None else what.steps,
        turns=0 if what is None else what.turns,
        shortened=0 if what is None else what.shortened,
    )
