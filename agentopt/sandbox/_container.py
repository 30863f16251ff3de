"""The container tier: the same worker in Docker or Podman, spoken to over `run -i`.

The worker's source travels on the command line, so nothing of this machine is mounted and the engine may be elsewhere.
Images are never pulled: what runs is what the user put there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import threading

from agentopt.sandbox._limits import Limits
from agentopt.sandbox._probe import probe
from agentopt.sandbox._tiers import CONTAINER, Started, register_tier, start_command, worker_command

IMAGE_VARIABLE = "AGENTOPT_SANDBOX_IMAGE"
_ENGINES = ("docker", "podman")
_FOLDER = "/tmp"
_ASK_SECONDS = 30.0
_CPU_SECONDS = 3600  # ends a call that never ends when this process was killed and cannot do it
_HOST_VARIABLES = ("PATH", "HOME", "XDG_RUNTIME_DIR", "DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG",
                   "DOCKER_CERT_PATH", "DOCKER_TLS_VERIFY", "CONTAINER_HOST", "SSH_AUTH_SOCK")  # fmt: skip


class ContainerTier:
    """No network, read-only root, no capabilities, an unprivileged user, limits on memory and processes.

    Args:
        image: an image with Python 3.11 or later; None for the variable AGENTOPT_SANDBOX_IMAGE, else the official
            Python image of this interpreter's version.
        engine: "docker" or "podman"; None for the first that is installed.
    """

    name = "container"
    strength = CONTAINER

    def __init__(self, image: str | None = None, engine: str | None = None) -> None:
        version = ".".join(map(str, sys.version_info[:2]))
        self.image = image or os.environ.get(IMAGE_VARIABLE) or f"python:{version}-slim"
        self._engine = engine
        self._lock = threading.Lock()
        self._tried = False
        self._reason: str | None = None

    @property
    def engine(self) -> str | None:
        """The command that runs containers, None when none is installed."""
        wanted = (self._engine,) if self._engine is not None else _ENGINES
        return next((engine for engine in wanted if shutil.which(engine) is not None), None)

    def available(self) -> str | None:
        """Ask the engine for the image, then try a worker; once per process."""
        with self._lock:
            if not self._tried:
                self._reason = self._try()
                self._tried = True
            return self._reason

    def _try(self) -> str | None:
        engine = self.engine
        if engine is None:
            return "neither docker nor podman is installed"
        try:
            self._ask(engine, "version")
        except (OSError, subprocess.SubprocessError) as error:
            return f"{engine} does not answer: {_words(error)}"
        try:
            self._ask(engine, "image", "inspect", self.image)
        except (OSError, subprocess.SubprocessError):
            return f"the image {self.image} is not there: {engine} pull {self.image}"
        return probe(self)

    def start(self, limits: Limits) -> Started:
        """Start a container; it is removed at the end."""
        engine = self.engine
        if engine is None:
            raise OSError("neither docker nor podman is installed")
        name = f"agentopt-sandbox-{secrets.token_hex(8)}"

        def remove() -> None:
            with contextlib.suppress(OSError, subprocess.SubprocessError):  # it is gone, or the engine is
                self._ask(engine, "rm", "--force", name)

        command = [engine, "run", *self._options(name, limits), self.image, *worker_command("python")]
        return start_command(command, environment=_environment(), folder=_FOLDER, cleanup=remove)

    def _options(self, name: str, limits: Limits) -> list[str]:
        memory = limits.memory_bytes + limits.folder_bytes + (64 << 20)
        inside = {"HOME": _FOLDER, "TMPDIR": _FOLDER, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        options = ["--rm", "-i", "--name", name, "--pull", "never", "--log-driver", "none"]
        options += ["--network", "none", "--ipc", "private", "--read-only"]
        options += ["--tmpfs", f"{_FOLDER}:rw,noexec,nosuid,nodev,size={limits.folder_bytes},mode=1777"]
        options += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "65534:65534"]
        options += ["--pids-limit", "16", "--memory", str(memory), "--memory-swap", str(memory)]
        options += ["--ulimit", f"cpu={_CPU_SECONDS}", "--ulimit", "core=0", "--workdir", _FOLDER]
        return options + [part for key, value in inside.items() for part in ("--env", f"{key}={value}")]

    def _ask(self, engine: str, *arguments: str) -> None:
        subprocess.run([engine, *arguments], check=True, capture_output=True, timeout=_ASK_SECONDS, env=_environment())


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _HOST_VARIABLES if name in os.environ}


def _words(error: Exception) -> str:
    text = (getattr(error, "stderr", None) or b"").decode("utf-8", "replace").strip() or str(error)
    return text.splitlines()[-1][:200]


register_tier("container", ContainerTier)
