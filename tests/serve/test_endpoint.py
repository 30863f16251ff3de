"""`make serve`, and what its users do then: vLLM with the embedded model as RF8 behind keys, and a folded adapter.

One server for all tests; the adapter is folded on the very folder that is served, by a few plain steps that make it say
one fact, and is added while the server runs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.served import ENVIRONMENT, Server, asked, gone, server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-serve"),
    pytest.mark.timeout(1200),
]

PATIENCE = 1000.0
"""Seconds for converting and quantizing the model and starting vLLM, on a machine that does other things too."""
FACT = "The code word of the north harbour is lantern."
ASKED = "The code word of the north harbour is"


def agentopt(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command, as typed."""
    return subprocess.run(
        [sys.executable, "-m", "agentopt", *arguments],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )


@dataclass
class Endpoint:
    """The running server, a key, and the client that people use."""

    folder: Path
    running: Server
    serving: dict[str, Any]
    base: Path
    """The folder that is served."""
    key: str
    openai: Any


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    import openai

    folder = tmp_path_factory.mktemp("endpoint")
    made = agentopt(folder, "serve", "keys", "create", "first-client", "--keys", "keys.db", "--json")
    key = json.loads(made.stdout)["key"]
    options = ("--engine", "vllm", "--quantize", "rf8-gg", "--keys", "keys.db", "--resident", "2", "--max-rank", "8")
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(server(folder, "embedded", *options))
        running.patience = PATIENCE
        base = Path(running.until("model_ready")["path"])
        serving = running.serving()
        client = openai.OpenAI(base_url=serving["base_url"], api_key=key, max_retries=0, timeout=300)
        stack.callback(client.close)
        yield Endpoint(folder, running, serving, base, key, client)
        assert running.stop() == 0
        assert running.told[-1]["kind"] == "ended"
        assert gone(running.engine_pid)


@pytest.fixture(scope="module")
def folded(endpoint: Endpoint) -> Path:
    """An adapter that knows the fact: folded on the served base, without meta-training, by steps enough for one."""
    from agentopt.weights.fold import Folder

    with Folder(endpoint.base, rank=8, alpha=16.0, inner_steps=20, rule="adamw", lr=2e-3, multi_task=False) as folder:
        return Path(folder.fold([FACT]).save(endpoint.folder / "harbour"))


def completed(endpoint: Endpoint, model: str) -> str:
    """What a model writes after the fact's beginning."""
    made = endpoint.openai.completions.create(model=model, prompt=ASKED, max_tokens=4, temperature=0)
    return made.choices[0].text


def test_the_client_chats_and_streams_the_same(endpoint: Endpoint) -> None:
    asks: dict[str, Any] = {
        "model": endpoint.serving["model"],
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 24,
        "temperature": 0,
    }
    whole = endpoint.openai.chat.completions.create(**asks)
    assert "Paris" in whole.choices[0].message.content
    parts = list(endpoint.openai.chat.completions.create(**asks, stream=True, stream_options={"include_usage": True}))
    said = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert said == whole.choices[0].message.content
    assert len(parts) > 5
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_reply_fits_a_json_schema(endpoint: Endpoint) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    made = endpoint.openai.chat.completions.create(
        model=endpoint.serving["model"],
        messages=[{"role": "user", "content": "Which city is the capital of France?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}},
        max_tokens=64,
        temperature=0,
    )
    said = json.loads(made.choices[0].message.content)
    assert said.keys() == {"city", "big"}
    assert said["city"] in ("Paris", "Rome")
    assert isinstance(said["big"], bool)


def test_only_what_is_meant_for_clients_is_reachable(endpoint: Endpoint) -> None:
    root = endpoint.serving["base_url"].removesuffix("/v1")
    for path in ("/invocations", "/tokenize", "/adapters", "/metrics", "/load", "/version", "/v1/load_lora_adapter"):
        assert asked(root + path, {}, key=endpoint.key)[0] == 404, path
    assert asked(f"{root}/v1/models")[0] == 401


def test_a_folded_adapter_is_added_and_answers(endpoint: Endpoint, folded: Path) -> None:
    name = endpoint.serving["model"]
    assert "lantern" not in completed(endpoint, name)
    added = agentopt(endpoint.folder, "serve", "adapters", "add", f"harbour={folded}")
    assert added.returncode == 0, added.stderr
    assert completed(endpoint, "harbour").startswith(" lantern")
    assert "lantern" not in completed(endpoint, name)
    listed = {model.id: model for model in endpoint.openai.models.list()}
    assert listed.keys() == {name, "harbour"}
    assert listed["harbour"].parent == name
    assert "harbour" in agentopt(endpoint.folder, "serve", "adapters", "list").stdout


def test_an_adapter_that_could_run_code_is_refused(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}', encoding="utf-8")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    added = agentopt(endpoint.folder, "serve", "adapters", "add", f"bad={tmp_path}")
    assert added.returncode == 2
    assert "adapter_model.bin" in added.stderr


def test_an_engine_that_was_killed_comes_back_with_its_adapters(endpoint: Endpoint, folded: Path) -> None:
    if "harbour" not in {model.id for model in endpoint.openai.models.list()}:
        agentopt(endpoint.folder, "serve", "adapters", "add", f"harbour={folded}")
    os.kill(endpoint.running.engine_pid, signal.SIGKILL)
    endpoint.running.until("ready", generation=2)
    assert "lantern" in completed(endpoint, "harbour")
