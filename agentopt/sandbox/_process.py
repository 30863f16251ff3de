"""The process tier: a child process with limits. It contains mistakes; it is not a boundary for hostile code."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

from agentopt.sandbox._limits import Limits
from agentopt.sandbox._tiers import (
    PROCESS,
    PYTHON_OPTIONS,
    WORKER,
    Started,
    register_tier,
    start_command,
    worker_environment,
)


class ProcessTier:
    """A session of its own, a clean environment, an empty folder, resource limits.

    The worker runs as the same user: it can read what that user can read, and use the network.
    """

    name = "process"
    strength = PROCESS

    def available(self) -> str | None:
        """None: every POSIX system has processes."""
        return None if os.name == "posix" else "this is not a POSIX system"

    def start(self, limits: Limits) -> Started:
        """Start a worker in a new temporary folder, which is removed at the end."""
        folder = tempfile.mkdtemp(prefix="agentopt-sandbox-")
        try:
            return start_command(
                [sys.executable, *PYTHON_OPTIONS, str(WORKER)],
                environment=worker_environment(folder),
                folder=folder,
                cwd=folder,
                removes_folder=True,
            )
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise


register_tier("process", ProcessTier)
