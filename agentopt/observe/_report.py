"""report.html: one self-contained page that says what was found, what changed, what it cost and how it was run.

Made from the store alone, so it can be written again at any time. User text is escaped by jinja2's autoescape.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from agentopt.graph import readable_lines
from agentopt.observe._charts import Point, interval_chart, search_chart
from agentopt.observe._proposals import ProposalRow, proposals_of

if TYPE_CHECKING:
    from agentopt.evaluation import Dataset
    from agentopt.store import RunRow, Store

HEADLINES = {
    "improved": "Improved",
    "not_improved": "No improvement shown",
    "worse": "Worse on the test set",
    "no_claim": "No claim",
    "kept_baseline": "Baseline kept",
}
SHOWN_PROPOSALS = 60
SHOWN_FLIPS = 12
SHOWN_TRADE_OFFS = 20
SHOWN_DROPPED = 20
_EXAMPLE = re.compile(r"example [0-9a-f]{16}\b")


@dataclass(frozen=True)
class Cells:
    """One line of a small table."""

    title: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Flip:
    """A test row whose outcome changed between baseline and best."""

    fixed: bool
    input: str
    expected: str
    before: str
    after: str


@dataclass
class Report:
    """What the template reads."""

    run_id: str
    target: str
    date: str
    metric: str
    models: dict[str, str]
    status: str
    headline: str
    sentence: str
    cards: list[Cells]
    changes: list[dict[str, Any]]
    costs: list[Cells]
    stop_reason: str
    plan: str
    config: str
    candidates: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    hidden: int = 0
    warnings: list[str] = field(default_factory=list[str])
    flips: list[Flip] = field(default_factory=list[Flip])
    fixed: int = 0
    broken: int = 0
    trade_offs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    dropped: list[Cells] = field(default_factory=list[Cells])
    """What an optimizer gave up before anything was measured: who, why, how often and after how many tries."""
    dropped_count: int = 0
    driver: str = ""
    interval_svg: str = ""
    curve_svg: str = ""


def render(report: Report) -> str:
    """The page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates", encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(r=report)


def write_report(store: Store, run_id: str, path: Path, *, test: Dataset | None = None) -> Path:
    """Build the report of a finished run and write it atomically; `test` lets it quote the rows that changed.

    Raises:
        KeyError: the store has no such run.
    """
    run = store.run(run_id)
    if run is None:
        raise KeyError(run_id)
    events = [event.payload for event in store.events(run.id)]
    page = render(build_report(run, events, store.evaluations(run.id), test=test))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def build_report(
    run: RunRow,
    events: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    *,
    test: Dataset | None = None,
) -> Report:
    """Gather the page's content; missing parts stay empty."""
    summary, config = run.summary, run.config
    claim: Mapping[str, Any] = summary.get("claim") or {}
    status = str(claim.get("status", run.status))
    proposals = proposals_of(events)
    baseline: Mapping[str, Any] = summary.get("baseline") or {}
    best: Mapping[str, Any] = summary.get("best") or {}
    origin: Mapping[str, Any] = config.get("origin") or {}
    settings: Mapping[str, Any] = origin.get("settings") or {}
    output_field: str | None = settings.get("output_field")
    flips = _flips(rows, str(baseline.get("hash", "")), str(best.get("hash", "")), test, output_field)
    plan = next(
        (event["plan"].get("text", "") for event in reversed(events) if event.get("kind") == "baseline_done"), ""
    )
    interval = claim.get("interval")
    start = next((event["mean"] for event in events if event.get("kind") == "baseline_done"), 0.0)
    dropped: list[Mapping[str, Any]] = []
    for event in events:
        if event.get("kind") == "proposal_made":
            dropped += event.get("dropped") or []
    return Report(
        run_id=run.id,
        target=str(config.get("program", run.id)),
        date=datetime.fromtimestamp(run.created).strftime("%Y-%m-%d %H:%M"),
        metric=str(config.get("metric", "")),
        models=config.get("models") or {},
        status=status,
        headline=HEADLINES.get(status, status.replace("_", " ").capitalize()),
        sentence=str(claim.get("text", "This run has not finished.")),
        cards=_cards(summary, claim),
        changes=_changes(baseline.get("values") or {}, best.get("values") or {}),
        costs=_costs(summary),
        stop_reason=str(summary.get("stop_reason", "")),
        plan=plan,
        config=json.dumps(config, indent=2, ensure_ascii=False, default=str),
        candidates=[_proposal(row) for row in _interesting(proposals)],
        hidden=max(0, len(proposals) - SHOWN_PROPOSALS),
        warnings=[str(event["message"]) for event in events if event.get("kind") == "warning"],
        flips=_balanced(flips),
        fixed=sum(flip.fixed for flip in flips),
        broken=sum(not flip.fixed for flip in flips),
        trade_offs=_trade_offs(summary)[:SHOWN_TRADE_OFFS],
        dropped=_dropped(dropped)[:SHOWN_DROPPED],
        dropped_count=len(dropped),
        driver=_driver(events),
        interval_svg=interval_chart(claim["difference"], *interval) if interval else "",
        curve_svg=search_chart(_points(proposals, start), start),
    )


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.3f}"


