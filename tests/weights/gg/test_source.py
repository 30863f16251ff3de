"""Reading a model's tensors one at a time, and refusing what is damaged, pickled or quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights.gg._source import INDEX, SINGLE, open_source, opened
from tests.weights.gg import folders

torch: Any = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of several files, and what is in it."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    model = folders.write(folder, dtype="bfloat16", shard="8KB")
    (folder / "README.md").write_text("a model card")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("not of the model")
    return folder, dict(model.state_dict())


def copied(source: Path, to: Path) -> Path:
    """The same folder, to be changed."""
    to.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (to / path.name).write_bytes(path.read_bytes())
    return to


def test_tensors_and_rows_are_those_of_the_model(sharded: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = sharded
    assert len(list(folder.glob("*.safetensors"))) > 2
    with opened(folder) as source:
        assert set(source.names) == set(expected)
        for name, tensor in expected.items():
            assert source.shape(name) == tuple(tensor.shape) and source.dtype(name) == torch.bfloat16
            assert torch.equal(source.read(name), tensor)
            assert torch.equal(source.rows(name, 1, 3), tensor[1:3])
        assert source.config["model_type"] == "llama"
        files = source.files()
        assert files["README.md"] == b"a model card" and "tokenizer.json" in files and "generation_config.json" in files
        assert not {"config.json", INDEX, "extra/notes.txt"} & set(files)


def test_layers_come_in_counting_order(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    names = [f"model.layers.{at}.w" for at in (10, 2, 1, 11)]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text("{}")
    assert open_source(tmp_path).names == tuple(f"model.layers.{at}.w" for at in (1, 2, 10, 11))


def test_identity_changes_with_the_weights(sharded: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = copied(sharded[0], tmp_path / "model")
    before = open_source(folder).identity
    assert open_source(folder).identity == before
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes())  # the same bytes at another time: may have changed, so it is another one
    assert open_source(folder).identity != before


def test_a_model_in_memory_has_no_second_copy_of_a_tied_head(tmp_path: Path) -> None:
    from agentopt.weights.gg._other_sources import LoadedSource

    model = folders.write(tmp_path, tied=True)
    source = LoadedSource(model)
    assert "lm_head.weight" not in source.names and "model.embed_tokens.weight" in source.names
    assert source.config["architectures"] == ["LlamaForCausalLM"] and source.config["dtype"] == "float32"
    folder = open_source(tmp_path)
    assert source.names == folder.names
    assert all(torch.equal(source.read(name), folder.read(name)) for name in source.names)


def test_a_hub_model_is_read_from_the_cache(
    sharded: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def snapshot(name: str, *, local_files_only: bool) -> str:
        assert local_files_only
        if name != "owner/model":
            raise FileNotFoundError(name)
        return str(sharded[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    source = open_source("owner/model")
    assert source.name == "owner/model" and set(source.names) == set(sharded[1])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nothing in the hub's cache .* HF_HUB_OFFLINE is set"):
        open_source("owner/other")


def test_an_archive_is_read_as_the_folder_it_was_made_from(
    sharded: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    from agentopt.weights.gg import archive

    archive.pack(sharded[0], tmp_path / "model.ggz", lossless=True)
    with opened(tmp_path / "model.ggz") as source, opened(sharded[0]) as folder:
        assert (source.names, source.config, source.files()) == (folder.names, folder.config, folder.files())
        for name in source.names:
            assert torch.equal(source.read(name), folder.read(name)) and source.dtype(name) == folder.dtype(name)
            assert torch.equal(source.rows(name, 2, 4), folder.rows(name, 2, 4))
    with pytest.raises(UserError, match="no such file"):
        open_source(tmp_path / "other.ggz")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("cut", "damaged or cut off"),
        ("header", "damaged or cut off"),
        ("empty", "damaged or cut off"),
        ("missing", "is missing"),
        ("promised", "found no tensor 'model.ghost.weight'"),
        ("outside", "expected a name in the same folder"),
        ("index", "cannot be read as an index"),
        ("config", "cannot be read as JSON"),
    ],
)
def test_a_damaged_folder_is_refused(
    sharded: tuple[Path, dict[str, Any]], tmp_path: Path, what: str, words: str
) -> None:
    folder = copied(sharded[0], tmp_path / "model")
    path = sorted(folder.glob("*.safetensors"))[1]
    index = folder / INDEX
    places = json.loads(index.read_text())["weight_map"]
    match what:
        case "cut":
            path.write_bytes(path.read_bytes()[:-100])
        case "header":
            path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
        case "empty":
            path.write_bytes(b"")
        case "missing":
            path.unlink()
        case "promised":
            folders.edit(index, weight_map={**places, "model.ghost.weight": path.name})
        case "outside":
            folders.edit(index, weight_map={**places, "model.ghost.weight": "../other.safetensors"})
        case "index":
            index.write_text('{"weight_map": 3}')
        case _:
            path = folder / "config.json"
            path.write_text("{")
    with pytest.raises(UserError, match=words) as error:
        open_source(folder)
    assert str(index if what == "outside" else path.name) in str(error.value) or what == "index"


def test_what_is_no_model_of_safetensors_is_refused(sharded: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found a folder without config\.json; give a model folder"):
        open_source(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"found neither model\.safetensors nor"):
        open_source(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"found pytorch_model\.bin \(pickled"):
        open_source(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        open_source(tmp_path / "nowhere")


def test_quantized_weights_are_refused_and_the_original_is_named(
    sharded: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = copied(sharded[0], tmp_path / "model")
    folders.edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match=r"quantized by gptq.*give the model that they were made from"):
        open_source(folder)
    folders.edit(folder / "config.json", quantization_config={"quant_method": "rf8", "format": "e3m4"})
    (folder / "quantize.json").write_text('{"source": "big-model"}')
    with pytest.raises(UserError, match=r"quantized by agentopt \(e3m4\).*give 'big-model'"):
        open_source(folder)
    assert open_source(folder, quantized=True).names
