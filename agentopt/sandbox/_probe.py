"""Does a tier hold? Asked of a real worker that really tries, because no version number tells.

A probe costs one worker start and a few system calls; its answer is kept for the life of the process.
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from agentopt.errors import AgentoptError
from agentopt.graph import Used
from agentopt.sandbox._limits import Limits
from agentopt.sandbox._runner import WorkerRunner
from agentopt.sandbox._tiers import Tier

_TRIES = """
def probe(secret, folder, port, home):
    done = []

    def attempt(what, work):
        try:
            work()
        except Exception:
            return
        done.append(what)

    def fork():
        if os.fork() == 0:
            os._exit(0)

    attempt("it reads files outside its folder", lambda: open(secret, encoding="utf-8").read())
    attempt("it writes outside its folder", lambda: open(folder + "/found", "w", encoding="utf-8").close())
    attempt("it uses the network", lambda: socket.create_connection(("127.0.0.1", port), 1.0))
    attempt("it lists the home folder", lambda: os.listdir(home))
    attempt("it starts threads", lambda: threading.Thread(target=int).start())
    attempt("it starts processes", fork)
    with open("kept", "w", encoding="utf-8") as file:
        file.write("x")
    return done
"""
_MODULES = ("os", "socket", "threading")


def probe(tier: Tier) -> str | None:
    """Run a worker of the tier and let it try to get out; say what it reached or what went wrong, None if it holds."""
    try:
        with (
            tempfile.TemporaryDirectory(prefix="agentopt-probe-") as folder,
            socket.create_server(("127.0.0.1", 0)) as server,
            WorkerRunner(Limits(seconds=20.0), tier=tier) as runner,
        ):
            secret = Path(folder) / "secret"
            secret.write_text("found", encoding="utf-8")
            uses = [Used(name, "module", name) for name in _MODULES]
            arguments: list[Any] = [str(secret), folder, server.getsockname()[1], os.path.expanduser("~")]
            reached: list[str] = runner.call(runner.compile(_TRIES, "probe", uses), arguments, {})
    except (AgentoptError, OSError) as error:
        return str(getattr(error, "detail", "") or error).partition("could not be started: ")[2] or str(error)
    return f"a worker was tried and {', '.join(reached)}" if reached else None
