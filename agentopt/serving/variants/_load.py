"""From `--candidate NAME=FILE...` to virtual models."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from agentopt.errors import UserError
from agentopt.graph import Candidate
from agentopt.models import LMOptions
from agentopt.serving.variants._rewrite import Rewriting
from agentopt.serving.variants._roles import Wanted, parts_of
from agentopt.serving.variants._virtual import Variant, VirtualModel

BASE = "base"
_FORM = "NAME=FILE[?system=P&demos=Q&user=T&cue=R&adapter=A&without=X][@WEIGHT]"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_WEIGHT = re.compile(r"@([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\Z")
_ROLES = ("system", "user", "demos", "cue", "adapter")
_OPTIONS = (*_ROLES, "without", "temperature", "continue")
_NO_LABEL = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Spec:
    """One `--candidate`, taken apart."""

    name: str
    file: str
    """"base" for the plain base model."""
    wanted: Wanted
    weight: float = 1.0
    temperature: float | None = LMOptions().temperature
    continues: bool | None = None


def load_candidates(specs: Sequence[str], *, warn: Callable[[str], None]) -> list[VirtualModel]:
    """The virtual models of `--candidate` values; the same name several times makes variants of one model.

    Args:
        specs: as a user gives them.
        warn: gets a sentence for what is served otherwise than it was measured.

    Raises:
        UserError: a malformed value, a file that is no candidate, or a candidate that cannot be served.
    """
    found: dict[str, list[Variant]] = {}
    for text in specs:
        spec = read_spec(text)
        found.setdefault(spec.name, []).append(_variant(spec, warn))
    models = [VirtualModel(name, tuple(_labelled(variants))) for name, variants in found.items()]
    for model in models:
        if sum(variant.weight for variant in model.variants) <= 0:
            raise UserError(f"--candidate {model.name}: every weight is 0; give one of its variants a weight above 0.")
    return models


def read_spec(text: str) -> Spec:
    """Take one value of `--candidate` apart.

    Raises:
        UserError: it is malformed.
    """
    name, equals, rest = text.partition("=")
    if not equals or not _NAME.fullmatch(name) or not rest:
        raise UserError(
            f"--candidate {text!r}: expected {_FORM}, the name of letters, digits and . _ : / -, or NAME=base[@WEIGHT]."
        )
    weight = 1.0
    if match := _WEIGHT.search(rest):
        weight, rest = float(match.group(1)), rest[: match.start()]
    file, _, query = rest.partition("?")
    if not file or not math.isfinite(weight):
        raise UserError(f"--candidate {text!r}: expected {_FORM}.")
    options = _options(query, text)
    roles = {role: options[role] for role in _ROLES if role in options}
    without = tuple(glob for glob in options.get("without", "").split(",") if glob)
    spec = Spec(name, file, Wanted(**roles, without=without), weight)
    if file == BASE and set(options) - {"adapter"}:
        raise UserError(f"--candidate {text!r}: the plain base has no parameters; only ?adapter=NAME fits it.")
    if "temperature" in options:
        spec = replace(spec, temperature=_temperature(options["temperature"], text))
    if "continue" in options:
        if options["continue"] not in ("yes", "no"):
            raise UserError(f"--candidate {text!r}: continue={options['continue']}: expected yes or no.")
        spec = replace(spec, continues=options["continue"] == "yes")
    return spec


def _options(query: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in query.split("&") if query else ():
        key, equals, value = item.partition("=")
        if key not in _OPTIONS or not equals or key in options:
            known = ", ".join(_OPTIONS)
            raise UserError(f"--candidate {text!r}: {item!r}: expected KEY=VALUE, each key once, of {known}.")
        options[key] = unquote(value)
    return options


def _temperature(value: str, text: str) -> float | None:
    if value == "client":
        return None
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 2:
        raise UserError(f"--candidate {text!r}: temperature={value}: expected a number from 0 to 2, or client.")
    return number


def _variant(spec: Spec, warn: Callable[[str], None]) -> Variant:
    if spec.file == BASE:
        return Variant(BASE, spec.weight, adapter=spec.wanted.adapter or None)
    candidate = Candidate.load(spec.file)
    parts, told = parts_of(candidate, spec.wanted, spec.file)
    for sentence in told:
        warn(sentence)
    if parts.system is None and parts.user is None and not (parts.demos or parts.cue or parts.adapter):
        warn(f"{spec.file}: nothing in this candidate changes what a model is sent; {spec.name!r} is the plain base.")
    label = _NO_LABEL.sub("-", Path(spec.file).stem).strip("-") or "candidate"
    rewriting = Rewriting(parts, spec.temperature, spec.continues)
    return Variant(label, spec.weight, rewriting, candidate.hash, spec.file, parts.adapter)


def _labelled(variants: Sequence[Variant]) -> list[Variant]:
    """The variants with labels that differ: file stems, then with the hash, then with a number."""
    stems = Counter(variant.label for variant in variants)
    named = [
        replace(variant, label=f"{variant.label}-{variant.hash[:6]}")
        if stems[variant.label] > 1 and variant.hash
        else variant
        for variant in variants
    ]
    seen: Counter[str] = Counter()
    taken = {variant.label for variant in named}
    unique: list[Variant] = []
    for variant in named:
        seen[variant.label] += 1
        label, number = variant.label, seen[variant.label]
        while number > 1 and (label := f"{variant.label}-{number}") in taken:
            number += 1
        taken.add(label)
        unique.append(replace(variant, label=label))
    return unique
