"""The gateway: an ASGI application between clients and one engine.

A request passes: route, key, the key's limits, the engine's phase, body, model, rewriting, forwarding; each step may
refuse it with one sentence. The engine's request is built anew: of the client's only the checked body goes through.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterable, MutableMapping
from contextlib import suppress
from typing import Any, cast
from urllib.parse import unquote

from agentopt.serving._types import (
    FORWARDED,
    Catalog,
    Engine,
    Exchange,
    FeedbackSink,
    Key,
    Keyring,
    Observer,
    Phase,
    Refusal,
)
from agentopt.serving.gateway import _parse as parse
from agentopt.serving.gateway._bodies import Bodies, Gone
from agentopt.serving.gateway._client import Upstream
from agentopt.serving.gateway._doors import Doors, check_host
from agentopt.serving.gateway._errors import broken, draining, unready
from agentopt.serving.gateway._fields import check_fields
from agentopt.serving.gateway._forward import Answer, Flight, Send, carry, charged
from agentopt.serving.gateway._limits import Limits
from agentopt.serving.gateway._own import Receive, cross_origin, json_reply, lifespan, only, preflight, unknown
from agentopt.serving.gateway._prepare import adds_usage, choose, rewritten
from agentopt.serving.gateway._wire import UpstreamError
from agentopt.serving.keys import may_ask

Scope = MutableMapping[str, Any]

MODELS, FEEDBACK, HEALTH, READY = "/v1/models", "/v1/feedback", "/health", "/ready"
_READS = "GET, HEAD"
_KNOWN = FORWARDED | {MODELS, FEEDBACK, HEALTH, READY}
"""What stands in logs and metrics as it is."""


class Gateway:
    """The ASGI application. One per event loop.

    Args:
        engine: Where requests go.
        catalog: What names mean.
        keyring: Who may ask; None: everybody.
        observers: Told of each exchange on a forwarded route, also of refused ones (their `sent` is empty then).
            Those with `aside(exchange)` are told of all other requests, those with `refused(code)` of refusals.
        feedback: Where feedback goes; None: there is no such route.
        limits: All bounds.
    """

    def __init__(
        self,
        engine: Engine,
        catalog: Catalog,
        *,
        keyring: Keyring | None = None,
        observers: Iterable[Observer] = (),
        feedback: FeedbackSink | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.engine = engine
        self.catalog = catalog
        self.keyring = keyring
        self.observers = tuple(observers)
        self.feedback = feedback
        self.limits = limits or Limits()
        self.draining = False
        """Nothing new is taken."""
        self._doors = Doors(keyring, self.limits)
        self._upstream = Upstream(connect_seconds=self.limits.connect_seconds)
        self._flights: set[Flight] = set()
        self._bodies = Bodies(self.limits)
        self._timer: asyncio.TimerHandle | None = None
        self._empty: asyncio.Event | None = None
        if keyring is not None:
            keyring.watch(self.drop)

    @property
    def in_flight(self) -> int:
        """Requests that are being forwarded or wait to be."""
        return len(self._flights)

    def drop(self, key_id: str) -> None:
        """End all requests of a key: it was revoked."""
        for flight in list(self._flights):
            if flight.exchange.key is not None and flight.exchange.key.id == key_id:
                flight.stop("key_revoked")

    async def drain(self, seconds: float) -> bool:
        """Take nothing new, and wait for what is under way; says whether all of it ended by itself.

        Args:
            seconds: What is still under way then is ended with an error event.
        """
        self.draining = True
        if not self._flights:
            return True
        self._empty = self._empty or asyncio.Event()  # a second drain must not take the first one's place
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._empty.wait()
                return True
        for flight in list(self._flights):
            flight.stop("draining")
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.grace_seconds):
                await self._empty.wait()
        return False

    def close(self) -> None:
        """Close the connections to the engine; call it in the loop, after `drain`."""
        self._upstream.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---- one request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        client = scope.get("client")
        route = path if path in _KNOWN else "other"
        exchange = Exchange(f"req_{secrets.token_hex(16)}", route, client[0] if client else "")
        answer = Answer(exchange, send, self.limits, [(b"connection", b"close")] if self.draining else [])
        try:
            headers = parse.headers_of(scope["headers"])
            exchange.client_request_id = parse.label(headers.get("x-request-id"))
            cross_origin(headers.get("origin"), self.limits.cors, answer)
            await self._route(scope, headers, receive, answer)
        except Refusal as refusal:
            await self._fail(answer, refusal)
        except Gone:
            exchange.status, exchange.error = 499, "client_gone"
        finally:
            exchange.ended = time.monotonic()
            self._tell(exchange, answer)

    async def _fail(self, answer: Answer, refusal: Refusal) -> None:
        exchange = answer.exchange
        if exchange.error is None:
            exchange.error = refusal.code or refusal.kind
        for observer in self.observers:
            refused = getattr(observer, "refused", None)
            if refused is not None:
                refused(exchange.error)
        await answer.fail(refusal)

    def _tell(self, exchange: Exchange, answer: Answer) -> None:
        if exchange.route in FORWARDED:
            reply = answer.kept
            for observer in self.observers:
                observer.ended(exchange, reply)
        else:
            for observer in self.observers:
                aside = getattr(observer, "aside", None)
                if aside is not None:
                    aside(exchange)

    async def _route(self, scope: Scope, headers: dict[str, str], receive: Receive, answer: Answer) -> None:
        exchange, method, path = answer.exchange, cast("str", scope["method"]), cast("str", scope["path"])
        if method == "OPTIONS" and self.limits.cors:
            await preflight(answer, headers)
        elif path in (HEALTH, READY):
            only(method, _READS)
            await self._state(path, answer, method)
        elif not path.startswith("/v1/"):
            raise unknown(path)
        else:
            if self.keyring is None:
                server = scope.get("server")
                check_host(headers.get("host", ""), server[0] if server else "", self.limits)
            exchange.key = self._doors.key(path, headers, exchange.client, time.monotonic())
            await self._inside(path, method, headers, receive, answer)

    async def _inside(self, path: str, method: str, headers: dict[str, str], receive: Receive, answer: Answer) -> None:
        """Behind the door: everything under /v1."""
        exchange = answer.exchange
        if path in FORWARDED:
            only(method, "POST")
            await self._exchange(headers, receive, answer)
        elif path == MODELS:
            only(method, _READS)
            await json_reply(answer, {"object": "list", "data": self._entries(exchange.key)}, method)
        elif path.startswith(MODELS + "/"):
            exchange.route = MODELS + "/{id}"
            only(method, _READS)
            await self._model(unquote(path.removeprefix(MODELS + "/")), answer, method)
        elif path == FEEDBACK and self.feedback is not None:
            only(method, "POST")
            parse.json_type(headers)
            with self._bodies.share() as share:
                raw = await self._bodies.read(share, headers, receive)
                exchange.bytes_in = len(raw)
                body = await parse.read_body(raw, nesting=self.limits.nesting)
            await json_reply(answer, await self.feedback.give(body, exchange.key), method)
        else:
            raise unknown(path)

    async def _state(self, path: str, answer: Answer, method: str) -> None:
        phase = self.engine.phase
        ready = phase is Phase.READY and not self.draining
        if path == READY and not ready:
            state = "draining" if self.draining else str(phase)
            await json_reply(answer, {"status": "not ready", "engine": state}, method, 503, (b"retry-after", b"5"))
        else:
            await json_reply(answer, {"status": "ready" if path == READY else "ok"}, method)

    def _entries(self, key: Key | None) -> list[dict[str, Any]]:
        return [entry for entry in self.catalog.entries() if key is None or may_ask(key, entry["id"])]

    async def _model(self, name: str, answer: Answer, method: str) -> None:
        for entry in self._entries(answer.exchange.key):
            if entry["id"] == name:
                await json_reply(answer, entry, method)
                return
        raise Refusal(404, f"there is no model {name[:200]!r}; GET /v1/models lists them", code="model_not_found")

    # ---- forwarding

    async def _exchange(self, headers: dict[str, str], receive: Receive, answer: Answer) -> None:
        """Everything on a forwarded route, between the key's `admit` and its `release`."""
        exchange, keyring, limits = answer.exchange, self.keyring, self.limits
        exchange.session = parse.session_of(headers.get("x-agentopt-session"))
        opted = headers.get("x-agentopt-capture")
        exchange.capture = opted is None or opted.lower() == "on"
        if keyring is not None and exchange.key is not None:
            keyring.admit(exchange.key)
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        flight = Flight(exchange, task, time.monotonic() + limits.total_seconds)
        try:
            self._can_take(exchange.route)
            parse.json_type(headers)
            self._flights.add(flight)
            self._watch()
            await self._fly(flight, headers, receive, answer)
        except asyncio.CancelledError:
            if flight.stopped is None:
                raise
            task.uncancel()
            flight.landed = True
            await self._stopped(flight.stopped, answer)
        finally:
            flight.landed = True
            self._flights.discard(flight)
            if not self._flights and self._empty is not None:
                self._empty.set()
            if keyring is not None and exchange.key is not None:
                keyring.release(exchange.key, charged(exchange, answer.written))

    def _can_take(self, route: str) -> None:
        if self.draining:
            raise draining()
        phase = self.engine.phase
        if phase is not Phase.READY:
            raise unready(phase)
        if route not in self.engine.abilities.routes:
            known = ", ".join(sorted(self.engine.abilities.routes))
            raise Refusal(
                501, f"the engine ({self.engine.name}) does not have {route}; it has {known}", code="not_supported"
            )
        if len(self._flights) >= self.limits.in_flight:
            raise Refusal(
                503,
                "the server has too many requests under way; try again shortly",
                kind="server_error",
                code="overloaded",
                retry_after=2,
            )

    async def _fly(self, flight: Flight, headers: dict[str, str], receive: Receive, answer: Answer) -> None:
        """Read the body, choose the model, forward. The client is told of every failure of the engine."""
        exchange, limits = flight.exchange, self.limits
        with self._bodies.share() as share:
            raw = await self._bodies.read(share, headers, receive)
            exchange.bytes_in = len(raw)
            abilities = self.engine.abilities
            body = await parse.read_body(raw, nesting=limits.nesting)
            check_fields(exchange.route, body, len(raw), limits)
            choice = choose(body, exchange, self.catalog, abilities)
            answer.finish = choice.finish
            sent = rewritten(raw, choice, exchange, abilities)
            if self.feedback is not None:
                exchange.notes["X-Agentopt-Feedback"] = FEEDBACK
            if any([observer.wants_reply(exchange) for observer in self.observers]):
                answer.keep()
            watcher = asyncio.create_task(_hang_up(receive, flight))
            try:
                async with self.catalog.hold(choice):
                    await self._forward(sent, headers, answer)
                    flight.landed = True
            finally:
                watcher.cancel()

    async def _stopped(self, code: str, answer: Answer) -> None:
        answer.exchange.error = code
        if code == "client_gone":
            answer.exchange.status = 499
        else:
            await self._fail(answer, broken(code))

    async def _forward(self, sent: bytes, headers: dict[str, str], answer: Answer) -> None:
        exchange, limits, engine = answer.exchange, self.limits, self.engine
        fields = [
            ("content-type", "application/json"),
            ("accept", "text/event-stream" if exchange.stream else "application/json"),
            ("x-request-id", exchange.id),
        ]
        trace = parse.traceparent_of(headers.get("traceparent"))
        if trace is not None:
            fields.append(("traceparent", trace))
        reply = None
        try:
            reply = await self._upstream.request(
                engine.address,
                "POST",
                exchange.route,
                fields,
                sent,
                first=limits.first_seconds,
                idle=limits.idle_seconds,
            )
            await carry(reply, answer, cut_usage=adds_usage(exchange, engine.abilities))
        except UpstreamError as error:
            exchange.error = error.code
            engine.suspect(str(error))
            await self._fail(answer, broken(error.code))
        finally:
            if reply is not None:
                reply.close()

    # ---- time

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(0.5, self._look)

    def _look(self) -> None:
        self._timer = None
        now = time.monotonic()
        for flight in list(self._flights):
            if flight.deadline < now:
                flight.stop("timeout")
        if self._flights:
            self._watch()


async def _hang_up(receive: Receive, flight: Flight) -> None:
    """Waits for the client to go away, and ends the flight then."""
    while (await receive())["type"] != "http.disconnect":
        pass
    flight.stop("client_gone")
