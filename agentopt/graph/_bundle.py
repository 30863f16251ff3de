"""`@bundle`: a function as one operation of the graph.

The signature is read once, at decoration. The body gets plain values; what it returns becomes a Node. What it reads
from Nodes and parameters while it runs, and what it calls, are edges of its record.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any, Final, cast, overload

from agentopt.graph._edges import link
from agentopt.graph._errors import describe, execution_error
from agentopt.graph._live import LiveOp, Op, current, reset
from agentopt.graph._node import Node, from_record, pack, plain, take
from agentopt.graph._trainable import Code
from agentopt.graph._values import ATOMS, CONTAINERS, kind_of, settle

_current = current.get
_UNTRACED: Final = 0
_PLAIN: Final = 1
_NODE: Final = 2


class BundleInfo:
    """What the decorator knows about a function; `fn.bundle` of the decorated function."""

    __slots__ = ("catch_errors", "code", "description", "fn", "name", "names", "op", "signature", "simple")

    def __init__(self, fn: Callable[..., Any], name: str | None, description: str | None, catch_errors: bool) -> None:
        self.fn = fn
        self.name = name or fn.__name__
        self.description = description or (inspect.getdoc(fn) or "").partition("\n\n")[0].strip() or None
        self.catch_errors = catch_errors
        self.signature = inspect.signature(fn)
        parameters = list(self.signature.parameters.values())
        self.names = tuple(parameter.name for parameter in parameters)
        # With this shape, positional arguments of the full number need no binding.
        self.simple = all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
        self.op = Op(self.name, self.names, description=self.description)
        self.code: Code | None = None

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Op, list[Any]]:
        """Input names and argument values in the order of the signature, defaults filled in.

        Raises:
            TypeError: the arguments do not fit the signature.
        """
        if self.simple and not kwargs and len(args) == len(self.names):
            return self.op, list(args)
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if self.simple:
            return self.op, list(bound.arguments.values())
        names: list[str] = []
        values: list[Any] = []
        for name, parameter in self.signature.parameters.items():
            value = bound.arguments[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                names.extend(f"{name}_{place}" for place in range(len(value)))
                values.extend(value)
            elif parameter.kind is parameter.VAR_KEYWORD:
                names.extend(value)
                values.extend(value.values())
            else:
                names.append(name)
                values.append(value)
        return Op(self.name, tuple(names), description=self.description), values


class _Call:
    """One call: what is recorded of its arguments, and the plain arguments that the body gets."""

    __slots__ = ("args", "entries", "info", "kwargs", "op", "originals")

    def __init__(self, info: BundleInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.info = info
        self.op, self.originals = info.bind(args, kwargs)
        self.entries = tuple(take(value)[0] for value in self.originals)
        self.args = tuple(_argument(value) for value in args)
        self.kwargs = {name: _argument(value) for name, value in kwargs.items()} if kwargs else kwargs

    def open(self) -> LiveOp:
        frame = _current()
        recording = None if frame is None else frame.recording
        live = LiveOp(self.op, self.entries, frame, recording)
        if recording is not None:
            link(live, self.originals)
        return live

    def run(self) -> Any:
        code = self.info.code
        return self.info.fn(*self.args, **self.kwargs) if code is None else code.call(self.args, self.kwargs)


def _argument(value: Any) -> Any:
    """The plain value; containers that come from Nodes are copied, so that the body cannot change what was recorded."""
    if type(value) in ATOMS:
        return value
    if isinstance(value, Node):
        return settle(value._current()[1])
    if type(value) in CONTAINERS:
        packed = pack(value)
        return value if packed is None else packed._live
    return value


def _mode(info: BundleInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How a call is treated: `_UNTRACED`, `_PLAIN` (recorded inside the enclosing op, plain result) or `_NODE`."""
    frame = _current()
    if frame is not None:
        if not frame.tracing:
            return _UNTRACED
        if frame.recording is not None:
            return _NODE
    if info.code is not None or _any_nodes(args) or (kwargs and _any_nodes(tuple(kwargs.values()))):
        return _NODE
    return _UNTRACED if frame is None or frame.id is not None else _PLAIN


