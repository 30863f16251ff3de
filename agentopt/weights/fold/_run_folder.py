"""The folder of a meta-training run: what it was asked, what happened, and the state to go on from.

META/run.json           options and hashes of base and tasks
META/events.jsonl       what happened, an object a line
META/checkpoint.*       meta-parameters and moments, replaced as a whole at every validation; gone when the run is done
META/best.*             meta-parameters of the best validation; gone when the run is done

Two processes cannot write one folder: a lock is held on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

from agentopt.errors import RunError, UserError
from agentopt.weights._events import Event, append
from agentopt.weights.finetuning._folder import read_json, write_json, write_text
from agentopt.weights.load import need

VERSION = 1
RUN, EVENTS, CHECKPOINT, BEST = "run.json", "events.jsonl", "checkpoint.safetensors", "best.safetensors"
_OURS = {".lock", EVENTS, CHECKPOINT, BEST}


class RunFolder:
    """A run's folder, locked while it is open.

    Args:
        path: made when it is missing.
        asked: what defines the run; a folder with another one is refused.
        resume: expect a run.

    Raises:
        UserError: the folder holds another run or something else, or nothing where `resume` wants a run, or another
            process writes it.
    """

    def __init__(self, path: str | Path, asked: Mapping[str, Any], *, resume: bool) -> None:
        self.path = Path(path)
        self._events: TextIO | None = None
        saved = read_json(self.path / RUN)
        if saved is None and resume:
            raise UserError(f"{self.path}: found no {RUN}, so there is nothing to resume.")
        if saved is None:
            self._check_free()
        else:
            self._check_same(saved, asked)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error}).") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"{self.path}: another run is writing here; wait for it or give another folder.") from None
        self._asked = None if saved is not None else {"version": VERSION, **asked}

    def _check_free(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: found a file, expected a folder to write into.")
        others = sorted(entry.name for entry in self.path.glob("*")) if self.path.exists() else []
        others = [name for name in others if name.removesuffix(".new") not in _OURS | {RUN}]
        if others:
            shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise UserError(f"{self.path}: found {shown} and no run of meta-training; give an empty or new folder.")

    def _check_same(self, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        for name, now in asked.items():
            change = _change(name, saved.get(name), now)
            if change is not None:
                raise UserError(
                    f"{self.path}: found a run with {change}; give the same to go on with it, or another folder."
                )

    def begin(self) -> None:
        """Write what is asked, unless it is there: nothing is known against the run any more."""
        if self._asked is not None:
            write_json(self.path / RUN, self._asked)
            self._asked = None

    # --- events ------------------------------------------------------------------------------------------------------

    def go_on(self, step: int) -> None:
        """Keep what happened until `step`; the steps after it are made again."""
        path = self.path / EVENTS
        kept: list[str] = []
        if path.exists() and step:
            data = path.read_bytes()
            for line in data[: data.rfind(b"\n") + 1].decode().splitlines():
                if json.loads(line).get("step", 0) <= step:
                    kept.append(line + "\n")
        write_text(path, "".join(kept))
        self._events = path.open("a", encoding="utf-8")

    def write(self, event: Event) -> None:
        """Append one event.

        Raises:
            RunError: the disk is full or gone; what was written before stays.
        """
        append(self._events, self.path / EVENTS, event)

    # --- tensors -----------------------------------------------------------------------------------------------------

    def put(self, name: str, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Write tensors with a JSON state, as a whole or not at all."""
        write_tensors(self.path / name, tensors, state)

    def get(self, name: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Tensors and state; None when they were never written."""
        path = self.path / name
        return read_tensors(path) if path.exists() else None

    def clean(self) -> None:
        """Delete what only a resume needs."""
        for name in (CHECKPOINT, BEST):
            (self.path / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the folder."""
        if self._events is not None:
            self._events.close()
            self._events = None
        self._lock.close()
        if self._asked is not None:
            self._remove_traces()

    def _remove_traces(self) -> None:
        """Of a run that never began: a mistyped option leaves no folder behind."""
        with contextlib.suppress(OSError):
            (self.path / ".lock").unlink()
            self.path.rmdir()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_tensors(path: Path, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """A safetensors file with a JSON state in its header, replaced as a whole.

    Raises:
        RunError: the disk does not take it.
    """
    temporary = path.with_name(path.name + ".new")
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        need("safetensors.torch").save_file(ready, str(temporary), metadata={"state": json.dumps(state)})
        os.replace(temporary, path)
    except (OSError, need("safetensors").SafetensorError) as error:
        raise RunError(f"{path}: cannot be written ({error}); make room and run it again.") from error


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `write_tensors` wrote.

    Raises:
        UserError: it cannot be read.
    """
    safetensors = need("safetensors")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            state = json.loads(file.metadata()["state"])
        return need("safetensors.torch").load_file(str(path)), state
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete the folder and start anew.") from error


def digest(value: Any) -> str:
    """A name for JSON values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def _change(name: str, before: Any, now: Any) -> str | None:
    """What differs, in words: the field of options, or the whole value."""
    if before == now:
        return None
    if isinstance(now, dict) and isinstance(before, dict):
        one, two = cast("dict[str, Any]", before), cast("dict[str, Any]", now)
        field = next(key for key in {**two, **one} if one.get(key) != two.get(key))
        return _change(field, one.get(field), two.get(field))
    return f"{name} {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:12] + "..."
