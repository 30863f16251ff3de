"""The tokenizer inside a GGUF file, rebuilt from the file's metadata without torch and without reading its weights.

GGUF begins with key/value metadata; the vocabulary, the merges, the name of the splitting rule and the chat template
are among them. Two kinds cover nearly all chat models: byte-level BPE (`gpt2`) and sentencepiece-style BPE (`llama`).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from agentopt.capsules.counting._token_file import GPT2, LLAMA3, O200K, QWEN2, FileTokenizer, library
from agentopt.errors import UserError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_LARGEST = 1 << 31
"""No metadata value is longer than this; a larger length means a damaged file."""
_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_RULES = {
    **dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2"), GPT2),
    **dict.fromkeys(_DIGITS_APART, GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe", "chatglm-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"), QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), O200K),
}
"""Name of the splitting rule in the file -> expression."""
_WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3"})


class _Damaged(ValueError):
    pass


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key/value pair of a GGUF file.

    Raises:
        UserError: the file is not GGUF or is damaged.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise _Damaged("its first four bytes are not 'GGUF'")
            version, _, count = (*_read(stream, "<I"), *_read(stream, "<Q"), *_read(stream, "<Q"))
            if version not in (2, 3):
                raise _Damaged(f"version {version}, expected 2 or 3")
            return {_text(stream): _value(stream, *_read(stream, "<I")) for _ in range(count)}
    except (_Damaged, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"GGUF file {path.name}: cannot read its metadata ({error}).") from error


def _read(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, stream.read(struct.calcsize(form)))


def _bytes(stream: BinaryIO) -> bytes:
    (length,) = _read(stream, "<Q")
    if length > _LARGEST or len(data := stream.read(length)) != length:
        raise _Damaged("a text ends beyond the file")
    return data


def _text(stream: BinaryIO) -> str:
    return _bytes(stream).decode("utf-8", "replace")  # some vocabularies hold broken UTF-8


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(stream)
    if kind != _ARRAY:
        if kind not in _SCALARS:
            raise _Damaged(f"unknown value type {kind}")
        return _read(stream, _SCALARS[kind])[0]
    inner, length = (*_read(stream, "<I"), *_read(stream, "<Q"))
    if length > _LARGEST:
        raise _Damaged("a list ends beyond the file")
    if inner in (_STRING, _ARRAY):
        return [_value(stream, inner) for _ in range(length)]
    if inner not in _SCALARS:
        raise _Damaged(f"unknown value type {inner}")
    form = f"<{length}{_SCALARS[inner][1]}"
    return list(_read(stream, form))


def load_gguf(path: Path, name: str) -> FileTokenizer:
    """The tokenizer of a GGUF file, with its chat template.

    Raises:
        UserError: the file is damaged, or its tokenizer is of another kind.
    """
    from agentopt.capsules.counting._templates import ChatTemplate

    tokenizers = library(name)
    data = read_metadata(path)
    if not isinstance(data.get("tokenizer.ggml.tokens"), list):
        raise UserError(f"tokenizer {name!r}: {path.name} holds no vocabulary; give the model's tokenizer.json.")
    model = data.get("tokenizer.ggml.model")
    if model == "gpt2":
        built = _byte_level(tokenizers, data, name)
    elif model == "llama":
        built = _sentencepiece(tokenizers, data)
    else:
        raise UserError(
            f"tokenizer {name!r}: {path.name} has a tokenizer of kind {model!r}, expected gpt2 or llama; give the "
            "model's tokenizer.json."
        )
    source = data.get("tokenizer.chat_template")
    template = ChatTemplate(source, _variables(data), name) if isinstance(source, str) else None
    return FileTokenizer(lambda: tokenizers.Tokenizer.from_str(built), name, template)


def _variables(data: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a chat template may name."""
    tokens = cast("list[str]", data["tokenizer.ggml.tokens"])
    found: dict[str, str] = {}
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    for short, variable in names.items():
        place = data.get(f"tokenizer.ggml.{short}_token_id")
        if isinstance(place, int) and 0 <= place < len(tokens):
            found[variable] = tokens[place]
    return found


def _byte_level(tokenizers: Any, data: Mapping[str, Any], name: str) -> str:
    rule = str(data.get("tokenizer.ggml.pre", "gpt-2"))
    if rule not in _RULES:
        raise UserError(
            f"tokenizer {name!r}: the file names the splitting rule {rule!r}, expected one of "
            f"{', '.join(sorted(_RULES))}; give the model's tokenizer.json."
        )
    tokens = cast("list[str]", data["tokenizer.ggml.tokens"])
    merges = [tuple(merge.split(" ", 1)) for merge in cast("list[str]", data.get("tokenizer.ggml.merges", []))]
    cut = tokenizers.pre_tokenizers
    steps: list[Any] = []
    if rule in _DIGITS_APART:
        steps.append(cut.Digits(individual_digits=True))
    steps.append(cut.Split(tokenizers.Regex(_RULES[rule]), "isolated"))
    steps.append(cut.ByteLevel(add_prefix_space=False, use_regex=False))
    model = tokenizers.models.BPE(
        {token: number for number, token in enumerate(tokens)}, merges, ignore_merges=rule in _WHOLE_WORDS_FIRST
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = cut.Sequence(steps)
    _add_special(tokenizers, tokenizer, data)
    return tokenizer.to_str()


def _sentencepiece(tokenizers: Any, data: Mapping[str, Any]) -> str:
    """Sentencepiece-style BPE has no merge list: a pair merges when the whole is a token, best score first."""
    tokens = cast("list[str]", data["tokenizer.ggml.tokens"])
    scores = cast("list[float]", data.get("tokenizer.ggml.scores", [0.0] * len(tokens)))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for number, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[number], vocabulary[left], vocabulary[right], (left, right)))
    ranked.sort()
    unknown = data.get("tokenizer.ggml.unknown_token_id", 0)
    model = tokenizers.models.BPE(
        vocabulary, [pair for *_, pair in ranked], unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    change = tokenizers.normalizers
    steps: list[Any] = [change.Prepend("▁")] if data.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = change.Sequence([*steps, change.Replace(" ", "▁")])
    _add_special(tokenizers, tokenizer, data)
    return tokenizer.to_str()


def _add_special(tokenizers: Any, tokenizer: Any, data: Mapping[str, Any]) -> None:
    """Control tokens stand for themselves in a chat only, user-defined ones in every text."""
    tokens = cast("list[str]", data["tokenizer.ggml.tokens"])
    kinds = cast("list[int]", data.get("tokenizer.ggml.token_type", []))
    control = [token for token, kind in zip(tokens, kinds, strict=False) if kind in (_UNKNOWN, _CONTROL) and token]
    own = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED and token]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in own])
