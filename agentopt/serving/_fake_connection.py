"""One connection to the fake engine: its requests framed one after another, and each sent to what answers it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from agentopt.serving._fake_stream import GARBAGE, Script, Stream
from agentopt.serving._fake_wire import Shape, compact, embeddings, turns
from agentopt.serving._types import COUNT, EMBEDDINGS

if TYPE_CHECKING:
    from agentopt.serving.fake_engine import FakeEngine

OPEN = (
    *("/invocations", "/tokenize", "/detokenize", "/adapters", "/load", "/version", "/ping", "/metrics", "/docs"),
    *("/redoc", "/openapi.json", "/server_info", "/pooling", "/score", "/v1/score", "/rerank", "/v1/rerank"),
    *("/classify", "/sleep", "/wake_up", "/is_sleeping", "/reset_prefix_cache", "/collective_rpc"),
    *("/start_profile", "/stop_profile", "/inference/v1/generate"),
)
"""Routes that answer without a key."""
CLOSED = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Routes that ask for the engine's key and still are nothing for a client."""
_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 500: "Internal Server Error"}


@dataclass(frozen=True, slots=True)
class Received:
    """One request as it arrived."""

    method: str
    path: str
    """The whole target, query included."""
    headers: list[tuple[str, str]]
    """Lower-case names, in order, repeated ones kept."""
    body: bytes

    def header(self, name: str) -> str | None:
        """The first header of that name."""
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> dict[str, Any]:
        """The body as an object; empty when it is none."""
        try:
            value: Any = json.loads(self.body)
        except ValueError:
            return {}
        return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


