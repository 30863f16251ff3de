"""A quantized folder behind vLLM's HTTP server, with no option that names the quantization; bad folders refused."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.serve import quantized
from tests.serve.harness import ENVIRONMENT, START, free_port, post, serving
from tests.serve.quantized import Checkpoint, Spec
from tests.weights.fold.forced import Case, Said, compare, said

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-serve"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("quantized"), Spec("rf8-gg", "float32", head=True))


def command(folder: Path, port: int) -> list[str]:
    module = "vllm.entrypoints.openai.api_server"
    options = ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    return [sys.executable, "-m", module, "--model", str(folder), *options, "--max-model-len", "64", "--enforce-eager"]


def started(folder: Path, **environment: str) -> str:
    """What a server writes that is expected not to start."""
    done = subprocess.run(
        command(folder, 9),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **ENVIRONMENT, **environment},
        timeout=START,
    )
    assert done.returncode != 0
    return done.stdout + done.stderr


@contextlib.contextmanager
def endpoint(checkpoint: Checkpoint, log: Path) -> Generator[str]:
    """The server with the adapter; gives its base URL."""
    port = free_port()
    more = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--max-num-seqs", "8"]
    more += ["--lora-target-modules", *quantized.TARGETS, "--distributed-executor-backend", "uni"]
    more += ["--lora-modules", f"adapter={checkpoint.adapter}"]
    with serving([*command(checkpoint.folder, port), *more], port, log) as url:
        yield url


def chat(url: str, text: str) -> dict[str, Any]:
    body = {"model": "base", "messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)


def test_the_server_answers_as_transformers_does(checkpoint: Checkpoint, tmp_path: Path) -> None:
    cases = checkpoint.cases[:4]
    with endpoint(checkpoint, tmp_path / "server.log") as url:
        found: list[Said] = []
        for case in cases:
            body = {"model": case.adapter or "base", "prompt": case.prompt + case.answer, "max_tokens": 1}
            read = post(url, {**body, "temperature": 0, "prompt_logprobs": 1})["choices"][0]["prompt_logprobs"]
            places = zip(read[len(case.prompt) :], case.answer, strict=True)
            body = {"model": case.adapter or "base", "prompt": case.prompt, "max_tokens": len(case.answer)}
            body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
            written = post(url, body)["choices"][0]["token_ids"]
            found.append(Said([place[str(token)]["logprob"] for place, token in places], list(written), []))
        talked = chat(url, "w5 w7 w1")["choices"][0]
    agreed = compare(quantized.by_transformers(checkpoint)[:4], found)
    assert agreed.difference <= 1e-3
    assert all(margin <= 1e-3 for margin in agreed.flips)
    # The chat template gives the text as it is; the tokenizer numbers w0, w1, ... from 3 on.
    expected = said(checkpoint.load(), Case(None, [8, 10, 4], [3] * 12))
    assert min(expected.margins) > 1e-3
    assert talked["token_ids"] == expected.written
    assert len(talked["message"]["content"].split()) >= 9


def test_a_config_of_another_version_is_refused_in_one_sentence(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Before any engine is started."""
    folder = tmp_path / "newer"
    shutil.copytree(checkpoint.folder, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["version"] = 99
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "quantization_config: version: found 99, expected 1; a newer agentopt may read it" in started(folder)


def test_damaged_numbers_are_refused_by_the_layer_that_has_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint.folder, folder)
    tensors = load_file(str(folder / "model.safetensors"))
    tensors["model.layers.1.mlp.down_proj.weight_scale"][5] = float("nan")
    save_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
    said = started(folder)
    assert "model.layers.1.mlp.down_proj: weight_scale: found nan in row 5" in said
    assert "Quantize the model again" in said


def test_without_the_plugin_vllm_does_not_guess(checkpoint: Checkpoint) -> None:
    """What `check_environment` warns of."""
    assert "Unknown quantization method: rf8" in started(checkpoint.folder, VLLM_PLUGINS="another")
