"""Workers that exchange losses: order and bits, bytes on the wire, and all the ways in which one can be lost."""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import RunError, UserError
from agentopt.weights.zeroth import _frames
from agentopt.weights.zeroth._exchange import Alone, SocketExchange, WorkerLost, verify
from agentopt.weights.zeroth._executor import run_local
from agentopt.weights.zeroth._types import Exchange

SECONDS = 0.3
"""Patience of the tests in which somebody hangs."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def star(stack: ExitStack, world: int, timeout: float = 60.0) -> list[SocketExchange]:
    """Every rank of a run, in this process."""
    host = SocketExchange.host(world, timeout=timeout)
    members: list[SocketExchange] = [host, *[host] * (world - 1)]

    def join(rank: int) -> None:
        members[rank] = SocketExchange.join(host.address, rank, host.token, world=world, timeout=timeout)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world - 1, 0, -1)]
    for thread in threads:
        thread.start()
    host.wait()
    for thread in threads:
        thread.join()
    for member in members:
        stack.callback(member.close)
    return members


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each call gave or raised."""
    found: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            found[number] = calls[number]()
        except RunError as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def gathering(exchange: Exchange, *values: float) -> Callable[[], Any]:
    return lambda: exchange.gather(values)


def test_everybody_gets_the_same_bits_in_the_order_of_ranks(stack: ExitStack) -> None:
    members = star(stack, 3)
    values = [[0.1, -0.0], [], [math.pi, float("inf"), 5e-324]]
    for _ in range(3):
        found = at_once([gathering(one, *mine) for one, mine in zip(members, values, strict=True)])
        for each in found:
            assert [struct.pack(f"{len(part)}d", *part) for part in each] == [
                struct.pack(f"{len(part)}d", *part) for part in values
            ]
    assert [member.rounds for member in members] == [3, 3, 3]
    nan = at_once([gathering(one, float("nan")) for one in members])
    assert all(math.isnan(part[0]) for each in nan for part in each)


def test_long_rounds_of_per_example_losses(stack: ExitStack) -> None:
    members = star(stack, 2)
    values = [[rank + number / 7 for number in range(40_000)] for rank in range(2)]
    assert at_once([gathering(one, *mine) for one, mine in zip(members, values, strict=True)]) == [values, values]


def test_a_step_of_mean_losses_costs_fewer_than_100_bytes_a_worker(stack: ExitStack) -> None:
    members = star(stack, 4)
    before = [(one.sent_bytes, one.received_bytes) for one in members]
    for _ in range(10):
        at_once([gathering(one, 0.5, 0.25) for one in members])
    for one, (sent, received) in zip(members[1:], before[1:], strict=True):
        assert (one.sent_bytes - sent) / 10 == 25
        assert (one.received_bytes - received) / 10 == 89
    assert members[0].sent_bytes - before[0][0] == 3 * 890


def test_alone() -> None:
    alone = Alone()
    assert alone.gather([1, 2.5]) == [[1.0, 2.5]]
    verify(alone, "abc")
    alone.abort("why")
    alone.close()
    assert (alone.rank, alone.world, alone.sent_bytes) == (0, 1, 0)


def test_weights_that_differ_are_found_and_the_worker_named(stack: ExitStack) -> None:
    members = star(stack, 3)
    assert at_once([lambda one=one: verify(one, "f" * 32) for one in members]) == [None] * 3
    prints = ["f" * 32, "f" * 32, "e" * 32]
    for error in at_once(
        [lambda one=one, mine=mine: verify(one, mine) for one, mine in zip(members, prints, strict=True)]
    ):
        assert "worker 2: weights differ from those of worker 0" in str(error)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_worker_that_dies_ends_the_others_and_is_named(stack: ExitStack, lost: int) -> None:
    members = star(stack, 3)
    at_once([gathering(one, 1.0) for one in members])
    members[lost].close()
    left = [one for one in members if one.rank != lost]
    for error in at_once([gathering(one, 1.0) for one in left]):
        assert isinstance(error, WorkerLost)
        assert error.rank == lost
        assert f"worker {lost} hung up in exchange 2: its process ended; no worker went on" in str(error)
    for one in members:
        with pytest.raises(RunError, match="it was closed"):
            one.gather([1.0])


def test_a_worker_that_comes_late_to_the_failure_is_still_told_who_it_was(stack: ExitStack) -> None:
    members = star(stack, 3)
    members[1].close()
    for one in (members[0], members[2]):  # worker 2 only asks when rank 0 has long gone
        with pytest.raises(WorkerLost, match="worker 1 hung up"):
            one.gather([1.0])


