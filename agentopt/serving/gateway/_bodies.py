"""Reading request bodies: bounded one by one, all together, and in time."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from agentopt.serving._types import Refusal
from agentopt.serving.gateway._limits import Limits
from agentopt.serving.gateway._own import Receive
from agentopt.serving.gateway._patience import within

_VALUE, _READ = 80, 20
"""Bytes that a value takes once it is read, at most so many times what was sent: 8 MB of short fields become 150 MB."""
_WIDE = 4
"""Bytes of each character of a text that holds one emoji."""


class Gone(Exception):
    """The client hung up before its request was complete."""


@dataclass(slots=True)
class Share:
    """Bytes of one request that count until it is over."""

    size: int = 0


class Bodies:
    """What the bodies of all requests under way hold."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.held = 0
        """Bytes, of bodies that are complete, about what they take as values, and of those that are being read."""

    @contextmanager
    def share(self) -> Generator[Share]:
        """What is read for this share counts until the block ends."""
        share = Share()
        try:
            yield share
        finally:
            self.held -= share.size

    async def read(self, share: Share, headers: Mapping[str, str], receive: Receive) -> bytes:
        """The whole body.

        Raises:
            Refusal: 413, 408, 503.
            Gone: The client hung up.
        """
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > self._limits.body_bytes:
            raise self._too_long()
        pieces: list[bytes] = []
        try:
            async with within(self._limits.body_seconds):
                while await self._piece(share, pieces, receive):
                    pass
        except TimeoutError as error:
            seconds = self._limits.body_seconds
            raise Refusal(408, f"the body did not come within {seconds:g} s", code="body_timeout") from error
        raw = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        values = min(_VALUE * (raw.count(b",") + raw.count(b":")), _READ * len(raw))
        wide = not raw.isascii() or b"\\u" in raw
        self._hold(share, max(values, _WIDE * len(raw) if wide else 0))
        return raw

    async def _piece(self, share: Share, pieces: list[bytes], receive: Receive) -> bool:
        """One piece; says whether there is more."""
        message = await receive()
        if message["type"] != "http.request":
            raise Gone
        piece: bytes = message.get("body", b"")
        if share.size + len(piece) > self._limits.body_bytes:
            raise self._too_long()
        self._hold(share, len(piece))
        pieces.append(piece)
        return bool(message.get("more_body", False))

    def _hold(self, share: Share, size: int) -> None:
        """Count so many bytes more."""
        share.size += size
        self.held += size
        if self.held > self._limits.bodies_bytes:
            raise Refusal(
                503,
                "the server holds too many long requests; try again shortly",
                kind="server_error",
                code="overloaded",
                retry_after=2,
            )

    def _too_long(self) -> Refusal:
        return Refusal(413, f"the body is longer than {self._limits.body_bytes} bytes", code="body_too_long")
