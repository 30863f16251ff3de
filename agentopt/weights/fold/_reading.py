"""Files of tasks: our own JSONL, ProofWriter in two published forms, and the split that keeps a knowledge base whole.

Own rows are {"facts": [...], "question": ..., "answer": ..., "relevant"?, "choices"?, "depth"?, "id"?}, one question a
line (lines with the same facts become one task), or {"facts": [...], "questions": [...], "id"?, "meta"?}.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.evaluation._files import Row, read_rows
from agentopt.weights.fold._proofwriter import is_proofwriter, read_proofwriter
from agentopt.weights.fold._types import FoldTask, Question

_QUESTION = ("question", "answer", "relevant", "choices", "depth")
_TASK = ("id", "facts", "questions", "meta")
_SHARES = (0.8, 0.1, 0.1)


def load_tasks(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]], *, limit: int | None = None
) -> list[FoldTask]:
    """Tasks from a file (JSONL, JSON, Parquet) or from rows.

    Fields of a row that have no meaning here are kept in the task's `meta`.

    Args:
        source: a path, or rows as they would be read from a file.
        limit: at most so many tasks.

    Raises:
        UserError: file, line and field; what was found, what was expected.
    """
    if isinstance(source, (str, os.PathLike)):
        if Path(source).is_dir():
            raise UserError(f"{source} is a folder; give the file of tasks itself.")
        where, rows = str(source), read_rows(Path(source))
    else:
        where, rows = "tasks", _given(source)
    if not rows:
        raise UserError(f"{where}: no tasks; expected at least one row with facts, a question and its answer.")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}, expected 1 or more.")
    found: dict[object, FoldTask] = {}
    for row in rows:
        task, whole = _task(row)
        key = row.place if whole else task.facts
        before = found.get(key)
        found[key] = task if before is None else _joined(before, task, row.place)
    tasks = list(found.values())
    return tasks if limit is None else tasks[:limit]


def save_tasks(tasks: Iterable[FoldTask], path: str | os.PathLike[str]) -> None:
    """Write tasks as JSONL, one a line; `load_tasks` gives them back as they were (lists for tuples in `meta`).

    Raises:
        UserError: a folder that is not there or may not be written, or a `meta` that is no JSON.
    """
    target = Path(path)
    lines: list[str] = []
    for task in tasks:
        record = {"id": task.id, "facts": task.facts, "questions": [_record(question) for question in task.questions]}
        try:
            lines.append(json.dumps(record | ({"meta": dict(task.meta)} if task.meta else {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(f"task {task.id}: its meta cannot be written as JSON ({error}).") from None
    temporary = target.with_name(target.name + ".part")
    try:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}).") from error


def split_tasks(
    tasks: Sequence[FoldTask], seed: int = 0, *, shares: tuple[float, float, float] = _SHARES
) -> tuple[list[FoldTask], list[FoldTask], list[FoldTask]]:
    """Training, validation and test tasks; tasks with the same facts, in whatever order, stay together.

    The order of the tasks does not matter: knowledge bases are ranked by a hash of their facts and the seed. With three
    of them or more none of the parts that have a share is empty.

    Raises:
        UserError: shares that do not add up to 1.
    """
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise UserError(f"shares is {list(shares)}, expected three numbers that add up to 1.")
    keys = [_content(task, seed) for task in tasks]
    ranked = sorted(set(keys))
    ends = [round(len(ranked) * shares[0]), round(len(ranked) * (shares[0] + shares[1]))]
    if len(ranked) >= 3:
        wanted = [int(share > 0) for share in shares]
        ends[1] = min(max(ends[1], wanted[0] + wanted[1]), len(ranked) - wanted[2])
        ends[0] = min(max(ends[0], wanted[0]), ends[1] - wanted[1])
    part = {key: 0 if place < ends[0] else 1 if place < ends[1] else 2 for place, key in enumerate(ranked)}
    parts: tuple[list[FoldTask], list[FoldTask], list[FoldTask]] = ([], [], [])
    for task, key in zip(tasks, keys, strict=True):
        parts[part[key]].append(task)
    return parts


def _content(task: FoldTask, seed: int) -> str:
    text = json.dumps([seed, sorted(task.facts)])
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _record(question: Question) -> dict[str, Any]:
    record: dict[str, Any] = {"question": question.text, "answer": question.answer}
    if question.relevant:
        record["relevant"] = question.relevant
    if question.depth is not None:
        record["depth"] = question.depth
    if question.choices:
        record["choices"] = question.choices
    return record


def _given(source: object) -> list[Row]:
    if isinstance(source, (Mapping, bytes)) or not isinstance(source, Iterable):
        kind: type[object] = type(cast("object", source))
        raise UserError(f"tasks: found {kind.__name__}, expected a path or rows.")
    rows: list[Row] = []
    for number, item in enumerate(cast("Iterable[object]", source), start=1):
        if not isinstance(item, Mapping):
            raise UserError(f"tasks, row {number}: found {type(item).__name__}, expected an object with facts.")
        fields = cast("Mapping[object, Any]", item)
        rows.append(Row(f"tasks, row {number}", {str(name): value for name, value in fields.items()}))
    return rows


def _task(row: Row) -> tuple[FoldTask, bool]:
    """The task of a row, and whether it is all of it (a row with one question may be joined with others)."""
    if is_proofwriter(row.fields):
        return read_proofwriter(row)
    _check_names(row)
    facts = _texts(row, "facts")
    identity = row.fields.get("id")
    if identity is not None and not isinstance(identity, (str, int)):
        raise UserError(f"{row.place}: id: found {_kind(identity)}, expected text.")
    name = str(identity) if identity is not None else hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    whole = "questions" in row.fields
    used = {"id", "facts", "meta", "questions"} if whole else {"id", "facts", "meta", *_QUESTION}
    meta = row.fields.get("meta", {})
    if not isinstance(meta, Mapping):
        raise UserError(f"{row.place}: meta: found {_kind(meta)}, expected an object.")
    extra = {key: value for key, value in row.fields.items() if key not in used}
    questions = _questions(row, len(facts)) if whole else (_question(row, row.fields, "", len(facts)),)
    return FoldTask(name, facts, questions, dict(cast("Mapping[str, Any]", meta)) | extra), whole


def _check_names(row: Row) -> None:
    """A field that is nearly the name of a known one is a slip of the pen."""
    known = (*_TASK, *_QUESTION)
    for field in row.fields:
        close = difflib.get_close_matches(field, known, n=1, cutoff=0.8)
        if field not in known and close:
            raise UserError(f"{row.place}: unknown field {field!r}; did you mean {close[0]!r}?")


def _joined(before: FoldTask, more: FoldTask, place: str) -> FoldTask:
    for question in more.questions:
        same = next((old for old in before.questions if old.text == question.text), None)
        if same is not None and same.answer != question.answer:
            raise UserError(
                f"{place}: {question.text!r} is answered {question.answer!r}, and {same.answer!r} in an earlier row "
                "with the same facts; remove one."
            )
    new = tuple(question for question in more.questions if question not in before.questions)
    return FoldTask(before.id, before.facts, before.questions + new, {**more.meta, **before.meta})


def _questions(row: Row, facts: int) -> tuple[Question, ...]:
    given: Any = row.fields["questions"]
    if not isinstance(given, (list, tuple)) or not given:
        raise UserError(f"{row.place}: questions: found {_kind(given)}, expected a list of at least one question.")
    found: list[Question] = []
    for number, item in enumerate(cast("Sequence[object]", given)):
        if not isinstance(item, Mapping):
            raise UserError(f"{row.place}: questions[{number}]: found {_kind(item)}, expected an object.")
        fields = cast("Mapping[str, Any]", item)
        unknown = next((name for name in fields if name not in _QUESTION), None)
        if unknown is not None:
            raise UserError(
                f"{row.place}: questions[{number}]: unknown field {unknown!r}; the fields are {', '.join(_QUESTION)}."
            )
        found.append(_question(row, fields, f"questions[{number}].", facts))
    return tuple(found)


def _question(row: Row, fields: Mapping[str, Any], prefix: str, facts: int) -> Question:
    texts: dict[str, str] = {}
    for name in ("question", "answer"):
        value = fields.get(name)
        if not isinstance(value, str) or not value.strip():
            found = _kind(value) if name in fields else "nothing"
            raise UserError(f"{row.place}: {prefix}{name}: found {found}, expected text.")
        texts[name] = value
    choices = _choices(row, fields, prefix)
    if choices and texts["answer"] not in choices:
        raise UserError(
            f"{row.place}: {prefix}answer is {texts['answer']!r}, which is none of the choices ({', '.join(choices)})."
        )
    depth = fields.get("depth")
    if depth is not None and (not isinstance(depth, int) or isinstance(depth, bool) or depth < 0):
        raise UserError(f"{row.place}: {prefix}depth: found {json.dumps(depth)}, expected a number from 0.")
    return Question(texts["question"], texts["answer"], _relevant(row, fields, prefix, facts), depth, choices)


def _choices(row: Row, fields: Mapping[str, Any], prefix: str) -> tuple[str, ...]:
    if fields.get("choices") is None:
        return ()
    choices = _texts(row, "choices", fields, prefix)
    if len(set(choices)) < max(2, len(choices)):
        raise UserError(f"{row.place}: {prefix}choices: found {list(choices)}, expected two or more different texts.")
    return choices


def _relevant(row: Row, fields: Mapping[str, Any], prefix: str, facts: int) -> tuple[int, ...]:
    given: Any = fields.get("relevant")
    if given is None:
        return ()
    if not isinstance(given, (list, tuple)):
        raise UserError(
            f"{row.place}: {prefix}relevant: found {_kind(given)}, expected places of facts, such as [0, 2]."
        )
    for place in cast("Sequence[object]", given):
        if not isinstance(place, int) or isinstance(place, bool):
            raise UserError(f"{row.place}: {prefix}relevant: found {_kind(place)}, expected numbers of facts from 0.")
        if not 0 <= place < facts:
            raise UserError(
                f"{row.place}: {prefix}relevant: found {place}, and there are {facts} facts, numbered from 0 to "
                f"{facts - 1}."
            )
    places = tuple(cast("Sequence[int]", given))
    if len(set(places)) < len(places):
        raise UserError(f"{row.place}: {prefix}relevant: found {list(places)}, expected every place once.")
    return places


def _texts(row: Row, name: str, fields: Mapping[str, Any] | None = None, prefix: str = "") -> tuple[str, ...]:
    """A field that is a list of texts, none of them blank."""
    source = row.fields if fields is None else fields
    given: Any = source.get(name)
    if not isinstance(given, (list, tuple)) or not given:
        found = _kind(given) if name in source else "nothing"
        raise UserError(f"{row.place}: {prefix}{name}: found {found}, expected a list of at least one text.")
    for number, item in enumerate(cast("Sequence[object]", given)):
        if not isinstance(item, str) or not item.strip():
            found = "blank text" if isinstance(item, str) else _kind(item)
            raise UserError(f"{row.place}: {prefix}{name}[{number}]: found {found}, expected text.")
    return tuple(cast("Sequence[str]", given))


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text" if value.strip() else "blank text"
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    if isinstance(value, Mapping):
        return "an object"
    return "true or false" if isinstance(value, bool) else "a number" if isinstance(value, (int, float)) else "no text"
