"""How the tests are shared out among pytest-xdist's workers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

WHOLE_MACHINE = ("mark.embedded", "mark.ray")
"""Marks of tests that use what a machine has once: the embedded engine; a cluster that counts its cores."""


class OneEngine(LoadScopeScheduling):
    """Test by test; files that use the whole machine in one worker, one after another, those begin first.

    A file with a fixture for all its tests stays together, so that the fixture is made once.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return _scope(self.config.rootpath / file) or nodeid


@cache
def _scope(path: Path) -> str | None:
    source = path.read_text(encoding="utf-8")
    if any(mark in source for mark in WHOLE_MACHINE):
        return "machine"
    return str(path) if 'scope="module"' in source else None
