"""A GGUF file is parsed once while a model is loaded, and what is read is what the package gguf reads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from agentopt.weights._gguf import read_once

gguf: Any = pytest.importorskip("gguf")
np: Any = pytest.importorskip("numpy")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("small")
    writer.add_block_count(2)
    writer.add_token_list(["red", "blue", "grün", ""])
    writer.add_token_scores([0.5, -1.0, 2.0, 0.0])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    weights = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("token_embd.weight", weights)
    writer.add_tensor("packed.weight", gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0), raw_dtype=8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def content(reader: Any) -> list[Any]:
    fields = [
        (name, field.types, field.data, [(str(part.dtype), part.tolist()) for part in field.parts])
        for name, field in reader.fields.items()
    ]
    tensors = [
        (one.name, one.tensor_type, one.shape.tolist(), gguf.dequantize(one.data, one.tensor_type).tolist())
        for one in reader.tensors
    ]
    return [fields, tensors]


def test_what_is_read_is_the_same(file: Path) -> None:
    expected = content(gguf.GGUFReader(file))
    with read_once():
        assert content(gguf.GGUFReader(file)) == expected
        arch = gguf.MODEL_ARCH.LLAMA
        assert gguf.get_tensor_name_map(arch, 2).mapping == gguf.TensorNameMap(arch, 2).mapping
        assert gguf.get_tensor_name_map(arch, 3).mapping == gguf.TensorNameMap(arch, 3).mapping
    assert "grün" in str(bytes(gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"].parts[-3]), "utf-8")


def test_a_file_is_parsed_once_and_nothing_stays_afterwards(file: Path) -> None:
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with pytest.raises(ValueError, match="stop"), read_once():
        assert gguf.GGUFReader(file) is gguf.GGUFReader(file)
        raise ValueError("stop")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_a_damaged_file_is_refused_as_before(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"no model" * 8)
    with read_once(), pytest.raises(ValueError, match="magic"):
        gguf.GGUFReader(tmp_path / "bad.gguf")


def test_nothing_is_done_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with read_once():
        assert sys.modules["gguf"] is None
