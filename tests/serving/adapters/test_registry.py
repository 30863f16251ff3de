"""What the engine holds: the last used, never without one that is in use, each loaded once, and what was checked."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentopt.errors import RunError, UserError
from agentopt.serving._types import Refusal
from agentopt.serving.adapters import AdapterRegistry
from tests.serving.adapters.registries import Held, add, run, use


def test_an_adapter_is_loaded_when_it_is_first_asked(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a", "b")
        assert (registry.names(), registry.known, registry.resident, driver.log) == (("a", "b"), 2, 0, [])
        async with registry.hold("a"):
            assert driver.log == ["+a"]
            assert registry.list()[0].users == 1
        async with registry.hold("a"):
            pass
        assert (driver.log, registry.loads, registry.resident) == (["+a"], 1, 1)
        json.dumps([one.to_dict() for one in registry.list()])

    run(tmp_path, test)


def test_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a", "b", "c")
        for name in ("a", "b", "a", "c"):
            async with registry.hold(name):
                pass
        assert driver.log == ["+a", "+b", "-b", "+c"]
        copies = [one for one in (tmp_path / "staging").iterdir() if one.is_dir()]
        assert len(copies) == 2, "a copy stays that nobody needs"

    run(tmp_path, test)


def test_one_in_use_is_never_taken_away(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a", "b", "c")
        async with registry.hold("a"):
            for name in ("b", "c", "b", "c"):
                async with registry.hold(name):
                    assert set(driver.held) == {"a", name}
            assert "-a" not in driver.log

    run(tmp_path, test)


def test_who_finds_no_place_waits_for_one(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a", "b", "c")
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(registry.hold("a"))
            inner = contextlib.AsyncExitStack()
            await inner.enter_async_context(registry.hold("b"))
            third = asyncio.create_task(use(registry, "c"))
            await asyncio.sleep(0.05)
            assert driver.log == ["+a", "+b"]
            await inner.aclose()
            await third
            assert driver.log == ["+a", "+b", "-b", "+c"]

    run(tmp_path, test)


def test_who_waits_in_vain_is_told_to_come_again(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a", "b")
        async with registry.hold("a"):
            with pytest.raises(Refusal) as caught:
                await use(registry, "b")
        assert (caught.value.status, caught.value.code) == (503, "no_place")
        assert caught.value.retry_after
        registry.patience = 60.0
        await use(registry, "b")

    run(tmp_path, test, resident=1, patience=0.05)


def test_first_uses_that_come_together_load_once(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a")
        driver.gate.clear()
        tasks = [asyncio.create_task(use(registry, "a")) for _ in range(20)]
        await asyncio.sleep(0.05)
        tasks[0].cancel()  # who asked first goes away: the others must not suffer
        driver.gate.set()
        await asyncio.wait(tasks)
        assert [task.exception() for task in tasks[1:]] == [None] * 19
        assert driver.log == ["+a"]
        assert registry.list()[0].users == 0

    run(tmp_path, test)


def test_a_load_goes_on_when_nobody_waits_any_more(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a", "b", "c")
        driver.gate.clear()
        task = asyncio.create_task(use(registry, "a"))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        driver.gate.set()
        await use(registry, "a")
        assert (driver.log, registry.list()[0].users) == (["+a"], 0)
        for name in ("b", "c"):
            await use(registry, name)
        assert driver.log == ["+a", "+b", "-a", "+c"]

    run(tmp_path, test)


def test_hundreds_are_known_and_few_resident(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        names = [f"a{number}" for number in range(200)]
        await add(registry, tmp_path, *names)
        async with asyncio.TaskGroup() as group:
            for name in names:
                group.create_task(use(registry, name))
        assert (registry.known, registry.loads, driver.most) == (200, 200, 2)

    run(tmp_path, test)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=30), places=st.integers(1, 3))
def test_whatever_comes_no_more_are_held_than_there_are_places(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, bool]], places: int
) -> None:
    tmp_path = tmp_path_factory.mktemp("steps")

    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, *"abcd")

        async def use(name: str, leave: bool) -> None:
            async with registry.hold(name):
                assert name in driver.held
                await asyncio.sleep(0)
                if leave:
                    raise ConnectionError
                assert name in driver.held

        async with asyncio.TaskGroup() as group:
            for name, leave in steps:
                group.create_task(_forgiving(use(name, leave)))
        assert driver.most <= places
        assert [one.users for one in registry.list()] == [0] * 4

    run(tmp_path, test, resident=places)


# --- names, adding, removing -----------------------------------------------------------------------------------------


def test_a_name_stands_for_one_thing(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        registry.taken = lambda name: "the base model" if name == "llama" else None
        await add(registry, tmp_path, "a")
        for name, says in (("a", "taken by an adapter"), ("llama", "taken by the base model"), ("../x", "expected at")):
            with pytest.raises(UserError, match=says):
                await registry.add(name, tmp_path / "a")
        assert "b" not in registry
        with pytest.raises(Refusal) as caught:
            await use(registry, "b")
        assert caught.value.status == 404

    run(tmp_path, test)


def test_a_removed_adapter_serves_its_last_requests(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a", "b")
        await use(registry, "b")
        await registry.remove("b")
        assert driver.held.keys() == set()
        async with registry.hold("a"):
            await registry.remove("a")
            assert "a" in driver.held
            assert "a" not in registry
            with pytest.raises(UserError, match="still in use"):
                await registry.add("a", tmp_path / "a")
        while driver.held:
            await asyncio.sleep(0.01)
        await registry.add("a", tmp_path / "a")
        await use(registry, "a")
        with pytest.raises(UserError, match="expected one of: a"):
            await registry.remove("nobody")

    run(tmp_path, test)


def test_what_was_added_while_running_is_there_after_a_new_start(tmp_path: Path) -> None:
    kept = tmp_path / "adapters.json"

    async def first(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a", "b", "c", keep=True)
        await add(registry, tmp_path, "d")
        await registry.remove("b")

    async def second(registry: AdapterRegistry, driver: Held) -> None:
        (tmp_path / "c" / "evil.bin").write_bytes(b"")
        problems = await registry.restore()
        assert registry.names() == ("a",)
        assert len(problems) == 1
        assert "evil.bin" in problems[0]

    run(tmp_path, first, path=kept)
    (tmp_path / "base").rename(tmp_path / "old")
    run(tmp_path, second, path=kept)
    (tmp_path / "base").rename(tmp_path / "older")

    async def third(registry: AdapterRegistry, driver: Held) -> None:
        kept.write_text("[]", encoding="utf-8")
        with pytest.raises(UserError, match="remove it and add"):
            await registry.restore()

    run(tmp_path, third, path=kept)


def test_a_full_disk_leaves_no_adapter_behind(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    kept = tmp_path / "kept" / "adapters.json"

    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a", keep=True)
        await use(registry, "a")
        kept.with_suffix(".new").mkdir()  # as a full disk: it cannot be written
        with pytest.raises(RunError, match="cannot be written"):
            await add(registry, tmp_path, "b", keep=True)
        assert registry.names() == ("a",)
        with pytest.raises(RunError, match="cannot be written"):
            await registry.remove("a")
        assert (registry.names(), registry.resident, driver.held) == ((), 0, {})

    async def anew(registry: AdapterRegistry, driver: Held) -> None:
        assert await registry.restore() == []
        assert registry.names() == ("a",)

    run(tmp_path, test, path=kept)
    (tmp_path / "base").rename(tmp_path / "old")
    run(tmp_path, anew, path=kept)


async def _forgiving(what: Awaitable[None]) -> None:
    with contextlib.suppress(ConnectionError):
        await what
