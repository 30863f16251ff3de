"""Batches: folders and JSONL, errors that stop nothing, kill and resume, the order of the finished file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentopt.capsules import BudgetInfeasible, Capsule
from agentopt.capsules._batch import BatchProgress, batch
from agentopt.capsules._batch_inputs import BatchItem
from agentopt.errors import RunError, UserError
from agentopt.models import BudgetExhausted

pytestmark = pytest.mark.anyio


def capsule(text: str, *, original: str = "o" * 40) -> Capsule:
    return Capsule(text, len(text), 100, "bytes", original, len(original), "extract", "capsule")


async def first_words(item: BatchItem) -> Capsule:
    return capsule(str(item.source)[:5], original=str(item.source))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(path: Path, *given: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return path


async def test_a_folder_gives_a_folder_of_texts_and_one_record_each(tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/b.txt").write_text("second text", encoding="utf-8")
    (tmp_path / "in/deep/a.md").write_text("\ufefffirst text", encoding="utf-8")
    (tmp_path / "in/.hidden").write_text("no input", encoding="utf-8")
    seen: list[BatchProgress] = []
    done = await batch(tmp_path / "in", first_words, out=tmp_path / "in/out", on_progress=seen.append)
    assert (done.done, done.failed, done.total) == (2, 0, 2)
    assert (tmp_path / "in/out/b.txt").read_text() == "secon"
    assert (tmp_path / "in/out/deep/a.md").read_text() == "first"
    found = records(tmp_path / "in/out/capsules.jsonl")
    assert [row["id"] for row in found] == ["b.txt", "deep/a.md"]
    assert "text" not in found[0]["capsule"] and "original" not in found[0]["capsule"]
    assert {one.last for one in seen} == {"b.txt", "deep/a.md"} and seen[-1].done == 2


async def test_a_folder_may_give_one_file_of_records_and_nothing_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    done = await batch(tmp_path / "in", first_words, out=tmp_path / "in/out.jsonl")
    assert done.total == 0 and records(tmp_path / "in/out.jsonl") == []
    (tmp_path / "in/a.txt").write_text("some text", encoding="utf-8")
    done = await batch(tmp_path / "in", first_words, out=tmp_path / "in/out.jsonl", resume=True)
    assert [(row["id"], row["capsule"]["text"]) for row in records(tmp_path / "in/out.jsonl")] == [("a.txt", "some ")]
    assert done.total == 1


async def test_rows_hold_text_or_messages_and_the_file_is_in_their_order(tmp_path: Path) -> None:
    source = rows(
        tmp_path / "in.jsonl",
        {"id": "slow", "text": "slow text", "query": "why?"},
        {"messages": [{"role": "user", "content": "hello"}]},
        {"id": "slow", "text": "the same id again"},
        {"id": 7, "text": "a number as id"},
    )
    queries: dict[str, str | None] = {}

    async def make(item: BatchItem) -> Capsule:
        queries[item.id] = item.query
        await anyio.sleep(0.05 if item.id == "slow" else 0)
        return capsule(item.id if item.messages is None else item.messages[0]["content"])

    await batch(source, make, out=tmp_path / "out.jsonl", concurrency=4)
    found = records(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == ["slow", "2", "slow#2", "7"]
    assert [row["capsule"]["text"] for row in found] == ["slow", "hello", "slow#2", "7"]
    assert queries == {"slow": "why?", "2": None, "slow#2": None, "7": None}


async def test_bad_inputs_are_records_and_the_rest_goes_on(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    good = json.dumps({"id": "good", "text": "good"}).encode()
    lines = [b'{"id": "bytes", "text": "\xff"}', b"{not json", b'["a list"]', b'{"id": "none"}', good, b"", good]
    lines += [b'{"id": "small", "text": "small"}', b'{"id": "bug", "text": "bug"}', b"[" * 100_000]
    source.write_bytes(b"\n".join(lines))

    async def make(item: BatchItem) -> Capsule:
        if item.id == "small":
            raise BudgetInfeasible(minimum=9, limit=2, tokenizer="bytes")
        if item.id == "bug":
            raise ZeroDivisionError("division by zero")
        return capsule("fine")

    done = await batch(source, make, out=tmp_path / "out.jsonl")
    found = {row["id"]: row for row in records(tmp_path / "out.jsonl")}
    assert (done.done, done.failed) == (2, 7)
    assert found["1"]["error"]["type"] == "UserError"
    assert "byte 25 is not UTF-8" in found["1"]["error"]["message"]
    assert "not JSON" in found["2"]["error"]["message"]
    assert found["small"]["error"] == {
        "type": "BudgetInfeasible",
        "message": str(BudgetInfeasible(minimum=9, limit=2, tokenizer="bytes")),
        "minimum": 9,
    }
    assert found["bug"]["error"]["type"] == "ZeroDivisionError"
    assert found["good"]["capsule"]["text"] == found["good#2"]["capsule"]["text"] == "fine"


async def test_resume_skips_what_is_done_repairs_a_torn_line_and_tries_errors_again(tmp_path: Path) -> None:
    source = rows(tmp_path / "in.jsonl", *({"id": f"r{n}", "text": f"text {n}"} for n in range(4)))
    calls: list[str] = []
    broken = True

    async def make(item: BatchItem) -> Capsule:
        calls.append(item.id)
        if item.id == "r1" and broken:
            raise RunError("the model is away")
        return await first_words(item)

    out = tmp_path / "out.jsonl"
    await batch(source, make, out=out, settings="v1")
    whole = out.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    out.write_bytes(whole[: -len(last) // 2])
    calls.clear()
    broken = False
    done = await batch(source, make, out=out, resume=True, settings="v1")
    assert sorted(calls) == ["r1", "r3"] and (done.done, done.failed, done.skipped) == (4, 0, 2)
    assert [row["id"] for row in records(out)] == ["r0", "r1", "r2", "r3"]
    calls.clear()
    rows(source, *({"id": f"r{n}", "text": "changed" if n == 2 else f"text {n}"} for n in range(4)))
    await batch(source, make, out=out, resume=True, settings="v1")
    assert calls == ["r2"]
    calls.clear()
    await batch(source, make, out=out, resume=True, settings="v2")
    assert len(calls) == 4


async def test_records_of_other_inputs_stay(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    await batch(rows(tmp_path / "a.jsonl", {"id": "a", "text": "a"}), first_words, out=out)
    await batch(rows(tmp_path / "b.jsonl", {"id": "b", "text": "b"}), first_words, out=out, resume=True)
    assert [row["id"] for row in records(out)] == ["b", "a"]


async def test_what_is_no_file_of_records_is_left_alone(tmp_path: Path) -> None:
    source = rows(tmp_path / "in.jsonl", {"text": "a"})
    for content in ("my notes without a line end", "notes\nand more\n", '{"name": "no record"}\n'):
        out = tmp_path / "notes.txt"
        out.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="name another output"):
            await batch(source, first_words, out=out, resume=True)
        with pytest.raises(UserError, match="--resume"):
            await batch(source, first_words, out=out)
        assert out.read_text(encoding="utf-8") == content


async def test_unusable_arguments(tmp_path: Path) -> None:
    source = rows(tmp_path / "in.jsonl", {"text": "a"})
    with pytest.raises(UserError, match="at least 1"):
        await batch(source, first_words, out=tmp_path / "o", concurrency=0)
    with pytest.raises(UserError, match="no such file or folder"):
        await batch(tmp_path / "nowhere", first_words, out=tmp_path / "o")
    with pytest.raises(UserError, match="is the input folder"):
        await batch(tmp_path, first_words, out=tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="could not be written"):
        await batch(source, first_words, out=tmp_path / "file/out.jsonl")


async def test_an_exhausted_budget_stops_the_batch_and_keeps_what_is_done(tmp_path: Path) -> None:
    source = rows(tmp_path / "in.jsonl", *({"id": f"r{n}", "text": "t"} for n in range(20)))

    async def make(item: BatchItem) -> Capsule:
        if item.id == "r5":
            raise BudgetExhausted("no money left")
        return await first_words(item)

    with pytest.raises(BudgetExhausted):
        await batch(source, make, out=tmp_path / "out.jsonl", concurrency=1)
    assert [row["id"] for row in records(tmp_path / "out.jsonl")] == [f"r{n}" for n in range(5)]


async def test_no_more_than_concurrency_are_made_at_once(tmp_path: Path) -> None:
    source = rows(tmp_path / "in.jsonl", *({"text": "t"} for _ in range(30)))
    now = most = 0

    async def make(item: BatchItem) -> Capsule:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await anyio.sleep(0.001)
        now -= 1
        return await first_words(item)

    await batch(source, make, out=tmp_path / "out.jsonl", concurrency=3)
    assert most == 3


KILLED = """
import asyncio, os, signal, sys
from agentopt.capsules import Capsule
from agentopt.capsules._batch import batch

