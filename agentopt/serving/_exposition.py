"""Prometheus' text format: our metrics and the engine's in one answer, each family once, whatever the engine sends."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

PREFIX = "agentopt_"
"""Begins the name of every metric of ours, and of no other that is passed on."""
LONGEST = 8 << 20
"""Characters of the engine's metrics that are read."""
_HEAD = re.compile(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*)(?: (.*))?")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\["\\n])*)"(?:,|$)')
_SAMPLE = re.compile(
    r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\]|\\["\\n])*"(?:,|(?=\})))*)\})?'
    r"[ \t]+(\S+)(?:[ \t]+-?\d+)?"
)
_CREATED = re.compile(rf"^(?:# (?:HELP|TYPE) )?{PREFIX}\w+_created[ {{].*\n", re.MULTILINE)
"""When each counter began: a series more for each, which nobody asks for."""
_ENDINGS = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("", "_sum", "_count"), "counter": ("", "_total")}


@dataclass(slots=True)
class Family:
    """What belongs to one metric: its two heads and its samples."""

    heads: dict[str, str] = field(default_factory=dict[str, str])
    type: str = "untyped"
    samples: list[str] = field(default_factory=list[str])

    def lines(self) -> list[str]:
        """HELP, TYPE, samples."""
        return [*(self.heads[name] for name in ("HELP", "TYPE") if name in self.heads), *self.samples]


def families(text: str) -> dict[str, Family]:
    """The metrics of a text. What is not in the format is left out, and of a sample given twice the second."""
    found: dict[str, Family] = {}
    seen: set[tuple[str, ...]] = set()
    current = ""
    for raw in text[:LONGEST].split("\n"):
        line = raw.rstrip("\r ")
        if head := _HEAD.fullmatch(line):
            current = head[2]
            family = found.setdefault(current, Family())
            if head[1] == "TYPE" and head[1] not in family.heads:
                family.type = head[3] or "untyped"
            family.heads.setdefault(head[1], line)
        elif (sample := _SAMPLE.fullmatch(line)) and _number(sample[3]):
            series = _series(sample[1], sample[2] or "")
            if series not in seen:
                seen.add(series)
                found.setdefault(_owner(sample[1], current, found), Family()).samples.append(line)
    return {name: family for name, family in found.items() if family.samples}


def _series(name: str, labels: str) -> tuple[str, ...]:
    """The same for one series however its labels are ordered."""
    return name, *sorted(f"{label}={value}" for label, value in _LABEL.findall(labels))


def _owner(sample: str, current: str, found: dict[str, Family]) -> str:
    family = found.get(current)
    if family is not None and sample in {current + end for end in _ENDINGS.get(family.type, ("",))}:
        return current
    return sample


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text  # Python's float takes 1_000, the format does not


def merged(ours: str, engine: str) -> str:
    """Ours, as prometheus_client writes it, then of the engine's what does not carry our prefix."""
    lines: list[str] = []
    for name, family in families(engine).items():
        if not name.startswith(PREFIX):
            lines += family.lines()
    return _CREATED.sub("", ours) + "".join(f"{line}\n" for line in lines)
