"""Files into facts: a fact a line, a paragraph or a row, each with its place; what holds none is refused by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentopt.errors import UserError
from agentopt.weights.fold import load_documents


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_text_is_a_fact_a_line_and_repeated_ones_count_once(tmp_path: Path) -> None:
    path = written(tmp_path, "facts.txt", "\ufeffBob is  red.\n\nRed people are round.\n  Bob is red. \n")
    found = load_documents(path)
    assert found.facts == ("Bob is red.", "Red people are round.")
    assert found.places == (f"{path}:1", f"{path}:3")
    assert found.repeated == 1


def test_markdown_is_a_paragraph_or_an_item_a_fact_under_its_heading(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "shop.md",
        "Open every day.\n\n# Refunds #\nWithin a month,\nwith a receipt.\n- by card\n2. or in cash\n"
        "## Parts:\n```\n# not a heading\nx = 1\n```\n",
    )
    found = load_documents(path)
    assert found.facts == (
        "Open every day.",
        "Refunds: Within a month, with a receipt.",
        "Refunds: by card",
        "Refunds: or in cash",
        "Parts: # not a heading",
        "Parts: x = 1",
    )
    assert [place.rpartition(":")[2] for place in found.places] == ["1", "4", "6", "7", "10", "11"]


def test_rows_and_folders(tmp_path: Path) -> None:
    rows = [{"fact": "one"}, {"text": "two", "id": 7}, {"facts": ["three", "one"], "question": "?"}]
    written(tmp_path, "b/rows.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    written(tmp_path, "a.txt", "zero\n")
    written(tmp_path, "skip.png", "no text")
    found = load_documents(tmp_path)
    assert found.facts == ("zero", "one", "two", "three")
    assert found.repeated == 1
    assert [Path(file).name for file in found.files] == ["a.txt", "rows.jsonl"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.txt", " \n\n", "found no facts"),
        ("none.md", "# Only a heading\n", "found no facts"),
        ("rows.jsonl", '{"fact": "a"}\nnonsense\n', "rows.jsonl:2: not JSON"),
        ("rows.jsonl", '{"fact": "a"}\n\n{"fact": "  "}\n', 'rows.jsonl:3: fact is "  ", expected text'),
        ("rows.jsonl", '{"facts": []}\n', "rows.jsonl:1: facts is []"),
        ("rows.jsonl", '{"facts": ["a", 3]}\n', "rows.jsonl:1: facts is"),
        ("rows.jsonl", '{"fact": 3}\n', "rows.jsonl:1: fact is 3"),
        ("rows.jsonl", '{"name": "a"}\n', "rows.jsonl:1: found name, expected an object with fact, text or facts"),
        ("rows.jsonl", "[1]\n", "rows.jsonl:1: found [1]"),
    ],
)
def test_what_holds_no_fact_is_one_sentence(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_documents(written(tmp_path, name, text))
    assert said in str(error.value)


def test_nothing_there_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        load_documents(tmp_path / "gone.txt")
    with pytest.raises(UserError, match=r"found no \.txt, \.md or \.jsonl file"):
        load_documents(tmp_path)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8 at byte 0"):
        load_documents(tmp_path / "binary.txt")


def test_rows_may_hold_other_line_separators(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes('{"fact": "one\u2028two"}\r\n{"fact": "three"}\r\n'.encode())
    assert load_documents(file).facts == ("one two", "three")
