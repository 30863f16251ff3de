"""What would end in other weights than meant, or fail after hours of work, is refused at once with a sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights.gg import archive, deepshape_, quantize
from agentopt.weights.gg._checkpoint import Checkpoint
from agentopt.weights.gg._plan import plan
from agentopt.weights.gg._source import INDEX, open_source
from agentopt.weights.gg.archive._index import safe_name
from tests.weights.gg import folders

torch: Any = pytest.importorskip("torch")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder."""
    folders.write(tmp_path / "model")
    return tmp_path / "model"


def test_a_whole_file_comes_before_an_index_as_in_transformers(model: Path) -> None:
    content = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (model / INDEX).write_text(json.dumps(content), encoding="utf-8")
    assert len(open_source(model).names) > 1


def test_a_head_that_is_asked_for_and_skipped(model: Path) -> None:
    with pytest.raises(UserError, match=r"skip: found lm_head .*leave out one"):
        plan(open_source(model), skip=["lm_head"], head=True)


def test_a_link_is_followed_to_the_folder_that_is_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    quantize(model, tmp_path / "link", "rf8")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "config.json").is_file()
    archive.pack(model, tmp_path / "m.ggz")
    archive.unpack(tmp_path / "m.ggz", tmp_path / "dangling")
    assert (tmp_path / "new" / "config.json").is_file()
    assert not [one for one in os.listdir(tmp_path) if "partial" in one]


@pytest.mark.parametrize("out", [".", "", "sub/.."])
def test_the_current_folder_is_not_replaced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="the current folder"):
        quantize(model, out, "rf8")


def test_a_mounted_folder_is_not_replaced(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(UserError, match="mounted"):
        quantize(model, tmp_path / "volume", "rf8")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("codebooks", "abc"),
        ("codebooks", 5),
        ("codebooks", [None]),
        ("codebooks", [["x"] * 255]),
        ("codebooks", [[None] * 255]),
        ("book_grid", ["x"]),
        ("book_grid", 5),
        ("gg", [1]),
    ],
)
def test_a_damaged_config_is_told_by_its_key(key: str, value: Any) -> None:
    whole = Checkpoint(format="rf8-gg", books=(tuple(float(one) for one in range(-127, 128)),)).to_dict()
    assert Checkpoint.from_dict(whole).books
    with pytest.raises(UserError, match=key):
        Checkpoint.from_dict({**whole, key: value})


def test_options_that_the_published_deepshape_has_not() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with pytest.raises(UserError, match="beside mode='reference'"):
        deepshape_(model, strength=0.5, mode="reference")
    with pytest.raises(UserError, match="beside mode='reference'"):
        deepshape_(model, guard=0.2, mode="reference")
    bogus: Any = "published"
    with pytest.raises(UserError, match="mode: found 'published'"):
        deepshape_(model, mode=bogus)


@pytest.mark.parametrize("name", ["half \ud800 of a character.txt", "ü" * 200])
def test_a_file_name_that_no_disk_takes(name: str) -> None:
    assert safe_name("ü.txt") and not safe_name(name)
