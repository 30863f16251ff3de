"""Which of a candidate's parameters is the system prompt, the demonstrations, the cue, and which cannot be served.

A candidate file holds values by name, not what the program does with them. The names and the forms of the values say
it where they are unambiguous; else the user says it. A value that was part of what was measured and that an endpoint
cannot serve (tools, code, a pipeline, a number, another step's prompt) is refused unless the user leaves it out by
name: a reply without it is another program's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.graph import Candidate
from agentopt.graph._templates import fields
from agentopt.models import adapter_name
from agentopt.serving.variants._texts import ServedText, plain_text, structured_text, template_text

READY = "served."
"""Prefix of the parameters of the ready program `agentopt.serving.chat:reply`, which fills no variables."""

_SYSTEM = ("system", "system_prompt", "instruction", "instructions", "prompt", "task")
_DEMOS = ("demos", "examples", "demonstrations", "shots", "few_shot")
_CUE = ("cue",)
_OTHER_PARTS = ("principles", "output_format", "extra")
_OFF = ("", "none", "off", "no", "false", "default", False, None)
"""Values of a choice that mean that nothing is done: told, not refused."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user says about a candidate's parameters; None: find it out. "" means that there is none."""

    system: str | None = None
    user: str | None = None
    demos: str | None = None
    cue: str | None = None
    adapter: str | None = None
    without: tuple[str, ...] = ()
    """Globs of parameters that are left out on purpose."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What of a candidate is served."""

    system: ServedText | None = None
    """A system turn."""
    user: ServedText | None = None
    """Takes the place of the last user turn's text."""
    demos: tuple[Mapping[str, Any], ...] = ()
    cue: str = ""
    adapter: str | None = None
    """Of a folded knowledge: its name at the engine."""


def parts_of(candidate: Candidate, wanted: Wanted, where: str) -> tuple[Parts, list[str]]:
    """What is served, and what the user should be told.

    Args:
        candidate: values by name.
        wanted: what the user says.
        where: begins the messages: the file.

    Raises:
        UserError: a parameter that is named is not there or has another form, several could be meant, or a value
            cannot be served.
    """
    values = dict(candidate.values)
    _check_names(values, wanted, where)
    used: set[str] = set()
    system_name, user_name = _text_names(values, wanted, where)
    system, user = _text(values, system_name, used, where), _text(values, user_name, used, where)
    if user is not None and not user.variables:
        raise UserError(
            f"{where}: user={user_name} has no {{variable}}, so it is not clear where the user's text belongs; a "
            f"prompt without variables is a system prompt: system={user_name}"
        )
    if not wanted.system and not wanted.user and system is not None and system.variables:
        system, user = None, system  # `complete(system=prompt.format(...))` is sent as the only user turn
    owner = _owner(values, system_name or user_name)
    demos_name = _pick(values, wanted.demos, _demos_names(values), owner, "the demonstrations", "demos", where)
    cue_name = _pick(values, wanted.cue, _cue_names(values), owner, "the cue", "cue", where)
    used |= {name for name in (demos_name, cue_name) if name}
    adapter = wanted.adapter or _folded(values, used)
    told = _leftover(values, used, wanted, where)
    parts = Parts(
        system=system,
        user=user,
        demos=_demos_value(values, demos_name, where),
        cue=_text_value(values, cue_name, where),
        adapter=adapter,
    )
    return parts, told


def _check_names(values: Mapping[str, Any], wanted: Wanted, where: str) -> None:
    for role in ("system", "user", "demos", "cue"):
        name = getattr(wanted, role)
        if name and name not in values and not _parts_named(values, name):
            there = ", ".join(sorted(values)) or "none"
            raise UserError(f"{where}: {role}={name} is no parameter of this candidate; it has {there}.")
    for pattern in wanted.without:
        if not any(fnmatchcase(name, pattern) for name in values):
            raise UserError(f"{where}: without={pattern} fits no parameter; it has {', '.join(sorted(values))}.")


