"""Datasets: every format reads back what was written, and every mistake names its file, line and field."""

from __future__ import annotations

import csv
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.evaluation import Dataset, Example, load_dataset, overlap, split_dataset

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ANY_TEXT = st.text(max_size=40)
ROWS = st.lists(st.fixed_dictionaries({"ticket": TEXT, "expected": TEXT}), min_size=1, max_size=12)
FILES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def triage(ticket: str) -> str: ...


SIGNATURE = inspect.signature(triage)


def rows_of(data: Dataset) -> list[dict[str, Any]]:
    return [{**example.inputs, "expected": example.expected} for example in data]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


@FILES
@given(rows=st.lists(st.fixed_dictionaries({"ticket": ANY_TEXT, "expected": ANY_TEXT}), min_size=1, max_size=12))
def test_jsonl_round_trip(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    path = write(tmp_path / "d.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert rows_of(load_dataset(path, signature=SIGNATURE)) == rows


@FILES
@given(rows=ROWS)
def test_csv_round_trip(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    path = tmp_path / "d.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["ticket", "expected"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    assert rows_of(load_dataset(path, signature=SIGNATURE)) == rows


@FILES
@given(rows=ROWS)
def test_parquet_round_trip(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert rows_of(load_dataset(path, signature=SIGNATURE)) == rows


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 5))
def test_same_rows_have_the_same_ids_whatever_the_order_or_the_source(rows: list[dict[str, str]], seed: int) -> None:
    data = load_dataset(rows, signature=SIGNATURE)
    shuffled = load_dataset(rows[seed % len(rows) :] + rows[: seed % len(rows)], signature=SIGNATURE)
    assert data.id == shuffled.id and set(data.ids) == set(shuffled.ids)
    assert len(set(data.ids)) == len(rows)
    assert data.duplicates == len(rows) - len({(row["ticket"], row["expected"]) for row in rows})
    assert [Example.from_dict(example.to_dict()) for example in data] == list(data)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(max_size=4), min_size=8, max_size=60), seed=st.integers(0, 3))
def test_split_keeps_equal_inputs_together_and_loses_nothing(texts: list[str], seed: int) -> None:
    data = load_dataset([{"ticket": text, "expected": str(n % 2)} for n, text in enumerate(texts)], signature=SIGNATURE)
    if len(set(texts)) < 4:
        with pytest.raises(UserError, match="too few to split"):
            split_dataset(data, seed)
        return
    parts = split_dataset(data, seed)
    assert sorted(row["ticket"] for part in parts for row in rows_of(part)) == sorted(texts)
    assert all(len(part) for part in parts)
    assert not overlap(parts[0], parts[1]) and not overlap(parts[0], parts[2]) and not overlap(parts[1], parts[2])


def test_split_follows_content_not_position_and_the_seed_changes_it() -> None:
    rows = [{"ticket": f"t{n}", "expected": "x"} for n in range(400)]
    data, turned = load_dataset(rows), load_dataset(rows[::-1])
    for one, other in zip(data.split(1), turned.split(1), strict=True):
        assert set(one.ids) == set(other.ids)
    assert [len(part) for part in data.split(1)] == [200, 100, 100]
    assert set(data.split(2)[0].ids) != set(data.split(1)[0].ids)


def test_overlap_sees_equal_inputs_with_another_label() -> None:
    a = load_dataset([{"ticket": "x", "expected": "1"}])
    b = load_dataset([{"ticket": "x", "expected": "2"}, {"ticket": "y", "expected": "1"}])
    assert overlap(a, b) == [b[0].id]


def test_a_repeated_row_gets_an_id_of_its_own() -> None:
    data = load_dataset([{"q": "x", "expected": "1"}] * 3)
    assert data.duplicates == 2
    assert data.ids == [data[0].id, f"{data[0].id}-2", f"{data[0].id}-3"]
    assert data.take([data.ids[2], data.ids[0]]).examples[1].id == data.ids[0]
    with pytest.raises(UserError, match="has no example 'nope'"):
        data.get("nope")


