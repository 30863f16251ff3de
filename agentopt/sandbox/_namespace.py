"""The namespace tier: a worker that sees a small read-only root, its own folder, no network and no other process.

Two ways lead there, bubblewrap (`bwrap`) and the script `_jail.py`; both are tried by `_probe`, and the first that
holds is used. What it covers and what not is in docs/sandbox.md.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from agentopt.sandbox._layout import Layout, interpreter_layout
from agentopt.sandbox._limits import Limits
from agentopt.sandbox._probe import probe
from agentopt.sandbox._tiers import (
    NAMESPACE,
    PYTHON_OPTIONS,
    WORKER,
    Started,
    register_tier,
    start_command,
    worker_environment,
)

_JAIL = Path(__file__).with_name("_jail.py")
_STARTER = ("-I", "-S", "-B", "-X", "utf8")
_WORKER_INSIDE, _JAIL_INSIDE = "/worker.py", "/jail.py"
_NOBODY = 65534


class NamespaceTier:
    """User, mount, process, network, IPC, UTS and cgroup namespaces, a root of their own, Landlock, a call filter.

    Args:
        way: "bwrap" or "own"; None tries both and uses the first that holds.
    """

    name = "namespace"
    strength = NAMESPACE

    def __init__(self, way: str | None = None) -> None:
        # The superuser is exempt from the limit on processes in bubblewrap, not in our own namespaces.
        ways = ("own", "bwrap") if _is_superuser() else ("bwrap", "own")
        self._ways = ways if way is None else (way,)
        self._layout: Layout | None = None
        self._lock = threading.Lock()
        self._tried = False
        self._reason: str | None = None
        self.way = self._ways[0]
        """How workers are started: settled by `available()`."""

    def available(self) -> str | None:
        """Try each way once per process; None when one holds."""
        with self._lock:
            if not self._tried:
                self._reason = self._try()
                self._tried = True
            return self._reason

    def _try(self) -> str | None:
        if sys.platform != "linux":
            return f"namespaces are a feature of Linux, this is {sys.platform}"
        reasons: list[str] = []
        for way in self._ways:
            if way == "bwrap" and shutil.which("bwrap") is None:
                reasons.append("bwrap is not installed")
                continue
            self.way = way
            reason = probe(self)
            if reason is None:
                return None
            reasons.append(f"bwrap: {reason}" if way == "bwrap" else reason)
        return "; ".join(reasons)

    def start(self, limits: Limits) -> Started:
        """Start a worker; its folder is in memory and goes with it."""
        if self._layout is None:
            self._layout = interpreter_layout()
        command = [sys.executable, *_STARTER, str(_JAIL), json.dumps(self._config(self._layout, limits))]
        folder = _folder(self._layout)
        return start_command(command, environment=worker_environment(folder), folder=folder)

    def _config(self, layout: Layout, limits: Limits) -> dict[str, Any]:
        config: dict[str, Any] = {
            "stage": "supervise",
            "binds": [*((path, path) for path in layout.binds), (str(WORKER), _WORKER_INSIDE)],
            "links": layout.links,
            "devices": layout.devices,
            "folder": _folder(layout),
            "folder_bytes": limits.folder_bytes,
            "host_id": _NOBODY if _is_superuser() else None,
            "command": [sys.executable, *PYTHON_OPTIONS, _WORKER_INSIDE],
            "bwrap": None,
        }
        if self.way == "bwrap":
            config["bwrap"] = _bwrap(config)
        return config


def _folder(layout: Layout) -> str:
    """Where the worker may write: /tmp, or a folder of its own where the interpreter itself lives below /tmp."""
    shown = [*layout.binds, *(path for path, _ in layout.links)]
    return "/scratch" if any(path == "/tmp" or path.startswith("/tmp/") for path in shown) else "/tmp"


def _bwrap(config: dict[str, Any]) -> list[str]:
    """Return the command that makes the same root with bubblewrap and shuts the worker in from the inside."""
    binds = [*config["binds"], (str(_JAIL), _JAIL_INSIDE)]
    inside = {**config, "stage": "confine", "binds": binds}
    command = [shutil.which("bwrap") or "bwrap", "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    command += ["--unshare-uts", "--unshare-cgroup-try", "--die-with-parent", "--hostname", "sandbox"]
    command += ["--uid", "1000", "--gid", "1000", "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    for source, target in binds:
        command += ["--ro-bind", source, target]
    for path, target in config["links"]:
        command += ["--symlink", target, path]
    for device in config["devices"]:
        command += ["--dev-bind", device, device]
    command += [
        "--proc",
        "/proc",
        "--perms",
        "0700",
        "--size",
        str(config["folder_bytes"]),
        "--tmpfs",
        config["folder"],
    ]
    command += ["--remount-ro", "/", "--chdir", config["folder"], "--"]
    return [*command, sys.executable, *_STARTER, _JAIL_INSIDE, json.dumps(inside)]


def _is_superuser() -> bool:
    """Whether this is the machine's superuser; that of a user namespace around us is an ordinary user outside."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return False
    try:
        inside, outside, _ = Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()[0].split()
    except (OSError, ValueError, IndexError):
        return True
    return inside == outside


register_tier("namespace", NamespaceTier)
