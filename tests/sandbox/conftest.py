"""Each sandbox test declares parameters of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentopt import graph


@pytest.fixture(autouse=True)
def own_parameters() -> Iterator[None]:
    with graph.parameter_scope():
        yield