class Connection(asyncio.Protocol):
    """Requests of one connection, one after another, framed by Content-Length or chunks."""

    transport: asyncio.Transport

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._buffer = b""
        self._need = 0
        self._busy = False
        self._stream: Stream | None = None
        self._timers: set[asyncio.TimerHandle] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._engine.joined(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.left(self)
        for timer in self._timers:
            timer.cancel()
        if self._stream is not None:
            self._stream.stop()
            self._engine.running -= 1
            self._stream = None

    def pause_writing(self) -> None:
        if self._stream is not None:
            self._stream.pause()

    def resume_writing(self) -> None:
        if self._stream is not None:
            self._stream.resume()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= self._need:
            self._next()

    def _next(self) -> None:
        while not self._busy and not self.transport.is_closing():
            try:
                taken = take_request(self._buffer)
            except ValueError as error:
                self._json(400, _error(400, str(error)))
                self.transport.close()
                return
            if isinstance(taken, int):  # ask again when there is more
                self._need = taken
                return
            request, self._buffer = taken
            self._need = 0
            self._engine.requests.append(request)
            self._engine.count += 1
            self._busy = True
            self._answer(request)

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        if seconds <= 0:
            call()
            return
        timer = asyncio.get_running_loop().call_later(seconds, call)
        self._timers = {one for one in self._timers if not one.cancelled() and one.when() > time.monotonic()} | {timer}

    def _answer(self, request: Received) -> None:
        path = request.path.partition("?")[0]
        token = self._engine.address.token
        private = path.startswith("/v1/") and path not in OPEN
        if private and token is not None and request.header("authorization") != f"Bearer {token}":
            self._json(401, {"error": "Unauthorized"})
        elif path == "/health":
            self._send(200 if self._engine.settings.healthy else 503, b"")
        elif path == "/control" and self._engine.control:
            self._controlled(request)
        elif path in OPEN or path.startswith("/adapters/"):
            self._open_route(path, request)
        elif path == "/v1/models":
            self._json(200, self._engine.models())
        elif path in CLOSED and request.method == "POST":
            self._adapter(path, request.json())
        elif path in self._engine.routes and request.method == "POST":
            script = self._engine.script_of(request.json())
            self._later(script.wait, lambda: self._reply(path, request.json(), script))
        else:
            self._json(404, {"detail": "Not Found"})

    def _controlled(self, request: Received) -> None:
        if request.method == "POST":
            self._engine.steer(request.json())
        got = [[one.method, one.path, one.headers, one.json()] for one in self._engine.requests]
        self._json(200, {"count": self._engine.count, "requests": got[-100:], "loads": self._engine.loads})

    def _open_route(self, path: str, request: Received) -> None:
        if path == "/metrics":
            self._send(200, self._engine.metrics().encode(), b"text/plain; version=0.0.4")
        elif path == "/openapi.json":
            self._json(200, self._engine.openapi())
        else:
            self._json(200, {"open": path, "method": request.method, "version": "fake"})

    def _adapter(self, path: str, body: dict[str, Any]) -> None:
        engine, name = self._engine, str(body.get("lora_name") or "")
        if path == CLOSED[1]:
            if engine.adapters.pop(name, None) is None:
                self._json(404, _error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError"))
            else:
                engine.loads.append("-" + name)
                self._send(200, f"Success: LoRA adapter '{name}' removed successfully.".encode(), b"text/plain")
            return
        self._later(engine.settings.load_seconds, lambda: self._load(name, str(body.get("lora_path") or "")))

    def _load(self, name: str, folder: str) -> None:
        engine, settings = self._engine, self._engine.settings
        if not name or not folder or name in engine.adapters:
            self._json(400, _error(400, f"The lora adapter '{name}' has already been loaded or lacks a path."))
        elif settings.load_status != 200:
            self._json(settings.load_status, _error(settings.load_status, f"Loading lora {name} failed."))
        elif settings.slots is not None and len(engine.adapters) >= settings.slots:
            self._json(400, _error(400, f"No slot is free for lora {name}."))
        else:
            engine.adapters[name] = folder
            engine.loads.append("+" + name)
            self._send(200, f"Success: LoRA adapter '{name}' added successfully.".encode(), b"text/plain")

    def _reply(self, route: str, body: dict[str, Any], script: Script) -> None:
        engine = self._engine
        model = str(body.get("model") or engine.model)
        if script.garbage:
            self.transport.write(GARBAGE)
            self.transport.close()
        elif script.status:
            self._json(script.status, _error(script.status, "The fake engine was told to fail.", "InternalServerError"))
        elif model != engine.model and model not in engine.adapters:
            self._json(404, _error(404, f"The model `{model}` does not exist.", "NotFoundError"))
        elif route == EMBEDDINGS:
            self._json(200, embeddings(body, model))
        else:
            self._generate(route, body, script, model)

    def _generate(self, route: str, body: dict[str, Any], script: Script, model: str) -> None:
        engine, told = self._engine, turns(route, body)
        prompt_tokens = sum(len(text.split()) for text in told)
        if route == COUNT:
            self._json(200, {"input_tokens": prompt_tokens})
            return
        words = words_of(script.text if script.text is not None else (told or [""])[-1], script.chunks)
        limits = [body.get(name) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")]
        limit = min([one for one in limits if isinstance(one, int)], default=len(words))
        shape = Shape(route, model, f"fake-{engine.count:08d}", prompt_tokens, tool=script.tool)
        shape.finish = "length" if limit < len(words) else "stop"
        words = words[: max(0, limit)]
        options: Any = body.get("stream_options") or {}
        shape.include_usage = options.get("include_usage") is True
        engine.prompt_tokens += prompt_tokens
        engine.running += 1
        self._stream = Stream(self.transport, shape, words, script)
        self._stream.done = self._streamed
        self._stream.hold = engine.hold
        if body.get("stream") is True:
            self._stream.start()
        else:
            seconds = len(words) / script.rate if script.rate else 0.0
            stream = self._stream

            def whole() -> None:
                if self._stream is stream:  # else the client hung up
                    self._whole(shape, words, script)

            self._later(seconds, whole if script.hold_after is None else lambda: engine.hold(whole))

    def _streamed(self, words: int) -> None:
        self._engine.running -= 1
        self._engine.completion_tokens += words
        self._stream = None
        self._busy = False
        asyncio.get_running_loop().call_soon(self._next)

    def _whole(self, shape: Shape, words: list[str], script: Script) -> None:
        if script.exit_after is not None:
            os._exit(9)
        if script.hang_after is not None:
            return
        if script.die_after == 0:
            self.transport.abort()
            return
        body = b"{not json" if script.not_json else compact(shape.whole(len(words), "".join(words)))
        if script.die_after is not None:
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
            self.transport.write(b"content-length: %d\r\n\r\n%b" % (len(body), body[: len(body) // 2]))
            self.transport.close()
            return
        self._engine.completion_tokens += len(words)
        self._engine.running -= 1
        self._stream = None
        self._send(200, body, b"application/json")

    def _json(self, status: int, value: Any) -> None:
        self._send(status, compact(value), b"application/json")

    def _send(self, status: int, body: bytes, kind: bytes = b"text/plain") -> None:
        reason = _REASONS.get(status, "Status").encode()
        head = b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\nserver: fake\r\n" % (status, reason, kind)
        self.transport.write(b"%bset-cookie: engine=1\r\ncontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        self._busy = False
        asyncio.get_running_loop().call_soon(self._next)


def words_of(text: str, chunks: int = 0) -> list[str]:
    """The text in words that each keep the space before them; repeated or cut to `chunks` when that is not 0."""
    words: list[str] = []
    for word in text.split(" "):
        words.append((" " if words else "") + word)
    if not chunks:
        return words
    return [(words[0] if place == 0 else " " + words[place % len(words)].lstrip()) for place in range(chunks)]


def take_request(data: bytes) -> tuple[Received, bytes] | int:
    """The first request in `data` and what follows it; while it is not whole, how many bytes it has at least.

    Raises:
        ValueError: it is no HTTP/1.1 request.
    """
    head, found, rest = data.partition(b"\r\n\r\n")
    if not found:
        return 0
    first, *lines = head.decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise ValueError(f"not a request line: {first[:80]!r}")
    headers = [(name.strip().lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    named = dict(headers)
    if "chunked" in named.get("transfer-encoding", ""):
        taken = _unchunk(rest)
    else:
        length = int(named.get("content-length", "0"))
        if len(rest) < length:
            return len(data) - len(rest) + length
        taken = rest[:length], rest[length:]
    return (Received(parts[0], parts[1], headers, taken[0]), taken[1]) if taken else 0


def _unchunk(data: bytes) -> tuple[bytes, bytes] | None:
    body = b""
    while True:
        size, found, rest = data.partition(b"\r\n")
        if not found:
            return None
        length = int(size.partition(b";")[0], 16)
        if len(rest) < length + 2:
            return None
        if length == 0:
            return body, rest[2:]
        body, data = body + rest[:length], rest[length + 2 :]


def _error(status: int, message: str, kind: str = "BadRequestError") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
