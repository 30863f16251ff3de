"""quantize: what is written, what is told, and what a kill, a full disk or a wrong word leaves behind."""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import RunError, UserError
from agentopt.weights import gg
from agentopt.weights._events import Event, Resumed, Warned
from agentopt.weights.gg import QuantizeOptions, _passes
from agentopt.weights.gg._checkpoint import Checkpoint
from agentopt.weights.gg._source import SINGLE, FolderSource
from agentopt.weights.gg._types import Planned, ShardWritten, TensorDone
from tests.weights.gg import folders

torch: Any = pytest.importorskip("torch")

SMALL = 1 << 13
"""Bytes of a file, so that the tiny model has several."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to quantize, with keys in its config that nobody here knows."""
    folder = tmp_path_factory.mktemp("quantize") / "model"
    folders.write(folder, dtype="bfloat16")
    folders.edit(folder / "config.json", a_key_from_the_future={"deep": [1, 2]})
    return folder


def decoded(folder: Path) -> dict[str, Any]:
    """Float32 weights of a folder of codes, computed from its files alone."""
    about = Checkpoint.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"])
    books = torch.tensor([[*book, 0.0][:256] for book in about.books]) if about.books else None
    tensors = folders.stored(folder)
    found = {name: value.float() for name, value in tensors.items() if not _is_part(name)}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        encoded = gg.Encoded(
            tensors[f"{name}.qweight"],
            tensors[f"{name}.weight_scale"],
            about.format,
            books=books,
            book_id=tensors.get(f"{name}.book_id"),
        )
        found[f"{name}.weight"] = gg.decode(encoded)
    return found


def _is_part(name: str) -> bool:
    return name.endswith((".qweight", ".weight_scale", ".book_id"))


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder that does not hold times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "quantize.json"}


@pytest.mark.parametrize("format", gg.FORMATS)
def test_files_hold_what_the_codec_gives(source: Path, tmp_path: Path, format: Any) -> None:
    heard = folders.Heard()
    result = gg.quantize(source, tmp_path / "out", format, options=QuantizeOptions(refine=False), on_event=heard)
    original, new = folders.stored(source), decoded(tmp_path / "out")
    assert set(original) == set(new)
    reports = {report.name: report for report in result.tensors}
    assert len(reports) == 14
    for name, weight in original.items():
        layer = name.removesuffix(".weight")
        if layer not in reports:
            assert torch.equal(new[name], weight.float()) and name in result.kept
            continue
        expected = gg.encode(weight.float(), format)
        assert torch.equal(new[name], gg.decode(expected))
        report = reports[layer]
        assert report.shape == tuple(weight.shape) and sum(report.histogram.counts) == weight.numel()
        assert report.sqnr_db == pytest.approx(gg.sqnr(weight.float(), gg.decode(expected)))
        assert report.entropy_bits == pytest.approx(gg.code_entropy(expected.codes))
        assert report.nu == pytest.approx(gg.fit(weight.float()).nu)
        assert report.histogram.high == pytest.approx(6 * report.sigma)
    kept = folders.stored(tmp_path / "out")
    assert kept["model.norm.weight"].dtype == torch.bfloat16
    assert result.bytes_after == sum(value.nbytes for value in kept.values())
    assert result.bytes_before == sum(value.nbytes for value in original.values()) == result.bytes_16
    codes = kept["model.layers.0.mlp.up_proj.qweight"].nbytes
    extra = 5 if format == "rf8-gg" else 4
    assert reports["model.layers.0.mlp.up_proj"].stored_bits == pytest.approx(8 + 8 * extra * 64 / codes)
    done = heard.of(TensorDone)
    assert [event.done for event in done] == list(range(1, 15)) and not any(event.resumed for event in done)
    assert heard.of(Planned)[0].tensors == 14 and len(heard.of(ShardWritten)) == 1


