"""The work of a quantization that is not finished: the folder `OUT.partial`, which becomes OUT in one step.

It holds what was asked (state.json), the books and the column weights once they are known, a line for every complete
file (shards.jsonl), and the files themselves under `model/`. The same settings go on with it; others are refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from agentopt.errors import UserError
from agentopt.weights.gg._shards import write_file, writing

_STATE, _SHARDS, _LOCK, _MODEL = "state.json", "shards.jsonl", ".lock", "model"


class Partial:
    """Work towards a new model folder; locked while it is open.

    Args:
        out: the folder to come.
        settings: JSON values; what is found must have been begun with the same.

    Raises:
        UserError: `out` is taken, or other work is there.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        check_free(out)
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        self.model = self.path / _MODEL
        self._lock: TextIO | None = None
        self._open(json.loads(json.dumps(settings)))

    def _open(self, settings: dict[str, Any]) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: found a file where the work is to be kept; move it or give another folder.")
        saved = read_json(self.path / _STATE)
        if saved is None and self.path.exists() and set(os.listdir(self.path)) - {_LOCK, f"{_STATE}.new"}:
            raise UserError(f"{self.path}: found a folder that is no work of a quantization; move it away.")
        if saved is not None:
            self._check_same(saved, settings)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / _LOCK).open("w", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"{self.path}: another quantization is writing here; wait for it.") from None
        if saved is None:
            self.write_json(_STATE, settings)
        with writing(self.model):
            self.model.mkdir(exist_ok=True)

    def _check_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                raise UserError(
                    f"{self.path}: found unfinished work with {key} {before.get(key)!r}, now {now.get(key)!r}; give "
                    "the same settings to go on with it, or delete that folder to begin anew."
                )

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote; None when it did not."""
        return read_json(self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        """Keep a value."""
        write_file(self.path / name, (json.dumps(value, ensure_ascii=False) + "\n").encode())

    def shards(self) -> dict[str, dict[str, Any]]:
        """What is known of every file that is complete; a line torn by a kill is left out."""
        found: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self.path / _SHARDS).read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    one = json.loads(line)
                    path = self.model / one["file"]
                    if path.is_file() and path.stat().st_size == one["bytes"]:
                        found[one["file"]] = one
        return found

    def add_shard(self, about: Mapping[str, Any]) -> None:
        """A file is complete."""
        path = self.path / _SHARDS
        with writing(path), path.open("a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
                file.write(b"\n" if torn else b"")
            file.write(json.dumps(about, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """The work becomes the folder that was asked for.

        Raises:
            UserError: it was taken in the meantime.
        """
        check_free(self.out)
        with writing(self.out):
            os.replace(self.model, self.out)
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()
        self._lock = None

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What was given is wrong, and no file is complete: there is nothing to go on with.
        if isinstance(value, UserError) and self.path.is_dir() and not self.shards():
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()


def target(out: str | Path) -> Path:
    """The folder as one that can be put in place in one step: with a name of its own, and no link."""
    path = Path(out).expanduser()
    return path.resolve() if path.is_symlink() or path.name in ("", "..") else path


def check_free(out: Path) -> None:
    """A new folder, or an empty one.

    Raises:
        UserError: there is something, or a folder that cannot be replaced.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: found a file, expected a new folder to write into.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: found a folder that is not empty, expected a new one; give another or move it away.")
    if out.is_dir() and (os.path.ismount(out) or os.path.samefile(out, os.curdir)):
        kind = "a mounted folder" if os.path.ismount(out) else "the current folder"
        raise UserError(f"{out}: found {kind}, which cannot be replaced by a new one; give the name of a folder in it.")


def read_json(path: Path) -> Any:
    """JSON from a file; None when it is not there.

    Raises:
        UserError: it is there and is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete {path.parent} to begin anew.") from None
