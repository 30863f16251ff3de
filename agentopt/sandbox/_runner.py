"""The parent's side of every tier: one warm worker, restarted when it was killed, and its failures as clear errors."""

from __future__ import annotations

import builtins
import functools
import hashlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Self

from agentopt.errors import UserError
from agentopt.graph import (
    CodeError,
    CodeTimeout,
    Used,
    WorkerDied,
    decode_crossing,
    draw_seed,
    encode_crossing,
)
from agentopt.sandbox._channel import Worker
from agentopt.sandbox._limits import Limits
from agentopt.sandbox._process import ProcessTier
from agentopt.sandbox._tiers import Tier


class WorkerRunner:
    """A `CodeRunner` with one warm worker of a tier, the process tier when none is given.

    Calls are made one after the other, from any thread. The worker starts at the first call; when it was killed (too
    slow, too much memory, crashed) the call fails with a clear error and the next one starts another worker. Changed
    code that draws from `random` gets a seed from `draw_seed`, so a rollout can be repeated.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        tier: Tier | None = None,
        definitions: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.tier: Tier = tier or ProcessTier()
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        # A pool gives all its runners the same map, so that an id stays good when a runner is ended.
        self._definitions = {} if definitions is None else definitions

    @property
    def pid(self) -> int | None:
        """The id of the process that was started for the worker, None when none is running."""
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
            result = self._exchange(worker, request, name)
        try:
            return decode_crossing(result)
        except (TypeError, ValueError, LookupError, AttributeError, RecursionError, UserError) as error:
            raise CodeError(name, "TypeError", f"the result cannot be read back: {error}") from None

    async def acall(self, function_id: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
        """Like `call`, in a thread, so that the event loop goes on."""
        import anyio.to_thread

        return await anyio.to_thread.run_sync(functools.partial(self.call, function_id, args, kwargs))

    def close(self) -> None:
        """End the worker; a later call starts another one."""
        with self._lock:
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _live(self) -> Worker:
        if self._worker is not None and self._worker.owner != os.getpid():
            self._worker = None  # this process was forked: the pipes are the parent's
        if self._worker is not None and self._worker.stale:
            self._drop()
        if self._worker is None:
            try:
                self._worker = Worker(self.tier, self.limits)
            except OSError as error:
                reason = f"the worker process of the {self.tier.name} tier could not be started: {error}"
                raise WorkerDied("sandbox", "WorkerDied", reason) from error
        return self._worker

    def _drop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _define(self, worker: Worker, request: Mapping[str, Any]) -> None:
        self._exchange(worker, request, request["name"])
        worker.defined.add(request["id"])

    def _exchange(self, worker: Worker, request: Mapping[str, Any], name: str) -> Any:
        seconds = self.limits.seconds
        try:
            reply = worker.exchange({**request, "seconds": seconds}, seconds, self.limits.result_bytes)
        except TimeoutError:
            self._drop()
            raise CodeTimeout(name, "TimeoutError", f"no result within {seconds:g} s; the call was killed") from None
        except EOFError:
            self._fail_dead(worker, name)
        except ValueError:
            self._drop()
            raise _died(name, "it broke the protocol") from None
        except BaseException:
            self._drop()  # interrupted between request and reply: the next reply would be the wrong one
            raise
        if "error" in reply:
            _raise(name, reply["error"])
        return reply["ok"]

    def _fail_dead(self, worker: Worker, name: str) -> NoReturn:
        try:
            code: int | None = worker.process.wait(1.0)
        except subprocess.TimeoutExpired:
            code = None
        self._drop()
        if code is None:
            reason = "it closed its pipes"
        elif code < 0:
            reason = f"it was ended by {_signal_name(-code)}"
        else:
            reason = f"it ended with exit code {code}"
        raise _died(name, reason)


def _died(name: str, reason: str) -> WorkerDied:
    text = f"the worker process died during the call: {reason}; the next call starts another worker"
    return WorkerDied(name, "WorkerDied", text)


class ProcessRunner(WorkerRunner):
    """A `WorkerRunner` in the process tier: not a boundary for hostile code."""

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__(limits, tier=ProcessTier())


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
