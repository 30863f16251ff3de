"""From rows to examples: which columns are the program's inputs, which one is the expected answer.

Columns that match the target's signature are inputs; `expected`, `label` or `answer` is the label; everything else goes
to `Example.meta`. `inputs=` and `label=` say otherwise.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.evaluation._captured import CapturedSource, captured_rows
from agentopt.evaluation._data import Dataset, Example
from agentopt.evaluation._files import Row, read_rows
from agentopt.store import Store

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any] | Example] | Dataset
LABELS = ("expected", "label", "answer")
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which column feeds which argument. `optional` arguments may be absent from a row."""

    inputs: dict[str, str]
    optional: frozenset[str]
    label: str | None
    types: dict[str, str]


def load_dataset(
    source: Source,
    *,
    name: str | None = None,
    inputs: Sequence[str] | None = None,
    label: str | None = None,
    signature: inspect.Signature | None = None,
    store: Store | str | os.PathLike[str] | None = None,
) -> Dataset:
    """Read a dataset from a file (JSONL, JSON, CSV, TSV, Parquet, trace), captured traffic, rows, or a Dataset.

    Args:
        source: the path; the rows, as dicts or Examples; or `captured[:MODEL]` for exchanges that a server captured
            and users judged (`captured-all[:MODEL]`: also those without feedback).
        name: shown in reports; the file's stem by default.
        inputs: columns that are inputs. Names of arguments go by name (`argument=column` renames), other names go
            to the arguments in order.
        label: the column with the expected answer.
        signature: the target's, to find inputs by name and to see what is missing.
        store: where captured traffic is; the file AGENTOPT_DB names, or the default, when None.

    Raises:
        UserError: file, line, field, what was found, what was expected, what to do.
    """
    if isinstance(source, Dataset):
        _check_examples(source.examples, source.name, signature)
        return source
    captured = CapturedSource.of(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else None
    rows: list[Row | Example]
    if captured is not None:
        rows = [Row(row.place, row.fields, hidden=row.hidden) for row in captured_rows(captured, store)]
        name = name or "captured"
        where = str(captured)
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        rows = [*read_rows(path)]
        name = name or path.stem
        where = str(path)
    else:
        name = where = name or "data"
        rows = list(_given_rows(source, where))
    if not rows:
        raise UserError(f"{where}: the dataset is empty; expected at least one row.")
    plain_rows = [row for row in rows if isinstance(row, Row)]
    plan = _plan(where, plain_rows, inputs, label, signature) if plain_rows else None
    examples = [row if plan is None or isinstance(row, Example) else _example(row, plan) for row in rows]
    found = [example for example in examples if isinstance(example, Example)]
    _check_examples([row for row in rows if isinstance(row, Example)], where, signature)
    return Dataset(name, found)


def _given_rows(source: object, where: str) -> Iterable[Row | Example]:
    kind = type(source).__name__
    if isinstance(source, (Mapping, bytes)) or not isinstance(source, Iterable):
        raise UserError(f"{where}: found {kind}, expected a path, a Dataset, or an iterable of dicts or Examples.")
    for index, item in enumerate(cast("Iterable[object]", source), start=1):
        if isinstance(item, Example):
            yield item
        elif isinstance(item, Mapping):
            yield Row(f"{where}, row {index}", {str(key): value for key, value in cast("Any", item).items()})
        else:
            raise UserError(f"{where}, row {index}: found {type(item).__name__}, expected a dict or an Example.")


def _plan(
    where: str, rows: list[Row], inputs: Sequence[str] | None, label: str | None, signature: inspect.Signature | None
) -> _Plan:
    columns = list(dict.fromkeys(name for row in rows for name in row.fields))
    answers = list(dict.fromkeys(name for row in rows for name in row.hidden))
    arguments = _arguments(signature)
    if label is not None:
        _need_column(where, label, [*columns, *answers], "the label")
    else:
        label = next((name for name in LABELS if name in answers), None) or next(
            (name for name in LABELS if name in columns and name not in arguments), None
        )
    if inputs:
        chosen = _named_inputs(where, inputs, columns, arguments, signature)
    elif signature is None:
        chosen = {name: name for name in columns if name not in (label, "id")}
    else:
        chosen = {name: name for name in arguments if name in columns and name != label}
        if _takes_any(signature):
            chosen |= {name: name for name in columns if name not in (label, "id")}
    missing = [name for name, parameter in arguments.items() if name not in chosen and _required(parameter)]
    if missing or not chosen:
        wanted = ", ".join(arguments) or "at least one input"
        unused = [name for name in columns if name != label]
        hint = f" For example: --inputs {','.join(unused[: max(1, len(missing))])}." if unused else ""
        raise UserError(
            f"{where}: no column for {_names(missing) or 'any input'}; the program takes ({wanted}), the data has "
            f"{_names(columns)}. Rename the column, or say which columns are inputs with --inputs.{hint}"
        )
    types = {name: _type_name(parameter) for name, parameter in arguments.items() if name in chosen}
    optional = frozenset(name for name in chosen if name in arguments and not _required(arguments[name]))
    if signature is None or _takes_any(signature):
        optional |= frozenset(name for name in chosen if name not in arguments) if not inputs else frozenset()
    return _Plan(chosen, optional, label, types)


def _named_inputs(
    where: str,
    inputs: Sequence[str],
    columns: list[str],
    arguments: Mapping[str, inspect.Parameter],
    signature: inspect.Signature | None,
) -> dict[str, str]:
    pairs: list[tuple[str, str]] = []
    for item in inputs:
        argument, equals, column = item.partition("=")
        _need_column(where, column if equals else argument, columns, "an input")
        pairs.append((argument, column if equals else argument))
    unknown = [argument for argument, _ in pairs if argument not in arguments]
    if signature is None or not unknown or _takes_any(signature):
        return dict(pairs)
    free = [name for name in arguments if name not in dict(pairs)]
    if len(unknown) > len(free) or any("=" in item for item in inputs):
        raise UserError(
            f"{where}: the program has no argument {_names(unknown)}; it takes ({', '.join(arguments)}). "
            "Use --inputs argument=column."
        )
    by_order = dict(zip(unknown, free, strict=False))
    return {by_order.get(argument, argument): column for argument, column in pairs}


def _example(row: Row, plan: _Plan) -> Example:
    inputs: dict[str, Any] = {}
    for argument, column in plan.inputs.items():
        if column in row.fields:
            value = row.fields[column]
            inputs[argument] = _typed(row, column, value, plan.types.get(argument, "")) if row.text else value
        elif argument not in plan.optional:
            raise UserError(_missing_field(row, column))
    expected: Any = None
    known = {**row.fields, **row.hidden}
    if plan.label is not None:
        if plan.label not in known:
            raise UserError(_missing_field(row, plan.label))
        expected = known[plan.label]
    used = {*plan.inputs.values(), plan.label}
    meta = {name: value for name, value in known.items() if name not in used}
    try:
        return Example("", inputs, expected, meta)
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{row.place}: {error}") from error


def _missing_field(row: Row, column: str) -> str:
    return (
        f"{row.place}: the field {column!r} is missing; found {_names(row.fields) or 'no fields'}. "
        "Other rows have it: add it here or remove the row."
    )


def _typed(row: Row, column: str, value: str, kind: str) -> Any:
    """CSV holds text only: follow the argument's annotation where it is a number or a boolean."""
    try:
        if kind == "int":
            return int(value)
        if kind == "float":
            return float(value)
        if kind == "bool":
            lowered = value.strip().lower()
            if lowered in _TRUE or lowered in _FALSE:
                return lowered in _TRUE
            raise ValueError
    except ValueError:
        raise UserError(f"{row.place}: field {column!r} is {value!r}, expected {kind}.") from None
    return value


def _check_examples(examples: Sequence[Example], where: str, signature: inspect.Signature | None) -> None:
    arguments = _arguments(signature)
    if signature is None:
        return
    for index, example in enumerate(examples, start=1):
        missing = [name for name, item in arguments.items() if _required(item) and name not in example.inputs]
        extra = [name for name in example.inputs if name not in arguments and not _takes_any(signature)]
        if missing or extra:
            what = (
                f"no input {_names(missing)}" if missing else f"an input {_names(extra)} that the program does not take"
            )
            raise UserError(
                f"{where}, example {index} ({example.id}): found {what}; the program takes ({', '.join(arguments)}), "
                f"the example has {_names(example.inputs)}."
            )


def _arguments(signature: inspect.Signature | None) -> dict[str, inspect.Parameter]:
    if signature is None:
        return {}
    skip = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: item for name, item in signature.parameters.items() if item.kind not in skip}


def _takes_any(signature: inspect.Signature) -> bool:
    return any(item.kind is inspect.Parameter.VAR_KEYWORD for item in signature.parameters.values())


def _required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def _type_name(parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")


def _need_column(where: str, name: str, columns: list[str], role: str) -> None:
    if name not in columns:
        close = difflib.get_close_matches(name, columns, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise UserError(f"{where}: no column {name!r} for {role}; the columns are {_names(columns)}{hint}")


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
