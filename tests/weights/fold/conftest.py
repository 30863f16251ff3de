"""A tiny folder that has learned to fold: trained once, used by everybody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agentopt.weights.fold import Folder
from tests.weights.fold import tiny


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a model folder."""
    return tiny.save_base(tmp_path_factory.mktemp("fold") / "base")


@pytest.fixture(scope="session")
def tiny_meta(tiny_base: Path) -> Path:
    """A META folder whose folds answer almost every question of `tiny.tasks`."""
    return tiny.train(tiny_base, tiny_base.parent / "meta")


@pytest.fixture(scope="session")
def tiny_folder(tiny_meta: Path) -> Iterator[Folder]:
    """The folder itself: shared, so it is asked and never trained."""
    with Folder.load(tiny_meta, device="cpu") as folder:
        yield folder
