"""What the tests of engines share: how the double is launched, quick times, events that are collected, processes."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from agentopt.serving._types import CHAT, Abilities, Address
from agentopt.serving.engines import Event, Launch, Supervisor, SupervisorOptions
from agentopt.serving.engines._launch import common_hint, engine_environment, listen

TINY = Path(__file__).with_name("tiny_engine.py")
PATIENCE = 60.0
QUICK: dict[str, Any] = {
    "start_timeout": 60.0,
    "health_interval": 0.05,
    "health_timeout": 20.0,
    "hung_after": 20.0,
    "stop_grace": 5.0,
    "first_delay": 0.02,
    "longest_delay": 0.05,
    "failed_starts": 3,
}


def tiny(*arguments: str, program: str = sys.executable) -> Launch:
    """The double, told how to behave."""

    def command(address: Address) -> list[str]:
        return [program, "-I", "-S", str(TINY), *listen(address), *arguments]

    return Launch(
        name="tiny",
        model="tiny",
        command=command,
        env=engine_environment(),
        token_env="AGENTOPT_ENGINE_TOKEN",
        abilities=Abilities(routes=frozenset({CHAT}), model="tiny"),
        stages=((re.compile(r"loading weights (\d+%)"), r"loading weights, \1"),),
        hint=common_hint,
    )


def watched(launch: Launch, run_dir: Path, **options: Any) -> tuple[Supervisor, list[Event]]:
    """A supervisor with quick times, and what it tells."""
    told: list[Event] = []
    times = SupervisorOptions(**{**QUICK, **options})
    return Supervisor(launch, run_dir=run_dir, options=times, on_event=told.append), told


def kinds(told: list[Event]) -> list[str]:
    """The events' names."""
    return [event.kind for event in told]


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def gone(pids: list[int]) -> bool:
    """Wait until none of them runs."""
    until = time.monotonic() + PATIENCE
    while any(alive(pid) for pid in pids):
        if time.monotonic() > until:
            for pid in pids:  # the test has failed; nothing is left behind all the same
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.02)
    return True


def parent(pid: int) -> int:
    """The process that started another."""
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
