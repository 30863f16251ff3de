"""One life of an engine: its process behind the watchdog, its output into the log, and how it ended."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from agentopt.errors import RunError
from agentopt.serving.engines._log import EngineLog

_WATCHDOG = Path(__file__).with_name("_watchdog.py")
_READ = 1 << 16
_POLL = 0.01
_REST = 1.0
"""Seconds for what is left in the pipe of the log."""
_SURE = 20.0
"""Seconds beyond the grace within which the watchdog must be done; then it is killed itself."""


class Child:
    """A running engine. Made by `Child.start`; whoever made it calls `stop`, whatever happened."""

    def __init__(self, watchdog: asyncio.subprocess.Process, log: EngineLog, grace: float) -> None:
        self._watchdog, self._log, self._grace = watchdog, log, grace
        self._transport: asyncio.SubprocessTransport = cast("Any", watchdog)._transport
        self.pid = 0
        self.code: int | None = None
        """Exit code when it has ended; negative: the signal. None also when nobody can say."""
        self._begun, self._ended = asyncio.Event(), asyncio.Event()
        self._reader = asyncio.create_task(self._read_log(), name="engine log")
        self._waiter = asyncio.create_task(self._waited(), name="engine end")

    @classmethod
    async def start(
        cls, command: Sequence[str], env: Mapping[str, str], *, log: EngineLog, grace: float, hold: int | None = None
    ) -> Child:
        """Start a command in a group of its own.

        Args:
            command: the program's path and its arguments.
            env: its whole environment.
            log: gets its output.
            grace: seconds between TERM and KILL.
            hold: a file descriptor (a lock) that stays open until all of the engine is gone.

        Raises:
            RunError: the command cannot be run.
        """
        argv = [sys.executable, "-I", "-S", str(_WATCHDOG), str(grace), "--", *command]
        pipe = asyncio.subprocess.PIPE
        try:
            watchdog = await asyncio.create_subprocess_exec(
                *argv,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env=dict(env),
                start_new_session=True,
                pass_fds=() if hold is None else (hold,),
            )
        except OSError as error:
            raise RunError(f"a process cannot be started ({error.strerror or error}).") from error
        child = cls(watchdog, log, grace)
        try:
            await child._begun.wait()
        except BaseException:
            await child.stop()
            raise
        return child

    async def ended(self) -> None:
        """Returns when nothing of the engine is left."""
        await self._ended.wait()

    @property
    def alive(self) -> bool:
        """It has not ended."""
        return not self._ended.is_set()

    def kill(self) -> None:
        """KILL, without TERM before it: for one that does not answer."""
        if self._watchdog.stdin is not None:
            with suppress(OSError, RuntimeError):
                self._watchdog.stdin.write(b"kill\n")

    async def stop(self) -> None:
        """TERM, KILL after the grace, and wait until all of it is gone. May be called when it has ended already."""
        if self._watchdog.stdin is not None:
            with suppress(OSError, RuntimeError):
                self._watchdog.stdin.close()
        try:
            async with asyncio.timeout(self._grace + _SURE):
                await self.ended()
        except TimeoutError:
            with suppress(ProcessLookupError):
                self._watchdog.kill()
            await self.ended()
        await self._waiter

    async def _waited(self) -> None:
        """As `_wait`; when its loop is ended before it is closed, those who close it then must not wait for ever."""
        try:
            await self._wait()
        finally:
            self._begun.set()
            self._ended.set()

    async def _wait(self) -> None:
        """Until the watchdog says how the engine ended, or has ended itself."""
        assert self._watchdog.stdout is not None
        while line := await self._watchdog.stdout.readline():
            words = line.split()
            if words[:1] == [b"pid"]:
                self.pid = int(words[1])
            elif words[:1] == [b"exit"]:
                self.code = int(words[1])
            self._begun.set()
        # Its stdout is its own, so it has ended. `Process.wait` would wait for the pipe of the log too, which a process
        # that got away (when the watchdog itself was killed) may hold open for ever.
        while self._transport.get_returncode() is None:
            await asyncio.sleep(_POLL)
        if self._transport.get_returncode() not in (0, 127) and self.pid:
            # The watchdog was killed: the kernel has killed the engine's first process with it, and not the others.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        await asyncio.wait({self._reader}, timeout=_REST)
        self._reader.cancel()
        self._transport.close()
        self._log.end()

    async def _read_log(self) -> None:
        assert self._watchdog.stderr is not None
        while data := await self._watchdog.stderr.read(_READ):
            self._log.feed(data)
