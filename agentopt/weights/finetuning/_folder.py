"""The folder of a run: what it was asked (run.json), what happened (events.jsonl), and whose it is.

events.jsonl is appended to and never rewritten; a line torn by a kill is left out when it is read again. Two processes
cannot write one folder: a lock is held on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from agentopt.errors import RunError, UserError
from agentopt.weights._events import Event, append
from agentopt.weights.finetuning._options import FinetuneOptions, first_difference, make_options, portable

VERSION = 1
RUN, EVENTS, LOG, BASELINES, RESULT, REPORT = (
    "run.json",
    "events.jsonl",
    "steps.zo",
    "baselines.json",
    "result.json",
    "report.md",
)


class RunFolder:
    """A run's folder, locked while it is open."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._events: TextIO | None = None
        self._lock: TextIO | None = None

    # --- opening -----------------------------------------------------------------------------------------------------

    def open(self, options: FinetuneOptions, *, resume: bool) -> bool:
        """Take the folder for this run; true when it holds an earlier part of the same run.

        Raises:
            UserError: the folder holds another run or something else, or nothing where `resume` wants a run.
        """
        saved = self.saved()
        if saved is None:
            if resume:
                raise UserError(f"{self.path}: found no {RUN}, so there is nothing to resume; leave --resume out.")
            self._check_free()
        else:
            self._check_same(saved["options"], options)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error}).") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.path}: another run is writing here; wait for it or give another --out.") from None
        self._cut_torn_line()
        self._events = (self.path / EVENTS).open("a", encoding="utf-8")
        return saved is not None

    def saved(self) -> dict[str, Any] | None:
        """What run.json holds; None when there is none."""
        return read_json(self.path / RUN)

    def _check_free(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: found a file, expected a folder to write into.")
        mine = {".lock", EVENTS, LOG, BASELINES}
        others = sorted(entry.name for entry in self.path.glob("*")) if self.path.exists() else []
        others = [name for name in others if name not in mine]
        if others:
            shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise UserError(f"{self.path}: found {shown} and no run of agentopt finetune; give an empty or new folder.")

    def _check_same(self, before: dict[str, Any], options: FinetuneOptions) -> None:
        now = portable(options)
        name = first_difference(before, now)
        if name is not None:
            raise UserError(
                f"{self.path}: found a run with {name.replace('_', '-')} {before.get(name)!r}, now {now[name]!r}; give "
                "the same options to go on with it, or another --out."
            )

    def _cut_torn_line(self) -> None:
        path = self.path / EVENTS
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))

    def describe(self, options: FinetuneOptions, *, base: str, data: str, threads: int) -> None:
        """Write run.json, or compare with it when it is there.

        Raises:
            UserError: the base model or the rows are not those that the run began with.
        """
        saved = self.saved()
        if saved is None:
            content = {"version": VERSION, "options": portable(options), "base": base, "data": data, "threads": threads}
            write_json(self.path / RUN, content)
            return
        for name, what, found in (("base", "base model", base), ("data", "data", data)):
            if saved[name] != found:
                raise UserError(
                    f"{self.path}: the {what} changed since this run began (its hash is {found[:12]}, expected "
                    f"{saved[name][:12]}); give the one it began with, or another --out."
                )

    # --- events ------------------------------------------------------------------------------------------------------

    def write(self, event: Event) -> None:
        """Append one event.

        Raises:
            RunError: the disk is full or gone; what was written before stays.
        """
        append(self._events, self.path / EVENTS, event)

    def events(self) -> Iterator[dict[str, Any]]:
        """What happened so far, oldest first."""
        path = self.path / EVENTS
        if path.exists():
            with path.open(encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)

    def close(self) -> None:
        """Let go of the folder."""
        for file in (self._events, self._lock):
            if file is not None:
                file.close()
        if self._lock is not None and not (self.path / RUN).exists():
            self._remove_traces()
        self._events = self._lock = None

    def _remove_traces(self) -> None:
        """Of a run that never began: a mistyped option leaves no folder behind."""
        with contextlib.suppress(OSError):
            if not (self.path / EVENTS).stat().st_size:
                (self.path / EVENTS).unlink()
            (self.path / ".lock").unlink()
            self.path.rmdir()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def options_of(folder: str | Path) -> FinetuneOptions:
    """The options of the run in a folder.

    Raises:
        UserError: there is no run.
    """
    saved = read_json(Path(folder) / RUN)
    if saved is None:
        raise UserError(f"{folder}: found no {RUN}, expected the folder of a fine-tuning run.")
    return make_options(saved["options"], str(Path(folder) / RUN))


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None when the file is not there.

    Raises:
        UserError: it is there and is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete the folder or give another --out.") from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as a whole or not at all; see `write_text`."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}); make room and run the same command again."
        ) from error
