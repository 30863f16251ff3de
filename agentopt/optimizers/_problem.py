"""The problem text: what a language model is shown of a program's rollouts, within a token budget.

The unit is one minibatch of rollouts of one parent. Sections follow OptoPrime (arXiv 2406.16218): instruction, code,
documentation, variables, constraints, inputs, others, outputs, feedback. The text is a pure function of its arguments.

To stay within the budget, in this order: repeated calls of one trace are folded, cases with the same feedback are
folded, passing cases are only counted, values are cut with a visible mark, fewer cases are shown. Variables are cut
last, since a model cannot rewrite what it does not see.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentopt.graph import readable_lines
from agentopt.optimizers._feedback import cut, feedback_text, shown
from agentopt.optimizers._templates import Fragment

if TYPE_CHECKING:
    from agentopt.evaluation import Rollout
    from agentopt.graph import OpRecord, ParameterSpec, Subgraph

_NOT_NAME = re.compile(r"\W+")
_SAME_KEPT = 2
"""Calls of one shape that are shown before the rest is folded."""
_PASSING_SHOWN = 2


def estimate_tokens(text: str) -> int:
    """An upper-side guess of the token count: a quarter of the UTF-8 bytes, at least one a word. Needs no tokenizer."""
    return max(-(-len(text.encode("utf-8", "replace")) // 4), len(text.split()))


@dataclass(frozen=True, slots=True)
class Case:
    """One rollout and what backward found in it (None when it was not traced)."""

    rollout: Rollout
    graph: Subgraph | None
    feedback: str

    @property
    def failed(self) -> bool:
        """Whether there is something to learn: an error or less than full score."""
        return bool(self.rollout.row.error) or self.rollout.row.score < 1.0


@dataclass(frozen=True, slots=True)
class Level:
    """How much detail: cases shown, characters a value, code lines, characters a variable."""

    cases: int
    value: int
    lines: int
    variable: int
    others: bool = True


_LEVELS = (
    Level(8, 2000, 120, 12000),
    Level(8, 800, 80, 12000),
    Level(6, 400, 60, 8000),
    Level(4, 200, 40, 6000),
    Level(3, 120, 24, 4000),
    Level(2, 80, 12, 2000, others=False),
    Level(1, 60, 6, 600, others=False),
    Level(1, 40, 3, 160, others=False),
)


def cases_of(rollouts: Sequence[Rollout], graphs: Sequence[Mapping[str, Subgraph]], names: Iterable[str]) -> list[Case]:
    """Rollouts as cases, most informative first: errors, then low scores, then taking turns over what was expected."""
    wanted = list(names)
    cases: list[Case] = []
    for rollout, graph in zip(rollouts, graphs, strict=True):
        found = [graph[name] for name in wanted if name in graph]
        joined = found[0].union(*found[1:]) if found else None
        cases.append(Case(rollout, joined, feedback_text(rollout)))
    turns: Counter[tuple[bool, float, str]] = Counter()
    keyed: list[tuple[tuple[bool, float, int, int], Case]] = []
    for place, case in enumerate(cases):
        row = case.rollout.row
        group = (not row.error, row.score, repr(case.rollout.example.expected))
        keyed.append(((not row.error, row.score, turns[group], place), case))
        turns[group] += 1
    return [case for _, case in sorted(keyed, key=lambda item: item[0])]


def render_problem(
    cases: Sequence[Case],
    values: Mapping[str, Any],
    specs: Mapping[str, ParameterSpec],
    *,
    template: Fragment,
    instruction: str,
    budget: int,
) -> str:
    """The problem text of `cases`, at most `budget` estimated tokens long.

    Args:
        cases: from `cases_of`.
        values: parameter name → the parent's value, for every parameter that may be changed.
        specs: the same parameters' declarations.
        template: the fragment `optoprime.problem`.
        instruction: the objective, for the first section.
        budget: estimated tokens.
    """
    text = ""
    for level in _LEVELS:
        sections = _sections(cases, values, specs, level)
        text = template.fill({**sections, "instruction": cut(instruction, level.variable)})
        if estimate_tokens(text) <= budget:
            return text
    # Hundreds of variables or very long names: cut the whole text, visibly.
    size = max(40, budget * 3)
    while size > 40 and estimate_tokens(cut(text, size)) > budget:
        size = size * 3 // 4
    return cut(text, size)


def _sections(
    cases: Sequence[Case], values: Mapping[str, Any], specs: Mapping[str, ParameterSpec], level: Level
) -> dict[str, str]:
    shown_cases, remarks = _choose(cases, level.cases)
    code, documentation = _code(shown_cases, level)
    inputs: list[str] = []
    others: list[str] = []
    outputs: list[str] = []
    feedback: list[str] = []
    for number, case in enumerate(shown_cases, start=1):
        mark = f"[case {number}]"
        example = case.rollout.example
        for name, value in example.inputs.items():
            inputs.append(f"{mark} {name} = {cut(shown(value), level.value)}")
        others.extend(f"{mark} {line}" for line in (_others(case, level) if level.others else ()))
        row = case.rollout.row
        outputs.append(f"{mark} {'(no output: the run failed)' if row.error else cut(shown(row.output), level.value)}")
        feedback.append(f"{mark} {cut(case.feedback, max(160, 2 * level.value))}")
    return {
        "code": "\n".join(code) or "(not recorded)",
        "documentation": "\n".join(documentation) or "(none)",
        "variables": "\n".join(_variable(specs[name], value, level) for name, value in values.items()),
        "constraints": "\n".join(constraint_line(specs[name]) for name in values),
        "inputs": "\n".join(inputs) or "(none)",
        "others": "\n".join(others) or "(none)",
        "outputs": "\n".join(outputs) or "(none)",
        "feedback": "\n".join([*feedback, *remarks]) or "(none)",
    }


def _choose(cases: Sequence[Case], limit: int) -> tuple[list[Case], list[str]]:
    """Cases to show and remarks that stand for the folded ones."""
    chosen: list[Case] = []
    same: Counter[tuple[str, str]] = Counter()
    folded: Counter[tuple[str, str]] = Counter()
    passing = 0
    left_out = 0
    for case in cases:
        key = (case.feedback, repr(case.rollout.row.output)[:200])
        if not case.failed:
            passing += 1
            if passing > _PASSING_SHOWN or len(chosen) >= limit:
                continue
        elif same[key] >= _SAME_KEPT:
            folded[key] += 1
            continue
        elif len(chosen) >= limit:
            left_out += 1
            continue
        same[key] += 1
        chosen.append(case)
    remarks = [f"({count} more cases like: {cut(key[0], 120)})" for key, count in folded.items()]
    remarks = remarks[:6]
    if left_out:
        remarks.append(f"({left_out} more failing cases are not shown)")
    total = len(cases)
    if total:
        failing = sum(case.failed for case in cases)
        remarks.append(f"({total - failing} of {total} cases had full score; mean {_mean(cases):.2f})")
    return chosen, remarks


def _mean(cases: Sequence[Case]) -> float:
    return sum(case.rollout.row.score for case in cases) / len(cases)


# --- one trace as code -----------------------------------------------------------------------------------------------


class _Names:
    """Short stable names for the records of one trace: op name and a number in order of appearance."""

    def __init__(self, graph: Subgraph) -> None:
        self._names: dict[int, str] = {}
        counts: Counter[str] = Counter()
        members = {op.id: op for op in (*graph.inputs, *graph.ops)}
        for number in sorted(members):
            op = members[number]
            base = _NOT_NAME.sub("_", op.op).strip("_") or "value"
            counts[base] += 1
            self._names[number] = op.op if op.kind == "parameter" else f"{base}{counts[base]}"
        self._trace = graph.trace

    def of(self, number: int) -> str:
        known = self._names.get(number)
        if known is None:
            op = self._trace.ops[number]
            known = op.op if op.kind == "parameter" else f"{op.op}#{number}"
            self._names[number] = known
        return known


def _shape(op: OpRecord, graph: Subgraph) -> tuple[str, tuple[str, ...]]:
    parents = {f"{kind}:{graph.trace.ops[number].op}" for number, kind in op.parents if kind != "after"}
    return op.op, tuple(sorted(parents))


def _kept(graph: Subgraph) -> tuple[list[OpRecord], dict[tuple[str, tuple[str, ...]], int]]:
    """Records to show, and how many were folded by shape. Errors and targets are always kept."""
    targets = {op.id for op in graph.outputs}
    counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
    folded: Counter[tuple[str, tuple[str, ...]]] = Counter()
    kept: list[OpRecord] = []
    for op in graph.ops:
        shape = _shape(op, graph)
        counts[shape] += 1
        if counts[shape] <= _SAME_KEPT or op.id in targets or (op.error is not None and op.error.op_id == op.id):
            kept.append(op)
        else:
            folded[shape] += 1
    return kept, dict(folded)


def _code(cases: Sequence[Case], level: Level) -> tuple[list[str], list[str]]:
    lines: list[str] = []
    documentation: dict[str, str] = {}
    seen: dict[tuple[object, ...], list[int]] = {}
    programs: dict[tuple[object, ...], Case] = {}
    for number, case in enumerate(cases, start=1):
        if case.graph is None:
            continue
        kept, folded = _kept(case.graph)
        key = (tuple(_shape(op, case.graph) for op in kept), tuple(sorted(folded)))
        seen.setdefault(key, []).append(number)
        programs.setdefault(key, case)
    for place, (key, numbers) in enumerate(seen.items()):
        graph = programs[key].graph
        if graph is None:
            continue
        if place >= 3:
            lines.append(f"# {len(seen) - 3} more ways through the program are not shown")
            break
        if len(seen) > 1 or len(numbers) > 1:
            lines.append(f"# {'cases' if len(numbers) > 1 else 'case'} {', '.join(map(str, numbers))}")
        lines.extend(_program(graph, level, documentation))
    return lines, [f"[{name}] {cut(text, level.value)}" for name, text in documentation.items()]


def outline(case: Case, lines: int = 24) -> str:
    """The calls of one recorded run as code, without their values; '' when it was not traced."""
    return "" if case.graph is None else "\n".join(_program(case.graph, Level(1, 60, lines, 0), {}))


def _program(graph: Subgraph, level: Level, documentation: dict[str, str]) -> list[str]:
    names = _Names(graph)
    kept, folded = _kept(graph)
    lines: list[str] = []
    left = dict(folded)
    shown_of: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for op in kept:
        lines.append(_line(op, names))
        _document(op, documentation)
        shape = _shape(op, graph)
        shown_of[shape] += 1
        if shown_of[shape] == _SAME_KEPT and shape in left:
            lines.append(f"# ... {left.pop(shape):,} more calls of {op.op} like this (folded)")
    if len(lines) <= level.lines:
        return lines
    head = max(1, level.lines // 2)
    tail = max(1, level.lines - head - 1)
    return [*lines[:head], f"# ... {len(lines) - head - tail:,} more lines (folded)", *lines[-tail:]]


def _document(op: OpRecord, documentation: dict[str, str]) -> None:
    if op.op in documentation:
        return
    text = str((op.meta or {}).get("description") or "").strip()
    if not text and op.kind == "lm":
        text = "asks a language model with the messages it is given and returns the reply"
    if text:
        documentation[op.op] = " ".join(text.split())


def _line(op: OpRecord, names: _Names) -> str:
    sources = op.sources
    arguments: list[str] = []
    used: set[int] = set()
    for name, value in op.inputs.items():
        source = sources.get(name)
        if source is not None:
            used.add(source)
            arguments.append(f"{name}={names.of(source)}")
        else:
            arguments.append(f"{name}={cut(shown(value), 60)}")
    reads = [names.of(number) for number, kind in op.parents if number not in used and kind == "parameter"]
    calls = [names.of(number) for number, kind in op.parents if number not in used and kind == "nested"]
    others = [
        names.of(number) for number, kind in op.parents if number not in used and kind in ("same", "text", "data")
    ]
    arguments.extend(f"reads {name}" for name in reads)
    arguments.extend(f"from {name}" for name in others)
    line = f"{names.of(op.id)} = {op.op}({', '.join(arguments)})"
    if calls:
        more = f", and {len(calls) - 4} more" if len(calls) > 4 else ""
        line += f"  # inside it: {', '.join(calls[:4])}{more}"
    if op.error is not None:
        line += f"  # failed: {cut(op.error.message or op.error.type, 80)}"
    return line


def _others(case: Case, level: Level) -> list[str]:
    graph = case.graph
    if graph is None:
        return []
    names = _Names(graph)
    targets = {op.id for op in graph.outputs}
    kept, folded = _kept(graph)
    lines: list[str] = []
    for op in [*graph.inputs, *kept]:
        if op.id in targets or op.kind in ("parameter", "root") or op.error is not None:
            continue
        lines.append(f"{names.of(op.id)} = {cut(shown(op.output), level.value)}")
    if len(lines) > level.lines:
        head = max(1, level.lines // 2)
        tail = max(1, level.lines - head - 1)
        lines = [*lines[:head], f"... {len(lines) - head - tail:,} more values (folded)", *lines[-tail:]]
    if folded:
        lines.append(f"({sum(folded.values()):,} values of folded calls are not shown)")
    return lines


# --- parameters ------------------------------------------------------------------------------------------------------


def _variable(spec: ParameterSpec, value: Any, level: Level) -> str:
    if isinstance(value, str):
        return f"({spec.kind}) {spec.name} =\n<<<\n{cut(value, level.variable)}\n>>>"
    lines = readable_lines(value)
    if lines is not None:
        return f"({spec.kind}) {spec.name} =\n<<<\n{cut(chr(10).join(lines), level.variable)}\n>>>"
    return f"({spec.kind}) {spec.name} = {cut(shown(value), level.variable)}"


def constraint_line(spec: ParameterSpec) -> str:
    """What every value of a parameter must obey, in one line."""
    rules: list[str] = []
    if spec.variables:
        rules.append(
            "must contain " + ", ".join("{" + name + "}" for name in spec.variables) + " and no other placeholder"
        )
    if spec.low is not None or spec.high is not None:
        rules.append(f"a number from {spec.low} to {spec.high}")
    if spec.options:
        rules.append("one of " + ", ".join(shown(option) for option in spec.options))
    if spec.kind == "code":
        rules.append("must define a function of the same name and signature")
    if spec.constraint_text:
        rules.append(spec.constraint_text)
    if spec.description:
        rules.append(spec.description)
    return f"({spec.kind}) {spec.name}: {cut('; '.join(rules) or 'any text', 300)}"
