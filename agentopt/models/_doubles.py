"""Language models for tests and offline work, shipped to users: fixed answers, a function, a recorded file.

Each is a `Client` and can also be used directly as an `LM` (`complete`, `complete_sync`, `stream`). They cost nothing,
count words as tokens, and are not cached (their replies are code or a file already) unless a `FunctionLM` is named.
"""

from __future__ import annotations

import inspect
import json
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.graph import Usage
from agentopt.models._call import LMSettings
from agentopt.models._errors import LMRefused
from agentopt.models._lm import LM
from agentopt.models._messages import text_of
from agentopt.models._protocol import Client, Reply, Request

Answer = str | Reply | Mapping[str, Any] | Sequence[Any] | BaseException
"""A text, a whole reply, JSON data (sent as text), or an exception to raise."""


class DirectLM:
    """Makes a client usable where an `LM` is expected."""

    @cached_property
    def _direct(self) -> LM:
        return LM(cast("Client", self), settings=LMSettings())

    async def complete(self, messages: Any = None, **given: Any) -> Reply:
        """As `LM.complete`."""
        return await self._direct.complete(messages, **given)

    def complete_sync(self, messages: Any = None, **given: Any) -> Reply:
        """As `LM.complete_sync`."""
        return self._direct.complete_sync(messages, **given)


class _Double(DirectLM):
    """One reply per request, in one piece when streamed."""

    name = "double"
    deterministic = True
    cacheable = False
    own_timeout = False

    async def send(self, request: Request) -> Reply:
        raise NotImplementedError

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        """Word by word."""
        reply = await self.send(request)
        for piece in re.findall(r"\S+\s*|\s+", reply.text):
            yield piece
        yield reply

    def adapter_problem(self, adapter: str) -> str | None:
        """None: a double may look at `request.adapter`."""
        return None

    async def aclose(self) -> None:
        """Nothing to close."""


class ScriptedLM(_Double):
    """Fixed answers.

    A mapping `{match: answer}`: the first key found in the last user turn, else the first found anywhere in the
    messages; the key "" (or "*") answers everything else. A list: its answers in order, one a call, so it needs
    concurrency 1 (`sequential` is True). `requests` keeps what arrived.

    Raises:
        LMRefused: (from a call) nothing matches, or the list is used up.
    """

    def __init__(self, script: Mapping[str, Answer] | Sequence[Answer], *, name: str = "scripted") -> None:
        if isinstance(script, str):
            raise UserError("ScriptedLM: expected {match: reply} or [reply, ...], found one text; write [text]")
        self.name = name
        self.sequential = not isinstance(script, Mapping)
        self.deterministic = not self.sequential
        self.requests: list[Request] = []
        self._map = dict(script) if isinstance(script, Mapping) else {}
        self._list = [] if isinstance(script, Mapping) else list(script)
        self._lock = threading.Lock()

    async def send(self, request: Request) -> Reply:
        """The scripted reply."""
        with self._lock:
            self.requests.append(request)
            number = len(self.requests)
        if not self.sequential:
            return as_reply(self._matching(request), request, self.name)
        if number > len(self._list):
            raise LMRefused(f"{self.name}: the script has {len(self._list)} replies and this is call {number}")
        return as_reply(self._list[number - 1], request, self.name)

    def _matching(self, request: Request) -> Answer:
        texts = [text_of(message) for message in request.messages]
        last = next((text_of(turn) for turn in reversed(request.messages) if turn["role"] == "user"), "")
        for text in (last, "\n".join(texts)):
            for match, answer in self._map.items():
                if match not in ("", "*") and match in text:
                    return answer
        for anything in ("", "*"):
            if anything in self._map:
                return self._map[anything]
        known = ", ".join(repr(match) for match in self._map)
        raise LMRefused(f'{self.name}: nothing matches {last!r:.200}; the script knows {known}; add "" for the rest')


class FunctionLM(_Double):
    """A function of the request: `fn(request) -> text | Reply | JSON data`, sync (keep it quick) or async.

    With `name=` given the function promises to be a pure function of the request for as long as it has that name, and
    its replies may be cached.
    """

    def __init__(self, fn: Callable[[Request], Answer | Awaitable[Answer]], *, name: str | None = None) -> None:
        self.name = name or f"function/{getattr(fn, '__qualname__', type(fn).__name__)}"
        self.cacheable = name is not None
        self._fn = fn

    async def send(self, request: Request) -> Reply:
        """What the function says."""
        answer = self._fn(request)
        if inspect.isawaitable(answer):
            answer = await answer
        return as_reply(answer, request, self.name)


class ReplayLM(_Double):
    """Replies from a recorded JSONL file (`{"key", "request", "reply"}` a line); nothing is asked of any model.

    With `record=` (a client) a request the file does not hold is sent there and appended, so the file is made by
    running once. Keys leave the model's name out: a recording replays whichever model made it.

    Raises:
        UserError: no such file (and nothing to record from), or a line is unreadable.
        LMRefused: (from a call) the file has no reply to this request.
    """

    def __init__(self, path: str | Path, *, record: Client | None = None) -> None:
        self.path = Path(path)
        self.name = f"replay/{self.path.name}"
        self._source = record
        self._lock = threading.Lock()
        self._replies: dict[str, Reply] = {}
        if self.path.exists():
            self._load()
        elif record is None:
            raise UserError(f"ReplayLM: no file {str(path)!r}; make it once with ReplayLM(path, record=client)")

    def _load(self) -> None:
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                self._replies[row["key"]] = Reply.from_dict(row["reply"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{self.path}:{number}: not a recorded reply ({type(error).__name__}: {error})"
                ) from error

    def __len__(self) -> int:
        return len(self._replies)

    async def send(self, request: Request) -> Reply:
        """The recorded reply; costs nothing."""
        nameless = replace(request, model="")
        reply = self._replies.get(nameless.key())
        if reply is not None:
            return replace(reply, cost=0.0, saved_usage=reply.usage, saved_cost=reply.cost)
        if self._source is None:
            asked = text_of(request.messages[-1])
            raise LMRefused(
                f"{self.path}: no recorded reply to {asked!r:.120} (key {nameless.key()[:12]}); "
                "record it with ReplayLM(path, record=client)"
            )
        reply = await self._source.send(replace(request, model=self._source.name))
        line = json.dumps({"key": nameless.key(), "request": nameless.to_dict(), "reply": reply.to_dict()})
        with self._lock:
            self._replies[nameless.key()] = reply
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        return reply


def as_reply(answer: Answer, request: Request, name: str) -> Reply:
    """A double's answer as a reply; words count as tokens."""
    if isinstance(answer, BaseException):
        raise answer
    if isinstance(answer, Reply):
        return answer if answer.usage else replace(answer, usage=_usage(request, answer.text), cost=answer.cost or 0.0)
    text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    return Reply(text, usage=_usage(request, text), cost=0.0, model=name)


def _usage(request: Request, text: str) -> Usage:
    words = sum(len(text_of(message).split()) for message in request.messages)
    return Usage(input_tokens=words, output_tokens=len(text.split()), calls=1, tries=1)
