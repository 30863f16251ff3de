"""From a user's rows to a task: which column is read, what is chosen or written, which labels there are.

Files and column rules are those of `agentopt.evaluation.load_dataset`; this adds what a language model needs to know:
is the answer one of a fixed set (classification), one of the row's own options (choice), or free text (generation)?
"""

from __future__ import annotations

import difflib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from agentopt.errors import UserError
from agentopt.evaluation import Dataset, Example, Source, load_dataset, split_dataset
from agentopt.evaluation._files import read_rows
from agentopt.weights.tasks._encode import Encoded, encode_rows
from agentopt.weights.tasks._prompts import Template, default_template

Kind = Literal["classification", "choice", "generation"]

ANSWERS = ("expected", "label", "answer", "answerKey", "target", "gold", "output")
COMPLETIONS = ("completion", "response")
CHOICES = ("choices", "options", "candidates", "endings")
_LABEL_TEXTS = ("label_text", "label_name")
_NEVER_READ = ("id", "idx", "index")
_LONGEST_LABEL = 40
"""Characters of a label; longer answers are text to write."""
_MOST_LABELS = 100


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One row: the columns a prompt may show, the options, and which of them is right.

    Attributes:
        id: the example's content id, which pairs this row between two measurements.
        place: where it stands ("reviews.jsonl, row 3"), for messages.
        fields: column name to text.
        candidates: what may follow the prompt; empty for classification, whose labels are the task's.
        answer: number of the right candidate.
        expected: the answer as text.
    """

    id: str
    place: str
    fields: Mapping[str, str]
    candidates: tuple[str, ...]
    answer: int
    expected: str


@dataclass(frozen=True, slots=True)
class TaskData:
    """Rows that share one prompt: what `load_task` gives.

    Attributes:
        name: of the data.
        kind: "classification", "choice" or "generation".
        rows: in the order of the file.
        labels: the label values as text (classification).
        words: what the model writes for each label, in the order of `labels`.
        template: the prompt around a row.
        dataset: the same rows as agentopt's other rooms read them.
    """

    name: str
    kind: Kind
    rows: tuple[TaskRow, ...]
    labels: tuple[str, ...]
    words: tuple[str, ...]
    template: Template
    dataset: Dataset

    def __len__(self) -> int:
        return len(self.rows)

    def prompts(self) -> list[str]:
        """The prompt of every row as text, without the answer."""
        return [self.template.render(row.fields) for row in self.rows]

    def take(self, numbers: Sequence[int], *, name: str | None = None) -> TaskData:
        """The rows with these numbers (from 0), as a task of their own with the same prompt and labels."""
        rows = tuple(self.rows[number] for number in numbers)
        return replace(self, name=name or self.name, rows=rows, dataset=self.dataset.take([row.id for row in rows]))

    def split(
        self, seed: int = 0, shares: tuple[float, float, float] = (0.5, 0.25, 0.25)
    ) -> tuple[TaskData, TaskData, TaskData]:
        """Train, validation and test by content (see `agentopt.evaluation.split_dataset`)."""
        at = {row.id: number for number, row in enumerate(self.rows)}
        train, val, test = (
            self.take([at[one] for one in part.ids], name=part.name)
            for part in split_dataset(self.dataset, seed, shares)
        )
        return train, val, test

    def encode(self, tokenizer: Any, *, max_tokens: int = 512, chat: bool = False) -> Encoded:
        """Token ids of every prompt and everything that may follow it; see `Encoded`.

        Args:
            tokenizer: of the model that is tuned.
            max_tokens: a longer prompt loses its beginning, so that the cue at its end stays.
            chat: put the prompt into the tokenizer's chat template, as a user's turn.

        Raises:
            UserError: two labels are the same to the tokenizer, a label word is unknown to it, an answer does not fit
                `max_tokens`, or there is no chat template.
        """
        return encode_rows(self, tokenizer, max_tokens=max_tokens, chat=chat)


def load_task(
    source: Source | TaskData,
    *,
    kind: Literal["auto"] | Kind = "auto",
    prompt: str | None = None,
    labels: Mapping[Any, str] | None = None,
    text: str | None = None,
    label: str | None = None,
    name: str | None = None,
) -> TaskData:
    r"""Read rows and find out what is asked of the model.

    Args:
        source: a path (JSONL, JSON, CSV, TSV, Parquet), dicts, Examples or a Dataset. Rows are `{text, label}`,
            `{question, choices, answer}` (the answer as the option's text, its letter, or its number from 0) or
            `{prompt, completion}`.
        kind: "auto" looks for a column of options, then for a column of completions, then at how many different and
            how long the answers are.
        prompt: `"{text}\nIt was {label}"`: columns in braces; what the model writes stands at the end, `{label}`
            may be left out. By default the columns, then a cue such as "Label:".
        labels: label value to the word the model writes for it, such as `{"0": "terrible", "1": "great"}`. By default
            a column `label_text` if there is one, else the labels themselves.
        text: the one column that the default prompt shows.
        label: the column with the answer.
        name: shown in reports.

    Raises:
        UserError: file, row, what was found, what was expected.
    """
    if isinstance(source, TaskData):
        return source
    if kind != "auto" and kind not in get_args(Kind):
        raise UserError(f"kind: found {kind!r}, expected auto, {', '.join(get_args(Kind))}.")
    table = _read(source, label, name)
    found = table.kind() if kind == "auto" else kind
    if labels and found != "classification":
        raise UserError(f"{table.where}: labels= is for classification, but these rows are {found}.")
    answer = table.answer_column(found)
    options = table.options_column() if found == "choice" else None
    template = _template(table, found, prompt, text, answer, options)
    if found == "classification":
        rows, values, words = _classification(table, answer, labels)
    elif found == "choice":
        rows, values, words = _choice(table, answer, cast("str", options)), (), ()
    else:
        rows, values, words = _generation(table, answer), (), ()
    dataset = table.dataset(answer)
    rows = tuple(replace(row, id=one) for row, one in zip(rows, dataset.ids, strict=True))
    for row in rows:
        template.render(row.fields, place=row.place)
    return TaskData(table.name, found, rows, values, words, template, dataset)


def _read(source: Source, label: str | None, name: str | None) -> _Table:
    """The rows with every column under its own name, whatever role it gets later."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        rows = read_rows(path)
        return _Table(name or path.stem, str(path), [row.place for row in rows], [row.fields for row in rows], label)
    items = cast("Any", source if isinstance(source, (Dataset, Mapping)) else list(source))
    if isinstance(items, list) and all(isinstance(item, Mapping) for item in cast("list[Any]", items)):
        cells = [{str(key): value for key, value in row.items()} for row in cast("list[Mapping[Any, Any]]", items)]
        return _Table(name or "data", name or "data", _places(name or "data", len(cells)), cells, label)
    dataset = load_dataset(cast("Source", items), name=name)
    name = name or dataset.name
    answer = label or next(one for one in ANSWERS if all(one not in example.inputs for example in dataset))
    cells = [_cells(example, answer) for example in dataset]
    return _Table(name, name, _places(name, len(cells)), cells, label, dataset)


def _places(where: str, count: int) -> list[str]:
    return [f"{where}, row {number}" for number in range(1, count + 1)]


def _cells(example: Example, answer: str) -> dict[str, Any]:
    expected = {} if example.expected is None else {answer: example.expected}
    return {**example.meta, **example.inputs, **expected}


class _Table:
    """Every row with all of its columns under their own names, whatever role they get."""

    def __init__(
        self,
        name: str,
        where: str,
        places: list[str],
        cells: list[dict[str, Any]],
        label: str | None,
        dataset: Dataset | None = None,
    ) -> None:
        if not cells:
            raise UserError(f"{where}: the dataset is empty; expected at least one row.")
        self.name, self.where, self.places, self.cells, self.label = name, where, places, cells, label
        self.columns = list(dict.fromkeys(column for row in cells for column in row))
        self.given = dataset
        if label is not None and label not in self.columns:
            raise UserError(f"{where}: no column {label!r} for the answer; the columns are {_names(self.columns)}.")

    def dataset(self, answer: str) -> Dataset:
        if self.given is not None:
            return self.given
        return load_dataset(self.cells, name=self.name, label=answer)

    def options_column(self) -> str | None:
        return next((one for one in CHOICES if one in self.columns), None)

    def answer_column(self, kind: Kind) -> str:
        if self.label is not None:
            return self.label
        known = (*COMPLETIONS, *ANSWERS) if kind == "generation" else (*ANSWERS, *COMPLETIONS)
        found = next((one for one in known if one in self.columns), None)
        if found is None:
            raise UserError(
                f"{self.where}: no column with the answer; found {_names(self.columns)}, expected one of "
                f"{', '.join((*ANSWERS, *COMPLETIONS))}, or name it with label=."
            )
        return found

    def kind(self) -> Kind:
        if self.options_column() is not None:
            return "choice"
        column = self.answer_column("generation")
        if column in COMPLETIONS:
            return "generation"
        texts = [plain_text(cells.get(column)).strip() for cells in self.cells]
        few = len(set(texts)) <= _MOST_LABELS and (column == "label" or len(texts) >= 2 * len(set(texts)))
        short = all(len(text) <= _LONGEST_LABEL and "\n" not in text for text in texts)
        return "classification" if short and few else "generation"

    def value(self, number: int, column: str) -> Any:
        cells = self.cells[number]
        if cells.get(column) is None:
            state = "is null" if column in cells else "is missing"
            raise UserError(
                f"{self.places[number]}: the field {column!r} {state}; found {_names(cells) or 'no fields'}. "
                "Add it or remove the row."
            )
        return cells[column]

    def row(self, number: int, candidates: tuple[str, ...], answer: int, expected: str, hidden: set[str]) -> TaskRow:
        cells = {name: _shown(value) for name, value in self.cells[number].items() if name not in hidden}
        return TaskRow("", self.places[number], cells, candidates, answer, expected)


def plain_text(value: Any) -> str:
    """A cell as text: text as it is, 3.0 as 3, true as true, nothing as nothing."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (bool, list, dict)) else str(value)


def _shown(value: Any) -> str:
    """A cell in a prompt: a list of texts is shown one item a line."""
    if isinstance(value, (list, tuple)):
        return "\n".join(map(plain_text, cast("Sequence[Any]", value)))
    return plain_text(value)


def _names(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in names)


def _template(
    table: _Table, kind: Kind, prompt: str | None, text: str | None, answer: str, options: str | None
) -> Template:
    if text is not None and text not in table.columns:
        close = difflib.get_close_matches(text, table.columns, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the columns are {_names(table.columns)}."
        raise UserError(f"{table.where}: no column {text!r} to show in the prompt; {hint}")
    if prompt is not None:
        return Template.parse(prompt, columns=table.columns, answer=answer)
    hidden = {answer, options, *_LABEL_TEXTS, *_NEVER_READ}
    meta = {name for example in table.given or () for name in example.meta}
    shown = [text] if text else [name for name in table.columns if name not in hidden and name not in meta]
    if not shown:
        raise UserError(f"{table.where}: no column to show in the prompt; the columns are {_names(table.columns)}.")
    return default_template(kind, shown)


def _classification(
    table: _Table, answer: str, words: Mapping[Any, str] | None
) -> tuple[tuple[TaskRow, ...], tuple[str, ...], tuple[str, ...]]:
    values = [plain_text(table.value(number, answer)).strip() for number in range(len(table.cells))]
    chosen = {plain_text(key).strip(): word for key, word in (words or {}).items()} or _column_words(table, values)
    known = list(chosen) or sorted(set(values), key=_label_order)
    for number, value in enumerate(values):
        if value not in known:
            raise UserError(f"{table.places[number]}: the label is {value!r}, expected one of {_names(known)}.")
    if len(known) < 2:
        raise UserError(f"{table.where}: every row has the label {values[0]!r}; expected at least two labels.")
    texts = [chosen.get(value, value.replace("_", " ")) for value in known]
    for value, word in zip(known, texts, strict=True):
        if not word.strip():
            raise UserError(f"{table.where}: the word for the label {value!r} is empty; give one with labels=.")
    twice = [word for word, count in Counter(word.strip() for word in texts).items() if count > 1]
    if twice:
        raise UserError(f"{table.where}: two labels have the word {twice[0]!r}; expected a word of its own for each.")
    hidden = {answer, *_LABEL_TEXTS}
    rows = tuple(
        table.row(number, (), known.index(value), texts[known.index(value)], hidden)
        for number, value in enumerate(values)
    )
    return rows, tuple(known), tuple(word.strip() for word in texts)


def _column_words(table: _Table, values: Sequence[str]) -> dict[str, str]:
    """Words from a column such as `label_text`, when it says one thing for each label."""
    column = next((name for name in _LABEL_TEXTS if name in table.columns), None)
    if column is None:
        return {}
    pairs = {(value, plain_text(cells.get(column)).strip()) for value, cells in zip(values, table.cells, strict=True)}
    words = dict(sorted(pairs, key=lambda pair: _label_order(pair[0])))
    return words if len(words) == len(pairs) and all(words.values()) else {}


def _label_order(value: str) -> tuple[bool, int, str]:
    number = value.lstrip("-").isdecimal()
    return (not number, int(value) if number else 0, value)


def _choice(table: _Table, answer: str, column: str) -> tuple[TaskRow, ...]:
    rows: list[TaskRow] = []
    for number, place in enumerate(table.places):
        options, names = _options(table.value(number, column), place, column)
        right = _right(table.value(number, answer), options, names, place)
        rows.append(table.row(number, options, right, options[right], {answer}))
    return tuple(rows)


def _options(value: Any, place: str, column: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The options of a row and their names, if they have any (`{"text": [...], "label": ["A", ...]}`)."""
    names: tuple[str, ...] = ()
    if isinstance(value, Mapping):
        table = cast("Mapping[str, Any]", value)
        names = tuple(map(plain_text, table.get("label") or ()))
        value = table.get("text")
    if not isinstance(value, (list, tuple)) or len(cast("Sequence[Any]", value)) < 2:
        raise UserError(f"{place}: {column!r} is {_short(value)}, expected a list of at least two options.")
    options = tuple(plain_text(one).strip() for one in cast("Sequence[Any]", value))
    if not all(options) or len(set(options)) < len(options):
        raise UserError(f"{place}: {column!r} is {_short(value)}, expected options that differ and are not empty.")
    return options, names


def _right(value: Any, options: tuple[str, ...], names: tuple[str, ...], place: str) -> int:
    text = plain_text(value).strip()
    if not isinstance(value, int) and text in options:
        return options.index(text)
    if text in names:
        return names.index(text)
    if len(text) == 1 and text.isascii() and text.isalpha() and ord(text.upper()) - ord("A") < len(options):
        return ord(text.upper()) - ord("A")
    if text.isdecimal() and int(text) < len(options):
        return int(text)
    raise UserError(
        f"{place}: the answer is {_short(value)}, expected one of the {len(options)} options as text, as a letter from "
        f"A, or as a number from 0 to {len(options) - 1}."
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _generation(table: _Table, answer: str) -> tuple[TaskRow, ...]:
    rows: list[TaskRow] = []
    for number, place in enumerate(table.places):
        written = plain_text(table.value(number, answer))
        if not written.strip():
            raise UserError(f"{place}: the field {answer!r} is empty, expected the text to write.")
        rows.append(table.row(number, (written,), 0, written, {answer}))
    return tuple(rows)