def test_columns_go_to_inputs_label_and_meta() -> None:
    rows = [{"id": 7, "ticket": "x", "answer": "1", "team": "a"}]
    example = load_dataset(rows, signature=SIGNATURE)[0]
    assert (example.inputs, example.expected, example.meta) == ({"ticket": "x"}, "1", {"id": 7, "team": "a"})
    example = load_dataset([{"text": "x", "gold": "1"}], inputs=["text"], label="gold", signature=SIGNATURE)[0]
    assert (example.inputs, example.expected) == ({"ticket": "x"}, "1")
    example = load_dataset([{"text": "x", "gold": "1"}], inputs=["ticket=text"], label="gold", signature=SIGNATURE)[0]
    assert example.inputs == {"ticket": "x"}


def test_an_argument_called_like_a_label_is_an_input() -> None:
    def grade(answer: str) -> str: ...

    example = load_dataset([{"answer": "x", "expected": "1"}], signature=inspect.signature(grade))[0]
    assert (example.inputs, example.expected) == ({"answer": "x"}, "1")


def test_optional_arguments_may_be_absent_and_keyword_catchers_take_all() -> None:
    def optional(ticket: str, tone: str = "calm") -> str: ...
    def everything(**fields: str) -> str: ...

    rows = [{"ticket": "x", "expected": "1"}, {"ticket": "y", "tone": "angry", "expected": "1"}]
    assert [dict(e.inputs) for e in load_dataset(rows, signature=inspect.signature(optional))] == [
        {"ticket": "x"},
        {"ticket": "y", "tone": "angry"},
    ]
    assert dict(load_dataset(rows, signature=inspect.signature(everything))[1].inputs) == {
        "ticket": "y",
        "tone": "angry",
    }


def test_csv_follows_number_and_boolean_annotations(tmp_path: Path) -> None:
    def price(amount: float, count: int, urgent: bool) -> str: ...

    signature = inspect.signature(price)
    path = write(tmp_path / "d.csv", "amount,count,urgent,label\n1.5,2,yes,ok\n")
    assert dict(load_dataset(path, signature=signature)[0].inputs) == {"amount": 1.5, "count": 2, "urgent": True}
    write(path, "amount,count,urgent,label\n1.5,2,yes,ok\n1.5,two,no,ok\n")
    with pytest.raises(UserError, match=r"d\.csv, line 3: field 'count' is 'two', expected int"):
        load_dataset(path, signature=signature)


def test_semicolons_tabs_bom_and_line_breaks_in_fields(tmp_path: Path) -> None:
    assert len(load_dataset(write(tmp_path / "a.csv", "\ufeffticket;label\nx;1\n"), signature=SIGNATURE)) == 1
    assert len(load_dataset(write(tmp_path / "a.tsv", "ticket\tlabel\r\nx\t1\r\n"), signature=SIGNATURE)) == 1
    data = load_dataset(write(tmp_path / "b.csv", 'ticket,label\n"two\nlines",1\n\nx,2\n'), signature=SIGNATURE)
    assert [e.inputs["ticket"] for e in data] == ["two\nlines", "x"]
    assert len(load_dataset(write(tmp_path / "a.jsonl", '\ufeff{"ticket": "x"}\r\n'), signature=SIGNATURE)) == 1
    assert len(load_dataset(write(tmp_path / "a.json", '[{"ticket": "x"}]'), signature=SIGNATURE)) == 1