# ---- the text


def _text_names(values: Mapping[str, Any], wanted: Wanted, where: str) -> tuple[str | None, str | None]:
    """The parameters with the system prompt and with the user turn's template."""
    if wanted.system is None and wanted.user is None:
        return _found_text(values, wanted, where), None
    return wanted.system or None, wanted.user or None


def _found_text(values: Mapping[str, Any], wanted: Wanted, where: str) -> str | None:
    """The parameter with the prompt; the name of a structured prompt when it comes in parts."""
    if any(name.startswith(READY) for name in values):
        return f"{READY}system" if f"{READY}system" in values else None
    texts = [name for name, value in values.items() if isinstance(value, str) and not _left_out(name, wanted)]
    usual = [name for name in texts if _tail(name) in _SYSTEM]
    if not usual:
        usual = [name for name in texts if _tail(name) not in (*_CUE, *_OTHER_PARTS) and not _other_kind(name, values)]
        usual = [name for name in usual if values[name] not in _OFF]
    if len(usual) > 1:
        raise UserError(
            f"{where}: {', '.join(map(repr, usual))} could each be the prompt, and a request has one; say which: "
            f"?system={usual[0]} (and leave the others out: &without={','.join(usual[1:])})."
        )
    if not usual:
        return None
    name = usual[0]
    owner = name.rpartition(".")[0]
    return owner if _tail(name) == "task" and owner and _parts_named(values, owner) else name


def _parts_named(values: Mapping[str, Any], owner: str) -> bool:
    return f"{owner}.task" in values and any(f"{owner}.{part}" in values for part in _OTHER_PARTS)


def _text(values: Mapping[str, Any], name: str | None, used: set[str], where: str) -> ServedText | None:
    if name is None:
        return None
    if name not in values:  # the parts of a structured prompt
        parts = {part: values[f"{name}.{part}"] for part in ("task", *_OTHER_PARTS) if f"{name}.{part}" in values}
        used |= {f"{name}.{part}" for part in parts}
        return _checked(structured_text(parts), parts.values(), name, where)
    used.add(name)
    text = _text_value(values, name, where)
    if name.startswith(READY):
        return plain_text(text) if text else None
    return _checked(template_text(text), (text,), name, where)


def _checked(text: ServedText, sources: Any, name: str, where: str) -> ServedText:
    """A width or a precision that the client gives could ask for a text of any length."""
    for source in sources if text.variables else ():
        for entry in fields(source) or () if isinstance(source, str) else ():
            if "{" in entry.spec:
                raise UserError(
                    f"{where}: {name!r} takes the width of {entry.base!r} from a variable ({entry}); "
                    "an endpoint does not let its clients choose that: write the number into the prompt."
                )
    return text


def _text_value(values: Mapping[str, Any], name: str | None, where: str) -> str:
    if not name:
        return ""
    value = values[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} is {_form(name, value)}, expected a text.")
    return value


# ---- demonstrations and cue


def _demos_names(values: Mapping[str, Any]) -> list[str]:
    found = [name for name, value in values.items() if _is_demos(value)]
    return found or [name for name, value in values.items() if value == [] and _tail(name) in _DEMOS]