def _any_nodes(values: tuple[Any, ...]) -> bool:
    for value in values:
        kind = kind_of(value)
        if kind in ATOMS:
            continue
        if isinstance(value, Node) or (kind in CONTAINERS and plain(value) is not value):
            return True
    return False


def _plain_call(info: BundleInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _current() is None:  # then no argument is a Node: see _mode
        return info.fn(*args, **kwargs)
    values = tuple(plain(value) for value in args)
    named = {name: plain(value) for name, value in kwargs.items()}
    return info.fn(*values, **named) if info.code is None else info.code.call(values, named)


def _finish(live: LiveOp, value: Any) -> Node:
    """End the record with what the body returned, a Node or a container of Nodes included."""
    if type(value) not in ATOMS:
        made = value if isinstance(value, Node) else pack(value) if type(value) in CONTAINERS else None
        if made is not None:
            rec, value = made._current()
            live.edges.append((rec, "data", None))
            value = settle(value)
    if live.recording is not None:
        live.recording.hold(value, live)
    live.finish(settle(value))
    return from_record(live, value)


def _fail(live: LiveOp, error: BaseException) -> Node:
    live.error, live.failed_at = describe(error, live)
    live.finish(None)
    return from_record(live, None)


def _sync(info: BundleInfo) -> Callable[..., Any]:
    fn = info.fn

    transparent = info.code is None

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if transparent and not kwargs and _current() is None:  # the most frequent case, kept under a microsecond
            for value in args:
                if type(value) not in ATOMS:
                    break
            else:
                return fn(*args)
        mode = _mode(info, args, kwargs)
        if mode == _UNTRACED:
            return _plain_call(info, args, kwargs)
        call = _Call(info, args, kwargs)
        live = call.open()
        token = current.set(live)
        try:
            value = call.run()
        except Exception as error:
            node = _fail(live, error)
            if not info.catch_errors:
                raise
            raise execution_error(node, error) from error
        except BaseException as error:
            _fail(live, error)
            raise
        finally:
            reset(token)
        made = _finish(live, value)
        return made if mode == _NODE else made._live

    return wrapper


def _async(info: BundleInfo) -> Callable[..., Any]:
    fn = info.fn

    @functools.wraps(fn)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        mode = _mode(info, args, kwargs)
        if mode == _UNTRACED:
            return await _plain_call(info, args, kwargs)
        call = _Call(info, args, kwargs)
        live = call.open()
        token = current.set(live)
        try:
            value = await call.run()
        except Exception as error:
            node = _fail(live, error)
            if not info.catch_errors:
                raise
            raise execution_error(node, error) from error
        except BaseException as error:
            _fail(live, error)
            raise
        finally:
            reset(token)
        made = _finish(live, value)
        return made if mode == _NODE else made._live

    return wrapper


class _Stream:
    """The records of a generator: one per item, with what was read since the item before, and that item as parent."""

    __slots__ = ("call", "count", "last", "mode")

    def __init__(self, call: _Call, mode: int) -> None:
        self.call = call
        self.mode = mode
        self.count = 0
        self.last: LiveOp | None = None

    def next(self, step: Callable[[], Any]) -> Any:
        """Run the body to its next item; StopIteration at its end."""
        live = self._open()
        token = current.set(live)
        try:
            value = step()
        except StopIteration:
            self._end(live)
            raise
        except BaseException as error:
            raised = self._failed(live, error)
            if raised is error:
                raise
            raise raised from error
        finally:
            reset(token)
        return self._item(live, value)

    async def anext(self, step: Callable[[], Any]) -> Any:
        """Run an async body to its next item; StopAsyncIteration at its end."""
        live = self._open()
        token = current.set(live)
        try:
            value = await step()
        except StopAsyncIteration:
            self._end(live)
            raise
        except BaseException as error:
            raised = self._failed(live, error)
            if raised is error:
                raise
            raise raised from error
        finally:
            reset(token)
        return self._item(live, value)

    def _open(self) -> LiveOp:
        live = self.call.open()
        if self.last is not None:
            live.edges.append((self.last, "data", None))
        live.meta = {"item": self.count}
        return live

    def _item(self, live: LiveOp, value: Any) -> Any:
        self.count += 1
        self.last = live
        made = _finish(live, value)
        return made if self.mode == _NODE else made._live

    def _end(self, live: LiveOp) -> None:
        if live.reads or self.count == 0:  # the rest after the last item is kept only when it says something
            live.meta = {"items": self.count}
            live.finish(None)

    def _failed(self, live: LiveOp, error: BaseException) -> BaseException:
        node = _fail(live, error)
        catches = self.call.info.catch_errors and isinstance(error, Exception)
        return execution_error(node, error) if catches else error


def _generator(info: BundleInfo) -> Callable[..., Any]:
    fn = info.fn

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        mode = _mode(info, args, kwargs)
        if mode == _UNTRACED:
            untraced: Generator[Any, Any, Any] = _plain_call(info, args, kwargs)
            return (yield from untraced)
        call = _Call(info, args, kwargs)
        stream = _Stream(call, mode)
        body: Generator[Any, Any, Any] = call.run()
        step: Callable[[], Any] = functools.partial(next, body)
        while True:
            try:
                item = stream.next(step)
            except StopIteration as stop:
                return stop.value
            try:
                sent = yield item
            except GeneratorExit:
                body.close()
                raise
            except BaseException as error:  # noqa: BLE001 - handed on to the body, which decides
                step = functools.partial(body.throw, error)
            else:
                step = functools.partial(body.send, sent)

    return wrapper


def _async_generator(info: BundleInfo) -> Callable[..., Any]:
    fn = info.fn

    @functools.wraps(fn)
    async def wrapper(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        mode = _mode(info, args, kwargs)
        call = None if mode == _UNTRACED else _Call(info, args, kwargs)
        stream = None if call is None else _Stream(call, mode)
        body: AsyncGenerator[Any, Any] = _plain_call(info, args, kwargs) if call is None else call.run()
        step: Callable[[], Any] = functools.partial(anext, body)
        while True:
            try:
                item = await (step() if stream is None else stream.anext(step))
            except StopAsyncIteration:
                return
            try:
                sent = yield item
            except GeneratorExit:
                await body.aclose()
                raise
            except BaseException as error:  # noqa: BLE001 - handed on to the body, which decides
                step = functools.partial(body.athrow, error)
            else:
                step = functools.partial(body.asend, sent)

    return wrapper


@overload
def bundle(fn: Callable[..., Any], /) -> Callable[..., Any]: ...
@overload
def bundle(
    *,
    trainable: bool = False,
    description: str | None = None,
    catch_errors: bool = True,
    uses: Sequence[Any] = (),
    name: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
def bundle(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    trainable: bool = False,
    description: str | None = None,
    catch_errors: bool = True,
    uses: Sequence[Any] = (),
    name: str | None = None,
) -> Any:
    """Make calls of a function (sync, async, generator, async generator) single operations of the graph.

    A call gives a Node if an argument is a Node, if the function is trainable, or inside a recording; otherwise the
    plain result. The body always gets plain values; a container that comes from a Node is a copy.

    With `catch_errors=True` an exception in the body is raised as `ExecutionError` (also an instance of the exception's
    own class); with False as it is. It is recorded either way.

    With `trainable=True` the function's source is the parameter `NAME.code`. The original body runs here; a changed one
    runs through the CodeRunner and sees only the names in `uses`.

    Raises:
        UserError: a trainable function's source cannot be found, or it needs what cannot be given to changed code.
    """
    frame = sys._getframe(1)  # the code parameter belongs to the module that decorates

    def decorate(target: Callable[..., Any]) -> Callable[..., Any]:
        kind = kind_of(target)
        if kind is staticmethod or kind is classmethod:
            rewrap = cast("Any", kind)
            return rewrap(decorate(cast("Any", target).__func__))
        info = BundleInfo(target, name, description, catch_errors)
        if trainable:
            info.code = Code(target, info.name, uses, frame)
        if inspect.isasyncgenfunction(target):
            wrapper = _async_generator(info)
        elif inspect.isgeneratorfunction(target):
            wrapper = _generator(info)
        elif inspect.iscoroutinefunction(target):
            wrapper = _async(info)
        else:
            wrapper = _sync(info)
        cast("Any", wrapper).bundle = info
        return wrapper

    return decorate if fn is None else decorate(fn)
