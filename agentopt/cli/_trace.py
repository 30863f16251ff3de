"""`agentopt trace show`: a recording as a tree of calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text
from rich.tree import Tree

from agentopt.cli._console import err, out, seconds, short, spent, usd
from agentopt.errors import UserError

if TYPE_CHECKING:
    from agentopt.graph import OpRecord, Trace

COLOURS = {"lm": "cyan", "tool": "yellow", "agent": "magenta", "step": "green", "parameter": "blue"}
HIDDEN = ("parameter", "value")


def open_trace(reference: str, store: str | None) -> Trace:
    """A trace from a file, or from the store by id.

    Raises:
        UserError: neither a file nor a known id.
    """
    from agentopt.graph import Trace

    path = Path(reference)
    if path.exists():
        return Trace.load(path)
    if path.suffix == ".jsonl" or "/" in reference:
        raise UserError(f"{reference}: trace file not found.")
    from agentopt.cli._runs import open_store

    with open_store(store) as opened:
        payload = opened.trace(reference)
    if payload is None:
        raise UserError(
            f"{reference!r} is neither a file nor a trace id in the store; `agentopt runs show RUN` lists trace ids."
        )
    return Trace.from_dict(payload)


def show_trace(reference: str, store: str | None, *, op: int | None, limit: int, as_json: bool) -> None:
    """Print the tree, or one op in full, or the JSON form."""
    trace = open_trace(reference, store)
    if as_json:
        print(json.dumps(trace.to_dict(), ensure_ascii=False, default=repr))
        return
    if op is not None:
        _show_op(trace, op)
        return
    console = out()
    total = trace.usage
    tokens = total.input_tokens + total.output_tokens
    head = f"{_number(len(trace.ops), 'op')}, {_number(total.calls, 'LM call')}, {tokens} tokens, {spent(trace.cost)}"
    root = Tree(Text(head, style="bold"))
    shown = [record for record in trace.ops if record.kind not in HIDDEN]
    _grow(root, shown, limit, console.width)
    console.print(root)
    if trace.parameters:
        console.print(Text("\nparameters read", style="bold"))
        for name, parameter in trace.parameters.items():
            room = max(20, console.width - len(name) - 8)
            console.print(Text.assemble(("  " + name, "blue"), f" = {short(_readable(parameter.value), room)}"))
    if len(shown) > limit:
        err().print(f"{len(shown) - limit} more ops; --limit {len(shown)} prints all.")


def _number(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _readable(value: Any) -> Any:
    """Principles, tools and pipelines as their lines instead of JSON."""
    from agentopt.graph import readable_lines

    lines = readable_lines(value)
    return value if lines is None else "; ".join(line.strip() for line in lines)


def _grow(root: Tree, records: Sequence[OpRecord], limit: int, width: int) -> None:
    """Hang at most `limit` records below the call that made them, in the order in which they started.

    Ids follow completion, so an enclosing call has a larger id than what it called: children are gathered first.
    """
    known = {record.id for record in records}
    below: dict[int | None, list[OpRecord]] = {}
    for record in sorted(records, key=lambda item: item.started):
        below.setdefault(record.parent_op if record.parent_op in known else None, []).append(record)
    waiting = [(record, root) for record in reversed(below.get(None, []))]
    while waiting and limit > 0:
        record, parent = waiting.pop()
        branch = parent.add(_line(record, width))
        limit -= 1
        waiting.extend((child, branch) for child in reversed(below.get(record.id, [])))


def _line(record: OpRecord, width: int) -> Text:
    head = Text.assemble((f"#{record.id} ", "dim"), (record.op, COLOURS.get(record.kind, "")))
    head.append(f" {seconds(record.duration)}", style="dim")
    if record.cost:
        head.append(f" {usd(record.cost)}", style="dim")
    room = max(24, width - 12)
    if record.inputs:
        shown = ", ".join(f"{name}={short(value, 40)}" for name, value in record.inputs.items())
        head.append(f"\n{short(shown, room)}", style="dim")
    if record.error is not None:
        head.append(f"\n{short(f'{record.error.type}: {record.error.message}', room)}", style="red")
    else:
        head.append(f"\n-> {short(record.output, room - 3)}")
    return head


def _show_op(trace: Trace, op: int) -> None:
    found = next((record for record in trace.ops if record.id == op), None)
    if found is None:
        raise UserError(f"--op {op}: this trace has no op with that id; ids are shown after '#'.")
    console = out()
    console.print(
        Text.assemble(
            (f"#{found.id} {found.op}", "bold"), f"  ({found.kind}, {seconds(found.duration)}, {spent(found.cost)})"
        )
    )
    sections: list[tuple[str, Any]] = [("inputs", dict(found.inputs)), ("output", found.output), ("meta", found.meta)]
    if found.error is not None:
        sections.insert(1, ("error", found.error.to_dict()))
    for title, value in sections:
        if value is None or value == {}:
            continue
        console.print(Text(title, style="bold"))
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2, default=repr)
        console.print(Text(text))
    parents = ", ".join(f"#{parent} ({kind})" for parent, kind in found.parents)
    console.print(Text(f"parents: {parents or 'none'}", style="dim"))
