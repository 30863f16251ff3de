"""Data-parallel workers as actors of a Ray cluster of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentopt.errors import RunError
from agentopt.weights.zeroth._executor_ray import run_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_functions_of_local_workers_run_in_actors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    found = run_ray("zeroth_workers:add", {"rounds": 2}, 2)
    expected = [[[0.0, 2.0], [1.0, 2.0]], [[0.125, 2.0], [1.125, 2.0]]]
    assert [one.value["rounds"] for one in found] == [expected, expected]
    assert found[0].value["pid"] != found[1].value["pid"]
    with pytest.raises(RunError, match="worker 1 of 2 failed: its process or node died"):
        run_ray("zeroth_workers:fail", {"folder": str(tmp_path), "who": 1, "how": "kill"}, 2)
    assert not ray.is_initialized()
