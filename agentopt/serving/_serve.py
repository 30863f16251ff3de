"""One server from its options to its end: everything is put together here, and taken apart in the other order.

The ports open before the engine is started, so that a port that is taken costs no model, and so that whoever waits for
`/ready` is answered from the beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
from collections.abc import Callable, Coroutine, Generator
from contextlib import AsyncExitStack
from typing import Any

from agentopt.errors import RunError, UserError
from agentopt.serving._news import Draining, Ended, Listening, News, Serving
from agentopt.serving._options import ServeOptions
from agentopt.serving._parts import Assembly, Parts, Place
from agentopt.serving._run_folder import admin_token, check_port, run_folder
from agentopt.serving._types import Phase

OnEvent = Callable[[Any], None]
FILES = 16384
"""Connections and files that may be open at a time, where the system allows it."""


def serve_forever(options: ServeOptions, on_event: OnEvent) -> int:
    """Serve until a signal, `agentopt serve drain`, or an engine that cannot be started any more.

    Args:
        options: what is served, and how.
        on_event: told of all that happens, on the event loop.

    Returns:
        0: it was asked to stop.

    Raises:
        UserError: something that was given cannot be served.
        RunError: the engine failed.
    """
    try:
        import uvloop
    except ImportError:  # part of agentopt[serve] where it exists; half of the gateway's speed
        return asyncio.run(serve(options, on_event))
    return uvloop.run(serve(options, on_event))


async def serve(options: ServeOptions, on_event: OnEvent) -> int:
    """As `serve_forever`, in a loop that runs; takes SIGINT, SIGTERM and SIGHUP while it does."""
    stop = _Stop()
    news = News(on_event)
    main = asyncio.create_task(_serve(options, news, stop))
    stop.now = main.cancel
    with _signals(stop.signalled):
        try:
            await main
        except asyncio.CancelledError:
            if not stop.signals:
                raise
    news(Ended(stop.cut_off))
    return 0


class _Stop:
    """That it is to stop, and how: the first signal lets requests end, the second does not wait."""

    def __init__(self) -> None:
        self.wanted = asyncio.Event()
        self.signals = 0
        self.serving = False
        self.cut_off = 0
        """Requests that did not end by themselves."""
        self.now: Callable[[], Any] = lambda: None

    def signalled(self) -> None:
        """SIGINT or SIGTERM has come."""
        self.signals += 1
        # Before it serves there is nothing to wait for.
        if self.signals > 1 or not self.serving:
            self.now()
        self.wanted.set()


@contextlib.contextmanager
def _signals(callback: Callable[[], None]) -> Generator[None]:
    loop = asyncio.get_running_loop()
    taken = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it, and so do we then
        taken.append(signal.SIGHUP)
    for number in taken:
        loop.add_signal_handler(number, callback)
    try:
        yield
    finally:
        for number in taken:
            loop.remove_signal_handler(number)


def _check_installed() -> None:
    missing = [name for name in ("httptools", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the endpoint needs {' and '.join(missing)}: pip install 'agentopt[serve]'.")


async def _serve(options: ServeOptions, on_event: News, stop: _Stop) -> None:
    _check_installed()
    from agentopt.serving.gateway import raise_file_limit

    port = check_port(options.host, options.port, "port")
    admin_port = check_port(options.admin_host, options.admin, "admin-port")
    raise_file_limit(FILES)
    with run_folder(options.run_dir, port) as folder:
        place = Place(
            folder,
            f"{_url(options.host, port)}/v1",
            _url(options.admin_host, admin_port),
            admin_token(),
            ports=(port, admin_port),
        )
        async with AsyncExitStack() as stack:
            parts = await Assembly(options, place, on_event, stack, stop.wanted.set).parts()
            await _run(parts, options, place, on_event, stop)


async def _run(parts: Parts, options: ServeOptions, place: Place, on_event: OnEvent, stop: _Stop) -> None:
    """Both ports open, then the engine, then wait for the end; the ports close last."""
    from agentopt.serving.admin import admin_app
    from agentopt.serving.engines import Warned
    from agentopt.serving.gateway import serving

    def log(line: str) -> None:
        on_event(Warned(line))

    port, admin_port = place.ports
    async with (
        serving(admin_app(parts.control), options.admin_host, admin_port, log=log),
        serving(parts.gateway, options.host, port, limits=parts.limits, log=log),
    ):
        _announce(parts, place)
        on_event(Listening(place.base_url, place.admin_url))
        try:
            await _first(_up(parts), stop.wanted.wait())
            if not stop.wanted.is_set():
                stop.serving = True
                on_event(_serving(parts, place, options.host))
                await _first(_until_failed(parts), stop.wanted.wait())
            on_event(Draining(parts.gateway.in_flight, options.drain_timeout))
            running = parts.gateway.in_flight
            if not await parts.gateway.drain(options.drain_timeout):
                stop.cut_off = running
        except asyncio.CancelledError:
            stop.cut_off = parts.gateway.in_flight
            _kill(parts)
            await parts.gateway.drain(0)
            raise
        finally:
            parts.gateway.close()


def _kill(parts: Parts) -> None:
    """Stop the engine without asking it first: whoever presses Ctrl-C twice does not want to wait for it."""
    pid = getattr(parts.engine, "pid", None)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


async def _up(parts: Parts) -> None:
    await parts.engine.start()
    await parts.engine.ready()


async def _until_failed(parts: Parts) -> None:
    """Returns never while the engine runs, or is started again.

    Raises:
        RunError: it is not started any more.
    """
    while parts.engine.phase is not Phase.FAILED:
        await parts.engine.changed()
    raise RunError(f"the engine {parts.engine.name} failed too often and is not started again: {parts.engine.reason}.")


async def _first(*works: Coroutine[Any, Any, Any]) -> None:
    """Until one of them is done; the others are cancelled, and its error is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in done:
        task.result()


def _announce(parts: Parts, place: Place) -> None:
    """How other commands find this server."""
    place.folder.announce(
        {
            "pid": os.getpid(),
            "base_url": place.base_url,
            "admin_url": place.admin_url,
            "admin_token": place.token,
            "started": parts.control.started,
            "engine": parts.engine.name,
            "model": parts.model(),
            "run_dir": str(place.folder.path),
        }
    )


def _serving(parts: Parts, place: Place, host: str) -> Serving:
    return Serving(
        base_url=place.base_url,
        admin_url=place.admin_url,
        engine=parts.engine.name,
        model=parts.model(),
        models=tuple(parts.catalog.names()),
        keys=None if parts.keyring is None else parts.keyring.known,
        host=host,
        run_dir=place.folder.shown,
        captured_as=None if parts.recorder is None else parts.recorder.run_id,
        state=parts.state,
    )


def _url(host: str, port: int) -> str:
    """Where clients on this machine reach it."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
