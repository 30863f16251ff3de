"""Adapters that change on disk, engines that fail, and what the staging folder keeps."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from agentopt.serving._types import Refusal
from agentopt.serving.adapters import AdapterRegistry, EngineDriver
from agentopt.serving.adapters import _registry as registry_module
from agentopt.serving.fake_engine import FakeEngine, Ready
from tests.serving.adapters.folders import adapter, base, factors
from tests.serving.adapters.registries import Held, add, run, use


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
        await use(registry, "a")
        for name in ("a", "b"):
            (tmp_path / name / "adapter_model.safetensors").write_bytes(b"cut")
        await use(registry, "a")
        assert driver.log == ["+a"]
        assert "no whole safetensors file" in str(registry.list()[0].problem)
        with pytest.raises(Refusal) as caught:
            await use(registry, "b")
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


def test_an_engine_that_refuses_is_not_asked_again_at_once(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a")
        driver.status = 500
        for _ in range(3):
            with pytest.raises(Refusal) as caught:
                await use(registry, "a")
            assert caught.value.status == 503
        assert registry.list()[0].problem == "the engine says no"
        assert not registry.resident

    run(tmp_path, test)


def test_after_a_restart_the_engine_holds_what_it_held(tmp_path: Path) -> None:
    async def test(registry: AdapterRegistry, driver: Held) -> None:
        await add(registry, tmp_path, "a", "b", "c")
        await use(registry, "a")
        await use(registry, "b")
        driver.held.clear()
        driver.log.clear()
        await registry.after_restart()
        assert sorted(driver.log) == ["+a", "+b"]
        driver.held.clear()
        driver.status = 503
        await registry.after_restart()
        assert registry.resident == 0
        driver.status = 200
        await use(registry, "a")

    run(tmp_path, test)


def test_an_engine_is_told_by_its_routes(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeEngine(socket=str(tmp_path / "e.sock"), token="secret") as fake:
            engine = Ready(fake.address, fake.abilities)
            driver = EngineDriver(engine)
            registry = AdapterRegistry(base(tmp_path / "base"), driver, resident=1, staging=tmp_path / "staging")
            await add(registry, tmp_path, "a", "b")
            await use(registry, "a")
            await use(registry, "b")
            assert fake.loads == ["+a", "-a", "+b"]
            assert Path(fake.adapters["b"]).parent == tmp_path / "staging"
            await driver.load("b", Path(fake.adapters["b"]))  # an answer that got lost
            await driver.unload("nobody")
            await fake.kill()
            with pytest.raises(Refusal) as caught:
                await use(registry, "a")
            assert (caught.value.status, bool(engine.suspected)) == (503, True)
            await registry.aclose()

    asyncio.run(test())


def test_only_our_copies_are_removed_from_the_staging_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "adapters"
    for name in ("handbook", "0" * 32, "." + "f" * 32):
        (folder / name).mkdir(parents=True)
    AdapterRegistry(base(tmp_path / "base"), Held(), resident=1, staging=folder)
    assert [one.name for one in folder.iterdir()] == ["handbook"]
