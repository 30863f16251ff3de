"""Call grain: `@step`, `@tool` and `@agent` wrap plain functions and leave them plain outside a recording.

Inside a recording each call is one record. Generators keep the context of their call (candidate, rollout, open op) for
every step, and give the consumer its own context back at every yield.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from agentopt.errors import UserError
from agentopt.graph import _context
from agentopt.graph._code import CodeUnit, declare_code, describe_code
from agentopt.graph._context import (
    InContext,
    active_value,
    effects_allowed,
    enter_op_path,
    op_path,
    overlay,
    rollout_scope,
)
from agentopt.graph._handles import Handle, handle_for
from agentopt.graph._live import current
from agentopt.graph._parameters import ParameterSpec, declare
from agentopt.graph._recording import Operation, operation
from agentopt.graph._streams import AsyncStream, Stream

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
F = TypeVar("F", bound=Callable[..., Any])


class EffectsRefused(UserError):
    """A tool with effects was called during a rollout, without a stand-in and without permission."""


@dataclass(eq=False, slots=True)
class StepInfo:
    """What a decorator knows about its function; `fn.agentopt`.

    Tools have two parameters, frozen by default: `description` (a handle; reading it gives the active text) and `code`
    (None when the code cannot be changed, and then `code_problem` says why). `when_tuning` is the stand-in that runs
    in place of a tool with effects during rollouts.
    """

    name: str
    kind: Literal["step", "tool", "agent"]
    fn: Callable[..., Any]
    effects: bool = False
    when_tuning: Callable[..., Any] | None = None
    description: Handle | None = None
    code: ParameterSpec | None = None
    code_problem: str = ""
    doc: str = ""
    unit: CodeUnit | None = None
    names: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    signature: inspect.Signature | None = None
    skip_first: bool = False


class Tool(Protocol[P, R_co]):
    """A function decorated with `@tool`: call it as before; `@NAME.when_tuning` gives its stand-in."""

    agentopt: StepInfo
    __name__: str

    @property
    def __wrapped__(self) -> Callable[P, R_co]: ...
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    def __get__(self, instance: object, owner: type | None = None, /) -> Callable[..., R_co]: ...
    def when_tuning(self, stand_in: F, /) -> F:
        """Register `stand_in` to run in place of this tool during rollouts (same signature)."""
        ...


def step_info(fn: object) -> StepInfo | None:
    """Return what `@step`, `@tool` or `@agent` noted about `fn` (bound methods too), or None."""
    info = getattr(fn, "agentopt", None)
    return info if isinstance(info, StepInfo) else None


@overload
def step(fn: F) -> F: ...
@overload
def step(*, name: str | None = None) -> Callable[[F], F]: ...
def step(fn: Any = None, *, name: str | None = None) -> Any:
    """Record each call of a function as a step: plain, async, generator or async generator; function or method.

    Args:
        fn: the function, when used without parentheses.
        name: the op's name; the function's qualified name when not given.
    """
    return _decorator(fn, name, "step")


@overload
def agent(fn: F) -> F: ...
@overload
def agent(*, name: str | None = None) -> Callable[[F], F]: ...
def agent(fn: Any = None, *, name: str | None = None) -> Any:
    """Like `step`, for the function that is the whole agent."""
    return _decorator(fn, name, "agent")


@overload
def tool(fn: Callable[P, R]) -> Tool[P, R]: ...
@overload
def tool(
    *, name: str | None = None, effects: bool = False, uses: Sequence[object] = ()
) -> Callable[[Callable[P, R]], Tool[P, R]]: ...
def tool(fn: Any = None, *, name: str | None = None, effects: bool = False, uses: Sequence[object] = ()) -> Any:
    """Like `step`, for a tool: also declares the parameters `NAME.description` and `NAME.code`, both frozen.

    Args:
        fn: the function, when used without parentheses.
        name: the tool's name; the function's qualified name when not given.
        effects: True when a call changes the world (sends, books, pays). Such a tool refuses to run during rollouts
            unless `@NAME.when_tuning` gives a stand-in or effects are allowed.
        uses: names that a changed body may see (see `describe_code`).

    Raises:
        UserError: `uses` was given and something cannot cross into the sandbox, or the name is taken.
    """
    frame = sys._getframe(1)

    def decorate(function: Any) -> Any:
        info = _info(function, name, "tool")
        info.effects = effects
        _declare_tool(info, uses, frame)
        wrapper = _wrap(info)

        def when_tuning(stand_in: F) -> F:
            info.when_tuning = stand_in
            return stand_in

        wrapper.when_tuning = when_tuning
        return wrapper

    return decorate if fn is None else decorate(fn)


def _decorator(fn: Any, name: str | None, kind: Literal["step", "agent"]) -> Any:
    def decorate(function: Any) -> Any:
        return _wrap(_info(function, name, kind))

    return decorate if fn is None else decorate(fn)


def _info(fn: Any, name: str | None, kind: Literal["step", "tool", "agent"]) -> StepInfo:
    if isinstance(fn, (staticmethod, classmethod)):
        raise UserError(f"@{kind}: put it below @{type(cast('object', fn)).__name__}, directly above the def.")
    if not isinstance(fn, types.FunctionType):
        raise UserError(f"@{kind}: expected a function, found {fn!r}; decorate a def (for a class, its method).")
    info = StepInfo(name or fn.__qualname__.rpartition("<locals>.")[2], kind, fn)
    info.doc = inspect.cleandoc(fn.__doc__) if fn.__doc__ else ""
    signature = inspect.signature(fn)
    parameters = list(signature.parameters.values())
    info.names = tuple(parameter.name for parameter in parameters)
    owner = fn.__qualname__.rpartition(".")[0]
    info.skip_first = bool(owner) and not owner.endswith("<locals>") and info.names[:1] in (("self",), ("cls",))
    plain = all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    info.signature = None if plain else signature
    info.defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return info


def _declare_tool(info: StepInfo, uses: Sequence[object], frame: FrameType) -> None:
    text = ParameterSpec(f"{info.name}.description", "tool_text", info.doc, frozen=True)
    info.description = handle_for(declare(text, frame))
    try:
        info.unit = describe_code(info.fn, uses)
    except UserError as error:
        if uses:
            raise
        info.code_problem = str(error)  # the tool works; only its code cannot be tuned
        return
    info.code = declare_code(info.unit, f"{info.name}.code", frame=frame)


def _inputs(info: StepInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """Return the arguments by name, defaults included and `self` left out; what does not fit is left to the call."""
    names = info.names
    if info.signature is None and len(args) <= len(names):
        inputs = dict(zip(names, args, strict=False))
        if kwargs:
            inputs.update(kwargs)
        if len(inputs) < len(names):
            inputs = {name: inputs.get(name, info.defaults.get(name)) for name in names}
    else:
        try:
            bound = (info.signature or inspect.signature(info.fn)).bind(*args, **kwargs)
        except TypeError:
            return {"args": args, **kwargs}
        bound.apply_defaults()
        inputs = dict(bound.arguments)
    if info.skip_first:
        inputs.pop(names[0], None)
    return inputs


def _open(info: StepInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation:
    frame = current.get()
    if frame is None or frame.recording is None:
        return operation(info.name)
    return operation(info.name, kind=info.kind, inputs=_inputs(info, args, kwargs), description=info.doc or None)


def _body(info: StepInfo) -> Callable[..., Any]:
    """Return what runs for a call made here: the function, its stand-in, or its changed code."""
    if info.kind != "tool":
        return info.fn
    if info.effects and (rollout_scope.get() is not None or _context.rollouts_active()) and not effects_allowed():
        if info.when_tuning is None:
            raise EffectsRefused(
                f"tool {info.name!r} has effects and does not run during a rollout; give it a stand-in with "
                f"@{info.name}.when_tuning, or allow effects (--allow-effects)."
            )
        return info.when_tuning
    spec, unit = info.code, info.unit
    if spec is not None and unit is not None:
        source = cast("str", active_value(spec))
        if source != spec.default:
            return functools.partial(_run_changed, unit, source)
    return info.fn


def _run_changed(unit: CodeUnit, source: str, *args: Any, **kwargs: Any) -> Any:
    return unit.arun(source, args, kwargs) if unit.is_async else unit.run(source, args, kwargs)


def _wrap(info: StepInfo) -> Any:
    fn = info.fn
    if inspect.iscoroutinefunction(fn):
        wrapper = _wrap_async(info)
    elif inspect.isasyncgenfunction(fn) or inspect.isgeneratorfunction(fn):
        wrapper = _wrap_generator(info)
    else:
        wrapper = _wrap_sync(info)
    functools.update_wrapper(wrapper, fn)
    wrapper.agentopt = info
    return wrapper


def _wrap_sync(info: StepInfo) -> Any:
    fn = info.fn
    get_frame, get_scope = current.get, rollout_scope.get
    if info.kind == "tool":

        def tool_wrapper(*args: Any, **kwargs: Any) -> Any:
            if get_frame() is None and get_scope() is None and _context.nothing_active():
                return fn(*args, **kwargs)
            return _call(info, args, kwargs)

        return tool_wrapper

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if get_frame() is None and get_scope() is None:
            return fn(*args, **kwargs)
        return _call(info, args, kwargs)

    return wrapper


def _call(info: StepInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    scope = rollout_scope.get()
    path_token = None if scope is None else enter_op_path(scope, info.name)
    op = _open(info, args, kwargs)
    token = op.enter()
    try:
        result = _body(info)(*args, **kwargs)
        deferred = _deferred(result, op)
    except BaseException as error:
        op.leave(token)
        op.fail(error)
        raise
    else:
        op.leave(token)
        if deferred is not None:
            return deferred
        op.set_output(result)
        op.finish()
        return result
    finally:
        if path_token is not None:
            op_path.reset(path_token)


def _deferred(result: Any, op: Operation) -> Any:
    """A plain function that returns a generator or coroutine is not done: its op ends when that does."""
    if not isinstance(result, (types.GeneratorType, types.AsyncGeneratorType, types.CoroutineType)):
        return None
    context = copy_context()  # the op is open in it
    if isinstance(result, types.GeneratorType):
        return Stream(context, cast("Generator[Any, Any, Any]", result), op)
    if isinstance(result, types.AsyncGeneratorType):
        return AsyncStream(context, cast("AsyncGenerator[Any, Any]", result), op)
    return _finish_later(context, cast("Awaitable[Any]", result), op)


async def _finish_later(context: Context, awaitable: Awaitable[Any], op: Operation) -> Any:
    try:
        result = await InContext(context, awaitable)
    except BaseException as error:
        op.fail(error)
        raise
    op.set_output(result)
    op.finish()
    return result


def _wrap_async(info: StepInfo) -> Any:
    fn = info.fn
    get_frame, get_scope = current.get, rollout_scope.get
    is_tool = info.kind == "tool"

    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        if get_frame() is None and get_scope() is None and (not is_tool or _context.nothing_active()):
            return await fn(*args, **kwargs)
        return await _call_async(info, args, kwargs)

    return wrapper


async def _call_async(info: StepInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    scope = rollout_scope.get()
    path_token = None if scope is None else enter_op_path(scope, info.name)
    op = _open(info, args, kwargs)
    token = op.enter()
    try:
        result = _body(info)(*args, **kwargs)
        if inspect.isawaitable(result):
            result = await result
    except BaseException as error:
        op.leave(token)
        op.fail(error)
        raise
    else:
        op.leave(token)
        op.set_output(result)
        op.finish()
        return result
    finally:
        if path_token is not None:
            _context.reset_path(path_token)


def _wrap_generator(info: StepInfo) -> Any:
    fn = info.fn
    get_frame, get_scope, get_overlay = current.get, rollout_scope.get, overlay.get

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if get_frame() is None and get_scope() is None and get_overlay() is None and _context.nothing_active():
            return fn(*args, **kwargs)
        return copy_context().run(_start_stream, info, args, kwargs)

    return wrapper


def _start_stream(info: StepInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Runs in a context of its own, which every step of the stream enters again: nothing set here leaks to the caller.
    scope = rollout_scope.get()
    if scope is not None:
        enter_op_path(scope, info.name)
    op = _open(info, args, kwargs)
    op.enter()
    try:
        source = _body(info)(*args, **kwargs)
    except BaseException as error:
        op.fail(error)
        raise
    context = copy_context()
    if isinstance(source, AsyncGenerator):
        return AsyncStream(context, cast("AsyncGenerator[Any, Any]", source), op)
    if isinstance(source, Generator):
        return Stream(context, cast("Generator[Any, Any, Any]", source), op)
    op.set_output(source)  # a stand-in that gives a plain value
    op.finish()
    return source
