"""The command line as processes of their own, without a second of imports for each.

One process imports agentopt and forks for every command. A fork has its own folder, environment, standard streams and
exit code, as a command that was started has; only the imports are done before. `main` of the program runs at the end
of this file, so that the interpreter also ends as it always does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Done = subprocess.CompletedProcess[str]
Send = tuple[signal.Signals, Callable[[], bool]]
"""A signal for a command, and when."""
Run = Callable[..., Done]
"""One command of the program: its arguments, and `send=` for a signal."""


class WarmCommands:
    """Starts commands one after another; `close` ends the process that forks them."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        data: bytes,
        timeout: float,
        send: Send | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """One command; after `timeout` seconds it is killed and its exit code is that of the signal.

        Args:
            arguments: of the program.
            folder: it runs in.
            environment: all of it.
            data: on its stdin.
            timeout: in seconds.
            send: a signal that it is sent as soon as something is true.
        """
        with tempfile.TemporaryDirectory() as streams:
            Path(streams, "0").write_bytes(data)
            asked = {
                "arguments": list(arguments),
                "folder": str(folder),
                "environment": dict(environment),
                "streams": streams,
                "timeout": round(timeout),
            }
            if send is not None:
                threading.Thread(target=send_when, args=(Path(streams, "pid"), *send, timeout), daemon=True).start()
            code = self._code(json.dumps(asked).encode() + b"\n")
            out, err = (Path(streams, name).read_bytes() for name in ("1", "2"))
        return subprocess.CompletedProcess(list(arguments), code, out, err)

    def command(self, name: str, folder: Path, environment: Mapping[str, str], timeout: float = 240) -> Run:
        """What runs one of the program's commands in this folder and gives its output as text."""

        def run(*arguments: str, send: Send | None = None) -> Done:
            done = self.run([name, *arguments], folder, environment, b"", timeout, send)
            return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

        return run

    def import_once(self, *modules: str) -> None:
        """Have these imported before any command from now on, as long as that starts no thread: a fork has only one."""
        self._code(json.dumps({"import": modules}).encode() + b"\n")

    def _code(self, line: bytes) -> int:
        if self._process is None:
            environment = {
                **os.environ,
                "COLUMNS": "80",
                "NO_COLOR": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
            command = [sys.executable, __file__]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            return int(process.stdout.readline())
        except BaseException:  # a test that was stopped here leaves an answer behind that is not the next test's
            process.kill()
            self.close()
            raise

    def close(self) -> None:
        """No more commands."""
        if self._process is not None:
            self._process.communicate(timeout=60)
            self._process = None


def send_when(file: Path, number: signal.Signals, ready: Callable[[], bool], timeout: float) -> None:
    """Send a signal to the process whose id the file gets, when it is time."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and not ready():
        time.sleep(0.01)
    with contextlib.suppress(OSError, ValueError):  # the command has ended before
        os.kill(int(file.read_text(encoding="utf-8")), number)


def serve() -> bool:
    """Fork for every line on stdin; True in a fork, which goes on as the command, and False when there are no more."""
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        if "import" in asked:
            for module in asked["import"]:
                importlib.import_module(module)
            gc.collect()  # not frozen: Triton's bindings count what is left at the end, and frozen is left
            print(0, flush=True)
            continue
        child = os.fork()
        if child == 0:
            become(asked)
            return True
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return False


def become(asked: dict[str, object]) -> None:
    """Take the folder, environment, streams and arguments of the command that was asked for."""
    signal.alarm(int(str(asked["timeout"])))
    # As in a terminal: tests that run in the background are started with Ctrl-C ignored, and so would the command be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Path(f"{asked['streams']}/pid").write_text(str(os.getpid()), encoding="utf-8")
    for number, flags in enumerate((os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)):
        opened = os.open(f"{asked['streams']}/{number}", flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    # Bytes read ahead from the old stdin must not be seen.
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    os.chdir(str(asked["folder"]))
    os.environ.clear()
    os.environ.update(asked["environment"])  # pyright: ignore[reportArgumentType, reportCallIssue]
    sys.path[0] = str(asked["folder"])
    sys.argv = ["agentopt", *asked["arguments"]]  # pyright: ignore[reportGeneralTypeIssues]


def import_everything() -> None:
    """What commands import: most of it by one that runs here, as the command line imports nothing before it must."""
    app = importlib.import_module("agentopt.cli._app").app
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with tempfile.NamedTemporaryFile() as text, contextlib.redirect_stdout(stdout):
        text.write(b"Something to count, so that the default vocabulary is loaded.")
        text.flush()
        app(args=["capsule", text.name, "-b", "20", "-q"], standalone_mode=False)
    for name in ("_doctor", "_evaluate", "_runs", "_trace", "_tune"):
        importlib.import_module(f"agentopt.cli.{name}")
    gc.collect()
    gc.freeze()  # forks need not look at all of it again


if __name__ == "__main__":
    from agentopt.cli import main

    import_everything()
    if serve():
        main()
