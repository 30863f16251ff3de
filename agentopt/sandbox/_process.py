"""The parent's side of the process tier: one warm worker, restarted when it was killed, and a pool of them."""

from __future__ import annotations

import builtins
import functools
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from agentopt.errors import UserError
from agentopt.graph import (
    ALLOWED_MODULES,
    CodeError,
    CodeTimeout,
    Used,
    WorkerDied,
    active_candidate,
    decode_crossing,
    draw_seed,
    encode_crossing,
)

_WORKER = Path(__file__).with_name("_worker.py")
_START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may use: wall-clock seconds, and bytes of memory, result and file written."""

    seconds: float = 5.0
    memory_bytes: int = 1 << 30
    result_bytes: int = 4 << 20
    file_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for name in ("seconds", "memory_bytes", "result_bytes", "file_bytes"):
            if not getattr(self, name) > 0:
                raise UserError(f"sandbox limit {name!r}: found {getattr(self, name)!r}; expected a number above 0.")


class _Worker:
    """One live worker process with its pipes and its folder."""

    def __init__(self, limits: Limits) -> None:
        self.folder = tempfile.mkdtemp(prefix="agentopt-sandbox-")
        request_read, request_write = os.pipe()
        reply_read, reply_write = os.pipe()
        try:
            self.process = self._start(request_read, reply_write)
        except OSError:
            for descriptor in (request_write, reply_read):
                os.close(descriptor)
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        finally:
            os.close(request_read)
            os.close(reply_write)
        self.requests, self.replies = request_write, reply_read
        os.set_blocking(request_write, False)
        os.set_blocking(reply_read, False)
        self.buffer = b""
        self.owner = os.getpid()
        self.defined: set[str] = set()
        # The group is killed and the folder removed also when nobody calls close().
        self.close = weakref.finalize(
            self, _destroy, self.process, (request_write, reply_read), self.folder, self.owner
        )
        settings = {
            "modules": sorted(ALLOWED_MODULES),
            "max_bytes": limits.result_bytes,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "folder": self.folder,
        }
        self.exchange(settings, _START_SECONDS, limits.result_bytes)

    def _start(self, request_read: int, reply_write: int) -> subprocess.Popen[bytes]:
        # -s -P and this environment do what -I does, and leave PYTHONHASHSEED in force: a set's order must not differ
        # from one worker to the next.
        environment = {
            "HOME": self.folder,
            "LANG": "C.UTF-8",
            "PATH": os.defpath,
            "PYTHONHASHSEED": "0",
            "TMPDIR": self.folder,
        }
        return subprocess.Popen(
            [sys.executable, "-s", "-P", "-B", "-X", "utf8", str(_WORKER), str(request_read), str(reply_write)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(request_read, reply_write),
            cwd=self.folder,
            env=environment,
            start_new_session=True,
        )

    def exchange(self, request: Mapping[str, Any], seconds: float, max_bytes: int) -> Any:
        """Send one request, return the reply.

        Raises:
            TimeoutError: no reply within `seconds`.
            EOFError: the worker ended, or its reply is longer than any allowed one.
        """
        deadline = time.monotonic() + seconds
        data = json.dumps(request).encode("ascii") + b"\n"
        try:
            self._send(data, deadline)
        except (BrokenPipeError, ConnectionError):
            raise EOFError from None
        chunks = [self.buffer]
        size = len(self.buffer)
        while b"\n" not in chunks[-1]:
            self._wait([self.replies], [], deadline)
            chunk = os.read(self.replies, 1 << 16)
            size += len(chunk)
            if not chunk or size > max_bytes + (1 << 20):
                raise EOFError
            chunks.append(chunk)
        line, _, self.buffer = b"".join(chunks).partition(b"\n")
        return json.loads(line)

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait([], [self.requests], deadline)
            try:
                view = view[os.write(self.requests, view) :]
            except BlockingIOError:
                continue

    @staticmethod
    def _wait(readers: list[int], writers: list[int], deadline: float) -> None:
        left = deadline - time.monotonic()
        poll = select.poll()
        for descriptor in readers:
            poll.register(descriptor, select.POLLIN)
        for descriptor in writers:
            poll.register(descriptor, select.POLLOUT)
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError


def _destroy(process: subprocess.Popen[bytes], descriptors: tuple[int, ...], folder: str, owner: int) -> None:
    """Kill the worker's whole process group, reap it, close the pipes, remove the folder."""
    if os.getpid() != owner:
        return  # a fork of the owner ends: the worker is not its own
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    for descriptor in descriptors:
        os.close(descriptor)
    shutil.rmtree(folder, ignore_errors=True)


