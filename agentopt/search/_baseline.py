"""What the baseline run shows: which parameters are read, which tools are called, whether the program works at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from agentopt.errors import RunError, UserError
from agentopt.evaluation import EvaluationRow, Rollout
from agentopt.graph import ParameterSpec
from agentopt.search._options import TuneOptions


@dataclass(frozen=True, slots=True)
class Baseline:
    """Parameters that were read (those are tuned), those that never were, and tools with mean calls per rollout."""

    tunable: dict[str, ParameterSpec]
    never_read: list[str]
    tools: dict[str, float]
    warnings: list[str]


def check_first_rows(rows: Sequence[EvaluationRow], options: TuneOptions) -> str | None:
    """Stop when all of the first rollouts fail in the same way; returns a warning when they fail in many ways.

    Raises:
        RunError: a broken program, metric or connection: going on would only spend money.
    """
    errors = Counter(row.error.splitlines()[0] if row.error else "" for row in rows)
    if not rows or "" in errors:
        return None
    text, _ = errors.most_common(1)[0]
    if len(errors) > 2 or options.allow_failing_baseline:
        return f"All of the first {len(rows)} baseline rollouts failed, for example: {text}"
    raise RunError(
        f"All of the first {len(rows)} baseline rollouts failed: {text}. Mend the program or the metric; if the "
        "failure is what tuning should mend, set allow_failing_baseline."
    )


def discover(rollouts: Iterable[Rollout], specs: Mapping[str, ParameterSpec], program: str) -> Baseline:
    """Compare declared with read parameters. Without any trace (synthetic rows) everything declared counts as read.

    Raises:
        UserError: the program declares nothing tunable, or reads nothing of it.
    """
    if not specs:
        raise UserError(
            f"{program} declares no tunable parameter; declare one, for example ao.prompt(text, name='...'), or name a "
            "frozen one with --tune"
        )
    read: set[str] = set()
    calls: Counter[str] = Counter()
    traced = total = 0
    for rollout in rollouts:
        total += 1
        trace = rollout.trace
        if trace is None:
            continue
        traced += 1
        read.update(trace.parameters)
        calls.update(op.op for op in trace.ops if op.kind == "tool")
    if traced == 0:
        return Baseline(dict(specs), [], {}, [])
    tunable = {name: spec for name, spec in specs.items() if name in read}
    never = [name for name in specs if name not in read]
    if not tunable:
        raise UserError(
            f"{program} read none of its parameters in the baseline run. {' '.join(map(_unread, specs.values()))}"
        )
    tools = {name: count / traced for name, count in sorted(calls.items())}
    return Baseline(tunable, never, tools, [_unread(specs[name]) for name in never])


def _unread(spec: ParameterSpec) -> str:
    text = f"Parameter {spec.name!r} ({spec.place}) was never read"
    if spec.import_time_read:
        return (
            f"{text} during a rollout, but at {spec.import_time_read} while the module was imported, which freezes its "
            "default; read it inside the function instead."
        )
    return f"{text} and is left alone."
