"""From proposed values to legal, new edits: coercion to the parameter's type, checks, and "was this tried before?"."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from agentopt.errors import UserError
from agentopt.graph import Candidate, IllegalEdit, apply_edits, principle_list, set_value
from agentopt.optimizers._protocol import DroppedEdit, ProposeContext, Update

if TYPE_CHECKING:
    from agentopt.graph import Edit, ParameterSpec

TEXT_KINDS = frozenset({"prompt", "tool_text"})
_RULE_MARKS = re.compile(r"^(?:(?:[-*•]|[0-9]{1,3}[.)])\s+)?(?:p[0-9]{1,9}\s*:\s*)?|\s*\(helped \d+, harmed \d+\)$")


def current_value(context: ProposeContext, spec: ParameterSpec) -> Any:
    """The parent's value of `spec`, or its declared default."""
    return context.parent.get(spec.name, spec.default)


def coerce(spec: ParameterSpec, value: Any) -> Any:
    """Bring a value that came as text or JSON to the parameter's type where that is plain; else return it unchanged.

    Bounds and options are met by `spec.project`; texts keep their placeholders or are left for `check` to refuse.
    """
    match spec.kind:
        case "number":
            value = _as_number(value)
        case "choice":
            value = _as_option(spec, value)
        case "value" | "demos":
            if isinstance(value, str) and not isinstance(spec.default, str):
                value = _as_data(value)
        case "principles":
            value = _as_principles(spec, value)
        case "tools" | "pipeline":
            if isinstance(value, str):
                value = _as_data(strip_fence(value))
        case "code":
            value = strip_fence(value) if isinstance(value, str) else value
        case _:
            value = value.strip() if isinstance(value, str) else value
    try:
        return spec.project(value)
    except (ValueError, TypeError):
        return value


def _as_number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return int(value.strip())
    except ValueError:
        pass
    try:
        return float(value.strip().rstrip("%"))
    except ValueError:
        return value


def _as_option(spec: ParameterSpec, value: Any) -> Any:
    if value in spec.options:
        return value
    for option in spec.options:
        if str(option).strip().casefold() == str(value).strip().strip("\"'").casefold():
            return option
    return value


