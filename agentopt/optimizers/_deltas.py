"""What a reflector and a curator of principles answered, read and merged into edits of single rules.

The unit is one answer. Merging is deterministic: doubles are left out, no rule is touched twice, and only part of the
list may change at once. Nothing here raises on strange answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from agentopt.graph import AddPrinciple, DropPrinciple, MergePrinciples, RewritePrinciple
from agentopt.optimizers._reply import parse_reply, parse_text

if TYPE_CHECKING:
    from agentopt.graph import Edit

_WORD = re.compile(r"\w+")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+(.+)$", re.MULTILINE)
_ALIKE = 0.8
"""Share of common words from which two rules count as one."""
_MAX_RULE = 400


@dataclass(frozen=True, slots=True)
class Findings:
    """What the reflector found: lessons, and which rules helped or harmed."""

    lessons: tuple[str, ...] = ()
    helpful: tuple[str, ...] = ()
    harmful: tuple[str, ...] = ()
    reasoning: str = ""

    def __bool__(self) -> bool:
        return bool(self.lessons or self.helpful or self.harmful)


def read_reflection(reply: Any, ids: Sequence[str]) -> Findings:
    """A reflector's answer; unknown ids are left out, and bullets of a plain text are taken for lessons."""
    parsed = parse_reply(reply, ["lessons", "helpful", "harmful"])
    lessons = _texts(parsed.suggestion.get("lessons"))
    if not parsed.suggestion and isinstance(reply, str) and "{" not in reply:
        lessons = [match.group(1) for match in _BULLET.finditer(reply)]
    kept: dict[str, None] = {}
    for lesson in lessons:
        text = parse_text(" ".join(lesson.split()), "lesson", max_chars=_MAX_RULE)
        if text is not None:
            kept[text] = None
    tags = {key: dict.fromkeys(_ids(parsed.suggestion.get(key), ids)) for key in ("helpful", "harmful")}
    both = tags["helpful"].keys() & tags["harmful"].keys()  # said of one rule, both say nothing
    helpful, harmful = (tuple(name for name in tags[key] if name not in both) for key in ("helpful", "harmful"))
    return Findings(tuple(kept), helpful, harmful, parsed.reasoning)


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [line for line in value.splitlines() if line.strip()]
    items = cast("list[Any]", value) if isinstance(value, list) else []
    return [line for item in items if isinstance(item, str) for line in item.splitlines() if line.strip()]


def _ids(value: Any, known: Sequence[str]) -> list[str]:
    if isinstance(value, str):
        value = re.split(r"[\s,;]+", value)
    items = cast("list[Any]", value) if isinstance(value, list) else []
    written = [str(item).strip().strip("[]\"'` ") for item in items if isinstance(item, (str, int))]
    return [name for name in written if name in known]


def operations_in(value: Any) -> list[dict[str, Any]] | None:
    """The operations of a curator's answer as maps; None when there is no list of them."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return None
    return [dict(cast("Mapping[str, Any]", item)) for item in cast("list[Any]", value) if isinstance(item, Mapping)]


def merge_operations(
    items: Sequence[Mapping[str, Any]], operations: Sequence[Mapping[str, Any]], name: str, most: int
) -> tuple[list[Edit], list[str], list[str]]:
    """Edits in a fixed order (drops, merges, rewrites, additions), what was left out and why, and what is unclear.

    Doubles of a rule that stays, or of one that comes in, are left out. No rule is touched twice. Of the present rules
    at most half (and at least one) may go or change in one update, so that the list is never rewritten as a whole.
    """
    known = {item["id"]: str(item["text"]) for item in items}
    plan = _Plan(name, known, limit=max(1, len(items) // 2), most=most)
    problems = [problem for operation in operations if (problem := plan.take(operation))]
    order = (DropPrinciple, MergePrinciples, RewritePrinciple, AddPrinciple)
    edits = sorted(plan.edits, key=lambda edit: order.index(type(edit)))  # pyright: ignore[reportArgumentType]
    return edits, plan.left_out, problems


class _Plan:
    """The operations taken so far, and what the list would say with them."""

    def __init__(self, name: str, known: Mapping[str, str], *, limit: int, most: int) -> None:
        self.edits: list[Edit] = []
        self.left_out: list[str] = []
        self._name = name
        self._known = known
        self._texts = dict(known)
        self._touched: set[str] = set()
        self._limit = limit
        self._most = most
        self._lost = 0

    def take(self, operation: Mapping[str, Any]) -> str:
        """Take one operation or leave it out; return what is unclear about it, '' when nothing is."""
        kind = str(operation.get("op", operation.get("type", ""))).strip().lower()
        text = " ".join(str(operation.get("text") or "").split())
        given: Any = operation.get("ids", operation.get("id", []))
        parts = cast("list[Any]", given) if isinstance(given, list) else [given]
        ids = list(dict.fromkeys(str(part).strip() for part in parts))
        unknown = [part for part in ids if part not in self._known]
        if kind not in ("add", "rewrite", "merge", "drop"):
            return f"there is no operation {kind!r}; there are add, rewrite, merge and drop"
        if kind != "add" and (unknown or not ids):
            named = repr(unknown[0]) if unknown else "no id"
            return f"{kind} names {named}; the ids are {', '.join(self._known) or 'none'}"
        if kind == "merge" and len(ids) < 2:
            return f"merge needs at least two ids, found {ids[0]!r}"
        if kind != "drop" and (not text or len(text) > _MAX_RULE):
            return f"{kind}: the text of a principle must have 1 to {_MAX_RULE} characters, found {len(text)}"
        refusal = self._refusal(kind, ids if kind != "add" else [], text)
        if refusal:
            self.left_out.append(f"{self._name}: {kind} was left out, {refusal}")
        else:
            self._do(kind, ids, text)
        return ""

    def _refusal(self, kind: str, ids: Sequence[str], text: str) -> str:
        if len(self.edits) >= self._most:
            return f"one update makes at most {self._most} changes"
        again = [part for part in ids if part in self._touched]
        if again:
            return f"{again[0]} is changed twice"
        lost = len(ids) - 1 if kind == "merge" else len(ids)
        if self._lost + lost > self._limit:
            return f"one update changes at most {self._limit} of the present principles"
        double = next((key for key, said in self._texts.items() if key not in ids and alike(said, text)), None)
        if kind != "drop" and double is not None:
            return f"it says the same as {double}: {text!r:.80}"
        if kind == "rewrite" and self._known[ids[0]] == text:
            return f"{ids[0]} has this text already"
        self._lost += lost
        return ""

    def _do(self, kind: str, ids: Sequence[str], text: str) -> None:
        match kind:
            case "add":
                self.edits.append(AddPrinciple(self._name, text))
                self._texts[f"a new one ({len(self.edits)})"] = text
                return
            case "rewrite":
                self.edits.append(RewritePrinciple(self._name, ids[0], text))
            case "merge":
                self.edits.append(MergePrinciples(self._name, tuple(ids), text))
            case _:
                self.edits += [DropPrinciple(self._name, part) for part in ids]
        self._touched.update(ids)
        for part in ids:
            self._texts.pop(part, None)
        if kind != "drop":
            self._texts[ids[0]] = text


def alike(one: str, other: str) -> bool:
    """Whether two rules say the same: nearly all words in common, and no other number."""
    first, second = (set(_WORD.findall(text.casefold())) for text in (one, other))
    if not first or not second or any(word.isdigit() for word in first ^ second):
        return False
    return len(first & second) / len(first | second) >= _ALIKE
