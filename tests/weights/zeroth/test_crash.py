"""Kill -9 and replay, and two processes instead of one: the same weights, bit for bit, in 32 and in 16 bits."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import RunError, UserError
from agentopt.weights.zeroth._exchange import Alone, SocketExchange, WorkerLost
from agentopt.weights.zeroth._executor import run_local
from agentopt.weights.zeroth._log import Log
from agentopt.weights.zeroth._log_header import header_of
from agentopt.weights.zeroth._replay import log_to

HERE = Path(__file__).parent
STEPS = 20


@pytest.fixture(scope="module")
def workers() -> Iterator[Any]:
    """The module that workers run, importable by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        yield importlib.import_module("zeroth_workers")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `zeroth_crashing.py` says of runs that it killed."""
    folder = tmp_path_factory.mktemp("crash")
    command = [sys.executable, str(HERE / "zeroth_crashing.py"), str(folder), str(STEPS), "float32", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_killed_run_goes_on_to_the_weights_of_an_uninterrupted_one(report: dict[str, Any], name: str) -> None:
    found = report[name]
    assert len(found["sizes"]) >= 2
    assert found["resumed"] == found["uninterrupted"] != found["begun"]
    assert found["same_log"]


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_base_and_log_give_the_weights_without_a_forward_pass(report: dict[str, Any], name: str) -> None:
    assert report[name]["replayed"] == report[name]["uninterrupted"]


def test_two_processes_equal_one_with_the_union_of_their_examples(workers: Any) -> None:
    spec = {"settings": list(workers.SETTINGS), "steps": 4}
    alone = workers.train(spec, Alone())
    shared = run_local("zeroth_workers:train", spec, 2)
    for name in workers.SETTINGS:
        for one in shared:
            assert one.value[name]["weights"] == alone[name]["weights"]
            assert one.value[name]["losses"] == alone[name]["losses"]
    # Two variants of four examples each: 64 bytes of losses and 9 of frame.
    assert shared[1].value["bfloat16"]["bytes"] == 73


def test_a_log_goes_on_only_from_its_own_base_and_settings(workers: Any, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "steps.zo"
    first = workers.optimizer_of("float32")
    assert log_to(first, path) == 0
    for step in range(3):
        first.step(workers.Losses(step))
    with pytest.raises(UserError, match="has made 3 steps, expected a fresh one"):
        header_of(first)
    with pytest.raises(UserError, match="another run is writing this log"):
        log_to(workers.optimizer_of("float32"), path)
    first.log.close()
    for change, message in (
        (lambda zo: zo.model[2].bias.data.add_(1e-6), "base model: the log was written with"),
        (lambda zo: setattr(zo, "eps", 1e-2), "eps: the log was written with 0.001, this run has 0.01"),
    ):
        other = workers.optimizer_of("float32")
        change(other)
        with pytest.raises(UserError, match=message):
            log_to(other, path)
    with pytest.raises(UserError, match="k: the log was written with 2, this run has 1"):
        log_to(workers.optimizer_of("bfloat16"), path, base=header_of(workers.optimizer_of("float32")).base)
    with pytest.raises(UserError, match="give k, the number of examples of a batch"):
        log_to(workers.optimizer_of("per example"), tmp_path / "other.zo")
    again = workers.optimizer_of("float32")
    torch.set_num_threads(2)
    try:
        with pytest.raises(UserError, match="thread count: the log was written with 1, this run has 2"):
            log_to(again, path)
    finally:
        torch.set_num_threads(1)
    assert log_to(again, path) == again.step_number == 3
    assert workers.weights_of(again) == workers.weights_of(first)
    again.log.close()


def test_a_full_disk_leaves_weights_and_log_at_the_same_step(
    workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zo = workers.optimizer_of("float32")
    log_to(zo, tmp_path / "steps.zo")
    zo.step(workers.Losses(0))
    before = workers.weights_of(zo)

    def full(descriptor: int, data: bytes, place: int) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("agentopt.weights.zeroth._log.os.pwrite", full)
        with pytest.raises(RunError, match=r"step 1 cannot be written: No space left on device\. Nothing is lost"):
            zo.step(workers.Losses(1))
    assert workers.weights_of(zo) == before
    assert (zo.step_number, len(zo.log)) == (1, 1)
    zo.step(workers.Losses(1))
    zo.log.close()
    other = workers.optimizer_of("float32")
    with Log.read(tmp_path / "steps.zo", header_of(other)) as log:
        assert len(log) == 2


def test_workers_of_which_one_died_a_step_behind_go_on_together(
    workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*record: Any) -> None:
        raise KeyboardInterrupt

    def run(until: int, die_at: int | None = None) -> list[Any]:
        host = SocketExchange.host(2, timeout=60)
        optimizers = [workers.optimizer_of("bfloat16") for _ in range(2)]
        found: list[Any] = [None, None]

        def work(rank: int) -> None:
            exchange: Any = host
            if rank:
                exchange = SocketExchange.join(host.address, rank, host.token, world=2, timeout=60)
            zo = optimizers[rank]
            zo.exchange = exchange
            try:
                resumed = log_to(zo, tmp_path / f"{rank}.zo")
                while zo.step_number < until:
                    if rank and zo.step_number == die_at:
                        monkeypatch.setattr(zo.log, "append", die)
                    zo.step(workers.Losses(zo.step_number, rank, 2))
                found[rank] = resumed, workers.weights_of(zo)
            except (RunError, KeyboardInterrupt) as error:
                found[rank] = error
            finally:
                exchange.close()
                zo.log.close()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return found

    lost, died = run(6, die_at=3)
    assert isinstance(lost, WorkerLost)
    assert isinstance(died, KeyboardInterrupt)
    sizes = [(tmp_path / f"{rank}.zo").stat().st_size for rank in range(2)]
    assert sizes[0] - sizes[1] == 20  # rank 0 has logged the step that rank 1 has not
    whole = workers.train({"settings": ["bfloat16"], "steps": 6}, Alone())["bfloat16"]["weights"]
    assert run(6) == [(3, whole), (3, whole)]
    assert (tmp_path / "0.zo").read_bytes() == (tmp_path / "1.zo").read_bytes()
