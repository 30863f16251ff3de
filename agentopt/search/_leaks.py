"""Keep examples out of instructions: copied inputs inflate the score and expose data (gepa#261).

A run of five or more words of a train, validation or test input or label must not appear in an instruction. What the
original prompt or a declared document says already may stay, and label names are no leak (a classifier's instruction
has to list them). Demonstrations are data by design; they may come from the training set alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from agentopt.graph import Candidate, ParameterSpec

NGRAM = 5
_TEXT_KINDS = frozenset({"prompt", "tool_text", "knowledge", "value", "code", "principles", "tools", "pipeline"})
_WORDS = re.compile(r"\w+(?:['’]\w+)*|\x00")
_VARIABLE = re.compile(r"\{\w*\}")


class _Row(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def inputs(self) -> Mapping[str, Any]: ...
    @property
    def expected(self) -> Any: ...


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; a template variable is a mark of its own, so nothing joins across it."""
    return _WORDS.findall(_VARIABLE.sub(" \x00 ", text).lower())


def _ngrams(text: str) -> Iterable[tuple[str, ...]]:
    found = words(text)
    return (tuple(found[i : i + NGRAM]) for i in range(len(found) - NGRAM + 1))


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():  # pyright: ignore[reportUnknownVariableType]
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _strings(item)


def _normal(text: str) -> str:
    return " ".join(words(text))


class LeakGuard:
    """Built once per run from all splits and the original candidate; then asked about every proposal."""

    def __init__(
        self,
        splits: Mapping[Any, Iterable[_Row]],
        original: Candidate,
        specs: Mapping[str, ParameterSpec],
    ) -> None:
        self._specs = specs
        self._grams: dict[int, str] = {}  # hash of an n-gram → the split it was first seen in
        self._train_ids: set[str] = set()
        train_texts: set[str] = set()
        held_out: dict[str, str] = {}
        labels: dict[str, int] = {}
        for split, rows in splits.items():
            for row in rows:
                if split == "train":
                    self._train_ids.add(row.id)
                if isinstance(row.expected, str):
                    labels[row.expected] = labels.get(row.expected, 0) + 1
                for text in (*_strings(row.inputs), *_strings(row.expected)):
                    for gram in _ngrams(text):
                        self._grams.setdefault(hash(gram), split)
                for text in _strings(row.inputs):
                    if split == "train":
                        train_texts.add(_normal(text))
                    else:
                        held_out.setdefault(_normal(text), split)
        self._held_out = {text: split for text, split in held_out.items() if text and text not in train_texts}
        # A label that several rows share is a name, however long it is.
        allowed = [label for label, count in labels.items() if count > 1]
        allowed += [text for name in specs for text in _strings(original.values.get(name, specs[name].default))]
        allowed += [text for spec in specs.values() if spec.knowledge is not None for text in spec.knowledge.documents]
        for text in allowed:
            for gram in _ngrams(text):
                self._grams.pop(hash(gram), None)

    def check(self, candidate: Candidate) -> str | None:
        """Why this candidate may not be used, in one sentence; None when nothing leaks."""
        for name, spec in self._specs.items():
            value: Any = candidate.values.get(name, spec.default)
            problem: str | None = None
            if spec.kind in _TEXT_KINDS:
                problem = self._text(value)
            elif spec.kind == "demos" and isinstance(value, list | tuple):
                problem = self._demos(value)  # pyright: ignore[reportUnknownArgumentType]
            if problem is not None:
                return f"{name}: {problem}"
        return None

    def _text(self, value: Any) -> str | None:
        for text in _strings(value):
            for gram in _ngrams(text):
                split = self._grams.get(hash(gram))
                if split is not None:
                    return f"copies {' '.join(gram)!r} from a {split} example"
        return None

    def _demos(self, items: Iterable[Any]) -> str | None:
        for item in items:
            if not isinstance(item, Mapping):
                continue
            demo: dict[str, Any] = dict(item)  # pyright: ignore[reportUnknownArgumentType]
            source = str(demo.get("source") or "")
            if source and source not in self._train_ids:
                return f"has a demonstration from example {source!r}, which is not a training example"
            split = self._held_out.get(_normal(str(demo.get("input") or "")))
            if split is not None:
                return f"has a demonstration whose input is a {split} example"
        return None
