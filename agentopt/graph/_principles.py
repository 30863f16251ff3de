"""Principles: a list of short rules that an agent is given, changed one rule at a time.

A rule is `{"id", "text", "helpful", "harmful"}`. The counters say how often it was seen to help or to harm; they steer
optimizers and are never shown to the agent. The idea of small changes with counters instead of rewritten texts is ACE's
(arXiv 2510.04618).
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, ClassVar, cast

from agentopt.errors import UserError
from agentopt.graph._context import active_value
from agentopt.graph._handles import CLASSES, Handle, _declared
from agentopt.graph._jsonvalue import JSONValue
from agentopt.graph._parameters import ParameterSpec
from agentopt.graph._structured import EditError, StructuredEdit

_KEYS = ("id", "text", "helpful", "harmful")
_ID = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_NUMBERED = re.compile(r"p([0-9]{1,9})")
_NO_WORD = re.compile(r"[\W_]+")


class Principles(Handle):
    """A list of rules. As text (`str`, f-string, `+`) it is one `- rule` line each, without ids and counters."""

    __slots__ = ()

    @property
    def value(self) -> list[dict[str, Any]]:
        """The active rules as `{"id", "text", "helpful", "harmful"}`; a copy."""
        return cast("list[dict[str, Any]]", active_value(self._spec))

    @property
    def texts(self) -> list[str]:
        """The active rules' texts."""
        return [item["text"] for item in self.value]

    def for_model(self, value: JSONValue) -> str:
        """What a language model is shown of `value`: one line each."""
        return principle_lines(value)

    def __str__(self) -> str:
        return principle_lines(self.value)

    def __format__(self, format_spec: str) -> str:
        return format(str(self), format_spec)

    def __add__(self, other: object) -> str:
        return str(self) + str(other) if isinstance(other, (str, Handle)) else NotImplemented

    def __radd__(self, other: object) -> str:
        return other + str(self) if isinstance(other, str) else NotImplemented

    def __contains__(self, item: object) -> bool:
        return item in self.texts

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)


CLASSES["principles"] = Principles


def principles(items: Sequence[str] = (), *, name: str, max_items: int = 24, description: str = "") -> Principles:
    """Declare a tunable list of principles: short rules for the agent, added, dropped, reworded and merged one by one.

    Args:
        items: the rules at the start; none is a good start too.
        name: the parameter's identity.
        max_items: how many rules there may be at most.
        description: what the rules are about; optimizers see it.

    Raises:
        UserError: an item is no text or says the same as another, there are too many, or the name is declared with
            another default.
    """
    return declare_principles(items, name, max_items, description, sys._getframe(1))


def declare_principles(
    items: Sequence[str],
    name: str,
    max_items: int,
    description: str,
    frame: FrameType,
    *,
    owner: str = "",
    component: str = "",
) -> Principles:
    """`principles`, for whoever declares them in the name of the caller at `frame`."""
    if isinstance(cast("object", max_items), bool) or not isinstance(cast("object", max_items), int) or max_items < 1:
        raise UserError(f"parameter {name!r}: max_items must be a whole number of at least 1, found {max_items!r}.")
    if isinstance(items, str) or not all(isinstance(cast("object", item), str) for item in items):
        raise UserError(f"parameter {name!r}: principles must be a list of texts, found {items!r:.80}.")
    spec = ParameterSpec(
        name,
        "principles",
        principle_list(items),
        description=description,
        constraint_text=f"at most {max_items} rules, one line each, no two that say the same",
        max_items=max_items,
        check_value=partial(principle_problems, max_items=max_items),
        owner=owner,
        component=component,
    )
    return _declared(Principles, spec, frame)


def principle_list(texts: Sequence[str], known: JSONValue = None) -> list[JSONValue]:
    """`texts` as a value; a text that `known` (another value) has already keeps its id and counters."""
    before = {_plain(item["text"]): item for item in _entries(known)}
    kept = [before.get(_plain(text)) for text in texts]
    taken = {item["id"] for item in kept if item is not None}
    made: list[JSONValue] = []
    for text, item in zip(texts, kept, strict=True):
        if item is not None:
            made.append({**item, "text": _one_line(text)})
            continue
        number = 1 + max([_number(entry) for entry in (*taken, *(entry["id"] for entry in before.values()))], default=0)
        taken.add(f"p{number}")
        made.append({"id": f"p{number}", "text": _one_line(text), "helpful": 0, "harmful": 0})
    return made


def principle_lines(value: JSONValue) -> str:
    """The rules as the agent sees them."""
    return "\n".join(f"- {_one_line(item['text'])}" for item in _entries(value))


def principle_problems(value: Any, *, max_items: int | None = None) -> list[str]:
    """What keeps `value` from being a list of principles, one clause each."""
    if not isinstance(value, list):
        return [f"expected a list of principles, found {type(value).__name__}"]
    items = cast("list[Any]", value)
    if max_items is not None and len(items) > max_items:
        return [f"has {len(items)} principles, at most {max_items} are allowed; drop or merge some first"]
    found = [f"principle {place}: {problem}" for place, item in enumerate(items) for problem in _item_problems(item)]
    if found:
        return found
    ids: set[str] = set()
    texts: dict[str, str] = {}
    for item in items:
        if item["id"] in ids:
            found.append(f"two principles have the id {item['id']!r}")
        ids.add(item["id"])
        plain = _plain(item["text"])
        if plain in texts:
            found.append(f"{item['id']!r} says the same as {texts[plain]!r}: {item['text']!r:.80}")
        texts.setdefault(plain, item["id"])
    return found