def _cards(summary: Mapping[str, Any], claim: Mapping[str, Any]) -> list[Cells]:
    validation: Mapping[str, Any] = summary.get("validation") or {}
    cards: list[Cells] = []
    if claim.get("baseline_mean") is not None:
        cards.append(Cells("Baseline, test", _number(claim["baseline_mean"]), f"{claim['n']} untouched rows"))
    if claim.get("tuned_mean") is not None and claim.get("status") != "kept_baseline":
        cards.append(Cells("Tuned, test", _number(claim["tuned_mean"]), f"{claim['n']} untouched rows"))
    if claim.get("difference") is not None:
        low, high = claim["interval"]
        cards.append(Cells("Difference", _number(claim["difference"], "+"), f"95 % interval {low:+.3f} to {high:+.3f}"))
        cards.append(Cells("p-value", f"{claim['p_value']:.2g}", str(claim.get("test", ""))))
    if validation.get("best") is not None:
        note = f"baseline {_number(validation.get('baseline'))}; selection estimate"
        cards.append(Cells("Best, validation", _number(validation["best"]), note))
    return cards


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    changes: list[dict[str, Any]] = []
    for name in after:
        if before.get(name) != after[name]:
            lines = difflib.ndiff(_lines(before.get(name, ""), name), _lines(after[name], name))
            changes.append({"name": name, "lines": [(line[0], line[2:]) for line in lines if line[0] in "-+ "]})
    return changes


def _lines(value: Any, name: str) -> list[str]:
    if isinstance(value, str):
        return value.splitlines()
    readable = readable_lines(value, name)
    if readable is not None:
        return readable
    if isinstance(value, list):
        items = cast("list[Any]", value)
        return [_item(item) for item in items]
    return [json.dumps(value, ensure_ascii=False)]


def _item(item: Any) -> str:
    """A demonstration as `input  →  output`; any other list item as JSON."""
    if isinstance(item, Mapping) and "output" in item:
        pair = cast("Mapping[str, Any]", item)
        return f"{pair['input']}  →  {pair['output']}"
    return json.dumps(item, ensure_ascii=False)


def _usd(amount: Any) -> str:
    return "unknown" if amount is None else f"${float(amount):.4f}".rstrip("0").rstrip(".") or "$0"


def _costs(summary: Mapping[str, Any]) -> list[Cells]:
    cost: Mapping[str, Any] = summary.get("cost") or {}
    rows: list[Cells] = []
    if "usd" in cost:
        note = f"{int(cost.get('rollouts', 0))} rollouts, {int(cost.get('tokens', 0))} tokens"
        rows.append(Cells("Tuning, everything included", _usd(cost["usd"]), note))
    for key, title in (("per_run_before", "One run before"), ("per_run_after", "One run after")):
        per: Mapping[str, Any] | None = cost.get(key)
        if per:
            latency = _seconds(per.get("latency") or 0.0)
            note = f"{per.get('tokens', 0):.0f} tokens, {per.get('calls', 0):.1f} LM calls, {latency}"
            rows.append(Cells(title, _usd(per.get("usd")), note))
    return rows


def _interesting(rows: Sequence[ProposalRow]) -> list[ProposalRow]:
    """Accepted first, then how far they came; the page stays readable when a run had hundreds."""
    ranked = sorted(
        rows, key=lambda row: (not row.accepted, row.validation is None, -(row.validation or 0), -(row.screen or -9))
    )
    return ranked[:SHOWN_PROPOSALS]


def _proposal(row: ProposalRow) -> dict[str, Any]:
    return {
        "hash": row.candidate[:8],
        "source": row.source,
        "screen": _number(row.screen, "+"),
        "round": str(row.iteration + 1),
        "validation": _number(row.validation),
        "accepted": row.accepted,
        "reason": row.reason,
    }


