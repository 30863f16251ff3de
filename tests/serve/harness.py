"""Two folded knowledge bases, served by the folder itself, by peft, and by vLLM with several adapters at once.

The base is a Llama of the smallest shape that vLLM's attention takes (heads of 32), with grouped keys and values.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentopt.weights.fold import Adapter, Folder, Question
from tests.weights.fold import tiny
from tests.weights.fold.forced import Case, Said, said

WORKER = Path(__file__).with_name("vllm_worker.py")
OWNS = {
    "one": {"ann": "lamp", "bob": "rope", "cid": "coin", "dan": "drum"},
    "two": {"ann": "kite", "bob": "lamp", "cid": "sled", "dan": "rope"},
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
}
WIDTH, SPREAD = 128, 0.15
START = 600
"""Seconds that a server may take to start."""


@dataclass(frozen=True, slots=True)
class Served:
    """A base with two adapters on disk, and the folder that made them."""

    folder: Folder
    dtype: str
    base: Path
    paths: dict[str, Path]
    adapters: dict[str, Adapter]

    def targets(self) -> list[str]:
        """Short names of the layers that the adapters change: with whole names vLLM leaves out those that it packs."""
        config = json.loads((self.paths["one"] / "adapter_config.json").read_text(encoding="utf-8"))
        return sorted({name.rpartition(".")[2] for name in config["target_modules"]})

    def questions(self) -> list[tuple[str, Question]]:
        """All facts of both knowledge bases, asked for."""
        return [
            (name, Question(f"{person} owns?", thing, (place,)))
            for name, facts in OWNS.items()
            for place, (person, thing) in enumerate(facts.items())
        ]

    def cases(self) -> list[Case]:
        """The questions with their answers in tokens, and the same prompts to the base among them.

        In float32 also with the answer to another question: an adapter is so sure of its own answers that a float32 of
        their log-probability cannot show a difference. (Of unlikely tokens bfloat16 keeps too little to be compared.)
        """
        codec = self.folder.codec
        asked = [
            ([*codec.lead, *codec.question(question.text)], list(codec.response(question, sentences(name)).ids))
            for name, question in self.questions()
        ]
        found: list[Case] = []
        for place, (name, _) in enumerate(self.questions()):
            prompt, answer = asked[place]
            found += [Case(name, prompt, answer), Case(None, prompt, answer)]
            if self.dtype == "float32":
                found.append(Case(name, prompt, asked[(place + 1) % len(asked)][1], own=False))
        return found


def sentences(name: str) -> tuple[str, ...]:
    """The facts of a knowledge base."""
    return tuple(f"{person} owns {thing}" for person, thing in OWNS[name].items())


def make(place: Path, dtype: str, *, layers: int | None = None) -> Served:
    """A base in this number format, a folder trained on it, two adapters; close the folder afterwards.

    With `layers`, only so many of the topmost are adapted.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = tiny.tiny_model()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=SPREAD,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    options = tiny.OPTIONS.model_copy(update={"layers": layers})
    folder = Folder(place / "base", options=options, dtype=dtype, device="cpu")
    folder.meta_train(tiny.tasks(400), val=tiny.tasks(32, seed=1), options=tiny.TRAINING)
    adapters = dict(zip(OWNS, folder.fold_many([sentences(name) for name in OWNS]), strict=True))
    paths = {name: adapter.save(place / name) for name, adapter in adapters.items()}
    return Served(folder, dtype, place / "base", paths, adapters)


# --- three ways to serve ---------------------------------------------------------------------------------------------


def by_folder(served: Served) -> list[Said]:
    """The folder's own model; for the base, as it is outside any adapter."""
    found: list[Said] = []
    for case in served.cases():
        using = (
            served.folder.base_in_use()
            if case.adapter is None
            else served.folder.engine.using(served.adapters[case.adapter].state)
        )
        with using:
            found.append(said(served.folder.model, case))
    return found


def by_peft(served: Served) -> list[Said]:
    """A fresh base with both adapter folders loaded by peft."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(served.base, dtype=getattr(torch, served.dtype))
    model: Any = PeftModel.from_pretrained(base, str(served.paths["one"]), adapter_name="one")
    model.load_adapter(str(served.paths["two"]), adapter_name="two")
    model.eval()
    found: list[Said] = []
    for case in served.cases():
        if case.adapter is not None:
            model.set_adapter(case.adapter)
        with model.disable_adapter() if case.adapter is None else contextlib.nullcontext():
            found.append(said(model, case))
    return found


def by_vllm(served: Served, place: Path) -> list[Said]:
    """vLLM in a process of its own, all cases in one batch."""
    job = {
        "model": str(served.base),
        "dtype": served.dtype,
        "rank": served.folder.options.rank,
        "targets": served.targets(),
        "adapters": {name: str(path) for name, path in served.paths.items()},
        "cases": [{"adapter": case.adapter, "prompt": case.prompt, "answer": case.answer} for case in served.cases()],
    }
    out = place / f"vllm-{served.dtype}.json"
    done = subprocess.run(
        [sys.executable, str(WORKER), str(out)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **ENVIRONMENT},
        timeout=START + 60,
    )
    if done.returncode:
        raise RuntimeError(f"vLLM failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return [Said(row["logprobs"], row["written"], []) for row in json.loads(out.read_text(encoding="utf-8"))]


# --- the endpoint ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def endpoint(served: Served, log: Path) -> Generator[str]:
    """vLLM's OpenAI-compatible server with both adapters; gives its base URL."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(served.base)]
    command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--dtype", served.dtype]
    command += ["--max-model-len", "128", "--max-num-seqs", "8", "--enforce-eager", "--enable-lora"]
    command += ["--max-loras", str(len(served.paths) + 1), "--max-lora-rank", str(served.folder.options.rank)]
    command += ["--lora-target-modules", *served.targets(), "--distributed-executor-backend", "uni"]
    command += ["--lora-modules", *(f"{name}={path}" for name, path in served.paths.items())]
    with serving(command, port, log) as url:
        yield url


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serving(command: list[str], port: int, log: Path) -> Generator[str]:
    """A server started by this command and stopped afterwards; gives its base URL once it is healthy."""
    with log.open("w", encoding="utf-8") as written:
        server = subprocess.Popen(command, stdout=written, stderr=written, env={**os.environ, **ENVIRONMENT})
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(server, url, log)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=20):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise RuntimeError(f"vLLM's server did not start:\n{log.read_text(encoding='utf-8')[-4000:]}")


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST JSON to /v1/completions."""
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)


def by_endpoint(url: str, served: Served) -> list[Said]:
    """The cases one after another through HTTP: an adapter is a model's name."""
    found: list[Said] = []
    for case in served.cases():
        model = case.adapter or "base"
        body = {"model": model, "prompt": case.prompt + case.answer, "max_tokens": 1, "temperature": 0}
        read = post(url, {**body, "prompt_logprobs": 1})["choices"][0]["prompt_logprobs"][len(case.prompt) :]
        logprobs = [place[str(token)]["logprob"] for place, token in zip(read, case.answer, strict=True)]
        body = {**body, "prompt": case.prompt, "max_tokens": len(case.answer), "ignore_eos": True}
        written = post(url, {**body, "return_token_ids": True})["choices"][0]["token_ids"]
        found.append(Said(logprobs, list(written), []))
    return found
