"""`agentopt fold apply`, `ask` and `estimate`: a meta-trained folder at work.

An answer goes to stdout and where it came from to stderr, so that `answer=$(agentopt fold ask ...)` holds the answer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.text import Text

from agentopt.cli._console import err, out
from agentopt.cli._fold_settings import check_free
from agentopt.errors import UserError
from agentopt.weights.fold import Documents, Folder, Question, load_documents

CARD = "fold.json"
"""What a folder of `agentopt fold apply` holds beside the adapter."""

if TYPE_CHECKING:
    from agentopt.weights.fold import Adapter, Answer


@contextmanager
def _working(what: str, *, quiet: bool) -> Generator[None]:
    """A moving remark on a terminal while something takes long."""
    console = err()
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def _loaded(meta: str, base: str | None, device: str | None, *, quiet: bool) -> Folder:
    if not Path(meta).is_dir():
        raise UserError(f"{meta}: no such folder; META is what agentopt fold train --out wrote.")
    with _working("loading the model", quiet=quiet):
        return Folder.load(meta, base=base, device=device)


# --- apply -----------------------------------------------------------------------------------------------------------


def apply_command(
    meta: str,
    docs: str | None,
    target: str | None,
    *,
    base: str | None,
    device: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Fold the documents into an adapter; the exit code is 0 also when the gate does not accept it."""
    from agentopt.cli._fold_print import print_adapter

    if docs is None:
        raise UserError("--docs is missing: give a text file with a fact a line, .md, .jsonl, or a folder of them.")
    if target is None:
        raise UserError("--out is missing: give the folder that the adapter goes to, e.g. --out handbook.")
    check_free(Path(target), mark=CARD, what="folded adapter")
    found = load_documents(docs)
    still = quiet or as_json
    with _loaded(meta, base, device, quiet=still) as folder:
        with _working(f"folding {len(found.facts):,} facts", quiet=still):
            adapter = folder.fold(found.facts)
        adapter.save(target)
        report = _adapter_report(folder, adapter, found, meta, target)
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        print_adapter(report, out())
    return 0


def _adapter_report(folder: Folder, adapter: Adapter, found: Documents, meta: str, target: str) -> dict[str, Any]:
    own = folder.options.trains == "all"
    contrary = tuple(one.sentence for one in adapter.contradictions)
    return {
        "adapter": target,
        "meta": meta,
        "base": str(Path(meta) / "base") if own else folder.base_name,
        "base_hash": adapter.base_hash,
        "rank": folder.options.rank if folder.options.adapts == "lora" else None,
        "documents": list(found.files),
        "facts": len(adapter.facts),
        "repeated": found.repeated,
        "rows": adapter.rows,
        "recall": adapter.recall,
        "recall_before": adapter.recall_before,
        "kept": adapter.confidence,
        "accepted": adapter.accepted,
        "reason": adapter.reason,
        "fact_recall": [
            {"place": place, "fact": fact, "recall": recall}
            for place, fact, recall in zip(found.places, adapter.facts, adapter.fact_recall, strict=True)
        ],
        "contradictions": [
            {
                "sentence": one.sentence,
                "places": [found.places[one.first], found.places[one.second]],
                "facts": [adapter.facts[one.first], adapter.facts[one.second]],
            }
            for one in adapter.contradictions
        ],
        "warnings": [_placed(text, found) for text in adapter.warnings if not text.startswith(contrary or ("\0",))],
        "bytes": sum(file.stat().st_size for file in Path(target).glob("*") if file.is_file()),
    }


def _placed(note: str, found: Documents) -> str:
    """A note about a fact by its number (from 0) says where the fact stands."""
    return re.sub(r"^fact (\d+)\b", lambda match: found.places[int(match[1])], note)


# --- ask -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What `agentopt fold ask` was given."""

    meta: str
    adapter: str
    question: str | None
    choices: str | None
    questions: str | None
    gate: bool

    def read(self) -> list[Question]:
        """One question, or those of a file; an unknown answer is empty.

        Raises:
            UserError: none, both, or a row that asks nothing.
        """
        if (self.question is None) == (self.questions is None):
            raise UserError('ask: give one question ("Is the cat kind?") or a file of them (--questions F.jsonl).')
        choices = tuple(part.strip() for part in (self.choices or "").split(",") if part.strip())
        if self.choices is not None and len(choices) < 2:
            raise UserError(f"--choices: found {self.choices!r}, expected at least two answers, for example yes,no.")
        if self.question is not None:
            if not self.question.strip():
                raise UserError("ask: the question is empty.")
            return [Question(self.question, "", choices=choices)]
        return _questions(Path(str(self.questions)), choices)


