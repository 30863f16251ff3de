"""Exceptions as data: which op failed, at which line, from which inputs, through any nesting."""

from __future__ import annotations

import contextlib
import linecache
import os
import sys
import sysconfig
from types import CodeType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final

from agentopt.errors import AgentoptError
from agentopt.graph._live import LiveOp, Rec
from agentopt.graph._records import ErrorRecord
from agentopt.graph._values import summarize

if TYPE_CHECKING:
    from agentopt.graph._node import Node

_PACKAGE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_LIBRARIES: Final = tuple(
    {
        path.rstrip(os.sep) + os.sep
        for key in ("stdlib", "platstdlib", "purelib", "platlib")
        if (path := sysconfig.get_path(key))
    }
)
_ATTRIBUTE: Final = "__agentopt_error__"
_MAX_TRACE_FRAMES: Final = 12


class ExecutionError(AgentoptError):
    """A traced operation failed. It is an instance of the original exception's class too, wherever Python allows that.

    `node` stands for the failed operation: `error.node.backward(error.feedback)` sends the error to the parameters
    behind it. `record` tells which op, which line and which inputs; `original` is the exception itself.
    """

    node: Node
    record: ErrorRecord
    original: BaseException

    @property
    def feedback(self) -> str:
        """The error as a text for an optimizer."""
        return self.record.text

    def __str__(self) -> str:
        return self.record.text


_raised_classes: dict[type[BaseException], type[ExecutionError]] = {}


def execution_error(node: Node, original: BaseException) -> ExecutionError:
    """Make the error to raise for the failed op behind `node`; `except ValueError` still catches a ValueError."""
    live = node._rec
    record = live.error if isinstance(live, LiveOp) else None
    if record is None or not isinstance(live, LiveOp):
        raise TypeError("execution_error needs the Node of a failed op")
    if isinstance(original, ExecutionError):
        original = original.original
    kind = type(original)
    raised = _raised_classes.get(kind)
    if raised is None:
        raised = ExecutionError
        if kind is not Exception and not isinstance(original, (StopIteration, StopAsyncIteration)):
            try:
                raised = type("ExecutionError", (ExecutionError, kind), {"__module__": __name__})
                raised.__new__(raised)
            except TypeError:  # a final class, or one whose layout or constructor does not combine
                raised = ExecutionError
        _raised_classes[kind] = raised
    error = raised.__new__(raised)
    error.args = original.args
    error.node, error.record, error.original = node, record, original
    remember(error, record, live.failed_at or live)
    return error


def describe(error: BaseException, op: LiveOp) -> tuple[ErrorRecord, LiveOp]:
    """Make the record of `error` leaving `op`; an error that already left an inner op keeps that op as its place."""
    known: tuple[ErrorRecord, LiveOp] | None = getattr(error, _ATTRIBUTE, None)
    if known is not None and known[1].open_id >= op.open_id:  # it left an op inside this one, not an earlier one
        return known
    names, values = op.op.names, op.inputs
    inputs = tuple((name, summarize(_plain(value))) for name, value in zip(names, values, strict=False))
    file, line, source, text = _place(error.__traceback__)
    record = ErrorRecord(
        type=type(error).__qualname__,
        message=_message(error),
        op=op.op.name,
        file=file,
        line=line,
        source_line=source,
        inputs=inputs,
        notes=_notes(error),
        trace_text=text,
    )
    with contextlib.suppress(AttributeError, TypeError):  # one with slots: outer ops describe it again
        remember(error, record, op)
    return record, op


def remember(error: BaseException, record: ErrorRecord, op: LiveOp) -> None:
    """Let `error` carry the record of the op that failed first."""
    setattr(error, _ATTRIBUTE, (record, op))


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, (Rec, LiveOp)) else value


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # noqa: BLE001 - an exception whose __str__ raises must still become a record
        return f"(its message cannot be shown: {type(broken).__name__})"


def _notes(error: BaseException) -> tuple[str, ...]:
    notes = [str(note) for note in getattr(error, "__notes__", ())]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    while cause is not None and len(notes) < 8:
        known: tuple[ErrorRecord, LiveOp] | None = getattr(cause, _ATTRIBUTE, None)
        notes.append(f"caused by {known[0].text if known else f'{type(cause).__qualname__}: {_message(cause)}'}")
        if known:
            break
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return tuple(notes)


def _place(traceback: TracebackType | None) -> tuple[str | None, int | None, str | None, str]:
    """File, line and source of the deepest frame that is neither ours nor a library's, and the traceback as text."""
    frames: list[tuple[CodeType, int]] = []
    while traceback is not None:
        if not traceback.tb_frame.f_code.co_filename.startswith(_PACKAGE):
            frames.append((traceback.tb_frame.f_code, traceback.tb_lineno))
        traceback = traceback.tb_next
    chosen = next((item for item in reversed(frames) if not item[0].co_filename.startswith(_LIBRARIES)), None)
    if chosen is None:  # raised inside an operator: the line is the caller's
        chosen = caller() or (frames[-1] if frames else None)
        frames = frames or ([chosen] if chosen else [])
    if chosen is None:
        return None, None, None, ""
    lines: list[str] = []
    for code, line in frames[-_MAX_TRACE_FRAMES:]:
        lines.append(f'File "{code.co_filename}", line {line}, in {code.co_qualname}')
        if source := linecache.getline(code.co_filename, line).strip():
            lines.append(f"  {source}")
    code, line = chosen
    return code.co_filename, line, linecache.getline(code.co_filename, line).strip() or None, "\n".join(lines)


def caller() -> tuple[CodeType, int] | None:
    """Code and line of the innermost caller outside this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return None if frame is None else (frame.f_code, frame.f_lineno)
