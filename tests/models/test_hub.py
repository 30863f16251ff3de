"""Names of hub models: a hub on the loopback, a hub that nobody answers for, its cache, and names that are near."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as constants
import pytest

from agentopt.models import UnknownModel
from agentopt.models._embedded_files import fetch
from agentopt.models._hub import check_on_hub
from tests.hub import NOBODY, hub_of, use


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    with hub_of({"config.json": b"{}", "model.gguf": b"GGUF"}) as address:
        use(monkeypatch, address, tmp_path / "cache")
        yield address


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, NOBODY, tmp_path / "cache")


def test_what_the_hub_has_may_be_loaded(hub: str) -> None:
    assert check_on_hub("owner/model") is False
    assert check_on_hub("owner/model", "not-there.gguf") is False, "whoever loads it says that the file is missing"
    assert check_on_hub("broken/model") is False, "a hub that is busy may have it"


def test_what_the_hub_lacks_is_refused(hub: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel) as caught:
        check_on_hub("owner/modle")
    where, _, rest = str(caught.value).partition("; ")
    assert where == (
        f"model 'owner/modle': no folder {tmp_path / 'owner/modle'}, "
        f"and {hub} has no model of that name that you may read"
    )
    assert rest.startswith("expected a model folder, a .gguf file, 'embedded', or a hub model OWNER/NAME")


def test_nobody_answers(nobody: None, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel) as caught:
        check_on_hub("smolm")
    text = str(caught.value)
    assert f"no folder {tmp_path / 'smolm'}, nothing in the hub's cache {tmp_path / 'cache'}, and http://127" in text
    assert "cannot be reached (" in text and "; did you mean 'embedded'? Expected a model folder" in text
    with pytest.raises(UnknownModel, match=r"^model 'hf:o/m/x.gguf': nothing in the hub's cache"):
        fetch("hf:o/m/x.gguf")


def test_what_was_fetched_is_there_without_the_hub(hub: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = fetch("hf:owner/model/model.gguf")
    assert path.read_bytes() == b"GGUF"
    use(monkeypatch, NOBODY, tmp_path / "cache")
    assert check_on_hub("owner/model", "model.gguf") is True
    assert fetch("hf:owner/model/model.gguf") == path
    with pytest.raises(UnknownModel, match="did you mean 'owner/model'"):
        check_on_hub("owner/modle")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert check_on_hub("owner/model", "model.gguf") is True
    with pytest.raises(UnknownModel, match="and HF_HUB_OFFLINE is set"):
        check_on_hub("owner/model")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("embeded", "embedded"),
        ("SmolLM2-135M", "embedded"),
        ("my-modle", "my-model"),
        ("tickets", "tickets.gguf"),
        ("something-else-entirely", None),
    ],
)
def test_the_nearest_name_is_proposed(nobody: None, tmp_path: Path, name: str, near: str | None) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text(json.dumps({}), encoding="utf-8")
    (tmp_path / "tickets.gguf").touch()
    with pytest.raises(UnknownModel) as caught:
        check_on_hub(name)
    assert (f"did you mean {near!r}?" if near else "; expected a model") in str(caught.value)


def test_a_name_that_cannot_be_one(nobody: None) -> None:
    with pytest.raises(UnknownModel, match="and no hub model can have that name; expected"):
        check_on_hub("two words")