def _questions(path: Path, choices: tuple[str, ...]) -> list[Question]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other line separators in a text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--questions {str(path)!r}: cannot be read as text ({error}).") from None
    found = [_question(line, f"{path}:{number}", choices) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"--questions {str(path)!r}: found only empty lines.")
    return found


def _question(line: str, place: str, choices: tuple[str, ...]) -> Question:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    row = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    text, answer, own = row.get("question"), row.get("answer", ""), row.get("choices", [])
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{place}: expected an object with a question, for example {{"question": "Is it open?"}}.')
    if not isinstance(answer, str):
        raise UserError(f"{place}: answer is {json.dumps(answer)}, expected text.")
    if not isinstance(own, list) or not all(isinstance(one, str) for one in cast("list[Any]", own)):
        raise UserError(f"{place}: choices is {json.dumps(own)}, expected a list of texts.")
    return Question(text, answer, choices=tuple(cast("list[str]", own)) or choices)


def ask_command(asked: Asked, *, base: str | None, device: str | None, as_json: bool, quiet: bool) -> int:
    """Answer one question or many."""
    from agentopt.cli._fold_print import print_answers, where_from

    questions = asked.read()
    if not (Path(asked.adapter) / CARD).is_file():
        found = f"found a folder without {CARD}" if Path(asked.adapter).is_dir() else "no such folder"
        raise UserError(f"{asked.adapter}: {found}; ADAPTER is what agentopt fold apply --out wrote.")
    still = quiet or as_json
    with _loaded(asked.meta, base, device, quiet=still) as folder:
        adapter = folder.load_adapter(asked.adapter)
        if adapter.meta_hash != folder.meta_hash and not quiet:
            note = "note: another META folded this adapter; fold it again, or this one's gate may not suit it"
            err().print(Text(note), soft_wrap=True)
        with _working(f"answering {len(questions):,} questions", quiet=still):
            answers = folder.ask_many(adapter, questions, gate=asked.gate)
    rows = [_row(question, answer) for question, answer in zip(questions, answers, strict=True)]
    known = [row["correct"] for row in rows if row["correct"] is not None]
    accuracy = sum(known) / len(known) if known else None
    if as_json:
        summary = {"answers": rows, "accuracy": accuracy, "scored": len(known)}
        print(json.dumps(rows[0] if asked.question is not None else summary, ensure_ascii=False, indent=2))
    elif asked.question is not None:
        print(rows[0]["answer"])
        if not quiet:
            for line in where_from(rows[0]):
                err().print(Text(line), soft_wrap=True)
    else:
        print_answers(rows, accuracy, len(known), out())
    return 0


def _row(question: Question, answer: Answer) -> dict[str, Any]:
    correct = None if not question.answer else " ".join(answer.text.split()) == " ".join(question.answer.split())
    return {
        "question": question.text,
        "answer": answer.text,
        "expected": question.answer or None,
        "correct": correct,
        **{name: _number_or_none(value) for name, value in asdict(answer).items() if name != "text"},
    }


def _number_or_none(value: Any) -> Any:
    """JSON has no infinity, which is the margin of an answer without another one."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- estimate --------------------------------------------------------------------------------------------------------


def estimate_command(
    model: str,
    context: int | None,
    questions: int | None,
    values: Mapping[str, Any],
    *,
    measure: bool,
    dtype: str | None,
    device: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Say what each way costs, and which is cheaper."""
    from agentopt.cli._fold_print import print_estimate
    from agentopt.weights import load
    from agentopt.weights.fold import estimate, measure_speed

    sizes: dict[str, Any] = {
        "context_tokens": _number("--context", context, 4096),
        "questions": _number("--questions", questions, 18),
        **{name: value for name, value in values.items() if value is not None},
    }
    still = quiet or as_json
    speed = None
    with _working("loading the model", quiet=still):
        base = load.model(model, dtype=dtype, device=device)[0] if measure else load.config(model)
    if measure:
        with _working("measuring the speed of this machine", quiet=still):
            speed = measure_speed(base)
    found = estimate(base, dtype=dtype, speed=speed, **sizes)
    if as_json:
        print(json.dumps({"model": model, **found.to_dict()}, ensure_ascii=False, indent=2))
    else:
        print_estimate(found, out())
    return 0


def _number(option: str, value: int | None, example: int) -> int:
    if value is None or value < 1:
        found = "is missing" if value is None else f"is {value}"
        raise UserError(f"{option} {found}: give a number of at least 1, e.g. {option} {example}.")
    return value
