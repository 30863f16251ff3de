"""`agentopt capsule` over a folder or a JSONL file: progress, and going on where an earlier run stopped."""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from agentopt.cli._console import count, err, short
from agentopt.errors import UserError

if TYPE_CHECKING:
    from agentopt.capsules import BatchItem, BatchProgress, Capsule
    from agentopt.cli._capsule import CapsuleArguments

_NOT_SETTINGS = ("source", "out", "concurrency", "as_json", "diff", "quiet", "store")


def batch_command(arguments: CapsuleArguments, source: Path) -> int:
    """A capsule for every input; 1 when some of them failed."""
    if arguments.out is None:
        raise UserError(
            f"{source} holds many texts: say with --out where their capsules go (a folder or a .jsonl file)."
        )
    if arguments.task is not None:
        raise UserError("--task gates one prompt; give its file instead of a folder or a .jsonl file.")
    if arguments.diff:
        raise UserError("--diff shows one capsule; give one file.")
    progress = Progress(
        TextColumn("capsules"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=err(),
        transient=True,
        disable=arguments.quiet or arguments.as_json or not err().is_terminal,
    )
    with progress:
        shown = progress.add_task("capsules", total=None, note="")

        def on_progress(now: BatchProgress) -> None:
            note = f"{count(now.original_tokens)} -> {count(now.tokens)} tokens"
            progress.update(shown, completed=now.done + now.failed, total=now.total, note=note)

        done = asyncio.run(_all(arguments, source, Path(arguments.out), on_progress))
    if arguments.as_json:
        print(json.dumps(asdict(done)))
    elif not arguments.quiet:
        _tell(done, arguments.out)
    return int(done.failed > 0)


async def _all(arguments: CapsuleArguments, source: Path, out: Path, on_progress: object) -> BatchProgress:
    from agentopt._api import acapsule
    from agentopt.capsules import batch
    from agentopt.store import Store

    keywords = arguments.keywords()
    options = keywords.pop("options")
    query = keywords.pop("query")
    needs_store = arguments.model is not None or arguments.store is not None
    with Store.open(arguments.store) if needs_store else nullcontext() as store:
        options = replace(options, store=store)

        async def make(item: BatchItem) -> Capsule:
            return await acapsule(item.source, query=item.query or query, options=options, **keywords)

        return await batch(
            source,
            make,
            out=out,
            concurrency=arguments.concurrency,
            resume=True,
            settings=_settings(arguments),
            on_progress=on_progress,  # pyright: ignore[reportArgumentType]
        )


def _settings(arguments: CapsuleArguments) -> str:
    """Identifies what is asked of every input: another request is made anew."""
    from agentopt.capsules._capsule import identity

    asked = {name: value for name, value in asdict(arguments).items() if name not in _NOT_SETTINGS}
    asked |= {name: identity(asked[name]) for name in ("template", "trained")}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def _tell(done: BatchProgress, out: str) -> None:
    console = err()
    before = f", {done.skipped:,} of them before" if done.skipped else ""
    console.print(
        f"{done.done:,} capsules{before}: {done.original_tokens:,} -> {done.tokens:,} tokens, in {out}", soft_wrap=True
    )
    if done.failed:
        console.print(Text(f"{done.failed:,} failed:", style="red"))
        for line in _failures(Path(out)):
            console.print(Text(f"  {line}"), soft_wrap=True)


def _failures(out: Path, most: int = 3) -> list[str]:
    """The first errors of the records."""
    from agentopt.capsules import RECORDS

    lines: list[str] = []
    with (out / RECORDS if out.is_dir() else out).open(encoding="utf-8") as file:
        for row in file:
            record = json.loads(row)
            if "error" in record:
                told = short(record["error"]["message"], 160)
                lines.append(told if told.startswith(str(record["id"])) else f"{record['id']}: {told}")
            if len(lines) == most:
                break
    return lines
