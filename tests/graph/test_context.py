"""Which candidate is active, rollouts and their draws, lost reads, meters, carrying the context."""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import sys
import threading
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt import graph
from agentopt.graph import Candidate, LostContextError, RolloutScope, Usage


def in_thread(work):
    result: list = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001 - handed to the test
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result[0]


def scope(example: str = "e1", candidate: str = "c1", repeat: int = 0, seed: int = 0) -> RolloutScope:
    return RolloutScope(seed, candidate, example, repeat)


# --- resolution ------------------------------------------------------------------------------------------------------


def test_overlay_then_installed_then_default() -> None:
    p = graph.prompt("default", name="p")
    assert p.value == "default"
    Candidate({"p": "installed"}).install()
    assert p.value == "installed"
    with Candidate({"p": "outer"}).active():
        with Candidate({"p": "inner"}).active() as inner:
            assert p.value == "inner"
            assert graph.active_candidate() is inner
        assert p.value == "outer"
    assert p.value == "installed"
    graph.uninstall()
    assert p.value == "default"
    assert graph.active_candidate() is None


def test_empty_candidate_means_declared_defaults_even_when_another_is_installed() -> None:
    p = graph.prompt("default", name="p")
    Candidate({"p": "installed"}).install()
    with Candidate().active():
        assert p.value == "default"


def test_overlay_ends_when_the_block_raises() -> None:
    p = graph.prompt("default", name="p")
    with pytest.raises(ZeroDivisionError), Candidate({"p": "x"}).active():
        raise ZeroDivisionError
    assert p.value == "default"


def test_two_candidates_run_at_the_same_time_in_threads() -> None:
    p = graph.prompt("default", name="p")
    meet = threading.Barrier(8)

    def run(number: int) -> set[str]:
        with Candidate({"p": f"v{number}"}).active():
            meet.wait()
            return {p.value for _ in range(300)}

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(8))) == [{f"v{number}"} for number in range(8)]
    assert p.value == "default"


@pytest.mark.anyio
async def test_two_candidates_run_at_the_same_time_in_tasks() -> None:
    p = graph.prompt("default", name="p")
    seen: dict[int, set[str]] = {}

    async def run(number: int) -> None:
        with Candidate({"p": f"v{number}"}).active():
            values = set()
            for _ in range(20):
                values.add(p.value)
                await asyncio.sleep(0)
                values.add(await anyio.to_thread.run_sync(lambda: p.value))
            seen[number] = values

    async with anyio.create_task_group() as tasks:
        for number in range(6):
            tasks.start_soon(run, number)
    assert seen == {number: {f"v{number}"} for number in range(6)}


# --- reads in recordings ---------------------------------------------------------------------------------------------


def test_read_inside_an_op_is_an_edge_and_outside_any_op_attaches_to_the_root() -> None:
    p, q = graph.prompt("a", name="p"), graph.prompt("b", name="q")

    @graph.step
    def inner() -> str:
        return p.value

    with graph.record() as recording:
        inner()
        str(q)
    trace = recording.trace
    by_id = {op.id: op for op in trace.ops}
    op = next(op for op in trace.ops if op.op == "inner")
    assert [(by_id[parent].op, kind) for parent, kind in op.parents if kind == "parameter"] == [("p", "parameter")]
    assert set(trace.parameters) == {"p", "q"}
    assert trace.parameters["p"].value == "a"
    assert trace.parameters["p"].kind == "prompt"


def test_recorded_value_is_the_active_one() -> None:
    p = graph.prompt("a", name="p")
    with graph.record() as recording, Candidate({"p": "tuned"}).active():
        str(p)
    assert recording.trace.parameters["p"].value == "tuned"


# --- import-time reads -----------------------------------------------------------------------------------------------


def test_import_time_read_is_remembered_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "from agentopt import graph\np = graph.prompt('x', name='early')\nq = graph.prompt('y', name='late')\n"
    (tmp_path / "reads_early.py").write_text(source + "def text():\n    return f'{p}!'\nSYS = text()\n")
    module = importlib.import_module("reads_early")
    try:
        specs = graph.declared_parameters("reads_early")
        assert specs["early"].import_time_read == f"{tmp_path / 'reads_early.py'}:5"
        str(module.q)
        assert specs["late"].import_time_read is None
    finally:
        del sys.modules["reads_early"]


def test_code_that_a_launcher_executes_is_no_import() -> None:
    """As execnet starts its workers: module-level code in a namespace that belongs to no module."""
    p = graph.prompt("x", name="p")
    exec("read()", {"__name__": "__launched__", "read": lambda: str(p)})
    assert p.spec.import_time_read is None


def test_module_imported_during_a_rollout_is_noted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    p = graph.prompt("x", name="p")
    str(p)
    (tmp_path / "lazy_reader.py").write_text(
        "from agentopt import graph\nSYS = str(graph.handle_from_json({'$parameter': 'p'}))\n"
    )
    try:
        with graph.rollout(scope()), Candidate().active(), graph.record():
            importlib.import_module("lazy_reader")
        assert p.spec.import_time_read == f"{tmp_path / 'lazy_reader.py'}:2"
    finally:
        del sys.modules["lazy_reader"]


