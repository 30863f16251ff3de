"""Files of an adapter that are damaged, can run code, lead elsewhere, or change while they are looked at."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.serving.adapters import BaseFacts, check_adapter
from agentopt.serving.adapters import _check as check_module
from tests.serving.adapters.folders import adapter, assert_refused, base, raw

_HEADER = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()


@pytest.mark.parametrize(
    "make",
    [
        lambda path: raw(path, _HEADER, b"\0" * 4),
        lambda path: raw(path, _HEADER, b"\0" * 12),
        lambda path: raw(path, _HEADER, b"\0" * 8, length=1 << 40),
        lambda path: raw(path, _HEADER, b"\0" * 8, length=(1 << 64) - 1),
        lambda path: raw(path, b"{", b""),
        lambda path: raw(path, b"[]", b""),
        lambda path: raw(path, b'{"a": 1}', b""),
        lambda path: raw(path, b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"\0" * 4),
        lambda path: raw(path, b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}', b"\0" * 12),
        lambda path: raw(path, b'{"a": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}', b"\0" * 8),
        lambda path: raw(path, b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', b"\0" * 8),
        lambda path: raw(path, b"[" * 50_000, b""),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"1234567"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    folder = adapter(tmp_path / "bad")
    make(folder / "adapter_model.safetensors")
    assert_refused(folder, base(tmp_path / "base"), "no whole safetensors file")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 2000), at=st.integers(0, 2000), byte=st.integers(0, 255))
def test_no_damage_does_more_than_being_refused(tmp_path: Path, cut: int, at: int, byte: int) -> None:
    folder, where = tmp_path / "bad", tmp_path / "base"
    adapter(folder)
    known = BaseFacts.of(where, 8) if where.is_dir() else base(where)
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[at % len(content)] = byte
    file.write_bytes(content[: max(0, len(content) - cut)])
    try:
        facts = check_adapter(folder, known)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert facts.rank == 2


def test_an_adapter_with_a_pickle_inside_is_refused(tmp_path: Path) -> None:
    known = base(tmp_path / "base")
    for name in ("adapter_model.bin", "optimizer.pt", "deep/rng_state.pth", "x.PKL"):
        folder = adapter(tmp_path / name.replace("/", "-"))
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x80\x04.")
        assert_refused(folder, known, f"{name} may be a pickle, which can run code when loaded")


def test_a_pickle_by_another_name_is_refused(tmp_path: Path) -> None:
    known = base(tmp_path / "base")
    folder = adapter(tmp_path / "a")
    (folder / "notes.json").write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c")
    assert_refused(folder, known, "notes.json is a pickle")
    folder = adapter(tmp_path / "b")
    with zipfile.ZipFile(folder / "adapter_model.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02.")
    assert_refused(folder, known, "adapter_model.safetensors is a pickle")


def test_a_header_may_be_as_long_as_a_pickle_begins(tmp_path: Path) -> None:
    """0x0280 bytes: the file begins with the two bytes of a pickle of protocol 2."""
    folder = adapter(tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length <= 0x280
    header = content[8 : 8 + length] + b" " * (0x280 - length)
    raw(file, header, content[8 + length :])
    assert check_adapter(folder, base(tmp_path / "base")).rank == 2


def test_program_code_and_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    known = base(tmp_path / "base")
    folder = adapter(tmp_path / "a")
    (folder / "modeling.py").write_text("", encoding="utf-8")
    assert_refused(folder, known, "modeling.py is program code")
    folder = adapter(tmp_path / "b")
    (folder / "adapter_model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert_refused(folder, known, "adapter_model.safetensors is a link out of the folder")
    folder = adapter(tmp_path / "c")
    (folder / "etc").symlink_to("/etc")
    assert_refused(folder, known, "etc is a link out of the folder")
    folder = adapter(tmp_path / "d")
    os.mkfifo(folder / "pipe")
    assert_refused(folder, known, "pipe is no ordinary file")


def test_a_link_within_the_folder_is_no_harm(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "weights.safetensors")
    (folder / "adapter_model.safetensors").symlink_to("weights.safetensors")
    assert check_adapter(folder, base(tmp_path / "base")).rank == 2


def test_a_file_larger_than_the_bound_is_refused_unread(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(5 << 30)  # sparse
    assert_refused(folder, base(tmp_path / "base"), "expected at most")


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    known = base(tmp_path / "base")
    assert_refused(tmp_path / "nowhere", known, "no such folder")
    assert_refused(tmp_path / "base", known, "a whole model")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", known, "found no adapter_model.safetensors")
    folder = adapter(tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    assert_refused(folder, known, "found no adapter_config.json")
    assert_refused(Path("with\0nul"), known, "no such folder")


def test_weights_that_change_while_they_are_checked_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, weights = adapter(tmp_path / "good"), tmp_path / "good" / "adapter_model.safetensors"
    looks = check_module.is_finite

    def swapped(path: Path, tensor: Any) -> bool:
        fine = looks(path, tensor)
        times = weights.stat()
        weights.write_bytes(b"\0" * times.st_size)  # of the same size, and with its time set back
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
        monkeypatch.setattr(check_module, "is_finite", lambda *_: True)
        return fine

    monkeypatch.setattr(check_module, "is_finite", swapped)
    with pytest.raises(UserError, match="changed while it was checked"):
        check_adapter(folder, base(tmp_path / "base"))


def test_a_link_to_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "good")
    os.mkfifo(folder / "z-pipe")
    (folder / "a-link").symlink_to("z-pipe")
    with pytest.raises(UserError, match="no ordinary file"):
        check_adapter(folder, base(tmp_path / "base"))
