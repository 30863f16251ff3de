"""Which folders may be served as an adapter; the others are refused with one sentence that says why."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentopt.errors import UserError
from agentopt.serving.adapters import BaseFacts, BaseHashes, check_adapter, check_name, parse_adapter
from tests.serving.adapters import folders
from tests.serving.adapters.folders import adapter, assert_refused, base, factors


def test_a_plain_adapter_is_taken(tmp_path: Path) -> None:
    facts = check_adapter(adapter(tmp_path / "good"), base(tmp_path / "base"))
    assert (facts.name, facts.rank, facts.folded) == ("good", 2, False)
    assert facts.layers == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def test_checking_needs_no_torch(tmp_path: Path) -> None:
    folders.base_folder(tmp_path / "base")
    adapter(tmp_path / "good")
    code = (
        "import sys; from agentopt.serving.adapters import BaseFacts, check_adapter; "
        "check_adapter('good', BaseFacts.of('base', 8)); "
        "sys.exit(sorted({'torch', 'transformers', 'safetensors'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_beside_it_may_stay_if_no_loader_could_run_it(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", use_rslora=True, init_lora_weights="gaussian", modules_to_save=None, bias="none")
    (folder / "README.md").write_text("about", encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert check_adapter(folder, base(tmp_path / "base")).config.rooted


def test_each_layer_may_have_a_rank_and_an_alpha_of_its_own(tmp_path: Path) -> None:
    tensors = {**factors(2), **factors(4, names=("mlp.up_proj",))}
    folder = adapter(tmp_path / "a", tensors, rank_pattern={"up_proj": 4}, alpha_pattern={"up_proj": 8})
    facts = check_adapter(folder, base(tmp_path / "base"))
    assert facts.rank == 4
    assert facts.config.to_dict(list(facts.layers))["rank_pattern"] == {"up_proj": 4}


@pytest.mark.parametrize("options", [{"packed": True}, {"kind": "mistral"}])
def test_a_quantized_base_has_the_same_layers(tmp_path: Path, options: dict[str, Any]) -> None:
    assert check_adapter(adapter(tmp_path / "a"), base(tmp_path / "base", **options)).rank == 2


def test_a_base_may_have_several_files(tmp_path: Path) -> None:
    path = folders.base_folder(tmp_path / "base")
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert check_adapter(adapter(tmp_path / "a"), BaseFacts.of(path, 8)).rank == 2


def test_a_model_was_not_made_from_itself(tmp_path: Path) -> None:
    path = folders.base_folder(tmp_path / "base")
    (path / "quantize.json").write_text(json.dumps({"source": "original"}), encoding="utf-8")
    found = BaseFacts.of(path, 8, origins=[path, tmp_path / "x" / ".." / "base", "embedded", "original"])
    assert found.origins == ("embedded", "original")


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 0}, "r is 0"),
        ({"r": -1}, "r is -1"),
        ({"r": "2"}, "r is '2'"),
        ({"r": 2.0}, "r is 2.0"),
        ({"r": True}, "r is True"),
        ({"r": None}, "r is None"),
        ({"r": 10**30}, "r is 1000"),
        ({"r": 4}, "have rank 2, but adapter_config.json says 4"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf"),
        ({"lora_alpha": "4"}, "lora_alpha is '4'"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern of q_proj is 0"),
        ({"rank_pattern": {"q_proj": 3}}, "have rank 2, but adapter_config.json says 3"),
        ({"rank_pattern": [1]}, "rank_pattern is no JSON object"),
        ({"rank_pattern": {"(a+)+$": 2}}, "rank_pattern has the key '(a+)+$'"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern of q_proj is nan"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"init_lora_weights": "pissa"}, "changes the base model"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_modules": [1]}, "target_modules"),
        ({"target_modules": {"a": 1}}, "target_modules"),
    ],
)
def test_a_configuration_that_asks_for_something_else_is_refused(
    tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    folder = adapter(tmp_path / "bad", **config)
    assert_refused(folder, base(tmp_path / "base"), says)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"null", b"\xff\xfe", b"[" * 100_000, b" " * (2 << 20)])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    folder = adapter(tmp_path / "bad")
    (folder / "adapter_config.json").write_bytes(text)
    assert_refused(folder, base(tmp_path / "base"), "adapter_config.json")


# --- tensors ---------------------------------------------------------------------------------------------------------

_Q = "base_model.model.model.layers.0.self_attn.q_proj"
_BAD: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no factors": (dict, "holds no factors"),
    "one side": (lambda: {f"{_Q}.lora_A.weight": np.zeros((2, 8), np.float32)}, "lora_A alone"),
    "two ranks": (
        lambda: {
            f"{_Q}.lora_A.weight": np.zeros((2, 8), np.float32),
            f"{_Q}.lora_B.weight": np.zeros((8, 3), np.float32),
        },
        "ranks 2 and 3",
    ),
    "rank 0": (
        lambda: {
            f"{_Q}.lora_A.weight": np.zeros((0, 8), np.float32),
            f"{_Q}.lora_B.weight": np.zeros((8, 0), np.float32),
        },
        "ranks 0 and 0",
    ),
    "another width": (
        lambda: {
            f"{_Q}.lora_A.weight": np.zeros((2, 12), np.float32),
            f"{_Q}.lora_B.weight": np.zeros((12, 2), np.float32),
        },
        "for another base",
    ),
    "more blocks": (
        lambda: {key.replace("layers.1", "layers.7"): one for key, one in factors().items()},
        "for another base",
    ),
    "no such layer": (
        lambda: {key.replace("q_proj", "qq_proj"): one for key, one in factors().items()},
        "no linear layer of 'base'",
    ),
    "the head": (
        lambda: {
            **factors(),
            "base_model.model.lm_head.lora_A.weight": np.zeros((2, 8), np.float32),
            "base_model.model.lm_head.lora_B.weight": np.zeros((5, 2), np.float32),
        },
        "the embedding or the output head",
    ),
    "an embedding": (
        lambda: {**factors(), "base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((2, 5), np.float32)},
        "the embedding or the output head",
    ),
    "a saved module": (
        lambda: {**factors(), "base_model.model.lm_head.weight": np.zeros((5, 8), np.float32)},
        "lm_head",
    ),
    "a magnitude": (
        lambda: {**factors(), f"{_Q}.lora_magnitude_vector": np.zeros(8, np.float32)},
        "DoRA",
    ),
    "a bias": (lambda: {**factors(), f"{_Q}.lora_B.bias": np.zeros(8, np.float32)}, "lora_B.bias"),
    "whole numbers": (
        lambda: {key: one.astype(np.int64) for key, one in factors().items()},
        "I64",
    ),
    "NaN": (lambda: factors(value=math.nan), "NaN"),
    "infinity in 16 bits": (
        lambda: {key: np.full(one.shape, 0x7F80, np.uint16) for key, one in factors().items()},
        "NaN",
    ),
    "half precision NaN": (
        lambda: {key: np.full(one.shape, math.nan, np.float16) for key, one in factors().items()},
        "NaN",
    ),
}


@pytest.mark.parametrize("kind", _BAD)
def test_factors_that_do_not_fit_are_refused(tmp_path: Path, kind: str) -> None:
    make, says = _BAD[kind]
    assert_refused(adapter(tmp_path / "bad", make()), base(tmp_path / "base"), says)


def test_a_rank_above_the_engines_is_refused(tmp_path: Path) -> None:
    assert_refused(
        adapter(tmp_path / "bad", factors(4), r=4), base(tmp_path / "base", max_rank=2), "above the server's 2"
    )


# --- names and bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "handbook", "team/handbook-2.1", "org:x@7", "_x+y", "ä"[:0] + "A1"])
def test_names(name: str) -> None:
    assert check_name(name) == name
    assert parse_adapter(f"{name}=some/folder") == (name, Path("some/folder"))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/../b", "/a", "a/", "a//b", "a b", "a\nb", "ä", "a'b", "-x", "%2e", "x" * 129]
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="expected at most 128"):
        check_name(name)


@pytest.mark.parametrize("text", ["", "name", "=folder", "name=", "name= "])
def test_what_is_no_name_and_folder(text: str) -> None:
    with pytest.raises(UserError):
        parse_adapter(text)


class _Known(BaseHashes):
    """Hashes that need not be computed."""

    def __init__(self, base: BaseFacts, cache: Path, own: list[str]) -> None:
        super().__init__(base, cache)
        self.own = own

    def find(self, wanted: str) -> str | None:
        return "the base" if wanted in self.own else None

    def known(self) -> list[str]:
        return self.own

    @property
    def sure(self) -> bool:
        return bool(self.own)


def test_a_folded_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    known = base(tmp_path / "base")
    card = {"base_hash": "a" * 32, "recall": 0.9, "accepted": True, "facts": ["x", "y"]}
    folder = adapter(tmp_path / "fold", card=card)
    assert_refused(folder, known, "folded for another base", hashes=_Known(known, tmp_path, ["b" * 32]))
    facts = check_adapter(folder, known, hashes=_Known(known, tmp_path, ["a" * 32]))
    assert (facts.folded, facts.recall, facts.facts, facts.notes) == (True, 0.9, 2, ())
    assert facts.base.startswith("by its hash")


@pytest.mark.parametrize("recall", ["NaN", "1e999", "-1", "1" + "0" * 400, '"0.9"', "true"])
def test_a_recall_that_is_none_does_not_break_the_list(tmp_path: Path, recall: str) -> None:
    folder = adapter(tmp_path / "fold")
    (folder / "fold.json").write_text(f'{{"base_hash": "{"a" * 32}", "recall": {recall}}}', encoding="utf-8")
    facts = check_adapter(folder, base(tmp_path / "base"))
    assert facts.recall is None
    json.dumps(facts.to_dict(), allow_nan=False)


def test_a_base_that_cannot_be_hashed_is_said_to_be_uncompared(tmp_path: Path) -> None:
    known = base(tmp_path / "base")
    folder = adapter(tmp_path / "fold", card={"base_hash": "a" * 32, "accepted": False})
    facts = check_adapter(folder, known, hashes=_Known(known, tmp_path, []))
    assert "not compared" in facts.base
    assert len(facts.notes) == 2, facts.notes


@pytest.mark.parametrize("card", ["[]", "{}", "{", '{"base_hash": 7}'])
def test_a_card_that_is_none_is_refused(tmp_path: Path, card: str) -> None:
    folder = adapter(tmp_path / "fold")
    (folder / "fold.json").write_text(card, encoding="utf-8")
    assert_refused(folder, base(tmp_path / "base"), "fold.json")


@pytest.mark.parametrize("break_it", ["config.json", "model.safetensors"])
def test_a_base_that_is_none_is_refused(tmp_path: Path, break_it: str) -> None:
    path = folders.base_folder(tmp_path / "base")
    (path / break_it).unlink()
    with pytest.raises(UserError, match="base"):
        BaseFacts.of(path, 8)
