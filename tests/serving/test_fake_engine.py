"""The fake engine speaks the wire that clients expect, and breaks as it is told."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from agentopt.serving.fake_engine import OPEN, FakeEngine, Script

HELLO: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello wide world"}]


def with_fake(test: Callable[[FakeEngine, httpx.AsyncClient], Awaitable[Any]], **options: Any) -> Any:
    async def run() -> Any:
        async with FakeEngine(**options) as fake:
            where = f"http://127.0.0.1:{fake.address.port}"
            async with httpx.AsyncClient(base_url=where, timeout=60) as client:
                return await test(fake, client)

    return asyncio.run(run())


def test_the_openai_client_chats_and_streams_with_usage() -> None:
    async def test(fake: FakeEngine, http: httpx.AsyncClient) -> None:
        async with openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="secret", max_retries=0) as client:
            whole = await client.chat.completions.create(model="fake", messages=HELLO)
            assert whole.choices[0].message.content == "hello wide world"
            assert whole.usage is not None
            assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 3)
            stream = await client.chat.completions.create(
                model="fake", messages=HELLO, stream=True, stream_options={"include_usage": True}, max_tokens=2
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello wide"
            assert chunks[-2].choices[0].finish_reason == "length"
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 2
            assert [model.id async for model in client.models.list()] == ["fake"]
            vectors = await client.embeddings.create(model="fake", input=["a", "b", "a"], encoding_format="float")
            assert vectors.data[0].embedding == vectors.data[2].embedding != vectors.data[1].embedding
            responded = await client.responses.create(model="fake", input="one two")
            assert responded.output_text == "one two"
        assert fake.requests[0].header("authorization") == "Bearer secret"

    with_fake(test, token="secret")


def test_v1_asks_for_the_token_and_the_open_routes_do_not() -> None:
    async def test(fake: FakeEngine, client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/chat/completions", json={"messages": HELLO})).status_code == 401
        for path in OPEN:
            if path.startswith("/v1/"):
                continue
            assert (await client.post(path, json={})).status_code == 200, path

    with_fake(test, token="secret")


def test_adapters_come_and_go() -> None:
    async def test(fake: FakeEngine, client: httpx.AsyncClient) -> None:
        fake.settings.slots = 1
        load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
        assert (await client.post("/v1/chat/completions", json={"model": "a", "messages": HELLO})).status_code == 404
        assert (await client.post(load, json={"lora_name": "a", "lora_path": "somewhere"})).status_code == 200
        assert (await client.post(load, json={"lora_name": "b", "lora_path": "somewhere"})).status_code == 400
        assert (await client.post("/v1/chat/completions", json={"model": "a", "messages": HELLO})).status_code == 200
        assert (await client.post(unload, json={"lora_name": "a"})).status_code == 200
        assert (await client.post(unload, json={"lora_name": "a"})).status_code == 404
        assert fake.loads == ["+a", "-a"]

    with_fake(test)


@pytest.mark.parametrize("fault", [{"die_after": 0}, {"die_after": 2}, {"garbage": True}])
@pytest.mark.parametrize("stream", [True, False])
def test_broken_replies_break(fault: dict[str, Any], stream: bool) -> None:
    async def test(fake: FakeEngine, client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/v1/chat/completions", json={"messages": HELLO, "stream": stream, "fake": fault})
        assert (await client.post("/v1/chat/completions", json={"messages": HELLO})).status_code == 200
        assert fake.running == 0

    with_fake(test)


@pytest.mark.parametrize("route", ["chat/completions", "completions", "responses", "messages"])
def test_split_events_and_a_slow_reader_change_no_byte(route: str) -> None:
    async def test(fake: FakeEngine, client: httpx.AsyncClient) -> None:
        said = {"messages": HELLO, "prompt": "p", "input": "i", "stream": True}
        texts: list[str] = []
        for split in (False, True):
            fake.settings.script = Script(text="ä ö € " + "word " * 3000, split=split)
            fake.count = 0
            async with client.stream("POST", f"/v1/{route}", json=said) as reply:
                parts: list[bytes] = []
                async for part in reply.aiter_raw():
                    parts.append(part)
                    if len(parts) == 1:
                        await asyncio.sleep(0.05)
                texts.append(b"".join(parts).decode())
        assert texts[0] == texts[1]
        assert "€" in texts[0]

    with_fake(test)


def test_it_runs_as_a_process_on_a_unix_socket_and_ends_on_command(tmp_path: Path) -> None:
    path = str(tmp_path / "e.sock")
    argv = [sys.executable, "-m", "agentopt.serving.fake_engine", "--uds", path, "--control", "--chunks", "3"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert path in process.stdout.readline()
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://engine") as client:
            body = {"messages": HELLO, "stream": True, "fake": {"exit_after": 2}}
            assert client.post("/v1/completions", json={"prompt": "x"}).json()["choices"][0]["text"] == "x x x"
            got = client.post("/control", json={"healthy": False}).json()["requests"]
            assert got[0][1] == "/v1/completions"
            assert client.get("/health").status_code == 503
            with pytest.raises(httpx.RemoteProtocolError):
                client.post("/v1/chat/completions", json=body)
        assert process.wait(60) == 9


def test_words_can_be_the_times_at_which_they_were_sent() -> None:
    async def test(fake: FakeEngine, client: httpx.AsyncClient) -> list[int]:
        fake.settings.script = Script(chunks=4, stamp=True)
        reply = await client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True})
        return [int(found) for found in re.findall(r"@(\d+)", reply.text)]

    times = with_fake(test)
    assert len(times) == 4
    assert times == sorted(times)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("words", [0, 1, 3])
def test_a_held_reply_goes_on_when_it_may(stream: bool, words: int) -> None:
    async def test(fake: FakeEngine, client: httpx.AsyncClient) -> None:
        body = {"messages": HELLO, "stream": stream, "fake": {"hold_after": words}}
        async with asyncio.TaskGroup() as group:
            reply = group.create_task(client.post("/v1/chat/completions", json=body))
            gone = group.create_task(client.post("/v1/chat/completions", json=body))
            while fake.running < 2:
                await asyncio.sleep(0.005)
            gone.cancel()
            while fake.running > 1:
                await asyncio.sleep(0.005)
            assert not reply.done()
            await client.post("/control", json={"go_on": True})
        text = reply.result().text
        assert text.endswith("data: [DONE]\n\n") if stream else "hello wide world" in text
        assert (fake.running, fake.completion_tokens) == (0, 3)

    with_fake(test, control=True)
