"""A small process between `agentopt serve` and its engine, so that none of the engine outlives the server.

    python _watchdog.py GRACE -- COMMAND...

It starts COMMAND in a process group of its own. When stdin ends, which also happens when the server is killed -9, the
group gets TERM, and after GRACE seconds KILL; so does whatever of the engine fled into another group (the watchdog
adopts orphans). The line "kill" on stdin is KILL at once; helpers of a dead engine still have a moment to clean up.
On stdout it says "pid N" and at last "exit CODE" (negative: a signal); stderr is the engine's log. Started by its path,
without agentopt: it costs 10 MB and no start-up time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

_SUBREAPER, _DEATH_SIGNAL = 36, 1
_POLL = 0.05
_LEFTOVERS = 3.0
"""Seconds, at most, that helpers of a dead engine have, to remove its shared memory for example."""


def main(arguments: list[str]) -> int:
    """Watch one command until it and all it started are gone; gives the exit code to end with."""
    grace, command = float(arguments[0]), arguments[2:]
    libc = _libc()
    if libc is not None:
        libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)
    wake, woken = os.pipe()
    for end in (wake, woken):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(woken)
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    try:
        # Nothing of ours is inherited; without the reset the engine would ignore Ctrl-C signals and broken pipes too.
        engine = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=2, stderr=2, start_new_session=True, preexec_fn=_child(libc)
        )
    except OSError as error:
        sys.stderr.write(f"cannot start {command[0]}: {error.strerror or error}\n")
        sys.stderr.flush()
        _say("exit 127")
        return 127
    _say(f"pid {engine.pid}")
    how = _wait(engine.pid, wake, stopping)
    if how == "term":
        _signal(engine.pid, signal.SIGTERM)
        _signal(engine.pid, signal.SIGCONT)  # a stopped process would not see it
        _until_gone(engine.pid, grace, leader=True)
    _clear(engine.pid, min(grace, _LEFTOVERS))
    _reap(engine.pid)
    code = engine.wait()
    _say(f"exit {code}")
    return 0


def _child(libc: Any) -> Any:
    """What the engine's process does before it becomes the engine."""

    def prepare() -> None:
        for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(ignored, signal.SIG_DFL)
        if libc is not None:
            libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)

    return prepare


def _wait(pid: int, wake: int, stopping: list[int]) -> str:
    """Until the engine has ended ("ended"), or is to be ended ("term", "kill")."""
    heard = b""
    while True:
        if _ended(pid):
            return "ended"
        if stopping:
            return "term"
        ready, _, _ = select.select([0, wake], [], [], 1.0)
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 512)
        if 0 in ready:
            data = os.read(0, 512)
            heard += data
            if b"kill\n" in heard:
                return "kill"
            if not data:
                return "term"


def _clear(pid: int, moment: float) -> None:
    """End what is left of the engine; the leader stays a zombie meanwhile, so that its number is not given away."""
    if not _ended(pid):
        os.kill(pid, signal.SIGKILL)
    if _family(pid):
        _signal(pid, signal.SIGTERM)
        _until_gone(pid, moment, leader=False)
    until = time.monotonic() + 10.0
    while True:
        _signal(pid, signal.SIGKILL)
        left = _family(pid)
        for one in left:
            if one != pid:
                with contextlib.suppress(OSError):
                    os.kill(one, signal.SIGKILL)
        if _ended(pid) and (not left or time.monotonic() > until):
            return
        time.sleep(_POLL)


def _until_gone(pid: int, seconds: float, *, leader: bool) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if leader and _ended(pid):
            return
        if not leader and not _family(pid):
            return
        if _killed_meanwhile():
            return
        time.sleep(_POLL)


def _killed_meanwhile() -> bool:
    """Whether "kill" was asked for while an orderly end was waited for."""
    ready, _, _ = select.select([0], [], [], 0)
    return bool(ready) and b"kill" in os.read(0, 512)


def _ended(pid: int) -> bool:
    """Whether the process is a zombie; it is not reaped."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _family(pid: int) -> set[int]:
    """Living processes of the engine's group or session, and those that we adopted; on Linux, else nobody."""
    found: set[int] = set()
    try:
        names = os.listdir("/proc")
    except OSError:
        return found
    for name in names:
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # The name in brackets may hold anything, so what follows is looked for from its end.
                state, parent, group, session = file.read().rpartition(b")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        number = int(name)
        if state not in (b"Z", b"X") and (int(group) == pid or int(session) == pid or int(parent) == os.getpid()):
            found.add(number)
    if found:
        _reap(pid)
    return found


def _reap(pid: int) -> None:
    """Take adopted orphans that have ended off the process table, all but the engine itself."""
    while True:
        try:
            done = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if done is None or done.si_pid == pid:
            return
        with contextlib.suppress(ChildProcessError):
            os.waitpid(done.si_pid, os.WNOHANG)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more: the server is gone
        os.write(1, f"{line}\n".encode())


def _libc() -> Any:
    """The C library where it has prctl (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None, use_errno=True)
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
