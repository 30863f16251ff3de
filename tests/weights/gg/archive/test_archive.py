"""A model in one file: what is kept, what is lost, what is refused, and what a crash leaves."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
import zlib
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from agentopt.errors import RunError, UserError
from agentopt.weights.gg import archive
from agentopt.weights.gg.archive import _container as container
from tests.weights.tiny import tiny_folder


class Source:
    """Tensors in memory."""

    name = "in memory"
    identity = ""

    def __init__(self, tensors: dict[str, Any], config: dict[str, Any] | None = None, files: Any = None) -> None:
        self.tensors, self.config, self._files = tensors, config or {}, files or {}
        self.names = tuple(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> Any:
        return self.tensors[name].dtype

    def read(self, name: str) -> Any:
        return self.tensors[name]

    def rows(self, name: str, start: int, stop: int) -> Any:
        return self.tensors[name][start:stop]

    def files(self) -> dict[str, bytes]:
        return self._files

    def close(self) -> None:
        pass


def normal(*shape: int, seed: int = 0, std: float = 0.02) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def several() -> Source:
    tensors = {
        "wide": normal(128, 96),
        "heavy": (normal(64, 48, seed=1, std=1) ** 3).to(torch.bfloat16),
        "half": normal(40, 40, seed=2).half(),
        "norm": torch.ones(96),
        "ids": torch.arange(12),
        "codes": (normal(64, 64, seed=3, std=20) + 128).clamp(0, 255).to(torch.uint8),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "flags": torch.tensor([True, False]),
    }
    return Source(tensors, {"model_type": "llama"}, {"tokenizer.json": b"abc" * 200, "deep/x.jinja": b"{{ x }}"})


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("packed") / "m.ggz"
    archive.pack(several(), path, sqnr=30)
    return path.read_bytes()


def same_bits(a: Any, b: Any) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    one, other = (x.reshape(-1).contiguous().view(torch.uint8) for x in (a, b))
    return bool(torch.equal(one, other))


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_lossless_keeps_every_bit(tmp_path: Path) -> None:
    source = several()
    source.tensors["odd"] = torch.tensor([[math.nan, math.inf, -0.0, 1e-42] * 500])
    source.names = tuple(source.tensors)
    result = archive.pack(source, tmp_path / "m.ggz", lossless=True)
    with archive.Archive(tmp_path / "m.ggz") as found:
        assert found.names == source.names
        for name in found.names:
            assert same_bits(found.read(name), source.tensors[name]), name
        assert found.config == source.config
        assert found.files() == source.files()
        assert found.verify() == len(source.names) + 3
    assert result.sqnr_db == math.inf
    assert all(one.step is None for one in result.tensors)


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool]


@given(
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from(["normal", "equal", "outlier"]),
    st.integers(0, 9),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lossless_of_any_tensor(tmp_path: Path, shape: list[int], dtype: Any, kind: str, seed: int) -> None:
    tensor = normal(*shape, seed=seed, std=50) if kind != "equal" else torch.full(shape, 7.25)
    if kind == "outlier" and tensor.numel():
        tensor.view(-1)[0] = 1e30 if dtype.is_floating_point else 100
    tensor = tensor.to(dtype)
    archive.pack(Source({"x": tensor}), tmp_path / "m.ggz", lossless=True)
    with archive.Archive(tmp_path / "m.ggz") as found:
        assert same_bits(found.read("x"), tensor)


@given(
    st.integers(1, 40),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.floats(1e-4, 1e3),
    st.sampled_from(["normal", "equal", "outlier", "sparse", "cubed", "offset"]),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_grid_is_off_by_half_a_step(tmp_path: Path, rows: int, dtype: Any, step: float, kind: str, seed: int) -> None:
    tensor = normal(rows, 64, seed=seed, std=1)
    tensor = {
        "normal": tensor,
        "equal": torch.full_like(tensor, 0.37),
        "outlier": tensor.index_put((torch.tensor(0), torch.tensor(5)), torch.tensor(6e4)),
        "sparse": tensor * (tensor > 1),
        "cubed": tensor**3,
        "offset": tensor * 0.01 + 5,
    }[kind].to(dtype)
    archive.pack(Source({"x": tensor}), tmp_path / "m.ggz", step=step)
    with archive.Archive(tmp_path / "m.ggz") as found:
        read, info = found.read("x", torch.float32), found.info("x")
        assert (found.read("x").dtype, found.read("x").shape) == (dtype, tensor.shape)
        if rows * 64 < 1024 or info.step is None:
            assert same_bits(found.read("x"), tensor)
            return
    off = (read.double() - tensor.double()).abs()
    assert info.step == step
    assert bool((off <= step * 0.501 + tensor.double().abs() * 2**-24).all())
    assert bool((read[tensor == 0] == 0).all())
    if kind == "cubed":
        assert bool(torch.equal(read, (torch.round(tensor.double() / step) * step).float()))


@pytest.mark.parametrize("target", [15.0, 30.0, 42.0, 60.0])
@pytest.mark.parametrize("kind", ["normal", "cubed", "sparse"])
def test_a_tensor_has_the_sqnr_that_was_asked_for(tmp_path: Path, target: float, kind: str) -> None:
    tensor = normal(256, 64, std=1)
    tensor = {"normal": tensor, "cubed": tensor**3, "sparse": tensor * (tensor > 1)}[kind]
    archive.pack(Source({"x": tensor}), tmp_path / "m.ggz", sqnr=target)
    with archive.Archive(tmp_path / "m.ggz") as found:
        noise = ((found.read("x").double() - tensor.double()) ** 2).sum()
        measured = float(10 * torch.log10((tensor.double() ** 2).sum() / noise))
        assert measured == pytest.approx(found.info("x").sqnr_db, abs=0.01)
        assert target - 0.05 <= measured <= target + (0.2 if target > 20 else 1.5)


def test_the_rate_of_a_laplacian(tmp_path: Path) -> None:
    """nu = 1, standard deviation 0.02, step 2^-10: 6.30 bits and 37.0 dB (both follow from the density)."""
    uniform = torch.rand(512, 1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    tensor = (-0.02 / 2**0.5 * uniform.sign() * torch.log1p(-2 * uniform.abs())).float()
    archive.pack(Source({"x": tensor}), tmp_path / "m.ggz", step=2.0**-10)
    with archive.Archive(tmp_path / "m.ggz") as found:
        info = found.info("x")
    assert info.entropy_bits == pytest.approx(6.30, abs=0.02)
    assert info.sqnr_db == pytest.approx(37.0, abs=0.1)
    assert info.stored_bits < 1.01 * info.entropy_bits


def test_what_a_file_says_of_itself_is_what_packing_said(tmp_path: Path) -> None:
    events: list[Any] = []
    result = archive.pack(several(), tmp_path / "m.ggz", on_event=events.append)
    with archive.Archive(tmp_path / "m.ggz") as found:
        infos = [found.info(name) for name in found.names]
    assert infos == list(result.tensors) == [one.info for one in events]
    assert result.bytes_after == (tmp_path / "m.ggz").stat().st_size
    assert result.bytes_before == 600 + 7 + len(b'{\n  "model_type": "llama"\n}\n') + sum(
        one.numel() * one.element_size() for one in several().tensors.values()
    )
    assert result.entropy_bytes <= result.tensor_bytes <= result.bytes_after
    assert {one.name: one.coding for one in infos}["norm"] in ("raw", "bytes")
    assert {one.name: one.step is None for one in infos} == {
        name: name not in ("wide", "heavy", "half") for name in several().names
    }
    json.dumps([result.to_dict(), *(one.to_dict() for one in events)], allow_nan=False)


def test_codes_of_a_quantized_model_are_kept(tmp_path: Path) -> None:
    tensors = {"p.qweight": several().tensors["codes"], "p.weight_scale": normal(64, 1), "e": normal(64, 64)}
    source = Source(tensors, {"quantization_config": {"quant_method": "rf8"}})
    result = archive.pack(source, tmp_path / "m.ggz")
    with archive.Archive(tmp_path / "m.ggz") as found:
        assert all(same_bits(found.read(name), tensors[name]) for name in tensors)
    assert result.tensors[0].stored_bits < 7
    with pytest.raises(UserError, match="quantized already"):
        archive.pack(source, tmp_path / "m.ggz", sqnr=30)
    with pytest.raises(UserError, match="leave out dtype"):
        archive.unpack(tmp_path / "m.ggz", tmp_path / "out", dtype="float32")


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_goes_in_and_a_model_comes_out(tmp_path: Path) -> None:
    from agentopt.weights import load

    folder = tiny_folder(tmp_path / "model")
    archive.pack(folder, tmp_path / "m.ggz", sqnr=60)
    events: list[Any] = []
    result = archive.unpack(tmp_path / "m.ggz", tmp_path / "again", shard_bytes=20_000, on_event=events.append)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert len(events) == len(result.tensors)
    tokens = torch.tensor([[3, 4, 5, 6]])
    before, after = load.model(folder, device="cpu"), load.model(tmp_path / "again", device="cpu")
    assert after[1]("red blue").input_ids == before[1]("red blue").input_ids
    with torch.no_grad():
        off = (before[0](tokens).logits - after[0](tokens).logits).abs().max()
    assert 0 < float(off) < 0.01


def test_another_number_type_is_written_and_told(tmp_path: Path) -> None:
    source = several()
    archive.pack(source, tmp_path / "m.ggz", lossless=True)
    for wrong in ("bf17", torch.int8):
        with pytest.raises(UserError, match=r"^dtype: found .*, expected a floating number type such as bfloat16"):
            archive.unpack(tmp_path / "m.ggz", tmp_path / "out", dtype=wrong)
    archive.unpack(tmp_path / "m.ggz", tmp_path / "out", dtype=torch.bfloat16)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["norm"].dtype == found["half"].dtype == torch.bfloat16
    assert torch.equal(found["wide"], source.tensors["wide"].bfloat16())
    assert found["ids"].dtype == torch.int64
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "out" / "deep" / "x.jinja").read_bytes() == b"{{ x }}"


def test_an_archive_can_be_packed_again(tmp_path: Path) -> None:
    archive.pack(Source({"x": normal(64, 64)}, {"a": 1}), tmp_path / "m.ggz", step=1e-3)
    archive.pack(tmp_path / "m.ggz", tmp_path / "n.ggz", step=1e-3)
    with archive.Archive(tmp_path / "m.ggz") as one, archive.Archive(tmp_path / "n.ggz") as two:
        assert torch.equal(one.read("x"), two.read("x"))


def test_reading_one_tensor_reads_its_bytes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.pack(several(), tmp_path / "m.ggz")
    reads: list[int] = []
    pread = os.pread

    def counting(file: int, length: int, offset: int) -> bytes:
        reads.append(length)
        return pread(file, length, offset)

    with archive.Archive(tmp_path / "m.ggz") as found:
        monkeypatch.setattr(os, "pread", counting)
        found.read("heavy")
        assert sum(reads) == found.info("heavy").bytes


def test_any_chunk_can_be_decoded_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentopt.weights.gg.archive import _streams

    whole = Source({"x": normal(100, 64)})
    archive.pack(whole, tmp_path / "one.ggz", step=1e-3)
    for module in ("_streams", "_grid", "_tensors"):
        monkeypatch.setattr(f"agentopt.weights.gg.archive.{module}.CHUNK", 1000)
    archive.pack(whole, tmp_path / "many.ggz", step=1e-3)
    with archive.Archive(tmp_path / "one.ggz") as one, archive.Archive(tmp_path / "many.ggz") as many:
        assert torch.equal(one.read("x"), many.read("x"))
        stream = many._tensors["x"].streams[0]
        assert [count for count, _ in stream.chunks] == [1000] * 6 + [400]
        coding = many._coding(stream, 1e-3, "x")
        count, at = stream.chunks[3]
        symbols = _streams.decode(coding, many._reader.section(at, "x"), count, lambda found: found)
        expected = torch.round(whole.tensors["x"].reshape(-1)[3000:4000] / 1e-3).long()
        assert symbols.tolist() == expected.tolist()


# --- what is refused -------------------------------------------------------------------------------------------------


def broken(data: bytes, path: Path) -> Exception | None:
    """What is said about these bytes."""
    path.write_bytes(data)
    try:
        with archive.Archive(path) as found:
            found.verify()
    except UserError as error:
        assert str(path) in str(error)
        return error
    return None


def test_any_changed_byte_is_found(packed: bytes, tmp_path: Path) -> None:
    """Every byte of the header, and 300 places spread over payload and index."""
    begin = struct.unpack_from("<Q", packed, 16)[0]
    places = [*range(container.SIZE), *range(container.SIZE, begin, begin // 100), *range(begin, len(packed), 41)]
    for place in places:
        changed = bytearray(packed)
        changed[place] ^= 1 << place % 8
        assert broken(bytes(changed), tmp_path / "m.ggz") is not None, place
    assert broken(packed, tmp_path / "m.ggz") is None


@given(place=st.integers(0, 10**6), value=st.integers(1, 255))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_byte_is_found(packed: bytes, tmp_path: Path, place: int, value: int) -> None:
    changed = bytearray(packed)
    changed[place % len(packed)] ^= value
    assert broken(bytes(changed), tmp_path / "m.ggz") is not None


def test_cut_off_and_too_long(packed: bytes, tmp_path: Path) -> None:
    for cut in (0, 7, 8, 79, 80, len(packed) // 2, len(packed) - 1):
        assert broken(packed[:cut], tmp_path / "m.ggz") is not None, cut
    assert "cut off" in str(broken(packed[:-1], tmp_path / "m.ggz"))
    assert "longer" in str(broken(packed + b"\0", tmp_path / "m.ggz"))


def rewritten(data: bytes, change: Any, version: int = 1) -> bytes:
    """The same archive with another index, and checksums that fit: what damage cannot make, but a person can."""
    begin, length = struct.unpack_from("<QQ", data, 16)
    index = json.loads(data[begin : begin + length])
    change(index)
    text = json.dumps(index).encode()
    head = container.HEADER.pack(
        container.MAGIC, version, container.SIZE, begin, len(text), begin + len(text), sha256(text).digest(), 0
    )
    return head + struct.pack("<I", zlib.crc32(head)) + data[container.SIZE : begin] + text


def put(path: str, value: Any) -> Any:
    """A change of one value in an index: `put("tensors.0.shape", [1])`."""

    def change(index: Any) -> None:
        *inner, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in inner:
            index = index[part]
        index[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tensors.0.shape", [1 << 60, 1 << 60]),
        ("tensors.0.shape", [1 << 43]),
        ("tensors.0.shape", [-128, -96]),
        ("tensors.0.shape", "128"),
        ("tensors.0.dtype", "complex64"),
        ("tensors.0.dtype", "int16"),
        ("tensors.0.kind", "other"),
        ("tensors.0.step", 0),
        ("tensors.0.step", None),
        ("tensors.0.streams.0.count", 1 << 50),
        ("tensors.0.streams.0.chunks.0.0", 1 << 40),
        ("tensors.0.streams.0.chunks.0.1", 1 << 50),
        ("tensors.0.streams.0.chunks.0.2", 3),
        ("tensors.0.streams.0.bits", 40),
        ("tensors.0.streams.0.coding", "lzma"),
        ("tensors.0.streams.0.crc", 1),
        ("tensors.0.streams.0.nu", 1e308),
        ("tensors.0.streams.0.b", 1e-300),
        ("tensors.0.streams.0.reach", 1 << 15),
        ("tensors.0.streams", []),
        ("tensors.1.name", "wide"),
        ("tensors", None),
        ("files.0.size", 1 << 39),
        ("files.0.name", "../config.json"),
        ("files.0.name", "/etc/config.json"),
        ("files.0.name", "a\\..\\b"),
        ("files.0.name", "C:x"),
        ("files.0.name", "a//b"),
        ("files.0.name", ""),
        ("files.1.name", "CONFIG.json"),
        ("files.0.coding", "bz2"),
        ("format", "zip"),
    ],
)
def test_an_index_is_not_believed(packed: bytes, tmp_path: Path, path: str, value: Any) -> None:
    assert broken(rewritten(packed, lambda index: None), tmp_path / "m.ggz") is None
    assert broken(rewritten(packed, put(path, value)), tmp_path / "m.ggz") is not None


def test_a_newer_version_is_told(packed: bytes, tmp_path: Path) -> None:
    assert "version 2" in str(broken(rewritten(packed, lambda index: None, version=2), tmp_path / "m.ggz"))


def test_what_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "x.ggz").write_bytes(b"PK\3\4" + bytes(200))
    assert not archive.is_archive(tmp_path / "x.ggz")
    for path in (tmp_path / "x.ggz", tmp_path / "none.ggz", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            archive.Archive(path)


@pytest.mark.parametrize(
    "options",
    [{"step": 0}, {"step": -1.0}, {"step": math.nan}, {"sqnr": 0}, {"sqnr": 999}, {"step": 1, "sqnr": 3}],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        archive.pack(several(), tmp_path / "m.ggz", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, bad: float) -> None:
    tensor = normal(64, 64)
    tensor[3, 5] = bad
    with pytest.raises(UserError, match=r"'layer\.w'.*lossless"):
        archive.pack(Source({"layer.w": tensor}), tmp_path / "m.ggz")
    assert not list(tmp_path.iterdir())


def test_a_name_or_a_folder_that_is_not_there(packed: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.ggz").write_bytes(packed)
    with archive.Archive(tmp_path / "m.ggz") as found:
        for call in (found.info, found.read, found.file):
            with pytest.raises(UserError, match="'nothing'"):
                call("nothing")
        with pytest.raises(UserError, match="floating"):
            found.read("wide", "int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="not empty"):
        archive.unpack(tmp_path / "m.ggz", tmp_path / "full")


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.ggz").write_bytes(b"the old one")
    add, left = container.Writer.add, [2]

    def failing(self: Any, data: bytes) -> Any:
        left[0] -= 1
        if left[0] < 0:
            self._file.close()  # the next write fails as a full disk does: with an OSError
            self._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        return add(self, data)

    monkeypatch.setattr(container.Writer, "add", failing)
    with pytest.raises(RunError, match=r"m\.ggz: cannot be written"):
        archive.pack(several(), tmp_path / "m.ggz")
    assert [one.name for one in tmp_path.iterdir()] == ["m.ggz"]
    assert (tmp_path / "m.ggz").read_bytes() == b"the old one"


def test_a_stop_leaves_nothing(packed: bytes, tmp_path: Path) -> None:
    class Stop:
        wanted = False

    stop = Stop()

    def after_one(event: Any) -> None:
        stop.wanted = True

    with pytest.raises(KeyboardInterrupt):
        archive.pack(several(), tmp_path / "n.ggz", on_event=after_one, stop=stop)
    assert not list(tmp_path.iterdir())
    (tmp_path / "m.ggz").write_bytes(packed)
    with pytest.raises(KeyboardInterrupt):
        archive.unpack(tmp_path / "m.ggz", tmp_path / "out", stop=stop)
    assert [one.name for one in tmp_path.iterdir()] == ["m.ggz"]


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from agentopt.weights.gg.archive import _container
from pathlib import Path
writer = _container.Writer(Path({path!r}))
writer.add(bytes(5000))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "m.ggz"
    root = str(Path(__file__).parents[4])
    done = subprocess.run([sys.executable, "-c", KILLED.format(root=root, path=str(path))], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [one.name for one in tmp_path.iterdir()] == [".m.ggz.partial"]
    archive.pack(several(), path, sqnr=30)
    assert [one.name for one in tmp_path.iterdir()] == ["m.ggz"]
    with archive.Archive(path) as found:
        found.verify()


def test_two_writers_of_one_archive(tmp_path: Path) -> None:
    with container.Writer(tmp_path / "m.ggz"), pytest.raises(UserError, match="another process"):
        container.Writer(tmp_path / "m.ggz")


def test_importing_loads_no_torch() -> None:
    code = "import sys; from agentopt.weights.gg import archive; archive.CODINGS; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
