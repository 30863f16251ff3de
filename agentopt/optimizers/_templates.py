"""Meta-prompts and instruction frames as data: named fragments in text files, any of which a user may override.

The unit is one fragment. A file looks like this; lines before the first header are comments:

    === optoprime.instruction ===
    You tune a program ... {problem}
    === head.label.classify +0.03 ===
    Classify the {subject} as {labels_or}.

Placeholders are `{name}` of a fixed set per fragment (those of the shipped text, where `_ALLOWED` does not name more);
every other brace is plain text, so JSON needs no escaping. The optional number in the header of a frame is its prior:
the gain in mean score it is expected to bring before anything was measured. A user's file may replace any shipped
fragment and may add new frames (`head.`, `answer.`, `cues.`, `tail.`, `cue.`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from agentopt.errors import UserError

_HEADER = re.compile(r"^=== +(?P<name>[a-z0-9_.-]+)(?: +(?P<prior>[+-]\d+(?:\.\d+)?))? +===\s*$")
_LOOKS_LIKE_HEADER = re.compile(r"^===.*===\s*$")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")

_FRAME_SLOTS = ("head", "answer", "cues", "tail", "cue")
_FRAME_KINDS = ("label", "number", "json", "text", "any")
_FRAME_PLACEHOLDERS = frozenset(
    {
        "original",
        "subject",
        "subject_title",
        "labels_or",
        "labels_comma",
        "labels_lines",
        "cues",
        "keys",
        "field",
        "noun",
        "noun_title",
    }
)

_REQUIRED: Mapping[str, frozenset[str]] = {
    "optoprime.system": frozenset(),
    "optoprime.problem": frozenset({"code", "variables", "feedback"}),
    "optoprime.task": frozenset({"problem", "output_format"}),
    "optoprime.output_format": frozenset(),
    "optoprime.unreadable": frozenset({"error"}),
    "optoprime.illegal": frozenset({"problems"}),
    "instructions.system": frozenset(),
    "instructions.task": frozenset({"current"}),
    "instructions.tips": frozenset(),
    "code.illegal": frozenset({"problems"}),
    "code.task": frozenset({"source"}),
    "grounded.task": frozenset({"current"}),
    "opro.task": frozenset({"history"}),
    "playbook.curator_task": frozenset({"principles", "lessons"}),
    "playbook.reflector_task": frozenset({"runs"}),
    "reflection.illegal": frozenset({"problems"}),
    "reflection.task": frozenset({"current", "records"}),
    "repair.illegal": frozenset({"problems"}),
    "symbolic.gradient": frozenset({"settings", "comments"}),
    "symbolic.loss": frozenset({"output", "form"}),
    "symbolic.pipeline.edit": frozenset({"pipeline", "form"}),
    "symbolic.prompt": frozenset({"current", "suggestions", "form"}),
    "textgrad.gradient": frozenset({"value", "criticism"}),
    "textgrad.update": frozenset({"value", "gradients"}),
}
_ALLOWED: Mapping[str, frozenset[str]] = {
    "optoprime.system": frozenset({"objective"}),
    "optoprime.problem": frozenset(
        {
            "instruction", "code", "documentation", "variables", "constraints",
            "inputs", "others", "outputs", "feedback",
        }
    ),
    "optoprime.task": frozenset({"problem", "output_format", "memory", "summary", "objective", "names"}),
    "optoprime.output_format": frozenset({"names"}),
    "optoprime.unreadable": frozenset({"error", "names"}),
    "optoprime.illegal": frozenset({"problems", "names"}),
    "instructions.system": frozenset({"objective"}),
    "instructions.task": frozenset({"current", "data", "summary", "past", "tip", "variables", "failures", "name"}),
    "instructions.tips": frozenset(),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fragment:
    """One named text; `prior` is a gain in mean score, 0.0 for everything that is not a frame."""

    name: str
    text: str
    prior: float = 0.0

    def fill(self, values: Mapping[str, str]) -> str:
        """Put `values` in place of the placeholders that it names; nothing inside a value is filled again."""
        return _PLACEHOLDER.sub(lambda match: values.get(match.group(1), match.group(0)), self.text)

    @property
    def placeholders(self) -> frozenset[str]:
        """The `{names}` in the text."""
        return frozenset(_PLACEHOLDER.findall(self.text))


Templates = Mapping[str, Fragment]


def load_templates(override: Path | None = None) -> Templates:
    """The shipped fragments, with those of the file `override` laid over them.

    Raises:
        UserError: the file cannot be read, has no fragment, names an unknown fragment or placeholder, or a fragment
            lacks a placeholder it needs; the message has the file and the line.
    """
    shipped = _shipped()
    if override is None:
        return shipped
    try:
        text = override.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Template file {str(override)!r} cannot be read: {error}.") from error
    return {**shipped, **parse_fragments(text, str(override), shipped)}


@cache
def _shipped() -> Templates:
    found: dict[str, Fragment] = {}
    folder = resources.files("agentopt.optimizers") / "templates"
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".txt"):
            found.update(parse_fragments(entry.read_text(encoding="utf-8"), entry.name))
    return found


def parse_fragments(text: str, place: str, shipped: Templates | None = None) -> dict[str, Fragment]:
    """Read fragments from `text`; `place` names the file in errors, `shipped` is what may be overridden.

    Without `shipped` the text is a shipped file itself: it declares its fragments and their placeholders.

    Raises:
        UserError: see `load_templates`.
    """
    found: dict[str, Fragment] = {}
    lines: dict[str, list[str]] = {}
    starts: dict[str, tuple[int, float]] = {}
    current: str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        match = _HEADER.match(line)
        if match is None and _LOOKS_LIKE_HEADER.match(line):
            raise UserError(f"{place}:{number}: {line.strip()!r} is no fragment header: write '=== name ==='.")
        if match is not None:
            name = current = str(match["name"])
            if name in lines:
                raise UserError(f"{place}:{number}: the fragment {name!r} stands twice in this file.")
            _check_name(name, f"{place}:{number}", shipped)
            lines[name] = []
            starts[name] = (number, float(match["prior"] or 0.0))
        elif current is not None:
            lines[current].append(line)
    if not found and not lines:
        raise UserError(f"{place} has no fragment: expected headers such as '=== optoprime.task ==='.")
    for name, body in lines.items():
        number, prior = starts[name]
        fragment = Fragment(name, "\n".join(body).strip("\n"), prior)
        _check_placeholders(fragment, f"{place}:{number}", shipped)
        found[name] = fragment
    return found


def _is_frame(name: str) -> bool:
    parts = name.split(".")
    return len(parts) >= 3 and parts[0] in _FRAME_SLOTS and parts[1] in _FRAME_KINDS


def _check_name(name: str, place: str, shipped: Templates | None) -> None:
    if shipped is None or name in shipped or _is_frame(name):
        return
    known = ", ".join(known for known in shipped if not _is_frame(known))
    raise UserError(
        f"{place}: there is no fragment {name!r}; known are {known}, and frames named "
        "head|answer|cues|tail|cue.label|number|json|text|any.NAME."
    )


def _check_placeholders(fragment: Fragment, place: str, shipped: Templates | None) -> None:
    allowed = _FRAME_PLACEHOLDERS if _is_frame(fragment.name) else _ALLOWED.get(fragment.name)
    if allowed is None:
        allowed = fragment.placeholders if shipped is None else shipped[fragment.name].placeholders
    unknown = sorted(fragment.placeholders - allowed)
    if unknown:
        raise UserError(
            f"{place}: the fragment {fragment.name!r} has the unknown placeholder {{{unknown[0]}}}; it may use "
            f"{', '.join('{' + name + '}' for name in sorted(allowed)) or 'none'}."
        )
    missing = sorted(_REQUIRED.get(fragment.name, frozenset()) - fragment.placeholders)
    if missing:
        raise UserError(f"{place}: the fragment {fragment.name!r} must contain the placeholder {{{missing[0]}}}.")
