"""What the engine holds: the last used, never without one that is in use, each loaded once, and what was checked."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.serving._types import Refusal
from agentopt.serving.adapters import AdapterRegistry, EngineDriver
from agentopt.serving.adapters import _registry as registry_module
from agentopt.serving.fake_engine import FakeEngine, Ready
from tests.serving.adapters.folders import adapter, base, factors


class Held:
    """A driver that remembers, and can be slow or unwilling."""

    def __init__(self) -> None:
        self.held: dict[str, Path] = {}
        self.log: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.status = 200
        self.most = 0

    async def load(self, name: str, path: Path) -> None:
        await self.gate.wait()
        if self.status != 200:
            raise Refusal(self.status, "the engine says no")
        assert name not in self.held, f"{name} is held already"
        assert (path / "adapter_model.safetensors").is_file()
        self.held[name] = path
        self.most = max(self.most, len(self.held))
        self.log.append(f"+{name}")

    async def unload(self, name: str) -> None:
        if self.held.pop(name, None) is not None:
            self.log.append(f"-{name}")


def run(tmp_path: Path, test: Callable[[AdapterRegistry, Held], Awaitable[None]], **options: Any) -> None:
    """With a registry of two places."""

    async def all_of_it() -> None:
        driver = Held()
        asked: dict[str, Any] = {"resident": 2, "staging": tmp_path / "staging", "patience": 30.0, **options}
        found = AdapterRegistry(base(tmp_path / "base"), driver, **asked)
        try:
            async with asyncio.timeout(60):
                await test(found, driver)
        finally:
            await found.aclose()

    asyncio.run(all_of_it())


async def add(registry: AdapterRegistry, tmp_path: Path, *names: str, **options: Any) -> None:
    for number, name in enumerate(names):
        await registry.add(name, adapter(tmp_path / name, factors(value=number + 1.0)), **options)


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
            third = asyncio.create_task(_use(registry, "c"))
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
                await _use(registry, "b")
        assert (caught.value.status, caught.value.code) == (503, "no_place")
        assert caught.value.retry_after
        registry.patience = 60.0
        await _use(registry, "b")

    run(tmp_path, test, resident=1, patience=0.05)


def test_first_uses_that_come_together_load_once(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a")
        driver.gate.clear()
        tasks = [asyncio.create_task(_use(registry, "a")) for _ in range(20)]
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
        task = asyncio.create_task(_use(registry, "a"))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        driver.gate.set()
        await _use(registry, "a")
        assert (driver.log, registry.list()[0].users) == (["+a"], 0)
        for name in ("b", "c"):
            await _use(registry, name)
        assert driver.log == ["+a", "+b", "-a", "+c"]

    run(tmp_path, test)


def test_hundreds_are_known_and_few_resident(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        names = [f"a{number}" for number in range(200)]
        await add(registry, tmp_path, *names)
        async with asyncio.TaskGroup() as group:
            for name in names:
                group.create_task(_use(registry, name))
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
            await _use(registry, "b")
        assert caught.value.status == 404

    run(tmp_path, test)


def test_a_removed_adapter_serves_its_last_requests(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a", "b")
        await _use(registry, "b")
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
        await _use(registry, "a")
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


# --- changes on disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_LOOK_AGAIN", 0.0)


@pytest.mark.usefixtures("no_pause")
def test_new_content_is_checked_and_loaded_once_nobody_uses_the_old(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a")
        async with registry.hold("a"):
            before = driver.held["a"]
            content = (before / "adapter_model.safetensors").read_bytes()
            adapter(tmp_path / "a", factors(value=9.0))
            async with registry.hold("a"):
                assert driver.held["a"] == before
            assert (before / "adapter_model.safetensors").read_bytes() == content, "the engine's copy changed"
        async with registry.hold("a"):
            assert driver.held["a"] != before, "changed weights come from another path"
        assert driver.log == ["+a", "-a", "+a"]

    run(tmp_path, test)


@pytest.mark.usefixtures("no_pause")
def test_bad_content_is_not_loaded_and_the_good_copy_stays(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a", "b")
        await _use(registry, "a")
        for name in ("a", "b"):
            (tmp_path / name / "adapter_model.safetensors").write_bytes(b"cut")
        await _use(registry, "a")
        assert driver.log == ["+a"]
        assert "no whole safetensors file" in str(registry.list()[0].problem)
        with pytest.raises(Refusal) as caught:
            await _use(registry, "b")
        assert caught.value.status == 503
        assert str(tmp_path) not in str(caught.value), "a client learns the server's folders"
        assert registry.list()[1].problem

    run(tmp_path, test)


def test_the_engine_gets_a_copy_with_nothing_but_what_was_checked(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        folder = adapter(tmp_path / "a", auto_mapping={"x": 1}, base_model_name_or_path="/secret")
        (folder / "README.md").write_text("about", encoding="utf-8")
        await registry.add("a", folder)
        async with registry.hold("a"):
            names = sorted(one.name for one in driver.held["a"].iterdir())
            assert names == ["adapter_config.json", "adapter_model.safetensors"]
            config = json.loads((driver.held["a"] / "adapter_config.json").read_text(encoding="utf-8"))
            assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4, ["q_proj"])
            assert "auto_mapping" not in config

    run(tmp_path, test)


# --- engines that fail -----------------------------------------------------------------------------------------------


def test_an_engine_that_refuses_is_not_asked_again_at_once(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a")
        driver.status = 500
        for _ in range(3):
            with pytest.raises(Refusal) as caught:
                await _use(registry, "a")
            assert caught.value.status == 503
        assert registry.list()[0].problem == "the engine says no"
        assert not registry.resident

    run(tmp_path, test)


def test_after_a_restart_the_engine_holds_what_it_held(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a", "b", "c")
        await _use(registry, "a")
        await _use(registry, "b")
        driver.held.clear()
        driver.log.clear()
        await registry.after_restart()
        assert sorted(driver.log) == ["+a", "+b"]
        driver.held.clear()
        driver.status = 503
        await registry.after_restart()
        assert registry.resident == 0
        driver.status = 200
        await _use(registry, "a")

    run(tmp_path, test)


def test_an_engine_is_told_by_its_routes(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeEngine(socket=str(tmp_path / "e.sock"), token="secret") as fake:
            engine = Ready(fake.address, fake.abilities)
            driver = EngineDriver(engine)
            registry = AdapterRegistry(base(tmp_path / "base"), driver, resident=1, staging=tmp_path / "staging")
            await add(registry, tmp_path, "a", "b")
            await _use(registry, "a")
            await _use(registry, "b")
            assert fake.loads == ["+a", "-a", "+b"]
            assert Path(fake.adapters["b"]).parent == tmp_path / "staging"
            await driver.load("b", Path(fake.adapters["b"]))  # an answer that got lost
            await driver.unload("nobody")
            await fake.kill()
            with pytest.raises(Refusal) as caught:
                await _use(registry, "a")
            assert (caught.value.status, bool(engine.suspected)) == (503, True)
            await registry.aclose()

    asyncio.run(test())


async def _use(registry: AdapterRegistry, name: str) -> None:
    async with registry.hold(name):
        await asyncio.sleep(0)


async def _forgiving(what: Awaitable[None]) -> None:
    with contextlib.suppress(ConnectionError):
        await what


def test_only_our_copies_are_removed_from_the_staging_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "adapters"
    for name in ("handbook", "0" * 32, "." + "f" * 32):
        (folder / name).mkdir(parents=True)
    AdapterRegistry(base(tmp_path / "base"), Held(), resident=1, staging=folder)
    assert [one.name for one in folder.iterdir()] == ["handbook"]
