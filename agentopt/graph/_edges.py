"""How a call is linked to what ran before it: `data`, `same`, `text`, and `after` when nothing else is known.

Parameter reads and nesting need no guess and are noted where they happen (`agentopt.graph._live`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, cast

from agentopt.graph._live import LiveOp, Rec, entry_of
from agentopt.graph._values import ATOMS, strings_in

MIN_SUBSTRING: Final = 8
_MAX_SIBLINGS: Final = 256  # the texts of this many finished siblings are compared
_MIN_EQUAL_PART: Final = (
    3  # a part of a structured output counts as equal from this length on ("a", "no" would match anything)
)


def link(op: LiveOp, originals: Iterable[Any]) -> None:
    """Add to the opened `op` its edges to earlier records; `originals` are its input values before freezing."""
    seen: set[int] = set()
    values = tuple(originals)
    for name, value in zip(op.op.names, values, strict=True):
        _link_objects(op, name, value, seen)
    parent = op.parent
    siblings = None if parent is None else parent.children
    if not siblings:
        return
    for name, value in zip(op.op.names, op.inputs, strict=True):
        if type(value) is not Rec and type(value) is not LiveOp:
            _link_texts(op, name, value, siblings, seen)
    if not seen and op.op.kind != "op":  # bundles get their data as Nodes; "after" would only be noise
        op.edges.append((siblings[-1], "after", None))


def _link_objects(op: LiveOp, name: str, value: Any, seen: set[int]) -> None:
    for item in _one_level(value):
        if type(item) in ATOMS:
            continue
        entry = entry_of(item)
        if entry is not None:
            if item is not value:  # a Node given directly is an input already
                op.edges.append((entry, "data", name))
            seen.add(id(entry))
            continue
        held = None if op.recording is None else op.recording.held(item)
        if held is not None and id(held) not in seen:
            seen.add(id(held))
            op.edges.append((held, "parameter" if held.op.kind == "parameter" else "same", name))


def _one_level(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, dict):
        yield from list(cast("dict[Any, Any]", value).values())[:1000]
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from list(cast("list[Any]", value))[:1000]


def _link_texts(op: LiveOp, name: str, value: Any, siblings: list[LiveOp], seen: set[int]) -> None:
    texts = [text for text in strings_in(value) if text]
    if not texts:
        return
    open_texts = dict.fromkeys(texts, True)  # texts whose own origin is not found yet
    covered: set[str] = set()
    for sibling in reversed(siblings[-_MAX_SIBLINGS:]):
        if sibling.strings is None:
            sibling.strings = tuple(strings_in(sibling.value))
        whole = isinstance(sibling.value, str)
        if any(_matches(output, whole, open_texts, covered) for output in sibling.strings) and id(sibling) not in seen:
            seen.add(id(sibling))
            op.edges.append((sibling, "text", name))


def _matches(output: str, whole: bool, open_texts: dict[str, bool], covered: set[str]) -> bool:
    """Whether an input equals `output`, lies in it or contains it; each text is explained by its latest origin only."""
    if not output or output in covered:
        return False
    found = False
    for text, unexplained in open_texts.items():
        if text == output:
            hit = unexplained and (whole or len(text) >= _MIN_EQUAL_PART)
        elif len(output) < len(text):
            hit = len(output) >= MIN_SUBSTRING and output in text
            if hit:
                covered.add(output)
                found = True
            continue
        else:
            hit = unexplained and len(text) >= MIN_SUBSTRING and text in output
        if hit:
            open_texts[text] = False
            covered.add(output)
            found = True
    return found
