"""`--capsule`: long system prompts of clients are sent in fewer tokens.

A system text over the limit is shortened once, by extraction: whole units (sentences, list items, code blocks) leave,
what stays is not altered. Statements about the output format, schemas, `{slots}` and sentences that say what must or
must not be done stay; when those alone are over the limit, the text is sent as it is. The work is done in a process of
its own while requests go on with the text as it came; from then on the shorter text is sent, always with the same
bytes, so that the engine's prefix cache finds it. What users say is never touched, nor is a tuned prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

from agentopt.errors import UserError
from agentopt.serving._types import CHAT, COUNT, MESSAGES, RESPONSES

_KNOWN = 1_024
"""Texts that are remembered; at the default limit some 5 MB."""
_WAITING = 64
_LONGEST = 400_000
"""Characters. A longer text is left alone: one client could keep a core busy."""
_PATIENCE = 60.0
"""Seconds for one text."""
_LINE = 16 << 20
_INSTRUCTING = ("system", "developer")


@dataclass(frozen=True, slots=True)
class _Made:
    text: str
    before: int
    after: int


class Shortening:
    """Shortens system prompts in the background. `apply` belongs to the event loop on which `start` was called.

    Args:
        tokens: the limit for one system text.
        tokenizer: what counts, see `TokenBudget`; the served model's own is the honest one.
        store: path of the store where capsules are kept for the next start, with the texts that they were made of;
            None for nowhere.
        on_event: gets a sentence when a text cannot be shortened.

    Raises:
        UserError: no such tokenizer, or a limit below 1.
    """

    def __init__(
        self,
        tokens: int = 1024,
        *,
        tokenizer: str | Path = "o200k_base",
        store: str | Path | None = None,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        from agentopt.capsules import TokenBudget

        if tokens < 1:
            raise UserError(f"--capsule-tokens {tokens}: expected a whole number of at least 1.")
        TokenBudget(tokens, tokenizer).meter()  # a tokenizer that is not there is told now
        self._limit = tokens
        self._about = {"tokens": tokens, "tokenizer": str(tokenizer), "store": None if store is None else str(store)}
        self._tell = on_event or _nobody
        self._known: OrderedDict[bytes, _Made | None] = OrderedDict()
        self._waiting: asyncio.Queue[tuple[bytes, str]] = asyncio.Queue(_WAITING)
        self._worker: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._counts = {"shortened_requests": 0, "tokens_saved": 0, "left_alone": 0}

    # ---- life

    async def start(self) -> None:
        """Begin to work."""
        if self._worker is None:
            self._worker = asyncio.create_task(self._work(), name="shortening of system prompts")

    async def close(self) -> None:
        """Stop; a text that is being shortened is left."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.cancel()
            await asyncio.wait([worker])
        await self._end_process()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def settled(self) -> None:
        """Wait until every text that came so far was dealt with."""
        await self._waiting.join()

    def stats(self) -> dict[str, int]:
        """For the status page: texts known, texts waiting, requests that went out shorter, tokens saved."""
        made = sum(entry is not None for entry in self._known.values())
        return {"texts_shortened": made, "waiting": self._waiting.qsize(), **self._counts}

    @property
    def pid(self) -> int | None:
        """The process that shortens; None before it is needed."""
        return None if self._process is None else self._process.pid

    # ---- one request

    def apply(self, route: str, body: dict[str, Any], note: Callable[[str], None]) -> dict[str, Any]:
        """The body with shorter system texts where they are ready; otherwise the body itself.

        Args:
            route: which form the body has.
            body: not changed.
            note: gets "2345->1020", tokens before and after, when something shorter is sent.
        """
        used: list[_Made] = []

        def shorter(text: str) -> str:
            made = self._look(text)
            if made is None:
                return text
            used.append(made)
            return made.text

        changed = _mapped(route, body, shorter)
        if not used:
            return body
        before, after = sum(made.before for made in used), sum(made.after for made in used)
        self._counts["shortened_requests"] += 1
        self._counts["tokens_saved"] += before - after
        note(f"{before}->{after}")
        return changed

    def _look(self, text: str) -> _Made | None:
        limit = self._limit
        if len(text) <= limit // 4 or len(text) > _LONGEST:
            return None
        raw = text.encode("utf-8", "surrogatepass")
        if len(raw) <= limit:  # a token is at least one byte
            return None
        key = hashlib.sha256(raw).digest()
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        if self._worker is not None and not self._waiting.full():
            self._remember(key, None)  # while it is made, and for good when nothing comes of it
            self._waiting.put_nowait((key, text))
        return None

    def _remember(self, key: bytes, made: _Made | None) -> None:
        self._known[key] = made
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)

    # ---- in the background

    async def _work(self) -> None:
        while True:
            key, text = await self._waiting.get()
            try:
                made = await self._shortened(text)
                if made is not None:
                    self._remember(key, made)
            except (OSError, ValueError, TimeoutError, UserError) as error:
                self._counts["left_alone"] += 1
                self._tell(f"--capsule: a system prompt of {len(text):,} characters is sent as it is: {error}")
            finally:
                self._waiting.task_done()

    async def _shortened(self, text: str) -> _Made | None:
        """What the process says; it is started when it is needed, and anew when it has died.

        Raises:
            UserError: the text cannot be shortened.
            OSError, ValueError, TimeoutError: the process is out of order.
        """
        try:
            async with asyncio.timeout(_PATIENCE):
                line = await self._asked(json.dumps(text).encode("ascii") + b"\n")
        except (OSError, ValueError, TimeoutError) as error:
            await self._end_process()
            raise OSError(f"the process that shortens it failed ({str(error) or type(error).__name__})") from error
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        made = answer["made"]
        return None if made is None else _Made(**made)

    async def _asked(self, line: bytes) -> bytes:
        process = self._process
        if process is None or process.returncode is not None:
            process = self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "agentopt.serving._shortening_process"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LINE,
                start_new_session=True,  # a Ctrl-C is ours to handle
            )
            line = json.dumps(self._about).encode("ascii") + b"\n" + line
        if process.stdin is None or process.stdout is None:
            raise OSError("it has no pipes")
        process.stdin.write(line)
        await process.stdin.drain()
        answer = await process.stdout.readline()
        if not answer.endswith(b"\n"):
            raise OSError("it ended")
        return answer

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _nobody(_: str) -> None:
    return None


