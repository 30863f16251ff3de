"""One way to a model and its tokenizer, and clear words where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights import load
from tests.hub import NOBODY, hub_of, use
from tests.weights.tiny import tiny_folder


def test_the_room_loads_without_torch() -> None:
    code = "import sys, agentopt.weights as w; w.load; import agentopt.capsules; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_folder_gives_model_and_tokenizer(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    model, tokenizer = load.model(folder, device="cpu")
    assert not model.training
    assert str(model.dtype) == "torch.float32"
    assert tokenizer.pad_token_id is not None and tokenizer.padding_side == "left"
    again, _ = load.model(str(folder), dtype="bfloat16", device="cpu")
    assert str(again.dtype) == "torch.bfloat16"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", "no such folder"),
        ("/no/such/folder", "no such folder"),
        ("nowhere.gguf", "not found"),
        ("embedded/unknown", "unknown embedded model"),
        ("", "empty name"),
    ],
)
def test_what_is_not_there_is_said(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load.model(name)


def test_a_hub_model_is_loaded_from_the_hub_and_without_it_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path / "model")
    with hub_of({path.name: path.read_bytes() for path in folder.iterdir()}) as address:
        use(monkeypatch, address, tmp_path / "cache")
        fetched, _ = load.model("owner/model", device="cpu")
        with pytest.raises(UserError, match=r"no folder .*owner/modle, and .* has no model of that name"):
            load.model("owner/modle")
    use(monkeypatch, NOBODY, tmp_path / "cache")
    again, _ = load.model("owner/model", device="cpu")
    assert fetched.lm_head.weight.equal(again.lm_head.weight)


def test_a_mistyped_name_is_told_without_waiting_for_a_hub_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, NOBODY, tmp_path / "cache")
    import transformers

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)  # it would try again and again
    for ask in (load.model, load.config):
        with pytest.raises(UserError, match=r"cannot be reached .*did you mean 'embedded'"):
            ask("smolm")


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"without config\.json"):
        load.model(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="give the path of the file"):
        load.model(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be loaded"):
        load.model(tmp_path)
    with pytest.raises(UserError, match="found a file"):
        load.model(tmp_path / "config.json")


@pytest.mark.parametrize("kind", [{"model_type": "bert", "architectures": ["BertModel"]}, {"model_type": "vit"}])
def test_an_encoder_is_refused(tmp_path: Path, kind: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(kind), encoding="utf-8")
    with pytest.raises(UserError, match="expected a causal language model"):
        load.model(tmp_path)


def test_unknown_dtype_and_device(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    with pytest.raises(UserError, match="dtype"):
        load.model(folder, dtype="int8")
    with pytest.raises(UserError, match="device"):
        load.model(folder, device="abacus")


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load.need.cache_clear()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"agentopt\[weights\]"):
        load.model("embedded")


@pytest.mark.slow
def test_the_embedded_weights_are_saved_as_any_others_and_write_text(embedded_folder: Path) -> None:
    assert "quantization_config" not in (embedded_folder / "config.json").read_text(encoding="utf-8")
    assert (embedded_folder / "model.safetensors").stat().st_size > 4 * 134_515_008
    model, tokenizer = load.model(embedded_folder, device="cpu")
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0, ids["input_ids"].shape[1] :])