def _trade_offs(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    items: Sequence[Mapping[str, Any]] = summary.get("trade_offs") or []
    return [_trade_off(item, summary) for item in items]


def _trade_off(item: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the table of trade-offs; figures per run of the program, on validation."""
    key = str(item["candidate"].get("hash", ""))
    names: dict[str, str] = {}
    for role in ("baseline", "best"):
        known: Mapping[str, Any] = summary.get(role) or {}
        names[str(known.get("hash", ""))] = role
    return {
        "hash": key[:8],
        "role": names.get(key, ""),
        "on_front": item["on_front"],
        "score": _number(item["score"]),
        "usd": _usd(item["usd"]),
        "prompt_tokens": f"{item['prompt_tokens']:.0f}",
        "latency": _seconds(item["latency"]),
    }


def _dropped(drops: Sequence[Mapping[str, Any]]) -> list[Cells]:
    """The same problem of the same optimizer once, whatever the example, and how often; the most frequent first."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for drop in drops:
        alike = _EXAMPLE.sub("some examples", str(drop.get("problem", "")))
        groups.setdefault((str(drop.get("source", "")), alike), []).append(drop)
    cells: list[Cells] = []
    for (source, alike), group in sorted(groups.items(), key=lambda item: -len(item[1])):
        problems = {str(drop.get("problem", "")) for drop in group}
        tries = max(int(drop.get("tries", 1)) for drop in group)
        often = [f"{len(group)} times"] if len(group) > 1 else []
        asked = [f"{tries} tries each" if often else f"{tries} tries"] if tries > 1 else []
        shown = problems.pop() if len(problems) == 1 else alike
        cells.append(Cells(source, _clip(shown, 300), ", ".join([*often, *asked])))
    return cells


def _seconds(duration: float) -> str:
    """A duration in the unit a person would use."""
    return f"{duration * 1e3:.1f} ms" if duration < 0.1 else f"{duration:.2f} s"


def _driver(events: Sequence[Mapping[str, Any]]) -> str:
    """Which search ran, with which optimizer, and why that one."""
    started = next((event for event in events if event.get("kind") == "run_started"), None)
    if started is None:
        return ""
    return f"Driver {started['driver']} ({started['driver_reason']}), optimizer {started['optimizer']}."


def _points(rows: Sequence[ProposalRow], start: float) -> list[Point]:
    """A proposal without a validation mean stands at its parent's mean and what the minibatch said it adds to it."""
    means = {row.candidate: row.validation for row in rows if row.validation is not None}
    points: list[Point] = []
    for row in rows:
        score = row.validation
        if score is None and row.screen is not None:
            score = means.get(row.parent, start) + row.screen
        if score is not None:
            points.append(Point(float(row.rollouts), score, row.accepted, row.candidate[:8]))
    return points


def _flips(
    rows: Sequence[Mapping[str, Any]], baseline: str, best: str, test: Dataset | None, output_field: str | None
) -> list[Flip]:
    """Test rows (first repeat) on which baseline and best scored differently."""
    if test is None or baseline == best:
        return []
    by_candidate: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["dataset_id"] == test.id and row["repeat"] == 0:
            by_candidate.setdefault(row["candidate_hash"], {})[row["example_id"]] = row
    before, after = by_candidate.get(baseline, {}), by_candidate.get(best, {})
    flips: list[Flip] = []
    for example in test:
        old, new = before.get(example.id), after.get(example.id)
        if old is not None and new is not None and new["score"] != old["score"]:
            shown = next(iter(example.inputs.values())) if len(example.inputs) == 1 else dict(example.inputs)
            flips.append(
                Flip(
                    fixed=new["score"] > old["score"],
                    input=_clip(shown),
                    expected=_clip(example.expected, 60),
                    before=_clip(_answer(old, output_field), 60),
                    after=_clip(_answer(new, output_field), 60),
                )
            )
    return flips


def _answer(row: Mapping[str, Any], output_field: str | None) -> Any:
    """What the metric read: the error, the output's field, or the output."""
    output = row.get("output")
    if output_field and isinstance(output, Mapping):
        output = cast("Mapping[str, Any]", output).get(output_field)
    return row.get("error") or output


def _balanced(flips: Sequence[Flip]) -> list[Flip]:
    """As many broken rows as fixed ones, so the page does not only show what went well."""
    fixed = [flip for flip in flips if flip.fixed][: SHOWN_FLIPS // 2]
    return fixed + [flip for flip in flips if not flip.fixed][: SHOWN_FLIPS // 2]


def _clip(value: Any, limit: int = 160) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
