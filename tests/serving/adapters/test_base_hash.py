"""Folded adapters name their base by a hash: the served folder's own, in any number type, or its origin's."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Generator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.serving.adapters import BaseFacts, BaseHashes, base_hash, check_adapter
from agentopt.serving.engines import prepare_worker
from tests.weights.tiny import tiny, tiny_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, the same in 16 bits, the same quantized, and another one."""
    from agentopt.weights import gg, load

    place = tmp_path_factory.mktemp("models")
    found = {"base": tiny_folder(place / "base")}
    half, tokenizer = load.model(found["base"], dtype="bfloat16", device="cpu")
    for name, model in (("half", half), ("other", tiny(seed=3)[0])):
        found[name] = place / name
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    found["packed"] = place / "packed"
    gg.quantize(str(found["base"]), found["packed"], "rf8-gg")
    return found


def folded_on(model: Path, dtype: str) -> str:
    """The hash that a fold on this model writes."""
    from agentopt.weights import load
    from agentopt.weights.zeroth import fingerprint

    return fingerprint(load.model(model, dtype=dtype, device="cpu")[0].named_parameters())


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The process that hashes, run in this one; gives what it was asked."""
    asked: list[list[str]] = []

    def lines(self: BaseHashes, model: str, wanted: str) -> Generator[dict[str, str]]:
        arguments = ["base_hash", model, "--wanted", wanted]
        if model != str(self.base.folder):
            arguments += ["--made", str(self.base.folder)]
        asked.append(arguments)
        yield from said(monkeypatch, *arguments)

    monkeypatch.setattr(BaseHashes, "_lines", lines)
    return asked


def said(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[dict[str, str]]:
    out = io.StringIO()
    monkeypatch.setattr(sys, "argv", list(arguments))
    with redirect_stdout(out):
        base_hash.main()
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("served", "folded", "dtype"),
    [
        ("base", "base", "float32"),
        ("base", "base", "bfloat16"),
        ("packed", "packed", "float32"),
        ("packed", "packed", "bfloat16"),
        ("packed", "base", "float32"),  # quantize.json says where it came from
        ("half", "half", "bfloat16"),
        ("half", "half", "float32"),
    ],
)
def test_an_adapter_for_the_served_model_is_known(
    models: dict[str, Path], tmp_path: Path, inside: list[list[str]], served: str, folded: str, dtype: str
) -> None:
    base = BaseFacts.of(models[served], 8)
    wanted = folded_on(models[folded], dtype)
    assert BaseHashes(base, tmp_path).find(wanted) == str(models[folded])
    count = len(inside)
    assert BaseHashes(base, tmp_path).find(wanted) == str(models[folded])
    assert len(inside) == count, "it was computed again"


def test_an_origin_must_be_what_the_folder_was_made_from(
    models: dict[str, Path], tmp_path: Path, inside: list[list[str]]
) -> None:
    wanted = folded_on(models["base"], "float32")
    assert BaseHashes(BaseFacts.of(models["half"], 8), tmp_path).find(wanted) is None
    told = BaseHashes(BaseFacts.of(models["half"], 8, origins=[models["base"]]), tmp_path)
    assert told.find(wanted) == str(models["base"])
    for served in ("half", "packed"):
        lied = BaseHashes(BaseFacts.of(models[served], 8, origins=[models["other"]]), tmp_path)
        assert lied.find(folded_on(models["other"], "float32")) is None
        assert "was not made from" in " ".join(lied.reasons)


def test_a_folder_without_its_origin_can_carry_the_hashes(
    models: dict[str, Path], tmp_path: Path, inside: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = shutil.copytree(models["half"], tmp_path / "alone")
    wanted = folded_on(models["base"], "float32")
    assert BaseHashes(BaseFacts.of(alone, 8), tmp_path).find(wanted) is None
    said(monkeypatch, "base_hash", str(models["base"]), "--made", str(alone), "--record")
    assert BaseHashes(BaseFacts.of(alone, 8), tmp_path).find(wanted)
    lie = said(monkeypatch, "base_hash", str(models["other"]), "--made", str(alone), "--record")
    assert "was not made from" in lie[0]["why"]


def test_an_adapter_that_was_folded_is_served_by_its_base_and_by_no_other(
    models: dict[str, Path], tmp_path: Path, inside: list[list[str]]
) -> None:
    from agentopt.weights import adapters, load

    model, _ = load.model(models["base"], device="cpu")
    wanted = folded_on(models["base"], "float32")
    adapters.attach(model, rank=4, targets=["q_proj"]).save(tmp_path / "fold")
    card: dict[str, Any] = {"base_hash": wanted, "recall": 1.0, "accepted": True, "facts": ["one"]}
    (tmp_path / "fold" / "fold.json").write_text(json.dumps(card), encoding="utf-8")
    for served in ("base", "packed"):
        base = BaseFacts.of(models[served], 8)
        facts = check_adapter(tmp_path / "fold", base, hashes=BaseHashes(base, tmp_path))
        assert (facts.rank, facts.accepted, facts.notes) == (4, True, ())
    base = BaseFacts.of(models["other"], 8)
    with pytest.raises(UserError, match="folded for another base") as caught:
        check_adapter(tmp_path / "fold", base, hashes=BaseHashes(base, tmp_path))
    assert wanted[:12] in str(caught.value)


def test_the_process_is_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    hashes = BaseHashes(BaseFacts.of(models["base"], 8), tmp_path)
    assert hashes.find(folded_on(models["base"], "bfloat16")) == str(models["base"])
    assert hashes.sure
    hashes.close()
    assert BaseHashes(BaseFacts.of(models["base"], 8), tmp_path).find("0" * 32) is None


# --- what was prepared by us -----------------------------------------------------------------------------------------


@pytest.fixture
def prepared(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A quantized folder as `agentopt serve` makes it, and what it was made from."""
    base, out = shutil.copytree(models["base"], tmp_path / "base"), tmp_path / "cache" / "packed"
    monkeypatch.setattr(prepare_worker, "say", lambda **told: None)
    job = {"job": "quantize", "source": str(base), "model": str(base), "format": "rf8", "cpu": False, "out": str(out)}
    prepare_worker.work(job)
    return {"base": base, "packed": out}


