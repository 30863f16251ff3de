"""Ctrl-C while torch reads a tensor comes out as an error of torch's; it is an interrupt all the same."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentopt.cli import _quantize


@pytest.fixture(autouse=True)
def a_terminals_interrupts() -> Iterator[None]:
    """The tests may run in the background, where Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def lost(*_: object) -> None:
    """What happened inside `get_tensor`: the interrupt's own exception is gone."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape of object type") from None


def test_a_lost_interrupt_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_quantize, "_result", lost)
    values = {"model": str(tmp_path), "out": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as ended:
        _quantize.quantize_command(values, tensors=False, config=None, as_json=False, quiet=True)
    assert ended.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_without_an_interrupt_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(_quantize, "_result", fails)
    values = {"model": str(tmp_path), "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="a defect"):
        _quantize.quantize_command(values, tensors=False, config=None, as_json=False, quiet=True)
