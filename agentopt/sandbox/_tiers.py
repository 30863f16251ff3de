"""The protocol of a sandbox tier, the registry of tiers, and the rule for which one runs changed code.

A tier starts workers. A worker reads requests from its standard input and writes replies to its standard output, so a
tier is little more than a command: another process, a container, a machine far away.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from agentopt.errors import UserError
from agentopt.sandbox._limits import Limits

WORKER = Path(__file__).with_name("_worker.py")
PROCESS, NAMESPACE, CONTAINER = 10, 20, 30
"""Strengths of the tiers here; "auto" takes nothing below NAMESPACE."""
VARIABLE = "AGENTOPT_SANDBOX"
_STOP_SECONDS = 5.0


class SandboxUnavailable(UserError):
    """The tier asked for does not work here. Ends a run: no other tier takes its place."""


@dataclass(frozen=True, slots=True)
class Started:
    """A worker that was started: its process with pipes as standard input and output, its folder, how it is ended."""

    process: subprocess.Popen[bytes]
    folder: str
    """The temporary folder as the worker sees it."""
    removes_folder: bool = False
    """Whether the worker removes the folder itself when it finds the parent gone."""
    end: Callable[[], None] = field(default=lambda: None)
    """Ends everything that was started and removes what it left; called once."""


@runtime_checkable
class Tier(Protocol):
    """One way of running workers. `strength` orders tiers: a weaker one never stands in for a stronger one."""

    @property
    def name(self) -> str:
        """The name given to `--sandbox`."""
        ...

    @property
    def strength(self) -> int:
        """How much it holds back: 10 process, 20 namespace, 30 container."""
        ...

    def available(self) -> str | None:
        """Say why this tier does not work here; None when it was tried and works."""
        ...

    def start(self, limits: Limits) -> Started:
        """Start a worker; OSError when it cannot be started."""
        ...


_registry: dict[str, Callable[[], Tier]] = {}
_made: dict[str, Tier] = {}
_lock = threading.Lock()


def register_tier(name: str, factory: Callable[[], Tier]) -> None:
    """Let `--sandbox NAME` and `RunnerPool(tier=NAME)` find a tier; the factory is called once, when it is needed.

    Raises:
        UserError: the name is "auto".
    """
    if name == "auto":
        raise UserError("sandbox: a tier cannot be named 'auto', which stands for the choice among tiers.")
    with _lock:
        _registry[name] = factory
        _made.pop(name, None)


def tier_names() -> tuple[str, ...]:
    """Names of all tiers, in the order they were registered."""
    return tuple(_registry)


def tier(name: str) -> Tier:
    """Return the tier of that name, whether it works or not.

    Raises:
        UserError: there is none.
    """
    factory = _registry.get(name)
    if factory is None:
        known = ", ".join(["auto", *_registry])
        raise UserError(f"sandbox: found tier {name!r}; expected one of {known}.")
    with _lock:
        if name not in _made:
            _made[name] = factory()
        return _made[name]


def resolve_tier(wanted: str | Tier | None = None) -> Tier:
    """Return the tier that runs changed code, tried and working; never a weaker one than asked for.

    Args:
        wanted: a name, a tier, or "auto": the weakest tier that works among those at least as strong as "namespace".
            None reads the variable AGENTOPT_SANDBOX, "auto" when it is not set.

    Raises:
        SandboxUnavailable: the tier asked for does not work here; or, with "auto", only the process tier would.
        UserError: there is no tier of that name.
    """
    if wanted is None:
        wanted = os.environ.get(VARIABLE) or "auto"
    if wanted == "auto":
        return _automatic()
    chosen = tier(wanted) if isinstance(wanted, str) else wanted
    reason = chosen.available()
    if reason is not None:
        raise SandboxUnavailable(
            f"sandbox: the {chosen.name} tier does not work here: {reason}; "
            "`agentopt doctor` lists the tiers that do, and a weaker one is never used in its place."
        )
    return chosen


def _automatic() -> Tier:
    strong = sorted((made for made in map(tier, _registry) if made.strength >= NAMESPACE), key=lambda t: t.strength)
    reasons: list[str] = []
    for candidate in strong:
        reason = candidate.available()
        if reason is None:
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    raise SandboxUnavailable(
        "sandbox: generated code is not run, because no tier that holds it back works here "
        f"({'; '.join(reasons)}); mend one of them, or accept the risk with --sandbox process "
        "(limits only: such code can read your files and use the network)."
    )


# --- what tiers share ------------------------------------------------------------------------------------------------


def worker_environment(folder: str) -> dict[str, str]:
    """Return the whole environment of a worker: nothing of this process's own."""
    return {
        "HOME": folder,
        "LANG": "C.UTF-8",
        # A worker may start no threads, and numeric libraries would try as they are imported.
        "MKL_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PATH": os.defpath,
        "PYTHONHASHSEED": "0",
        "TMPDIR": folder,
    }


# -s -P and the environment above do what -I does, and leave PYTHONHASHSEED in force: a set's order must not differ from
# one worker to the next.
PYTHON_OPTIONS = ("-s", "-P", "-B", "-X", "utf8")


def worker_command(python: str, *, quote: bool = False) -> list[str]:
    """Return the command that runs a worker with an interpreter elsewhere: its source goes along.

    Args:
        python: the interpreter there, Python 3.11 or later.
        quote: for a command that a shell will read, as with ssh.
    """
    command = [python, *PYTHON_OPTIONS, "-c", WORKER.read_text(encoding="utf-8")]
    return [shlex.quote(part) for part in command] if quote else command


def start_command(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: str,
    cwd: str = "/",
    removes_folder: bool = False,
    cleanup: Callable[[], None] | None = None,
) -> Started:
    """Start a command that becomes a worker, as the leader of a session of its own.

    Args:
        command: the command; it must end soon after its standard input is closed, else it is killed.
        environment: its whole environment.
        folder: the worker's temporary folder, as it sees it.
        cwd: where the command starts.
        removes_folder: the folder is on this machine; it is removed at the end.
        cleanup: called before the command is ended, to end what it started elsewhere.
    """
    process = subprocess.Popen(
        command,
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env=dict(environment),
        start_new_session=True,
    )
    kept = folder if removes_folder else None

    def end() -> None:
        _end(process, kept, cleanup)

    return Started(process, folder, removes_folder, end)


def _end(process: subprocess.Popen[bytes], folder: str | None, cleanup: Callable[[], None] | None) -> None:
    """Close the pipes, wait a moment where the command ends itself, kill its group, remove the folder."""
    if process.stdin is not None:
        process.stdin.close()
    if cleanup is not None:
        cleanup()
    if folder is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)  # follows no link
