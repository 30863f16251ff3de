"""The evaluator: every failure is a row, nothing runs twice, nothing hangs, and results come in example order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import anyio
import pytest

import agentopt as ao
from agentopt.errors import UserError
from agentopt.evaluation import (
    Dataset,
    EvaluationOptions,
    EvaluationResult,
    EvaluationRow,
    Evaluator,
    load_dataset,
    load_program,
    resolve_metric,
)
from agentopt.evaluation._rollout import TooManyAbandoned
from agentopt.graph import Candidate, LostContextError, parameter_scope
from agentopt.models import BudgetExhausted, UnknownModel
from agentopt.store import Store

EMPTY = Candidate({})


@pytest.fixture(autouse=True)
def own_parameters() -> Generator[None]:
    with parameter_scope():
        yield


def data_of(*texts: str, expected: Any = "ok") -> Dataset:
    return load_dataset([{"text": text, "expected": expected} for text in texts], inputs=["text"])


def evaluator(target: Callable[..., Any], metric: Any = "exact_match", **options: Any) -> Evaluator:
    store, run_id = options.pop("store", None), options.pop("run_id", None)
    given: dict[str, Any] = {"timeout": 20.0} | options
    made = EvaluationOptions(**given)
    return Evaluator(load_program(target), resolve_metric(metric), made, store=store, run_id=run_id)


def run(target: Callable[..., Any], data: Dataset, metric: Any = "exact_match", **options: Any) -> EvaluationResult:
    return asyncio.run(evaluator(target, metric, **options).evaluate(EMPTY, data))


def test_rows_come_in_example_order_whatever_finishes_first() -> None:
    async def target(text: str) -> str:
        await anyio.sleep(0.05 if text == "0" else 0)
        return text

    data = data_of(*map(str, range(20)))
    result = run(target, data, concurrency=5, repeats=2)
    assert [(row.example_id, row.repeat) for row in result.rows] == [(id, n) for id in data.ids for n in range(2)]
    assert [row.output for row in result.rows[::2]] == list(map(str, range(20)))
    assert len(result.scores) == 20


def test_an_exception_is_a_scored_outcome_with_the_failing_op_as_feedback() -> None:
    @ao.step
    def parse(text: str) -> int:
        return int(text)

    @ao.agent
    def target(text: str) -> str:
        return "ok" if parse(text) else "no"

    result = run(target, data_of("1", "x", "2"))
    assert [row.score for row in result.rows] == [1.0, 0.0, 1.0]
    row = result.rows[1]
    assert row.error == "ValueError: invalid literal for int() with base 10: 'x'"
    assert row.feedback is not None and "parse failed" in row.feedback and "return int(text)" in row.feedback
    assert result.errors == [row]
    trace = result.rollouts[1].trace
    assert trace is not None and trace.error is not None and trace.error.op.endswith("parse")


def test_f6_a_program_that_always_raises_ends_with_rows_and_no_exception() -> None:
    def target(text: str) -> str:
        raise RuntimeError("no luck")

    result = run(target, data_of(*"abcdef"), min_score=-1.0)
    assert [row.score for row in result.rows] == [-1.0] * 6 and len(result.errors) == 6
    assert all(row.feedback and "no luck" in row.feedback for row in result.rows)


@pytest.mark.parametrize(
    "error", [SystemExit(3), asyncio.CancelledError(), StopIteration(), ExceptionGroup("g", [OSError()])]
)
def test_unusual_exceptions_are_rows_too(error: BaseException) -> None:
    async def target(text: str) -> str:
        if text == "b":
            raise error
        return "ok"

    def sync_target(text: str) -> str:
        if text == "b":
            raise error
        return "ok"

    for fn in (target, sync_target):
        result = run(fn, data_of(*"abc"), concurrency=1)
        assert [row.score for row in result.rows] == [1.0, 0.0, 1.0]
        assert result.rows[1].error


def test_f6_a_hanging_sync_program_times_out_without_blocking_the_pool() -> None:
    go = threading.Event()

    def target(text: str) -> str:
        if text.startswith("hang"):
            go.wait(60)
        return "ok"

    result = run(target, data_of("hang1", "a", "hang2", "b", "hang3", "c"), concurrency=2, timeout=0.4)
    assert [row.score for row in result.rows] == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    assert result.rows[0].error == "timed out after 0.4 s"
    assert result.rows[0].feedback == "The program did not finish within 0.4 s."
    assert result.abandoned == 3
    go.set()


def test_f6_a_hanging_async_program_times_out() -> None:
    async def target(text: str) -> str:
        if text == "hang":
            await anyio.sleep(60)
        return "ok"

    result = run(target, data_of("a", "hang", "b"), concurrency=1, timeout=0.1)
    assert [row.error for row in result.rows] == [None, "timed out after 0.1 s", None]
    assert result.abandoned == 0


def test_too_many_hanging_threads_end_the_evaluation_with_a_sentence() -> None:
    go = threading.Event()

    def target(text: str) -> str:
        go.wait(60)
        return text

    with pytest.raises(TooManyAbandoned, match="hang in threads that Python cannot stop"):
        run(target, data_of(*map(str, range(9))), concurrency=1, timeout=0.02, max_abandoned=3)
    go.set()


def test_a_hung_thread_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    (tmp_path / "hung.py").write_text(
        """
