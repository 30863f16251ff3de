"""A model's own tokenizer, from its `tokenizer.json` or its GGUF file, by the `tokenizers` library, without torch.

A long text is cut where these tokenizers always cut, so that the library's bookkeeping stays small.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from agentopt.capsules.counting._remembered import LONG, Remembered
from agentopt.errors import UserError

if TYPE_CHECKING:
    from agentopt.capsules.counting._templates import ChatTemplate

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The published splitting expressions of four families of byte-level tokenizers."""
_KNOWN = frozenset({GPT2, LLAMA3, QWEN2, O200K})
_EDGE = re.compile(r"(?<=[A-Za-z0-9ぁ-ゖァ-ヺ一-龥])(?=[ \n。，、！？!-&(-/:-@\[-^`{-~])")
"""Between a letter or digit and one of these no known expression makes one piece (an apostrophe and _ are not here)."""
_SHORT, _REMEMBERED = 2_048, 4_096
"""Characters of a short text, and how many short texts have their counts remembered: units are counted repeatedly."""
_PLAIN_NORMALIZERS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"})
_CUTTING = frozenset({"BertPreTokenizer", "Whitespace", "WhitespaceSplit"})
_HARMLESS = frozenset({"Digits", "Punctuation"})


class FileTokenizer:
    """Counts with a `tokenizers.Tokenizer`. Special tokens inside a text are ordinary text; in a chat they are not."""

    exact = True

    def __init__(self, load: Callable[[], Any], name: str, template: ChatTemplate | None = None) -> None:
        self.name = name
        self.template = template
        self._load = load
        self._ordinary = load()
        self._ordinary.encode_special_tokens = True
        self._separable = separable(self._ordinary)
        self._special: Any = None
        self._short = functools.lru_cache(maxsize=_REMEMBERED)(functools.partial(_encoded, self._ordinary))
        self._long = Remembered()
        self._lock = threading.Lock()

    def count(self, text: str) -> int:
        """Tokens of `text`."""
        if len(text) <= _SHORT:
            return self._short(text)
        return _encoded(self._ordinary, text) if len(text) <= LONG else self._long.count(text, self._sum)

    def count_many(self, texts: Sequence[str]) -> list[int]:
        """`count` of each."""
        return [self.count(text) for text in texts]

    def count_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> int:
        """Tokens of chat messages in the model's own template; in ChatML where it has none."""
        from agentopt.capsules.counting._templates import chatml

        if self.template is None:
            return self.count(chatml(messages, tools))
        rendered = self.template.render(messages, tools)
        with self._lock:
            if self._special is None:
                self._special = self._load()
        return _encoded(self._special, rendered)

    def _sum(self, text: str) -> int:
        return sum(_encoded(self._ordinary, part) for part in (segments(text) if self._separable else (text,)))


def _encoded(tokenizer: Any, text: str) -> int:
    try:
        return len(tokenizer.encode(text, add_special_tokens=False))
    except (TypeError, UnicodeEncodeError):  # a lone surrogate, which no transport can carry
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return len(tokenizer.encode(text, add_special_tokens=False))


def segments(text: str, size: int = LONG) -> Iterator[str]:
    """The text in stretches of about `size`, cut only at edges; a stretch without an edge stays whole."""
    begin = 0
    while len(text) - begin > size:
        edge = _EDGE.search(text, begin + size)
        if edge is None:
            break
        yield text[begin : edge.start()]
        begin = edge.start()
    yield text[begin:]


def separable(tokenizer: Any) -> bool:
    """Whether the tokens of a text are those of its `segments`, judging by how the tokenizer cuts."""
    before: list[dict[str, Any]] = _flat(tokenizer.normalizer)
    cuts: list[dict[str, Any]] = _flat(tokenizer.pre_tokenizer)
    if any(step["type"] not in _PLAIN_NORMALIZERS for step in before):
        return False
    kinds = [_cut_kind(step) for step in cuts]
    added = tokenizer.get_added_tokens_decoder().values()
    return (
        "cut" in kinds
        and "other" not in kinds
        and not any(not token.special and (token.rstrip or _EDGE.search(token.content)) for token in added)
    )


def _cut_kind(step: Mapping[str, Any]) -> str:
    kind = step["type"]
    if kind in _CUTTING:
        return "cut"
    if kind in _HARMLESS:
        return "harmless"
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "cut" if step.get("use_regex", True) else "harmless"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        pattern = cast("dict[str, str]", step.get("pattern", {})).get("Regex")
        return "cut" if pattern in _KNOWN else "other"
    return "other"


def _flat(component: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer as the library describes them."""
    if component is None:
        return []
    steps: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = [json.loads(component.__getstate__())]
    while waiting:
        step = waiting.pop(0)
        inner = step.get("pretokenizers") or step.get("normalizers")
        if step["type"] == "Sequence":
            waiting = [*cast("list[dict[str, Any]]", inner or []), *waiting]
        else:
            steps.append(step)
    return steps


def library(name: str) -> Any:
    """The `tokenizers` package.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("tokenizers") is None:
        raise UserError(f"tokenizer {name!r} needs the package tokenizers: pip install 'agentopt[capsule]'.")
    return importlib.import_module("tokenizers")


def load_json(path: Path, name: str) -> FileTokenizer:
    """The tokenizer of a `tokenizer.json`, with the chat template that lies beside it.

    Raises:
        UserError: the file is not a tokenizer.
    """
    from agentopt.capsules.counting._templates import template_of_folder

    tokenizers = library(name)

    def load() -> Any:
        try:
            loaded = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"tokenizer {name!r}: {path.name} is not a tokenizer.json ({reason:.120}).") from error
        loaded.no_truncation()  # some files carry the limits of the model they were trained with
        loaded.no_padding()
        return loaded

    return FileTokenizer(load, name, template_of_folder(path.parent))
