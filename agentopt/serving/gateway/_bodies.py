"""Reading request bodies: bounded one by one, all together, and in time."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from agentopt.serving._types import Refusal
from agentopt.serving.gateway._limits import Limits
from agentopt.serving.gateway._own import Receive


class Gone(Exception):
    """The client hung up before its request was complete."""


class Bodies:
    """What the bodies of all requests under way hold."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.held = 0
        """Bytes, of bodies that are complete and of those that are being read."""

    @contextmanager
    def counted(self) -> Generator[bytearray]:
        """A buffer to `read` into; what it holds counts until the block ends."""
        body = bytearray()
        try:
            yield body
        finally:
            self.held -= len(body)

    async def read(self, body: bytearray, headers: Mapping[str, str], receive: Receive) -> bytes:
        """The whole body; `body` is of `counted`.

        Raises:
            Refusal: 413, 408, 503.
            Gone: The client hung up.
        """
        limit = self._limits.body_bytes
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > limit:
            raise _too_long(limit)
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while await self._piece(body, receive):
                    if len(body) > limit:
                        raise _too_long(limit)
        except TimeoutError as error:
            seconds = self._limits.body_seconds
            raise Refusal(408, f"the body did not come within {seconds:g} s", code="body_timeout") from error
        if len(body) > limit:
            raise _too_long(limit)
        return bytes(body)

    async def _piece(self, body: bytearray, receive: Receive) -> bool:
        """One piece; says whether there is more."""
        message = await receive()
        if message["type"] != "http.request":
            raise Gone
        piece: bytes = message.get("body", b"")
        if self.held + len(piece) > self._limits.bodies_bytes:
            raise Refusal(
                503,
                "the server holds too many long requests; try again shortly",
                kind="server_error",
                code="overloaded",
                retry_after=2,
            )
        body += piece
        self.held += len(piece)
        return bool(message.get("more_body", False))


def _too_long(limit: int) -> Refusal:
    return Refusal(413, f"the body is longer than {limit} bytes", code="body_too_long")
