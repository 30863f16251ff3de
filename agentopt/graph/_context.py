"""What is active where: the candidate being read, the rollout being run, the meters that count.

Everything here is held in context variables, so threads and tasks that carry their context keep it apart. The one
process-wide thing is the installed candidate, the default for servers.

Which candidate is active: the innermost `with candidate.active()` block of this thread or task, else the installed
candidate, else none. A name that the active candidate does not hold has its declared default.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import inspect
import json
import os
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import contextmanager
from contextvars import Context, ContextVar, Token, copy_context
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, ParamSpec, TypeVar, cast

from agentopt.errors import UserError
from agentopt.graph._jsonvalue import JSONValue, copied
from agentopt.graph._live import current, note_parameter_read
from agentopt.graph._records import Usage

if TYPE_CHECKING:
    from agentopt.graph._candidate import Candidate
    from agentopt.graph._parameters import ParameterSpec

P = ParamSpec("P")
T = TypeVar("T")

_PACKAGE: Final = os.path.dirname(os.path.abspath(__file__)) + os.sep
_MISSING: Final = object()

# --- the active candidate --------------------------------------------------------------------------------------------

overlay: Final[ContextVar[Candidate | None]] = ContextVar("agentopt_candidate", default=None)
_installed: Candidate | None = None


class Overlay:
    """The context manager behind `candidate.active()`; make one per block (`active()` does)."""

    __slots__ = ("_candidate", "_tokens")

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        self._tokens: list[Token[Candidate | None]] = []

    def __enter__(self) -> Candidate:
        self._tokens.append(overlay.set(self._candidate))
        return self._candidate

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _reset(overlay, self._tokens.pop())


def install(candidate: Candidate | None) -> None:
    """Make `candidate` the process default; None removes it."""
    global _installed
    _installed = candidate


def uninstall() -> None:
    """Remove the process's default candidate: outside `active()` blocks the declared defaults are read again."""
    install(None)


def active_candidate() -> Candidate | None:
    """Return the candidate whose values are read here, or None when only declared defaults are."""
    candidate = overlay.get()
    return candidate if candidate is not None else _installed


def active_value(spec: ParameterSpec) -> JSONValue:
    """Return the value of the parameter `spec` that is active here, and record the read in the open op.

    Raises:
        LostContextError: a rollout runs in this process and this thread does not carry its context.
    """
    candidate = overlay.get()
    if candidate is None:
        if _active_scopes:
            raise _lost(spec)
        candidate = _installed
    name = spec.name
    value: Any = spec.default
    if candidate is not None:
        value = candidate._values.get(name, _MISSING)
        if value is _MISSING:
            value = spec.default
    if type(value) is not str:
        value = copied(value)
    frame = current.get()
    if spec.import_time_read is None:
        _note_import_time(spec, running=frame is not None or candidate is not None or spec.read_normally)
    if frame is not None:
        note_parameter_read(
            name,
            value,
            kind=spec.kind,
            description=spec.description or None,
            constraint=spec.constraint_text or None,
        )
    return value


def peek_value(spec: ParameterSpec) -> JSONValue:
    """Return the value `active_value` would return, without recording a read and without the lost-context check."""
    candidate = active_candidate()
    if candidate is None or spec.name not in candidate._values:
        return spec.default
    return candidate._values[spec.name]


def _note_import_time(spec: ParameterSpec, *, running: bool) -> None:
    """Note the place when this read happens while a module is being imported: it freezes the value it gets."""
    frame = _user_frame()
    if frame is None:
        return
    place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    current_frame: FrameType | None = frame
    depth = 0
    while current_frame is not None and depth < 200:
        if current_frame.f_code.co_name == "<module>" and (current_frame is frame or _is_imported(current_frame)):
            spec.import_time_read = place
            return
        if running:
            return  # while a program runs only the reading line itself is looked at, to keep reads cheap
        current_frame = current_frame.f_back
        depth += 1
    spec.read_normally = True


def _is_imported(module_frame: FrameType) -> bool:
    """Whether this module-level code is an import: not the program, nor text that a launcher runs with `exec`."""
    namespace = module_frame.f_globals
    return namespace.get("__name__") != "__main__" and "__spec__" in namespace


def _user_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return frame


# --- rollouts --------------------------------------------------------------------------------------------------------


