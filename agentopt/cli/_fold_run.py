"""A meta-training run from files to figures: three parts of the tasks, baselines, training, one look at the test part.

The model reads the validation and test tasks in context before anything is trained (training may change its weights);
what it scored is kept, so that a resumed run compares with the same figures.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentopt.cli._fold_live import LiveFold
from agentopt.cli._fold_settings import COMMAND, FoldSettings
from agentopt.errors import RunError, UserError
from agentopt.evaluation import MIN_TEST_ROWS, bootstrap_interval, content_hash, paired_test, seeded
from agentopt.weights.fold import Folder, FoldTask, load_tasks, split_tasks

if TYPE_CHECKING:
    from agentopt.weights.finetuning import Stop
    from agentopt.weights.fold import Event, FoldScores, MetaResult

RUN, BASELINES, RESULT = "run.json", "baselines.json", "result.json"
TEST_TASKS, TEST_QUESTIONS = 200, 4
"""Looked at in the end, at most; drawn by the seed."""
FREQUENT, READING, UNTRAINED = "most frequent answer", "in context, untuned", "folded, untrained"
UNREAD = "the untuned model cannot read these tasks in context"

Correct = list[tuple[str, int, bool]]
"""Task, place of the question, whether the answer was right."""


@dataclass
class Parts:
    """The tasks of a run."""

    train: list[FoldTask]
    val: list[FoldTask]
    test: list[FoldTask]
    """Empty when there is no part that nothing was chosen by."""
    split: bool
    notes: list[str] = field(default_factory=list[str])

    @classmethod
    def load(cls, settings: FoldSettings) -> Parts:
        """Read the files, and split when there is one.

        Raises:
            UserError: a file, the row, what was found, what was expected.
        """
        tasks = load_tasks(settings.tasks)
        parts = cls(tasks, [], [], split=settings.val is None)
        if settings.val is None:
            parts.train, parts.val, parts.test = split_tasks(tasks, seed=settings.meta.seed)
            if not (parts.train and parts.val and parts.test):
                raise UserError(
                    f"--tasks {settings.tasks}: found {len(tasks)} knowledge bases, too few to split into training, "
                    "validation and test; add some, or give --val and --test."
                )
        else:
            parts.val = parts.apart(load_tasks(settings.val), "validation")
        if settings.test is not None:
            parts.train += parts.test
            parts.test = parts.apart(load_tasks(settings.test), "test")
        parts.val = trimmed(parts.val, settings.meta.eval_tasks, settings.meta.questions, settings.meta.seed)
        parts.test = trimmed(parts.test, TEST_TASKS, TEST_QUESTIONS, settings.meta.seed)
        return parts

    def apart(self, tasks: list[FoldTask], name: str) -> list[FoldTask]:
        """Without the knowledge bases that are trained or chosen by.

        Raises:
            UserError: none is left.
        """
        known = {_content(task) for task in (*self.train, *self.val)}
        left = [task for task in tasks if _content(task) not in known]
        if not left:
            raise UserError(
                f"--{'val' if name == 'validation' else name}: all {len(tasks)} knowledge bases are training or "
                "validation tasks too; give others, or leave the option out."
            )
        if len(left) < len(tasks):
            self.notes.append(f"{len(tasks) - len(left):,} {name} tasks are left out: trained or validated on")
        return left

    def text(self) -> str:
        """Numbers of tasks, facts and questions."""
        named = (("train", self.train), ("validation", self.val), ("test", self.test))
        parts = ", ".join(f"{len(tasks):,} {name}" for name, tasks in named if tasks)
        facts = sum(len(task.facts) for task in self.train) / len(self.train)
        questions = sum(len(task.questions) for task in self.train) / len(self.train)
        how = " (split by content)" if self.split else ""
        return f"{parts}{how}; {facts:.1f} facts and {questions:.1f} questions each"


def _content(task: FoldTask) -> str:
    return content_hash(sorted(task.facts))


def trimmed(tasks: list[FoldTask], number: int, questions: int, seed: int) -> list[FoldTask]:
    """At most so many tasks and questions of each, drawn by the seed, in their order."""
    draw = seeded("fold", "trimmed", seed)
    if len(tasks) > number:
        tasks = [tasks[place] for place in sorted(draw.sample(range(len(tasks)), number))]
    return [
        task
        if len(task.questions) <= questions
        else replace(
            task,
            questions=tuple(task.questions[at] for at in sorted(draw.sample(range(len(task.questions)), questions))),
        )
        for task in tasks
    ]


# --- running ---------------------------------------------------------------------------------------------------------


def run_training(settings: FoldSettings, out: Path, live: LiveFold, stop: Stop) -> dict[str, Any]:
    """All of it; what `result.json` holds.

    Raises:
        UserError: model, tasks or options do not fit.
        RunError: the loss is no number, or memory ran out.
        KeyboardInterrupt: `stop.wanted` was set; everything that was done is kept.
    """
    live.show("reading tasks")
    parts = Parts.load(settings)
    guard = [] if settings.guard is None else _prompts(Path(settings.guard))
    live.show("loading the model")
    with Folder(settings.model, options=settings.fold, dtype=settings.dtype, device=settings.device) as folder:
        live.plan(folder, parts, settings.meta)
        before = _known(out) or _baselines(folder, parts, live)
        live.baselines(before["validation"], len(parts.val), sum(len(task.questions) for task in parts.val))

        def tell(event: Event) -> None:
            if not (out / COMMAND).exists():  # the folder is taken from the first event on
                _write(out / BASELINES, before)
                _write(out / COMMAND, settings.given)
            live(event)

        trained = folder.meta_train(
            parts.train,
            val=parts.val,
            options=settings.meta,
            guard=guard,
            out=out,
            resume=(out / RUN).exists(),
            on_event=tell,
            stop=stop,
        )
        live.show("the test tasks" if parts.test else "the validation tasks")
        scores = folder.evaluate(parts.test or parts.val)
        report = _report(folder, parts, settings, before, scores, trained)
    report["folder"] = str(out)
    report["files"] = {entry.name: _bytes(entry) for entry in sorted(out.glob("*"))}
    _write(out / RESULT, report)
    return report


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def _prompts(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"--guard {str(path)!r}: no such file; give a text file of unrelated prompts, one a line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--guard {str(path)!r}: cannot be read as text ({error}).") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--guard {str(path)!r}: found only empty lines, expected unrelated prompts, one a line.")
    return prompts


def _known(out: Path) -> dict[str, Any] | None:
    try:
        return json.loads((out / BASELINES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _baselines(folder: Folder, parts: Parts, live: LiveFold) -> dict[str, Any]:
    """Scores of what needs no training."""
    frequent = _most_frequent(parts.train)
    found: dict[str, Any] = {"validation": {}, "test": {}, "correct": None, "unread": ""}
    for name, tasks in (("validation", parts.val), ("test", parts.test)):
        if not tasks:
            continue
        found[name][FREQUENT] = _share(tasks, frequent)
        live.show(f"reading the {name} tasks in context")
        try:
            with folder.base_in_use():
                scores = folder.reader().evaluate(tasks)
        except UserError as error:
            found["unread"], found["correct"] = f"{UNREAD}: {error}", None
        else:
            found[name][READING] = scores.accuracy
            found["correct"] = _correct(scores)
    live.show("folding the validation tasks, untrained")
    found["validation"][UNTRAINED] = folder.evaluate(parts.val).accuracy
    return found


def _most_frequent(tasks: Sequence[FoldTask]) -> str:
    answers = Counter(question.answer for task in tasks for question in task.questions)
    return max(sorted(answers), key=lambda answer: answers[answer])


def _share(tasks: Sequence[FoldTask], answer: str) -> float:
    found = [question.answer == answer for task in tasks for question in task.questions]
    return sum(found) / max(len(found), 1)


def _correct(scores: FoldScores) -> Correct:
    return [(row.task, row.question, row.correct) for row in scores.rows]


# --- figures ---------------------------------------------------------------------------------------------------------


def _report(
    folder: Folder,
    parts: Parts,
    settings: FoldSettings,
    before: dict[str, Any],
    scores: FoldScores,
    trained: MetaResult,
) -> dict[str, Any]:
    part = "test" if parts.test else "validation"
    accuracy = {**before[part], "folded": scores.accuracy}
    gate, depths = folder.gate, scores.by_depth()
    return {
        "base": folder.base_name,
        "base_hash": folder.base_hash,
        "part": part,
        "tasks": len({row.task for row in scores.rows}),
        "least_tasks": MIN_TEST_ROWS,
        "questions": len(scores),
        "accuracy": accuracy,
        "interval": list(clustered_interval(_correct(scores), seed=settings.meta.seed)),
        "against_reading": compared(before["correct"], _correct(scores), seed=settings.meta.seed),
        "unread": before["unread"],
        "recall_exact": scores.recall_exact,
        "recall_set": scores.recall_set,
        "by_depth": {"none" if depth is None else str(depth): depths[depth] for depth in sorted(depths, key=_last)},
        "validation": trained.validation,
        "gate": None if gate is None else gate.to_dict(),
        "steps": trained.steps,
        "best_step": trained.best_step,
        "seconds": trained.seconds,
        "stop_reason": trained.stop_reason,
        "warnings": list(trained.warnings),
    }


def _last(depth: int | None) -> tuple[bool, int]:
    """What has no proof comes last."""
    return depth is None, depth or 0


def clustered_interval(correct: Correct, *, seed: int) -> tuple[float, float]:
    """95 % interval of the accuracy; knowledge bases are drawn, as their questions depend on each other.

    Where all answers are right, or all wrong, there is nothing to draw from: then each knowledge base is one trial, and
    the exact binomial bound is given.
    """
    total, number = _sums(correct)
    accuracy = sum(total.values()) / sum(number.values())
    if accuracy in (0.0, 1.0):
        bound = 0.025 ** (1 / len(number))
        return (bound, 1.0) if accuracy else (0.0, 1 - bound)
    each = sum(number.values()) / len(number)
    values = [accuracy + (total[task] - accuracy * number[task]) / each for task in number]
    low, high = bootstrap_interval(values, seed=seed)
    return max(0.0, low), min(1.0, high)


def compared(before: Sequence[Sequence[Any]] | None, after: Correct, *, seed: int) -> dict[str, Any] | None:
    """The paired test against reading in context, a value per knowledge base; None without both."""
    if before is None:
        return None
    first, number = _sums([(str(task), int(at), bool(right)) for task, at, right in before])
    second, others = _sums(after)
    if number != others:
        return None
    each = sum(number.values()) / len(number)
    found = paired_test([first[task] / each for task in number], [second[task] / each for task in number], seed=seed)
    return found.to_dict()


def _sums(correct: Correct) -> tuple[dict[str, float], dict[str, int]]:
    total: dict[str, float] = {}
    number: dict[str, int] = {}
    for task, _, right in correct:
        total[task] = total.get(task, 0.0) + right
        number[task] = number.get(task, 0) + 1
    return total, number


def _write(path: Path, value: Any) -> None:
    try:
        path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error}).") from None
