"""What the folding commands print when they are done: sentences first, then one table, then what to do next."""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentopt.cli._console import hanging, short
from agentopt.cli._training_live import WIDTH, duration, shown_path, size

if TYPE_CHECKING:
    from agentopt.weights.fold import Estimate

WORST = 3
"""Facts shown that are recalled worst."""
SHOWN = 0.005
"""A threshold below this turns nothing away that is a number."""
LITTLE = 0.1
"""Recall that folding should add at least."""
VLLM_RANK = 16
"""vLLM takes adapters up to this rank without being told."""
WARN = "bold yellow"
HELD = {
    "meta.json": "options and gate",
    "init.safetensors": "start and inner rates",
    "base": "the trained base",
    "tokenizer": "the tokenizer",
}
"""What a META folder is made of."""


def print_training(report: Mapping[str, Any], console: Console) -> None:
    """What folding scores on tasks it never saw, beside what needs no training; the gate; what was written."""
    console.print()
    for sentence in training_sentences(report):
        _paragraph(console, sentence)
    console.print()
    console.print(_accuracies(report))
    if len(report["by_depth"]) > 1:
        shown = ", ".join(f"{depth} {value:.3f}" for depth, value in report["by_depth"].items())
        _paragraph(console, f"folded, by depth of the proof: {shown}")
    console.print()
    if report["gate"] is not None:
        _paragraph(console, gate_text(report["gate"]))
    best = f"best after {report['best_step']:,}" if report["best_step"] else "none better than the start"
    console.print(f"{report['steps']:,} steps in {duration(report['seconds'])}, {best}; {report['stop_reason']}")
    for warning in report["warnings"]:
        _paragraph(console, f"warning: {warning}", "yellow")
    shown = os.path.relpath(str(report["folder"]))
    held = [f"{what} ({name}, {size(report['files'][name])})" for name, what in HELD.items() if name in report["files"]]
    _paragraph(console, f"in {shown}: {', '.join(held)}")
    next_command = f"agentopt fold apply {shlex.quote(shown)} --docs FACTS.txt --out ADAPTER"
    console.print(Text(f"next: {next_command}", style="dim"), soft_wrap=True)


def _bases(number: int) -> str:
    return "1 knowledge base" if number == 1 else f"{number:,} knowledge bases"


def _paragraph(console: Console, text: str, style: str = "") -> None:
    """Wrapped at words, without the blanks that end a line."""
    for line in textwrap.wrap(text, console.width, break_on_hyphens=False):
        console.print(Text(line, style=style))


def training_sentences(report: Mapping[str, Any]) -> list[str]:
    """The result in words; nothing is claimed that the tasks cannot show."""
    low, high = report["interval"]
    folded = report["accuracy"]["folded"]
    enough = report["tasks"] >= report["least_tasks"]
    untouched = "test tasks, untouched until now" if report["part"] == "test" else "validation tasks"
    interval = f"95 % interval {low:.3f} to {high:.3f}; " if enough else ""
    sentences = [
        f"Folded: {folded:.3f} of {report['questions']:,} questions about {_bases(report['tasks'])} answered "
        f"right without the facts in the prompt ({interval}{untouched})."
    ]
    if report["part"] == "validation":
        sentences.append("The best step was chosen by these same tasks, so the figure is optimistic; give --test.")
    against = report["against_reading"]
    if against is not None:
        low, high = against["interval"]
        interval = f", 95 % interval {low:+.3f} to {high:+.3f}" if enough else ""
        sentences.append(
            f"The untuned model with the facts in its prompt: {against['mean_a']:.3f} (difference "
            f"{against['difference']:+.3f}{interval})."
        )
    elif report["unread"]:
        sentences.append(f"{report['unread'][:1].upper()}{report['unread'][1:]}")
    if not enough:
        few = f"{_bases(report['tasks'])} {'is' if report['tasks'] == 1 else 'are'} too few to conclude from"
        sentences.append(f"{few}: at least {report['least_tasks']} are needed.")
    return sentences


