"""The folder of one running server: how other commands find it, its logs, and that there is only one.

`server.json` says where it listens and holds the token of its admin side, so it is for its owner alone. The lock beside
it is the kernel's: it is free again when the process is gone, however it went.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentopt.errors import UserError

ROOT = Path(".agentopt") / "serve"
SERVER, LOCK = "server.json", "lock"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a server keeps what it has while it runs."""

    path: Path
    shown: str = ""
    """As the user would write it."""

    @property
    def gateway_log(self) -> Path:
        """A JSON line for every request."""
        return self.path / "gateway.log"

    @property
    def adapters(self) -> Path:
        """Adapters that were added while a server ran here."""
        return self.path / "adapters.json"

    def announce(self, about: dict[str, Any]) -> None:
        """Write `server.json`, whole or not at all, readable for its owner alone.

        Raises:
            UserError: it cannot be written; other commands would not find the server.
        """
        name = None
        try:
            descriptor, name = tempfile.mkstemp(dir=self.path, prefix=".server-")  # mkstemp makes it 0600
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(about, file, indent=2)
            os.replace(name, self.path / SERVER)
        except OSError as error:
            if name is not None:
                Path(name).unlink(missing_ok=True)
            what = f"{self.shown or self.path}: {SERVER} cannot be written ({error.strerror or error})"
            raise UserError(f"{what}; make room, or give another --run-dir.") from None

    def leave(self) -> None:
        """There is no server here any more."""
        (self.path / SERVER).unlink(missing_ok=True)


@contextlib.contextmanager
def run_folder(given: str | None, port: int) -> Generator[RunFolder]:
    """Make the folder and hold it for as long as the server runs.

    Args:
        given: `--run-dir`; by default a folder for the port.
        port: the public one.

    Raises:
        UserError: it cannot be made, or another server holds it.
    """
    path = Path(given) if given else ROOT / str(port)
    try:
        _check_own(path)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (path / LOCK).open("a")
    except OSError as error:
        raise UserError(f"--run-dir {path}: {error.strerror or error}; give a folder that can be written.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{path}: found a server that runs ({_who(path)}); stop it with agentopt serve drain, "
                "or give another --port or --run-dir."
            ) from None
        folder = RunFolder(path.resolve(), str(path))
        try:
            yield folder
        finally:
            folder.leave()


def _check_own(path: Path) -> None:
    """The folder will be closed to everybody else, so it may not be one that others use for other things.

    Raises:
        UserError: it is.
    """
    if not path.is_dir() or not path.stat().st_mode & 0o077 or (path / LOCK).exists():
        return
    if other := next((one.name for one in path.iterdir() if one.name != "lost+found"), None):
        raise UserError(
            f"--run-dir {path}: found {other!r} in it, expected a folder of its own: the server keeps secrets and "
            f"closes it to others; give for example {path / 'serve'}."
        )


def _who(path: Path) -> str:
    try:
        found = json.loads((path / SERVER).read_text(encoding="utf-8"))
        return f"process {found['pid']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it is starting"


def admin_token() -> str:
    """AGENTOPT_ADMIN_TOKEN, or a new one of 256 random bits.

    Raises:
        UserError: the one that is given protects nothing.
    """
    from agentopt.serving.admin import checked_token

    return checked_token(os.environ.get("AGENTOPT_ADMIN_TOKEN") or secrets.token_urlsafe(32))


def check_port(host: str, port: int, option: str) -> int:
    """The port, or a free one for 0.

    Raises:
        UserError: something listens there, or the address is not one of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family[0], socket.SOCK_STREAM) as probe:
            # As the server itself will: connections of one that has just ended are no reason to refuse.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(family[4])
            probe.listen()
            return int(probe.getsockname()[1])
    except OSError as error:
        where = f"{host}:{port}"
        if isinstance(error, socket.gaierror) or not port:
            raise UserError(f"--{option.replace('port', 'host')} {host}: {error.strerror or error}.") from None
        taken = error.errno in (48, 98)
        what = "another program listens there" if taken else error.strerror or str(error)
        raise UserError(f"--{option} {port}: cannot listen on {where}: {what}; give another one.") from None
