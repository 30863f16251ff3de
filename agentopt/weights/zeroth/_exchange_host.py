"""Rank 0 of workers that exchange losses: takes the others in, collects their numbers, and finds out who is missing."""

from __future__ import annotations

import contextlib
import hmac
import json
import selectors
import socket
import time
from collections.abc import Sequence

from agentopt.weights.zeroth import _frames as frames
from agentopt.weights.zeroth._exchange import SocketExchange, WorkerLost, check_open, lost, tell, workers
from agentopt.weights.zeroth._frames import Garbage, Gone, Line

_GREETING_SECONDS = 10.0
_STRANGERS = 64
"""Connections that have not greeted yet; the oldest beyond these is dropped."""


class HostExchange(SocketExchange):
    """Rank 0."""

    def __init__(self, world: int, listener: socket.socket, token: str, timeout: float) -> None:
        """Use `SocketExchange.host`."""
        host, port = listener.getsockname()[:2]
        host = (
            socket.gethostname() if host in ("0.0.0.0", "::") else host
        )  # every address: give one that can be dialled
        super().__init__(0, world, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", timeout)
        self.token = token
        self.refused = 0
        """Connections that were turned away."""
        self._listener = listener
        self._lines: dict[int, Line] = {}

    @property
    def sent_bytes(self) -> int:
        """Bytes that this worker has sent, without the network's own headers."""
        return sum(line.sent for line in self._lines.values())

    @property
    def received_bytes(self) -> int:
        """Bytes that this worker has received."""
        return sum(line.received for line in self._lines.values())

    def wait(self) -> None:
        """Take in all workers; the first exchange does it otherwise.

        Raises:
            WorkerLost: one of them did not come in time.
        """
        self._listener.setblocking(False)
        strangers: dict[Line, float] = {}
        left, piece = self._timeout, self._timeout / 8
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while len(self._lines) < self.world - 1:
                if left <= 0:
                    raise self._never_came()
                began = time.monotonic()
                soonest = min([left, piece, *(until - began for until in strangers.values())])
                for key, _ in selector.select(max(0.0, soonest)):
                    if key.data is None:
                        self._accept(selector, strangers)
                    elif not self._greet(key.data):
                        selector.unregister(key.fileobj)
                        strangers.pop(key.data, None)
                late = [line for line, until in strangers.items() if until < time.monotonic()]
                for line in [*late, *list(strangers)[: max(0, len(strangers) - _STRANGERS)]]:
                    if strangers.pop(line, None) is not None:
                        selector.unregister(line.link)
                        self._turn_away(line, "no greeting came")
                left -= min(piece, time.monotonic() - began)  # a stop of this process is nobody's delay
            for line in strangers:
                self._turn_away(line, "the run is complete")
        self._listener.close()

    def _accept(self, selector: selectors.BaseSelector, strangers: dict[Line, float]) -> None:
        try:
            link, _ = self._listener.accept()
        except OSError:  # gone before it was taken in
            return
        line = Line(link)
        link.setblocking(False)
        strangers[line] = time.monotonic() + _GREETING_SECONDS
        selector.register(link, selectors.EVENT_READ, line)

    def _greet(self, line: Line) -> bool:
        """Hear what a new connection says; False when it is settled, one way or the other."""
        try:
            line.pull()
            frame = line.inbox.frame()
            if frame is None:
                return True
            rank, problem = self._judge(*frame)
            if not problem:
                line.send(frames.WELCOME, b"", _GREETING_SECONDS)
                line.trust()
                self._lines[rank] = line
                return False
        except (Gone, Garbage):
            problem = "that was no greeting"
        self._turn_away(line, problem)
        return False

    def _judge(self, kind: int, payload: bytes) -> tuple[int, str]:
        """The rank that greets, and what is wrong with it."""
        try:
            said = json.loads(payload)
            protocol, rank, world, token = said["protocol"], said["rank"], said["world"], str(said["token"])
        except (ValueError, TypeError, KeyError):
            return 0, "that was no greeting"
        if kind != frames.HELLO or protocol != frames.PROTOCOL:
            return 0, f"it speaks protocol {protocol}, this run {frames.PROTOCOL}; use the same agentopt everywhere"
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            return 0, "its token is not the one of this run"
        if world != self.world or not isinstance(rank, int) or not 0 < rank < self.world:
            return 0, f"it is rank {rank} of {world}, expected one of 1 to {self.world - 1} of {self.world}"
        if rank in self._lines:
            return 0, f"rank {rank} has joined already"
        return rank, ""

    def _turn_away(self, line: Line, why: str) -> None:
        self.refused += 1
        with contextlib.suppress(Gone):
            line.send(frames.REFUSED, why.encode(), 1.0)
        line.close()

    def _never_came(self) -> WorkerLost:
        missing = [rank for rank in range(1, self.world) if rank not in self._lines]
        refused = f" ({self.refused} connections were refused)" if self.refused else ""
        text = f"{workers(missing)} did not join at {self.address} within {self._timeout:g} s{refused}"
        return self._end(text, missing[0])

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every worker's float64 values, in the order of ranks; the same on every worker.

        Raises:
            WorkerLost: a worker died, hung or failed; the others are told.
        """
        check_open(self._closed)
        if len(self._lines) < self.world - 1:
            self.wait()
        self.rounds += 1
        everyone = {0: [float(value) for value in values]}
        deadline = time.monotonic() + self._timeout
        with selectors.DefaultSelector() as selector:
            for rank, line in self._lines.items():
                if not self._take(rank, line, everyone):
                    line.link.setblocking(False)
                    selector.register(line.link, selectors.EVENT_READ, rank)
            while len(everyone) < self.world:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready and time.monotonic() >= deadline:
                    missing = sorted(set(range(self.world)) - set(everyone))
                    text = f"{workers(missing)} gave no answer within {self._timeout:g} s in exchange {self.rounds}"
                    raise self._end(text, missing[0])
                for key, _ in ready:
                    line = self._lines[key.data]
                    self._pull(key.data, line)
                    if self._take(key.data, line, everyone):
                        selector.unregister(key.fileobj)
        ordered = [everyone[rank] for rank in range(self.world)]
        payload = frames.pack_all(self.rounds, ordered)
        for rank, line in self._lines.items():
            try:
                line.send(frames.ALL, payload, self._timeout)
            except Gone as gone:
                raise self._end(f"worker {rank} hung up in exchange {self.rounds}: its process ended", rank) from gone
        return ordered

    def _pull(self, rank: int, line: Line) -> None:
        try:
            line.pull()
        except Gone as gone:
            raise self._end(f"worker {rank} hung up in exchange {self.rounds}: its process ended", rank) from gone

    def _take(self, rank: int, line: Line, everyone: dict[int, list[float]]) -> bool:
        """Whether the worker's numbers of this round are there."""
        try:
            frame = line.inbox.frame()
            if frame is None:
                return False
            kind, payload = frame
            if kind == frames.FAILED:
                raise self._end(f"worker {rank} failed: {frames.unpack_failure(payload)[1]}", rank)
            if kind != frames.VALUES:
                raise Garbage(f"kind {kind}")
            number, values = frames.unpack_values(payload)
            if number != self.rounds:
                raise Garbage(f"exchange {number}")
        except Garbage as error:
            text = f"worker {rank} sent what does not belong to exchange {self.rounds} ({error})"
            raise self._end(text, rank) from error
        everyone[rank] = values
        return True

    def _end(self, text: str, rank: int) -> WorkerLost:
        """Tell the workers, hang up, and give the error to raise."""
        for line in self._lines.values():
            tell(line, rank, text)
        self.close()
        return lost(text, rank)

    def abort(self, reason: str) -> None:
        """Tell the others why this worker ends, and hang up."""
        for line in () if self._closed else self._lines.values():
            tell(line, 0, f"worker 0 failed: {reason}")
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._closed = True
        self._listener.close()
        for line in self._lines.values():
            line.close()
