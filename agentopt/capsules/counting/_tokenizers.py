"""The tokenizers a name, a path or a file can stand for; nothing is loaded before it is asked for, and then once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from agentopt.capsules.counting._token_tiktoken import find_encoding, load_encoding
from agentopt.capsules.counting._tokens import Tokenizer
from agentopt.errors import UserError

EMBEDDED = ("embedded", "embedded/smollm2-135m-instruct")
_LOADED: dict[tuple[object, ...], Tokenizer] = {}
_LOCK = threading.RLock()


class Bytes:
    """UTF-8 bytes: never fewer than the tokens of a byte-level BPE, so a budget in bytes is a sound bound."""

    name = "bytes"
    exact = True

    def count(self, text: str) -> int:
        """Length in UTF-8; a lone surrogate counts as three bytes."""
        return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))

    def count_many(self, texts: Sequence[str]) -> list[int]:
        """`count` of each."""
        return [self.count(text) for text in texts]


class Words:
    """Stretches without white space: what a person counts. Scripts written without blanks count few words."""

    name = "words"
    exact = True

    def count(self, text: str) -> int:
        """Stretches without white space."""
        return len(text.split())

    def count_many(self, texts: Sequence[str]) -> list[int]:
        """`count` of each."""
        return [len(text.split()) for text in texts]


def resolve_tokenizer(name: str | Path | Tokenizer) -> Tokenizer:
    """The tokenizer that `name` stands for; loaded once per process.

    Args:
        name: a tiktoken encoding (`o200k_base`), an OpenAI model name (`gpt-4o`), `bytes`, `words`, `embedded`, the
            path of a `tokenizer.json`, a model folder or a GGUF file, the address of a /tokenize endpoint
            (`http://localhost:8000`), or a `Tokenizer`, which is given back.

    Raises:
        UserError: nothing of that name, or what it stands for cannot be read here.
    """
    if isinstance(name, Tokenizer):
        return name
    if isinstance(name, Path):
        return _of_path(name, str(name))
    if name == "bytes":
        return _once(("bytes",), Bytes)
    if name == "words":
        return _once(("words",), Words)
    if name in EMBEDDED:
        return _embedded(name)
    if name.startswith(("http://", "https://")):
        from agentopt.capsules.counting._token_endpoint import Endpoint

        return _once(("endpoint", name), lambda: Endpoint(name))
    encoding = find_encoding(name)
    if encoding is not None:
        return _once(("tiktoken", encoding, name), lambda: load_encoding(encoding, name))
    if name.startswith("hf:"):
        from agentopt.models._embedded_files import fetch

        return _of_path(fetch(name), name)
    return _of_path(Path(name), name)


def _once(key: tuple[object, ...], load: Callable[[], Tokenizer]) -> Tokenizer:
    """Loaded tokenizers are shared: they are pure, and a vocabulary takes a second to read."""
    found = _LOADED.get(key)
    if found is not None:
        return found
    with _LOCK:
        if key not in _LOADED:
            _LOADED[key] = load()
        return _LOADED[key]


def _embedded(name: str) -> Tokenizer:
    from agentopt.models._embedded_files import INSTALL_WEIGHTS, packaged_file

    path = packaged_file()
    if path is None:
        raise UserError(f"tokenizer {name!r}: the embedded model is not installed: {INSTALL_WEIGHTS}")
    return _of_path(path, "embedded")


def _of_path(path: Path, name: str) -> Tokenizer:
    path = path.expanduser()
    if name.strip() and path.is_dir():
        path = _inside(path, name)
    if not path.is_file():
        raise UserError(
            f"tokenizer: found {name!r}, expected a tiktoken encoding (o200k_base, cl100k_base, ...), an OpenAI model "
            "name, bytes, words, embedded, the path of a tokenizer.json, a model folder or a .gguf file, or the "
            "address of a /tokenize endpoint; for a model without any of these, bytes is a sound bound."
        )
    state = path.stat()
    key = ("file", path.resolve(), state.st_mtime_ns, state.st_size, name)
    with path.open("rb") as stream:
        start = stream.read(4)
    if start == b"GGUF":
        from agentopt.capsules.counting._token_gguf import load_gguf

        return _once(key, lambda: load_gguf(path, name))
    if path.suffix == ".model":
        raise UserError(
            f"tokenizer {name!r}: a bare sentencepiece model cannot be read; give the tokenizer.json of the model."
        )
    from agentopt.capsules.counting._token_file import load_json

    return _once(key, lambda: load_json(path, name))


def _inside(folder: Path, name: str) -> Path:
    """The file of a model folder that holds its tokenizer."""
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    weights = sorted(folder.glob("*.gguf"))
    if weights:
        return weights[0]
    raise UserError(f"tokenizer {name!r}: the folder has neither a tokenizer.json nor a .gguf file.")
