"""Damaged and incomplete folders of codes: a sentence that names the tensor or the file, never other weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights import load
from tests.weights.gg.quantized import write
from tests.weights.tiny import tiny

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of codes with two files and an index."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("codes")
    model, tokenizer = tiny()
    write(folder, model)
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (name > names[len(names) // 2])}-of-00002.safetensors" for name in names}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def altered(whole: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The same in one file, after a change to its tensors."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = {}
    for file in sorted(whole.glob("*.safetensors")):
        tensors |= load_file(file)
    change(tensors)
    copied(whole, folder)
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def copied(whole: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def configured(whole: Path, folder: Path, **changes: Any) -> Path:
    path = copied(whole, folder) / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    for key in [key for key, value in changes.items() if value == "gone"]:
        del config["quantization_config"][key]
    path.write_text(json.dumps(config))
    return folder


def refused(folder: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern):
        load.model(folder)


def test_a_folder_of_codes_loads_without_more_ado(whole: Path) -> None:
    model, tokenizer = load.model(whole, dtype="float32")
    assert type(model.get_submodule(LAYER)).__name__ == "RF8Linear"
    assert tokenizer.pad_token
    assert bool(torch.isfinite(logits_of(model)).all())


def logits_of(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([[3, 7, 1]])).logits


DAMAGES: list[tuple[str, Any, str]] = [
    ("qweight", None, rf"{LAYER}\.\w+ without {LAYER}\.qweight"),
    ("weight_scale", None, rf"model\.safetensors: {LAYER}\.weight_scale is missing"),
    ("book_id", None, rf"model\.safetensors: {LAYER}\.book_id is missing"),
    ("weight_scale", lambda one: one[:, 0], rf"{LAYER}\.weight_scale is F32 \(32,\), expected F32 \(32, 1\)"),
    ("weight_scale", lambda one: one.half(), rf"{LAYER}\.weight_scale is F16 \(32, 1\), expected F32"),
    ("qweight", lambda one: one.float(), rf"{LAYER}\.qweight is F32 \(32, 64\), expected U8"),
    ("qweight", lambda one: one[:, :8].contiguous(), rf"{LAYER}\.qweight has the shape \(32, 8\), expected \(32, 64\)"),
    ("qweight", lambda one: one.index_fill(0, torch.tensor([3]), 255), rf"{LAYER}\.qweight: found the code 255"),
    ("weight_scale", lambda one: -one, rf"{LAYER}\.weight_scale: found -\S+ in row 0, expected finite numbers above 0"),
    ("weight_scale", lambda one: one * float("nan"), rf"{LAYER}\.weight_scale: found nan in row 0"),
    ("weight_scale", lambda one: one * 0, rf"{LAYER}\.weight_scale: found 0.0 in row 0"),
    ("book_id", lambda one: one + 200, rf"{LAYER}\.book_id: found 20\d, expected at most"),
]


@pytest.mark.parametrize(("name", "change", "pattern"), DAMAGES)
def test_a_damaged_tensor_is_named(whole: Path, tmp_path: Path, name: str, change: Any, pattern: str) -> None:
    def damage(tensors: dict[str, Any]) -> None:
        held = tensors.pop(f"{LAYER}.{name}")
        if change is not None:
            tensors[f"{LAYER}.{name}"] = change(held).contiguous()

    refused(altered(whole, tmp_path / "bad", damage), pattern)


def test_missing_and_surplus_tensors_are_named(whole: Path, tmp_path: Path) -> None:
    def without_layer(tensors: dict[str, Any]) -> None:
        for last in ("qweight", "weight_scale", "book_id"):
            del tensors[f"{LAYER}.{last}"]

    refused(altered(whole, tmp_path / "layer", without_layer), rf"{LAYER}\.qweight is missing")
    refused(
        altered(whole, tmp_path / "norm", lambda held: held.pop("model.norm.weight")),
        r"missing keys: found model\.norm",
    )
    plain = altered(whole, tmp_path / "plain", lambda held: held.update({"extra.weight": torch.zeros(2)}))
    assert load.model(plain)[0]

    def codes(tensors: dict[str, Any]) -> None:
        for last in ("qweight", "weight_scale", "book_id"):
            tensors[f"extra.{last}"] = tensors[f"{LAYER}.{last}"].clone()

    refused(altered(whole, tmp_path / "codes", codes), r"unexpected keys: found extra\.book_id and 2 more")

    def head(tensors: dict[str, Any]) -> None:
        tensors["lm_head.qweight"] = torch.zeros(tensors.pop("lm_head.weight").shape, dtype=torch.uint8)
        tensors["lm_head.weight_scale"] = torch.ones(len(tensors["lm_head.qweight"]), 1)
        tensors["lm_head.book_id"] = torch.zeros(len(tensors["lm_head.qweight"]), 1, dtype=torch.uint8)

    refused(
        altered(whole, tmp_path / "head", head), r"found lm_head\.qweight, but config\.json says that lm_head is not"
    )


def test_damaged_files_are_named(whole: Path, tmp_path: Path) -> None:
    second = "model-00002-of-00002.safetensors"
    cut = copied(whole, tmp_path / "cut") / second
    cut.write_bytes(cut.read_bytes()[:-100])
    refused(cut.parent, rf"{second}: damaged or cut off \([\d,]+ bytes;")
    gone = copied(whole, tmp_path / "gone") / second
    gone.unlink()
    refused(gone.parent, rf"{second}: no such file, though the checkpoint's index names it")


def test_configurations_of_others_are_refused(whole: Path, tmp_path: Path) -> None:
    refused(configured(whole, tmp_path / "1", version=2), "version: found 2, expected 1")
    refused(configured(whole, tmp_path / "0", version="gone"), "version: found None, expected 1")
    refused(configured(whole, tmp_path / "2", format="rf9"), "format: found 'rf9', expected rf8")
    refused(
        configured(whole, tmp_path / "3", codebooks=[[0.0, 1.0]]), "codebooks: found '2 levels', expected 255 or 256"
    )
    refused(configured(whole, tmp_path / "4", codebooks=None), "codebooks: found 0, expected books for rf8-gg")
    refused(
        configured(whole, tmp_path / "5", modules_to_not_convert=["lm_head", "model"]),
        "is not quantized|no linear layer",
    )