def _item_problems(item: Any) -> list[str]:
    if not isinstance(item, Mapping):
        return [f"expected a map with id, text, helpful and harmful, found {type(item).__name__}"]
    entry = cast("Mapping[str, Any]", item)
    odd = [*(key for key in _KEYS if key not in entry), *(key for key in entry if key not in _KEYS)]
    if odd:
        return [f"the keys must be {', '.join(_KEYS)}; {odd[0]!r} is missing or unknown"]
    found: list[str] = []
    if not isinstance(entry["id"], str) or not _ID.fullmatch(entry["id"]):
        found.append(f"'id' must be a short name such as 'p1', found {entry['id']!r:.60}")
    if not isinstance(entry["text"], str) or not entry["text"].strip():
        found.append("'text' must be a rule, found nothing")
    for key in ("helpful", "harmful"):
        number = entry[key]
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            found.append(f"{key!r} must be a count of at least 0, found {number!r:.40}")
    return found


def _entries(value: Any) -> list[dict[str, Any]]:
    """The well-formed rules of `value`, as private maps."""
    items = cast("list[Any]", value) if isinstance(value, list) else []
    return [dict(cast("Mapping[str, Any]", item)) for item in items if not _item_problems(item)]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _plain(text: str) -> str:
    """What two texts that say the same have in common: letter case, punctuation and spacing do not count."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _NO_WORD.sub(" ", folded).strip() or _one_line(folded)


def _number(name: str) -> int:
    match = _NUMBERED.fullmatch(name)
    return int(match[1]) if match else 0


# --- edits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _PrincipleEdit(StructuredEdit):
    """Shared by the edits of one rule."""

    kinds: ClassVar[frozenset[str]] = frozenset({"principles"})


def _place(items: Sequence[Mapping[str, Any]], wanted: str) -> int:
    for place, item in enumerate(items):
        if item["id"] == wanted:
            return place
    known = ", ".join(item["id"] for item in items) or "none"
    raise EditError(f"there is no principle {wanted!r}; the ids are {known}")


def _new_text(items: Sequence[Mapping[str, Any]], text: str) -> str:
    """`text` on one line, when no rule of `items` says it already."""
    line = _one_line(text)
    if not line:
        raise EditError("the text of a principle must not be empty")
    for item in items:
        if _plain(item["text"]) == _plain(line):
            raise EditError(f"says the same as principle {item['id']!r}: {item['text']!r:.80}")
    return line


@dataclass(frozen=True, slots=True)
class AddPrinciple(_PrincipleEdit):
    """Append a rule; its id is above every number in the list and in the declared default."""

    kind: ClassVar[str] = "add_principle"
    text: str

    def change(self, value: Any, spec: ParameterSpec | None) -> JSONValue:
        """The list with the rule at its end."""
        items = _entries(value)
        line = _new_text(items, self.text)
        known = [*items, *_entries(spec.default if spec is not None else None)]
        number = 1 + max([_number(item["id"]) for item in known], default=0)
        return [*items, {"id": f"p{number}", "text": line, "helpful": 0, "harmful": 0}]


@dataclass(frozen=True, slots=True)
class DropPrinciple(_PrincipleEdit):
    """Remove the rule `id`."""

    kind: ClassVar[str] = "drop_principle"
    id: str

    def change(self, value: Any, spec: ParameterSpec | None) -> JSONValue:
        """The list without the rule."""
        items = _entries(value)
        del items[_place(items, self.id)]
        return cast("JSONValue", items)


@dataclass(frozen=True, slots=True)
class RewritePrinciple(_PrincipleEdit):
    """Reword the rule `id`; it keeps its id, place and counters."""

    kind: ClassVar[str] = "rewrite_principle"
    id: str
    text: str

    def change(self, value: Any, spec: ParameterSpec | None) -> JSONValue:
        """The list with the new text."""
        items = _entries(value)
        place = _place(items, self.id)
        line = _new_text([*items[:place], *items[place + 1 :]], self.text)
        if line == items[place]["text"]:
            raise EditError(f"principle {self.id!r} has this text already")
        items[place]["text"] = line
        return cast("JSONValue", items)


@dataclass(frozen=True, slots=True)
class MergePrinciples(_PrincipleEdit):
    """Put one rule in the place of several: id and place are those of the first of them, the counters add up."""

    kind: ClassVar[str] = "merge_principles"
    ids: tuple[str, ...]
    text: str

    def change(self, value: Any, spec: ParameterSpec | None) -> JSONValue:
        """The list with the rules merged."""
        if len(set(self.ids)) < 2:
            raise EditError(f"a merge needs at least two different principles, found {', '.join(self.ids) or 'none'}")
        items = _entries(value)
        places = sorted({_place(items, wanted) for wanted in self.ids})
        rest = [item for place, item in enumerate(items) if place not in places]
        merged = items[places[0]]
        merged["text"] = _new_text(rest, self.text)
        for key in ("helpful", "harmful"):
            merged[key] = sum(items[place][key] for place in places)
        rest.insert(places[0], merged)
        return cast("JSONValue", rest)


@dataclass(frozen=True, slots=True)
class CountPrinciples(_PrincipleEdit):
    """Count one more time that rules helped or harmed; an id that is named twice counts twice."""

    kind: ClassVar[str] = "count_principles"
    helpful: tuple[str, ...] = ()
    harmful: tuple[str, ...] = ()

    def change(self, value: Any, spec: ParameterSpec | None) -> JSONValue:
        """The list with the counters raised."""
        if not self.helpful and not self.harmful:
            raise EditError("names no principle to count")
        items = _entries(value)
        for key, ids in (("helpful", self.helpful), ("harmful", self.harmful)):
            for wanted in ids:
                items[_place(items, wanted)][key] += 1
        return cast("JSONValue", items)
