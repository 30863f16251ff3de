"""Any OpenAI-compatible server, directly: api.openai.com, vLLM, llama.cpp, Ollama, gateways. No provider library.

`send` is one POST to `{base_url}/chat/completions`. What it does not do: retries, caching (the `LM`'s work), the
Responses API, audio.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from agentopt.errors import UserError
from agentopt.models._errors import LMUnavailable
from agentopt.models._http import Response, Transport, transport
from agentopt.models._protocol import Reply, Request
from agentopt.models._wire import StreamReader, choices_schema, http_error, read_completion, request_body

OPENAI_URL = "https://api.openai.com/v1"
_PATH = "/chat/completions"


@dataclass(frozen=True, slots=True)
class OpenAIOptions:
    """How to talk to one server."""

    api_key: str | None = None
    """None: the environment's OPENAI_API_KEY, read when a call is made; servers without keys ignore it."""
    choices: Literal["text", "schema", "guided"] = "text"
    """How `choices=` is enforced: by reading the text (works everywhere), by a json_schema enum (OpenAI, vLLM,
    llama.cpp), or by vLLM's `guided_choice`."""
    logprobs: bool = False
    """With `choices=` ask for the first token's alternatives and give `Reply.logprobs`."""
    max_tokens_name: str = "max_tokens"
    """OpenAI's reasoning models want "max_completion_tokens"."""
    name: str | None = None
    """The client's name; default `openai-compatible:URL#model`."""


class OpenAICompatible:
    """A client for one model on one server.

    Raises:
        UserError: the base URL is no http(s) URL.
    """

    deterministic = False

    def __init__(self, base_url: str, model: str, options: OpenAIOptions | None = None) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"base URL {base_url!r}: expected http://HOST[:PORT]/v1 or https://HOST/v1")
        self.options = options or OpenAIOptions()
        self.model = model
        self.base_url = base_url.rstrip("/")
        self.name = self.options.name or f"openai-compatible:{self.base_url}#{model}"
        self._transport: Transport = transport(self.base_url)

    def _body(self, request: Request) -> dict[str, Any]:
        body = request_body(request, self.model)
        options = self.options
        if options.max_tokens_name != "max_tokens":
            body[options.max_tokens_name] = body.pop("max_tokens")
        if request.choices is not None:
            if options.choices == "schema":
                body["response_format"] = choices_schema(request.choices)
            elif options.choices == "guided":
                body["guided_choice"] = list(request.choices)
            if options.logprobs:
                body["logprobs"], body["top_logprobs"] = True, 20
        return body

    def _headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json", "accept": "application/json", "user-agent": "agentopt"}
        key = self.options.api_key or os.environ.get("OPENAI_API_KEY")
        if key:
            headers["authorization"] = f"Bearer {key}"
        return headers

    async def send(self, request: Request) -> Reply:
        """One try; raises LMRateLimit, LMUnavailable, LMTimeout or LMRefused."""
        payload = json.dumps(self._body(request)).encode("ascii")
        async with self._transport.post(_PATH, payload, self._headers()) as response:
            content = await response.read()
        if response.status != 200:
            raise http_error(self.name, response.status, response.headers, content)
        try:
            data: Any = json.loads(content)
        except ValueError as error:
            raise LMUnavailable(
                f"{self.name} answered no JSON: {content[:200].decode('utf-8', 'replace')!r}", retryable=True
            ) from error
        return read_completion(data, request)

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        """Text pieces, then a Reply with usage; one try."""
        body = self._body(request) | {"stream": True, "stream_options": {"include_usage": True}}
        reader = StreamReader(request)
        async with self._transport.post(_PATH, json.dumps(body).encode("ascii"), self._headers()) as response:
            if response.status != 200:
                raise http_error(self.name, response.status, response.headers, await response.read())
            async for event in _events(response):
                piece = reader.piece(event)
                if piece:
                    yield piece
        yield reader.reply()

    def adapter_problem(self, adapter: str) -> str | None:
        """Only OpenAI's own service is known to have none; a server says itself whether it has one of that name."""
        return "api.openai.com serves no adapters of yours" if self.base_url == OPENAI_URL else None

    async def aclose(self) -> None:
        """Close this loop's idle connections."""
        await self._transport.aclose()


async def _events(response: Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of server-sent events, up to `[DONE]` and the end of the body."""
    rest = b""
    async for piece in response.pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and line[5:].strip() not in (b"", b"[DONE]"):
                try:
                    yield json.loads(line[5:])
                except ValueError as error:
                    raise LMUnavailable(f"a streamed event is no JSON: {line[:200]!r}", retryable=True) from error
