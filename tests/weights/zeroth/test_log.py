"""The log of a run: what it holds, what a crash leaves, what damage does, and who may use it."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.errors import RunError, UserError
from agentopt.weights.zeroth import _log
from agentopt.weights.zeroth._fingerprint import fingerprint, names_fingerprint
from agentopt.weights.zeroth._log import Log, Record, rounded
from agentopt.weights.zeroth._log_header import Header, pack_header
from agentopt.weights.zeroth._philox import probe_seed
from agentopt.weights.zeroth._replay import replay, resume

HEADER = Header(
    base="b" * 32,
    k=2,
    method="sgd",
    eps=1e-3,
    mask="small",
    density=0.5,
    mask_update="fixed",
    lr=1e-6,
    schedule={"kind": "constant", "warmup": 0, "total": None},
    seed=7,
    weight_decay=0.0,
    threads=1,
    torch="2.13.0",
    dtype="float32",
    names="n" * 32,
    probe={"kind": "rademacher", "sides": 2},
    copies=2,
    device="cpu",
)
SIZE = 16 + 4 * HEADER.k
START = len(pack_header(HEADER))


def add(log: Log, steps: int) -> list[Record]:
    first = len(log)
    return [
        log.append(step, probe_seed(7, step), 1e-6 * (step + 1), [step + 0.1, -step / 3])
        for step in range(first, first + steps)
    ]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Five steps."""
    with Log.create(tmp_path / "steps.zo", HEADER) as log:
        add(log, 5)
    return log.path


def test_a_step_costs_16_bytes_and_4_per_coefficient_and_comes_back_as_float32(tmp_path: Path) -> None:
    with Log.create(tmp_path / "new" / "steps.zo", HEADER) as log:
        records = add(log, 3)
        assert records[1] == Record(1, probe_seed(7, 1), rounded([2e-6])[0], rounded([1.1, -1 / 3]))
        assert list(log.records()) == records
    assert log.path.stat().st_size == START + 3 * SIZE
    with Log.open(log.path, HEADER) as log:
        assert (len(log), log.torn, list(log.records(1))) == (3, 0, records[1:])
        records += add(log, 2)
    with Log.read(log.path) as log:
        assert log.header == HEADER
        assert list(log.records()) == records
        with pytest.raises(UserError, match="not open for writing"):
            add(log, 1)


def test_twenty_thousand_steps_of_one_direction_are_400_kilobytes(tmp_path: Path) -> None:
    header = replace(HEADER, k=1)
    with Log.create(tmp_path / "steps.zo", header) as log:
        for step in range(500):
            log.append(step, probe_seed(7, step), 1e-6, [0.5])
    assert log.path.stat().st_size - len(pack_header(header)) == 500 * 20


@pytest.mark.parametrize("left", range(1, SIZE))
def test_the_torn_last_record_of_a_killed_process_is_cut_off(written: Path, left: int) -> None:
    whole = written.read_bytes()
    written.write_bytes(whole[: START + 4 * SIZE + left])
    with Log.read(written) as log:
        assert (len(log), log.torn) == (4, left)
    with Log.open(written, HEADER) as log:
        assert len(log) == 4
        add(log, 1)
    assert written.read_bytes() == whole


