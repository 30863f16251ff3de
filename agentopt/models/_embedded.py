"""The embedded client: a GGUF model run in-process by llama.cpp, with no server, no key and no network.

Forms: `embedded/smollm2-135m-instruct` (the packaged weights), any `.gguf` path, `hf:owner/repo/file.gguf`. Calls are
free, deterministic (a pure function of the request) and run one at a time in a worker thread. `choices=` is answered by
scoring the labels (see `_embedded_choices`), not by generating text.

A last message of the assistant is the beginning of the reply: the model goes on from it ("Sentiment:" before a label
helps a small model more than any instruction). An empty one counts as absent, so a tunable beginning may start empty.

`LMOptions.extra["calibrate"]` removes a prompt's label bias: label probabilities are divided by their mean over other
user turns in place of the last one. `"content_free"`: "N/A", "" and "[MASK]" (contextual calibration, Zhao et al. 2021,
arXiv 2102.09690). A list of texts: those, typically some training inputs without their labels (batch calibration, Zhou
et al. 2023, arXiv 2309.17249), written as the user turn is. `"none"` or an empty list: nothing. The mean is computed
once for each prompt; its passes are not counted in `usage`. Everything else in `extra` is passed to llama.cpp
(`grammar`, `min_p`, `repeat_penalty`, ...).
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from agentopt.graph import Usage
from agentopt.models._embedded_choices import normalised, score_choices
from agentopt.models._embedded_engine import (
    Loaded,
    Stop,
    close_engine,
    engine,
    engine_threads,
    physical_cores,
    stopped_error,
)
from agentopt.models._embedded_files import (
    INSTALL_ENGINE,
    INSTALL_WEIGHTS,
    PACKAGED,
    engine_installed,
    fetch,
    is_embedded_spec,
    packaged_file,
    resolve,
)
from agentopt.models._embedded_lock import default_lock_path
from agentopt.models._errors import LMRefused
from agentopt.models._protocol import LMOptions, Message, Reply, Request, ToolCall

__all__ = ["EmbeddedClient", "close_engine", "embedded_available", "engine_info", "is_embedded_spec", "time_engine"]

_CONTENT_FREE = ("N/A", "", "[MASK]")
"""Inputs without content, as in section 3 of arXiv 2102.09690."""


class EmbeddedClient:
    """A `Client` for one GGUF file. Several clients share the process's one engine.

    Raises:
        UnknownModel: the spec names no file, the weights package is absent, or (at the first call) the engine is.
    """

    deterministic = True
    own_timeout = True

    def __init__(self, spec: str = PACKAGED) -> None:
        self.name, self._path = resolve(spec)
        self._priors: dict[tuple[Any, ...], dict[str, float]] = {}

    async def send(self, request: Request) -> Reply:
        """One call; the timeout counts from the moment the engine begins with it."""
        path = await self._file()
        stop, future = self._submit(path, request)
        try:
            return await asyncio.wrap_future(future)  # cancelling it drops the job while it is queued
        finally:
            stop.ask()  # and ends it at its next token when it runs

    def send_sync(self, request: Request) -> Reply:
        """`send` for a thread without an event loop."""
        if self._path is None:
            self._path = fetch(self.name)
        stop, future = self._submit(self._path, request)
        try:
            return future.result()
        finally:
            stop.ask()
            future.cancel()

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        """Text pieces as they come, then the whole reply. Leaving the iterator stops the generation."""
        path = await self._file()
        _refuse_images(request.messages)
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def push(piece: str | None) -> None:
            with suppress(RuntimeError):  # the reader's loop is closed: nobody listens any more
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        stop = Stop(request.options.timeout)
        future = engine().submit(path, lambda model: self._generate(model, request, stop, push), stop)
        future.add_done_callback(lambda _: push(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield future.result()
        finally:
            stop.ask()
            future.cancel()

    async def aclose(self) -> None:
        """Nothing to do: the engine is shared, is closed at exit, and `close_engine()` closes it earlier."""

    async def _file(self) -> Path:
        if self._path is None:
            import anyio.to_thread

            self._path = await anyio.to_thread.run_sync(fetch, self.name)
        return self._path

    def _submit(self, path: Path, request: Request) -> tuple[Stop, Future[Reply]]:
        _refuse_images(request.messages)
        stop = Stop(request.options.timeout)

        def work(model: Loaded) -> Reply:
            if request.choices:
                return self._choose(model, request)
            if request.tools:
                return self._reply(model.chat_once({**_body(request), "tools": list(request.tools)}))
            return self._generate(model, request, stop, None)

        return stop, engine().submit(path, work, stop)

    def _generate(self, model: Loaded, request: Request, stop: Stop, push: Any) -> Reply:
        texts: list[str] = []
        last: dict[str, Any] = {}

        def on_chunk(chunk: dict[str, Any]) -> bool:
            if "error" in chunk:
                last["error"] = chunk
                return True
            if chunk.get("usage"):
                last["usage"] = chunk["usage"]
            for choice in chunk.get("choices") or ():
                if choice.get("finish_reason"):
                    last["finish"] = choice["finish_reason"]
                piece: Any = cast("dict[str, Any]", choice.get("delta") or {}).get("content")
                if piece:
                    texts.append(piece)
                    if push is not None:
                        push(piece)
            return bool(stop)

        model.chat({**_body(request), "stream_options": {"include_usage": True}}, on_chunk)
        if "error" in last:
            model.checked(last["error"])
        if "finish" not in last:
            raise stopped_error(stop)
        return self._finished("".join(texts), last.get("usage") or {}, last["finish"])

    def _reply(self, reply: dict[str, Any]) -> Reply:
        choice = reply["choices"][0]
        message = choice["message"]
        calls = tuple(_tool_call(call) for call in message.get("tool_calls") or ())
        return self._finished(message.get("content") or "", reply["usage"], choice["finish_reason"], calls)

    def _finished(self, text: str, usage: Mapping[str, Any], finish: str, calls: tuple[ToolCall, ...] = ()) -> Reply:
        counted = Usage(
            input_tokens=int(usage.get("prompt_tokens", 0)),
            output_tokens=int(usage.get("completion_tokens", 0)),
            calls=1,
            tries=1,
        )
        return Reply(text, tool_calls=calls, usage=counted, cost=0.0, finish_reason=finish, model=self.name)

    def _choose(self, model: Loaded, request: Request) -> Reply:
        labels = request.choices or ()
        scores, prompt_tokens = _scores(model, request.messages, labels)
        inputs = _calibration_inputs(request.options.extra.get("calibrate", "none"))
        if inputs:
            scores = _calibrated(scores, self._prior(model, request.messages, labels, inputs))
        text = max(labels, key=lambda label: scores[label])  # the first of equals
        usage = Usage(input_tokens=prompt_tokens, output_tokens=1, calls=1, tries=1)
        return Reply(text, usage=usage, cost=0.0, logprobs=scores, model=self.name)

    def _prior(
        self, model: Loaded, messages: Sequence[Message], labels: tuple[str, ...], inputs: tuple[str, ...]
    ) -> dict[str, float]:
        """Mean label probability over `inputs` in place of the last user turn; computed once per prompt."""
        last = max((i for i, turn in enumerate(messages) if turn["role"] == "user"), default=0)
        key = (labels, inputs, repr([(turn["role"], turn["content"]) for i, turn in enumerate(messages) if i != last]))
        found = self._priors.get(key)
        if found is None:
            total = dict.fromkeys(labels, 0.0)
            for text in inputs:
                blank = [{**turn, "content": text} if i == last else turn for i, turn in enumerate(messages)]
                for label, logprob in _scores(model, blank, labels)[0].items():
                    total[label] += math.exp(logprob) / len(inputs)
            found = self._priors[key] = total
        return found


def _scores(model: Loaded, messages: Sequence[Message], labels: Sequence[str]) -> tuple[dict[str, float], int]:
    messages = _turns(messages)
    text = model.prompt_text(messages)
    prompt = model.tokens(text, special=True)
    # After an answer prefix such as "Sentiment:" the label is the next word, so it begins with a space.
    space = "" if text[-1:].isspace() or messages[-1]["role"] != "assistant" else " "
    tokens = {label: model.label_tokens(space + label) for label in labels}

    slot = model.place(prompt)

    def next_logprobs(done: Sequence[int], candidates: Sequence[int], absolute: bool) -> dict[int, float]:
        return model.next_logprobs(slot, (*prompt, *done), candidates, absolute)

    return score_choices(tokens, next_logprobs), len(prompt)


def _calibrated(scores: Mapping[str, float], prior: Mapping[str, float]) -> dict[str, float]:
    return normalised({label: score - math.log(max(prior[label], 1e-9)) for label, score in scores.items()})


def _body(request: Request) -> dict[str, Any]:
    options: LMOptions = request.options
    body: dict[str, Any] = {
        "messages": _turns(request.messages),
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": ((options.seed or 0) * 1_000_003 + options.sample) % 2**32,
        "cache_prompt": True,
        **{name: value for name, value in options.extra.items() if name != "calibrate"},
    }
    if options.temperature <= 0:
        body["top_k"] = 1
    if options.stop:
        body["stop"] = list(options.stop)
    if options.top_p is not None:
        body["top_p"] = options.top_p
    if request.schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "reply", "schema": request.schema}}
    return body


def _calibration_inputs(calibrate: Any) -> tuple[str, ...]:
    if calibrate == "none":
        return ()
    if calibrate == "content_free":
        return _CONTENT_FREE
    items: list[Any] = cast("list[Any]", calibrate) if isinstance(calibrate, list) else [None]
    if not all(isinstance(item, str) for item in items):
        found = f"{calibrate!r:.60}"
        raise LMRefused(
            f'extra["calibrate"]: expected "none", "content_free" or a list of texts, found {found}', status=400
        )
    return tuple(items)


def _turns(messages: Sequence[Message]) -> list[Message]:
    last = messages[-1]
    empty = last["role"] == "assistant" and not last.get("content") and not last.get("tool_calls")
    return list(messages[:-1] if empty and len(messages) > 1 else messages)


def _refuse_images(messages: Sequence[Message]) -> None:
    for turn in messages:
        content = turn.get("content")
        parts: list[Any] = cast("list[Any]", content) if isinstance(content, list) else []
        if any(isinstance(part, dict) and cast("dict[str, Any]", part).get("type") != "text" for part in parts):
            raise LMRefused("the embedded model reads text only; a message has an image or audio part", status=400)


def _tool_call(call: Mapping[str, Any]) -> ToolCall:
    function, raw = call["function"], call["function"].get("arguments") or "{}"
    try:
        arguments = json.loads(raw)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        return ToolCall(str(call.get("id") or ""), str(function["name"]), {}, raw)
    return ToolCall(str(call.get("id") or ""), str(function["name"]), cast("dict[str, Any]", arguments))


def embedded_available() -> bool:
    """Whether `embedded/smollm2-135m-instruct` can run here: engine and weights are installed."""
    return engine_installed() and packaged_file() is not None


def engine_info() -> dict[str, Any]:
    """For `agentopt doctor`; imports nothing heavy. Keys: engine (installed?), weights (path or None), threads, cores,
    lock (path), missing (the commands that install what is absent).
    """
    weights = packaged_file()
    missing = [] if engine_installed() else [INSTALL_ENGINE]
    if weights is None:
        missing.append(INSTALL_WEIGHTS)
    return {
        "engine": engine_installed(),
        "weights": None if weights is None else str(weights),
        "threads": engine_threads(),
        "cores": physical_cores(),
        "lock": str(default_lock_path()),
        "missing": missing,
    }


def time_engine(calls: int = 20) -> dict[str, float]:
    """Time short label calls (a shared instruction and about ten new tokens each).

    Keys: load_s (first call, model load included), calls_per_second.
    Raises UnknownModel when engine or weights are missing.
    """
    client = EmbeddedClient()
    instruction = "Classify the support ticket as billing, technical or account."
    subjects = ("invoice", "login page", "password", "refund", "error message", "address", "mobile app", "card")

    def once(number: int) -> float:
        ticket = f"Question {number} about my {subjects[number % len(subjects)]}"
        messages: tuple[Message, ...] = (
            {"role": "system", "content": instruction},
            {"role": "user", "content": ticket},
        )
        request = Request(client.name, messages, choices=("billing", "technical", "account"))
        started = time.perf_counter()
        client.send_sync(request)
        return time.perf_counter() - started

    load = once(0)
    seconds = sum(once(number) for number in range(1, calls + 1))
    return {"load_s": load, "calls_per_second": calls / seconds}
