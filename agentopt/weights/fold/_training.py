"""Meta-training of a folder from tasks to a calibrated, written META folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agentopt.errors import UserError
from agentopt.evaluation import seed_number
from agentopt.weights.finetuning import Stop
from agentopt.weights.fold import _events as events
from agentopt.weights.fold import _files as files
from agentopt.weights.fold._encoding import check_tasks
from agentopt.weights.fold._gate import Gate, GateRow, calibrate
from agentopt.weights.fold._guard import SENTENCES, Guard
from agentopt.weights.fold._measuring import Measured
from agentopt.weights.fold._outer import Outer
from agentopt.weights.fold._result import MetaResult
from agentopt.weights.fold._run_folder import RunFolder, digest
from agentopt.weights.fold._types import FoldTask, MetaOptions

if TYPE_CHECKING:
    from agentopt.weights.fold._folder import Folder

_HELD_OUT = 10
"""One task of so many is kept for validation when none are given."""


def meta_train(
    folder: Folder,
    tasks: Sequence[FoldTask],
    val: Sequence[FoldTask] | None,
    options: MetaOptions,
    guard: Sequence[str],
    out: str | Path | None,
    tell: Callable[[events.Event], None],
    stop: Stop,
    *,
    resume: bool,
) -> MetaResult:
    """See `Folder.meta_train`."""
    check_tasks(tasks, "meta_train")
    if val is None:
        tasks, val = _split(tasks, options.seed)
    check_tasks(val, "meta_train: val")
    if resume and out is None:
        raise UserError("meta_train: found resume without out, expected the folder of the run.")
    prompts = tuple(guard) or SENTENCES
    guarded = folder.options.guard_weight > 0
    if guard and not guarded:
        raise UserError("meta_train: found guard prompts and guard_weight 0; give the folder a guard_weight above 0.")
    longest, notes = _look(folder, [*tasks, *val])
    with contextlib.ExitStack() as stack:
        where = None
        if out is not None:
            asked = _asked(folder, tasks, val, options, prompts if guarded else ())
            where = stack.enter_context(RunFolder(Path(out).expanduser(), asked, resume=resume))
            if (where.path / files.META).exists():
                where.clean()
                return _again(folder, where.path)
        folder.kit.max_new = longest
        watch = Guard(folder.kit, prompts, options.seed) if guarded else None
        outer = Outer(folder.kit, tasks, val, options, watch, where, tell, stop)
        if where is not None:
            where.begin()
        done = outer.resume()
        if done:
            outer.tell(events.Resumed(done))
        else:
            outer.tell(_plan(folder, tasks, val, options))
        for note in notes:
            outer.warn(note)
        reason = outer.run()
        return _finish(folder, outer, where, reason)


def _finish(folder: Folder, outer: Outer, where: RunFolder | None, reason: str) -> MetaResult:
    folder.renamed_base()
    found = outer.measured("calibrating the gate")
    folder.gate = _gate(folder, found, outer)
    course = outer.course
    best = next(point for point in course.curve if point["step"] == course.best_step)
    shown = {name: value for name, value in best.items() if name not in ("step", "best")}
    result = MetaResult(
        steps=course.step,
        best_step=course.best_step,
        stop_reason=reason,
        validation=shown,
        curve=course.curve,
        seconds=course.seconds,
        warnings=course.warnings,
        folder=None if where is None else str(where.path),
    )
    folder.result = result
    if where is not None:
        folder.save(where.path)
        where.clean()
    outer.tell(events.Finished(result.best_step, reason, shown, result.warnings))
    return result


def _again(folder: Folder, path: Path) -> MetaResult:
    """The result of a run that is done."""
    head = files.read_meta(path)
    kit = folder.kit
    kit.meta.load_state_dict({**kit.meta.state_dict(), **files.trained_base(path, kit)})
    folder.restore(path, head)
    folder.renamed_base()
    if folder.result is None:
        raise UserError(f"{path}: found {files.META} of no meta-training; give another folder.")
    return folder.result


def _gate(folder: Folder, found: Measured, outer: Outer) -> Gate:
    """Thresholds from the validation questions, answered by the folds and by reading."""
    reading: list[bool | None]
    try:
        with folder.base_in_use():
            scores = folder.reader().evaluate(outer.val, questions=outer.options.questions)
        reading = [row.correct for row in scores.rows]
    except UserError:  # the facts do not fit the window
        reading = [None] * len(found.scores)
    counts = [len(task.questions[: outer.options.questions]) for task in outer.val]
    recalls = [recall for recall, count in zip(found.recalls, counts, strict=True) for _ in range(count)]
    return calibrate(
        [
            GateRow(recall, row.margin, row.correct, read)
            for recall, row, read in zip(recalls, found.scores.rows, reading, strict=True)
        ]
    )


def _split(tasks: Sequence[FoldTask], seed: int) -> tuple[list[FoldTask], list[FoldTask]]:
    """A tenth for validation, drawn by the seed; tasks with the same facts stay together.

    Raises:
        UserError: there are too few different knowledge bases.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, task in enumerate(tasks):
        groups.setdefault(tuple(sorted(task.facts)), []).append(place)
    if len(groups) < 2:
        raise UserError(
            f"meta_train: found {len(groups)} knowledge base and no val, expected at least 2: one is held out to "
            "choose by; or give val=."
        )
    draw = np.random.Generator(np.random.Philox(key=seed_number("fold-split", seed)))
    order: list[int] = draw.permutation(len(groups)).tolist()
    held = sorted(order[: max(1, len(groups) // _HELD_OUT)])
    members = list(groups.values())
    places = {place for number in held for place in members[number]}
    train = [task for place, task in enumerate(tasks) if place not in places]
    return train, [tasks[place] for place in sorted(places)]


def _look(folder: Folder, tasks: Sequence[FoldTask]) -> tuple[int, list[str]]:
    """Tokens that recalled facts or an answer may need, and what there is to say about the tasks.

    Raises:
        UserError: a fact without tokens, or a question that is longer than the model's window.
    """
    encoder = folder.kit.encoder
    cut = sum(bool(encoder.facts(task.facts).cuts) for task in tasks)
    whole, alone = encoder.longest(tasks)
    window = folder.window()
    if window is not None and whole > window:
        raise UserError(
            f"meta_train: a question with its answer has {whole} tokens and the model's window has {window}; leave "
            "it out, or use multi_task=False."
        )
    notes: list[str] = []
    if cut:
        notes.append(f"{cut} of {len(tasks)} tasks have facts longer than a row; they were cut at sentence ends.")
    if folder.options.multi_task and not any(question.relevant for task in tasks for question in task.questions):
        notes.append("no question says which facts are relevant: there is nothing to recall; use multi_task=False.")
    return max(8, alone + alone // 4), notes


def _asked(
    folder: Folder,
    tasks: Sequence[FoldTask],
    val: Sequence[FoldTask],
    options: MetaOptions,
    guard: Sequence[str],
) -> dict[str, Any]:
    """What defines a run."""

    def named(rows: Sequence[FoldTask]) -> str:
        return digest([[row.id, list(row.facts), [asdict(one) for one in row.questions]] for row in rows])

    return {
        "fold": folder.options.model_dump(mode="json"),
        "meta": options.model_dump(mode="json"),
        "base": folder.base_hash,
        "start": folder.meta_hash,
        "tasks": named(tasks),
        "val": named(val),
        "guard": digest(list(guard)),
    }


def _plan(folder: Folder, tasks: Sequence[FoldTask], val: Sequence[FoldTask], options: MetaOptions) -> events.Planned:
    kit, fold = folder.kit, folder.options
    kept = fold.inner_steps if fold.unroll is None else min(fold.unroll, fold.inner_steps)
    return events.Planned(
        model=folder.base_name or type(folder.model).__name__,
        adapts=fold.adapts,
        trains=fold.trains,
        rule=fold.rule,
        inner_steps=fold.inner_steps,
        unroll=kept,
        adapted=sum(tensor.numel() for tensor in kit.meta.init.values()),
        trained=sum(tensor.numel() for tensor in kit.named().values() if tensor.requires_grad),
        total=folder.total,
        tasks=len(tasks),
        questions=sum(len(task.questions) for task in tasks),
        val_tasks=min(len(val), options.eval_tasks),
        facts=sum(len(task.facts) for task in tasks) / len(tasks),
        steps=options.steps,
        documents=options.documents,
        accumulate=options.accumulate,
        multi_task=fold.multi_task,
    )