# --- lost reads ------------------------------------------------------------------------------------------------------


def test_read_in_a_bare_thread_during_a_rollout_raises_with_place_and_fix_and_is_noted() -> None:
    p = graph.prompt("x", name="p")
    here = scope()
    with graph.rollout(here), Candidate().active():
        error = in_thread(lambda: p.value)
    assert isinstance(error, LostContextError)
    assert error.name == "p"
    assert __file__ in str(error)
    assert "ao.bind_context" in str(error)
    assert "ao.ThreadPoolExecutor" in str(error)
    assert error.exit_code == 2
    noted = graph.lost_reads(here)
    assert [(read.name, read.place) for read in noted] == [("p", error.place)]
    assert graph.lost_reads(scope("other")) == []
    graph.clear_lost_reads()
    assert graph.lost_reads() == []


def test_lost_read_is_noted_even_when_the_thread_swallows_the_error() -> None:
    p = graph.prompt("x", name="p")

    def swallow() -> str:
        try:
            return p.value
        except Exception:  # noqa: BLE001 - the user's code that hides it
            return "fallback"

    with graph.rollout(scope()), Candidate().active():
        assert in_thread(swallow) == "fallback"
    assert [read.name for read in graph.lost_reads()] == ["p"]


def test_bare_thread_outside_rollouts_reads_the_default() -> None:
    p = graph.prompt("x", name="p")
    with Candidate({"p": "y"}).active():
        assert in_thread(lambda: p.value) == "x"
    assert graph.lost_reads() == []


def test_tool_called_in_a_bare_thread_during_a_rollout_is_stopped_too() -> None:
    sent: list[str] = []

    @graph.tool(effects=True)
    def send(text: str) -> None:
        sent.append(text)

    with graph.rollout(scope()), Candidate().active():
        error = in_thread(lambda: send("x"))
    assert isinstance(error, graph.EffectsRefused)
    assert sent == []


# --- carrying the context --------------------------------------------------------------------------------------------


def test_bind_context_carries_candidate_recording_rollout_and_meter() -> None:
    p = graph.prompt("x", name="p")

    @graph.step
    def read() -> str:
        graph.report_usage(tokens=3, usd=0.5)
        return p.value

    with graph.record() as recording, graph.metered() as meter, graph.rollout(scope()), Candidate({"p": "y"}).active():
        bound = graph.bind_context(read)
        assert in_thread(bound) == "y"
        assert in_thread(bound) == "y"
    assert [op.op for op in recording.trace.ops if op.kind == "step"] == ["read", "read"]
    assert meter.usage.input_tokens == 6
    assert meter.cost == 1.0


def test_bound_function_may_run_at_the_same_time_in_many_threads() -> None:
    p = graph.prompt("x", name="p")
    meet = threading.Barrier(6)

    def read(number: int) -> str:
        meet.wait()
        return f"{p.value}{number}"

    with Candidate({"p": "y"}).active():
        bound = graph.bind_context(read)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(bound, range(6))) == [f"y{number}" for number in range(6)]


def test_thread_pool_executor_carries_the_context_of_each_submit() -> None:
    p = graph.prompt("x", name="p")
    with graph.ThreadPoolExecutor(2) as pool:
        with graph.rollout(scope()), Candidate({"p": "one"}).active():
            first = pool.submit(lambda: p.value)
            mapped = pool.map(lambda suffix: p.value + suffix, "ab")
        with Candidate({"p": "two"}).active():
            second = pool.submit(lambda: p.value)
        assert first.result() == "one"
        assert list(mapped) == ["onea", "oneb"]
        assert second.result() == "two"


@pytest.mark.anyio
async def test_bound_coroutine_function_keeps_its_context_across_awaits_and_leaks_nothing() -> None:
    p = graph.prompt("x", name="p")

    async def read() -> tuple[str, str]:
        before = p.value
        await asyncio.sleep(0.001)
        return before, p.value

    with Candidate({"p": "y"}).active():
        bound = graph.bind_context(read)
    assert await bound() == ("y", "y")
    assert p.value == "x"


@pytest.mark.anyio
async def test_cancelling_a_bound_coroutine_reaches_its_body() -> None:
    events: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            events.append("cancelled")
            raise

    task = asyncio.ensure_future(graph.bind_context(wait)())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert events == ["cancelled"]


# --- draws -----------------------------------------------------------------------------------------------------------


def draws(in_scope: RolloutScope, recorded: bool) -> list[int]:
    @graph.step
    def leaf() -> list[int]:
        return [graph.draw_seed(), graph.draw_seed(), graph.draw_seed("label")]

    @graph.step
    def other() -> int:
        return graph.draw_seed()

    def run() -> list[int]:
        with graph.rollout(in_scope):
            return [*leaf(), *leaf(), other(), graph.draw_seed()]

    if not recorded:
        return run()
    with graph.record():
        return run()


