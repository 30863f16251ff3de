"""The gate: what is accepted, rejected and left open, on which rows, and what it says about it."""

from __future__ import annotations

import random
from typing import Any

import pytest

import agentopt as ao
from agentopt.capsules._types import GateReport
from agentopt.capsules.gating._gate import gate, regate_needed
from agentopt.capsules.gating._task import Task, TaskOptions
from agentopt.errors import RunError, UserError
from agentopt.store import Store

pytestmark = pytest.mark.anyio

LONG = "Say yes to every question, and please take your time about it."
SHORT = "Say yes."
BAD = "Say no."


def rows(n: int, **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "expected": "yes", **more} for i in range(n)]


def answer(question: str, prompt: str) -> str:
    return "no" if "no" in prompt.split(".")[0].split() else "yes"


def wobbly(share: float, seed: int = 0) -> Any:
    """Right with the original; with the capsule wrong on a share of the rows."""

    def program(question: str, prompt: str) -> str:
        wrong = prompt != LONG and random.Random(f"{seed}:{question}").random() < share
        return "no" if wrong else "yes"

    return program


OFF = TaskOptions(capture=False)


async def run(task: Task, *candidates: str, **options: Any) -> tuple[int | None, GateReport]:
    return await gate(LONG, [("extract", text) for text in candidates], task, **options)


async def test_no_change_on_enough_rows_is_accepted() -> None:
    index, report = await run(Task(rows(80), answer, "exact_match", options=OFF), SHORT)
    assert (index, report.verdict, report.kind) == (0, "accepted", "accuracy")
    assert report.n_select == 0 and report.n_gate == 80  # one candidate: every row gates
    assert report.original == report.capsule == 1.0
    assert -0.05 < report.lower_bound < 0
    assert "80 rows" in report.reason


async def test_five_equal_pairs_show_nothing() -> None:
    _, report = await run(Task(rows(5), answer, "exact_match", options=OFF), SHORT)
    assert report.verdict == "undecided" and report.difference == 0
    assert report.lower_bound == pytest.approx(-0.45, abs=0.02)
    assert report.needed > 60 and str(report.needed) in report.reason


async def test_shown_harm_is_rejected() -> None:
    _, report = await run(Task(rows(60), answer, "exact_match", options=OFF), BAD)
    assert report.verdict == "rejected" and report.capsule == 0.0


async def test_the_best_on_one_part_is_gated_on_the_other() -> None:
    seen: dict[str, set[str]] = {}

    def program(question: str, prompt: str) -> str:
        seen.setdefault(prompt, set()).add(question)
        return answer(question, prompt)

    index, report = await run(Task(rows(200), program, "exact_match", options=OFF), BAD, SHORT, SHORT + " Always.")
    assert index == 1 and report.verdict == "accepted"
    assert report.n_select + report.n_gate == 200 and report.n_select == 60
    assert len(seen[BAD]) == 60 and len(seen[SHORT]) == 200 == len(seen[LONG])
    assert [(item["tokens"], item["score"]) for item in report.candidates] == [(7, 0.0), (8, 1.0), (16, 1.0)]


async def test_holm_lets_the_shortest_of_several_accepted_win() -> None:
    options = TaskOptions(capture=False, gated=2)
    index, report = await run(Task(rows(400), answer, "exact_match", options=options), SHORT + " Always.", SHORT, BAD)
    assert index == 1 and report.verdict == "accepted" and report.confidence > 0.95


async def test_equal_rows_count_once_and_documents_count_as_one() -> None:
    same = [{"question": "q", "expected": "yes"}] * 100
    _, report = await run(Task(same, answer, "exact_match", options=OFF), SHORT)
    assert report.verdict == "undecided" and "1 independent groups" in report.reason
    documents = [{**row, "doc": f"d{i // 20}"} for i, row in enumerate(rows(200))]
    options = TaskOptions(capture=False, cluster="doc")
    _, report = await run(Task(documents, answer, "exact_match", options=options), SHORT)
    assert report.verdict == "undecided" and "10 independent groups" in report.reason
    with pytest.raises(UserError, match="no column 'page'"):
        await run(Task(documents, answer, "exact_match", options=TaskOptions(capture=False, cluster="page")), SHORT)


