"""One small HTTP request to an engine, on a connection of its own: health, models, what routes there are.

Not for clients' requests: those go through the gateway's pool. Here a fresh connection is the point, because one that
was kept open says nothing about an engine that accepts no others.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from functools import cache

import h11

from agentopt.serving._types import Address

_READ = 1 << 16
_LARGEST = 16 << 20


async def fetch(
    address: Address, path: str, *, timeout: float = 5.0, method: str = "GET", body: bytes | None = None
) -> tuple[int, bytes]:
    """Ask an engine once.

    Args:
        address: where; its token is sent.
        path: behind the address's prefix, from "/".
        timeout: seconds for all of it.
        method: of the request.
        body: JSON to send.

    Returns:
        Status and body.

    Raises:
        OSError: nobody listens, or the connection broke (also what is no HTTP).
        TimeoutError: no whole answer in time.
    """
    async with asyncio.timeout(timeout):
        reader, writer = await _connect(address)
        try:
            return await _exchange(reader, writer, address, path, method, body)
        except h11.RemoteProtocolError as error:
            raise ConnectionError(f"not an HTTP answer: {error}") from error
        finally:
            writer.close()
            with suppress(OSError, asyncio.CancelledError):
                writer.transport.abort()


async def _connect(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.socket is not None:
        return await asyncio.open_unix_connection(address.socket)
    if address.tls:
        return await asyncio.open_connection(address.host, address.port, ssl=_context(), server_hostname=address.host)
    return await asyncio.open_connection(address.host, address.port)


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    address: Address,
    path: str,
    method: str,
    body: bytes | None,
) -> tuple[int, bytes]:
    wire = h11.Connection(h11.CLIENT)
    host = address.host if address.port == 0 else f"{address.host}:{address.port}"
    headers = [("host", host), ("accept", "application/json"), ("connection", "close")]
    if address.token is not None:
        headers.append(("authorization", f"Bearer {address.token}"))
    if body is not None:
        headers += [("content-type", "application/json"), ("content-length", str(len(body)))]
    sent = wire.send(h11.Request(method=method, target=address.prefix + path, headers=headers)) or b""
    if body is not None:
        sent += wire.send(h11.Data(data=body)) or b""
    writer.write(sent + (wire.send(h11.EndOfMessage()) or b""))
    await writer.drain()
    status, pieces, size = 0, list[bytes](), 0
    while True:
        event = wire.next_event()
        if event is h11.NEED_DATA:
            wire.receive_data(await reader.read(_READ))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            pieces.append(bytes(event.data))
            size += len(event.data)
            if size > _LARGEST:
                raise ConnectionError(f"an answer of more than {_LARGEST} bytes to {path}")
        elif isinstance(event, h11.EndOfMessage):
            return status, b"".join(pieces)
        elif isinstance(event, h11.ConnectionClosed):
            raise ConnectionError("the connection was closed before an answer came")


@cache
def _context() -> ssl.SSLContext:
    import httpx  # the same trust store as every other HTTP client in the process (certifi, SSL_CERT_FILE)

    return httpx.create_ssl_context()