def _mapped(route: str, body: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The body with `change` applied to each of its system texts."""
    if route == CHAT:
        return {**body, "messages": _leading(body.get("messages"), change)}
    if route in (MESSAGES, COUNT) and "system" in body:
        return {**body, "system": _content(body["system"], change)}
    if route == RESPONSES:
        made = {**body, "input": _leading(body["input"], change)} if "input" in body else body
        told = body.get("instructions")
        return {**made, "instructions": change(told)} if isinstance(told, str) else made
    return body


def _leading(turns: Any, change: Callable[[str], str]) -> Any:
    """The turns with the leading system turns changed; anything else as it is."""
    if not isinstance(turns, list):
        return turns
    made = list(cast("list[Any]", turns))
    for place, turn in enumerate(made):
        if not isinstance(turn, Mapping) or cast("Mapping[str, Any]", turn).get("role") not in _INSTRUCTING:
            break
        given = cast("Mapping[str, Any]", turn)
        made[place] = {**given, "content": _content(given.get("content"), change)}
    return made


def _content(content: Any, change: Callable[[str], str]) -> Any:
    if isinstance(content, str):
        return change(content)
    if not isinstance(content, list):
        return content
    return [_part(part, change) for part in cast("list[Any]", content)]


def _part(part: Any, change: Callable[[str], str]) -> Any:
    if isinstance(part, dict):
        given = cast("dict[str, Any]", part)
        if isinstance(given.get("text"), str):
            return {**given, "text": change(given["text"])}
    return cast("Any", part)