def _as_data(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def _as_principles(spec: ParameterSpec, value: Any) -> Any:
    """Texts, or one text with a rule a line, as principles; rules that the default has keep their counters.

    Marks of the list form that a model was shown (bullets, ids, counts) and repeated rules are left out.
    """
    if isinstance(value, str):
        data = _as_data(strip_fence(value))
        value = cast("Any", data) if isinstance(data, list) else strip_fence(value).splitlines()
    if not isinstance(value, list):
        return value
    items = cast("list[Any]", value)
    texts: list[Any] = [cast("dict[str, Any]", item).get("text") if isinstance(item, dict) else item for item in items]
    if not all(isinstance(text, str) for text in texts) or spec.check_value is None or not spec.check_value(items):
        return items
    rules: dict[str, str] = {}
    for text in texts:
        rule = _RULE_MARKS.sub("", text.strip())
        rules.setdefault(rule.casefold().rstrip(" .!"), rule)
    return principle_list([rule for rule in rules.values() if rule], spec.default)


def strip_fence(text: str) -> str:
    """Remove one surrounding Markdown code fence, with or without a language name."""
    stripped = text.strip()
    if not stripped.startswith("```"):
        return stripped
    body = stripped[3:]
    first, newline, rest = body.partition("\n")
    if newline and " " not in first.strip():
        body = rest
    return body.rsplit("```", 1)[0].strip() if "```" in body else body.strip()


def problems_of(context: ProposeContext, edits: Sequence[Edit]) -> list[str]:
    """What keeps `edits` from being applied to the parent, one line each; empty when nothing does."""
    try:
        apply_edits(context.parent, edits, context.specs)
    except IllegalEdit as error:
        return [f"{problem.name}: {problem.message}" for problem in error.problems]
    except UserError as error:
        return [str(error)]
    return []


def edit_for(spec: ParameterSpec, value: Any) -> Edit:
    """The typed edit that gives `spec` this value, coerced to its type."""
    return set_value(spec, coerce(spec, value))


def missing_variables(spec: ParameterSpec, text: str) -> list[str]:
    """Declared placeholders that `text` has lost."""
    return [name for name in spec.variables if "{" + name + "}" not in text]


def with_variables(spec: ParameterSpec, text: str) -> str:
    """`text` with every lost placeholder put back at its end, one headed line each (`Ticket: {ticket}`)."""
    lost = missing_variables(spec, text)
    if not lost:
        return text
    lines = [f"{headline(name)}: {{{name}}}" for name in lost]
    return text.rstrip() + "\n\n" + "\n".join(lines)


def headline(name: str) -> str:
    """A field name as a heading: `order_id` → `Order id`."""
    words = name.replace("_", " ").replace("-", " ").strip()
    return words[:1].upper() + words[1:] if words else name


_DRY = 4
"""Fruitless answers in a row after which a model is not asked again for the same parent in the same round."""


@dataclass
class Proposals:
    """Collects updates that are legal and whose candidates are neither the parent nor anything tried before."""

    context: ProposeContext
    updates: list[Update] = field(default_factory=list[Update])
    seen: set[str] = field(default_factory=set[str])
    fruitless: int = 0
    """Answers in a row that brought nothing new; counted by `take`."""

    def __post_init__(self) -> None:
        self.seen.add(self.context.parent.hash)
        self.seen.update({past.candidate_hash for past in self.context.history} - self.context.retry)
        self.seen.update(self.context.taken)

    @property
    def full(self) -> bool:
        """Whether as many updates as wanted were collected."""
        return len(self.updates) >= self.context.count

    @property
    def done(self) -> bool:
        """Whether asking on is no use: enough was collected, or the model only repeats itself or talks junk."""
        return self.full or self.fruitless >= _DRY

    def child(self, edits: Sequence[Edit]) -> Candidate | None:
        """The candidate these edits make, or None when they are illegal."""
        try:
            return apply_edits(self.context.parent, edits, self.context.specs)
        except UserError:
            return None

    def offer(self, update: Update) -> bool:
        """Take `update` if it is legal and new; tell whether it was taken. Illegal edits are recorded as dropped."""
        if self.full or not update.edits:
            return False
        child = self.child(update.edits)
        if child is None:
            for line in problems_of(self.context, update.edits):
                self.drop(update.source, line)
            return False
        if child.hash in self.seen:
            return False
        self.seen.add(child.hash)
        self.updates.append(update)
        return True

    def take(self, update: Update | None) -> None:
        """`offer` what a model's answer gave (None for nothing), and count answers in a row that brought nothing."""
        taken = update is not None and self.offer(update)
        self.fruitless = 0 if taken else self.fruitless + 1

    def drop(self, source: str, problem: str, tries: int = 1) -> None:
        """Record a proposal that was given up."""
        self.context.dropped.append(DroppedEdit(source, problem, tries))


def merged(updates: Sequence[Update], source: str) -> Update | None:
    """One update with the edits of all `updates`, or None when two of them edit the same parameter."""
    edits: dict[str, Edit] = {}
    for update in updates:
        for edit in update.edits:
            if edit.name in edits:
                return None
            edits[edit.name] = edit
    return Update(tuple(edits.values()), " ".join(update.rationale for update in updates if update.rationale), source)


def text_values(context: ProposeContext) -> Mapping[str, str]:
    """The parent's value of every tunable text parameter."""
    found: dict[str, str] = {}
    for name, spec in context.specs.items():
        value = current_value(context, spec)
        if spec.kind in TEXT_KINDS and isinstance(value, str):
            found[name] = value
    return found