class RolloutScope:
    """One rollout: what every random draw inside it is a function of.

    Draws are numbered per place in the call tree, so two places never share a stream and calls that run at the same
    time in different ops do not disturb each other's numbers.
    """

    __slots__ = ("_counts", "_lock", "candidate_hash", "example_id", "repeat", "run_seed")

    def __init__(self, run_seed: int, candidate_hash: str, example_id: str, repeat: int = 0) -> None:
        self.run_seed = run_seed
        self.candidate_hash = candidate_hash
        self.example_id = example_id
        self.repeat = repeat
        self._counts: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"RolloutScope({self.run_seed}, {self.candidate_hash!r}, {self.example_id!r}, {self.repeat})"

    def occurrence(self, path: str, label: str) -> int:
        """Return how often this (path, label) was asked for before, and count it."""
        key = (path, label)
        with self._lock:
            number = self._counts.get(key, 0)
            self._counts[key] = number + 1
        return number


rollout_scope: Final[ContextVar[RolloutScope | None]] = ContextVar("agentopt_rollout", default=None)
op_path: Final[ContextVar[str]] = ContextVar("agentopt_op_path", default="")
_effects_allowed: ContextVar[bool] = ContextVar("agentopt_allow_effects", default=False)
_active_scopes: dict[int, RolloutScope] = {}
_state_lock = threading.Lock()


@contextmanager
def rollout(scope: RolloutScope) -> Generator[RolloutScope]:
    """Run the block as the rollout `scope`: draws are seeded by it and a parameter read elsewhere is an error."""
    token = rollout_scope.set(scope)
    path_token = op_path.set("")
    with _state_lock:
        _active_scopes[id(scope)] = scope
    try:
        yield scope
    finally:
        with _state_lock:
            _active_scopes.pop(id(scope), None)
        _reset(op_path, path_token)
        _reset(rollout_scope, token)


def current_rollout() -> RolloutScope | None:
    """Return the rollout this thread or task belongs to, or None."""
    return rollout_scope.get()


def rollouts_active() -> bool:
    """Whether any rollout runs in this process."""
    return bool(_active_scopes)


def nothing_active() -> bool:
    """Whether no candidate is active here and no rollout runs in this process: only then is a tool a plain function."""
    return _installed is None and not _active_scopes and overlay.get() is None


def enter_op_path(scope: RolloutScope, name: str) -> Token[str]:
    """Go one op down in the call tree of a rollout; undo with `op_path.reset(token)`."""
    parent = op_path.get()
    number = scope.occurrence(parent, f"op {name}")
    return op_path.set(f"{parent}/{name}#{number}")


def draw_seed(label: str = "") -> int:
    """Return a seed in 0 … 2³¹ − 1 for the next random draw made here.

    Inside a rollout it is a function of (run seed, candidate hash, example id, repeat, op path, label, occurrence), and
    the occurrence is counted from 0 per op path and label. Outside one it is a function of the label alone.
    """
    scope = rollout_scope.get()
    if scope is None:
        key: list[object] = [label]
    else:
        path = op_path.get()
        number = scope.occurrence(path, f"draw {label}")
        key = [scope.run_seed, scope.candidate_hash, scope.example_id, scope.repeat, path, label, number]
    digest = hashlib.sha256(json.dumps(key, separators=(",", ":")).encode("ascii")).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def reset_path(token: Token[str]) -> None:
    """Undo `enter_op_path`, also when a coroutine is closed from another context."""
    _reset(op_path, token)


@contextmanager
def allow_effects(allowed: bool = True) -> Generator[None]:
    """Let tools declared with `effects=True` run inside rollouts of this block (`--allow-effects`)."""
    token = _effects_allowed.set(allowed)
    try:
        yield
    finally:
        _reset(_effects_allowed, token)


def effects_allowed() -> bool:
    """Return whether tools with effects may run here even inside a rollout."""
    return _effects_allowed.get()


def _reset(variable: ContextVar[Any], token: Token[Any]) -> None:
    try:
        variable.reset(token)
    except ValueError:
        return  # closed from another context: nothing to restore there


# --- lost reads ------------------------------------------------------------------------------------------------------


class LostContextError(UserError):
    """A parameter was read, during a rollout, in a thread that does not carry the rollout's candidate.

    `name` is the parameter, `place` is `file:line` of the read.
    """

    def __init__(self, name: str, place: str, thread: str) -> None:
        self.name = name
        self.place = place
        self.thread = thread
        super().__init__(
            f"parameter {name!r} was read at {place} in thread {thread!r}, which has lost the rollout's candidate; "
            "start the thread's function with ao.bind_context(fn), or use ao.ThreadPoolExecutor."
        )


@dataclass(frozen=True, slots=True)
class LostRead:
    """One parameter read without a candidate while rollouts ran; `scopes` are the rollouts that were active."""

    name: str
    place: str
    thread: str
    scopes: tuple[RolloutScope, ...]

    @property
    def error(self) -> LostContextError:
        """The error that the reading thread got."""
        return LostContextError(self.name, self.place, self.thread)


_lost_reads: deque[LostRead] = deque(maxlen=1000)


