"""`agentopt capsule` as a person runs it: the text on stdout, what there is to say about it on stderr, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agentopt.capsules import TokenBudget
from tests.acceptance.warm import WarmCommands

LINES = "\n".join(
    f"- The depot in {town} closes at {hour}:30 and keeps {hour * 12} crates for route {hour + 40}."
    for hour, town in enumerate(("Alder", "Beech", "Cairn", "Dover", "Elm", "Fern", "Gorse", "Holt"), start=11)
)
PROMPT = f"""You plan deliveries for {{customer}}.

# Depots
{LINES}

# Answer
Respond with JSON: {{"depot": "...", "hour": 0}}
Never name a depot that is not listed.
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    return tmp_path


Run = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def run(warm: WarmCommands) -> Run:
    def capsule(folder: Path, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
        return warm.run(["capsule", *arguments], folder, environment, stdin, timeout=240)

    return capsule


def test_the_text_on_stdout_is_within_the_budget_and_the_rest_on_stderr(run: Run, folder: Path) -> None:
    done = run(folder, "prompt.txt", "--budget", "150")
    text = done.stdout.decode()
    assert done.returncode == 0
    assert TokenBudget(150).meter().total([text]) <= 150
    assert "{customer}" in text
    assert 'Respond with JSON: {"depot": "...", "hour": 0}' in text
    assert "recommended: capsule" in done.stderr.decode()
    assert "budget 150" in done.stderr.decode()
    command = [sys.executable, "-m", "agentopt", "capsule", "prompt.txt", "--budget", "150", "--quiet"]
    again = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    assert again.stdout == done.stdout
    assert again.stderr == b""


def test_stdin_a_query_patterns_and_a_file_for_the_result(run: Run, folder: Path) -> None:
    done = run(
        folder, "-", "-b", "420", "--tokenizer", "bytes", "--query", "When does Fern close?", "--keep", r"route 5\d",
        "--out", "short.txt", stdin=PROMPT.encode(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b""
    written = (folder / "short.txt").read_bytes()
    assert len(written) <= 420
    assert b"Fern" in written
    assert PROMPT.count("route 5") == written.count(b"route 5")


def test_json_and_diff(run: Run, folder: Path) -> None:
    made = json.loads(run(folder, "prompt.txt", "-b", "150", "--json").stdout)
    assert made["tokens"] <= 150 < made["original_tokens"]
    assert made["dropped"]
    shown = run(folder, "prompt.txt", "-b", "150", "--diff").stdout.decode()
    for unit in made["dropped"]:
        assert f"- {unit['text'][:40]}" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_messages_in_a_json_file(run: Run, folder: Path) -> None:
    messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": "Which depot is open last?"}]
    (folder / "request.json").write_text(json.dumps({"messages": messages}), encoding="utf-8")
    done = run(folder, "request.json", "-b", "170")
    short = json.loads(done.stdout)
    assert [message["role"] for message in short] == ["system", "user"]
    assert short[1] == messages[1]
    assert len(short[0]["content"]) < len(PROMPT)


@pytest.mark.parametrize(
    ("arguments", "data", "said"),
    [
        (("none.txt", "-b", "9"), b"", "none.txt: no such file or folder"),
        (("prompt.txt",), b"", "--budget is missing"),
        (("prompt.txt", "-b", "0"), b"", "budget: found 0"),
        (("prompt.txt", "-b", "-5"), b"", "budget: found -5"),
        (("-", "-b", "9"), b"caf\xe9", "standard input: not UTF-8 at byte 3"),
        (("prompt.txt", "-b", "99", "--tokenizer", "gone/tokenizer.json"), b"", "gone/tokenizer.json"),
        (("prompt.txt", "-b", "99", "--keep", "(open"), b"", "(open"),
        (("prompt.txt", "-b", "99", "--mode", "rewrite"), b"", "--model"),
        (("prompt.txt", "-b", "99", "--mode", "trained", "--trained", "nowhere"), b"", "nowhere"),
        (("prompt.txt", "-b", "99", "--scorer", "best"), b"", "--scorer: found 'best'"),
        (("prompt.txt", "-b", "99", "--calls", "9"), b"", "--price"),
        (("prompt.txt", "-b", "99", "--task", "none.toml"), b"", "none.toml"),
        (("cap:0123456789abcdef",), b"", "no original"),
        ((".", "-b", "9"), b"", "--out"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    run: Run, folder: Path, arguments: tuple[str, ...], data: bytes, said: str
) -> None:
    done = run(folder, *arguments, stdin=data)
    message = done.stderr.decode()
    assert done.returncode == 2, message
    assert said in message
    assert len(message.strip().splitlines()) == 1
    assert done.stdout == b""


def test_a_budget_that_cannot_be_met_names_one_that_can(run: Run, folder: Path) -> None:
    done = run(folder, "prompt.txt", "-b", "5")
    assert done.returncode == 2
    minimum = done.stderr.decode().split("expected at least ")[1].split(",")[0].split()[0]
    assert run(folder, "prompt.txt", "-b", minimum).returncode == 0


def test_an_empty_file_and_one_long_line(run: Run, folder: Path) -> None:
    (folder / "empty.txt").write_bytes(b"")
    assert run(folder, "empty.txt", "-b", "5").stdout == b""
    (folder / "line.txt").write_bytes(b"lorem ipsum " * 50_000)
    done = run(folder, "line.txt", "-b", "50", "--tokenizer", "words")
    assert done.returncode == 0, done.stderr.decode()
    assert 0 < len(done.stdout.split()) <= 50


def test_a_folder_goes_on_where_it_stopped_and_a_bad_item_stops_nothing(run: Run, folder: Path) -> None:
    source = folder / "docs"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.txt").write_text(PROMPT.replace("Alder", f"Ash{number}"), encoding="utf-8")
    (source / "bad.txt").write_bytes(b"\xff\xfe\x00")
    first = run(folder, "docs", "-b", "150", "--out", "short")
    assert first.returncode == 1
    assert "bad.txt" in first.stderr.decode()
    for number in range(6):
        text = (folder / "short" / f"{number}.txt").read_text(encoding="utf-8")
        assert TokenBudget(150).meter().total([text]) <= 150
    (source / "bad.txt").write_text("Better now.", encoding="utf-8")
    second = run(folder, "docs", "-b", "150", "--out", "short", "--json")
    assert second.returncode == 0
    assert json.loads(second.stdout)["skipped"] == 6


def test_rows_of_a_jsonl_file_with_their_own_queries(run: Run, folder: Path) -> None:
    rows = [{"id": town, "text": PROMPT, "query": f"When does {town} close?"} for town in ("Cairn", "Holt")]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = run(folder, "rows.jsonl", "-b", "120", "--out", "short.jsonl")
    assert done.returncode == 0, done.stderr.decode()
    records = [json.loads(line) for line in (folder / "short.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["id"] for record in records] == ["Cairn", "Holt"]
    assert all(record["id"] in record["capsule"]["text"] for record in records)


def test_an_original_is_found_again_by_its_handle(run: Run, folder: Path) -> None:
    made = json.loads(run(folder, "prompt.txt", "-b", "150", "--json", "--store", "a.db").stdout)
    assert made["handle"].startswith("cap:")
    assert run(folder, made["handle"], "--store", "a.db").stdout.decode() == PROMPT
    part = run(folder, made["handle"], "--store", "a.db", "-b", "120", "--query", "Gorse").stdout.decode()
    assert "Gorse" in part
    assert len(part) < len(PROMPT)


def test_a_task_decides_the_recommendation(run: Run, project: Path) -> None:
    filler = " ".join(f"Remark {number}: tone {number} was agreed on." for number in range(40))
    (project / "long.txt").write_text(f"{filler} Answer with exactly one of: blue, green, red.", encoding="utf-8")
    (project / "gate.toml").write_text(
        'target = "agent.py:colour"\ntrain = "train.jsonl"\nval = "val.jsonl"\nmetric = "exact_match"\n',
        encoding="utf-8",
    )
    done = run(project, "long.txt", "-b", "60", "--task", "gate.toml", "--json")
    assert done.returncode == 0, done.stderr.decode()
    made = json.loads(done.stdout)
    assert "blue, green, red" in made["text"]
    assert made["gate"]["original"] == made["gate"]["capsule"] == 1.0
    assert made["recommended"] == ("capsule" if made["gate"]["verdict"] == "accepted" else "original")


def test_the_cost_over_a_horizon_is_told(run: Run, folder: Path) -> None:
    done = run(folder, "prompt.txt", "-b", "150", "--calls", "1000", "--price", "openai/gpt-4.1-mini")
    assert "cost over 1,000 calls: $" in done.stderr.decode()


def test_a_long_file_is_read_in_pieces(run: Run, folder: Path) -> None:
    with (folder / "long.txt").open("w", encoding="utf-8") as file:
        for number in range(110_000):
            hall, hours = number % 97, number % 24
            file.write(f"Entry {number}: the pump of hall {hall} ran for {hours} hours, as the log of that day says, ")
            file.write("and the valve beside it stayed shut until the next shift came in.\n\n")
        file.write("Never open valve {valve} by hand.\n")
    done = run(folder, "long.txt", "-b", "200")
    assert done.returncode == 0, done.stderr.decode()
    assert TokenBudget(200).meter().total([done.stdout.decode()]) <= 200
    assert "{valve}" in done.stdout.decode()
    assert "units dropped" in done.stderr.decode()
    refused = run(folder, "long.txt", "-b", "200", "--diff")
    assert refused.returncode == 2
    assert "--diff needs all of it" in refused.stderr.decode()


@pytest.mark.parametrize(
    ("option", "needed"),
    [
        (("--cluster", "doc"), "--task"),
        (("--sequential",), "--task"),
        (("--parameter", "p"), "--task"),
        (("--prefix", "tail"), "--calls and --price"),
        (("--output-tokens", "3"), "--calls and --price"),
        (("--template", "t.json"), "--model"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    run: Run, folder: Path, option: tuple[str, ...], needed: str
) -> None:
    done = run(folder, "prompt.txt", "-b", "150", *option)
    assert done.returncode == 2
    assert f"{option[0]} does nothing without {needed}" in done.stderr.decode()
