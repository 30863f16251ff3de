"""Column weights from a text, and the quantized model against the original on the rest of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights import gg
from agentopt.weights.gg import QuantizeOptions
from agentopt.weights.gg._calibration import read_text, token_rows
from agentopt.weights.gg._other_sources import LoadedSource
from tests.weights.gg import folders
from tests.weights.tiny import WORDS, tiny

torch: Any = pytest.importorskip("torch")

TEXT = "red blue green one two three not . " * 30
COLUMN = 5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text of the tiny model's words."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which one input column counts much more than the others."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("calibration") / "model"
    folders.write(folder)
    tensors = folders.stored(folder)
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{name}.weight"][COLUMN] = 30.0
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] *= 30  # so sure of its words that a wrong weight shows
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def options(text: str, **fields: Any) -> QuantizeOptions:
    """Short rows."""
    return QuantizeOptions(calibrate=text, sequence=24, **fields)


def test_quality_is_what_the_decoded_weights_give(source: Path, text: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    result = gg.quantize(source, tmp_path / "out", "rf8", options=options(text, head=True))
    original: Any = AutoModelForCausalLM.from_pretrained(source)
    other: Any = AutoModelForCausalLM.from_pretrained(source)
    weights = folders.stored(source)
    changed = {
        f"{one.name}.weight": gg.decode(gg.encode(weights[f"{one.name}.weight"], "rf8")) for one in result.tensors
    }
    other.load_state_dict({**other.state_dict(), **changed})
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(source)
    rows = token_rows(tokenizer, TEXT, options(text), 256)
    measured = torch.tensor(rows[len(rows) // 2 :])
    with torch.no_grad():
        p, q = (model(measured).logits[:, :-1].double().log_softmax(-1) for model in (original, other))
    target = measured[:, 1:, None]
    found = result.quality
    assert found is not None and found.tokens == target.numel() and len(rows) == 10
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4) and found.kl > 1e-5
    assert found.perplexity_before == pytest.approx(math.exp(-float(p.gather(-1, target).mean())), rel=1e-6)
    assert found.perplexity_after == pytest.approx(math.exp(-float(q.gather(-1, target).mean())), rel=1e-6)
    assert found.same_top == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert json.loads((tmp_path / "out" / "quantize.json").read_text(encoding="utf-8"))["quality"]["kl"] == found.kl


def test_columns_that_matter_are_kept_better(source: Path, text: str, tmp_path: Path) -> None:
    skip = ("layers.1", "down_proj", "self_attn")
    plain = gg.quantize(source, tmp_path / "plain", options=QuantizeOptions(skip=skip))
    weighed = gg.quantize(source, tmp_path / "weighed", options=options(text, skip=skip))
    again = gg.quantize(source, tmp_path / "again", options=options(text, skip=skip))
    assert plain.quality is None and weighed.quality == again.quality

    def error(out: str) -> float:
        name = "model.layers.0.mlp.gate_proj"
        stored, weight = folders.stored(tmp_path / out), folders.stored(source)[f"{name}.weight"]
        config = json.loads((tmp_path / out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        books = torch.tensor([[*book, 0.0] for book in config["codebooks"]])
        parts = (stored[f"{name}.{end}"] for end in ("qweight", "weight_scale", "book_id"))
        codes, scale, book = parts
        decoded = gg.decode(gg.Encoded(codes, scale, "rf8-gg", books=books, book_id=book))
        return float((weight - decoded)[:, COLUMN].square().sum())

    assert error("weighed") < 0.5 * error("plain")
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("weighed", "again")]
    assert weights[0] == weights[1]


def test_a_model_in_memory_is_measured_and_left_as_it_was(text: str, tmp_path: Path) -> None:
    model, tokenizer = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = gg.quantize(LoadedSource(model, tokenizer), tmp_path / "out", "int8", options=options(text))
    assert result.quality is not None and 0 < result.quality.kl < 1e-4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(UserError, match="a model without a tokenizer"):
        gg.quantize(LoadedSource(model), tmp_path / "other", options=options(text))


def test_conv1d_and_a_tied_head_are_measured(text: str, tmp_path: Path) -> None:
    folders.write(tmp_path / "gpt2", kind="gpt2")
    result = gg.quantize(tmp_path / "gpt2", tmp_path / "out", options=options(text, head=True))
    assert result.quality is not None and 0 <= result.quality.kl < 1e-4 and result.quality.tokens > 50


def test_text_is_read_from_both_kinds_of_files(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one two"}\n\n{"text": "three", "more": 1}\n')
    assert read_text(str(rows), 100) == "one two\n\nthree"
    plain = tmp_path / "plain.txt"
    plain.write_text("one two three")
    assert read_text(str(plain), 7) == "one two"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.csv", b"a", r"found '\.csv', expected a \.txt or \.jsonl"),
        ("text.txt", b" \n", "found no text"),
        ("text.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("text.jsonl", b'{"text": "a"}\n{', "line 2: is not JSON"),
        ("text.jsonl", b'{"words": "a"}', 'line 1: found no text in "text"'),
        ("text.jsonl", b'["a"]', 'line 1: found no text in "text"'),
        ("text.txt", b"red red red", "found 3 tokens, expected some thousand"),
    ],
)
def test_a_text_that_is_none_is_refused(source: Path, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        gg.quantize(source, tmp_path / "out", "rf8", options=options(str(tmp_path / name)))
    with pytest.raises(UserError, match=r"nowhere\.txt: cannot be read"):
        gg.quantize(source, tmp_path / "out", "rf8", options=options(str(tmp_path / "nowhere.txt")))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_rows_begin_as_the_tokenizer_begins_and_never_overlap() -> None:
    _, tokenizer = tiny()
    words = " ".join(WORDS[:8])
    rows = token_rows(tokenizer, words, QuantizeOptions(calibrate="t.txt", sequence=3), 100)
    assert rows == [[3, 4, 5], [6, 7, 8]]
    assert token_rows(tokenizer, words, QuantizeOptions(calibrate="t.txt", sequence=3, calibrate_tokens=4), 100) == [
        [3, 4],
        [5, 6],
    ]

    class Leading:
        bos_token_id = 1

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1, *tokenizer(text)["input_ids"]] if not _ else tokenizer(text)["input_ids"]}

    assert token_rows(Leading(), words, QuantizeOptions(calibrate="t.txt"), 4) == [[1, 3, 4, 5], [1, 6, 7, 8]]
