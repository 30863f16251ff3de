"""The loopback endpoint of `peers.py`: OpenAI's chat completions over a few lines of asyncio, in a process of its own.

Two models per run: `task.RUN` and `proposer.RUN`. Every call is logged with the monotonic time at which its request was
complete and at which its reply was written; that clock is the same in all processes of a machine.

    python _peer_endpoint.py LATENCY_MS      prints its port, serves until its standard input closes
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from _peer_proposer import answer
from _peer_world import World, draw, rewrite, stated


@dataclass
class Run:
    """One run of one system: its world, its proposer's quality, and its log of (model, start, end, detail)."""

    world: World
    quality: float
    rewrites: int = 0
    calls: list[tuple[str, float, float, str]] = field(default_factory=list)

    def task(self, messages: list[dict[str, Any]]) -> tuple[str, str]:
        """The task model: the system message is the instruction, the last message holds the case."""
        system, user = _text(messages[0]), _text(messages[-1])
        reply = self.world.reply(system, user)
        if "[[ ## answer ## ]]" in system:  # DSPy's field format
            reply = f"[[ ## answer ## ]]\n{reply}\n\n[[ ## completed ## ]]"
        return reply, str(stated(system).bit_count())

    def propose(self, messages: list[dict[str, Any]]) -> tuple[str, str]:
        """The proposer model."""
        system = _text(messages[0]) if messages[0]["role"] == "system" else ""
        user = "\n".join(_text(message) for message in messages if message["role"] != "system")

        def new(current: str, text: str) -> str:
            self.rewrites += 1
            return rewrite(current, text, draw(self.world.seed, self.rewrites), self.quality)

        return answer(system, user, new)


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


RUNS: dict[str, Run] = {}


def completion(body: dict[str, Any], started: float) -> tuple[dict[str, Any], Run, tuple[str, float, str]]:
    """The reply to one request, its run, and what the log needs."""
    model, _, name = body["model"].partition(".")
    run = RUNS[name]
    text, detail = run.task(body["messages"]) if model == "task" else run.propose(body["messages"])
    reply = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
    return reply, run, (model, started, detail)


def admin(method: str, path: str, body: bytes) -> object:
    """`POST /run` declares a run, `GET /calls/RUN` counts its calls, `GET /log/RUN` gives them and forgets the run."""
    if method == "POST":
        data = json.loads(body)
        RUNS[data["run"]] = Run(World(data["seed"], data["rows"], data["rows"]), data["quality"])
        return {}
    kind, _, name = path.strip("/").partition("/")
    return len(RUNS[name].calls) if kind == "calls" else RUNS.pop(name).calls


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive; requests of one connection are answered in order."""

    latency = 0.0

    def __init__(self) -> None:
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, mark, rest = self._data.partition(b"\r\n\r\n")
        if not mark:
            return
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return
        body, self._data = rest[:length], rest[length:]
        method, path, _ = lines[0].split(" ", 2)
        self._serve(method, path, body)

    def _serve(self, method: str, path: str, body: bytes) -> None:
        started = time.monotonic()
        if not path.endswith("/chat/completions"):
            self._write(json.dumps(admin(method, path, body)).encode())
            return
        try:
            reply, run, (model, started, detail) = completion(json.loads(body), started)
        except Exception as error:  # noqa: BLE001  (the client must see it; the benchmark fails on it)
            self._write(json.dumps({"error": {"message": repr(error)}}).encode(), "400 Bad Request")
            return
        payload = json.dumps(reply).encode()
        if self.latency:
            asyncio.get_running_loop().call_later(self.latency, self._finish, payload, run, model, started, detail)
        else:
            self._finish(payload, run, model, started, detail)

    def _finish(self, payload: bytes, run: Run, model: str, started: float, detail: str) -> None:
        run.calls.append((model, started, time.monotonic(), detail))
        self._write(payload)

    def _write(self, payload: bytes, status: str = "200 OK") -> None:
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
        if not self._transport.is_closing():
            self._transport.write(head.encode() + payload)


async def serve(latency: float) -> None:
    """Serve until standard input closes."""
    Connection.latency = latency
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1]) / 1000))
