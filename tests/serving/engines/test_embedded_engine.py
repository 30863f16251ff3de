"""llama.cpp's server as a supervised engine: all its routes, side by side, and nothing without the token."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import RunError
from agentopt.models._embedded_files import engine_installed, packaged_file
from agentopt.serving._types import CHAT, EMBEDDINGS, MESSAGES, RESPONSES
from agentopt.serving.engines import EngineOptions, Supervisor, choose_engine, fetch, launch, prepare

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.embedded,
    pytest.mark.skipif(not engine_installed() or packaged_file() is None, reason="needs the embedded model"),
]


async def _supervisor(model: str, tmp_path: Path) -> Supervisor:
    chosen = choose_engine(model, "embedded")
    prepared = await prepare(model, chosen, cache=tmp_path / "cache")
    return Supervisor(
        launch(chosen, prepared, EngineOptions(sequences=2, extra=("--max-model-len", "256"))), run_dir=tmp_path / "run"
    )


async def test_embedded_model_answers_on_every_route(tmp_path: Path) -> None:
    async with await _supervisor("embedded", tmp_path) as engine:
        await engine.ready()
        assert engine.abilities.context == 256

        async def ask(route: str, body: dict[str, Any]) -> dict[str, Any]:
            status, reply = await fetch(
                engine.address, route, method="POST", body=json.dumps(body).encode(), timeout=120
            )
            assert status == 200, reply
            return json.loads(reply)

        said = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 8, "temperature": 0}
        async with asyncio.TaskGroup() as group:
            chat = group.create_task(ask(CHAT, said))
            message = group.create_task(ask(MESSAGES, said))
            response = group.create_task(ask(RESPONSES, {"input": "Name a colour.", "max_output_tokens": 8}))
            vector = group.create_task(ask(EMBEDDINGS, {"input": ["one", "two"]}))
        assert chat.result()["choices"][0]["message"]["content"] and chat.result()["usage"]["completion_tokens"] <= 8
        assert chat.result()["model"] == engine.abilities.model == "smollm2-135m-instruct"
        assert message.result()["type"] == "message" and response.result()["object"] == "response"
        assert len(vector.result()["data"]) == 2
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
        form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
        reply = await ask(CHAT, {**said, "max_tokens": 40, "response_format": form})
        assert isinstance(json.loads(reply["choices"][0]["message"]["content"])["n"], int)
        stranger = replace(engine.address, token="guessed")
        for path in ("/v1/models", "/props", "/slots", "/metrics"):
            assert (await fetch(stranger, path))[0] == 401


async def test_file_that_is_no_model_fails_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(64))
    async with await _supervisor(str(tmp_path / "bad.gguf"), tmp_path) as engine:
        with pytest.raises(RunError, match=r"llama\.cpp cannot load .*bad\.gguf"):
            await engine.ready()
        assert engine.generation == 1