def _is_demos(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    items = cast("list[Any]", value)
    return all(isinstance(item, dict) and {"input", "output"} <= cast("dict[str, Any]", item).keys() for item in items)


def _cue_names(values: Mapping[str, Any]) -> list[str]:
    return [name for name, value in values.items() if _tail(name) in _CUE and isinstance(value, str)]


def _pick(
    values: Mapping[str, Any], said: str | None, found: Sequence[str], owner: str, what: str, role: str, where: str
) -> str | None:
    """The parameter that is named, else the only one there is, else the only one beside the prompt."""
    if said is not None:
        return said or None
    if len(found) > 1:
        found = [name for name in found if name.rpartition(".")[0] == owner] or found
    if len(found) > 1:
        raise UserError(
            f"{where}: {', '.join(map(repr, found))} could each be {what}; say which: ?{role}={found[0]} "
            f"(none of them: ?{role}=)."
        )
    return found[0] if found else None


def _demos_value(values: Mapping[str, Any], name: str | None, where: str) -> tuple[Mapping[str, Any], ...]:
    if not name:
        return ()
    value = values[name]
    if value != [] and not _is_demos(value):
        raise UserError(f'{where}: {name!r} is {_form(name, value)}, expected a list of {{"input", "output"}}.')
    return tuple(value)


def _folded(values: Mapping[str, Any], used: set[str]) -> str | None:
    """The adapter of the only folded knowledge."""
    found: dict[str, str] = {}
    for name, value in values.items():
        known = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
        if known.get("form") == "folded" and isinstance(known.get("adapter"), str):
            found[name] = known["adapter"]
    if len(found) != 1:
        return None
    used |= set(found)
    return adapter_name(next(iter(found.values())))


# ---- the rest


def _leftover(values: Mapping[str, Any], used: set[str], wanted: Wanted, where: str) -> list[str]:
    """What to tell about the parameters that are not served.

    Raises:
        UserError: some of them do something.
    """
    rest = {name: value for name, value in values.items() if name not in used}
    dropped = [name for name in rest if _left_out(name, wanted)]
    idle = [name for name, value in rest.items() if name not in dropped and _idle(value)]
    serious = [name for name in rest if name not in dropped and name not in idle]
    if serious:
        listed = ", ".join(f"{name!r} ({_form(name, rest[name])})" for name in serious)
        raise UserError(
            f"{where}: {listed} {'was' if len(serious) == 1 else 'were'} part of what was measured, and an endpoint, "
            "which only builds messages, cannot serve it; run the program itself, or accept replies that were not "
            f"measured: ?without={','.join(serious)}"
        )
    told: list[str] = []
    if idle := [name for name in idle if rest[name] not in ("", [], {})]:
        listed = ", ".join(f"{name!r} ({rest[name]!r})" for name in idle)
        told.append(f"{where}: {listed} is taken for 'nothing is done' and is not served.")
    if dropped:
        listed = ", ".join(f"{name!r} ({_form(name, rest[name])})" for name in dropped)
        told.append(f"{where}: served without {listed}: replies may differ from those that were measured.")
    return told


def _left_out(name: str, wanted: Wanted) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in wanted.without)


def _idle(value: Any) -> bool:
    if value in ([], {}):
        return True
    if isinstance(value, str):
        return value.strip().casefold() in _OFF
    return value is False or value is None


def _other_kind(name: str, values: Mapping[str, Any]) -> bool:
    return _form(name, values[name]) != "a text"


_KINDS_BY_KEY = (("nodes", "a pipeline"), ("form", "knowledge"))


def _form(name: str, value: Any) -> str:
    """What a value is, in words, as far as its name and form tell."""
    if isinstance(value, str):
        return {"code": "code", "description": "a tool's text"}.get(_tail(name), "a text")
    if isinstance(value, (bool, int, float)):
        return f"the value {value!r}" if isinstance(value, bool) else f"the number {value!r}"
    if isinstance(value, dict):
        keys = cast("dict[str, Any]", value)
        return next((kind for key, kind in _KINDS_BY_KEY if key in keys), "a value with parts")
    if _is_demos(value):
        return "demonstrations"
    items = [cast("dict[str, Any]", item) for item in value or () if isinstance(item, dict)]
    if items and all("parameters" in item for item in items):
        return "tools"
    return "principles" if items and all("text" in item for item in items) else "a list"


def _tail(name: str) -> str:
    return name.rpartition(".")[2]


def _owner(values: Mapping[str, Any], name: str | None) -> str:
    """What a parameter's name begins with; a structured prompt's own name."""
    if name is None or name not in values:
        return name or ""
    return name.rpartition(".")[0]
