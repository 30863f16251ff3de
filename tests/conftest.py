"""Shared fixtures: async tests run on asyncio; every test gets a folder and a store path of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from agentopt.graph import parameter_scope

# A busy two-core machine must not fail a property test: no test asserts on time.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


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
