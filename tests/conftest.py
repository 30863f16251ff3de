"""Shared fixtures: async tests run on asyncio; every test gets a folder and a store path of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from agentopt.graph import parameter_scope

# A busy two-core machine must not fail a property test: no test asserts on time. Every run draws the same examples,
# so that what passed here passes elsewhere; HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, tests are shared out as `tests/workers.py` says."""
    from tests.workers import OneEngine

    return OneEngine(config, log)


@pytest.fixture(scope="session", autouse=True)
def code_runs_somewhere() -> Iterator[None]:
    """Where the namespace tier does not work, tests run their own changed code in the process tier, by name."""
    from agentopt.sandbox import tier

    with pytest.MonkeyPatch.context() as patch:
        if "AGENTOPT_SANDBOX" not in os.environ and tier("namespace").available() is not None:
            patch.setenv("AGENTOPT_SANDBOX", "process")
        yield


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def isolated_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty folder, so that no test reads or writes another's `.agentopt/`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGENTOPT_DB", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return tmp_path


@pytest.fixture(autouse=True)
def own_parameters() -> Iterator[None]:
    """Parameter names are identities: a test's declarations end with the test."""
    with parameter_scope():
        yield
