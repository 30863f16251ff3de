"""`agentopt serve` as a process of its own: its events, its addresses, and whether anything of it is left."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = 120.0
"""Seconds until what has to happen is given up; no test depends on how long it takes."""
FAKE = ("double", "--engine", "fake")
HELLO = [{"role": "user", "content": "one two three four"}]
ENVIRONMENT = {"COLUMNS": "80", "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
CLIENTS = contextlib.ExitStack()
"""Closes what `client` made; `conftest.py` does it after each file."""


@dataclass
class Server:
    """A server that was started with `--json`; its events come in the order in which it told them."""

    process: subprocess.Popen[str]
    errors: Path
    told: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    lines: queue.Queue[str | None] = field(default_factory=lambda: queue.Queue[str | None]())
    patience: float = PATIENCE

    def until(self, kind: str, **about: Any) -> dict[str, Any]:
        """The next event of this kind with these fields."""
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            try:
                line = self.lines.get(timeout=1)
            except queue.Empty:
                continue
            if line is None:
                break
            event = json.loads(line)
            self.told.append(event)
            if event["kind"] == kind and all(event[name] == value for name, value in about.items()):
                return event
        raise AssertionError(f"no {kind}; told: {self.told}; stderr: {self.errors.read_text(encoding='utf-8')}")

    def serving(self) -> dict[str, Any]:
        """Where it is, as soon as it serves."""
        return self.until("serving")

    @property
    def engine_pid(self) -> int:
        """The engine's process of the latest start."""
        return next(event["pid"] for event in reversed(self.told) if event["kind"] == "starting")

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send a signal and wait for the end; gives the exit code."""
        self.process.send_signal(number)
        return self.end()

    def end(self) -> int:
        """The exit code, once it has ended; the events until then are in `told`."""
        code = self.process.wait(PATIENCE)
        while (line := self.lines.get(timeout=PATIENCE)) is not None:
            self.told.append(json.loads(line))
        return code


@contextlib.contextmanager
def server(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Generator[Server]:
    """`agentopt serve ... --json --port 0` in a folder; killed at the end where it still runs."""
    errors = folder / "stderr.txt"
    command = [sys.executable, "-m", "agentopt", "serve", *arguments]
    rest = command.index("--") if "--" in command else len(command)
    command[rest:rest] = ["--json", *([] if "--port" in command else ["--port", "0"])]
    with errors.open("w", encoding="utf-8") as err:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            encoding="utf-8",
        )
    found = Server(process, errors)
    reader = threading.Thread(target=_read, args=(process, found.lines))
    reader.start()
    try:
        yield found
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        assert process.stdout is not None
        process.stdout.close()


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def until(found: Callable[[], T | None]) -> T:
    """What is found, once it is something."""
    end = time.monotonic() + PATIENCE
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return value


def gone(pid: int) -> bool:
    """Whether a process is gone, or goes within the patience."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(OSError):  # a zombie that nobody waits for is gone as well
            if Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
                return True
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def asked(url: str, body: Any = None, *, key: str | None = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of one request."""
    data = None if body is None else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {}), **headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, sent), timeout=PATIENCE) as reply:
            return reply.status, {name.lower(): value for name, value in reply.headers.items()}, _json(reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {name.lower(): value for name, value in error.headers.items()}, _json(error.read())


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")


def client(serving: dict[str, Any], key: str = "none") -> Any:
    """The client that people use; it asks once."""
    import openai

    made = openai.OpenAI(base_url=serving["base_url"], api_key=key, max_retries=0, timeout=PATIENCE)
    CLIENTS.callback(made.close)
    return made