def _lost(spec: ParameterSpec) -> LostContextError:
    frame = _user_frame()
    place = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "an unknown place"
    with _state_lock:
        noted = LostRead(spec.name, place, threading.current_thread().name, tuple(_active_scopes.values()))
        _lost_reads.append(noted)
    return noted.error


def lost_reads(scope: RolloutScope | None = None) -> list[LostRead]:
    """Return the lost reads noted so far; with `scope`, those made while that rollout was active.

    A thread cannot be traced back to the rollout that started it, so with several rollouts at a time a lost read counts
    for each of them: all are wrong until the program is fixed.
    """
    with _state_lock:
        noted = list(_lost_reads)
    return [read for read in noted if scope is None or any(active is scope for active in read.scopes)]


def clear_lost_reads() -> None:
    """Forget the lost reads noted so far."""
    with _state_lock:
        _lost_reads.clear()


# --- meters ----------------------------------------------------------------------------------------------------------


class Meter:
    """Counts what is used inside a `with metered()` block, in USD and `Usage`.

    `unpriced_calls` is the number of calls whose price is not known; `cost` is then a lower bound.
    """

    __slots__ = ("_lock", "cost", "unpriced_calls", "usage")

    def __init__(self) -> None:
        self.usage = Usage()
        self.cost = 0.0
        self.unpriced_calls = 0
        self._lock = threading.Lock()

    def add(self, usage: Usage | None, cost: float | None) -> None:
        """Add one report; `cost=None` means that the price is not known."""
        with self._lock:
            if usage is not None:
                self.usage = self.usage + usage
            if cost is not None:
                self.cost += cost
            elif usage is not None and (usage.calls or not usage.cached_calls):
                self.unpriced_calls += max(1, usage.calls)

    def __repr__(self) -> str:
        return f"Meter(cost={self.cost}, usage={self.usage}, unpriced_calls={self.unpriced_calls})"


_meters: ContextVar[tuple[Meter, ...]] = ContextVar("agentopt_meters", default=())


@contextmanager
def metered() -> Generator[Meter]:
    """Count usage and cost of everything done in the block, threads and tasks that carry its context included.

    Blocks nest: an outer meter counts what an inner one counts.
    """
    meter = Meter()
    token = _meters.set((*_meters.get(), meter))
    try:
        yield meter
    finally:
        _reset(_meters, token)


def meter_add(usage: Usage | None, cost: float | None = None) -> None:
    """Report usage and cost (USD, None when unknown) to every meter of this context."""
    for meter in _meters.get():
        meter.add(usage, cost)


# --- carrying the context --------------------------------------------------------------------------------------------


class InContext(Generic[T]):
    """Awaits a coroutine inside a given context, entered for each step and left at every suspension."""

    __slots__ = ("_awaitable", "_context")

    def __init__(self, context: Context, awaitable: Awaitable[T]) -> None:
        self._context = context
        self._awaitable = awaitable

    def __await__(self) -> Generator[Any, Any, T]:
        run = self._context.run
        steps = run(self._awaitable.__await__)
        sent: Any = None
        thrown: BaseException | None = None
        while True:
            try:
                if thrown is not None:
                    error, thrown = thrown, None
                    waiting: Any = run(steps.throw, error)
                elif sent is None:
                    waiting = run(next, steps)
                else:
                    waiting = run(steps.send, sent)
            except StopIteration as stop:
                return cast("T", stop.value)
            try:
                sent = yield waiting
            except GeneratorExit:
                run(steps.close)
                raise
            except BaseException as error:  # noqa: BLE001 - handed on to the coroutine, which decides
                thrown = error


def bind_context(fn: Callable[P, T]) -> Callable[P, T]:
    """Return `fn` bound to the context of this moment: candidate, rollout, recording and meters.

    For functions that run in threads of your own: `Thread(target=ao.bind_context(work))`. May be called any number of
    times, also at the same time; each call gets a copy of the context. Coroutine functions are bound too.
    """
    context = copy_context()

    if inspect.iscoroutinefunction(fn):

        @functools.wraps(fn)
        async def bound_async(*args: P.args, **kwargs: P.kwargs) -> Any:
            return await InContext(context.copy(), cast("Coroutine[Any, Any, Any]", fn(*args, **kwargs)))

        return cast("Callable[P, T]", bound_async)

    @functools.wraps(fn)
    def bound(*args: P.args, **kwargs: P.kwargs) -> T:
        return context.copy().run(fn, *args, **kwargs)

    return bound


class ThreadPoolExecutor(concurrent.futures.ThreadPoolExecutor):
    """`concurrent.futures.ThreadPoolExecutor` whose tasks carry the context of the moment they were submitted."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Schedule `fn(*args, **kwargs)` in this context."""
        return super().submit(bind_context(fn), *args, **kwargs)
