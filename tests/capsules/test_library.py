"""The store of capsules: one computation per key, the first row wins, damaged rows are made again."""

from __future__ import annotations

import threading
from pathlib import Path

import anyio
import pytest

from agentopt.capsules import Capsule, TokenBudget
from agentopt.capsules._library import Library, LibraryWarning, capsule_key
from agentopt.errors import UserError
from agentopt.store import Store

pytestmark = pytest.mark.anyio


def capsule(text: str) -> Capsule:
    return Capsule(text, len(text), 100, "bytes", "the original", 12, "extract", "capsule")


def test_the_key_holds_everything_that_decides() -> None:
    budget = TokenBudget(300, tokenizer="bytes")
    keys = {
        capsule_key("text", budget),
        capsule_key("other", budget),
        capsule_key([{"role": "user", "content": "text"}], budget),
        capsule_key("text", TokenBudget(301, tokenizer="bytes")),
        capsule_key("text", TokenBudget(300, tokenizer="words")),
        capsule_key("text", budget, keep=["a"]),
        capsule_key("text", budget, query="q"),
        capsule_key("text", budget, mode="rewrite"),
        capsule_key("text", budget, model="m"),
        capsule_key("text", budget, options={"repairs": 1}),
        capsule_key("text", budget, seed=1),
        capsule_key("half \ud83d", budget),
    }
    assert len(keys) == 12
    assert capsule_key("text", budget) == capsule_key("text", TokenBudget(300, tokenizer="bytes"))


def test_the_first_row_stays_and_everybody_reads_it(tmp_path: Path) -> None:
    with Store.open(tmp_path / "s.db") as store:
        library = Library(store)
        assert library.get("k" * 64) is None
        assert library.put("k" * 64, capsule("first")).text == "first"
        assert library.put("k" * 64, capsule("second")).text == "first"
    assert Library(tmp_path / "s.db").get("k" * 64) == capsule("first")


async def test_callers_at_the_same_time_share_one_computation() -> None:
    library = Library(Store.open(":memory:"))
    made = 0

    async def make() -> Capsule:
        nonlocal made
        made += 1
        await anyio.sleep(0.01)
        return capsule("shared")

    found: list[Capsule] = []

    async def ask() -> None:
        found.append(await library.once("key", make))

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(ask)
    assert made == 1 and found == [capsule("shared")] * 20

    threads = [threading.Thread(target=lambda: found.append(anyio.run(library.once, "other", make))) for _ in range(8)]
    for thread in threads:
        thread.start()
    await anyio.to_thread.run_sync(lambda: [thread.join() for thread in threads])
    assert made == 2 and len(found) == 28


async def test_when_the_one_who_makes_it_fails_or_is_cancelled_the_next_one_tries() -> None:
    library = Library(Store.open(":memory:"))
    started = anyio.Event()
    tries = 0

    async def make() -> Capsule:
        nonlocal tries
        tries += 1
        if tries == 1:
            started.set()
            await anyio.sleep_forever()
        if tries == 2:
            raise UserError("the second fails too")
        return capsule("third")

    outcomes: list[str] = []

    async def ask() -> None:
        try:
            outcomes.append((await library.once("key", make)).text)
        except UserError:
            outcomes.append("failed")

    async with anyio.create_task_group() as tasks:
        scope = anyio.CancelScope()

        async def first() -> None:
            with scope:
                await ask()

        tasks.start_soon(first)
        await started.wait()
        tasks.start_soon(ask)
        tasks.start_soon(ask)
        await anyio.sleep(0.01)
        scope.cancel()
    assert sorted(outcomes) == ["failed", "third"] and tries == 3


@pytest.mark.parametrize("row", [{}, {"capsule": 3}, {"capsule": {"text": "only"}}, {"capsule": None}])
async def test_a_damaged_row_is_made_again_with_a_warning(row: dict[str, object]) -> None:
    with Store.open(":memory:") as store:
        library = Library(store)
        store.put_capsule("key", row)

        async def make() -> Capsule:
            return capsule("again")

        with pytest.warns(LibraryWarning, match="unreadable"):
            assert (await library.once("key", make)).text == "again"
        assert library.get("key") == capsule("again")


def test_lists_and_finds_what_is_stored() -> None:
    with Store.open(":memory:") as store:
        library = Library(store)
        library.put("aa11", capsule("one\ntext"))
        library.put("aa22", capsule("two"))
        store.put_capsule("bb", {"capsule": 1})
        store.put_capsule("cap:0123", {"original": "no capsule"})
        shown = {row.key: (row.tokens, row.beginning) for row in library.rows()}
        assert shown == {"aa11": (8, "one text"), "aa22": (3, "two"), "bb": (None, "")}
        assert library.find("aa2") == ("aa22", capsule("two"))
        for prefix, message in (("aa", "2 capsules"), ("x", "no capsule"), ("bb", "damaged")):
            with pytest.raises(UserError, match=message):
                library.find(prefix)
