"""The shipped example: its tickets are sound, its agent runs, and its recordings load."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import tomllib
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import agentopt as ao
from agentopt.evaluation import load_program
from agentopt.graph import step_info
from agentopt.models import ModelsConfig, use

FOLDER = Path(__file__).parents[1] / "traces" / "ticket_triage"
LABELS = ("billing", "shipping", "technical", "account")
SPLITS = ("train", "val", "test")
FIELDS = {"id", "ticket", "channel", "queue", "priority", "order_id", "also"}


def rows_of(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def every_row() -> list[dict[str, Any]]:
    return [row for split in SPLITS for row in rows_of(split)]


@pytest.fixture(scope="module")
def program() -> Any:
    return load_program(f"{FOLDER / 'triage.py'}:triage")


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def shingles(items: str | list[str], size: int) -> set[Any]:
    return {tuple(items[at : at + size]) for at in range(len(items) - size + 1)}


# --- the tickets


@pytest.mark.parametrize("split", SPLITS)
def test_every_ticket_has_valid_fields(split: str) -> None:
    for row in rows_of(split):
        assert set(row) == FIELDS
        assert row["queue"] in LABELS
        assert row["priority"] in {"urgent", "normal", "low"}
        assert row["channel"] in {"email", "chat", "form", "phone", "social", "sms"}
        assert row["also"] is None or row["also"] in set(LABELS) - {row["queue"]}
        assert row["ticket"].strip() == row["ticket"] != ""
        named = re.findall(r"\bOM-\d{5}\b", row["ticket"])
        assert named == ([] if row["order_id"] is None else [row["order_id"]])


def test_the_test_split_allows_a_claim_and_queues_are_balanced() -> None:
    assert [len(rows_of(split)) for split in SPLITS] == [84, 100, 136]
    for split in SPLITS:
        assert len(set(Counter(row["queue"] for row in rows_of(split)).values())) == 1
        assert any(row["also"] for row in rows_of(split))


def test_ids_are_unique_over_all_splits() -> None:
    ids = [row["id"] for row in every_row()]
    assert len(set(ids)) == len(ids) == 320


def test_no_two_tickets_are_near_duplicates() -> None:
    grams = [(row["id"], shingles(" ".join(words_of(row["ticket"])), 5)) for row in every_row()]
    runs = [(row["id"], shingles(words_of(row["ticket"]), 6)) for row in every_row()]
    close = [(a, b) for (a, x), (b, y) in itertools.combinations(grams, 2) if len(x & y) > 0.2 * len(x | y)]
    shared = [(a, b) for (a, x), (b, y) in itertools.combinations(runs, 2) if x & y]
    assert close == []
    assert shared == []


def test_every_order_named_in_a_ticket_is_in_the_shop_table() -> None:
    orders = json.loads((FOLDER / "orders.json").read_text(encoding="utf-8"))
    assert {row["order_id"] for row in every_row()} - {None} == set(orders)


def test_the_configuration_names_files_that_exist() -> None:
    config = tomllib.loads((FOLDER / "agentopt.toml").read_text(encoding="utf-8"))
    for name in ("train", "val", "test"):
        assert (FOLDER / config[name]).is_file()
    assert (FOLDER / config["target"].partition(":")[0]).is_file()


# --- the agent


def run(program: Any, ticket: str, answer: str) -> tuple[dict[str, Any], ao.Trace]:
    double = ao.FunctionLM(lambda request: answer)
    with use(ModelsConfig({"agent": double})), ao.record() as recording:
        output = asyncio.run(program.target(ticket))
    return output, recording.trace


def test_agent_routes_looks_up_the_order_and_sets_a_priority(program: Any) -> None:
    output, trace = run(program, "Refund for OM-10127 please, it is urgent.", "billing")
    assert output["queue"] == "billing"
    assert output["priority"] == "urgent"
    assert output["order"] == {"found": True, "product": "robot vacuum", "status": "returned", "total": 349.0}
    kinds = {op.op: op.kind for op in trace.ops}
    assert (kinds["choose_queue"], kinds["lookup_order"], kinds["set_priority"]) == ("step", "tool", "step")
    assert {"triage.instruction", "triage.examples"} <= set(trace.parameters)


def test_agent_survives_an_unknown_order_and_a_ticket_without_one(program: Any) -> None:
    unknown, _ = run(program, "Where is OM-99999?", "shipping")
    without, trace = run(program, "Do you deliver on Sundays?", "shipping")
    assert unknown["order"] == {"found": False}
    assert without["order"] is None
    assert without["priority"] == "low"
    assert trace.find("lookup_order") == []


def test_agent_labels_are_those_of_the_data_and_the_tool_is_frozen(program: Any) -> None:
    module: ModuleType = __import__("sys").modules[program.module]
    assert module.LABELS == LABELS
    assert sorted(program.tunable()) == ["triage.calibrate", "triage.cue", "triage.examples", "triage.instruction"]
    assert step_info(program.target) is not None


def test_agent_sends_the_cue_and_the_calibration_only_when_they_are_set(program: Any) -> None:
    seen: list[Any] = []

    def model(request: Any) -> str:
        seen.append(request)
        return "shipping"

    tuned = ao.Candidate({"triage.cue": "Queue:", "triage.calibrate": "content_free"})
    with use(ModelsConfig({"agent": ao.FunctionLM(model)})):
        asyncio.run(program.target("Where is it?"))
        with tuned.active():
            asyncio.run(program.target("Where is it?"))
    assert [message["role"] for message in seen[0].messages] == ["system", "user"]
    assert not seen[0].options.extra
    assert seen[1].messages[-1] == {"role": "assistant", "content": "Queue:"}
    assert seen[1].options.extra == {"calibrate": "content_free"}


def test_feedback_reaches_the_instruction(program: Any) -> None:
    _, trace = run(program, "My parcel is late.", "billing")
    found = ao.backward(trace, [ao.Feedback(target=trace.output_id, text="expected shipping", score=0.0)])
    assert {"triage.instruction", "triage.examples"} <= set(found)


@pytest.mark.embedded
def test_agent_runs_with_the_embedded_model(program: Any) -> None:
    with use(ModelsConfig({"agent": "embedded/smollm2-135m-instruct"})):
        for row in rows_of("train")[:3]:
            assert asyncio.run(program.target(row["ticket"]))["queue"] in LABELS


# --- the recordings


def test_recordings_load_and_hold_the_steps_of_a_real_run() -> None:
    paths = sorted((FOLDER / "recordings").glob("*.trace.jsonl"))
    assert len(paths) >= 3
    for path in paths:
        trace = ao.Trace.load(path)
        assert trace.error is None
        assert trace.output["queue"] in LABELS
        assert len(trace.find(kind="lm")) == 1
        assert trace.usage.input_tokens > 0
