"""A loopback OpenAI-compatible chat server whose behaviour is a script; stdlib only, cheap enough to benchmark against.

In a test: `with FakeServer() as server:` runs it in a thread; `server.url` is the base URL, `server.script([...])` sets
what the next requests get, `server.requests` is what arrived. As a process of its own (for benchmarks):
`python tests/models/fake_server.py --latency 0.5` prints its base URL and serves until it is killed.

Steps of a script (plain dicts, one a request; when they run out the default applies):
    {"text": "..."}                  a normal reply                     {"status": 429, "retry_after": 1}   an error
    {"hang": True}                   never answers                      {"malformed": True}                 200, no JSON
    {"drop": True}                   closes the connection              {"body": {...}}                     200, this
    {"tool_calls": [...]}            OpenAI tool calls                  any of them with "latency": seconds
A callable default receives the request's JSON and returns such a dict (or just the reply text).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterable
from typing import Any, Self

Step = dict[str, Any]
_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}


class FakeServer:
    """Serves POST */chat/completions, GET */models and GET */stats."""

    def __init__(
        self,
        default: Step | str | Callable[[dict[str, Any]], Step | str] = "ok",
        *,
        latency: float = 0.0,
        port: int = 0,
    ) -> None:
        self.default = default
        self.latency = latency
        self.port = port
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.connections = 0
        self.active = 0
        self.peak = 0
        self._steps: list[Step] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop: asyncio.Event | None = None
        self._ready = threading.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def script(self, steps: Iterable[Step]) -> None:
        self._steps = list(steps)

    # ---- life

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="fake-server", daemon=True)
        self._thread.start()
        self._ready.wait(60)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread is not None:
            self._thread.join(10)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        try:
            await self._stop.wait()
        finally:
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.sleep(0.01)

    async def serve_forever(self) -> None:
        """For use as a process: prints the base URL when it listens."""
        main = asyncio.ensure_future(self._main())
        while not self._ready.is_set():
            await asyncio.sleep(0.005)
        print(self.url, flush=True)
        await main

    # ---- HTTP

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            if task is not None:
                self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        _, path, _ = first.split(" ", 2)
        if not path.endswith("/chat/completions"):
            self._send(writer, 200, self._page(path))
            await writer.drain()
            return True
        request: dict[str, Any] = json.loads(body)
        self.requests.append(request)
        self.headers.append(headers)
        self.active += 1
        self.peak = max(self.peak, self.active)
        try:
            return await self._answer(request, reader, writer)
        finally:
            self.active -= 1

    def _page(self, path: str) -> dict[str, Any]:
        if path.endswith("/models"):
            return {"object": "list", "data": [{"id": "fake", "object": "model"}]}
        return {"requests": len(self.requests), "connections": self.connections, "peak": self.peak}

    def _next(self, request: dict[str, Any]) -> Step:
        step = self._steps.pop(0) if self._steps else self.default
        if callable(step):
            step = step(request)
        return {"text": step} if isinstance(step, str) else step

    async def _answer(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        step = self._next(request)
        if step.get("hang"):
            await reader.read()  # until the client gives up
            return False
        latency = step.get("latency", self.latency)
        if latency:
            await asyncio.sleep(latency)
        if step.get("drop"):
            return False
        status = step.get("status", 200)
        if status != 200:
            extra = {"retry-after": str(step["retry_after"])} if "retry_after" in step else {}
            self._send(writer, status, {"error": {"message": step.get("message", f"scripted {status}")}}, extra)
        elif step.get("malformed"):
            self._send(writer, 200, b"<html>not json")
        elif "body" in step:
            self._send(writer, 200, step["body"])
        elif request.get("stream"):
            await self._stream(request, step, writer)
        else:
            self._send(writer, 200, _completion(request, step))
        await writer.drain()
        return True

    def _send(
        self,
        writer: asyncio.StreamWriter,
        status: int,
        body: dict[str, Any] | bytes,
        extra: dict[str, str] | None = None,
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}", "content-type: application/json"]
        lines += [f"content-length: {len(data)}", *(f"{k}: {v}" for k, v in (extra or {}).items())]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)

    async def _stream(self, request: dict[str, Any], step: Step, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        text = step.get("text", "")
        pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
        events: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if (request.get("stream_options") or {}).get("include_usage"):
            events.append({"choices": [], "usage": _usage(request, text)})
        for event in events:
            base = {"id": "fake", "object": "chat.completion.chunk", "created": 1, "model": request.get("model")}
            _chunk(writer, b"data: " + json.dumps(base | event).encode() + b"\n\n")
            await writer.drain()
        _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


def _usage(request: dict[str, Any], text: str) -> dict[str, int]:
    words = sum(len(str(message.get("content") or "").split()) for message in request.get("messages", []))
    return {"prompt_tokens": words, "completion_tokens": len(text.split()), "total_tokens": words + len(text.split())}


def _completion(request: dict[str, Any], step: Step) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": step.get("text")}
    if "tool_calls" in step:
        message["tool_calls"] = step["tool_calls"]
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": step.get("finish_reason", "stop")}
    if "logprobs" in step:
        choice["logprobs"] = step["logprobs"]
    return {
        "id": "fake",
        "object": "chat.completion",
        "created": 1,
        "model": request.get("model"),
        "choices": [choice],
        "usage": _usage(request, step.get("text") or ""),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each reply")
    parser.add_argument("--text", default="ok", help="what every reply says")
    args = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(FakeServer(args.text, latency=args.latency, port=args.port).serve_forever())


if __name__ == "__main__":
    main()