async def test_documents_stay_on_one_side_of_the_split() -> None:
    read: dict[str, set[str]] = {}

    def program(question: str, prompt: str) -> str:
        read.setdefault(prompt, set()).add(question)
        return "yes"

    documents = [{**row, "doc": i // 10} for i, row in enumerate(rows(100))]
    task = Task(documents, program, "exact_match", options=TaskOptions(capture=False, cluster="doc"))
    await run(task, BAD, SHORT)
    selected = read[SHORT] if len(read[SHORT]) < len(read[BAD]) else read[BAD]
    assert {int(name[1:]) // 10 for name in selected}.isdisjoint(
        {int(name[1:]) // 10 for name in (read[LONG] - selected)}
    )


async def test_the_split_follows_content_not_order_and_the_result_is_the_same() -> None:
    data = rows(120)
    shuffled = random.Random(3).sample(data, len(data))
    first = await run(Task(data, wobbly(0.1), "exact_match", options=OFF), SHORT, BAD)
    again = await run(Task(shuffled, wobbly(0.1), "exact_match", options=OFF), SHORT, BAD)
    assert first[0] == again[0]
    assert first[1].lower_bound == pytest.approx(again[1].lower_bound)
    assert first[1].difference == pytest.approx(again[1].difference)


async def test_a_program_that_fails_on_the_capsule_is_harm_and_on_the_original_an_error() -> None:
    def brittle(question: str, prompt: str) -> str:
        if prompt == SHORT:
            raise ValueError("no such section")
        return "yes"

    _, report = await run(Task(rows(60), brittle, "exact_match", options=OFF), SHORT)
    assert report.verdict == "rejected" and "failed with the capsule on 60" in report.reason
    with pytest.raises(RunError, match=r"fails with the original prompt on 60 of 60 examples.*no such section"):
        await gate(SHORT, [("extract", LONG)], Task(rows(60), brittle, "exact_match", options=OFF))


async def test_rows_on_which_the_original_fails_bring_the_capsule_no_credit() -> None:
    def half(question: str, prompt: str) -> str:
        if prompt == LONG and question in ("q1", "q2"):
            raise ValueError("too long")
        return "yes"

    _, report = await run(Task(rows(80), half, "exact_match", options=OFF), SHORT)
    assert report.difference == 0.0 and "failed with the original on 2" in report.reason


async def test_one_failure_in_a_small_part_is_no_reason_to_stop() -> None:
    def once(question: str, prompt: str) -> str:
        if prompt == LONG and question == "q0":
            raise TimeoutError
        return "yes"

    for options in (OFF, TaskOptions(capture=False, sequential=True, block=4)):
        for candidates in ((SHORT,), (SHORT, BAD)):
            _, report = await run(Task(rows(12), once, "exact_match", options=options), *candidates)
            assert report.verdict == "undecided"


async def test_without_labels_it_is_agreement() -> None:
    unlabelled = [{"question": f"q{i}"} for i in range(100)]
    for metric in (None, "exact_match"):
        _, report = await run(Task(unlabelled, answer, metric, options=OFF), SHORT)
        assert (report.kind, report.verdict, report.original) == ("agreement", "accepted", 1.0)
        assert "agreement" in report.reason and "accuracy" not in report.reason
    _, report = await run(Task(unlabelled, wobbly(0.5), None, options=OFF), SHORT)
    assert report.verdict == "rejected" and 0.3 < report.capsule < 0.7


async def test_agreement_of_a_reader_that_disagrees_with_itself_is_held_against_that() -> None:
    calls: dict[tuple[str, str], int] = {}

    def moody(question: str, prompt: str) -> dict[str, Any]:
        calls[question, prompt] = calls.get((question, prompt), 0) + 1
        draw = random.Random(f"{question}:{prompt}:{calls[question, prompt]}").random()
        return {"label": "yes" if draw < 0.8 else "no", "draw": draw}

    unlabelled = [{"question": f"q{i}"} for i in range(200)]
    options = TaskOptions(capture=False, repeats=4, output_field="label", concurrency=1)
    _, report = await run(Task(unlabelled, moody, None, options=options), SHORT, margin=0.1)
    assert 0.55 < report.original < 0.8
    assert abs(report.difference) < 0.1 and report.verdict == "accepted"


async def test_graded_scores_in_another_range_keep_their_units() -> None:
    def graded(output: str, expected: str, example: Any) -> float:
        return 80.0 if output == "yes" else 20.0

    task = Task(rows(200), wobbly(0.02), graded, options=TaskOptions(capture=False, score_range=(0, 100)))
    _, report = await run(task, SHORT)
    assert report.margin == 5.0 and 75 < report.capsule <= 80 == report.original
    assert report.verdict == "accepted"
    with pytest.raises(UserError, match="score_range"):
        await run(Task(rows(20), answer, graded, options=OFF), SHORT)


async def test_sequential_gating_stops_when_the_bets_decide() -> None:
    options = TaskOptions(capture=False, sequential=True, block=16)
    _, harm = await run(Task(rows(400), answer, "exact_match", options=options), BAD)
    assert harm.verdict == "rejected" and harm.n_gate <= 32
    _, fine = await run(Task(rows(400), answer, "exact_match", options=options), SHORT)
    assert fine.verdict == "accepted" and fine.n_gate <= 112 and fine.lower_bound >= -0.0501
    _, few = await run(Task(rows(40), answer, "exact_match", options=options), SHORT)
    assert few.verdict == "undecided" and few.n_gate == 40


async def test_progress_the_original_itself_and_no_candidates() -> None:
    steps: list[tuple[str, int, int]] = []
    task = Task(rows(20), answer, "exact_match", options=OFF)
    await run(task, SHORT, BAD, on_progress=lambda *step: steps.append(step))
    assert steps[0][0] == "select" and steps[-1] == ("gate", 28, 28)
    assert [done for stage, done, _ in steps if stage == "gate"] == list(range(1, 29))
    index, report = await run(task, LONG)
    assert (index, report.verdict, report.n_gate) == (0, "accepted", 0)
    index, report = await run(task)
    assert index is None and report.verdict == "undecided"
    with pytest.raises(UserError, match="margin"):
        await run(task, SHORT, margin=1.5)


async def test_an_ao_prompt_is_set_output_tokens_are_measured_and_nothing_is_paid_twice(tmp_path: Any) -> None:
    system = ao.prompt(LONG, name="reader.system")
    asked: list[str] = []

    def reply(request: Any) -> str:
        text = str(request.messages)
        asked.append(text)
        return "yes" if LONG in text else "yes indeed it is"

    async def program(question: str) -> str:
        found = await ao.lm("agent").complete(system=system, user=question)
        return found.text

    options = TaskOptions(capture=False, models={"agent": ao.FunctionLM(reply, name="fake")})
    task = Task(rows(70), program, "contains", options=options)
    with Store.open(tmp_path / "s.db") as store:
        index, report = await run(task, SHORT, store=store)
        assert index == 0 and report.verdict == "accepted"
        assert len(asked) == 140
        assert report.output_ratio is not None and report.output_ratio > 1.5
        _, again = await run(task, SHORT, store=store)
        assert len(asked) == 140
        assert again.lower_bound == report.lower_bound and again.output_ratio == report.output_ratio


async def test_what_changed_since_is_told() -> None:
    task = Task(rows(70), answer, "exact_match", options=OFF)
    _, report = await run(task, SHORT)
    assert regate_needed(report, LONG, SHORT, task) == ()
    assert regate_needed(report, LONG, BAD, task) == ("capsule",)
    other = Task(rows(71), wobbly(0.1), "normalized_match", options=OFF)
    assert regate_needed(report, LONG + "!", SHORT, other) == ("prompt", "program", "metric", "data")
    models = TaskOptions(capture=False, models={"agent": "openai/gpt-5"})
    assert regate_needed(report, LONG, SHORT, Task(rows(70), answer, "exact_match", options=models)) == ("reader",)
    data: dict[str, Any] = {**report.to_dict(), "candidates": report.candidates}
    assert GateReport(**data) == report


async def test_the_loopback_endpoint_can_be_served_meanwhile() -> None:
    _, report = await run(Task(rows(4), answer, "exact_match"), SHORT)
    assert report.verdict == "undecided"
