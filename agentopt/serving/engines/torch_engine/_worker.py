"""The thread that owns the model: it reads prompts, makes steps of the whole batch, loads adapters in between.

Fair: requests start in the order in which they came, and nobody who runs is put aside. A prompt is read in parts, one
between two steps of the batch, so a long one delays those who are written to by a part at a time, not by all of it.
Everything that touches the model happens in this thread, so an adapter is never changed under a running step.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from agentopt.serving.engines.torch_engine._rows import Reading, Rows
from agentopt.serving.engines.torch_engine._sampling import Picked, Sampler, Sampling
from agentopt.serving.engines.torch_engine._slots import Slots
from agentopt.serving.engines.torch_engine._structured import Grammar, Grammars
from agentopt.serving.engines.torch_engine._text import Text


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that came, and the tokens that it came from."""

    text: str
    picks: tuple[Picked, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """The reply is complete."""

    reason: str
    """stop or length."""
    tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """It broke off."""

    why: str


Told = Piece | Done | Failed


@dataclass(slots=True, eq=False)
class Job:
    """One reply to be written."""

    prompt: list[int]
    sampling: Sampling
    most: int
    """Tokens."""
    tell: Callable[[Told], None]
    """Called in the worker's thread."""
    adapter: str | None = None
    stops: tuple[str, ...] = ()
    grammar: str | None = None
    ignore_eos: bool = False
    continues: bool = False
    """The reply goes on with the prompt's text: a space before its first word is part of it."""
    cancelled: bool = False


PARTS = {"cpu": 128}
"""Tokens of a prompt that are read at a time, where nobody said: more would hardly be quicker, and others wait."""
_PART = 512
"""On other devices."""


@dataclass(slots=True, eq=False)
class _Running:
    job: Job
    sampler: Sampler
    text: Text
    grammar: Grammar | None
    last: int = -1
    count: int = 0
    waiting: list[Picked] = field(default_factory=list[Picked])
    """Tokens whose text is not certain yet."""


class Worker:
    """Runs one model.

    Args:
        model: in evaluation mode.
        tokenizer: of it.
        slots: its adapters.
        most: rows at a time.
        context: longest prompt and reply together.
        part: tokens of a prompt that are read between two steps of the batch; None for what suits the device.
    """

    def __init__(
        self, model: Any, tokenizer: Any, slots: Slots, *, most: int, context: int, part: int | None = None
    ) -> None:
        self.model, self.tokenizer, self.slots, self.context = model, tokenizer, slots, context
        # Reading a text changes a tokenizer for a moment: the thread has one of its own to write with.
        self._writer = copy.deepcopy(tokenizer)
        self.written = 0
        """Tokens so far."""
        self.read = 0
        """Tokens of prompts so far."""
        self._rows = Rows(model)
        self._most = most
        self._part = part or PARTS.get(model.device.type, _PART)
        width = int(model.get_output_embeddings().weight.shape[0])
        self._grammars = Grammars(tokenizer, width)
        self._ends = _ends(model, tokenizer)
        self._queue: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._running: list[_Running] = []
        self._reading: tuple[Job, Reading] | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="agentopt-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests whose prompt is being read or whose reply is being written."""
        return len(self._running) + (self._reading is not None)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Write a reply as soon as there is a row for it."""
        with self._changed:
            self._queue.append(job)
            self._changed.notify()

    def call(self, what: Callable[[], None]) -> Future[None]:
        """Run something between two steps."""
        future: Future[None] = Future()
        with self._changed:
            self._calls.append((what, future))
            self._changed.notify()
        return future

    def uses(self, adapter: str) -> bool:
        """Whether a request of this adapter runs or waits."""
        with self._changed:
            return any(job.adapter == adapter for job in self._jobs())

    def close(self) -> None:
        """End the thread after the step it is in; what runs is told that it broke off."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait():
                self._answer_calls()
                self._drop_cancelled()
                self._admit()
                self._read()
                if self._running:
                    self._step()
        for job in self._jobs():
            job.tell(Failed("the engine stops"))

    def _jobs(self) -> list[Job]:
        """All that are not done. In this order none is missed that moves on meanwhile."""
        waiting, reading = [*self._queue], self._reading
        return [*waiting, *([] if reading is None else [reading[0]]), *(one.job for one in self._running)]

    def _wait(self) -> bool:
        with self._changed:
            while not (self._running or self._reading or self._queue or self._calls or self._closing):
                self._changed.wait()
            return not self._closing

    def _answer_calls(self) -> None:
        while self._calls:
            what, future = self._calls.popleft()
            try:
                what()
            except Exception as error:  # noqa: BLE001  # whoever asked is told
                future.set_exception(error)
            else:
                future.set_result(None)
            self._use_rows()

    def _use_rows(self) -> None:
        self.slots.use([one.job.adapter for one in self._running])

    def _admit(self) -> None:
        """The next request's prompt is the one that is read, where there is a row for it."""
        if self._reading is not None or len(self._running) >= (self._most if self._rows.joins else 1):
            return
        with self._changed:
            if not self._queue:
                return
            job = self._queue.popleft()
            self._reading = (job, self._rows.begin(job.prompt))
        if job.adapter is not None and job.adapter not in self.slots.folders:  # unloaded since it was asked for
            self._fail_reading(f"the adapter {job.adapter!r:.160} is not loaded any more")

    def _read(self) -> None:
        """One part of the prompt that is read; when it was the last, the request gets its row."""
        if self._reading is None:
            return
        job, reading = self._reading
        self.slots.use([job.adapter])
        try:
            before = reading.done
            self._rows.read(reading, self._part)
            self.read += reading.done - before
            grammar = self._grammars.start(job.grammar) if reading.complete and job.grammar is not None else None
        except Exception as error:  # noqa: BLE001  # out of memory, say: this request alone fails
            self._fail_reading(f"{type(error).__name__}: {error}")
        else:
            if reading.complete:
                self._start(job, reading, grammar)
        self._use_rows()

    def _start(self, job: Job, reading: Reading, grammar: Grammar | None) -> None:
        """The first token of a reply, and a row for the others."""
        text = Text(self._writer, job.stops, before=job.prompt if job.continues else ())
        one = _Running(job, Sampler(job.sampling, job.prompt), text, grammar)
        if self._take(one, reading.logits):
            self._running.append(one)
            self._rows.join(reading)
        self._reading = None

    def _fail_reading(self, why: str) -> None:
        assert self._reading is not None
        job, self._reading = self._reading[0], None
        job.tell(Failed(why))

    def _step(self) -> None:
        try:
            logits = self._rows.step([one.last for one in self._running])
        except Exception as error:  # noqa: BLE001  # all rows fail, the next requests may do
            for one in self._running:
                one.job.tell(Failed(f"{type(error).__name__}: {error}"))
            self._running.clear()
            self._rows.clear()
            return
        self._drop([row for row, one in enumerate(self._running) if not self._take(one, logits[row])])

    def _drop_cancelled(self) -> None:
        """Who went away gets no further part, no further token, and no place in the queue."""
        gone = "nobody waits for it"
        if self._reading is not None and self._reading[0].cancelled:
            self._fail_reading(gone)
        with self._changed:
            left = [job for job in self._queue if job.cancelled]
            if left:
                self._queue = deque(job for job in self._queue if job not in left)
        rows = [row for row, one in enumerate(self._running) if one.job.cancelled]
        for job in [*left, *(self._running[row].job for row in rows)]:
            job.tell(Failed(gone))
        self._drop(rows)

    def _drop(self, rows: list[int]) -> None:
        if rows:
            self._running = [one for row, one in enumerate(self._running) if row not in set(rows)]
            self._rows.leave(rows)
            self._use_rows()

    def _take(self, one: _Running, logits: Any) -> bool:
        """Choose the next token of a row and tell of it; whether the row goes on."""
        try:
            picked = one.sampler.pick(logits, None if one.grammar is None else one.grammar.allowed())
            complete = one.grammar.take(picked.token) if one.grammar is not None else False
        except (RuntimeError, ValueError) as error:
            one.job.tell(Failed(f"no token can be chosen ({error})"))
            return False
        self.written += 1
        one.count += 1
        one.last = picked.token
        if picked.token in self._ends and not one.job.ignore_eos:
            return self._finish(one, "stop")
        one.waiting.append(picked)
        text = one.text.add(picked.token)
        if text:
            self._tell(one, text)
        if one.text.stopped is not None or complete:
            return self._finish(one, "stop")
        if one.count >= one.job.most or len(one.job.prompt) + one.count >= self.context:
            return self._finish(one, "length")
        return True

    def _finish(self, one: _Running, reason: str) -> bool:
        rest = one.text.end()
        if one.text.stopped is not None:
            reason = "stop"
        if rest or one.waiting:
            self._tell(one, rest)
        one.job.tell(Done(reason, one.count))
        return False

    @staticmethod
    def _tell(one: _Running, text: str) -> None:
        one.job.tell(Piece(text, tuple(one.waiting)))
        one.waiting.clear()


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    named: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed: list[Any] = [*named] if isinstance(named, list | tuple) else [named]
    return frozenset(one for one in [*listed, tokenizer.eos_token_id] if isinstance(one, int))
