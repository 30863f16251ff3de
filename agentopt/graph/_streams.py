"""Generators that traced functions return: each step runs in the context of the call and leaks nothing.

The context holds the candidate, the rollout, the recording with its open op, and the meters. It is entered for each
`__next__` or `asend` and left at every yield.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextvars import Context
from types import TracebackType
from typing import Any, Final, Generic, TypeVar

from agentopt.graph._context import InContext
from agentopt.graph._recording import Operation

R = TypeVar("R")
_KEPT_ITEMS: Final = 1000


class _Items:
    """The items a stream gave, up to 1,000, and how many there were."""

    __slots__ = ("count", "first")

    def __init__(self) -> None:
        self.first: list[Any] = []
        self.count = 0

    def add(self, item: Any) -> None:
        self.count += 1
        if len(self.first) < _KEPT_ITEMS:
            self.first.append(item)

    def end(self, op: Operation) -> None:
        op.set_output(self.first)
        if self.count > len(self.first):
            op.annotate(items=self.count)
        op.finish()


class Stream(Generator[R, Any, Any], Generic[R]):
    """A generator that a traced function returned. The record's output is the list of items that were consumed."""

    __slots__ = ("_context", "_items", "_op", "_source")

    def __init__(self, context: Context, source: Generator[R, Any, Any], op: Operation) -> None:
        self._context = context
        self._source = source
        self._op = op
        self._items = _Items()

    def _step(self, resume: Callable[..., R], *args: Any) -> R:
        try:
            item = self._context.run(resume, *args)
        except StopIteration as stop:
            if stop.value is not None:
                self._op.annotate(returned=stop.value)
            self._items.end(self._op)
            raise
        except BaseException as error:
            self._op.fail(error)
            raise
        self._items.add(item)
        return item

    def __next__(self) -> R:
        return self._step(next, self._source)

    def send(self, value: Any, /) -> R:
        """Resume with `value`, as on a generator."""
        return self._step(self._source.send, value)

    def throw(self, typ: Any, val: Any = None, tb: TracebackType | None = None, /) -> R:
        """Raise inside, as on a generator."""
        error = typ if isinstance(typ, BaseException) else typ() if val is None else val
        return self._step(self._source.throw, error if tb is None else error.with_traceback(tb))

    def close(self) -> None:
        """End early; the record then holds the items so far."""
        try:
            self._context.run(self._source.close)
        except BaseException as error:
            self._op.fail(error)
            raise
        self._items.end(self._op)

    def __del__(self) -> None:
        if hasattr(self, "_items"):
            self._items.end(self._op)


class AsyncStream(AsyncGenerator[R, Any], Generic[R]):
    """An async generator that a traced function returned; see `Stream`."""

    __slots__ = ("_context", "_items", "_op", "_source")

    def __init__(self, context: Context, source: AsyncGenerator[R, Any], op: Operation) -> None:
        self._context = context
        self._source = source
        self._op = op
        self._items = _Items()

    async def _step(self, awaitable: Awaitable[R]) -> R:
        try:
            item = await InContext(self._context, awaitable)
        except StopAsyncIteration:
            self._items.end(self._op)
            raise
        except BaseException as error:
            self._op.fail(error)
            raise
        self._items.add(item)
        return item

    async def __anext__(self) -> R:
        return await self._step(self._source.__anext__())

    async def asend(self, value: Any, /) -> R:
        """Resume with `value`, as on an async generator."""
        return await self._step(self._source.asend(value))

    async def athrow(self, typ: Any, val: Any = None, tb: TracebackType | None = None, /) -> R:
        """Raise inside, as on an async generator."""
        error = typ if isinstance(typ, BaseException) else typ() if val is None else val
        return await self._step(self._source.athrow(error if tb is None else error.with_traceback(tb)))

    async def aclose(self) -> None:
        """End early; the record then holds the items so far."""
        try:
            await InContext(self._context, self._source.aclose())
        except BaseException as error:
            self._op.fail(error)
            raise
        self._items.end(self._op)

    def __del__(self) -> None:
        if hasattr(self, "_items"):
            self._items.end(self._op)
