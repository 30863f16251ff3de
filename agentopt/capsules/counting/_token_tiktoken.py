"""OpenAI's encodings, read from disk: tiktoken's cache folder or the copies that litellm ships; offline first.

tiktoken's regular expression engine gives up on a run of white space of about a megabyte, so a long run is cut out and
counted as the pieces the expression would have made of it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import tempfile
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentopt.capsules.counting._remembered import LONG, Remembered
from agentopt.errors import UserError

_FILES = {
    "o200k_base": "o200k_base",
    "o200k_harmony": "o200k_base",
    "cl100k_base": "cl100k_base",
    "p50k_base": "p50k_base",
    "p50k_edit": "p50k_base",
    "r50k_base": "r50k_base",
    "gpt2": "gpt2",
}
"""Encoding -> the vocabulary file it is made of."""
_URL = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
_RUN = LONG
_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""White space as the encodings see it (Unicode's property; Python counts four control characters more)."""
_ENVIRONMENT = threading.Lock()


class Tiktoken:
    """A tiktoken encoding. Special tokens inside a text are ordinary text."""

    exact = True

    def __init__(self, encoding: Any, name: str) -> None:
        self.name = name
        self._encoding = encoding
        self._encode = encoding.encode_ordinary
        self._newlines = encoding.name.startswith(("cl100k", "o200k"))
        self._long = Remembered()
        self._to_end = not encoding.name.startswith("o200k")

    def count(self, text: str) -> int:
        """Tokens of `text`."""
        return len(self._encode(text)) if len(text) < _RUN else self._long.count(text, self._sum)

    def _sum(self, text: str) -> int:
        return sum(
            len(self._encoding._encode_single_piece(piece)) if alone else len(self._encode(piece))
            for piece, alone in self._pieces(text)
        )

    def count_many(self, texts: Sequence[str]) -> list[int]:
        """`count` of each."""
        return [self.count(text) for text in texts]

    def count_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> int:
        """Tokens of chat messages as OpenAI documents their overhead."""
        from agentopt.capsules.counting._templates import openai_texts

        texts, overhead = openai_texts(messages, tools)
        return sum(self.count_many(texts)) + overhead

    def _pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text in stretches that are encoded on their own, and whether a stretch is one piece already."""
        begin = 0
        for start, end in _long_runs(text):
            if start < begin:
                continue
            if self._newlines and start > begin and unicodedata.category(text[start - 1])[0] not in "LN":
                start += len(text[start:end]) - len(text[start:end].lstrip("\r\n"))  # punctuation takes its line ends
            if start == end:
                continue
            yield text[begin:start], False
            begin = start
            ends = end == len(text)
            if self._newlines and not (ends and self._to_end):
                last = max(text.rfind("\n", start, end), text.rfind("\r", start, end)) + 1
                if last > start:
                    yield text[start:last], True
                    begin = last
            stop = end if ends else end - 1  # the last blank goes with the word after it
            if stop > begin:
                yield text[begin:stop], True
                begin = stop
        yield text[begin:], False


def _long_runs(text: str) -> Iterator[tuple[int, int]]:
    """Runs of at least _RUN blanks: each of them covers a multiple of _RUN."""
    for place in range(0, len(text), _RUN):
        if text[place] not in _SPACE:
            continue
        start = len(text[:place].rstrip(_SPACE))
        end = len(text) - len(text[place:].lstrip(_SPACE))
        if end - start >= _RUN:
            yield start, end


def find_encoding(name: str) -> str | None:
    """The encoding that `name` means: its own name or an OpenAI model's; None when it is neither (or no tiktoken)."""
    if name in _FILES:
        return name
    if importlib.util.find_spec("tiktoken") is None:
        return None
    model: Any = importlib.import_module("tiktoken.model")
    try:
        return model.encoding_name_for_model(name.removeprefix("openai/"))
    except KeyError:
        pass
    tiktoken: Any = importlib.import_module("tiktoken")
    return name if name in tiktoken.list_encoding_names() else None


def load_encoding(encoding: str, name: str) -> Tiktoken:
    """The encoding, from disk where it is there.

    Raises:
        UserError: tiktoken is missing, or the vocabulary is neither on disk nor reachable.
    """
    if importlib.util.find_spec("tiktoken") is None:
        raise UserError(
            f"tokenizer {name!r} needs tiktoken: pip install 'agentopt[capsule]', or use --tokenizer bytes."
        )
    tiktoken: Any = importlib.import_module("tiktoken")
    with _ENVIRONMENT:
        folder = _folder(encoding)
        before = os.environ.get("TIKTOKEN_CACHE_DIR")
        if folder is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
        try:
            return Tiktoken(tiktoken.get_encoding(encoding), name)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            raise UserError(
                f"tokenizer {name!r}: the vocabulary {encoding} is not on this machine and cannot be fetched "
                f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR, or use --tokenizer bytes or a tokenizer.json PATH."
            ) from error
        finally:
            if folder is not None:
                _restore(before)


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop("TIKTOKEN_CACHE_DIR", None)
    else:
        os.environ["TIKTOKEN_CACHE_DIR"] = before


def _folder(encoding: str) -> Path | None:
    """A folder that holds the vocabulary file under the name tiktoken looks for; None leaves the search to tiktoken."""
    file = _FILES.get(encoding)
    if file is None:
        return None
    key = hashlib.sha1((_GPT2_URL if file == "gpt2" else _URL.format(file)).encode(), usedforsecurity=False).hexdigest()
    own = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    candidates = [Path(own) if own else Path(tempfile.gettempdir()) / "data-gym-cache"]
    litellm = importlib.util.find_spec("litellm")  # found, never imported: importing it takes seconds
    for place in (litellm.submodule_search_locations or []) if litellm is not None else []:
        candidates.append(Path(place) / "litellm_core_utils" / "tokenizers")
    return next((folder for folder in candidates if (folder / key).is_file()), None)
