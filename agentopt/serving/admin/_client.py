"""Finds the running server by its run folder, and asks its admin side. For commands: synchronous, small, no proxies."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlsplit

from agentopt.errors import RunError, UserError

ROOT = Path(".agentopt") / "serve"
TOKEN = "AGENTOPT_ADMIN_TOKEN"
_SECONDS = 30.0
_LONGEST_REPLY = 64 << 20


@dataclass(frozen=True, slots=True)
class AdminClient:
    """One running server's admin side."""

    url: str
    token: str = field(repr=False)
    server: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)
    """What server.json says; empty for one given by its URL."""

    @classmethod
    def find(
        cls,
        *,
        admin: str | None = None,
        token: str | None = None,
        port: int | None = None,
        run_dir: str | Path | None = None,
        root: str | Path = ROOT,
    ) -> AdminClient:
        """The server at `admin`, or the one with that run folder or port, or the only one that runs from here.

        Raises:
            UserError: there is none, there are several, or no token is known for `admin`.
        """
        token = token or os.environ.get(TOKEN)
        if admin is not None:
            parts = urlsplit(admin if "//" in admin else f"http://{admin}")
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise UserError(f"--admin {admin}: expected an address like http://host:8001.")
            if not token:
                raise UserError(f"--admin {admin}: set {TOKEN} to that server's admin token.")
            return cls(f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}", token)
        files = [Path(run_dir) / "server.json"] if run_dir is not None else sorted(Path(root).glob("*/server.json"))
        found = _running(files)
        if port is not None:
            found = [one for one in found if port in (_port(one.get("base_url")), _port(one.get("admin_url")))]
        if not found:
            where = f" with run folder {run_dir}" if run_dir is not None else f" from {Path.cwd()}"
            where = f"{where} on port {port}" if port is not None else where
            raise UserError(
                f"no server runs{where}; go to the folder it was started in, give its --run-dir, or --admin URL; "
                "`agentopt serve MODEL` starts one."
            )
        if len(found) > 1:
            ports = ", ".join(str(_port(one.get("base_url"))) for one in found)
            raise UserError(f"several servers run from here (ports {ports}); give --port.")
        return cls(_reachable(str(found[0]["admin_url"])), str(found[0]["admin_token"]), found[0])

    def get(self, path: str) -> dict[str, Any]:
        """GET; see `ask`."""
        return self.ask("GET", path)

    def post(self, path: str, body: Mapping[str, Any], *, seconds: float = _SECONDS) -> dict[str, Any]:
        """POST; see `ask`."""
        return self.ask("POST", path, body, seconds=seconds)

    def delete(self, path: str) -> dict[str, Any]:
        """DELETE; see `ask`."""
        return self.ask("DELETE", path)

    def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, seconds: float = _SECONDS
    ) -> dict[str, Any]:
        """One request; gives the JSON object of the reply.

        Raises:
            UserError: the server refused it.
            RunError: the server does not answer, or could not do it.
        """
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=seconds)
        headers = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
        data = None if body is None else json.dumps(body)
        try:
            connection.request(method, parts.path + quote(path), data, headers)
            reply = connection.getresponse()
            return _content(reply.status, reply.read(_LONGEST_REPLY), self.url)
        except TimeoutError as error:
            raise RunError(f"the server at {self.url} did not answer within {seconds:.0f} s; see its log.") from error
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or error or type(error).__name__
            raise RunError(f"the server at {self.url} does not answer ({why}); is it still running?") from error
        finally:
            connection.close()


def _content(status: int, data: bytes, url: str) -> dict[str, Any]:
    try:
        content: Any = json.loads(data)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise RunError(f"{url} answered {status} and no JSON object; is it the admin port of `agentopt serve`?")
    found = cast("dict[str, Any]", content)
    if status < 400:
        return found
    problem: Any = found.get("error")
    error = cast("dict[str, Any]", problem) if isinstance(problem, dict) else {"message": found}
    text = str(error.get("message"))
    if status == 404 and text.startswith("there is nothing at"):  # an admin side has all that is asked of it
        raise UserError(f"{url}: {text}; is it the admin address of `agentopt serve`, or the public one?")
    if status == 401:
        raise UserError(f"{url}: the admin token is wrong; {TOKEN} must be that server's token.")
    raise (UserError if status < 500 or status == 501 else RunError)(text)


def _running(files: list[Path]) -> list[dict[str, Any]]:
    """What these server.json say, of the servers that live; by port."""
    found: list[dict[str, Any]] = []
    for file in files:
        try:
            content: Any = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # removed just now, or half of a file of a server that was killed
        if isinstance(content, dict) and {"pid", "admin_url", "admin_token"} <= set(cast("dict[str, Any]", content)):
            server = cast("dict[str, Any]", content)
            if _alive(file.with_name("lock"), server["pid"]):
                found.append(server)
    return sorted(found, key=lambda one: _port(one.get("base_url")) or 0)


def _alive(lock: Path, pid: Any) -> bool:
    """By the lock that a server holds while it lives, else by its process id."""
    import fcntl

    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        pass
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, TypeError, OverflowError):
        return False
    return True


def _port(url: Any) -> int | None:
    try:
        return urlsplit(str(url)).port
    except ValueError:
        return None


def _reachable(url: str) -> str:
    """A server that listens everywhere is asked on loopback."""
    return url.replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")