def test_a_worker_that_hangs_is_named_after_the_timeout(stack: ExitStack) -> None:
    members = star(stack, 3)
    members[0]._timeout = SECONDS
    before = members[2].sent_bytes

    def last() -> Any:
        until(lambda: members[2].sent_bytes > before)
        return members[0].gather([1.0])

    for error in at_once([last, gathering(members[2], 1.0)]):
        assert isinstance(error, WorkerLost)
        assert error.rank == 1
        assert f"worker 1 gave no answer within {SECONDS:g} s in exchange 1" in str(error)


def test_a_rank_0_that_hangs_is_named_too(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    members = star(stack, 2)
    members[1]._timeout = SECONDS
    monkeypatch.setattr("agentopt.weights.zeroth._exchange_member._GRACE_SECONDS", 0.1)
    with pytest.raises(WorkerLost, match=r"worker 0 gave no answer within 0.7 s in exchange 1"):
        members[1].gather([1.0])


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_is_told_to_all_with_its_reason(stack: ExitStack, failing: int) -> None:
    members = star(stack, 3)
    members[failing].abort("the loss of example 3 is nan")
    for error in at_once([gathering(one, 1.0) for one in members if one.rank != failing]):
        assert isinstance(error, WorkerLost)
        assert error.rank == failing
        assert f"worker {failing} failed: the loss of example 3 is nan" in str(error)


def test_a_worker_of_another_round_is_refused(stack: ExitStack) -> None:
    members = star(stack, 2)
    members[1].rounds = 4
    for error in at_once([gathering(one, 1.0) for one in members]):
        assert "worker 1 sent what does not belong to exchange 1 (exchange 5)" in str(error)


def test_strangers_and_half_open_connections_do_not_keep_a_run_from_starting(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentopt.weights.zeroth._exchange_host._GREETING_SECONDS", 0.2)
    host = SocketExchange.host(3, token="right", timeout=60)
    stack.callback(host.close)
    name, port = host.address.split(":")

    def call(said: bytes) -> socket.socket:
        link = socket.create_connection((name, int(port)))
        stack.callback(link.close)
        link.sendall(said)
        return link

    silent, noise = call(b""), call(b"GET / HTTP/1.1\r\n\r\n")
    half = call(_frames.HEAD.pack(_frames.HELLO, 400) + b'{"token":')
    long = call(_frames.HEAD.pack(_frames.HELLO, 1 << 30))
    odd = call(_frames.HEAD.pack(_frames.HELLO, 2) + b"[]")
    call(b"").close()
    waiting = threading.Thread(target=host.wait)
    waiting.start()
    for link in (silent, noise, half, long, odd):
        link.settimeout(60)
        kind, length = _frames.HEAD.unpack(link.recv(_frames.HEAD.size))
        assert kind == _frames.REFUSED
        assert link.recv(length).decode() in ("no greeting came", "that was no greeting")
    monkeypatch.setattr("agentopt.weights.zeroth._exchange_host._GREETING_SECONDS", 60)
    ours = SocketExchange.join(host.address, 1, "right", world=3)
    stack.callback(ours.close)
    for rank, token, world, message in (
        (2, "wrong", 3, "its token is not the one of this run"),
        (1, "right", 3, "rank 1 has joined already"),
        (2, "right", 4, "it is rank 2 of 4, expected one of 1 to 2 of 3"),
    ):
        with pytest.raises(UserError, match=f"refused worker {rank}: {message}"):
            SocketExchange.join(host.address, rank, token, world=world)
    last = SocketExchange.join(host.address, 2, "right", world=3)
    stack.callback(last.close)
    waiting.join(60)
    assert host.refused >= 8
    assert at_once([gathering(one, float(one.rank)) for one in (host, ours, last)]) == [[[0.0], [1.0], [2.0]]] * 3
    with pytest.raises(RunError, match="does not answer"):  # nobody is taken in any more
        SocketExchange.join(host.address, 1, "right", world=3, timeout=SECONDS)


def test_a_worker_that_never_comes_is_named(stack: ExitStack) -> None:
    host = SocketExchange.host(3, timeout=SECONDS)
    stack.callback(host.close)
    join = lambda: SocketExchange.join(host.address, 1, host.token, world=3)  # noqa: E731

    def first() -> Any:
        until(lambda: bool(select.select([host._listener], [], [], 0)[0]))
        return host.gather([1.0])

    missing, joined = at_once([first, join])
    assert isinstance(missing, WorkerLost)
    assert f"worker 2 did not join at {host.address} within {SECONDS:g} s" in str(missing)
    stack.callback(joined.close)
    with pytest.raises(WorkerLost, match="worker 2 did not join"):
        joined.gather([1.0])


def test_what_is_no_place_or_no_rank_is_told(stack: ExitStack) -> None:
    for address in ("nowhere", "host:", ":5", "host:99999"):
        with pytest.raises(UserError, match="expected HOST:PORT"):
            SocketExchange.join(address, 1, "t", world=2)
    with pytest.raises(UserError, match="found 2, expected 1 to 1 in a world of 2"):
        SocketExchange.join("127.0.0.1:1", 2, "t", world=2)
    with pytest.raises(UserError, match="found 1, expected at least 2"):
        SocketExchange.host(1)
    with pytest.raises(UserError, match=r"port: found 70000, expected 0 to 65535"):
        SocketExchange.host(2, 70000)
    everywhere = SocketExchange.host(2, bind="0.0.0.0")
    stack.callback(everywhere.close)
    assert everywhere.address.startswith(f"{socket.gethostname()}:")
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    place = f"127.0.0.1:{listener.getsockname()[1]}"

    def answer() -> None:
        link, _ = listener.accept()
        link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        link.close()

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(RunError, match=f"what listens at {place} does not answer as rank 0 of a run"):
        SocketExchange.join(place, 1, "t", world=2)
    thread.join()


# ---- processes


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `zeroth_workers.py` importable by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def alive(folder: Path) -> list[int]:
    pids = [int(path.read_text()) for path in folder.glob("pid-*")]
    assert pids
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.usefixtures("here")
def test_local_workers_give_their_results_in_the_order_of_ranks() -> None:
    lines: list[tuple[int, str]] = []
    found = run_local("zeroth_workers:add", {"rounds": 3}, 2, on_output=lambda rank, line: lines.append((rank, line)))
    expected = [[[number / 8, 2.0], [1 + number / 8, 2.0]] for number in range(3)]
    assert [one.value["rounds"] for one in found] == [expected, expected]
    assert [one.value["rank"] for one in found] == [0, 1]
    assert sorted(lines) == [(0, "worker 0 is through"), (1, "worker 1 is through")]
    assert found[1].sent_bytes < 3 * 30 + 150  # and a greeting
    assert not [one for one in found if Path(f"/proc/{one.value['pid']}").exists()]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("how", "who", "kind", "message"),
    [
        ("kill", 1, RunError, "worker 1 of 2 failed: killed by signal 9 .*out of memory"),
        ("exit", 0, RunError, "worker 0 of 2 failed: ended with exit code 3 and no result.*native code gave up"),
        ("raise", 1, RunError, "worker 1 of 2 failed: ValueError: a loss of the wrong shape"),
        ("user", 0, UserError, "^the data have no labels.$"),
        ("hang", 1, RunError, r"worker 1 gave no answer within 0\.5 s in exchange 2"),
        ("early", 1, RunError, "worker 1 hung up in exchange 2"),
    ],
)
def test_the_worker_that_failed_is_named_and_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, who: int, kind: type[Exception], message: str
) -> None:
    monkeypatch.setattr("agentopt.weights.zeroth._executor.GRACE_SECONDS", 0.5)
    spec = {"folder": str(tmp_path), "who": who, "how": how}
    with pytest.raises(kind, match=message) as found:
        run_local("zeroth_workers:fail", spec, 2, timeout=120)
    assert type(found.value) is kind
    assert not alive(tmp_path)


