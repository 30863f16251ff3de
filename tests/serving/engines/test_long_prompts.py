"""A long prompt at our engine over transformers: read in parts, those who are written to in between, left any time.

What the model is run on is looked at by a hook, which also holds it until what a test waits for has happened.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serving.engines.test_torch_engine import load, make_adapter
from tests.serving.engines.torch_engine_running import TOKEN, Running, running

PART = 16
LONG = [3 + place % 13 for place in range(150)]
SHORT = [4, 5, 6]
KEY = {"authorization": f"Bearer {TOKEN}"}
PATIENCE = 60.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    with running(tmp_path_factory.mktemp("engine"), context=256, part=PART) as found:
        yield found


@contextlib.contextmanager
def watched(engine: Running, before: Callable[[list[int]], None]) -> Generator[list[int]]:
    """How many tokens of one row the model was run on, each time; `before` is called with that before each run."""
    runs: list[int] = []

    def hook(model: Any, args: Any, given: dict[str, Any]) -> None:
        runs.append(int(given["input_ids"].shape[1]))
        before(runs)

    handle = engine.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield runs
    finally:
        handle.remove()


def until(what: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if what():
            return
        waiting.wait(0.01)
    raise AssertionError("it did not happen")


def ask(engine: Running, prompt: list[int], tokens: int, model: str = "tiny") -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    with engine.http() as http:
        return http.post("/v1/completions", json=body, headers=KEY).json()["choices"][0]["text"]


def generated(engine: Running, prompt: list[int], tokens: int, model: Any = None) -> str:
    """What transformers itself writes after the whole prompt at once."""
    import torch

    with torch.no_grad():
        found = (model or engine.model).generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    before: str = engine.tokenizer.decode(prompt, skip_special_tokens=True)
    return engine.tokenizer.decode(found[0], skip_special_tokens=True)[len(before) :]


@pytest.mark.parametrize("length", [1, PART - 1, PART, PART + 1, 3 * PART, 150])
def test_parts_change_nothing(engine: Running, length: int) -> None:
    expected = generated(engine, LONG[:length], 12)
    with watched(engine, lambda runs: None) as runs:
        assert ask(engine, LONG[:length], 12) == expected
    full, rest = divmod(length, PART)
    assert runs == [PART] * full + [rest] * bool(rest) + [1] * 11


def test_a_running_reply_gets_a_token_between_two_parts(engine: Running) -> None:
    expected = generated(engine, SHORT, 60), generated(engine, LONG, 20)

    def before(runs: list[int]) -> None:
        if len(runs) == 5:  # the first reply runs: now the long prompt comes
            asked.set()
            until(lambda: engine.worker.waiting == 1)

    asked = threading.Event()
    with watched(engine, before) as runs, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, engine, SHORT, 60)
        assert asked.wait(PATIENCE)
        second = pool.submit(ask, engine, LONG, 20)
        assert (first.result(), second.result()) == expected
    parts = [place for place, tokens in enumerate(runs) if tokens > 1][1:]
    assert len(parts) == -(-len(LONG) // PART)
    assert [later - earlier for earlier, later in itertools.pairwise(parts)] == [2] * (len(parts) - 1)


def test_parts_and_tokens_in_between_have_adapters_of_their_own(engine: Running, tmp_path: Path) -> None:
    folder, model = make_adapter(tmp_path / "one", 1)
    expected = generated(engine, SHORT, 60), generated(engine, LONG, 20, model)
    assert expected[1] != generated(engine, LONG, 20), "the adapter changes nothing"

    def before(runs: list[int]) -> None:
        if len(runs) == 5:
            asked.set()
            until(lambda: engine.worker.waiting == 1)

    asked = threading.Event()
    with engine.http() as http:
        assert load(http, "one", folder).status_code == 200
    with watched(engine, before), ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, engine, SHORT, 60)
        assert asked.wait(PATIENCE)
        second = pool.submit(ask, engine, LONG, 20, "one")
        assert (first.result(), second.result()) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_prompt_is_read_frees_the_engine(engine: Running, stream: bool) -> None:
    body = {"model": "tiny", "prompt": LONG, "max_tokens": 5, "stream": stream}
    reached = threading.Event()

    def before(runs: list[int]) -> None:
        if len(runs) == 3:
            reached.set()
            until(lambda: all(job.cancelled for job in engine.worker._jobs()))

    with watched(engine, before) as runs:
        leave_when(engine, body, reached)
        until(lambda: not engine.worker.running)
        assert runs == [PART] * 3, "it was read on for nobody"
    assert ask(engine, SHORT, 8) == generated(engine, SHORT, 8)


def leave_when(engine: Running, body: dict[str, Any], reached: threading.Event) -> None:
    """Send a request and close the connection as soon as the event is set."""
    text = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: engine\r\nauthorization: {KEY['authorization']}\r\n"
    with socket.socket(socket.AF_UNIX) as sending:
        sending.connect(engine.path)
        sending.sendall(f"{head}content-length: {len(text)}\r\n\r\n".encode() + text)
        assert reached.wait(PATIENCE)


def test_who_left_while_waiting_is_forgotten_before_the_long_prompt_is_read(engine: Running) -> None:
    def before(runs: list[int]) -> None:
        if len(runs) == 2:
            reached.set()
            until(lambda: engine.worker.waiting == 1)
            left.set()
            until(lambda: any(job.cancelled for job in engine.worker._jobs()))
        if len(runs) == 4:
            waiting.append(engine.worker.waiting)

    expected = generated(engine, LONG, 5)
    reached, left, waiting = threading.Event(), threading.Event(), list[int]()
    with watched(engine, before), ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, engine, LONG, 5)
        assert reached.wait(PATIENCE)
        second = pool.submit(leave_when, engine, {"model": "tiny", "prompt": SHORT, "max_tokens": 5}, left)
        second.result()
        assert first.result() == expected
    assert waiting == [0]


def test_a_prompt_that_cannot_be_read_fails_alone(engine: Running) -> None:
    expected = generated(engine, SHORT, 40)
    asked = threading.Event()

    def before(runs: list[int]) -> None:
        if len(runs) == 5:
            asked.set()
            until(lambda: engine.worker.waiting == 1)
        if runs[-1] == PART and runs.count(PART) == 3:
            raise RuntimeError("no memory")

    body = {"model": "tiny", "prompt": LONG, "max_tokens": 5}
    with watched(engine, before), ThreadPoolExecutor(1) as pool, engine.http() as http:
        first = pool.submit(ask, engine, SHORT, 40)
        assert asked.wait(PATIENCE)
        failed = http.post("/v1/completions", json=body, headers=KEY)
        assert (failed.status_code, "no memory" in failed.text) == (500, True)
        assert first.result() == expected