GOOD = '{"ticket": "a", "expected": "b"}\n'
BAD: list[tuple[str, str, str]] = [
    ("d.jsonl", GOOD + '{"ticket": "a"\n', r"d\.jsonl, line 2: invalid JSON at column \d+"),
    ("d.jsonl", GOOD + "\n[1]\n", r"d\.jsonl, line 3: found a list, expected an object"),
    ("d.jsonl", GOOD + '{"expected": "b"}\n', r"line 2: the field 'ticket' is missing; found 'expected'"),
    ("d.jsonl", GOOD + '{"ticket": "b"}\n', r"line 2: the field 'expected' is missing"),
    ("d.jsonl", "", r"d\.jsonl: the dataset is empty; expected at least one row"),
    ("d.jsonl", "[" * 100_000, r"line 1: (the JSON is nested too deep|invalid JSON)"),
    (
        "d.jsonl",
        '{"text": "a", "expected": "b"}\n',
        r"no column for 'ticket'; the program takes \(ticket\).*--inputs text",
    ),
    ("d.json", '{"ticket": "a"}', r"d\.json: found an object, expected a list"),
    ("d.json", '[{"ticket": "a"},\n oops]', r"d\.json, line 2: invalid JSON"),
    ("d.csv", "ticket,label\nx\n", r"d\.csv, line 2: found 1 fields, expected 2 \(ticket, label\)"),
    ("d.csv", 'ticket,label\n"two\nlines",1\nx\n', r"d\.csv, line 4: found 1 fields"),
    ("d.csv", "ticket,,label\n", r"line 1: column 2 has no name"),
    ("d.csv", "ticket,ticket\nx,y\n", r"the column name 'ticket' occurs twice"),
    ("d.csv", 'ticket,label\n"x,1\n', r"d\.csv, line \d: invalid CSV"),
    ("d.csv", "ticket,label\n", r"the dataset is empty"),
    ("d.parquet", "no parquet", r"d\.parquet: not a readable Parquet file"),
    ("d.xlsx", "x", r"cannot tell the format from '\.xlsx'; expected \.jsonl"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_bad_files_are_one_sentence_with_the_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(UserError, match=message) as caught:
        load_dataset(path, signature=SIGNATURE)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8_name_their_line(tmp_path: Path) -> None:
    for name, data in (("d.jsonl", GOOD.encode() + b'{"ticket": "\xff"}'), ("d.csv", b"ticket,label\n\xff,1\n")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="line 2: found bytes that are not UTF-8"):
            load_dataset(tmp_path / name, signature=SIGNATURE)


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(UserError, match=r"no such file; did you mean .*train\.jsonl\?"):
        load_dataset(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match=r"is a folder|cannot tell the format"):
        load_dataset(tmp_path)


def test_wrong_column_names_are_told_with_the_closest() -> None:
    rows = [{"ticket": "a", "gold": "b"}]
    with pytest.raises(
        UserError, match=r"no column 'gld' for the label; the columns are 'ticket', 'gold'; did you mean"
    ):
        load_dataset(rows, label="gld", signature=SIGNATURE)
    with pytest.raises(UserError, match="no column 'txt' for an input"):
        load_dataset(rows, inputs=["txt"], signature=SIGNATURE)
    with pytest.raises(UserError, match="the program has no argument 'gold'"):
        load_dataset(rows, inputs=["ticket", "gold"], signature=SIGNATURE)


@pytest.mark.parametrize("source", [3, {"a": 1}, b"x", [3], ["text"]])
def test_a_source_that_is_no_dataset_is_told(source: Any) -> None:
    with pytest.raises(UserError, match="expected a"):
        load_dataset(source)


def test_examples_are_checked_against_the_signature() -> None:
    assert len(load_dataset([Example(inputs={"ticket": "x"})], signature=SIGNATURE)) == 1
    with pytest.raises(UserError, match=r"example 1 .*no input 'ticket'"):
        load_dataset(Dataset("d", [Example(inputs={"text": "x"})]), signature=SIGNATURE)
    with pytest.raises(UserError, match=r"an input .more. that the program"):
        load_dataset([Example(inputs={"ticket": "x", "more": 1})], signature=SIGNATURE)


def test_a_value_without_stable_content_is_told() -> None:
    with pytest.raises(UserError, match=r"row 1: a dataset row holds a value of type object"):
        load_dataset([{"ticket": object()}], signature=SIGNATURE)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "d.parquet", "x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'agentopt\[parquet\]'"):
        load_dataset(path)


def test_dates_and_decimals_in_parquet_have_content_ids(tmp_path: Path) -> None:
    import datetime
    import decimal

    rows = [{"ticket": datetime.date(2026, 1, 2), "expected": decimal.Decimal("1.50"), "raw": b"x"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    data = load_dataset(tmp_path / "d.parquet", signature=SIGNATURE)
    assert data.id == load_dataset(tmp_path / "d.parquet", signature=SIGNATURE).id


SORTS: list[Callable[[Dataset], Any]] = [list, len, lambda data: data[1:3], repr]


@pytest.mark.parametrize("use", SORTS)
def test_a_dataset_is_a_sequence(use: Callable[[Dataset], Any]) -> None:
    data = load_dataset([{"q": str(n)} for n in range(4)], name="four")
    assert use(data)
    assert isinstance(data[1:3], Dataset) and data[1:3].ids == data.ids[1:3]
    assert data == Dataset("other", data.examples) and data != 3