made, limit = [], int(sys.argv[1])

async def make(item):
    made.append(item.id)
    if len(made) > limit:
        os.kill(os.getpid(), signal.SIGKILL)
    with open("calls", "a") as file:
        file.write(item.id + "\\n")
    await asyncio.sleep(0.001)
    return Capsule(item.text, 1, 9, "bytes", "original", 8, "extract", "capsule")

asyncio.run(batch("in.jsonl", make, out="out.jsonl", concurrency=3, resume=True))
"""


async def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_file(tmp_path: Path) -> None:
    rows(tmp_path / "in.jsonl", *({"id": f"r{n}", "text": f"text {n}"} for n in range(60)))
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(KILLED), encoding="utf-8")
    for calls_before_it_dies in (10, 30):
        died = subprocess.run([sys.executable, str(script), str(calls_before_it_dies)], cwd=tmp_path)
        assert died.returncode == -signal.SIGKILL
        with (tmp_path / "out.jsonl").open("ab") as file:
            file.write(b'{"id":"r')  # as a write that the kill cut in two
    before = (tmp_path / "out.jsonl").read_bytes().count(b"\n")
    subprocess.run([sys.executable, str(script), "1000"], cwd=tmp_path, check=True)
    found = records(tmp_path / "out.jsonl")
    assert [(row["id"], row["capsule"]["text"]) for row in found] == [(f"r{n}", f"text {n}") for n in range(60)]
    calls = (tmp_path / "calls").read_text().split()
    assert before >= 25 and len(calls) <= 60 + 2 * 8  # what was being made or written when it was killed
