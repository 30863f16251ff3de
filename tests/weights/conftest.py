"""One thread: these models are too small to share out. The embedded model's weights: converted once."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentopt.models._embedded_files import packaged_file
from agentopt.weights import load


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The same order of additions on every machine."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def embedded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, read from its GGUF file and saved as a folder: by the first worker that needs it, for all."""
    if packaged_file() is None:
        pytest.skip("the weights package is not installed")
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    folder = place / "embedded"
    with (place / "embedded.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            model, tokenizer = load.model("embedded", device="cpu")
            for one in (model, tokenizer):
                one.save_pretrained(place / "embedded.new")
            (place / "embedded.new").rename(folder)
    return folder
