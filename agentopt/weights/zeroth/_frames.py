"""How workers speak over TCP: frames of a kind, a length and bytes, with nothing in them but JSON and float64 numbers.

A frame is u8 kind, u32 length (little endian), then the bytes. A greeting is JSON (protocol, rank, world, token), its
answer a welcome or a refusal in words; then, per round, one frame of numbers up and one down.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Sequence

HELLO, WELCOME, REFUSED, VALUES, ALL, FAILED = range(1, 7)
PROTOCOL = 1
HEAD = struct.Struct("<BI")
ROUND = struct.Struct("<I")
_LONGEST = 1 << 26
_GREETING = 1 << 12


class Gone(Exception):
    """The other side hung up."""


class Garbage(Exception):
    """What came is none of our frames."""


class Inbox:
    """Puts frames together from whatever pieces arrive."""

    def __init__(self, longest: int = _GREETING) -> None:
        self.longest = longest
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._data += data

    def frame(self) -> tuple[int, bytes] | None:
        """The first frame that is whole.

        Raises:
            Garbage: the bytes do not begin with a frame that may come here.
        """
        if len(self._data) < HEAD.size:
            return None
        kind, length = HEAD.unpack_from(self._data)
        if not HELLO <= kind <= FAILED or length > self.longest:
            raise Garbage(f"kind {kind}, {length} bytes")
        if len(self._data) < HEAD.size + length:
            return None
        payload = bytes(self._data[HEAD.size : HEAD.size + length])
        del self._data[: HEAD.size + length]
        return kind, payload


class Line:
    """One connection to another worker, with what was counted on it."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.inbox = Inbox()
        self.sent = self.received = 0
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that vanished sends no goodbye

    def trust(self) -> None:
        """After the greeting, frames may be long."""
        self.inbox.longest = _LONGEST

    def send(self, kind: int, payload: bytes, timeout: float) -> None:
        """Send one frame.

        Raises:
            Gone: the other side hung up, or takes nothing any more.
        """
        data = HEAD.pack(kind, len(payload)) + payload
        try:
            self.link.settimeout(timeout)
            self.link.sendall(data)
        except (OSError, ValueError) as error:
            raise Gone from error
        self.sent += len(data)

    def pull(self) -> None:
        """Take what has arrived; to be called when something has.

        Raises:
            Gone: the other side hung up.
        """
        try:
            data = self.link.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return
        except TimeoutError:
            raise
        except OSError as error:
            raise Gone from error
        if not data:
            raise Gone
        self.received += len(data)
        self.inbox.feed(data)

    def wait(self, timeout: float) -> tuple[int, bytes]:
        """The next frame.

        Raises:
            Gone, Garbage: as above.
            TimeoutError: it did not come in time.
        """
        deadline = time.monotonic() + timeout
        while (frame := self.inbox.frame()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.link.settimeout(left)
            self.pull()
        return frame

    def close(self) -> None:
        """Hang up."""
        self.link.close()


def pack_greeting(rank: int, world: int, token: str) -> bytes:
    """What a worker says first."""
    return json.dumps({"protocol": PROTOCOL, "rank": rank, "world": world, "token": token}).encode()


def pack_values(number: int, values: Sequence[float]) -> bytes:
    """One worker's numbers of a round."""
    return ROUND.pack(number) + struct.pack(f"<{len(values)}d", *values)


def unpack_values(payload: bytes) -> tuple[int, list[float]]:
    """The same, read.

    Raises:
        Garbage: it is not one.
    """
    count, rest = divmod(len(payload) - ROUND.size, 8)
    if count < 0 or rest:
        raise Garbage(f"{len(payload)} bytes of numbers")
    return ROUND.unpack_from(payload)[0], list(struct.unpack_from(f"<{count}d", payload, ROUND.size))


def pack_all(number: int, everyone: Sequence[Sequence[float]]) -> bytes:
    """Everybody's numbers of a round, in the order of ranks."""
    parts = [ROUND.pack(number)]
    parts += [ROUND.pack(len(values)) + struct.pack(f"<{len(values)}d", *values) for values in everyone]
    return b"".join(parts)


def unpack_all(payload: bytes, world: int) -> tuple[int, list[list[float]]]:
    """The same, read.

    Raises:
        Garbage: it is not one.
    """
    try:
        (number,), place, everyone = ROUND.unpack_from(payload), ROUND.size, list[list[float]]()
        for _ in range(world):
            (count,) = ROUND.unpack_from(payload, place)
            everyone.append(list(struct.unpack_from(f"<{count}d", payload, place + ROUND.size)))
            place += ROUND.size + 8 * count
    except struct.error as error:
        raise Garbage(str(error)) from error
    if place != len(payload):
        raise Garbage(f"{len(payload) - place} bytes too many")
    return number, everyone


def pack_failure(rank: int, text: str) -> bytes:
    """Which worker failed, and how."""
    return ROUND.pack(rank) + text.encode()[:2000]


def unpack_failure(payload: bytes) -> tuple[int, str]:
    """The same, read."""
    if len(payload) < ROUND.size:
        raise Garbage("a failure without a rank")
    return ROUND.unpack_from(payload)[0], payload[ROUND.size :].decode(errors="replace")
