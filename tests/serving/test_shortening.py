"""`--capsule`: system prompts are shortened in the background, once; nothing else is touched."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.serving._catalog import ServedCatalog
from agentopt.serving._shortening import Shortening
from agentopt.serving._types import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Abilities, Address, Exchange
from agentopt.serving.fake_engine import Ready
from agentopt.store import Store

pytestmark = pytest.mark.anyio

FORMAT = 'Answer with JSON: {"answer": text}. Never name a customer.'
LONG = f"You answer for a shop. {FORMAT} " + " ".join(
    f"Parcels of region {number} leave the warehouse on day {number % 7}, and the driver calls ahead."
    for number in range(60)
)
USER = {"role": "user", "content": LONG}


def notes() -> tuple[list[str], Any]:
    told: list[str] = []
    return told, told.append


def chat(system: Any) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": system}, USER]}


async def test_the_original_goes_out_until_the_shorter_text_is_ready() -> None:
    async with Shortening(200, tokenizer="words") as shortening:
        body, (told, note) = chat(LONG), notes()
        assert shortening.apply(CHAT, body, note) is body
        await shortening.settled()
        sent = shortening.apply(CHAT, body, note)
        text = sent["messages"][0]["content"]
        before, after = map(int, told[0].split("->"))
        assert len(text) < len(LONG) / 2
        assert before > 200 >= after > 0
        assert FORMAT in text, "the output format stays"
        assert sent["messages"][1] is USER, "what the user says is not touched"
        assert body == chat(LONG)
        assert shortening.apply(CHAT, chat(LONG), note)["messages"] == sent["messages"], "the same bytes every time"
        assert shortening.stats()["shortened_requests"] == 2
        assert shortening.stats()["tokens_saved"] == 2 * (before - after)


async def test_every_route_with_a_system_text() -> None:
    async with Shortening(200, tokenizer="words") as shortening:
        bodies: list[tuple[str, dict[str, Any]]] = [
            (CHAT, chat([{"type": "text", "text": LONG}])),
            (MESSAGES, {"system": LONG, "messages": [USER]}),
            (MESSAGES, {"system": [{"type": "text", "text": LONG}], "messages": [USER]}),
            (RESPONSES, {"instructions": LONG, "input": "hi"}),
            (RESPONSES, {"input": [{"role": "developer", "content": LONG}, USER]}),
        ]
        _, nowhere = notes()
        for route, body in bodies:
            shortening.apply(route, body, nowhere)
        await shortening.settled()
        for route, body in bodies:
            told, note = notes()
            sent = shortening.apply(route, body, note)
            assert len(told) == 1
            assert len(str(sent)) < len(str(body))
            assert sent.keys() == body.keys()


async def test_what_is_left_alone() -> None:
    complaints: list[str] = []
    async with Shortening(200, tokenizer="words", on_event=complaints.append) as shortening:
        bodies: list[tuple[str, Any]] = [
            (CHAT, chat("Be brief.")),
            (CHAT, chat(" ".join(["écoute"] * 190))),  # longer in bytes, within the limit in words
            (CHAT, chat("a" * 500_000)),
            (CHAT, {"messages": [USER, {"role": "system", "content": LONG}]}),  # not in front
            (COMPLETIONS, {"prompt": LONG}),
            (CHAT, {"messages": "nonsense"}),
            (CHAT, {}),
            (RESPONSES, {"input": LONG}),
            (MESSAGES, {"system": None}),
        ]
        for _ in range(2):
            for route, body in bodies:
                told, note = notes()
                assert shortening.apply(route, body, note) == body
                assert not told
            await shortening.settled()
    assert not complaints


async def test_a_text_that_cannot_be_shortened_is_told_once_and_sent_as_it_is() -> None:
    complaints: list[str] = []
    fields = " ".join("{" + f"slot_{number}" + "}" for number in range(300))  # slots may not leave
    async with Shortening(50, tokenizer="words", on_event=complaints.append) as shortening:
        for _ in range(3):
            told, note = notes()
            assert shortening.apply(CHAT, chat(fields), note) == chat(fields)
            await shortening.settled()
            assert not told
    assert len(complaints) == 1
    assert "is sent as it is" in complaints[0]
    assert shortening.stats()["left_alone"] == 1


async def test_what_must_and_must_not_be_done_stays() -> None:
    rules = ["Never promise a refund.", "You must ask for the order's number.", "Don't guess.", "Only English, please!"]
    filler = LONG.split(". ")
    text = " ".join(
        f"{filler[10 * place]}. {rule} {'. '.join(filler[10 * place + 1 : 10 * place + 10])}."
        for place, rule in enumerate(rules)
    )
    async with Shortening(120, tokenizer="words") as shortening:
        shortening.apply(CHAT, chat(text), lambda _: None)
        await shortening.settled()
        shorter = shortening.apply(CHAT, chat(text), lambda _: None)["messages"][0]["content"]
    assert len(shorter) < len(text) / 2
    for rule in rules:
        assert rule in shorter


async def test_many_texts_at_once_are_bounded() -> None:
    async with Shortening(200, tokenizer="words") as shortening:
        for number in range(300):
            shortening.apply(CHAT, chat(f"{number} " + "word " * 190), lambda _: None)
        assert shortening.stats()["waiting"] <= 64
        await shortening.settled()


async def test_capsules_are_found_again_after_a_restart(tmp_path: Path) -> None:
    texts: list[str] = []
    for _ in range(2):
        async with Shortening(200, tokenizer="words", store=tmp_path / "a.db") as shortening:
            shortening.apply(CHAT, chat(LONG), lambda _: None)
            await shortening.settled()
            texts.append(shortening.apply(CHAT, chat(LONG), lambda _: None)["messages"][0]["content"])
    assert texts[0] == texts[1] != LONG
    with Store.open(tmp_path / "a.db") as store:
        assert len(store.capsule_keys()) == 2  # the capsule and its original


async def test_a_process_that_dies_is_told_and_replaced() -> None:
    complaints: list[str] = []
    async with Shortening(200, tokenizer="words", on_event=complaints.append) as shortening:
        shortening.apply(CHAT, chat(LONG), lambda _: None)
        await shortening.settled()
        child = shortening.pid
        assert child is not None
        os.kill(child, signal.SIGSTOP)  # so that it cannot answer before it dies
        shortening.apply(CHAT, chat(f"One. {LONG}"), lambda _: None)
        os.kill(child, signal.SIGKILL)
        await shortening.settled()
        shortening.apply(CHAT, chat(f"Two. {LONG}"), lambda _: None)
        await shortening.settled()
        second = shortening.pid
        assert second is not None
        told, note = notes()
        for text in (LONG, f"One. {LONG}", f"Two. {LONG}"):
            shortening.apply(CHAT, chat(text), note)
    assert len(told) == 2
    assert len(complaints) == 1
    assert "the process that shortens it failed" in complaints[0]
    assert shortening.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


async def test_without_start_nothing_happens() -> None:
    shortening = Shortening(200, tokenizer="words")
    body = chat(LONG)
    assert shortening.apply(CHAT, body, lambda _: None) is body
    assert shortening.stats()["waiting"] == 0
    await shortening.close()


@pytest.mark.parametrize(("tokens", "tokenizer"), [(0, "words"), (100, "no-such-tokenizer")])
def test_wrong_arguments_are_told_at_the_start(tokens: int, tokenizer: str) -> None:
    with pytest.raises(UserError):
        Shortening(tokens, tokenizer=tokenizer)


async def test_the_catalog_shortens_and_says_so() -> None:
    async with Shortening(200, tokenizer="words") as shortening:
        catalog = ServedCatalog(["smol"], Ready(Address(), Abilities()), shortening=shortening)
        headers: list[dict[str, str]] = []
        for _ in range(2):
            exchange = Exchange("req_1", CHAT, "c", asked="smol")
            rewrite = catalog.choose(exchange).rewrite
            assert rewrite is not None
            rewrite(CHAT, chat(LONG))
            headers.append(exchange.notes)
            await shortening.settled()
        assert headers[0] == {}
        assert list(headers[1]) == ["X-Agentopt-Capsule"]