def test_the_folder_is_a_whole_model_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty one may be there
    result = gg.quantize(source, out, options=QuantizeOptions(skip=("layers.1",), shard_bytes=SMALL))
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (out, source))
    about = Checkpoint.from_dict(config["quantization_config"])
    assert {key: config[key] for key in before} == before
    assert about.skip == ("lm_head", "layers.1") and len(about.books) == len(gg.NUS) and math.isinf(about.nus[-1])
    assert 0.1 < about.gg["nu"] < 10 and about.source_sha256 is not None and len(about.source_sha256) == 64
    assert {"tokenizer.json", "generation_config.json", "model.safetensors.index.json"} <= set(files(out))
    assert json.loads((out / "quantize.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    assert result.source == str(source) and not (tmp_path / "out.partial").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert (
        set(index["weight_map"]) == set(folders.stored(out)) and index["metadata"]["total_size"] == result.bytes_after
    )
    with pytest.raises(UserError, match=f"quantized by agentopt .rf8-gg.*give '{source}'"):
        gg.quantize(out, tmp_path / "again")


def test_refined_books_are_better_and_the_hash_is_of_the_weights(source: Path, tmp_path: Path) -> None:
    def noise(refine: bool, shard: int) -> tuple[float, str | None]:
        out = tmp_path / f"{refine}-{shard}"
        gg.quantize(source, out, options=QuantizeOptions(refine=refine, shard_bytes=shard, skip=("self_attn",)))
        new = decoded(out)
        found = sum(float((value.float() - new[name]).square().sum()) for name, value in folders.stored(source).items())
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        return found, Checkpoint.from_dict(config).source_sha256

    (refined, one), (plain, two) = noise(True, SMALL), noise(False, 1 << 30)
    assert refined < plain and one == two


@pytest.mark.parametrize(("format", "scale"), [("rf8-gg", "channel"), ("rf8", "tensor_pow2"), ("int8", "channel")])
def test_tiles_change_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any, scale: Any
) -> None:
    options = QuantizeOptions(scale=scale, refine=False, head=True, skip=("layers.1", "self_attn"))
    gg.quantize(source, tmp_path / "whole", format, options=options)
    monkeypatch.setattr(_passes, "TILE", 300)
    gg.quantize(source, tmp_path / "tiles", format, options=options)
    whole, tiles = files(tmp_path / "whole"), files(tmp_path / "tiles")
    del whole["config.json"], tiles["config.json"]  # the fit is of a sample then
    assert whole == tiles
    if scale == "tensor_pow2":
        scales = folders.stored(tmp_path / "tiles")["lm_head.weight_scale"]
        assert scales.unique().numel() == 1 and scales.shape == (17, 1)


