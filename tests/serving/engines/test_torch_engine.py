"""Our engine over transformers, asked by OpenAI's client: one batch, several adapters, streams, what it refuses."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from agentopt.serving._types import Abilities, Address
from agentopt.serving.adapters import AdapterRegistry, BaseFacts, EngineDriver
from agentopt.serving.fake_engine import Ready
from agentopt.weights import adapters
from tests.serving.engines.torch_engine_running import TOKEN, Running, running
from tests.weights.tiny import tiny, tiny_folder

GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    with running(tmp_path_factory.mktemp("engine")) as found:
        yield found


def generated(engine: Running, prompt: list[int], tokens: int, model: Any = None, *, chat: bool = False) -> str:
    """What transformers itself writes."""
    import torch

    with torch.no_grad():
        found: Any = (model or engine.model).generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    if chat:
        return engine.tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True)
    before: str = engine.tokenizer.decode(prompt, skip_special_tokens=True)
    return engine.tokenizer.decode(found[0], skip_special_tokens=True)[len(before) :]


def test_a_chat_and_its_stream_say_what_transformers_says(engine: Running) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "red blue"}], "max_tokens": 9}
    expected = generated(engine, engine.tokenizer("red blue ")["input_ids"], 9, chat=True)
    with engine.client() as client:
        reply = client.chat.completions.create(**asked, **GREEDY)
        choice = reply.choices[0]
        assert (choice.message.content, choice.finish_reason) == (expected, "length")
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (2, 9)
        chunks = list(
            client.chat.completions.create(**asked, **GREEDY, stream=True, stream_options={"include_usage": True})
        )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    assert len(chunks) > 5, "not token by token"


def test_requests_of_any_length_share_a_batch(engine: Running) -> None:
    prompts = [[3, 4, 5], [6], [7, 8] * 10, [9, 10, 11, 12], [13] * 7, [14, 15]]
    expected = [generated(engine, prompt, 5 + place) for place, prompt in enumerate(prompts)]
    with engine.client() as client:

        def ask(place: int) -> str:
            found = client.completions.create(model="tiny", prompt=prompts[place], max_tokens=5 + place, **GREEDY)
            return found.choices[0].text

        with ThreadPoolExecutor(len(prompts)) as pool:
            assert list(pool.map(ask, range(len(prompts)))) == expected
        several = client.completions.create(model="tiny", prompt=prompts, max_tokens=5, n=2, **GREEDY)
    assert [choice.index for choice in several.choices] == list(range(12))
    assert several.choices[0].text == several.choices[1].text == expected[0]


def test_a_seed_gives_the_same_reply_again(engine: Running) -> None:
    with engine.client() as client:

        def ask(seed: int, **options: Any) -> str:
            asked: dict[str, Any] = {"temperature": 1.5, **options}
            found = client.completions.create(model="tiny", prompt="red", max_tokens=20, seed=seed, **asked)
            return found.choices[0].text

        assert ask(1) == ask(1)
        assert len({ask(seed) for seed in range(5)}) > 1
        sure = ask(1, top_p=1e-6)
        assert sure == ask(2, top_p=1e-6) == ask(3, extra_body={"top_k": 1}) == ask(4, temperature=0)


def test_logprobs_are_the_models(engine: Running) -> None:
    import torch

    with engine.client() as client:
        found = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "red"}],
            max_tokens=3,
            logprobs=True,
            top_logprobs=2,
            **GREEDY,
        )
    assert found.choices[0].logprobs is not None
    content = found.choices[0].logprobs.content
    assert content is not None
    assert [len(one.top_logprobs) for one in content] == [2, 2, 2]
    with torch.no_grad():
        logits = engine.model(torch.tensor([engine.tokenizer("red")["input_ids"]])).logits[0, -1]
    assert content[0].logprob == pytest.approx(float(torch.log_softmax(logits, -1).max()), abs=1e-5)


def test_a_reply_ends_before_a_stop_string(engine: Running) -> None:
    whole = generated(engine, engine.tokenizer("two one")["input_ids"], 12)
    words = whole.split()
    stop = f" {words[3]} {words[4]}"
    expected = whole[: whole.index(stop)]
    asked: dict[str, Any] = {"model": "tiny", "prompt": "two one", "max_tokens": 12, "stop": ["never", stop]}
    with engine.client() as client:
        found = client.completions.create(**asked, **GREEDY)
        assert (found.choices[0].text, found.choices[0].finish_reason) == (expected, "stop")
        chunks = list(client.completions.create(**asked, **GREEDY, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_a_bias_decides(engine: Running) -> None:
    with engine.client() as client:
        found = client.completions.create(
            model="tiny", prompt="red", max_tokens=4, temperature=0, logit_bias={"5": 100}
        )
    assert found.choices[0].text.split() == engine.tokenizer.decode([5] * 4).split()


# --- adapters --------------------------------------------------------------------------------------------------------


def make_adapter(folder: Path, seed: int, *, rank: int = 4) -> tuple[Path, Any]:
    """An adapter that changes what is written, and the model that it makes of the tiny one."""
    import torch

    model, _ = tiny()
    held = adapters.attach(model, rank=rank, alpha=16, targets=["q_proj", "down_proj"], seed=seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, parameter in held.parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_()
    held.save(folder)
    return folder, held.model


def test_rows_of_one_batch_have_adapters_of_their_own(engine: Running, tmp_path: Path) -> None:
    made = {"one": make_adapter(tmp_path / "one", 1), "two": make_adapter(tmp_path / "two", 2, rank=8)}
    prompt = [3, 4, 5, 6]
    expected = {name: generated(engine, prompt, 12, model) for name, (_, model) in made.items()}
    expected["tiny"] = generated(engine, prompt, 12)
    assert len(set(expected.values())) == 3
    with engine.client() as client, engine.http() as http:
        for name, (folder, _) in made.items():
            assert load(http, name, folder).status_code == 200
        assert [one.id for one in client.models.list()] == ["tiny", "one", "two"]

        def ask(name: str) -> str:
            return client.completions.create(model=name, prompt=prompt, max_tokens=12, **GREEDY).choices[0].text

        names = ["one", "tiny", "two", "one", "two", "tiny"]
        with ThreadPoolExecutor(len(names)) as pool:
            assert list(pool.map(ask, names)) == [expected[name] for name in names]
        again = load(http, "one", tmp_path / "one")
        assert (again.status_code, "already" in again.text) == (400, True)
        assert load(http, "three", tmp_path / "one").status_code == 400, "there are two places"
        for name in made:
            unloaded = http.post("/v1/unload_lora_adapter", json={"lora_name": name}, headers=bearer())
            assert unloaded.status_code == 200
        with pytest.raises(openai.NotFoundError):
            ask("one")
        assert ask("tiny") == expected["tiny"]


def test_the_registry_gives_it_what_was_checked(engine: Running, tmp_path: Path) -> None:
    made = {name: make_adapter(tmp_path / name, number) for number, name in enumerate(("one", "two", "three"))}
    base = BaseFacts.of(tiny_folder(tmp_path / "base"), 8)
    target = Ready(Address(socket=engine.path, token=TOKEN), Abilities(model="tiny", adapters=True))

    async def test() -> None:
        registry = AdapterRegistry(base, EngineDriver(target), resident=2, staging=tmp_path / "staging")
        for name, (folder, _) in made.items():
            await registry.add(name, folder)
        for name in ("one", "two", "three", "one"):
            async with registry.hold(name):
                found = await asyncio.to_thread(ask, name)
            assert found == generated(engine, [3, 4, 5], 12, made[name][1])
        assert registry.loads == 4, "there are two places"
        await registry.remove("one")
        await registry.remove("three")

    def ask(name: str) -> str:
        with engine.client() as client:
            return client.completions.create(model=name, prompt=[3, 4, 5], max_tokens=12, **GREEDY).choices[0].text

    asyncio.run(test())
    assert not engine.worker.slots.folders


def test_an_adapter_that_does_not_fit_changes_nothing(engine: Running, tmp_path: Path) -> None:
    before = generated(engine, [3, 4], 6)
    wide, _ = make_adapter(tmp_path / "wide", 1, rank=16)
    with engine.http() as http:
        assert "rank" in load(http, "wide", wide).json()["error"]["message"]
        assert load(http, "nobody", tmp_path / "nowhere").status_code == 400
        assert load(http, "tiny", wide).status_code == 400
    assert generated(engine, [3, 4], 6) == before


def load(http: Any, name: str, folder: Path) -> Any:
    body = {"lora_name": name, "lora_path": str(folder)}
    return http.post("/v1/load_lora_adapter", json=body, headers=bearer())


def bearer(token: str = TOKEN) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


# --- what is refused -------------------------------------------------------------------------------------------------

_CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "red"}]}


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "nobody"}, 404),
        ({"messages": []}, 400),
        ({"messages": "red"}, 400),
        ({"messages": [{"content": "red"}]}, 400),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400),
        ({"messages": [{"role": "user", "content": "red " * 64}]}, 400),
        ({"temperature": -1}, 400),
        ({"temperature": "hot"}, 400),
        ({"top_p": 2}, 400),
        ({"max_tokens": 0}, 400),
        ({"max_tokens": 1.5}, 400),
        ({"n": 10**9}, 400),
        ({"stop": [""]}, 400),
        ({"stop": 7}, 400),
        ({"logit_bias": {"a": "b"}}, 400),
        ({"seed": 1.5}, 400),
        ({"tools": [{"type": "function"}]}, 400),
        ({"response_format": {"type": "xml"}}, 400),
        ({"response_format": {"type": "json_schema"}}, 400),
        ({"stream_options": 7}, 400),
    ],
)
def test_what_would_not_be_obeyed_is_refused(engine: Running, change: dict[str, Any], status: int) -> None:
    with engine.http() as http:
        found = http.post("/v1/chat/completions", json={**_CHAT, **change}, headers=bearer())
    assert found.status_code == status, found.text
    assert found.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_body_that_is_none_is_refused(engine: Running, body: bytes) -> None:
    with engine.http() as http:
        assert http.post("/v1/chat/completions", content=body, headers=bearer()).status_code == 400


@pytest.mark.parametrize("prompt", [None, [], "", [10**9], [-1], [True], [[1], "a", 3.5], {"a": 1}])
def test_a_prompt_that_is_none_is_refused(engine: Running, prompt: Any) -> None:
    with engine.http() as http:
        found = http.post("/v1/completions", json={"model": "tiny", "prompt": prompt}, headers=bearer())
    assert found.status_code == 400, found.text


def test_nothing_but_health_answers_without_the_token(engine: Running) -> None:
    with engine.http() as http:
        assert http.get("/health").status_code == 200
        paths: dict[str, Any] = http.get("/openapi.json", headers=bearer()).json()["paths"]
        assert {"/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter"} <= paths.keys()
        for path, methods in paths.items():
            for method in methods:
                for headers in ({}, bearer("wrong"), {"authorization": TOKEN}):
                    assert http.request(method, path, headers=headers).status_code == 401, path
        assert http.get("/nowhere", headers=bearer()).status_code == 404
        assert "agentopt_engine_generation_tokens_total" in http.get("/metrics", headers=bearer()).text


def test_a_client_that_goes_away_makes_room(engine: Running) -> None:
    with engine.http() as http:
        body = {"model": "tiny", "prompt": "red", "max_tokens": 60, "stream": True, "ignore_eos": True}
        for _ in range(6):  # more than there are rows
            with http.stream("POST", "/v1/completions", json=body, headers=bearer()) as reply:
                next(reply.iter_lines())
    waited = threading.Event()
    for _ in range(600):
        if not engine.worker.running:
            break
        waited.wait(0.05)
    assert not engine.worker.running


def test_a_stream_is_events(engine: Running) -> None:
    body = {"model": "tiny", "prompt": "red", "max_tokens": 3, "stream": True, "ignore_eos": True}
    with engine.http() as http:
        found = http.post("/v1/completions", json=body, headers=bearer())
    assert found.headers["content-type"].startswith("text/event-stream")
    events = found.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-2])
