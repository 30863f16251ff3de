"""Serving an ASGI application on a port: accepting, deadlines, an orderly end. For the gateway and the admin app.

Why not uvicorn's loop: it has no deadline for heads and bodies, no bound on headers, and takes over the signals.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from email.utils import formatdate
from typing import Any

from agentopt.errors import UserError
from agentopt.serving.gateway._connection import Connection, Request
from agentopt.serving.gateway._limits import Limits
from agentopt.serving.gateway._patience import Clock

Log = Callable[[str], None]


class Server:
    """Listens for one application. Lives in one event loop.

    Args:
        app: ASGI application; it gets no lifespan events.
        limits: Bounds of connections.
        log: Gets one line for each mistake of the application.
    """

    def __init__(self, app: Any, limits: Limits, log: Log | None = None) -> None:
        self.app = app
        self.limits = limits
        self.date_line = b""
        self.stopping = False
        self.answered = 0
        """Requests answered since the start."""
        self.port = 0
        self._log = log
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        shortest = min(limits.head_seconds, limits.keep_alive_seconds, limits.stalled_seconds, limits.body_seconds)
        self._clock = Clock(min(0.5, max(0.02, shortest / 4)))

    async def start(self, host: str, port: int) -> None:
        """Listen; `port` 0 takes a free one, see `self.port`.

        Raises:
            UserError: The address is not ours or the port is taken.
        """
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(lambda: Connection(self), host, port, backlog=1024)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error
        self.port = self._listener.sockets[0].getsockname()[1]
        for listening in self._listener.sockets:
            _probing(listening)
        self._look()

    async def stop(self) -> None:
        """Accept nothing more; end idle connections at once, the others after their reply or `grace_seconds`."""
        self.stopping = True
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            connection.stop()
        end = time.monotonic() + self.limits.grace_seconds
        while self._connections and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for connection in list(self._connections):
            connection.abort()
        for task in list(self._tasks):
            task.cancel()
        while self._tasks or self._connections:
            await asyncio.sleep(0.005)
        if self._timer is not None:
            self._timer.cancel()
        if self._listener is not None:
            with suppress(OSError):
                await self._listener.wait_closed()

    # ---- what connections tell

    @property
    def now(self) -> float:
        """For deadlines: as coarse as the looks, and not running while this process stands still."""
        return self._clock.now

    def arrived(self, connection: Connection) -> None:
        """A client connected."""
        self._connections.add(connection)
        if len(self._connections) > self.limits.connections:
            spare = next((one for one in self._connections if one.spare and one is not connection), None)
            if spare is None:
                connection.refuse_all()
            else:
                spare.abort()

    def left(self, connection: Connection) -> None:
        """A connection is closed."""
        self._connections.discard(connection)

    def run(self, request: Request) -> None:
        """Call the application."""
        task = asyncio.get_running_loop().create_task(request.run(self.app))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def trouble(self, line: str, error: BaseException) -> None:
        """One line, and where it happened."""
        if self._log is not None:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace is not None else ""
            self._log(line + where)

    def _look(self) -> None:
        now = self._clock.look()
        self.date_line = b"date: %b\r\n" % formatdate(usegmt=True).encode()
        for connection in list(self._connections):
            if connection.deadline < now or connection.stalled < now:
                connection.overdue()
        self._timer = asyncio.get_running_loop().call_later(self._clock.period, self._look)


def _probing(listening: Any) -> None:
    """Ask silent peers after a minute whether they are there; connections inherit it from the socket that listens.

    One that vanished without a word must not hold an engine until its time is up.
    """
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@asynccontextmanager
async def serving(
    app: Any, host: str = "127.0.0.1", port: int = 0, *, limits: Limits | None = None, log: Log | None = None
) -> AsyncGenerator[Server]:
    """A server that listens inside the block.

    Raises:
        UserError: The address is not ours or the port is taken.
    """
    server = Server(app, limits or Limits(), log)
    await server.start(host, port)
    try:
        yield server
    finally:
        await server.stop()


async def serve_app(
    app: Any,
    host: str,
    port: int,
    *,
    ready: Callable[[int], None] | None = None,
    stop: asyncio.Event,
    limits: Limits | None = None,
    log: Log | None = None,
) -> None:
    """Serve `app` until `stop` is set.

    Args:
        app: ASGI application (no lifespan events).
        host: Name or address to listen on.
        port: 0 takes a free one.
        ready: Called with the port once it listens.
        stop: Set it to end; replies under way get `limits.grace_seconds` (drain the gateway before).
        limits: Bounds of connections.
        log: Gets one line for each mistake of the application.

    Raises:
        UserError: The address is not ours or the port is taken.
    """
    async with serving(app, host, port, limits=limits, log=log) as server:
        if ready is not None:
            ready(server.port)
        await stop.wait()


def raise_file_limit(wanted: int) -> int:
    """Let this process open `wanted` files, as far as its hard limit allows; gives what it may open now."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < top:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
            return top
    return soft
