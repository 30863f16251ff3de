"""Joining Ray, with a stand-in for it: a start that nobody waits for any more leaves no cluster behind."""

from __future__ import annotations

import sys
import threading
from types import ModuleType
from typing import Any

import anyio
import anyio.to_thread
import pytest

from agentopt.evaluation import _ray_cluster


class SlowRay(ModuleType):
    """Its `init` takes until `go` is set."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.begun, self.go, self.stopped = threading.Event(), threading.Event(), threading.Event()

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        self.begun.set()
        assert self.go.wait(60)

    def shutdown(self) -> None:
        self.stopped.set()

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> SlowRay:
    found = SlowRay()
    monkeypatch.setitem(sys.modules, "ray", found)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return found


@pytest.mark.anyio
async def test_a_start_that_is_interrupted_is_undone_when_it_is_through(ray: SlowRay) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(_ray_cluster.join, "ray", 1)
        await anyio.to_thread.run_sync(ray.begun.wait, 60)
        group.cancel_scope.cancel()
    assert not ray.stopped.is_set()
    ray.go.set()
    assert await anyio.to_thread.run_sync(ray.stopped.wait, 60)


@pytest.mark.anyio
async def test_a_start_that_is_waited_for_stays(ray: SlowRay) -> None:
    ray.go.set()
    cluster = await _ray_cluster.join("ray", 1)
    assert (cluster.cpus, cluster.ours, ray.stopped.is_set()) == (2, True, False)
    cluster.close()
    assert ray.stopped.is_set()
