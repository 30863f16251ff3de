"""What the tests' worker processes run; imported by name, so nothing here is a test."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from agentopt.errors import UserError


def add(spec: dict[str, Any], exchange: Any) -> dict[str, Any]:
    """Exchange a few rounds of numbers."""
    rounds: list[Any] = []
    for number in range(spec["rounds"]):
        rounds.append(exchange.gather([exchange.rank + number / 8, float(exchange.world)]))
    print(f"worker {exchange.rank} is through")
    return {"rank": exchange.rank, "rounds": rounds, "pid": os.getpid()}


def fail(spec: dict[str, Any], exchange: Any) -> None:
    """The worker `who` fails in some way at its second round."""
    Path(spec["folder"], f"pid-{exchange.rank}").write_text(str(os.getpid()), encoding="utf-8")
    exchange.gather([1.0])
    if exchange.rank == spec["who"]:
        how = spec["how"]
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raise":
            raise ValueError("a loss of the wrong shape")
        if how == "user":
            raise UserError("the data have no labels.")
        if how == "exit":
            print("native code gave up", file=sys.stderr, flush=True)
            os._exit(3)
        if how == "hang":
            time.sleep(600)
        if how == "early":
            return
    exchange.gather([2.0])


def wait(spec: dict[str, Any], exchange: Any) -> None:
    """Say who this is, then do nothing for long."""
    exchange.gather([0.0])
    Path(spec["folder"], f"pid-{exchange.rank}").write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(600)


def bad_result(spec: dict[str, Any], exchange: Any) -> Any:
    return object()
