"""The engine over transformers as a process: how it starts, what it says, how it ends."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import httpx
import openai
import pytest

from agentopt.models._embedded_files import packaged_file
from agentopt.serving.engines import transformers_server
from tests.weights.tiny import tiny_folder

COMMAND = [sys.executable, "-m", "agentopt.serving.engines.transformers_server"]


@contextlib.contextmanager
def started(path: Path, *options: str) -> Generator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """The server at a Unix socket, once it is healthy."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AGENTOPT_ENGINE_TOKEN": "secret"}
    with subprocess.Popen([*COMMAND, "--uds", str(path), *options], env=environment) as process:
        try:
            until = time.monotonic() + 240
            while process.poll() is None and time.monotonic() < until and not _listens(path):
                time.sleep(0.1)
            with httpx.Client(
                transport=httpx.HTTPTransport(uds=str(path)), base_url="http://engine", timeout=120
            ) as http:
                assert http.get("/health").status_code == 200
                yield process, http
        finally:
            process.kill()


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as trial:
        try:
            trial.connect(str(path))
        except OSError:
            return False
    return True


@pytest.mark.slow
@pytest.mark.embedded
def test_it_starts_answers_and_ends_in_order(tmp_path: Path) -> None:
    """One start for all that a process shows: loading the embedded model from its file takes most of the time."""
    real = packaged_file() is not None
    model = "embedded" if real else str(tiny_folder(tmp_path / "model"))
    path = tmp_path / "e.sock"
    with started(path, "--model", model, "--served-model-name", "it", "--max-model-len", "200") as (process, http):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, "others could ask the engine"
        assert http.get("/v1/models").status_code == 401
        listed = http.get("/v1/models", headers={"authorization": "Bearer secret"}).json()["data"]
        assert [(one["id"], one["max_model_len"]) for one in listed] == [("it", 200)]
        routes = http.get("/openapi.json", headers={"authorization": "Bearer secret"}).json()["paths"]
        assert "/v1/load_lora_adapter" not in routes, "adapters were not asked for"
        if real:
            knows_the_capital(openai.OpenAI(base_url="http://engine/v1", api_key="secret", http_client=http))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def knows_the_capital(client: openai.OpenAI) -> None:
    """The embedded model's own template, end and tokenizer, also with a JSON schema."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    asked = {"model": "it", "messages": messages, "max_tokens": 12, "temperature": 0}
    reply = client.chat.completions.create(**asked)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert "Paris" in str(reply.choices[0].message.content)
    assert reply.choices[0].finish_reason == "stop"
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    asked |= {"max_tokens": 40, "response_format": wanted}
    if importlib.util.find_spec("llguidance") is None:
        with pytest.raises(openai.BadRequestError, match="pip install llguidance"):
            client.chat.completions.create(**asked)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return
    reply = client.chat.completions.create(**asked)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert json.loads(str(reply.choices[0].message.content)).keys() == {"city"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "./nowhere"], "no such folder"),
        (["--model", "x", "--uds", "/nowhere/deep/e.sock"], "cannot be listened at"),
    ],
)
def test_what_cannot_be_started_is_said_in_a_sentence(
    options: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["transformers_server", *options])
    assert transformers_server.main() == 2
    assert says in capsys.readouterr().err
