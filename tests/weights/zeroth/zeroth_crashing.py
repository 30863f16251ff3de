"""A program that trains a small model again and again, kills itself with SIGKILL while it does, and says what came out.

    python zeroth_crashing.py FOLDER STEPS SETTING...

Each life is a fork: what a library costs to import is paid once.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from agentopt.weights.zeroth import _log
from agentopt.weights.zeroth._log import Log
from agentopt.weights.zeroth._log_header import header_of
from agentopt.weights.zeroth._replay import log_to, replay

workers: Any = importlib.import_module("zeroth_workers")  # lies beside this file

PER_EXAMPLE = {"per example": workers.BATCH}


def life(path: Path, name: str, steps: int) -> None:
    """Begin or go on, to the end."""
    optimizer = workers.optimizer_of(name)
    print(json.dumps({"resumed": log_to(optimizer, path, k=PER_EXAMPLE.get(name))}), file=sys.stderr)
    while optimizer.step_number < steps:
        optimizer.step(workers.Losses(optimizer.step_number))
    optimizer.log.close()
    path.with_suffix(".weights").write_text(workers.weights_of(optimizer), encoding="utf-8")


def fork(path: Path, name: str, steps: int, *, torn_at: int | None = None) -> int:
    """One life in a process of its own; with `torn_at` it dies within a write, after so many bytes of it."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if torn_at is not None:
            real, left = os.pwrite, [torn_at % 7]

            def tear(descriptor: int, data: bytes, place: int) -> int:
                left[0] -= 1
                if left[0] >= 0:
                    return real(descriptor, data, place)
                real(descriptor, data[:torn_at], place)
                os.kill(os.getpid(), signal.SIGKILL)
                return 0

            _log.os.pwrite = tear
        life(path, name, steps)
        code = 0
    finally:
        os._exit(code)


def crash(path: Path, name: str, steps: int, draw: random.Random) -> list[int]:
    """Live and die until the run is through; the sizes of the log at every death."""
    sizes: list[int] = []
    while len(sizes) < 4:
        before = path.stat().st_size if path.exists() else 0
        torn_at = draw.choice([None, None, draw.randrange(1, 20)])
        pid = fork(path, name, steps, torn_at=torn_at)
        if torn_at is None:
            target = before + draw.randrange(30, 250)
            while (path.stat().st_size if path.exists() else 0) < target and not over(pid):
                time.sleep(0.0002)
            time.sleep(draw.random() * 0.003)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return sizes
        sizes.append(path.stat().st_size if path.exists() else 0)
    _, status = os.waitpid(fork(path, name, steps), 0)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    return sizes


def over(pid: int) -> bool:
    """Whether it has ended; it can still be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def again(path: Path, name: str) -> str:
    """The weights from base and log alone."""
    optimizer = workers.optimizer_of(name)
    with Log.read(path, header_of(optimizer, k=PER_EXAMPLE.get(name))) as log:
        replay(optimizer, log)
    return workers.weights_of(optimizer)


def main() -> None:
    """All settings; the report goes to stdout as JSON."""
    folder, steps, report = Path(sys.argv[1]), int(sys.argv[2]), dict[str, Any]()
    for number, name in enumerate(sys.argv[3:]):
        workers.optimizer_of(name).step(workers.Losses(0))  # what is imported at first use comes before the forks, too
        whole, torn = folder / f"whole-{number}.zo", folder / f"torn-{number}.zo"
        os.waitpid(fork(whole, name, steps), 0)
        sizes = crash(torn, name, steps, random.Random(number))
        report[name] = {
            "sizes": sizes,
            "same_log": whole.read_bytes() == torn.read_bytes(),
            "uninterrupted": whole.with_suffix(".weights").read_text(encoding="utf-8"),
            "resumed": torn.with_suffix(".weights").read_text(encoding="utf-8"),
            "replayed": again(torn, name),
            "begun": workers.weights_of(workers.optimizer_of(name)),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