@pytest.mark.usefixtures("here")
def test_what_no_worker_can_run_is_told() -> None:
    for target, spec, world, message in (
        ("zeroth_workers", {}, 1, "expected module:function"),
        ("zeroth_workers:add", {"rounds": (1, 2)}, 1, "JSON does not keep"),
        ("zeroth_workers:add", {}, 0, "expected at least 1"),
        ("zeroth_workers:none", {}, 1, "module zeroth_workers has no function none"),
        ("not_a_module:run", {}, 1, "there is no module 'not_a_module'"),
        ("zeroth_workers:bad_result", {}, 1, "gave a result that JSON does not hold"),
    ):
        with pytest.raises(UserError, match=message):
            run_local(target, spec, world)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_when_the_starter_is_ended_so_are_all_workers(tmp_path: Path, number: signal.Signals) -> None:
    script = f"""
import signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background starts its children without it
from agentopt.weights.zeroth._executor import run_local
run_local("zeroth_workers:wait", {{"folder": {str(tmp_path)!r}}}, 2)
"""
    starter = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    until(lambda: len([path for path in tmp_path.glob("pid-*") if path.read_text()]) == 2)
    os.kill(starter.pid, number)
    _, told = starter.communicate(timeout=60)
    assert starter.returncode == -number
    assert ("KeyboardInterrupt" in told) == (number == signal.SIGINT)
    until(lambda: not alive(tmp_path))


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
