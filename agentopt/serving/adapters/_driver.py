"""How an engine is told to load and forget an adapter: the two routes that vLLM has, and our own engine like it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from agentopt.serving._types import Engine, Refusal

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_SECONDS = 300.0
_LONGEST_REPLY = 1 << 20


class Driver(Protocol):
    """What holds adapters ready."""

    async def load(self, name: str, path: Path) -> None:
        """Hold the adapter in this folder ready under this name.

        Raises:
            Refusal: 503 it cannot be reached, 500 it does not take the adapter.
        """
        ...

    async def unload(self, name: str) -> None:
        """Forget it; one that is not there is no error.

        Raises:
            Refusal: 503 it cannot be reached.
        """
        ...


class EngineDriver:
    """An engine that has vLLM's routes, at whatever address it has just now."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def load(self, name: str, path: Path) -> None:
        """See `Driver`."""
        body = {"lora_name": name, "lora_path": str(path.resolve())}
        status, said = await self._post(LOAD, body)
        if status == 400 and "already" in said:  # its answer to an earlier call got lost
            await self.unload(name)
            status, said = await self._post(LOAD, body)
        if status != 200:
            raise Refusal(500, f"The engine does not take the adapter (status {status}): {said}.", kind="server_error")

    async def unload(self, name: str) -> None:
        """See `Driver`."""
        status, said = await self._post(UNLOAD, {"lora_name": name})
        if status not in (200, 400, 404):
            raise Refusal(500, f"The engine does not forget an adapter (status {status}): {said}.", kind="server_error")

    async def _post(self, route: str, body: dict[str, str]) -> tuple[int, str]:
        from agentopt.serving.gateway._client import Upstream, UpstreamError

        upstream = Upstream()
        try:
            headers = [("content-type", "application/json")]
            text = json.dumps(body).encode()
            reply = await upstream.request(
                self.engine.address, "POST", route, headers, text, first=_SECONDS, idle=_SECONDS
            )
            return reply.status, _message(await reply.read(_LONGEST_REPLY))
        except UpstreamError as error:
            self.engine.suspect(f"loading an adapter: {error}")
            raise Refusal(
                503, "The engine cannot be reached just now.", kind="server_error", code=error.code, retry_after=2
            ) from None
        finally:
            upstream.close()


def _message(body: bytes) -> str:
    """What an engine's reply says, in one line."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        text = str(found["error"]["message"])
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:300].rstrip(".")