import asyncio, time
from agentopt.evaluation import *
from agentopt.graph import Candidate
def target(text):
    time.sleep(600)
evaluator = Evaluator(load_program(target), resolve_metric("exact_match"), EvaluationOptions(timeout=0.1))
data = load_dataset([{"text": "a", "expected": "b"}])
print(asyncio.run(evaluator.evaluate(Candidate({}), data)).rows[0].error)
""",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, "hung.py"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.strip(), done.returncode, done.stderr) == ("timed out after 0.1 s", 0, "")


def test_the_programs_own_timeout_error_is_not_ours() -> None:
    async def target(text: str) -> str:
        raise TimeoutError("the database")

    assert run(target, data_of("a")).rows[0].error == "TimeoutError: the database"


def test_a_failing_metric_is_an_error_row_that_names_the_metric() -> None:
    def graded(output: Any, expected: Any, example: Any) -> float:
        raise KeyError("label")

    row = run(lambda text: "ok", data_of("a"), graded).rows[0]
    assert row.error is not None and row.error.startswith("metric graded failed: KeyError: 'label' at ")
    assert "test_evaluator.py" in row.error


def test_a_metric_that_returns_no_score_stops_the_evaluation() -> None:
    with pytest.raises(UserError, match=r"example [0-9a-f]+: metric 'bad' returned None"):

        def bad(output: Any, expected: Any, example: Any) -> Any:
            return None

        run(lambda text: "ok", data_of("a", "b"), bad)


def test_a_missing_label_is_told_before_anything_runs() -> None:
    with pytest.raises(UserError, match="needs an expected answer, but 1 of the examples of 'data' have none"):
        run(lambda text: "ok", data_of("a", expected=None))


@pytest.mark.parametrize("error", [BudgetExhausted("spent"), UnknownModel("no model")])
def test_what_no_candidate_can_repair_stops_the_evaluation_as_itself(error: Exception) -> None:
    calls: list[str] = []

    async def target(text: str) -> str:
        calls.append(text)
        try:
            raise error
        except type(error) as cause:
            raise ValueError("wrapped") from cause

    with pytest.raises(type(error)) as caught:
        run(target, data_of(*map(str, range(50))), concurrency=2)
    assert caught.value is error and len(calls) <= 4


def test_traces_are_kept_as_asked_and_say_what_happened() -> None:
    hello = ao.prompt("ok", name="e.hello")

    @ao.agent
    async def target(text: str) -> str:
        return hello.value if text != "bad" else "no"

    data = data_of("good", "bad")
    for keep, expected in (("never", [False, False]), ("failures", [False, True]), ("all", [True, True])):
        result = run(target, data, keep_traces=keep)
        assert [rollout.trace is not None for rollout in result.rollouts] == expected
    trace = run(target, data, keep_traces="all").rollouts[0].trace
    assert trace is not None and trace.parameters["e.hello"].value == "ok" and trace.output == "ok"


def test_a_metric_with_trace_gets_it() -> None:
    seen: list[Any] = []

    def metric(output: Any, expected: Any, example: Any, trace: Any = None) -> float:
        seen.append(len(trace.ops))
        return 1.0

    @ao.agent
    async def target(text: str) -> str:
        return text

    run(target, data_of("a"), metric)
    assert seen and seen[0] >= 1


def test_a_second_evaluation_is_cached_in_memory_and_a_wanted_trace_is_made_later() -> None:
    calls: list[str] = []

    async def target(text: str) -> str:
        calls.append(text)
        return str(len(calls))

    async def main() -> None:
        one = evaluator(target, keep_traces="never")
        data = data_of("a", "b", expected="1")
        first = await one.evaluate(EMPTY, data)
        again = await one.evaluate(EMPTY, data, ids=[data.ids[1]])
        assert [row.cached for row in again.rows] == [True] and len(calls) == 2
        traced = await one.evaluate(EMPTY, data, keep_traces="all")
        assert len(calls) == 4 and all(rollout.trace for rollout in traced.rollouts)
        assert [row.score for row in traced.rows] == [row.score for row in first.rows], "scores stand"
        assert (await one.evaluate(EMPTY, data, keep_traces="all")).rows[0].cached and len(calls) == 4
        assert not (await one.evaluate(Candidate({"x": 1}), data)).rows[0].cached

    asyncio.run(main())


def test_equal_rollouts_at_the_same_time_are_made_once() -> None:
    calls: list[str] = []

    async def target(text: str) -> str:
        calls.append(text)
        await anyio.sleep(0.05)
        return "ok"

    async def main() -> None:
        one = evaluator(target, concurrency=4)
        data = data_of("a", "b")
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(one.evaluate, EMPTY, data)
        assert sorted(calls) == ["a", "b"]

    asyncio.run(main())


def test_a_waiter_takes_over_when_the_one_it_waits_for_is_cancelled() -> None:
    calls: list[str] = []

    async def target(text: str) -> str:
        calls.append(text)
        await anyio.sleep(0.05)
        return "ok"

    async def main() -> None:
        one = evaluator(target)
        data = data_of("a")
        first = anyio.CancelScope()

        async def cancelled() -> None:
            with first:
                await one.evaluate(EMPTY, data)

        results: list[EvaluationResult] = []

        async def waiting() -> None:
            results.append(await one.evaluate(EMPTY, data))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancelled)
            tasks.start_soon(waiting)
            while not calls:
                await anyio.sleep(0)
            first.cancel()
        assert calls == ["a", "a"] and [row.score for row in results[0].rows] == [1.0]

    asyncio.run(main())


def test_concurrency_is_bounded_across_evaluations_of_one_evaluator() -> None:
    state = {"now": 0, "peak": 0}

    async def target(text: str) -> str:
        state["now"] += 1
        state["peak"] = max(state["peak"], state["now"])
        await anyio.sleep(0.005)
        state["now"] -= 1
        return "ok"

    async def main() -> None:
        one = evaluator(target, concurrency=3)
        async with anyio.create_task_group() as tasks:
            for part in range(3):
                tasks.start_soon(one.evaluate, EMPTY, data_of(*(f"{part}-{n}" for n in range(10))))
        assert state["peak"] == 3

    asyncio.run(main())


def test_candidates_run_at_the_same_time_without_mixing() -> None:
    word = ao.prompt("default", name="e.word")

    def target(text: str) -> str:
        time.sleep(0.002)
        return word.value

    async def main() -> None:
        one = evaluator(target, concurrency=6)
        results: dict[str, EvaluationResult] = {}

        async def evaluate(value: str) -> None:
            results[value] = await one.evaluate(Candidate({"e.word": value}), data_of(*"abcdefgh"))

        async with anyio.create_task_group() as tasks:
            for value in ("x", "y", "z"):
                tasks.start_soon(evaluate, value)
        assert {value: {row.output for row in result.rows} for value, result in results.items()} == {
            v: {v} for v in "xyz"
        }

    asyncio.run(main())


def test_a_read_in_a_thread_without_context_stops_the_evaluation_even_when_swallowed() -> None:
    word = ao.prompt("default", name="e.lost")

    def target(text: str) -> str:
        def work() -> None:
            with contextlib.suppress(Exception):
                str(word.value)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return "ok"

    with pytest.raises(LostContextError, match=r"'e\.lost' was read at .*test_evaluator\.py:\d+"):
        run(target, data_of("a", "b"), concurrency=1)

    def bound(text: str) -> str:
        found: list[str] = []
        thread = threading.Thread(target=ao.bind_context(lambda: found.append(word.value)))
        thread.start()
        thread.join()
        return found[0]

    assert run(bound, data_of("a", expected="default")).mean == 1.0


def test_usage_and_cost_of_the_program_and_its_metric_are_counted_per_row() -> None:
    async def target(text: str) -> str:
        ao.report_usage(tokens=10, usd=0.5)
        return "ok"

    async def metric(output: Any, expected: Any, example: Any) -> float:
        ao.report_usage(tokens=1, usd=0.25)
        return 1.0

    result = run(target, data_of("a", "b"), metric)
    assert result.cost == 1.5 and result.usage.input_tokens == 22
    assert result.rows[0].cost == 0.75


def test_an_unknown_price_makes_the_cost_unknown() -> None:
    async def target(text: str) -> str:
        ao.report_usage(tokens=10)
        return "ok"

    assert run(target, data_of("a")).cost is None


def test_every_row_is_reported_once_as_it_comes() -> None:
    seen: list[EvaluationRow] = []

    async def main() -> None:
        one = evaluator(lambda text: "ok")
        data = data_of("a", "b")
        await one.evaluate(EMPTY, data, on_row=seen.append)
        await one.evaluate(EMPTY, data, on_row=seen.append)

    asyncio.run(main())
    assert [row.cached for row in seen] == [False, False, True, True]


def test_rows_and_traces_are_found_again_by_another_process(tmp_path: Path) -> None:
    calls: list[str] = []

    async def target(text: str) -> str:
        calls.append(text)
        return "ok" if text == "a" else "no"

    data = data_of("a", "b")
    for round_ in range(2):
        with Store.open(tmp_path / "s.db") as store:
            result = asyncio.run(evaluator(target, store=store, run_id="r").evaluate(EMPTY, data))
            assert [row.cached for row in result.rows] == [bool(round_)] * 2
            assert [row.score for row in result.rows] == [1.0, 0.0]
            trace = result.rollouts[1].trace
            assert trace is not None and trace.output == "no"
    assert calls == ["a", "b"] or sorted(calls) == ["a", "b"]
    with Store.open(tmp_path / "s.db") as store:
        other = asyncio.run(evaluator(target, store=store, run_id="other").evaluate(EMPTY, data))
        assert not any(row.cached for row in other.rows)


def test_equal_rows_are_examples_of_their_own() -> None:
    async def target(text: str) -> str:
        return "ok"

    result = run(target, data_of("a", "a", "a"))
    assert len({row.example_id for row in result.rows}) == 3 and result.mean == 1.0


def test_draws_depend_on_seed_example_and_repeat_only() -> None:
    from agentopt.graph import draw_seed

    async def target(text: str) -> int:
        return draw_seed("x")

    def outputs(seed: int, concurrency: int) -> list[Any]:
        return [
            row.output for row in run(target, data_of("a", "b"), repeats=2, seed=seed, concurrency=concurrency).rows
        ]

    assert outputs(1, 1) == outputs(1, 4)
    assert len(set(outputs(1, 1))) == 4 and outputs(2, 1) != outputs(1, 1)


def test_outputs_of_every_kind_have_a_json_form() -> None:
    values: dict[str, Any] = {"1": {"a": (1, {2})}, "2": object, "3": b"x", "4": float("inf"), "5": "y" * 100_000}
    result = run(lambda text: values[text], data_of(*values))
    with Store.open(":memory:") as store:
        store.put_evaluations("r", [row.to_dict() for row in result.rows])
        back = [EvaluationRow.from_dict(row) for row in store.evaluations("r")]
    assert [row.output for row in back] == [row.output for row in result.rows]
    assert len(str(back[4].output)) < 30_000


def test_an_empty_selection_is_an_empty_result() -> None:
    result = asyncio.run(evaluator(lambda text: "ok").evaluate(EMPTY, data_of("a"), ids=[]))
    assert (result.rows, result.mean, result.interval, result.cost) == ((), 0.0, (0.0, 0.0), 0)


def test_an_evaluator_serves_one_loop_after_another() -> None:
    one = evaluator(lambda text: "ok", concurrency=2)
    for text in "abc":
        assert asyncio.run(one.evaluate(EMPTY, data_of(text, text + "2", text + "3"))).mean == 1.0


def test_ctrl_c_ends_at_once_and_keeps_the_rows_that_were_done(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        """
import asyncio, signal, time
from agentopt.evaluation import *
from agentopt.graph import Candidate
from agentopt.store import Store
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have it ignored
def target(text):
    if int(text) >= 3:
        print("waiting", flush=True)
        time.sleep(600)
    return "ok"
with Store.open("s.db") as store:
    options = EvaluationOptions(concurrency=1, timeout=None)
    evaluator = Evaluator(load_program(target), resolve_metric("exact_match"), options, store=store, run_id="r")
    data = load_dataset([{"text": str(n), "expected": "ok"} for n in range(6)], inputs=["text"])
    asyncio.run(evaluator.evaluate(Candidate({}), data))
""",
        encoding="utf-8",
    )
    with subprocess.Popen(
        [sys.executable, "slow.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        os.kill(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert stderr.strip().splitlines()[-1].startswith("KeyboardInterrupt")
    with Store.open(tmp_path / "s.db") as store:
        assert len(store.evaluations("r")) == 3