def _accuracies(report: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{report['part']} tasks")
    table.add_column("accuracy", justify="right")
    table.add_column("exact recall", justify="right")
    recall = "-" if report["recall_set"] is None else f"{report['recall_set']:.3f}"
    for name, value in report["accuracy"].items():
        folded = name == "folded"
        table.add_row(name, f"{value:.3f}", recall if folded else "", style="bold" if folded else "")
    return table


def gate_text(gate: Mapping[str, Any]) -> str:
    """What the gate lets through, and what that did on the tasks it was set by."""
    limits = [f"{name} {gate[name]:.2f}" for name in ("recall", "margin") if (gate[name] or 0) >= SHOWN]
    text = f"gate: answers in context below {' or '.join(limits)}" if limits else "gate: lets every answer pass"
    seen = gate.get("calibration")
    if not seen:
        return text
    parts = [f"folded {seen['folded']:.3f}"]
    if seen.get("in_context") is not None:
        parts.append(f"in context {seen['in_context']:.3f}")
    parts.append(f"gated {seen['gated']:.3f} with {seen['fallbacks']:.0%} in context")
    return f"{text} (on validation: {', '.join(parts)})"


# --- apply -----------------------------------------------------------------------------------------------------------


def print_adapter(report: Mapping[str, Any], console: Console) -> None:
    """What was folded, how well it is recalled, what is wrong with it, and how it is served."""
    rows = "" if report["rows"] == report["facts"] else f" ({report['rows']:,} rows)"
    what = f"{report['facts']:,} fact{'s' if report['facts'] > 1 else ''}{rows} into {report['adapter']}"
    recall = f"recall {report['recall']:.3f}, {report['recall_before']:.3f} before folding"
    if report["accepted"]:
        _paragraph(console, f"Folded: {what}, {recall}.", "bold green")
    else:
        _paragraph(console, f"Folded, not accepted: {what}, {recall}.", WARN)
        _paragraph(console, f"Questions will be answered in context: {report['reason']}.", "yellow")
    if report["recall"] - report["recall_before"] < LITTLE and report["recall_before"] < 1 - LITTLE:
        _paragraph(
            console, "The facts were hardly taken up: meta-train longer, or on tasks that resemble them.", "yellow"
        )
    if report["repeated"]:
        again = "fact was" if report["repeated"] == 1 else "facts were"
        console.print(f"{report['repeated']:,} repeated {again} left out.")
    if report["facts"] > 1:
        _named(console, "worst", _worst(report["fact_recall"]))
    for one in report["contradictions"]:
        pairs = zip(one["places"], one["facts"], strict=True)
        _named(console, "contrary", [f"{place}  {short(fact, 120)}" for place, fact in pairs], style="yellow")
    for warning in report["warnings"]:
        _named(console, "note", [warning], style="yellow")
    _named(console, "gate", [report["reason"]] if report["accepted"] else [])
    base = f"base {shown_path(report['base'])} ({report['base_hash'][:12]})"
    _named(console, "adapter", [f"{size(report['bytes'])}, {base}"])
    console.print()
    for line in _usage(report):
        console.print(Text(line, style="dim"), soft_wrap=True)


def _worst(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    ranked = sorted(facts, key=lambda one: one["recall"])[:WORST]
    return [f"{one['recall']:.2f}  {one['place']}  {short(one['fact'], 120)}" for one in ranked]


def _usage(report: Mapping[str, Any]) -> list[str]:
    meta, target = (shlex.quote(report[name]) for name in ("meta", "adapter"))
    folder = not report["base"].startswith(("embedded", "hf:")) and not report["base"].endswith(".gguf")
    base = shlex.quote(shown_path(report["base"])) if folder else "BASE"
    lines = [f'ask:   agentopt fold ask {meta} {target} "QUESTION"']
    if report["rank"] is None:  # all weights moved: a whole model
        return [*lines, f"serve: vllm serve {target}"]
    name = shlex.quote(os.path.basename(os.path.normpath(report["adapter"])))
    rank = f" --max-lora-rank {report['rank']}" if report["rank"] > VLLM_RANK else ""
    lines.append(f"serve: vllm serve {base} --enable-lora{rank} --lora-modules {name}={target}")
    lines.append(f"peft:  PeftModel.from_pretrained(base, {report['adapter']!r})")
    if not folder:  # servers read folders
        lines.append(f"BASE:  load.model({report['base']!r})[0].save_pretrained('BASE'), its tokenizer beside it")
    return lines


def _named(console: Console, name: str, texts: Sequence[str], style: str = "") -> None:
    """Lines under one name, wrapped at words."""
    pieces = [piece for text in texts for piece in hanging(text, console.width - WIDTH)]
    for place, piece in enumerate(pieces):
        console.print(Text.assemble((("" if place else name).ljust(WIDTH), "bold"), (piece, style)))


# --- ask -------------------------------------------------------------------------------------------------------------


def where_from(row: Mapping[str, Any]) -> list[str]:
    """Where an answer came from, how sure it is, and the facts the model named before it."""
    source = row["source"]
    sure = [f"{name} {row[name]:.3f}" for name in ("recall", "margin") if row[name] is not None]
    head = f"{source}: {', '.join(sure)}" if source == "folded" else f"{source}: {row['reason'] or 'the gate is shut'}"
    recalled = " ".join(row["recalled"])
    return [head, *([f"recalled: {recalled}"] if recalled else [])]


def print_answers(rows: Sequence[Mapping[str, Any]], accuracy: float | None, scored: int, console: Console) -> None:
    """An answer a line, and how many were right where that is known."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("answer", max_width=20, overflow="ellipsis", no_wrap=True)
    if scored:
        table.add_column("")
    table.add_column("from", no_wrap=True)
    table.add_column("margin", justify="right")
    table.add_column("question", overflow="ellipsis", no_wrap=True)
    for row in rows:
        mark = {True: "right", False: "wrong", None: ""}[row["correct"]]
        margin = "-" if row["margin"] is None else f"{row['margin']:.2f}"
        cells = [row["answer"], *([mark] if scored else []), row["source"], margin, row["question"]]
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    reading = sum(row["source"] != "folded" for row in rows)
    console.print(f"{len(rows):,} questions: {len(rows) - reading:,} folded, {reading:,} in context")
    if accuracy is not None:
        console.print(f"accuracy {accuracy:.3f} of {scored:,} with a known answer", style="bold")


# --- estimate --------------------------------------------------------------------------------------------------------


def print_estimate(found: Estimate, console: Console) -> None:
    """The three ways side by side, and what to make of it."""
    timed = found.fold.seconds is not None
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in ("operations", *(("once", "a question", f"all {found.questions:,}") if timed else ()), "KV memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, cost in (("fold and ask", found.fold), ("cached context", found.cached), ("re-reading", found.reread)):
        if not cost.possible:
            table.add_row(name, Text("too long", style="yellow"))
            continue
        times = (cost.fixed_seconds, cost.question_seconds, cost.seconds) if timed else ()
        style = "bold" if cost.way == found.cheaper else ""
        table.add_row(name, operations(cost.flops), *map(span, times), size(cost.kv_bytes), style=style)
    console.print(table)
    console.print()
    _paragraph(console, found.sentence())
    _paragraph(console, f"Folding itself needs about {size(found.folding_bytes)} for the activations of an inner step.")


def operations(number: float) -> str:
    """Floating-point operations with a prefix: 4.1 TFLOP."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}FLOP"
    return f"{number:,.0f} FLOP"


def span(value: float | None) -> str:
    """Nothing is shown as nothing."""
    return "-" if not value else duration(value)
