"""The client of `serve_load.py`: raw non-blocking sockets and one epoll: it costs next to nothing beside what it asks.

    echo '{"host": ..., "port": ..., ...}' | python _serve_client.py      prints one JSON object

`streams`: so many streams, begun one after another over `spread` seconds; each word of a reply is the time at which the
engine sent it, on the clock that all processes of a machine share, so the age of a word at its arrival is known.
`requests`: so many short requests over `connections` kept-open connections, every second one a stream.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any

STAMP = re.compile(rb"@(\d+)\"")
END = b"0\r\n\r\n"


@dataclass
class Job:
    """What is asked of whom."""

    port: int
    key: str = "none"
    model: str = "fake"
    host: str = "127.0.0.1"
    streams: int = 0
    spread: float = 0.0
    requests: int = 0
    connections: int = 32
    limit: float = 120.0
    """Seconds after which the rest is counted as failed."""
    watch: int = 0
    """Process whose resident memory is read every `every` requests."""
    every: int = 2500

    def request(self, stream: bool) -> bytes:
        """One chat request."""
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": "say something short"}]}
        payload = json.dumps(body | {"stream": stream}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
            f"Accept: */*\r\nAuthorization: Bearer {self.key}\r\nContent-Length: {len(payload)}\r\n\r\n"
        )
        return head.encode() + payload


@dataclass
class Line:
    """One connection."""

    sock: socket.socket
    asked: int = 0
    first: int = 0
    rest: bytes = b""
    seen: int = 0
    stream: bool = True


@dataclass
class Found:
    """What was measured."""

    first: list[float] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    done: int = 0
    failed: int = 0
    why: dict[str, int] = field(default_factory=dict)
    memory: list[tuple[int, int]] = field(default_factory=list)

    def fail(self, why: str) -> None:
        """One that did not get its whole reply."""
        self.failed += 1
        self.why[why] = self.why.get(why, 0) + 1


def dial(job: Job) -> socket.socket:
    """A connection, made while nothing is measured."""
    sock = socket.create_connection((job.host, job.port), timeout=30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    return sock


def run_streams(job: Job) -> dict[str, Any]:
    """All streams at once; seconds from the first request to the last end."""
    found, request = Found(), job.request(stream=True)
    lines = [Line(dial(job)) for _ in range(job.streams)]
    poll = select.epoll()
    by_number = {line.sock.fileno(): line for line in lines}
    for number in by_number:
        poll.register(number, select.EPOLLIN)
    begun = time.monotonic_ns()
    starts = [begun + int(1e9 * job.spread * place / max(1, job.streams)) for place in range(job.streams)]
    waiting, deadline = 0, begun + int(1e9 * job.limit)
    last = begun
    while by_number and time.monotonic_ns() < deadline:
        while waiting < job.streams and starts[waiting] <= time.monotonic_ns():
            lines[waiting].asked = time.monotonic_ns()
            lines[waiting].sock.send(request)
            waiting += 1
        timeout = 0.2 if waiting == job.streams else max(0.0, (starts[waiting] - time.monotonic_ns()) / 1e9)
        for number, _ in poll.poll(timeout):
            if take(by_number[number], found):
                last = time.monotonic_ns()
                poll.unregister(number)
                by_number.pop(number).sock.close()
    for line in by_number.values():
        found.fail("late")
        line.sock.close()
    return summary(found, (last - begun) / 1e9)


def take(line: Line, found: Found) -> bool:
    """Read what is there; whether this stream is over."""
    try:
        data = line.sock.recv(1 << 16)
    except BlockingIOError:
        return False
    except OSError as error:
        found.fail(type(error).__name__)
        return True
    now = time.monotonic_ns()
    if not data:
        found.fail("closed early")
        return True
    data = line.rest + data
    if not line.first and (place := data.find(b"data: ")) >= 0:
        if b" 200 " not in data[:16]:
            found.fail(data[:16].decode("latin-1"))
            return True
        line.first = now
        found.first.append((now - line.asked) / 1e6)
        data = data[place:]
    end = 0
    for match in STAMP.finditer(data):
        found.ages.append(now - int(match[1]))
        end = match.end()
    if data.endswith(END):
        found.done += 1
        if b"[DONE]" not in data:
            found.fail("no end mark")
        return True
    line.rest = data[max(end, len(data) - 512) :] if line.first else data
    if not line.first and b"\r\n\r\n" in data and b" 200 " not in data[:16]:
        found.fail(data[9:12].decode("latin-1"))
        return True
    return False


def run_requests(job: Job) -> dict[str, Any]:
    """Short requests, one after another on each connection."""
    found = Found()
    bodies = (job.request(stream=False), job.request(stream=True))
    poll = select.epoll()
    by_number: dict[int, Line] = {}
    sent = 0
    begun = time.monotonic_ns()
    for _ in range(min(job.connections, job.requests)):
        line = Line(dial(job))
        by_number[line.sock.fileno()] = line
        poll.register(line.sock.fileno(), select.EPOLLIN)
        sent = ask(line, bodies, sent)
    deadline = begun + int(1e9 * job.limit)
    while by_number and time.monotonic_ns() < deadline:
        for number, _ in poll.poll(0.2):
            line = by_number[number]
            data = line.sock.recv(1 << 16)
            line.rest += data
            if data and not whole(line.rest, line.stream):
                continue
            if not data or not line.rest.startswith(b"HTTP/1.1 200"):
                found.fail(line.rest[:16].decode("latin-1") or "closed")
            found.done += 1
            if job.watch and found.done % job.every == 0:
                found.memory.append((found.done, resident(job.watch)))
            found.first.append((time.monotonic_ns() - line.asked) / 1e6)
            if data and sent < job.requests:
                sent = ask(line, bodies, sent)
            else:
                poll.unregister(number)
                by_number.pop(number).sock.close()
    return summary(found, (time.monotonic_ns() - begun) / 1e9)


def ask(line: Line, bodies: tuple[bytes, bytes], sent: int) -> int:
    """The next request on this connection."""
    line.stream, line.rest, line.asked = bool(sent % 2), b"", time.monotonic_ns()
    line.sock.send(bodies[sent % 2])
    return sent + 1


def whole(data: bytes, stream: bool) -> bool:
    """Whether the reply has ended."""
    if stream and data.startswith(b"HTTP/1.1 200"):
        return data.endswith(END)
    head, found, body = data.partition(b"\r\n\r\n")
    if not found:
        return False
    if b"chunked" in head.lower():
        return data.endswith(END)
    length = re.search(rb"content-length: *(\d+)", head.lower())
    return length is not None and len(body) >= int(length[1])


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    with open(f"/proc/{process}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def percentile(values: list[float], share: float) -> float:
    """By rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def summary(found: Found, seconds: float) -> dict[str, Any]:
    """What is printed; times in milliseconds."""
    ages = [age / 1e6 for age in found.ages]
    return {
        "seconds": seconds,
        "chunks": len(ages),
        "done": found.done,
        "failed": found.failed,
        "why": found.why,
        "age_p50": percentile(ages, 0.5),
        "age_p99": percentile(ages, 0.99),
        "first_p50": percentile(found.first, 0.5),
        "first_p99": percentile(found.first, 0.99),
        "memory": found.memory,
        "cpu": time.process_time(),
    }


if __name__ == "__main__":
    told = Job(**json.load(sys.stdin))
    json.dump(run_streams(told) if told.streams else run_requests(told), sys.stdout)
