"""The folder of a running server: one server per folder, found by its file, told in a sentence where it cannot be."""

from __future__ import annotations

import json
import resource
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agentopt.errors import UserError
from agentopt.serving._run_folder import SERVER, run_folder


@contextmanager
def files_of_at_most(size: int) -> Generator[None]:
    """As on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_it_is_announced_for_its_owner_alone_and_gone_afterwards(tmp_path: Path) -> None:
    with run_folder(str(tmp_path / "run"), 8000) as folder:
        folder.announce({"pid": 7})
        file = tmp_path / "run" / SERVER
        assert json.loads(file.read_text(encoding="utf-8")) == {"pid": 7}
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        with (
            pytest.raises(UserError, match=r"a server that runs \(process 7\)"),
            run_folder(str(tmp_path / "run"), 8000),
        ):
            pass
    assert not file.exists()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    with run_folder(str(tmp_path / "run"), 8000) as folder:
        with files_of_at_most(0), pytest.raises(UserError, match=r"server\.json cannot be written .*make room"):
            folder.announce({"pid": 7})
        assert [path.name for path in folder.path.iterdir()] == ["lock"]


def test_a_folder_that_is_used_for_other_things_is_not_closed_to_others(tmp_path: Path) -> None:
    shared = tmp_path / "project"
    shared.mkdir(mode=0o755)
    (shared / "notes.txt").touch()
    with pytest.raises(UserError, match=r"found 'notes\.txt' in it.*project/serve"), run_folder(str(shared), 8000):
        pass
    assert [one.name for one in shared.iterdir()] == ["notes.txt"]
    (shared / "notes.txt").unlink()
    for _ in range(2):  # an empty one may be made beforehand, and be used again
        with run_folder(str(shared), 8000):
            (shared / "gateway.log").touch()
