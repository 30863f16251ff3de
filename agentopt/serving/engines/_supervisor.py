"""The supervisor: an engine that is started, watched, and started again when it dies or hangs.

One task lives the engine's lives one after the other. A life: start the process, ask for its health until it answers,
let `on_start` callbacks prepare it (adapters are loaded again), READY, ask for its health from time to time. What ends
a life is told as an event; the next one comes after a pause that doubles with each failure.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentopt.errors import AgentoptError
from agentopt.serving._types import Phase
from agentopt.serving.engines import _events as events
from agentopt.serving.engines._base import EngineBase
from agentopt.serving.engines._child import Child
from agentopt.serving.engines._folder import RunFolder
from agentopt.serving.engines._launch import Launch
from agentopt.serving.engines._log import EngineLog
from agentopt.serving.engines._options import SupervisorOptions
from agentopt.serving.engines._progress import stalled

_POLL = 0.1
"""Seconds between two looks at an engine that is starting."""
_AGAIN = 0.5
"""Seconds until an engine that gave no good answer is asked again."""
_FORMER = 25.0
"""Seconds beyond the grace that the engine of a server that was killed has to be gone."""
_HEALTH = "/health"
_WAITS = "waiting for the engine of a server that was killed to end"


@dataclass(frozen=True, slots=True)
class _End:
    """How a life ended."""

    why: str
    hung: bool
    """The process ran and did not answer."""
    code: int | None
    seconds: float
    served: float | None
    """Seconds that it was ready; None: it never was."""
    fatal: bool = False


class Supervisor(EngineBase):
    """An `Engine` that is a process of ours.

    async with Supervisor(launch, run_dir=Path(".agentopt/serve/8000")) as engine:
        await engine.ready()
    """

    def __init__(
        self,
        launch: Launch,
        *,
        run_dir: Path,
        options: SupervisorOptions | None = None,
        on_event: events.OnEvent | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            launch: what is started.
            run_dir: folder for its log, its socket and its lock.
            options: times and numbers.
            on_event: told what happens, on the event loop.
        """
        super().__init__(launch.name, launch.abilities, options or SupervisorOptions(), on_event)
        self.launch = launch
        self.pid: int | None = None
        """Of the engine's process; None while there is none."""
        self._folder = RunFolder(run_dir)
        self._log = EngineLog(
            run_dir / "engine.log",
            limit=self.options.log_bytes,
            files=self.options.log_files,
            on_line=self._read_line,
        )
        self._full = False
        """It was told, in this life, that the log cannot be written."""
        self._began = 0.0
        self._stage = ""
        self._task: asyncio.Task[None] | None = None
        self._troubles = 0
        """Lives in a row that ended early: the pause before the next one."""
        self._vain = 0
        """Lives in a row that never got ready: how many more there are."""

    async def start(self) -> None:
        """Make the run folder and begin to start the engine; `ready` waits for it.

        Raises:
            UserError: the folder cannot be written.
        """
        if self._task is not None:
            raise RuntimeError("a supervisor is started once")
        self._folder.make()
        self._task = asyncio.create_task(self._run(), name="engine supervisor")

    async def aclose(self) -> None:
        """Stop the engine: TERM, after the grace KILL, to all of it. May be called twice."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._log.close()
        if self.phase is not Phase.STOPPED:
            self._become(Phase.STOPPED)
            self.tell(events.Stopped(self.name))

    def log_tail(self, lines: int = 20) -> list[str]:
        """The last lines of the engine's log."""
        return self._log.tail(lines)

    # --- lives -------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            try:
                end = await self._life()
            except AgentoptError as error:  # nothing could be started, and nothing will change that
                end = _End(str(error).rstrip("."), False, None, 0.0, None, fatal=True)
            except Exception as error:  # noqa: BLE001  # a mistake of ours: requests must not go to what is not there
                self._become(Phase.RESTARTING)
                end = _End(f"{type(error).__name__}: {error}", False, None, 0.0, None)
            if not self._goes_on(end):
                return
            pause = min(self.options.longest_delay, self.options.first_delay * 2.0 ** (self._troubles - 1))
            self.tell(events.Waiting(pause, self._vain + 1, end.why))
            await asyncio.sleep(pause)

    def _goes_on(self, end: _End) -> bool:
        """Tell how it ended, and decide whether there is a next life."""
        self.reason = end.why  # also of one that could not be started at all
        stable = end.served is not None and end.served >= self.options.stable_after
        self._troubles = 1 if stable else self._troubles + 1
        self._vain = self._vain + 1 if end.served is None else 0
        if end.hung:
            self.tell(events.Hung(self.name, end.why))
        else:
            self.tell(events.Died(self.name, end.why, end.seconds, end.code))
        # What is wrong for good shows at the first start; later the same words may be an accident.
        self._explained = end.fatal
        if not (end.fatal and self.generation <= max(1, self._vain)):
            if self._vain < self.options.failed_starts:
                return True
            self.reason = f"it was started {self._vain} times and never got ready: {end.why}"
        self._become(Phase.FAILED)
        self.tell(events.Failed(self.name, self.reason, tuple(self.log_tail())))
        return False

    async def _life(self) -> _End:
        """One process, from its start until nothing of it is left."""
        self.generation += 1
        self._began, self._stage = time.monotonic(), ""
        child = await self._begin()
        ended = asyncio.create_task(child.ended(), name="engine ended")
        try:
            trouble = await self._until_ready(child, ended)
            if trouble is None:
                trouble = await self._watch(child, ended)
            hung, served = child.alive, None if self.started is None else time.monotonic() - self.started
            hint = None if hung else self.launch.hint(self._log.tail(200), child.code)
            self.reason = why = hint.text if hint is not None else trouble if hung else _ending(child.code)
            self._become(Phase.RESTARTING if self.generation > 1 or served is not None else Phase.STARTING)
            self._log.note(f"engine {'is killed' if hung else 'ended'}: {why}")
            if hung:
                child.kill()
        finally:
            ended.cancel()
            await _to_the_end(child.stop())
            self.pid = None
            if self.address.socket is not None:
                Path(self.address.socket).unlink(missing_ok=True)
        fatal = hint is not None and hint.fatal
        return _End(why, hung, child.code, time.monotonic() - self._began, served, fatal)

    async def _begin(self) -> Child:
        """Start the process.

        Raises:
            AgentoptError: it cannot be.
        """
        held = await self._folder.lock(self.options.stop_grace + _FORMER, lambda: self._progress(_WAITS))
        try:
            token = secrets.token_hex(24)
            self.address = self._folder.address(token)
            self._log.hide(token)
            self._log.clear()
            self._log.dropped, self._full = 0, False
            command = self.launch.command(self.address)
            self._log.note(f"start {self.generation}: {' '.join(command)}")
            env = {**self.launch.env, self.launch.token_env: token}
            child = await Child.start(command, env, log=self._log, grace=self.options.stop_grace, hold=held)
        finally:
            os.close(held)
        self.pid = child.pid or None
        self.tell(events.Starting(self.name, self._vain + 1, child.pid))
        return child

    async def _until_ready(self, child: Child, ended: asyncio.Task[None]) -> str | None:
        """Wait until it is ready (None), or can no longer become so (why)."""
        until = self._began + self.options.start_timeout
        while await self._raced(self._health(_HEALTH), ended, "it ended") is not None:
            if not child.alive:
                return "it ended"
            if time.monotonic() > until:
                return f"it was not ready within {self.options.start_timeout:g} s"
            await asyncio.wait({ended}, timeout=_POLL)
        return await self._raced(self._welcome(), ended, "it ended")

    async def _welcome(self) -> None:
        """It answers: learn what it can do, let it be prepared, and forward requests to it."""
        self.abilities = await self._look(self.launch.abilities)
        await self._prepare()
        self._tell_dropped()
        self.restarts += self.generation > 1
        self.reason = None
        self._become(Phase.READY)
        self.tell(events.Ready(self.name, time.monotonic() - self._began, self.generation))

    async def _watch(self, child: Child, ended: asyncio.Task[None]) -> str:
        """Look at its health until it has ended or hangs; gives what is wrong."""
        answered, misses = time.monotonic(), 0
        while True:
            seconds = self.options.health_interval
            suspected = await self._pause(ended, seconds if misses == 0 else min(seconds, _AGAIN))
            if not child.alive:
                return "it ended"
            trouble = await self._raced(self._health(_HEALTH), ended, "it ended")
            if not child.alive:
                return "it ended"
            if trouble is None:
                if suspected and (stalled := await self._raced(self._stalled(), ended, "it ended")) is not None:
                    return stalled
                answered, misses = time.monotonic(), 0
                self._tell_dropped()
                continue
            misses += 1
            silent = time.monotonic() - answered
            if misses >= 2 and silent >= self.options.hung_after:
                return f"{trouble}; no good answer for {silent:.0f} s"

    async def _stalled(self) -> str | None:
        """Why it is taken to compute no more, though its health is good."""
        if self.launch.counters is None:
            return None
        return await stalled(self.address, self.abilities, self.launch.counters, self.options.token_within)

    async def _pause(self, ended: asyncio.Task[None], seconds: float) -> bool:
        """Until it ends, is suspected (True), or the time is over."""
        suspected = asyncio.create_task(self._suspected.wait())
        try:
            await asyncio.wait({ended, suspected}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            suspected.cancel()
        found = self._suspected.is_set()
        self._suspected.clear()
        return found

    async def _raced(self, work: Coroutine[Any, Any, str | None], ended: asyncio.Task[None], late: str) -> str | None:
        """What `work` gives, or `late` when the process ends before."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else late
        finally:
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    # --- its log -----------------------------------------------------------------------------------------------------

    def _read_line(self, line: str) -> None:
        """Say how far a start is."""
        if self.phase is Phase.READY:
            return
        for pattern, words in self.launch.stages:
            found = pattern.search(line)
            if found is not None:
                self._progress(found.expand(words))
                return

    def _tell_dropped(self) -> None:
        """Say once in a life that its log loses lines."""
        if self._log.dropped and not self._full:
            self._full = True
            self.tell(events.Warned(f"{self._log.path}: {self._log.dropped} lines could not be written (disk full?)."))

    def _progress(self, what: str) -> None:
        if what != self._stage:
            self._stage = what
            self.tell(events.Progress(what, time.monotonic() - self._began))


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait for `work` also when cancelled meanwhile: who closes a supervisor finds its engine gone."""
    task, cancelled = asyncio.create_task(work), None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def _ending(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "its process ended, and nobody saw how"
    if code < 0:
        with suppress(ValueError):
            return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"
