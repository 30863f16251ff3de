"""`agentopt fold make`: tasks from a generator into a file, and what is in it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from agentopt.cli._console import hanging, out
from agentopt.cli._training_live import WIDTH, size
from agentopt.errors import UserError
from agentopt.weights.fold import FoldTask, save_tasks, worlds


def range_of(option: str, text: str | None, *, both: bool = False) -> Any:
    """`4` as 4 (or `(4, 4)`), `2-6` as `(2, 6)`.

    Raises:
        UserError: something else.
    """
    if text is None:
        return None
    low, sign, high = text.partition("-")
    if not low.isdecimal() or (sign and not high.isdecimal()):
        raise UserError(f"{option}: found {text!r}, expected a number or a range such as 2-6.")
    if sign:
        return int(low), int(high)
    return (int(low), int(low)) if both else int(low)


def numbers_of(option: str, text: str | None) -> tuple[int, ...] | None:
    """`0,1,2` as numbers.

    Raises:
        UserError: something else.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"{option}: found {text!r}, expected numbers with commas between them, for example 0,1,2.")
    return tuple(int(part) for part in parts)


def make_command(
    kind: str, count: int, seed: int, values: Mapping[str, Any], target: str | None, *, as_json: bool
) -> int:
    """Write `count` tasks; returns the exit code."""
    if target is None:
        raise UserError("--out is missing: give the file that the tasks go to, e.g. --out tasks.jsonl.")
    path = Path(target)
    if path.is_dir():
        raise UserError(f"{path}: found a folder, expected a file to write.")
    generators = {"rules": worlds.rules, "kinship": worlds.kinship, "chains": worlds.chains}
    given = {name: value for name, value in values.items() if value is not None}
    tasks = generators[kind](count, seed=seed, **given)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tasks(tasks, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}).") from None
    summary = _summary(kind, seed, tasks, path)
    if as_json:
        print(json.dumps(summary, ensure_ascii=False, indent=2))
    else:
        _print(summary, tasks[0], out())
    return 0


def _summary(kind: str, seed: int, tasks: Sequence[FoldTask], path: Path) -> dict[str, Any]:
    facts = [len(task.facts) for task in tasks]
    questions = [question for task in tasks for question in task.questions]
    answers = Counter(question.answer for question in questions)
    depths = Counter("none" if question.depth is None else str(question.depth) for question in questions)
    return {
        "kind": kind,
        "seed": seed,
        "file": str(path),
        "bytes": path.stat().st_size,
        "tasks": len(tasks),
        "facts": {"least": min(facts), "most": max(facts), "mean": sum(facts) / len(facts)},
        "questions": len(questions),
        "answers": {answer: number / len(questions) for answer, number in answers.most_common()},
        "depths": {depth: depths[depth] / len(questions) for depth in sorted(depths, key=_order)},
    }


def _order(depth: str) -> tuple[bool, int]:
    return (depth == "none", 0 if depth == "none" else int(depth))


def _print(summary: Mapping[str, Any], example: FoldTask, console: Console) -> None:
    facts = summary["facts"]
    first = list(summary["answers"].items())[:6]
    more = len(summary["answers"]) - len(first)
    answers = ", ".join(f"{answer} {share:.0%}" for answer, share in first) + (f", {more} more" if more else "")
    question = example.questions[0]
    relevant = ", ".join(str(place + 1) for place in question.relevant)
    lines = [
        ("wrote", f"{summary['tasks']:,} knowledge bases to {summary['file']} ({size(summary['bytes'])})"),
        ("facts", f"{facts['least']} to {facts['most']}, {facts['mean']:.1f} on average"),
        ("questions", f"{summary['questions']:,}: {answers}"),
        ("depth", ", ".join(f"{depth}: {share:.0%}" for depth, share in summary["depths"].items())),
        ("example", " ".join(f"({place}) {fact}" for place, fact in enumerate(example.facts, 1))),
        ("", f"{question.text} -> {question.answer}" + (f" by {relevant}" if relevant else "")),
        ("next", f"agentopt fold train MODEL --tasks {summary['file']} --out META"),
    ]
    for name, text in lines:
        for place, piece in enumerate(hanging(text, console.width - WIDTH - 1)):
            console.print(Text.assemble((("" if place else name).ljust(WIDTH), "bold"), piece))