def test_conv1d_and_a_tied_head(tmp_path: Path) -> None:
    folders.write(tmp_path / "gpt2", kind="gpt2")
    gg.quantize(tmp_path / "gpt2", tmp_path / "out", options=QuantizeOptions(head=True, refine=False))
    original, new = folders.stored(tmp_path / "gpt2"), decoded(tmp_path / "out")
    assert set(original) == set(new)
    turned = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(new[turned], gg.decode(gg.encode(original[turned].T)))
    embedding = "transformer.wte.weight"
    assert torch.equal(new[embedding], gg.decode(gg.encode(original[embedding])))
    about = Checkpoint.from_dict(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
    assert about.head and about.skip == ()


class Counting(FolderSource):
    """A folder whose tensors in memory are counted."""

    live = peak = 0

    def _seen(self, tensor: Any) -> Any:
        copy = tensor.clone()
        size = copy.nbytes
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(copy.untyped_storage(), self._gone, size)
        return copy

    def _gone(self, size: int) -> None:
        self.live -= size

    def read(self, name: str) -> Any:
        return self._seen(super().read(name))

    def rows(self, name: str, start: int, stop: int) -> Any:
        return self._seen(super().rows(name, start, stop))


def test_a_model_larger_than_memory_goes_through(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_passes, "TILE", 512)
    monkeypatch.setattr(_passes, "_ROWS", (2, 2))
    gc.collect()
    counting = Counting(source, "counted")
    options = QuantizeOptions(skip=("layers.1", "self_attn", "up_proj"))
    result = gg.quantize(counting, tmp_path / "out", options=options)
    # Two tiles of 512 weights at 16 bits: one that is worked on, one that is read.
    assert counting.peak <= 2 * 512 * 2 < result.bytes_before / 20


def killed(source: Path, out: Path, options: QuantizeOptions, when: Callable[[Event], bool]) -> None:
    """Quantize in a process of its own that is killed at an event."""
    child = os.fork()
    if child == 0:

        def die(event: Event) -> None:
            if when(event):
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            gg.quantize(source, out, options=options, on_event=die)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_after_a_kill_it_goes_on_and_ends_the_same(source: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(shard_bytes=SMALL, skip=("self_attn",))
    gg.quantize(source, tmp_path / "whole", options=options)
    out = tmp_path / "out"
    killed(source, out, options, lambda event: isinstance(event, TensorDone) and event.done == 1)
    assert not out.exists()
    seen: list[Event] = []

    def third(event: Event) -> bool:
        seen.append(event)
        return len([one for one in seen if isinstance(one, ShardWritten)]) == 2

    killed(source, out, options, third)
    with (tmp_path / "out.partial" / "shards.jsonl").open("a") as file:
        file.write('{"file": "torn')
    heard = folders.Heard()
    result = gg.quantize(source, out, options=options, on_event=heard)
    done = heard.of(TensorDone)
    before = [event.report.name for event in done if event.resumed]
    assert before and heard.of(Resumed)[0].step == len(before) < len(done) == len(result.tensors) == 6
    assert files(out) == files(tmp_path / "whole") and not (tmp_path / "out.partial").exists()


def test_unfinished_work_takes_the_same_settings_only(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop = Stop()

    def end(event: Event) -> None:
        stop.wanted = stop.wanted or isinstance(event, ShardWritten)

    with pytest.raises(KeyboardInterrupt):
        gg.quantize(source, out, "rf8", options=QuantizeOptions(shard_bytes=SMALL), on_event=end, stop=stop)
    assert not out.exists()
    with pytest.raises(UserError, match=r"out\.partial: found unfinished work with format 'rf8', now 'e3m4'"):
        gg.quantize(source, out, "e3m4", options=QuantizeOptions(shard_bytes=SMALL))
    with pytest.raises(UserError, match="unfinished work with seed 0, now 1; give the same settings"):
        gg.quantize(source, out, "rf8", options=QuantizeOptions(shard_bytes=SMALL, seed=1))
    assert len(gg.quantize(source, out, "rf8", options=QuantizeOptions(shard_bytes=SMALL)).tensors) == 14


class Stop:
    wanted = False


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files end at some bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_told_and_nothing_is_lost(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = QuantizeOptions(shard_bytes=3 * SMALL)
    with pytest.raises(RunError, match=r"cannot be written .*make room and run the same command again"):
        gg.quantize(source, out, "rf8", options=options)
    assert not out.exists()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert gg.quantize(source, out, "rf8", options=options).tensors


def test_a_taken_place_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="found a file, expected a new folder"):
        gg.quantize(source, tmp_path / "file")
    with pytest.raises(UserError, match="not empty"):
        gg.quantize(source, tmp_path)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("")
    with pytest.raises(UserError, match="is no work of a quantization"):
        gg.quantize(source, tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine.txt").exists()


def test_wrong_words_and_wrong_weights_leave_nothing_behind(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"format": "fp4"}, "format: found 'fp4', expected rf8, .*int8"),
        ({"format": "e3m4", "options": QuantizeOptions(scale="tensor_pow2")}, "tensor_pow2 is for rf8"),
        ({"options": QuantizeOptions(skip=("no_such",))}, "skip: found 'no_such'"),
    ]
    for arguments, words in wrong:
        with pytest.raises(UserError, match=words):
            gg.quantize(source, out, **arguments)
    from safetensors.torch import save_file

    bad = tmp_path / "bad"
    bad.mkdir()
    tensors = folders.stored(source)
    tensors["model.layers.1.mlp.up_proj.weight"][37, 5] = math.inf
    save_file(tensors, bad / SINGLE)
    (bad / "config.json").write_bytes((source / "config.json").read_bytes())
    for format in ("rf8-gg", "fp8"):
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .*infinite number in row 37"):
            gg.quantize(bad, out, format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_experts_are_told_of(tmp_path: Path) -> None:
    folders.write(tmp_path / "moe", kind="mixtral")
    heard = folders.Heard()
    result = gg.quantize(tmp_path / "moe", tmp_path / "out", "rf8", on_event=heard)
    assert len(result.tensors) == 4 and "expert weights" in result.warnings[0]
    assert [event.message for event in heard.of(Warned)] == list(result.warnings)
