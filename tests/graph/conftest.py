"""Each graph test declares parameters of its own and leaves no candidate installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentopt import graph


@pytest.fixture(autouse=True)
def own_parameters() -> Iterator[None]:
    with graph.parameter_scope():
        yield
    graph.uninstall()
    graph.clear_lost_reads()