@pytest.mark.parametrize("zeros", [SIZE - 5, SIZE, 3 * SIZE, 3 * SIZE + 5])
def test_zeros_where_a_power_cut_took_the_last_steps_are_cut_off(written: Path, zeros: int) -> None:
    whole = written.read_bytes()
    written.write_bytes(whole[:-zeros] + bytes(zeros))
    with Log.open(written, HEADER) as log:
        assert len(log) == 5 - -(-zeros // SIZE)
        add(log, 5 - len(log))
    assert written.read_bytes() == whole


@settings(max_examples=40)
@given(data=st.data())
def test_any_changed_bit_is_found_and_told_with_its_byte(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("log") / "steps.zo"
    with Log.create(path, HEADER) as log:
        add(log, 4)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(UserError) as found:
        Log.open(path, HEADER)
    if place >= START:
        step = (place - START) // SIZE
        assert f"damaged at byte {START + step * SIZE} (step {step})" in str(found.value)
        assert f"truncate -s {START + step * SIZE}" in str(found.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize("end", [0, 3, 12, START - 1])
def test_a_file_that_ends_within_its_header_holds_no_step_and_is_begun_anew(tmp_path: Path, end: int) -> None:
    path = tmp_path / "steps.zo"
    path.write_bytes(pack_header(HEADER)[:end])
    with pytest.raises(UserError, match="within its header"):
        Log.open(path, HEADER)
    with Log.resume(path, HEADER) as log:
        add(log, 1)
    with Log.resume(path, HEADER) as log:
        assert len(log) == 1


def test_a_header_whose_length_is_damaged_is_not_taken_for_one_that_was_cut_off(written: Path) -> None:
    content = bytearray(written.read_bytes())
    content[9] ^= 0x10  # 4096 bytes more than the file has
    written.write_bytes(content)
    with pytest.raises(UserError, match="within its header"):
        Log.resume(written, HEADER)
    assert written.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "c" * 32}, r"base model: the log was written with b+, this run has c+; resume from the very weights"),
        ({"k": 3}, "k: the log was written with 2, this run has 3"),
        ({"threads": 4}, r"thread count: .* 1, this run has 4; call torch.set_num_threads\(1\)"),
        ({"torch": "2.14.0"}, r"torch version: .* 2.13.0, this run has 2.14.0; install torch==2.13.0"),
        ({"eps": 1e-2}, "eps: .* 0.001, this run has 0.01"),
        ({"seed": 8}, "seed: .* 7, this run has 8"),
        ({"names": "m"}, "tuned weights: .*tune the same weights"),
        ({"probe": {"kind": "rademacher", "sides": 1}}, "probe.sides: .* 2, this run has 1"),
        ({"schedule": {"kind": "linear", "warmup": 0, "total": 9}}, "schedule.kind: .* constant, this run has linear"),
        ({"base": "c", "torch": "2.14.0", "threads": 4}, "base model"),
    ],
)
def test_a_log_of_another_run_is_refused_by_the_first_field(written: Path, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Log.open(written, replace(HEADER, **change))


def test_who_only_replays_may_ignore_what_only_a_measurement_depends_on(written: Path) -> None:
    other = replace(HEADER, threads=8, torch="2.14.0", device="cuda")
    with Log.read(written, other, ignore=("threads", "torch", "device")) as log:
        assert len(log) == 5
    with pytest.raises(UserError, match="device"):
        Log.read(written, other, ignore=("threads", "torch"))


def test_what_is_no_log_or_a_later_one_is_told(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("step 1, loss 2")
    with pytest.raises(UserError, match="not a log of zeroth-order steps"):
        Log.read(text)
    with pytest.raises(UserError, match="not a log"):
        Log.resume(text, HEADER)
    assert text.read_text() == "step 1, loss 2"
    with pytest.raises(UserError, match="no such log"):
        Log.read(tmp_path / "none.zo")
    with pytest.raises(UserError, match="cannot be opened as a log"):
        Log.open(tmp_path, HEADER)
    with pytest.raises(UserError, match=r"found a log of 120 bytes of steps, expected no file"):
        Log.create(written, HEADER)
    monkeypatch.setattr("agentopt.weights.zeroth._log_header.VERSION", 2)
    later = pack_header(HEADER)
    monkeypatch.undo()
    written.write_bytes(later)
    with pytest.raises(UserError, match="found log version 2, this agentopt reads 1; use a newer agentopt"):
        Log.open(written, HEADER)


def test_one_process_writes_and_others_read(written: Path) -> None:
    script = f"""
from pathlib import Path
from agentopt.errors import UserError
from agentopt.weights.zeroth._log import Log
with Log.read({str(written)!r}) as log:
    print(len(log))
    for begin in (Log.open, Log.create, Log.resume):
        try:
            begin({str(written)!r}, log.header)
        except UserError as error:
            print(error)
"""
    with Log.open(written, HEADER):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    told = done.stdout.splitlines()
    assert told[0] == "5"
    assert [line.partition(": ")[2] for line in told[1:]] == [
        "another run is writing this log; wait until it ends, or give another path."
    ] * 3
    with Log.open(written, HEADER) as log:
        assert len(log) == 5


def refuse(after: int) -> Callable[[int, bytes, int], int]:
    """A disk that takes `after` bytes and is then full."""
    left = [after]

    def pwrite(descriptor: int, data: bytes, place: int) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = real(descriptor, data[: left[0]], place)
        left[0] -= taken
        return taken

    real = os.pwrite
    return pwrite


@pytest.mark.parametrize("after", [0, 1, SIZE - 1])
def test_a_full_disk_loses_nothing(written: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    before = written.read_bytes()
    with Log.open(written, HEADER) as log:
        monkeypatch.setattr(_log.os, "pwrite", refuse(after))
        with pytest.raises(
            RunError, match=r"step 5 cannot be written: No space left on device\. Nothing is lost: .* 5"
        ):
            add(log, 1)
        monkeypatch.undo()
        assert written.read_bytes() == before
        add(log, 1)  # after room was made
        assert len(log) == 6


def test_a_short_write_is_completed(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    with Log.open(written, HEADER) as log:
        monkeypatch.setattr(_log.os, "pwrite", lambda descriptor, data, place: real(descriptor, data[:7], place))
        records = add(log, 2)
    with Log.read(written) as log:
        assert list(log.records(5)) == records


def test_a_write_that_cannot_be_taken_back_ends_the_log(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(descriptor: int, size: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Log.open(written, HEADER) as log:
        monkeypatch.setattr(_log.os, "pwrite", refuse(3))
        monkeypatch.setattr(_log.os, "ftruncate", stuck)
        with pytest.raises(RunError, match="No space left"):
            add(log, 1)
        monkeypatch.undo()
        with pytest.raises(RunError, match="open the log again"):
            add(log, 1)
    with Log.open(written, HEADER) as log:
        assert len(log) == 5


def test_a_header_that_finds_no_room_leaves_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log.os, "pwrite", refuse(10))
    with pytest.raises(RunError, match="its header cannot be written"):
        Log.create(tmp_path / "steps.zo", HEADER)
    monkeypatch.undo()
    Log.create(tmp_path / "steps.zo", HEADER).close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_a_coefficient_that_is_no_number_never_reaches_the_file(written: Path, value: float) -> None:
    before = written.read_bytes()
    with Log.open(written, HEADER) as log, pytest.raises(RunError, match=r"step 5 measured (nan|inf), expected finite"):
        log.append(5, probe_seed(7, 5), 1e-6, [0.5, value])
    assert written.read_bytes() == before


def test_steps_follow_each_other(written: Path) -> None:
    with Log.open(written, HEADER) as log:
        with pytest.raises(UserError, match=r"holds 5 steps, and step 0 .* replay the log before going on"):
            log.append(0, probe_seed(7, 0), 1e-6, [0.0, 0.0])
        with pytest.raises(ValueError, match="do not belong"):
            log.append(5, 1, 1e-6, [0.0, 0.0])
        with pytest.raises(ValueError, match="do not belong"):
            log.append(5, probe_seed(7, 5), 1e-6, [0.0])


class Counting:
    """An optimizer that remembers what it was told."""

    def __init__(self, step_number: int = 0) -> None:
        self.step_number = step_number
        self.told: list[Record] = []

    def update(self, step: int, seed: int, scalars: Any, lr: float) -> None:
        assert step == self.step_number
        self.told.append(Record(step, seed, lr, scalars))
        self.step_number += 1


def test_replay_applies_the_steps_in_order_from_where_the_weights_are(written: Path) -> None:
    with Log.read(written) as log:
        every = list(log.records())
        for first, upto in ((0, None), (0, 3), (2, None), (2, 2), (5, None)):
            optimizer = Counting(first)
            assert replay(optimizer, log, upto) == len(optimizer.told)
            assert optimizer.told == every[first : 5 if upto is None else upto]
        for optimizer, upto in ((Counting(), 6), (Counting(6), None), (Counting(3), 2)):
            with pytest.raises(UserError, match="holds 5 steps, expected at least"):
                replay(optimizer, log, upto)


def test_a_log_that_is_one_step_ahead_of_the_other_workers_is_cut(written: Path) -> None:
    class Other:
        rank, world = 0, 2

        def gather(self, values: Any) -> list[list[float]]:
            return [list(values), [4.0]]

        def close(self) -> None: ...

    with Log.open(written, HEADER) as log:
        optimizer = Counting()
        assert resume(optimizer, log, Other()) == 4 == len(log)
    assert written.stat().st_size == START + 4 * SIZE


def test_damage_that_comes_while_it_is_read_is_found(written: Path) -> None:
    with Log.read(written) as log:
        content = bytearray(written.read_bytes())
        content[START + 2 * SIZE + 20] ^= 1
        written.write_bytes(content)
        with pytest.raises(UserError, match=f"damaged at byte {START + 2 * SIZE}"):
            list(log.records())


def test_a_fingerprint_is_of_names_formats_shapes_and_bits() -> None:
    import torch

    base = torch.arange(12, dtype=torch.float32)
    seen = {
        fingerprint([("w", tensor)])
        for tensor in (
            base,
            base.reshape(3, 4),
            base.reshape(3, 4).t(),
            base.to(torch.bfloat16),
            base.to(torch.float16),
            base.to(torch.int8),
            torch.where(base == 0, -0.0, base),
            base[:0],
            base[0],
        )
    }
    seen |= {fingerprint([("v", base)]), fingerprint([("w", base), ("v", base)]), fingerprint([])}
    assert len(seen) == 12
    grid = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    assert fingerprint([("w", grid[:, ::2])]) == fingerprint([("w", grid[:, ::2].clone())])
    assert fingerprint([("w", torch.nn.Parameter(base))]) == fingerprint([("w", base)])


def test_long_tensors_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    tensor = torch.arange(1001, dtype=torch.float16)
    whole = fingerprint([("w", tensor)])
    monkeypatch.setattr("agentopt.weights.zeroth._fingerprint._CHUNK", 64)
    assert fingerprint([("w", tensor)]) == whole


def test_names_are_told_apart() -> None:
    assert len({names_fingerprint(names) for names in (["a", "b"], ["ab"], ["b", "a"], [])}) == 4


def test_the_file_can_be_read_with_nothing_but_its_description(written: Path) -> None:
    """Step, learning rate and coefficients stand there plainly; the seed follows from the header."""
    data = written.read_bytes()[START + 3 * SIZE :]
    step, _, lr, *scalars = struct.unpack_from("<IQf2f", data)
    assert (step, lr, tuple(scalars)) == (3, rounded([4e-6])[0], rounded([3.1, -1.0]))
