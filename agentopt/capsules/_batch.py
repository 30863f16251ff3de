"""Many capsules: a folder of files or a JSONL file in, one record per input out, kill-proof.

Records are appended as they finish and synced to disk before anybody is told, so a run that was killed goes on where it
was: `resume` skips what is done, repairs a line that was cut in the middle, and tries errors again. When all is done
the records are put in the order of the inputs, so the finished file does not depend on who was faster. One bad input is
one error record; the rest goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import anyio
import anyio.to_thread
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from agentopt.capsules._batch_inputs import RECORDS, BatchItem, Entry, entries, item, read
from agentopt.capsules._batch_records import (
    Record,
    Unwritable,
    append,
    open_journal,
    put_in_order,
    read_records,
    write_text,
)
from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules._types import Capsule
from agentopt.errors import UserError
from agentopt.models import BudgetExhausted


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """How far a batch is; tokens are of the inputs that have a capsule."""

    done: int
    failed: int
    skipped: int
    """Done in an earlier run."""
    total: int
    tokens: int
    original_tokens: int
    last: str = ""
    """The id of the input that was finished last."""


@dataclass(slots=True)
class _State:
    done: int = 0
    failed: int = 0
    skipped: int = 0
    total: int = 0
    tokens: int = 0
    original_tokens: int = 0
    records: dict[str, Record] = field(default_factory=dict[str, Record])
    """Of earlier runs: the id's digest and outcome, without the texts."""

    def count(self, record: Mapping[str, Any]) -> None:
        capsule = record.get("capsule")
        if capsule is None:
            self.failed += 1
            return
        self.done += 1
        self.tokens += capsule["tokens"]
        self.original_tokens += capsule["original_tokens"]

    def progress(self, last: str = "") -> BatchProgress:
        return BatchProgress(self.done, self.failed, self.skipped, self.total, self.tokens, self.original_tokens, last)


async def batch(
    inputs: str | Path,
    make: Callable[[BatchItem], Awaitable[Capsule]],
    *,
    out: str | Path,
    concurrency: int = 4,
    resume: bool = False,
    settings: str = "",
    on_progress: Callable[[BatchProgress], None] | None = None,
) -> BatchProgress:
    """Make a capsule of every input and write one record each.

    A record is `{"id", "input", "settings", "capsule"}` or, where there is none, `{..., "error": {"type", "message"}}`;
    `input` is a hash of what was read. An input that changed since, or other `settings`, is made again.

    Args:
        inputs: a folder (every file below it, hidden ones left out) or a JSONL file whose rows hold `text` or
            `messages`, and maybe `id` and `query`.
        make: from an item to its capsule.
        out: a `.jsonl` file of records; or, for a folder of inputs, a folder (texts under the inputs' names and the
            records in `capsules.jsonl`).
        concurrency: how many are made at the same time.
        resume: go on with an `out` that exists.
        settings: identifies what `make` does.
        on_progress: called after each record that is on disk.

    Raises:
        UserError: the inputs cannot be read, or `out` exists and `resume` is off.
        Unwritable (a RunError): `out` cannot be written.
        BudgetExhausted: from `make`; what is done stays.
    """
    source, target = Path(inputs), Path(out)
    if concurrency < 1:
        raise UserError(f"concurrency: found {concurrency}, expected at least 1.")
    found = entries(source, target)
    folder = target if source.is_dir() and target.suffix.lower() != ".jsonl" else None
    journal = target / RECORDS if folder is not None or target.is_dir() else target
    state = _State(total=len(found))
    if journal.exists():
        if not resume:
            raise UserError(f"{journal} exists; resume it (--resume), or name another output.")
        state.records = await anyio.to_thread.run_sync(read_records, journal)
    run = _Run(make, journal, folder, settings, state, on_progress)
    await run.all(found, concurrency)
    await anyio.to_thread.run_sync(put_in_order, journal, [entry.id for entry in found])
    return state.progress()


class _Run:
    """One batch under way."""

    def __init__(
        self,
        make: Callable[[BatchItem], Awaitable[Capsule]],
        journal: Path,
        folder: Path | None,
        settings: str,
        state: _State,
        on_progress: Callable[[BatchProgress], None] | None,
    ) -> None:
        self.make = make
        self.journal = journal
        self.folder = folder
        self.settings = settings
        self.state = state
        self.on_progress = on_progress

    async def all(self, found: list[Entry], concurrency: int) -> None:
        file = await anyio.to_thread.run_sync(open_journal, self.journal)
        send, receive = anyio.create_memory_object_stream[Record](concurrency)
        waiting = iter(found)
        failure: BaseException | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._write, receive, file)
                try:
                    async with send, anyio.create_task_group() as workers:
                        for _ in range(min(concurrency, len(found))):
                            workers.start_soon(self._work, waiting, send)
                except BaseExceptionGroup as group:
                    failure = _first(group)  # what is finished is written first
        except BaseExceptionGroup as group:
            raise _first(group) from group
        finally:
            file.close()
        if failure is not None:
            raise failure

    async def _work(self, waiting: Iterator[Entry], send: MemoryObjectSendStream[Record]) -> None:
        for entry in waiting:
            record = await self._record(entry)
            if record is not None:
                with anyio.CancelScope(shield=True):  # it was paid for
                    await send.send(record)

    async def _record(self, entry: Entry) -> Record | None:
        """What is to be written for an input; None when it was done before."""
        head: Record = {"id": entry.id, "input": "", "settings": self.settings}
        try:
            data = await anyio.to_thread.run_sync(read, entry)
            head["input"] = hashlib.sha256(data).hexdigest()
            if self._is_done(head):
                return None
            capsule = await self.make(item(entry, data))
            if self.folder is not None:
                path = self.folder / entry.id
                await anyio.to_thread.run_sync(write_text, path, capsule.text)
        except (BudgetExhausted, Unwritable):
            raise
        except Exception as error:  # noqa: BLE001 - one bad input must not stop the rest
            return head | {"error": _error(error)}
        shown = capsule.to_dict()
        del shown["original"]  # it is the input
        if self.folder is not None:
            del shown["text"]  # it is a file of its own
        return head | {"capsule": shown}

    def _is_done(self, head: Record) -> bool:
        before = self.state.records.get(head["id"])
        if before is None or "capsule" not in before:
            return False
        if any(before.get(name) != head[name] for name in ("input", "settings")):
            return False
        if self.folder is not None and not (self.folder / head["id"]).is_file():
            return False
        self.state.skipped += 1
        self.state.count(before)
        return True

    async def _write(self, receive: MemoryObjectReceiveStream[Record], file: BinaryIO) -> None:
        """Append what has finished: everything that is waiting shares one sync."""
        async with receive:
            async for first in receive:
                records = [first]
                with suppress(anyio.WouldBlock, anyio.EndOfStream):
                    while len(records) < 64:
                        records.append(receive.receive_nowait())
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(append, file, records)
                for record in records:
                    self.state.count(record)
                    if self.on_progress is not None:
                        self.on_progress(self.state.progress(record["id"]))


def _error(error: Exception) -> dict[str, Any]:
    shown: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, BudgetInfeasible):
        shown["minimum"] = error.minimum
    return shown


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The cause that a caller should see: task groups wrap what ended them."""
    inner = group.exceptions[0]
    return _first(cast("BaseExceptionGroup[BaseException]", inner)) if isinstance(inner, BaseExceptionGroup) else inner
