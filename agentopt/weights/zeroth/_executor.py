"""Data-parallel workers: as many processes as asked for, each running the same function with its own exchange.

    run_local("mypackage.train:shard", {"model": "...", "steps": 200}, world=2)

    def shard(spec, exchange):                      # in mypackage/train.py
        optimizer = ZerothOrder(..., exchange=exchange)

Specs and results are JSON, functions are names: nothing is pickled. When a worker fails, the others are ended and the
error names the one that failed first.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentopt.errors import RunError, UserError

GRACE_SECONDS = 3.0
"""What the others have to end by themselves when one has failed: often one of them tells the real reason."""
_POLL_SECONDS = 0.02
_TAIL = 30


@dataclass(frozen=True, slots=True)
class WorkerResult:
    """What a worker's function gave, and the bytes that the worker sent to the others."""

    rank: int
    value: Any
    sent_bytes: int


def run_local(
    target: str,
    spec: Mapping[str, Any],
    world: int,
    *,
    timeout: float = 600.0,
    on_output: Callable[[int, str], None] | None = None,
) -> list[WorkerResult]:
    """Run `target(spec, exchange)` in `world` processes of this machine; the results in the order of ranks.

    Args:
        target: `module:function`; importable here means importable there.
        spec: what the function is given, the same for all; JSON.
        world: number of workers.
        timeout: seconds by which one worker may lag behind another before the run counts as hung.
        on_output: called with rank and line for all that workers print, from threads of this process.

    Raises:
        UserError: `world` is below 1, the spec is not JSON, or a worker raised one.
        RunError: a worker failed, died or hung; the message names it, with the end of what it printed.
    """
    check(target, spec, world)
    with tempfile.TemporaryDirectory(prefix="agentopt-workers-") as folder, contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=world + 16))
        host, port = listener.getsockname()
        job = {
            "target": target,
            "spec": dict(spec),
            "world": world,
            "address": f"{host}:{port}",
            "token": secrets.token_hex(16),
            "timeout": timeout,
            "path": import_path(),
        }
        workers: list[_Process] = []
        try:
            for rank in range(world):
                workers.append(
                    _start(rank, job, Path(folder), listener if rank == 0 and world > 1 else None, on_output)
                )
            listener.close()  # rank 0 has it now: when it ends, nothing listens any more
            return _collect(workers)
        finally:  # also when interrupted
            for worker in workers:
                worker.end()


def check(target: str, spec: Mapping[str, Any], world: int) -> None:
    """Refuse what no worker could run.

    Raises:
        UserError: with the reason.
    """
    if world < 1:
        raise UserError(f"world: found {world}, expected at least 1 worker.")
    if not all(part for part in target.partition(":")):
        raise UserError(f"target: found {target!r}, expected module:function.")
    try:
        same = json.loads(json.dumps(dict(spec))) == dict(spec)
    except (TypeError, ValueError):
        same = False
    if not same:
        raise UserError("spec: holds a value that JSON does not keep; use text, numbers, lists and maps.")


def import_path() -> list[str]:
    """What this process adds to where Python looks for modules."""
    return [os.path.abspath(entry) for entry in sys.path if "site-packages" not in entry]


@dataclass(eq=False)
class _Process:
    rank: int
    process: subprocess.Popen[str]
    answer: Path
    tail: deque[str] = field(default_factory=lambda: deque[str](maxlen=_TAIL))
    reader: threading.Thread | None = None

    def listen(self, on_output: Callable[[int, str], None] | None) -> None:
        for line in self.process.stdout or ():
            self.tail.append(line.rstrip("\n"))
            if on_output is not None:
                on_output(self.rank, line.rstrip("\n"))

    def end(self) -> None:
        """Kill it when it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.reader is not None:
            self.reader.join(1.0)  # a grandchild may hold the pipe open
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not (pipe is self.process.stdout and self.reader and self.reader.is_alive()):
                with contextlib.suppress(OSError):
                    pipe.close()

    def said(self) -> dict[str, Any]:
        """Result or error; of a process that died, how."""
        if self.answer.exists():
            return json.loads(self.answer.read_text(encoding="utf-8"))
        code = self.process.returncode
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code} and no result"
        if self.reader is not None:
            self.reader.join(1.0)
        last = f"; it last printed: {' | '.join(list(self.tail)[-5:])}" if self.tail else ""
        hint = " (out of memory is the most common reason)" if code == -9 else ""
        return {"error": {"text": f"{how}{hint}{last}", "exit_code": 1, "lost": None}}


def _start(
    rank: int,
    job: Mapping[str, Any],
    folder: Path,
    listener: socket.socket | None,
    on_output: Callable[[int, str], None] | None,
) -> _Process:
    answer = folder / f"{rank}.json"
    listen = None if listener is None else listener.fileno()
    process = subprocess.Popen(
        [sys.executable, "-m", "agentopt.weights.zeroth._worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(job["path"]), "PYTHONUNBUFFERED": "1"},
        pass_fds=() if listen is None else (listen,),
        start_new_session=True,  # an interrupt from the keyboard comes here, and this process ends them
    )
    worker = _Process(rank, process, answer)
    worker.reader = threading.Thread(target=worker.listen, args=(on_output,), daemon=True)
    worker.reader.start()
    line = json.dumps({**job, "rank": rank, "listen": listen, "answer": str(answer)})
    with contextlib.suppress(BrokenPipeError):  # it died at once: found below, with what it printed
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()
    return worker


def _collect(workers: list[_Process]) -> list[WorkerResult]:
    """Wait for all; at the first failure the others get a moment to end by themselves."""
    answers: dict[int, dict[str, Any]] = {}
    deadline: float | None = None
    while len(answers) < len(workers):
        for worker in workers:
            if worker.rank not in answers and worker.process.poll() is not None:
                answers[worker.rank] = worker.said()
                if "error" in answers[worker.rank] and deadline is None:
                    deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    return results(answers, len(workers))


def results(answers: Mapping[int, Mapping[str, Any]], world: int) -> list[WorkerResult]:
    """Everybody's results.

    Raises:
        UserError, RunError: a worker failed: the one that the others missed, where it could tell why.
    """
    failed = {rank: answer["error"] for rank, answer in sorted(answers.items()) if "error" in answer}
    if not failed:
        return [WorkerResult(rank, one["result"], one["sent_bytes"]) for rank, one in sorted(answers.items())]
    cause = next((rank for rank, error in failed.items() if error["lost"] is None), None)
    if cause is None:  # a worker that hangs says nothing
        raise RunError(str(next(iter(failed.values()))["text"]))
    error = failed[cause]
    if error["exit_code"] == 2:
        raise UserError(str(error["text"]))
    raise RunError(f"worker {cause} of {world} failed: {error['text']}")
