"""Every provider litellm knows, behind our own cache, retries, throttle and prices.

litellm is imported inside the first call, in a worker thread (its import takes 6-10 s), with its price map taken from
the package instead of the network unless the user says otherwise. All its calls run on the process's one background
loop, because its cached clients belong to the loop that made them. Its own retries and caches stay off.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import AsyncIterator, Mapping
from functools import cache
from typing import Any, cast

import anyio.to_thread

from agentopt.models._background import run_on_background, submit
from agentopt.models._errors import (
    LMError,
    LMRateLimit,
    LMRefused,
    LMTimeout,
    LMUnavailable,
    UnknownModel,
)
from agentopt.models._prices import Price
from agentopt.models._protocol import Reply, Request
from agentopt.models._wire import StreamReader, http_error, read_completion, request_body

_import_lock = threading.Lock()


def litellm_installed() -> bool:
    """Whether the extra is there; imports nothing."""
    return importlib.util.find_spec("litellm") is not None


@cache
def _litellm() -> Any:
    with _import_lock:
        os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module: Any = importlib.import_module("litellm")
        module.suppress_debug_info = True
        module.telemetry = False
        module.drop_params = True  # a seed that a provider does not take must not fail the call
        module.disable_aiohttp_transport = True
        return module


class LiteLLMClient:
    """A client for one litellm model string, such as `anthropic/claude-haiku-4-5` or `azure/my-deployment`.

    `base_url` points it at another endpoint; the name then carries it. Prices come from our own table first and from
    the map bundled with litellm otherwise.
    """

    deterministic = False

    def __init__(self, model: str, *, base_url: str | None = None, api_key: str | None = None) -> None:
        self.model = model
        self.name = model if base_url is None else f"litellm:{base_url}#{model}"
        self._base_url = base_url
        self._api_key = api_key

    def _arguments(self, request: Request) -> dict[str, Any]:
        arguments = request_body(request, self.model, prefixed=True)
        arguments |= {"num_retries": 0, "max_retries": 0, "timeout": request.options.timeout, "caching": False}
        if self._base_url is not None:
            arguments["api_base"] = self._base_url
        if self._api_key is not None:
            arguments["api_key"] = self._api_key
        return arguments

    async def send(self, request: Request) -> Reply:
        """One try; raises LMRateLimit, LMUnavailable, LMTimeout, LMRefused or UnknownModel."""
        litellm = await _loaded()
        arguments = self._arguments(request)
        try:
            answer = await run_on_background(lambda: litellm.acompletion(**arguments))
            data: dict[str, Any] = answer.model_dump(warnings=False)
        except Exception as error:
            raise self._error(error) from error
        reply = read_completion(data, request)
        price = bundled_price(litellm, self.model)
        if price is None or self._ours():
            return reply
        return Reply(
            text=reply.text,
            tool_calls=reply.tool_calls,
            usage=reply.usage,
            cost=price.cost(reply.usage),
            finish_reason=reply.finish_reason,
            logprobs=reply.logprobs,
            model=reply.model,
        )

    def _ours(self) -> bool:
        from agentopt.models._prices import default_prices

        return default_prices().of(self.name) is not None

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        """Text pieces, then a Reply with usage; one try."""
        litellm = await _loaded()
        arguments = self._arguments(request) | {"stream": True, "stream_options": {"include_usage": True}}
        loop, chunks = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | BaseException | None]()

        async def pump() -> None:
            try:
                async for chunk in await litellm.acompletion(**arguments):
                    loop.call_soon_threadsafe(chunks.put_nowait, chunk.model_dump(warnings=False))
                end: BaseException | None = None
            except Exception as error:  # noqa: BLE001  # raised below, where the reader is
                end = error
            loop.call_soon_threadsafe(chunks.put_nowait, end)

        future, reader = submit(pump), StreamReader(request)
        try:
            while isinstance(chunk := await chunks.get(), dict):
                piece = reader.piece(chunk)
                if piece:
                    yield piece
            if chunk is not None:
                raise self._error(chunk) from chunk
        finally:
            future.cancel()
        yield reader.reply()

    def adapter_problem(self, adapter: str) -> str | None:
        """None: the provider's server says whether it has an adapter of that name."""
        return None

    async def aclose(self) -> None:
        """Nothing to do: litellm keeps its clients for the process."""

    def _error(self, error: BaseException) -> LMError | UnknownModel:
        status = getattr(error, "status_code", None)
        kind = type(error).__name__
        text = str(getattr(error, "message", None) or error)
        if "LLM Provider NOT provided" in text:
            return UnknownModel(f"model {self.model!r}: litellm knows no such provider; write provider/model")
        if isinstance(error, LMError):
            return error
        headers = _headers(error)
        if kind == "Timeout" or isinstance(error, TimeoutError):
            return LMTimeout(f"{self.name} timed out: {text:.300}", retryable=True)
        if kind == "APIConnectionError":
            return LMUnavailable(f"cannot reach {self.name}: {text:.300}", retryable=True)
        if isinstance(status, int) and status >= 400:
            mapped = http_error(self.name, status, headers, text)
            if kind == "RateLimitError" and not isinstance(mapped, LMRateLimit):
                return LMRefused(f"{self.name} refused the request: {text:.300}", status=status)
            return mapped
        return LMRefused(f"{self.name}: {kind}: {text:.300}")


async def _loaded() -> Any:
    return await anyio.to_thread.run_sync(_litellm)


def _headers(error: BaseException) -> Mapping[str, str]:
    for holder in (error, getattr(error, "response", None)):
        found = getattr(holder, "litellm_response_headers", None) or getattr(holder, "headers", None)
        if found:
            return {str(key).lower(): str(value) for key, value in dict(found).items()}
    return {}


def bundled_price(litellm: Any, model: str) -> Price | None:
    """The price in litellm's own map, per million tokens; None when it has none."""
    table = cast("Mapping[str, Mapping[str, Any]]", litellm.model_cost)
    row = table.get(model) or table.get(model.partition("/")[2])
    if not row or row.get("input_cost_per_token") is None or row.get("output_cost_per_token") is None:
        return None
    cached = row.get("cache_read_input_token_cost")
    return Price(
        float(row["input_cost_per_token"]) * 1e6,
        float(row["output_cost_per_token"]) * 1e6,
        None if cached is None else float(cached) * 1e6,
    )
