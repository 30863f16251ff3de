"""What the adapters share: a process that gets one run per line on standard input and prints what came of it.

An adapter gives `run(job, world, watch)`, which starts its system and calls `watch.has(instruction)` whenever the
system's own best candidate changes. The clock of a run starts when `run` is called: imports, and one small run before
the first counted one, stay outside for every system.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field

from _peer_world import World

_OUT = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # what a library prints from here on goes to standard error

THREADS = 8
"""Task calls that a system may have in flight, the same for all."""


class Reached(Exception):
    """Ends a run: the target is reached or the cap is passed."""


@dataclass
class Job:
    """One run."""

    run: str
    seed: int
    quality: float
    rows: int
    cap: int
    port: int
    target: float = 0.9
    options: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Base URL of the endpoint."""
        return f"http://127.0.0.1:{self.port}/v1"


class Watch:
    """Notes when the system had which best candidate, and says when to stop."""

    def __init__(self, job: Job, world: World) -> None:
        self._job = job
        self._world = world
        self.marks: list[tuple[float, float, str]] = []

    @property
    def reached(self) -> bool:
        """Whether the last best candidate is good enough on the hidden rows (the system does not know)."""
        return bool(self.marks) and self.marks[-1][1] >= self._job.target

    @property
    def over(self) -> bool:
        """Whether the cap of calls is passed."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._job.port}/calls/{self._job.run}") as reply:
            return json.load(reply) >= self._job.cap

    @property
    def done(self) -> bool:
        """Reached or over."""
        return self.reached or self.over

    def has(self, instruction: str) -> None:
        """The system's best candidate is now this one."""
        self.marks.append((time.monotonic(), self._world.truth(instruction), instruction))

    def check(self) -> None:
        """Raise `Reached` when the run is done."""
        if self.done:
            raise Reached


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def work(run: Callable[[Job, World, Watch], None]) -> None:
    """Serve jobs until standard input closes."""
    for line in sys.stdin:
        job = Job(**json.loads(line))
        world = World(job.seed, job.rows, job.rows)
        watch = Watch(job, world)
        error = ""
        cpu, started = _cpu(), time.monotonic()
        try:
            run(job, world, watch)
        except BaseException:  # noqa: BLE001  (a `Reached` may arrive wrapped; anything else is reported)
            if not watch.done:
                error = traceback.format_exc()[-2000:]
        ended = time.monotonic()
        data = {"run": job.run, "started": started, "ended": ended, "cpu": _cpu() - cpu, "marks": watch.marks}
        _OUT.write("RUN " + json.dumps({**data, "error": error}) + "\n")
        _OUT.flush()
