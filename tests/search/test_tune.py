"""`tune_program` with a real program, evaluator, store and counted doubles."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import agentopt.graph as graph
from agentopt.errors import RunError, UserError
from agentopt.evaluation import Dataset, Example, Program, load_program
from agentopt.graph import SetText, Usage
from agentopt.models import LM, FunctionLM, LMSettings, ModelsConfig, Reply, Request, resolve, use
from agentopt.optimizers import ProposeContext, Update
from agentopt.search import BaselineDone, Budget, Event, TuneOptions, TuneResult, tune_program
from agentopt.store import Store

pytestmark = pytest.mark.anyio


def data(name: str, count: int) -> Dataset:
    return Dataset(
        name, (Example(inputs={"text": f"{name} {i}"}, expected="yes" if i % 2 else "no") for i in range(count))
    )


def oracle(text: str) -> str:
    return "yes" if int(text.split()[-1]) % 2 else "no"


class Fixed:
    """Proposes the same text for one parameter."""

    name = "fixed"

    def __init__(self, parameter: str, value: str = "better {text}") -> None:
        self.parameter = parameter
        self.value = value

    def propose(self, context: ProposeContext) -> list[Update]:
        return [Update((SetText(self.parameter, self.value),), source="fixed")]


async def tune(fn: Callable[..., Any] | Program, optimizer: Any, **changes: Any) -> TuneResult:
    program = fn if isinstance(fn, Program) else load_program(fn)
    arguments: dict[str, Any] = {
        "optimizer": optimizer,
        "budget": Budget(rollouts=400),
        "options": TuneOptions(screen_size=8),
        **changes,
    }
    return await tune_program(program, data("tr", 20), data("va", 20), data("te", 40), "exact_match", **arguments)


async def test_a_better_text_is_found_claimed_stored_and_read_back() -> None:
    prompt = graph.prompt("plain {text}", name="tt1.prompt")
    graph.prompt("unused {text}", name="tt1.unused")

    @graph.agent
    async def program(text: str) -> str:
        return oracle(text) if prompt.format(text=text).startswith("better") else "no"

    events: list[Event] = []
    with Store.open(":memory:") as store:
        result = await tune(program, Fixed("tt1.prompt"), store=store, run_id="r1", on_event=events.append)
        row = store.run("r1")
        assert row is not None and row.status == "done"
        assert TuneResult.from_dict(row.summary) == result
        assert set(store.candidates("r1")) == {result.best.hash, result.baseline.hash}
        again = await tune(program, Fixed("tt1.prompt"), store=store, resume="r1")
        assert again == result
        with pytest.raises(UserError, match="cannot resume run r1: seed was 0 and is now 4"):
            await tune(program, Fixed("tt1.prompt"), store=store, resume="r1", seed=4)
        with pytest.raises(UserError, match="no run 'nope'"):
            await tune(program, Fixed("tt1.prompt"), store=store, resume="nope")
    assert result.best.get("tt1.prompt") == "better {text}"
    assert result.claim.status == "improved" and result.claim.n == 40
    assert result.validation["best"] == 1.0
    assert result.cost["per_run_after"]["n"] == 40
    baseline = next(event for event in events if isinstance(event, BaselineDone))
    assert baseline.tunable == ["tt1.prompt"]


async def test_a_program_that_reads_no_parameter_is_bad_input_and_names_import_time_reads() -> None:
    frozen = graph.prompt("plain", name="tt2.prompt")
    frozen.spec.import_time_read = "agent.py:7"

    @graph.agent
    async def program(text: str) -> str:
        return text

    with pytest.raises(UserError, match=r"read none of its parameters.*agent.py:7"):
        await tune(program, Fixed("tt2.prompt"))


async def test_a_program_that_always_raises_is_a_clear_error_f6() -> None:
    prompt = graph.prompt("plain {text}", name="tt3.prompt")

    @graph.agent
    async def program(text: str) -> str:
        raise ZeroDivisionError(prompt.format(text="same"))

    with Store.open(":memory:") as store:
        with pytest.raises(RunError, match=r"All of the first 8 baseline rollouts failed: .*ZeroDivisionError"):
            await tune(program, Fixed("tt3.prompt"), store=store, run_id="r3")
        row = store.run("r3")
        assert row is not None and row.status == "failed" and "ZeroDivisionError" in row.summary["error"]


async def test_a_candidate_that_hangs_is_cut_off_and_the_run_ends_f6() -> None:
    prompt = graph.prompt("plain {text}", name="tt4.prompt")
    release = threading.Event()

    @graph.agent
    def program(text: str) -> str:
        if prompt.format(text=text).startswith("better"):
            release.wait(20)  # a sync program that cannot be interrupted
        return "no"

    try:
        result = await tune(
            program,
            Fixed("tt4.prompt"),
            options=TuneOptions(screen_size=4, timeout=0.05, max_failures=50, concurrency=4),
        )
    finally:
        release.set()
        time.sleep(0.05)
    assert result.claim.status == "kept_baseline"


async def test_a_tool_with_effects_refuses_to_run_unless_allowed_or_replaced() -> None:
    prompt = graph.prompt("plain {text}", name="tt5.prompt")
    sent: list[str] = []

    @graph.tool(effects=True)
    def tt5_send(text: str) -> str:
        sent.append(text)
        return "no"

    @graph.agent
    async def program(text: str) -> str:
        prompt.format(text=text)
        return tt5_send(text)

    with pytest.raises(UserError, match=r"tt5_send.*has effects"):
        await tune(program, Fixed("tt5.prompt"))
    assert sent == []
    events: list[Event] = []
    await tune(
        program,
        Fixed("tt5.prompt"),
        options=TuneOptions(screen_size=8, allow_effects=True),
        on_event=events.append,
    )
    assert sent
    assert next(event for event in events if isinstance(event, BaselineDone)).tools == {"tt5_send": 1.0}


async def test_an_interrupted_run_says_so_and_can_be_resumed() -> None:
    prompt = graph.prompt("plain {text}", name="tt6.prompt")
    calls: list[str] = []

    @graph.agent
    async def program(text: str) -> str:
        calls.append(text)
        if len(calls) == 35:
            running.cancel()
            await asyncio.sleep(1)
        return oracle(text) if prompt.format(text=text).startswith("better") else "no"

    with Store.open(":memory:") as store:
        running = asyncio.ensure_future(tune(program, Fixed("tt6.prompt"), store=store, run_id="r6"))
        with pytest.raises(asyncio.CancelledError):
            await running
        row = store.run("r6")
        assert row is not None and row.status == "interrupted"
        result = await tune(program, Fixed("tt6.prompt"), store=store, resume="r6")
        assert result.claim.status == "improved"
        row = store.run("r6")
        assert row is not None and row.status == "done"


class Asking(Fixed):
    """Asks its model twice for each text."""

    name = "asking"

    async def propose(self, context: ProposeContext) -> list[Update]:  # type: ignore[override]
        assert context.lm is not None
        for text in ("what went wrong?", "write it down"):
            await context.lm.complete(f"{text} {context.iteration}")
        return super().propose(context)


async def test_figures_of_one_run_and_calls_are_the_same_on_a_cold_and_on_a_warm_store() -> None:
    prompt = graph.prompt("plain {text}", name="tt8.prompt")

    @graph.agent
    async def program(text: str) -> str:
        return (await resolve("agent").complete(prompt.format(text=text))).text

    def answer(request: Request) -> Reply:
        text = str(request.messages[-1]["content"])
        usage = Usage(input_tokens=len(text), output_tokens=2, calls=1, tries=1)
        return Reply(oracle(text) if text.startswith("better") else "no", usage=usage, cost=0.01)

    async def run(**more: str) -> TuneResult:
        lm = LM(FunctionLM(answer, name="counted"), cache=store)
        with use(ModelsConfig({"agent": lm, "optimizer": lm}, LMSettings(cache=store))):
            return await tune(program, Asking("tt8.prompt"), store=store, **more)

    with Store.open(":memory:") as store:
        cold = await run(run_id="cold")
        asked = [event.payload["calls"] for event in store.events("cold") if event.kind == "proposal_made"]
        assert asked and set(asked) == {2}
        assert cold.cost["optimizer_calls"] == sum(asked)
        assert cold.cost["calls"] == cold.cost["rollouts"] + sum(asked)
        resumed = await run(resume="cold")
        assert resumed == cold
        warm = await run(run_id="warm")
    assert warm.cost["tokens"] == warm.cost["usd"] == 0, "nothing was paid again"
    for key in ("calls", "optimizer_calls", "rollouts"):
        assert warm.cost[key] == cold.cost[key]
    for key in ("per_run_before", "per_run_after"):
        assert warm.cost[key]["input_tokens"] > 0
        assert {**warm.cost[key], "latency": 0} == pytest.approx({**cold.cost[key], "latency": 0})
    figures = [[(item["prompt_tokens"], item["usd"]) for item in run.trade_offs] for run in (cold, warm)]
    assert figures[0] and figures[1] == [pytest.approx(each) for each in figures[0]]


async def test_a_failed_run_is_resumed_by_asking_again() -> None:
    prompt = graph.prompt("plain {text}", name="tt7.prompt")

    @graph.agent
    async def program(text: str) -> str:
        return oracle(text) if prompt.format(text=text).startswith("better") else "no"

    class Flaky(Fixed):
        name = "flaky"
        works = False

        def propose(self, context: ProposeContext) -> list[Update]:
            if not self.works:
                raise ConnectionError("away")
            return super().propose(context)

    optimizer = Flaky("tt7.prompt")
    with Store.open(":memory:") as store:
        with pytest.raises(RunError, match="ConnectionError: away"):
            await tune(program, optimizer, store=store, run_id="r7")
        optimizer.works = True
        result = await tune(program, optimizer, store=store, resume="r7")
    assert result.claim.status == "improved"
