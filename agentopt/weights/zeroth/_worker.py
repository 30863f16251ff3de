"""The process of one data-parallel worker: told its job as one JSON line, it runs a function and writes what it gave.

    python -m agentopt.weights.zeroth._worker < job      (`_executor` starts it)

The function is named `module:function` and is called with the job's spec and this worker's exchange; spec and result
are JSON. Standard input stays open for as long as whoever started this process lives: at its end the worker ends too.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agentopt.errors import AgentoptError, UserError
from agentopt.weights.zeroth._exchange import Alone, SocketExchange, WorkerLost

Target = Callable[[Any, Any], Any]


def main() -> int:
    """Do the job; the exit code is that of the error, if there is one."""
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    listener = None if job["listen"] is None else socket.socket(fileno=job["listen"])
    answer = run(job, listener)
    place = Path(job["answer"])
    part = place.with_suffix(".part")
    part.write_text(json.dumps(answer), encoding="utf-8")
    part.replace(place)
    error = answer.get("error")
    if error is None:
        return 0
    print(error["trace"] or error["text"], file=sys.stderr, flush=True)  # noqa: T201
    return int(error["exit_code"])


def run(job: Mapping[str, Any], listener: socket.socket | None) -> dict[str, Any]:
    """The function's result, or its error, as JSON; rank 0 of several listens on `listener`."""
    exchange: Any = None
    try:
        target = find(job["target"], job["path"])
        exchange = _exchange(job, listener)
        result = target(job["spec"], exchange)
        return {"result": _json(result, job["target"]), "sent_bytes": exchange.sent_bytes}
    except Exception as error:  # noqa: BLE001  (whatever the function raises is told to the others and to the starter)
        said = _told(error)
        if exchange is not None:
            exchange.abort(said["text"])
        return {"error": said}
    finally:
        if exchange is not None:
            exchange.close()


def find(name: str, path: list[str]) -> Target:
    """The function `module:function`.

    Raises:
        UserError: there is none.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise UserError(f"worker: found {name!r}, expected module:function.")
    sys.path += [entry for entry in path if entry not in sys.path]
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"worker: {name!r}: there is no module {error.name!r} to import.") from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UserError(f"worker: {name!r}: module {module} has no function {attribute}.")
    return found


def _exchange(job: Mapping[str, Any], listener: socket.socket | None) -> Alone | SocketExchange:
    world, rank, timeout = int(job["world"]), int(job["rank"]), float(job["timeout"])
    if world == 1:
        return Alone()
    if listener is not None:
        return SocketExchange.host(world, token=job["token"], listener=listener, timeout=timeout)
    return SocketExchange.join(job["address"], rank, job["token"], world=world, timeout=timeout)


def _json(result: Any, name: str) -> Any:
    try:
        return json.loads(json.dumps(result))
    except (TypeError, ValueError) as error:
        raise UserError(f"worker: {name} gave a result that JSON does not hold ({error}).") from error


def _told(error: Exception) -> dict[str, Any]:
    ours = isinstance(error, AgentoptError)
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return {
        "text": str(error) if ours else f"{type(error).__name__}: {first}",
        "exit_code": error.exit_code if ours else 1,
        "lost": error.rank if isinstance(error, WorkerLost) else None,
        "trace": "" if ours else "".join(traceback.format_exception(error)),
    }


def _end_with_parent() -> None:
    while os.read(0, 1 << 10):  # past Python's buffer, whose lock would be held when the interpreter ends
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
