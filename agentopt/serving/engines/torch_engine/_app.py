"""The HTTP side, a plain ASGI application: routes, the token, streams, and what happens when a client goes away."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from agentopt.errors import AgentoptError
from agentopt.serving._types import CHAT, COMPLETIONS, Refusal
from agentopt.serving.engines.torch_engine._sampling import Picked
from agentopt.serving.engines.torch_engine._shapes import Shapes, usage_of
from agentopt.serving.engines.torch_engine._wire import Ask, read_chat, read_completion
from agentopt.serving.engines.torch_engine._worker import Done, Failed, Job, Piece, Told, Worker

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
_LARGEST_BODY = 32 << 20
_PATIENCE = 60.0
"""Seconds that unloading an adapter waits for its last reply."""
_JSON = [(b"content-type", b"application/json")]
_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


class EngineApp:
    """The server's application.

    Args:
        worker: runs the model.
        model: the name by which the base is asked.
        token: that every route but /health demands; None for none.
        adapters: whether adapters can be loaded.
    """

    def __init__(self, worker: Worker, model: str, *, token: str | None, adapters: bool) -> None:
        self.worker, self.model = worker, model
        self._token = None if token is None else f"Bearer {token}".encode()
        self._created = int(time.time())
        self._routes: dict[tuple[str, str], Callable[[bytes, Receive, Send], Awaitable[None]]] = {
            ("GET", "/v1/models"): self._models,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/openapi.json"): self._openapi,
            ("POST", CHAT): self._chat,
            ("POST", COMPLETIONS): self._completion,
        }
        if adapters:
            self._routes["POST", "/v1/load_lora_adapter"] = self._load
            self._routes["POST", "/v1/unload_lora_adapter"] = self._unload

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        try:
            if scope["path"] == "/health":
                await self._reply(send, 200 if self.worker.alive else 503, {"status": "ok"})
                return
            self._check_token(scope)
            route = self._routes.get((scope["method"], scope["path"]))
            if route is None:
                raise Refusal(404, "There is no such route.")
            await route(await _body(receive), receive, send)
        except Refusal as refusal:
            await self._reply(send, refusal.status, refusal.body())

    def _check_token(self, scope: Mapping[str, Any]) -> None:
        if self._token is None:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not hmac.compare_digest(given, self._token):
            raise Refusal(401, "The token is missing or wrong.", kind="authentication_error")

    async def _reply(self, send: Send, status: int, body: Mapping[str, Any]) -> None:
        text = json.dumps(body).encode()
        head = [*_JSON, (b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": text})

    # --- routes ------------------------------------------------------------------------------------------------------

    async def _models(self, body: bytes, receive: Receive, send: Send) -> None:
        head = {"object": "model", "created": self._created, "owned_by": "agentopt"}
        base = {**head, "id": self.model, "root": self.model, "parent": None, "max_model_len": self.worker.context}
        held = [
            {**head, "id": name, "root": str(folder), "parent": self.model}
            for name, folder in self.worker.slots.folders.items()
        ]
        await self._reply(send, 200, {"object": "list", "data": [base, *held]})

    async def _metrics(self, body: bytes, receive: Receive, send: Send) -> None:
        worker = self.worker
        lines = {
            "agentopt_engine_running": worker.running,
            "agentopt_engine_waiting": worker.waiting,
            "agentopt_engine_prompt_tokens_total": worker.read,
            "agentopt_engine_generation_tokens_total": worker.written,
        }
        kinds = {name: "counter" if name.endswith("_total") else "gauge" for name in lines}
        text = "".join(f"# TYPE {name} {kinds[name]}\n{name} {value}\n" for name, value in lines.items()).encode()
        head = [(b"content-type", b"text/plain; version=0.0.4"), (b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": text})

    async def _openapi(self, body: bytes, receive: Receive, send: Send) -> None:
        paths: dict[str, Any] = {}
        for method, path in self._routes:
            paths.setdefault(path, {})[method.lower()] = {"responses": {"200": {"description": "done"}}}
        about = {"title": "agentopt's engine over transformers", "version": "1"}
        await self._reply(send, 200, {"openapi": "3.1.0", "info": about, "paths": paths})

    async def _load(self, body: bytes, receive: Receive, send: Send) -> None:
        asked = _object(body)
        name, path = _text(asked, "lora_name"), Path(_text(asked, "lora_path"))
        if name == self.model:
            raise Refusal(400, f"The name {name!r:.160} is the base model's.")
        await self._between(lambda: self.worker.slots.load(name, path), f"The adapter {name!r:.160} is not loaded")
        await self._reply(send, 200, {"loaded": name})

    async def _unload(self, body: bytes, receive: Receive, send: Send) -> None:
        name = _text(_object(body), "lora_name")
        if name not in self.worker.slots.folders:
            raise Refusal(404, f"The adapter {name!r:.160} is not loaded.")
        until = time.monotonic() + _PATIENCE
        while self.worker.uses(name):  # a client that went away is noticed at the end of a step
            if time.monotonic() > until:
                raise Refusal(409, f"The adapter {name!r:.160} is in use.")
            await asyncio.sleep(0.02)
        await self._between(lambda: bool(self.worker.slots.unload(name)), "The adapter stays")
        await self._reply(send, 200, {"unloaded": name})

    async def _between(self, what: Callable[[], object], otherwise: str) -> None:
        def run() -> None:
            what()

        try:
            await asyncio.wrap_future(self.worker.call(run))
        except AgentoptError as error:
            raise Refusal(400, f"{otherwise}: {error}") from None

    async def _chat(self, body: bytes, receive: Receive, send: Send) -> None:
        asked = _object(body)
        await self._answer(lambda: read_chat(asked, self.worker.tokenizer, self.worker.context), receive, send)

    async def _completion(self, body: bytes, receive: Receive, send: Send) -> None:
        asked = _object(body)
        await self._answer(lambda: read_completion(asked, self.worker.tokenizer, self.worker.context), receive, send)

    # --- replies -----------------------------------------------------------------------------------------------------

    async def _answer(self, read: Callable[[], Ask], receive: Receive, send: Send) -> None:
        ask = await asyncio.to_thread(read)
        adapter = None if ask.model in ("", self.model) else ask.model
        if adapter is not None and adapter not in self.worker.slots.folders:
            raise Refusal(404, f"The model {adapter!r:.160} does not exist.", code="model_not_found", param="model")
        replies = _Replies(self.worker, ask, adapter)
        gone = asyncio.create_task(_until_gone(receive))
        gone.add_done_callback(lambda _: replies.cancel())
        try:
            if ask.stream:
                await self._stream(ask, replies, send)
            else:
                await self._whole(ask, replies, send)
        finally:
            replies.cancel()
            gone.cancel()

    async def _whole(self, ask: Ask, replies: _Replies, send: Send) -> None:
        shapes = Shapes(ask, self.worker.tokenizer)
        texts = [""] * replies.count
        picks: list[list[Picked]] = [[] for _ in texts]
        reasons = ["stop"] * replies.count
        async with aclosing(replies.told()) as told:
            async for index, one in told:
                if isinstance(one, Piece):
                    texts[index] += one.text
                    picks[index] += one.picks
                elif isinstance(one, Done):
                    reasons[index] = one.reason
                else:
                    raise Refusal(500, f"The engine could not write the reply ({one.why}).", kind="server_error")
        choices = [shapes.choice(index, texts[index], picks[index], reasons[index]) for index in range(replies.count)]
        await self._reply(send, 200, shapes.whole(choices, replies.usage))

    async def _stream(self, ask: Ask, replies: _Replies, send: Send) -> None:
        shapes = Shapes(ask, self.worker.tokenizer)
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM})

        async def event(body: Mapping[str, Any]) -> None:
            text = f"data: {json.dumps(body)}\n\n".encode()
            await send({"type": "http.response.body", "body": text, "more_body": True})

        if ask.chat:
            for index in range(replies.count):
                await event(shapes.event(index, "", first=True))
        async with aclosing(replies.told()) as told:
            async for index, one in told:
                if isinstance(one, Piece):
                    await event(shapes.event(index, one.text, one.picks))
                elif isinstance(one, Done):
                    await event(shapes.event(index, "", (), one.reason))
                else:
                    why = f"The engine could not write the reply ({one.why})."
                    await event(Refusal(500, why, kind="server_error").body())
        if ask.usage:
            await event(shapes.last(replies.usage))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


class _Replies:
    """The replies to one request, as the worker writes them."""

    def __init__(self, worker: Worker, ask: Ask, adapter: str | None) -> None:
        self.count = len(ask.prompts) * ask.replies
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Told]] = asyncio.Queue()
        self._tokens = 0
        self._prompt = sum(len(prompt) for prompt in ask.prompts)
        self._jobs: list[Job] = []
        for place, prompt in enumerate(ask.prompts):
            for number in range(ask.replies):
                self._submit(worker, ask, adapter, prompt, place * ask.replies + number, number)

    def _submit(
        self, worker: Worker, ask: Ask, adapter: str | None, prompt: list[int], index: int, number: int
    ) -> None:
        seed = ask.sampling.seed
        job = Job(
            prompt=prompt,
            # Several replies to one prompt with one seed would be the same.
            sampling=ask.sampling if seed is None else replace(ask.sampling, seed=seed + number),
            most=ask.most,
            tell=lambda told: self._tell(index, told),
            adapter=adapter,
            stops=ask.stops,
            grammar=ask.grammar,
            ignore_eos=ask.ignore_eos,
            continues=not ask.chat,
        )
        self._jobs.append(job)
        worker.submit(job)

    def _tell(self, index: int, told: Told) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, told))

    async def told(self) -> AsyncGenerator[tuple[int, Told]]:
        """All that is told until every reply has ended."""
        left = self.count
        while left:
            index, one = await self._queue.get()
            if isinstance(one, Done):
                self._tokens += one.tokens
            left -= isinstance(one, Done | Failed)
            yield index, one

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompts and of the replies that have ended."""
        return usage_of(self._prompt, self._tokens)

    def cancel(self) -> None:
        """Nobody waits any more: the worker drops what is not done."""
        for job in self._jobs:
            job.cancelled = True


async def _body(receive: Receive) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "The request broke off.")
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > _LARGEST_BODY:
            raise Refusal(413, f"The body has more than {_LARGEST_BODY} bytes.")
        if not message.get("more_body", False):
            return b"".join(pieces)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _object(body: bytes) -> dict[str, Any]:
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "The body is not JSON.") from None
    if not isinstance(found, dict):
        raise Refusal(400, "The body is no JSON object.")
    return cast("dict[str, Any]", found)


def _text(asked: Mapping[str, Any], key: str) -> str:
    found = asked.get(key)
    if not isinstance(found, str) or not found:
        raise Refusal(400, f"{key}: expected a text.", param=key)
    return found
