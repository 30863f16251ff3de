"""What the tests of the registry share: a driver that remembers, a registry of two places, adapters by name."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from agentopt.serving._types import Refusal
from agentopt.serving.adapters import AdapterRegistry
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


async def use(registry: AdapterRegistry, name: str) -> None:
    async with registry.hold(name):
        await asyncio.sleep(0)
