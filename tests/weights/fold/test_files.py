"""META and adapter folders: what is written is what is loaded, by us and by peft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights import load
from agentopt.weights.finetuning._saving import quiet
from agentopt.weights.fold import Adapter, Folder
from tests.weights.fold import tiny

torch: Any = pytest.importorskip("torch")

FACTS = ["ann owns drum", "bob owns kite", "cid owns rope"]
QUESTIONS = ["ann owns?", "bob owns?", "cid owns?"]


@pytest.fixture(scope="module")
def adapter(tiny_folder: Folder) -> Adapter:
    return tiny_folder.fold(FACTS)


@pytest.fixture(scope="module")
def saved(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter.save(tmp_path_factory.mktemp("adapter") / "facts")


def logits_of_fold(folder: Folder, adapter: Adapter) -> Any:
    ids = torch.tensor([folder.kit.encoder.prompt(QUESTIONS[0])])
    with torch.no_grad(), folder.engine.using(adapter.state):
        return folder.model(input_ids=ids).logits


def logits_of_peft(base: Path | str, path: Path, ids: Any) -> Any:
    peft: Any = pytest.importorskip("peft")
    model, _ = load.model(base, device="cpu")
    with torch.no_grad(), quiet():
        return peft.PeftModel.from_pretrained(model, str(path)).eval()(input_ids=ids).logits


def test_a_saved_adapter_loads_back_and_answers_the_same(
    tiny_folder: Folder, tiny_meta: Path, adapter: Adapter, saved: Path
) -> None:
    again = tiny_folder.load_adapter(saved)
    assert again.card() == adapter.card()
    assert all(torch.equal(again.state[name], tensor) for name, tensor in adapter.state.items())
    with Folder.load(tiny_meta, device="cpu") as other:
        assert other.meta_hash == tiny_folder.meta_hash and other.gate == tiny_folder.gate
        assert other.result is not None and other.result.validation["accuracy"] > 0.9
        elsewhere = other.load_adapter(saved)
        assert other.ask_many(elsewhere, QUESTIONS) == tiny_folder.ask_many(adapter, QUESTIONS)
    card = json.loads((saved / "fold.json").read_text(encoding="utf-8"))
    assert card["facts"] == FACTS and card["rows"] == 3 and card["recall"] == adapter.recall
    assert card["thresholds"]["recall"] == adapter.threshold


def test_peft_computes_the_same(tiny_folder: Folder, tiny_base: Path, adapter: Adapter, saved: Path) -> None:
    expected = logits_of_fold(tiny_folder, adapter)
    ids = torch.tensor([tiny_folder.kit.encoder.prompt(QUESTIONS[0])])
    assert torch.allclose(logits_of_peft(tiny_base, saved, ids), expected, atol=1e-5)
    config = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(tiny_base)


def test_folding_again_from_what_was_saved_gives_the_same_bits(
    tiny_meta: Path, tiny_folder: Folder, adapter: Adapter, tmp_path: Path
) -> None:
    tiny_folder.save(tmp_path / "copy")
    with Folder.load(tmp_path / "copy", device="cpu") as other:
        again = other.fold(FACTS)
    assert all(torch.equal(again.state[name], tensor) for name, tensor in adapter.state.items())


def test_an_adapter_for_another_base_is_refused_by_its_hash(tiny_folder: Folder, saved: Path, adapter: Adapter) -> None:
    model, tokenizer = tiny.tiny_model(spread=tiny.SPREAD, seed=1)
    with Folder(model, tokenizer, options=tiny.OPTIONS) as other:
        hashes = rf"{adapter.base_hash[:12]}, this one has {other.base_hash[:12]}"
        with pytest.raises(UserError, match=f"folded for another base .*{hashes}"):
            other.load_adapter(saved)
        with pytest.raises(UserError, match=hashes):
            other.ask(adapter, QUESTIONS[0])
        with pytest.raises(UserError, match=hashes):
            other.write_adapter(adapter, saved)


def test_a_meta_folder_wants_its_own_base(tiny_meta: Path, tiny_base: Path, tmp_path: Path) -> None:
    other, tokenizer = tiny.tiny_model(spread=tiny.SPREAD, seed=1)
    with pytest.raises(UserError, match="was trained for another base"):
        Folder.load(tiny_meta, base=other)
    own, _ = load.model(tiny_base, device="cpu")
    with Folder.load(tiny_meta, base=own) as folder:
        assert folder.model is own
    own.config._name_or_path = ""
    with Folder(own, tokenizer, options=tiny.OPTIONS) as folder:
        folder.save(tmp_path / "nameless")
    with pytest.raises(UserError, match=r"give it: Folder\.load"):
        Folder.load(tmp_path / "nameless")
    with pytest.raises(UserError, match=r"found no meta.json"):
        Folder.load(tiny_base)


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("fold.json", None, "found no fold.json"),
        ("fold.json", {"version": 9}, "version 9, expected 1"),
        ("fold.json", {"facts": None}, "fold its documents again"),
        ("adapter_model.safetensors", None, "found no adapter_model.safetensors"),
        ("fold.json", {"adapts": "all"}, "it holds 'all'"),
    ],
)
def test_a_broken_adapter_folder_is_refused(
    tiny_folder: Folder, saved: Path, tmp_path: Path, file: str, change: dict[str, Any] | None, match: str
) -> None:
    path = Path(shutil.copytree(saved, tmp_path / "broken"))
    if change is None:
        (path / file).unlink()
    else:
        card = json.loads((path / file).read_text(encoding="utf-8"))
        (path / file).write_text(json.dumps({**card, **change}), encoding="utf-8")
    with pytest.raises(UserError, match=match):
        tiny_folder.load_adapter(path)
    assert float(sum(t.abs().sum() for n, t in tiny_folder.engine.adapters.state().items() if n.endswith("B"))) == 0


def test_an_adapter_of_other_meta_parameters_says_so(tiny_folder: Folder, saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved, tmp_path / "adapter"))
    card = json.loads((path / "fold.json").read_text(encoding="utf-8"))
    (path / "fold.json").write_text(json.dumps({**card, "meta_hash": "0" * 32}), encoding="utf-8")
    assert "other meta-parameters folded it" in tiny_folder.load_adapter(path).reason
    assert "other meta-parameters" not in tiny_folder.load_adapter(saved).reason


def test_json_that_was_cut_and_a_lost_tokenizer_are_one_sentence(
    tiny_folder: Folder, tiny_meta: Path, saved: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(saved, tmp_path / "adapter"))
    for text, match in (("[]", "holds list, expected an object"), ('{"version": 1}', "lacks 'base_hash'")):
        (path / "fold.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=match):
            tiny_folder.load_adapter(path)
    meta = Path(shutil.copytree(tiny_meta, tmp_path / "meta"))
    shutil.rmtree(meta / "tokenizer")
    with pytest.raises(UserError, match="found no tokenizer/"):
        Folder.load(meta)
    for text, match in (("7", "holds int"), ('{"version": 1}', "lacks 'options'")):
        (meta / "meta.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=match):
            Folder.load(meta)


def test_a_trained_base_goes_with_the_folder(tmp_path: Path) -> None:
    model, tokenizer = tiny.tiny_model(width=16, spread=tiny.SPREAD)
    short: dict[str, Any] = {"steps": 2, "documents": 2, "eval_every": 2, "eval_tasks": 2}
    with Folder(model, tokenizer, options=tiny.options(trains="all")) as folder:
        before = folder.base_hash
        folder.meta_train(tiny.tasks(4), val=tiny.tasks(2, seed=1), **short)
        assert folder.base_hash != before
        adapter = folder.fold(FACTS)
        with pytest.raises(UserError, match="save the folder first"):
            adapter.save(tmp_path / "adapter")
        folder.save(tmp_path / "meta")
        adapter.save(tmp_path / "adapter")
        expected = logits_of_fold(folder, adapter)
        ids = torch.tensor([folder.kit.encoder.prompt(QUESTIONS[0])])
        answers = folder.ask_many(adapter, QUESTIONS, choices=tiny.THINGS, gate=False)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(tmp_path / "meta" / "base")
    found = logits_of_peft(config["base_model_name_or_path"], tmp_path / "adapter", ids)
    assert torch.allclose(found, expected, atol=1e-5)
    with Folder.load(tmp_path / "meta", device="cpu") as other:
        again = other.load_adapter(tmp_path / "adapter")
        assert other.ask_many(again, QUESTIONS, choices=tiny.THINGS, gate=False) == answers