class ProcessRunner:
    """A `CodeRunner` with one warm worker process. Process tier: not a boundary for hostile code.

    Calls are made one after the other, from any thread. The worker starts at the first call; when it was killed (too
    slow, too much memory, crashed) the call fails with a clear error and the next one starts another worker. Changed
    code that draws from `random` gets a seed from `draw_seed`, so a rollout can be repeated.
    """

    def __init__(self, limits: Limits | None = None, *, definitions: dict[str, dict[str, Any]] | None = None) -> None:
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        # A pool gives all its runners the same map, so that an id stays good when a runner is ended.
        self._definitions = {} if definitions is None else definitions

    @property
    def pid(self) -> int | None:
        """The worker's process id, None when none is running."""
        worker = self._worker
        return worker.process.pid if worker is not None else None

    def compile(self, source: str, name: str, uses: Sequence[Used] = ()) -> str:
        """Define the function `name` of `source` in the worker; return the id for `call`. Done once per source.

        Raises:
            CodeError: the source does not compile, its top level raises, or it does not define `name`.
        """
        request: dict[str, Any] = {
            "op": "define",
            "name": name,
            "source": source,
            "uses": [use.to_dict() for use in uses],
        }
        identity = hashlib.sha256(json.dumps(request, sort_keys=True).encode("ascii")).hexdigest()[:24]
        with self._lock:
            if identity not in self._definitions:
                request["id"] = identity
                self._define(self._live(), request)
                self._definitions[identity] = request
        return identity

    def call(self, function_id: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
        """Call the function and return its result (JSON values, registered dataclasses).

        Raises:
            CodeError: the function raised, or its result cannot cross; also an instance of the built-in exception.
            CodeTimeout: it ran longer than `limits.seconds` and was killed.
            WorkerDied: the worker ended during the call.
            UserError: an argument cannot cross.
        """
        definition = self._definitions.get(function_id)
        if definition is None:
            raise UserError(f"sandbox: no function {function_id!r} was compiled by this runner.")
        name: str = definition["name"]
        request = {
            "op": "call",
            "id": function_id,
            "args": [encode_crossing(value, f"argument {index} of {name}") for index, value in enumerate(args)],
            "kwargs": {key: encode_crossing(value, f"argument {key!r} of {name}") for key, value in kwargs.items()},
            "seed": draw_seed(f"code {name}"),
        }
        with self._lock:
            worker = self._live()
            if function_id not in worker.defined:
                self._define(worker, definition)
            return decode_crossing(self._exchange(worker, request, name))

    async def acall(self, function_id: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
        """Like `call`, in a thread, so that the event loop goes on."""
        import anyio.to_thread

        return await anyio.to_thread.run_sync(functools.partial(self.call, function_id, args, kwargs))

    def close(self) -> None:
        """End the worker; a later call starts another one."""
        with self._lock:
            self._drop()

    def __enter__(self) -> ProcessRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _live(self) -> _Worker:
        if self._worker is not None and self._worker.owner != os.getpid():
            self._worker = None  # this process was forked: the pipes are the parent's
        if self._worker is not None and self._worker.process.poll() is not None:
            self._drop()
        if self._worker is None:
            try:
                self._worker = _Worker(self.limits)
            except (OSError, EOFError, ValueError) as error:
                reason = str(error) or "it ended at once"
                raise WorkerDied(
                    "sandbox", "WorkerDied", f"the worker process could not be started: {reason}"
                ) from error
        return self._worker

    def _drop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _define(self, worker: _Worker, request: Mapping[str, Any]) -> None:
        self._exchange(worker, request, request["name"])
        worker.defined.add(request["id"])

    def _exchange(self, worker: _Worker, request: Mapping[str, Any], name: str) -> Any:
        seconds = self.limits.seconds
        try:
            reply = worker.exchange({**request, "seconds": seconds}, seconds, self.limits.result_bytes)
        except TimeoutError:
            self._drop()
            raise CodeTimeout(name, "TimeoutError", f"no result within {seconds:g} s; the call was killed") from None
        except (EOFError, ValueError):
            self._fail_dead(worker, name)
        except BaseException:
            self._drop()  # interrupted between request and reply: the next reply would be the wrong one
            raise
        if "error" in reply:
            _raise(name, reply["error"])
        return reply["ok"]

    def _fail_dead(self, worker: _Worker, name: str) -> NoReturn:
        try:
            code: int | None = worker.process.wait(1.0)
        except subprocess.TimeoutExpired:
            code = None
        self._drop()
        if code is None:
            reason = "it broke the protocol"
        elif code < 0:
            reason = f"it was ended by {_signal_name(-code)}"
        else:
            reason = f"it ended with exit code {code}"
        raise WorkerDied(
            name,
            "WorkerDied",
            f"the worker process died during the call: {reason}; the next call starts another worker",
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


_classes: dict[str, type[CodeError]] = {}


def _error_class(type_name: str) -> type[CodeError]:
    """Return CodeError mixed with the built-in exception of that name, where there is one and Python allows it."""
    known = _classes.get(type_name)
    if known is not None:
        return known
    original: object = getattr(builtins, type_name, None)
    cls: type[CodeError] = CodeError
    if isinstance(original, type) and issubclass(original, Exception) and original is not Exception:
        if issubclass(original, (StopIteration, StopAsyncIteration)):
            return CodeError  # raising these would end the caller's loops
        try:
            cls = type("CodeError", (CodeError, original), {"__module__": CodeError.__module__})
            cls("f", "t", "d")
        except TypeError:  # a constructor or layout that does not combine
            cls = CodeError
        _classes[type_name] = cls  # only names of builtins, so this stays small
    return cls


def _raise(name: str, error: Mapping[str, Any]) -> NoReturn:
    raise _error_class(error["type"])(
        name,
        error["type"],
        error["message"],
        line=error["line"],
        source_line=error["source_line"],
        trace=error["trace"],
    )


class RunnerPool:
    """A `CodeRunner` with one warm worker per candidate, at most `size` of them; the least recently used one is ended.

    This is what `agentopt` uses by default. Candidates never share a worker, so one candidate's code cannot leave
    something behind for another's.
    """

    def __init__(self, limits: Limits | None = None, size: int = 4) -> None:
        self.limits = limits or Limits()
        self.size = size
        self._runners: OrderedDict[str, ProcessRunner] = OrderedDict()
        self._definitions: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def _runner(self) -> ProcessRunner:
        candidate = active_candidate()
        key = candidate.hash if candidate is not None else ""
        dropped: list[ProcessRunner] = []
        with self._lock:
            runner = self._runners.get(key)
            if runner is None:
                runner = self._runners[key] = ProcessRunner(self.limits, definitions=self._definitions)
            self._runners.move_to_end(key)
            while len(self._runners) > self.size:
                dropped.append(self._runners.popitem(last=False)[1])
        for old in dropped:
            old.close()  # waits for a call that is running; a later call of that candidate starts a new worker
        return runner

    def compile(self, source: str, name: str, uses: Sequence[Used] = ()) -> str:
        """As `ProcessRunner.compile`, in the active candidate's worker."""
        return self._runner().compile(source, name, uses)

    def call(self, function_id: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
        """As `ProcessRunner.call`, in the active candidate's worker."""
        return self._runner().call(function_id, args, kwargs)

    async def acall(self, function_id: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
        """As `ProcessRunner.acall`, in the active candidate's worker."""
        return await self._runner().acall(function_id, args, kwargs)

    def close(self) -> None:
        """End every worker."""
        with self._lock:
            runners, self._runners = list(self._runners.values()), OrderedDict()
        for runner in runners:
            runner.close()

    def __enter__(self) -> RunnerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