def test_what_was_prepared_is_known_without_reading_it_again(
    prepared: dict[str, Path], tmp_path: Path, inside: list[list[str]]
) -> None:
    hashes = BaseHashes(BaseFacts.of(prepared["packed"], 8, origins=[str(prepared["base"])]), tmp_path / "kept")
    for dtype in ("float32", "bfloat16", "float16"):
        assert hashes.find(folded_on(prepared["packed"], dtype)) == str(prepared["packed"])
        assert hashes.find(folded_on(prepared["base"], dtype)) == "what packed was made from"
    assert hashes.find("0" * 32) is None
    assert hashes.sure
    assert not inside, "the weights were read"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "packed",
        "packed.hashes.json",
        "packed.lock",
    ]


def test_hashes_of_the_origin_stay_when_the_origin_goes_or_changes(
    prepared: dict[str, Path], models: dict[str, Path], tmp_path: Path, inside: list[list[str]]
) -> None:
    wanted = folded_on(prepared["base"], "float32")
    shutil.copy(models["other"] / "model.safetensors", prepared["base"])
    base = BaseFacts.of(prepared["packed"], 8)
    hashes = BaseHashes(base, tmp_path / "kept")
    assert hashes.find(wanted) == "what packed was made from"
    assert hashes.find(folded_on(models["other"], "float32")) is None
    assert len(inside) == 1, "what lies there now was not looked at"
    assert "was not made from" in " ".join(hashes.reasons)


@pytest.mark.parametrize("how", ["touched", "other weights", "another version", "no JSON", "no object"])
def test_hashes_of_other_files_are_not_believed(
    prepared: dict[str, Path], models: dict[str, Path], tmp_path: Path, inside: list[list[str]], how: str
) -> None:
    packed = prepared["packed"]
    record = packed.with_name("packed.hashes.json")
    wanted = folded_on(packed, "float32")
    if how == "touched":
        os.utime(packed / "model.safetensors", ns=(1, 1))
    elif how == "other weights":
        shutil.rmtree(packed)
        shutil.copytree(models["packed"], packed)
        wanted = folded_on(packed, "float32")
    elif how == "another version":
        record.write_text(record.read_text(encoding="utf-8").replace('"version": 1', '"version": 0'), encoding="utf-8")
    else:
        record.write_text("{" if how == "no JSON" else "[1]", encoding="utf-8")
    assert BaseHashes(BaseFacts.of(packed, 8), tmp_path / "kept").find(wanted) == str(packed)
    assert len(inside) == 1, "it was believed"


def test_one_origin_under_two_names_is_looked_at_once(
    prepared: dict[str, Path], tmp_path: Path, inside: list[list[str]]
) -> None:
    prepared["packed"].with_name("packed.hashes.json").unlink()
    link = tmp_path / "link"
    link.symlink_to(prepared["base"])
    hashes = BaseHashes(BaseFacts.of(prepared["packed"], 8, origins=[link]), tmp_path / "kept")
    assert hashes.find("0" * 32) is None
    assert len(inside) == 2, "the folder, and what it was made from"


def test_a_folder_is_prepared_also_where_its_hashes_cannot_be_written(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packed"
    out.with_name("packed.hashes.json").mkdir()
    monkeypatch.setattr(prepare_worker, "say", lambda **told: None)
    source = str(models["base"])
    prepare_worker.work(
        {"job": "quantize", "source": source, "model": source, "format": "rf8", "cpu": False, "out": str(out)}
    )
    assert (out / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "packed.hashes.json", "packed.lock"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_converted_file_is_known_by_its_own_hashes_where_those_can_be_told(
    tmp_path: Path, inside: list[list[str]], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """The file is loaded by a double: a fold loads it as float32, and so can a conversion or not."""
    import torch

    from agentopt.weights import load
    from agentopt.weights.zeroth import fingerprint

    file = tmp_path / "small.gguf"
    file.write_bytes(b"GGUF")
    wanted = fingerprint(tiny()[0].named_parameters())
    out = tmp_path / "made"
    job = {"job": "convert", "source": str(file), "model": "small", "dtype": dtype, "digest": "", "out": str(out)}
    with monkeypatch.context() as patched:
        patched.setattr(prepare_worker, "say", lambda **told: None)
        patched.setattr(load, "model", lambda *_, **__: (tiny()[0].to(getattr(torch, dtype)), tiny()[1]))
        prepare_worker.work(job)
    hashes = BaseHashes(BaseFacts.of(out, 8), tmp_path / "kept")
    found = hashes.find(wanted)
    assert found == ("what made was made from" if dtype == "float32" else None)
    assert hashes.find(folded_on(out, "bfloat16"))
    assert not inside