def test_draws_are_a_function_of_scope_path_and_occurrence_whether_recorded_or_not() -> None:
    first = draws(scope(), recorded=False)
    assert draws(scope(), recorded=True) == first
    assert len(set(first)) == len(first)
    assert all(0 <= seed < 2**31 for seed in first)
    for changed in (scope(example="e2"), scope(candidate="c2"), scope(repeat=1), scope(seed=1)):
        assert not set(draws(changed, recorded=False)) & set(first)


def test_draws_outside_a_rollout_depend_on_the_label_alone() -> None:
    assert graph.draw_seed("a") == graph.draw_seed("a")
    assert graph.draw_seed("a") != graph.draw_seed("b")


@pytest.mark.anyio
async def test_draws_in_concurrent_ops_do_not_depend_on_their_timing() -> None:
    async def run(delays: list[float]) -> dict[int, list[int]]:
        seeds: dict[int, list[int]] = {}

        @graph.step
        async def branch(number: int) -> None:
            await asyncio.sleep(delays[number])
            seeds[number] = [graph.draw_seed(), graph.draw_seed()]

        with graph.rollout(scope()):
            async with anyio.create_task_group() as tasks:
                for number in range(3):
                    tasks.start_soon(branch, number)
        return seeds

    assert await run([0.0, 0.01, 0.02]) == await run([0.02, 0.0, 0.01])


@given(st.integers(), st.text(max_size=20), st.text(max_size=20), st.integers(0, 5), st.text(max_size=9))
def test_any_scope_gives_a_seed_that_repeats(seed: int, candidate: str, example: str, repeat: int, label: str) -> None:
    def draw() -> int:
        with graph.rollout(RolloutScope(seed, candidate, example, repeat)):
            return graph.draw_seed(label)

    assert draw() == draw()


def test_rollouts_nest_and_end() -> None:
    assert graph.current_rollout() is None
    with graph.rollout(scope("a")) as outer:
        with graph.rollout(scope("b")) as inner:
            assert graph.current_rollout() is inner
        assert graph.current_rollout() is outer
    assert graph.current_rollout() is None


# --- meters ----------------------------------------------------------------------------------------------------------


def test_meters_nest_and_count_unpriced_calls() -> None:
    with graph.metered() as outer:
        graph.meter_add(Usage(input_tokens=1, calls=1), 0.25)
        with graph.metered() as inner:
            graph.meter_add(Usage(input_tokens=2, output_tokens=3, calls=1), None)
            graph.meter_add(Usage(cached_calls=1), 0.0)
        graph.meter_add(None, 1.0)
    graph.meter_add(Usage(calls=1), 9.0)
    assert (inner.usage, inner.cost, inner.unpriced_calls) == (
        Usage(input_tokens=2, output_tokens=3, calls=1, cached_calls=1),
        0.0,
        1,
    )
    assert (outer.usage.calls, outer.cost, outer.unpriced_calls) == (2, 1.25, 1)


def test_usages_add_up_and_a_price_that_is_unknown_stays_unknown() -> None:
    cached = Usage(cached_calls=1, cached_input_tokens=7, cached_output_tokens=2, cached_cost=0.5)
    both = cached + cached + Usage(input_tokens=1, calls=1)
    assert both == Usage(1, 0, 0, 1, 2, 0, 14, 4, 1.0)
    assert both.total_tokens == 1, "what nobody pays is no spend"
    assert (cached + Usage(cached_calls=1, cached_cost=None) + cached).cached_cost is None
    for usage in (both, Usage(cached_calls=1, cached_cost=None), Usage()):
        assert Usage.from_dict(usage.to_dict()) == usage
    old = {"input_tokens": 3, "output_tokens": 1, "cached_tokens": 0, "calls": 1, "cached_calls": 2, "tries": 1}
    assert Usage.from_dict(old) == Usage(3, 1, 0, 1, 2, 1), "stored before cached calls kept what they took"


def test_meter_counts_every_report_of_many_threads() -> None:
    with graph.metered() as meter, graph.ThreadPoolExecutor(8) as pool:
        for _ in range(400):
            pool.submit(graph.meter_add, Usage(calls=1), 0.5)
    assert (meter.usage.calls, meter.cost) == (400, 200.0)


@pytest.mark.anyio
async def test_meters_of_two_tasks_stay_apart() -> None:
    costs: list[float] = []

    async def run(cost: float) -> None:
        with graph.metered() as meter:
            for _ in range(5):
                graph.meter_add(Usage(calls=1), cost)
                await asyncio.sleep(0)
        costs.append(meter.cost)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, 1.0)
        tasks.start_soon(run, 2.0)
    assert sorted(costs) == [5.0, 10.0]
