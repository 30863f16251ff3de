"""Which adapters can be asked for, and which of them the engine holds: hundreds known, the last used resident.

Invariants: an adapter that a request uses is never taken from the engine; loads and unloads happen one at a time (first
uses of one adapter that come together load it once); what the engine holds are copies of what was checked (`Staging`).
A folder that changes on disk is checked again when no request uses it, at most once a second; where the new content is
bad, the last good copy goes on being served, and the list says why. After a restart of the engine, which forgets all,
the adapters that it held are loaded again before it is asked anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio

from agentopt.errors import AgentoptError, RunError, UserError
from agentopt.serving._types import Refusal
from agentopt.serving.adapters._base import BaseFacts
from agentopt.serving.adapters._check import AdapterFacts, check_adapter, check_name, stamp
from agentopt.serving.adapters._driver import Driver
from agentopt.serving.adapters._entry import TRY_AGAIN, AdapterStatus, Entry, unavailable
from agentopt.serving.adapters._hashes import BaseHashes
from agentopt.serving.adapters._kept import Kept
from agentopt.serving.adapters._staging import Staging

_LOOK_AGAIN = 1.0


class AdapterRegistry:
    """The adapters of one server; for use in one event loop.

    Args:
        base: the served model.
        driver: loads and unloads.
        resident: how many adapters the engine may hold at a time.
        staging: folder for the copies that the engine reads; emptied.
        path: file that lists what was added with `keep`; None for none.
        hashes: of the base, for folded adapters.
        taken: what else a name stands for; None when it is free.
        patience: seconds that a request waits for a place at the engine.

    Raises:
        UserError: `resident` is below one, or the staging folder cannot be made.
    """

    def __init__(
        self,
        base: BaseFacts,
        driver: Driver,
        *,
        resident: int,
        staging: Path,
        path: Path | None = None,
        hashes: BaseHashes | None = None,
        taken: Callable[[str], str | None] | None = None,
        patience: float = 30.0,
    ) -> None:
        if resident < 1:
            raise UserError(f"adapters: found {resident} places at the engine, expected at least 1.")
        self.base, self.patience = base, patience
        self._kept = None if path is None else Kept(path)
        self.taken = taken
        """May be set later: the catalog knows the other names."""
        self.places = resident
        self.loads = 0
        """Adapters given to the engine so far."""
        self._driver, self._hashes, self._staging = driver, hashes, Staging(staging)
        self._entries: dict[str, Entry] = {}
        self._leaving: dict[str, Entry] = {}
        self._lock = anyio.Lock()
        self._freed = asyncio.Event()
        self._uses = 0
        self._tasks: set[asyncio.Task[None]] = set()

    # --- what there is -----------------------------------------------------------------------------------------------

    def names(self) -> tuple[str, ...]:
        """In the order in which they were added."""
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def facts(self, name: str) -> AdapterFacts:
        """Of one adapter; KeyError when there is none of this name."""
        return self._entries[name].facts

    def list(self) -> list[AdapterStatus]:
        """All, in the order in which they were added."""
        return [
            AdapterStatus(one.facts, one.resident is not None, one.users, one.loads, one.problem)
            for one in self._entries.values()
        ]

    @property
    def known(self) -> int:
        """How many can be asked for."""
        return len(self._entries)

    @property
    def resident(self) -> int:
        """How many the engine holds."""
        return len(self._held())

    def _held(self) -> list[Entry]:
        return [one for one in (*self._entries.values(), *self._leaving.values()) if one.resident is not None]

    # --- adding and removing -----------------------------------------------------------------------------------------

    async def add(self, name: str, folder: str | Path, *, keep: bool = False) -> AdapterFacts:
        """Check a folder, and let it be asked by this name; it is loaded when it is first asked.

        Args:
            name: also what the engine calls it.
            folder: as peft or `agentopt fold` writes it.
            keep: list it in the file, so that `restore` adds it again.

        Raises:
            UserError: the name is taken or no name, or the folder cannot be served.
            RunError: the file cannot be written.
        """
        facts = await self._add(name, folder, keep)
        if keep:
            try:
                self._write()
            except RunError:  # who asked is told that it is not there: so it is not
                del self._entries[name]
                raise
        return facts

    async def _add(self, name: str, folder: str | Path, keep: bool) -> AdapterFacts:
        self._check_free(check_name(name))
        facts = await self._check(name, Path(folder).expanduser().absolute())
        self._check_free(name)
        self._entries[name] = Entry(facts, keep)
        return facts

    async def remove(self, name: str) -> None:
        """Let it be asked no more. Requests that use it end first; then the engine forgets it.

        Raises:
            UserError: there is none of this name.
            RunError: the file cannot be written: it is gone, and comes back with the next start.
        """
        entry = self._entries.pop(name, None)
        if entry is None:
            known = ", ".join(self._entries) or "none"
            raise UserError(f"adapter {name!r}: not known; expected one of: {known}.")
        entry.gone = True
        if entry.users or entry.resident is not None:
            self._leaving[name] = entry
            if not entry.users:
                await asyncio.shield(self._start(self._leave(name, entry)))
        if entry.keep:
            self._write()

    async def restore(self) -> list[str]:
        """Add what the file lists; gives a sentence for each that could not be added.

        Raises:
            UserError: the file cannot be read.
        """
        problems: list[str] = []
        for name, folder in ({} if self._kept is None else self._kept.read()).items():
            if name in self._entries:
                continue
            try:
                await self._add(name, folder, keep=True)
            except UserError as error:
                problems.append(str(error))
        return problems

    async def aclose(self) -> None:
        """Stop what is going on; the engine is not asked to forget anything."""
        if self._hashes is not None:
            self._hashes.close()
        going = list(self._tasks)
        for task in going:
            task.cancel()
        if going:
            await asyncio.wait(going)

    def _check_free(self, name: str) -> None:
        other = self.taken(name) if self.taken is not None else None
        if name in self._entries:
            other = f"an adapter ({self._entries[name].facts.folder}): remove it first, or use another name"
        elif name in self._leaving:
            other = "an adapter that was removed but is still in use: try again when its requests have ended"
        if other:
            raise UserError(f"adapter {name!r}: the name is taken by {other}.")

    async def _check(self, name: str, folder: Path) -> AdapterFacts:
        return await anyio.to_thread.run_sync(
            lambda: check_adapter(folder, self.base, name=name, hashes=self._hashes), abandon_on_cancel=True
        )

    def _write(self) -> None:
        if self._kept is not None:
            self._kept.write({name: one.facts.folder for name, one in self._entries.items() if one.keep})

    # --- using -------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def hold(self, name: str) -> AsyncGenerator[None]:
        """Within, the engine holds the adapter.

        Raises:
            Refusal: 404 unknown, 503 no place at the engine or the engine is not there, 500 it does not take it.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise _unknown(name)
        if not self._ready(entry):
            await self._prepare(entry)
        else:
            entry.users += 1
        self._uses += 1
        entry.used = self._uses
        try:
            yield
        finally:
            self._release(name, entry)

    def _ready(self, entry: Entry) -> bool:
        """Whether it can be used as the engine holds it. Quick: the folder is looked at once a second at most."""
        now = time.monotonic()
        if now - entry.looked >= _LOOK_AGAIN:
            entry.looked = now
            try:
                entry.stale = stamp(entry.facts.folder) != entry.facts.stamp
            except OSError:
                entry.stale = True
        # In use, or known to be bad: what the engine holds goes on being served.
        return entry.resident is not None and (not entry.stale or entry.users > 0 or not self._tries(entry))

    @staticmethod
    def _tries(entry: Entry) -> bool:
        return time.monotonic() - entry.failed_at >= TRY_AGAIN

    async def _prepare(self, entry: Entry) -> None:
        """Have it at the engine, and count one user.

        In a task of its own: a client that goes away must not leave the engine with an adapter that nobody knows of.
        """
        task = self._start(self._prepared(entry))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise Refusal(503, "The server stops.", kind="server_error", code="stopping") from None
            task.add_done_callback(lambda done: self._abandoned(entry, done))
            raise

    def _abandoned(self, entry: Entry, done: asyncio.Task[None]) -> None:
        """Nobody waits for it any more."""
        if not done.cancelled() and done.exception() is None:
            self._release(entry.facts.name, entry)

    async def _prepared(self, entry: Entry) -> None:
        async with self._lock:
            if entry.gone:
                raise _unknown(entry.facts.name)
            if entry.stale and not entry.users and self._tries(entry):
                await self._renew(entry)
            if entry.resident is None:
                if not self._tries(entry):
                    raise unavailable(entry)
                await self._make_room()
                await self._load(entry)
            entry.users += 1

    async def _renew(self, entry: Entry) -> None:
        """Check the changed folder; take the new content where it is good."""
        try:
            facts = await self._check(entry.facts.name, entry.facts.folder)
        except UserError as error:
            self._fail(entry, str(error))
            return
        changed = facts.digest != entry.facts.digest
        entry.facts, entry.stale, entry.problem = facts, False, None
        if changed and entry.resident is not None and not entry.users:
            await self._unload(entry)

    async def _make_room(self) -> None:
        """Take the least recently used from the engine until there is a place."""
        try:
            with anyio.fail_after(self.patience):
                while len(self._held()) >= self.places:
                    idle = [one for one in self._held() if not one.users]
                    if idle:
                        await self._unload(min(idle, key=lambda one: one.used))
                        continue
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            raise Refusal(
                503,
                f"All {self.places} places for adapters are in use; ask again.",
                kind="server_error",
                code="no_place",
                retry_after=5,
            ) from None

    async def _load(self, entry: Entry) -> None:
        try:
            path = await anyio.to_thread.run_sync(self._staging.put, entry.facts)
            await self._driver.load(entry.facts.name, path)
        except Refusal as error:
            self._drop_copy(entry.facts)
            if error.status == 503:
                raise
            self._fail(entry, str(error))
            raise unavailable(entry) from None
        except AgentoptError as error:
            self._fail(entry, str(error))
            raise unavailable(entry) from None
        entry.resident, entry.problem = entry.facts, None
        entry.loads += 1
        self.loads += 1

    async def _unload(self, entry: Entry) -> None:
        held, entry.resident = entry.resident, None
        if held is None:
            return
        with contextlib.suppress(Refusal):  # a dead engine holds nothing; a living one takes it in place of the old
            await self._driver.unload(held.name)
        self._drop_copy(held)

    def _drop_copy(self, facts: AdapterFacts) -> None:
        if all(one.resident is None or one.resident.digest != facts.digest for one in self._held()):
            self._staging.drop(facts)

    @staticmethod
    def _fail(entry: Entry, problem: str) -> None:
        entry.problem, entry.failed_at = problem, time.monotonic()

    def _release(self, name: str, entry: Entry) -> None:
        entry.users -= 1
        if entry.users:
            return
        self._freed.set()
        if entry.gone and self._leaving.get(name) is entry:
            self._start(self._leave(name, entry))

    def _start(self, what: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _leave(self, name: str, entry: Entry) -> None:
        async with self._lock:
            await self._unload(entry)
            if self._leaving.get(name) is entry:
                del self._leaving[name]
            self._freed.set()

    # --- restarts ----------------------------------------------------------------------------------------------------

    async def after_restart(self) -> None:
        """The engine has forgotten all: load again what it held. What fails is loaded at its next use."""
        held = sorted(self._held(), key=lambda one: one.used)
        for entry in held:
            entry.resident = None
        self._freed.set()
        for entry in held[-self.places :]:
            async with self._lock:
                if entry.gone or entry.resident is not None or len(self._held()) >= self.places:
                    continue
                with contextlib.suppress(Refusal):
                    await self._load(entry)


def _unknown(name: str) -> Refusal:
    return Refusal(404, f"The model {name!r:.160} does not exist.", code="model_not_found", param="model")
