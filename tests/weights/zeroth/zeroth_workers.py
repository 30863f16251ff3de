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
    if spec["how"] == "hang":  # all have come: now nobody is waited for any longer
        exchange._timeout = 0.5
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


# ---- a small model in training; torch is imported inside, as most of the above needs none

BATCH, MICRO, WIDTH, CLASSES = 8, 4, 24, 6
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32", "mask": "small", "probe": {"population": 2}},
    "bfloat16": {"dtype": "bfloat16", "mask": "random", "method": "adam", "lr": 1e-3, "weight_decay": 0.01},
    "per example": {"dtype": "float32", "probe": {"per_example": True, "normalize": "std"}, "lr": 1e-2},
}


def optimizer_of(name: str, exchange: Any = None) -> Any:
    """One of the settings with a fresh model, the same in every process."""
    import torch

    from agentopt.weights.zeroth._optimizer import ZerothOrder
    from agentopt.weights.zeroth._types import Probe

    torch.set_num_threads(1)
    settings: dict[str, Any] = {"lr": 1e-2, "seed": 11, **SETTINGS[name]}
    dtype, probe = settings.pop("dtype"), Probe(**settings.pop("probe", {}))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, last = torch.nn.Linear(WIDTH, 40, bias=False), torch.nn.Linear(40, CLASSES)
        model = torch.nn.Sequential(first, torch.nn.Tanh(), last)
    return ZerothOrder(model.to(getattr(torch, dtype)), probe=probe, exchange=exchange, **settings)


class Losses:
    """One loss per example of this worker's share of a step's batch, four examples at a time whoever has them."""

    def __init__(self, step: int, rank: int = 0, world: int = 1) -> None:
        import torch

        generator = torch.Generator().manual_seed(1000 + step)
        rows = torch.randn(BATCH, WIDTH, generator=generator)
        share = BATCH // world
        self.rows = rows[rank * share : (rank + 1) * share]
        self.labels = (self.rows[:, :CLASSES]).argmax(1)
        self.pass_sizes = [MICRO] * (share // MICRO)

    def __call__(self, model: Any) -> Any:
        import torch

        dtype = next(model.parameters()).dtype
        losses = [
            torch.nn.functional.cross_entropy(model(rows.to(dtype)).float(), labels, reduction="none")
            for rows, labels in zip(self.rows.split(MICRO), self.labels.split(MICRO), strict=True)
        ]
        return torch.cat(losses)


def weights_of(optimizer: Any) -> str:
    """Fingerprint of weights and optimizer state."""
    from agentopt.weights.zeroth._fingerprint import fingerprint

    return fingerprint([*optimizer.model.named_parameters(), *optimizer.state().items()])


def train(spec: dict[str, Any], exchange: Any) -> dict[str, Any]:
    """Every setting in turn, each worker with its share of the batch."""
    from agentopt.weights.zeroth._exchange import verify

    found: dict[str, Any] = {}
    for name in spec["settings"]:
        optimizer = optimizer_of(name, exchange)
        before, sent = weights_of(optimizer), exchange.sent_bytes
        losses = [
            optimizer.step(Losses(step, exchange.rank, exchange.world)).loss.hex() for step in range(spec["steps"])
        ]
        used = (exchange.sent_bytes - sent) / spec["steps"]
        verify(exchange, weights_of(optimizer))
        assert weights_of(optimizer) != before
        found[name] = {"weights": weights_of(optimizer), "losses": losses, "bytes": used}
    return found
