"""`LM`: what agents, judges and optimizers call. One client, wrapped in everything a client must not care about.

Order of the layers, outermost first: record of the call → structured output with one repair round → single-flight →
cache → spend guard → throttle → retries → timeout → client. Invariants: a cached reply spends nothing and is never
counted as a paid call; every try is metered when it ends, so a budget sees a storm of 429 while it lasts; nothing here
is bound to an event loop, so one `LM` serves several loops and threads at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from agentopt import graph
from agentopt.errors import UserError
from agentopt.graph import Usage
from agentopt.models._background import run_sync
from agentopt.models._cache import keep, look_up, shared_flights
from agentopt.models._call import Attempts, Call, LMSettings, reply_watch
from agentopt.models._errors import LMBadReply, LMError, LMRateLimit, LMTimeout
from agentopt.models._knowledge import adapter_version, check_adapter
from agentopt.models._messages import build, tools_of
from agentopt.models._patience import patient
from agentopt.models._protocol import Client, LMOptions, Reply, ReplyCache, Request
from agentopt.models._structured import match_choice, output_of, repair_turn
from agentopt.models._throttle import shared_throttles


class LM:
    """A language model with cache, throttle, retries, prices and recording around one client.

    Calls raise `LMError` (or a subclass), `BudgetExhausted` from the spend guard, and UserError for unusable arguments.
    """

    def __init__(
        self,
        client: Client,
        *,
        role: str = "agent",
        cache: ReplyCache | None = None,
        settings: LMSettings | None = None,
    ) -> None:
        settings = settings or LMSettings()
        self.role = role
        self.settings = settings if cache is None else replace(settings, cache=cache)
        self._client = client
        self._throttle = (settings.throttle or shared_throttles).of(client.name)
        self._keyed = bool(getattr(client, "cacheable", True))
        self._timed = not getattr(client, "own_timeout", client.deterministic)

    @property
    def client(self) -> Client:
        """The client behind it."""
        return self._client

    @property
    def name(self) -> str:
        """The client's name: provider, endpoint, model."""
        return self.client.name

    @property
    def deterministic(self) -> bool:
        """Whether replies are a pure function of the request."""
        return self.client.deterministic

    def _target(self) -> LM:
        return self

    # ---- the three calls

    async def complete(
        self,
        messages: Any = None,
        *,
        system: Any = None,
        user: Any = None,
        demos: Any = (),
        tools: Sequence[dict[str, Any]] | graph.Toolbox = (),
        output: Any = None,
        choices: Sequence[str] | None = None,
        options: LMOptions | None = None,
        knowledge: Any = None,
    ) -> Reply:
        """Ask once and return the reply.

        Args:
            messages: chat messages in OpenAI form, or a text.
            system: text or handle; alone it is sent as the user turn.
            user: text, handle, or content parts (`agentopt.models.image(...)`).
            demos: `{"input", "output"}` pairs (or a demos handle), shown as turns before the last user turn.
            tools: OpenAI function-tool objects, or an `ao.toolbox`.
            output: pydantic class, type or JSON schema; `Reply.parsed` has the value. One repair round.
            choices: `Reply.text` is exactly one of them. One repair round.
            options: how to sample; the LM's own options when None.
            knowledge: what `ao.knowledge(...)` gave, or a list of such. Documents and capsules are placed before the
                system text, unless the messages hold them already; an adapter is named in the request.
        """
        lm = self._target()
        call = lm._prepare((messages, system, user, demos, knowledge), tools, output, choices, options)
        with graph.operation("lm", kind="lm", inputs=call.prompt.inputs) as op:
            lm._note(op, call)
            try:
                reply = await lm._checked(call)
            finally:
                op.report(call.usage, call.cost)
            op.annotate(cached=reply.cached, finish_reason=reply.finish_reason)
            op.set_output(_recorded(reply))
        return reply

    def complete_sync(
        self,
        messages: Any = None,
        *,
        system: Any = None,
        user: Any = None,
        demos: Any = (),
        tools: Sequence[dict[str, Any]] | graph.Toolbox = (),
        output: Any = None,
        choices: Sequence[str] | None = None,
        options: LMOptions | None = None,
        knowledge: Any = None,
    ) -> Reply:
        """`complete` for synchronous code; also works where a loop is running (it blocks that loop meanwhile)."""
        lm = self._target()
        return run_sync(
            lambda: lm.complete(
                messages,
                system=system,
                user=user,
                demos=demos,
                tools=tools,
                output=output,
                choices=choices,
                options=options,
                knowledge=knowledge,
            )
        )

    async def stream(
        self,
        messages: Any = None,
        *,
        system: Any = None,
        user: Any = None,
        demos: Any = (),
        tools: Sequence[dict[str, Any]] | graph.Toolbox = (),
        options: LMOptions | None = None,
        knowledge: Any = None,
    ) -> AsyncGenerator[str, None]:
        """The reply's text in pieces. A cached reply comes in one piece; a finished stream is cached and recorded.

        Retries happen before the first piece only; `timeout` bounds the wait for each piece.
        """
        lm = self._target()
        call = lm._prepare((messages, system, user, demos, knowledge), tools, None, None, options)
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        # The record must be open around the work and never across a yield, so the work has a task of its own.
        task = asyncio.create_task(lm._pump(call, queue))
        try:
            while (piece := await queue.get()) is not None:
                yield piece
            await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])

    # ---- one call, step by step

    def _prepare(
        self,
        content: tuple[Any, Any, Any, Any, Any],
        tools: Sequence[dict[str, Any]] | graph.Toolbox,
        output: Any,
        choices: Sequence[str] | None,
        options: LMOptions | None,
    ) -> Call:
        if output is not None and choices is not None:
            raise UserError("a call takes output= or choices=, not both")
        if choices is not None and not choices:
            raise UserError("choices=: expected at least one text, found none")
        prompt = build(*content)
        named = prompt.knowledge
        check_adapter(self._client, named.adapter, named.folded)
        options = options or self.settings.options
        if options.temperature > 0 and options.seed is None:
            options = replace(options, seed=graph.draw_seed("lm"))
        wanted = None if output is None else output_of(output)
        request = Request(
            model=self._client.name,
            messages=prompt.messages,
            tools=tools_of(tools, prompt.specs),
            schema=None if wanted is None else wanted.schema,
            choices=None if choices is None else tuple(choices),
            options=options,
            adapter=named.adapter,
            adapter_version=adapter_version(named.adapter),
        )
        return Call(request, prompt, wanted)

    def _note(self, op: graph.Operation, call: Call) -> None:
        for spec in call.prompt.specs:
            graph.active_value(spec)  # the read belongs to this call
        if not op.recorded:
            return
        request = call.request
        options = request.options
        op.annotate(
            role=self.role,
            model=request.model,
            key=request.key(),
            messages=list(request.messages),
            choices=None if request.choices is None else list(request.choices),
            temperature=options.temperature,
            seed=options.seed,
        )
        if call.prompt.knowledge.specs:
            op.annotate(knowledge=call.prompt.knowledge.names, adapter=request.adapter)

    async def _checked(self, call: Call) -> Reply:
        """The reply in the wanted form, after at most one repair round."""
        request = call.request
        reply = await self._reply(call, request)
        try:
            return self._in_form(call, reply)
        except ValueError as error:
            if reply.tool_calls:
                return self._whole(call, reply)
            turn = repair_turn(str(error), schema=request.schema, choices=request.choices)
        repair = replace(
            request,
            messages=(
                *request.messages,
                {"role": "assistant", "content": reply.text},
                {"role": "user", "content": turn},
            ),
        )
        second = await self._reply(call, repair)
        try:
            return self._in_form(call, second)
        except ValueError as error:
            raise LMBadReply(
                f"{request.model} gave no usable reply, also after one repair round: {error}; "
                f"it said {second.text!r:.200}"
            ) from error

    def _in_form(self, call: Call, reply: Reply) -> Reply:
        choices = call.request.choices
        if choices is not None:
            text = match_choice(reply.text, choices)
            if text is None:
                raise ValueError(f"{reply.text!r:.80} is none of the choices {', '.join(map(repr, choices))}")
            reply = replace(reply, text=text)
        elif call.output is not None:
            reply = replace(reply, parsed=call.output.parse(reply.text))
        return self._whole(call, reply)

    @staticmethod
    def _whole(call: Call, reply: Reply) -> Reply:
        """The reply with what the whole call spent: failed tries and the repair round included."""
        return replace(reply, usage=call.usage, cost=call.cost, cached=reply.cached and not call.usage.tries)

    async def _reply(self, call: Call, request: Request) -> Reply:
        cache = self.settings.cache
        if not self._keyed:  # counted by itself, also when its owner in another process had it in a cache
            reply = await self._paid(call, request)
        else:
            reply = None
            while reply is None:
                reply = await self._shared(call, request, cache)
            if reply.cached:
                call.add(reply.usage, reply.cost)
        watch = reply_watch.get()
        if watch is not None:
            watch(request, reply)
        return reply

    async def _shared(self, call: Call, request: Request, cache: ReplyCache | None) -> Reply | None:
        """From the cache, from an equal request under way, or paid; None when the one who was paying gave up."""
        key = request.key()
        leader, flight = shared_flights.join(cache, key)
        if not leader:
            return await shared_flights.wait(flight)
        outcome: Reply | LMError | None = None
        try:
            outcome = None if cache is None else look_up(cache, key)
            if outcome is None:
                paid = await self._paid(call, request)
                if cache is not None:
                    await keep(cache, request, paid)
                outcome = paid
            return outcome
        except LMError as error:
            outcome = error
            raise
        finally:
            shared_flights.land(cache, key, outcome)

    async def _paid(self, call: Call, request: Request) -> Reply:
        """Tries until one succeeds or the retry policy says stop."""
        reply: Reply | None = None
        attempt = Attempts(self.settings, call, request)
        while reply is None:
            attempt.begin()
            try:
                reply = await self._once(request)
            except LMError as error:
                await attempt.failed(error)
        return attempt.succeeded(reply)

    async def _once(self, request: Request) -> Reply:
        client = self._client
        if client.deterministic:  # in this process: nothing to discover, and the engine has its own queue
            return await self._timely(request, client.send)
        throttle = self._throttle
        async with throttle.slot():
            try:
                reply = await self._timely(request, client.send)
            except LMRateLimit as error:
                throttle.limited(error.retry_after)
                raise
        throttle.succeeded()
        return reply

    async def _timely(self, request: Request, send: Callable[[Request], Any]) -> Any:
        """`send(request)`, or LMTimeout after the request's timeout."""
        if not self._timed:
            return await send(request)
        seconds = request.options.timeout
        with patient(seconds):
            return await send(request)
        raise LMTimeout(f"{request.model} gave no reply within {seconds:g} s", retryable=True)

    # ---- streaming

    async def _pump(self, call: Call, queue: asyncio.Queue[str | None]) -> None:
        try:
            with graph.operation("lm", kind="lm", inputs=call.prompt.inputs) as op:
                self._note(op, call)
                try:
                    reply = await self._streamed(call, queue)
                finally:
                    op.report(call.usage, call.cost)
                op.annotate(cached=reply.cached, streamed=True)
                op.set_output(reply.text)
        finally:
            queue.put_nowait(None)

    async def _streamed(self, call: Call, queue: asyncio.Queue[str | None]) -> Reply:
        request, cache = call.request, self.settings.cache if self._keyed else None
        reply = None if cache is None else look_up(cache, request.key())
        if reply is not None:
            queue.put_nowait(reply.text)
            call.add(reply.usage, reply.cost)
        else:
            reply = await self._paid_stream(call, queue)
            if cache is not None:
                await keep(cache, request, reply)
        watch = reply_watch.get()
        if watch is not None:
            watch(request, reply)
        return reply

    async def _paid_stream(self, call: Call, queue: asyncio.Queue[str | None]) -> Reply:
        request = call.request
        attempt = Attempts(self.settings, call, request)
        while True:
            attempt.begin()
            pieces: list[str] = []
            final = Reply("", usage=Usage(calls=1, tries=1), model=request.model)
            try:
                async with self._throttle.slot(), aclosing(_closable(self._client.stream(request))) as source:
                    while (item := await self._timely(request, lambda _, source=source: _next(source))) is not None:
                        if isinstance(item, Reply):
                            final = item
                            break
                        pieces.append(item)
                        queue.put_nowait(item)
            except LMError as error:
                if isinstance(error, LMRateLimit):
                    self._throttle.limited(error.retry_after)
                if pieces:
                    error.retryable = False
                await attempt.failed(error)
                continue
            self._throttle.succeeded()
            return attempt.succeeded(replace(final, text="".join(pieces)))


async def _next(source: AsyncIterator[str | Reply]) -> str | Reply | None:
    return await anext(source, None)


async def _closable(source: AsyncIterator[str | Reply]) -> AsyncGenerator[str | Reply, None]:
    try:
        async for item in source:
            yield item
    finally:
        if isinstance(source, AsyncGenerator):
            await source.aclose()


def _recorded(reply: Reply) -> Any:
    if reply.tool_calls:
        return {"text": reply.text, "tool_calls": [call.to_dict() for call in reply.tool_calls]}
    return reply.text
