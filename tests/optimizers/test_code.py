from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt import graph
from agentopt.evaluation import Dataset, EvaluationOptions, Evaluator, Example, load_program, resolve_metric
from agentopt.graph import Candidate, SetCode, use_code_runner
from agentopt.models import FunctionLM, OracleLM, Request
from agentopt.optimizers import CodeRepair, ProposeContext
from agentopt.sandbox import Limits, ProcessRunner, SandboxUnavailable

FIXED = '''def price(total: float, items: int, code: str) -> float:
    """The price after discount: a tenth off for ten items or more."""
    return round(total * 0.9, 2) if items >= 10 else total
'''


@pytest.fixture(autouse=True)
def runner() -> Iterator[ProcessRunner]:
    """One quick worker for the whole test."""
    limits = Limits(seconds=0.8, memory_bytes=300 << 20)
    with graph.parameter_scope(), ProcessRunner(limits) as made, use_code_runner(made):
        yield made


def shop() -> Any:
    @ao.bundle(trainable=True)
    def price(total: float, items: int, code: str) -> float:
        """The price after discount: a tenth off for ten items or more."""
        if items > 10:
            return round(total * 0.9, 2)
        return total

    @ao.agent
    def checkout(total: float, items: int, code: str) -> float:
        """What a customer pays."""
        found: Any = price(total, items, code)
        return getattr(found, "value", found)

    return checkout


def rows(name: str, first: int, count: int = 16) -> Dataset:
    def one(number: int) -> Example:
        items = 10 if number % 2 else 3 + number % 20
        total = 10.0 + number
        code = f"voucher {number} of the spring sale for member M{number * 7}"
        return Example(
            "", {"total": total, "items": items, "code": code}, round(total * (0.9 if items >= 10 else 1), 2)
        )

    return Dataset(name, [one(number) for number in range(first, first + count)])


def metric(output: Any, expected: Any, example: Example) -> tuple[float, str]:
    return (1.0, "Right.") if output == expected else (0.0, f"The customer should pay {expected}.")


async def tune(lm: Any, events: list[Any] | None = None, optimizer: Any = "code") -> ao.TuneResult:
    return await ao.atune(
        shop(),
        train=rows("train", 0),
        val=rows("validation", 100),
        test=rows("test", 200, 30),
        metric=metric,
        optimizer=optimizer,
        budget=ao.Budget(rollouts=400),
        models={"optimizer": lm},
        options=ao.TuneOptions(screen_size=8, max_failures=50, patience=4),
        store=":memory:",
        on_event=None if events is None else events.append,
    )


async def context(lm: Any, **changes: Any) -> ProposeContext:
    program = load_program(shop())
    specs = {name: spec for name, spec in graph.declared_parameters().items() if spec.kind == "code"}
    parent = Candidate({name: spec.default for name, spec in specs.items()})
    train = rows("train", 0)
    evaluator = Evaluator(program, resolve_metric(metric), EvaluationOptions(keep_traces="all"))
    rollouts = list((await evaluator.evaluate(parent, train)).rollouts)
    return ProposeContext("shop", parent, specs, train, rollouts, lm=lm, **changes)


def answer(source: str) -> str:
    return json.dumps({"reasoning": "the bound is wrong", "source": source})


def said(request: Request) -> str:
    return "\n".join(str(turn["content"]) for turn in request.messages)


@pytest.mark.anyio
async def test_a_perfect_model_repairs_the_planted_bug() -> None:
    result = await tune(OracleLM(lambda _: answer(FIXED)))
    assert (result.claim.status, result.claim.tuned_mean) == ("improved", 1.0)
    assert result.best.get("price.code") == FIXED.strip("\n")


@pytest.mark.anyio
async def test_a_garbage_model_never_makes_it_worse() -> None:
    result = await tune(OracleLM(lambda _: answer(FIXED), quality=0.0))
    assert result.best == result.baseline


@pytest.mark.anyio
async def test_a_leaking_model_is_stopped() -> None:
    table = "\n".join(f"    # {row.inputs['code']}: {row.expected}" for row in rows("train", 0))
    leak = FIXED.replace("    return", f"{table}\n    return")
    events: list[Any] = []
    result = await tune(OracleLM(lambda _: answer(leak)), events)
    assert result.best == result.baseline
    assert any(getattr(event, "stage", "") == "leak" for event in events)


@pytest.mark.anyio
async def test_the_model_sees_source_signature_calls_and_what_it_may_use() -> None:
    seen: list[Request] = []
    made = await context(FunctionLM(lambda request: (seen.append(request), answer(FIXED))[1]))
    [update] = await CodeRepair().propose(made)
    assert update.edits == (SetCode("price.code", FIXED.strip("\n")),)
    text = said(seen[0])
    assert "if items > 10:" in text
    assert "price(total: float, items: int, code: str)" in text
    assert "price(total=11.0, items=10, code='voucher 1 of" in text
    assert "-> 11.0" in text
    assert "The customer should pay 9.9." in text
    assert "statistics" in text


BAD: dict[str, tuple[str, str]] = {
    "signature": (FIXED.replace("code: str", "coupon: str"), "the signature must stay"),
    "syntax": ("def price(total, items, code):\n    return total *", "line 2"),
    "import": (FIXED.replace("    return", "    import os\n    return"), "imports 'os'"),
    "name": (FIXED.replace("round(", "rounded("), "uses 'rounded'"),
    "crash": (FIXED.replace("total * 0.9", "total / (items - 10)"), "ZeroDivisionError"),
    "loop": (FIXED.replace("    return", "    while items >= 10:\n        pass\n    return"), "TimeoutError"),
    "memory": (FIXED.replace("    return", "    pile = [0] * (1 << 30)\n    return"), "MemoryError"),
    "death": (
        FIXED.replace("    return", "    pile = 'x'\n    for _ in range(64):\n        pile += pile\n    return"),
        "",
    ),
    "huge": (FIXED.replace("total * 0.9, 2)", "total * 0.9, 2) * 'x'"), "TypeError"),
    "result": (FIXED.replace("round(total * 0.9, 2)", "object()"), "object"),
}


@pytest.mark.anyio
@pytest.mark.parametrize("fault", BAD)
async def test_what_does_not_run_goes_back_with_its_error_and_is_repaired(fault: str) -> None:
    source, clause = BAD[fault]
    turns: list[str] = []

    def reply(request: Request) -> str:
        if len(request.messages) == 2:
            return answer(source)
        turns.append(str(request.messages[-1]["content"]))
        return answer(FIXED)

    [update] = await CodeRepair().propose(await context(FunctionLM(reply)))
    assert update.edits == (SetCode("price.code", FIXED.strip("\n")),)
    assert len(turns) == 1
    assert clause in turns[0]


@pytest.mark.anyio
@pytest.mark.parametrize("fault", ["crash", "loop", "signature"])
async def test_what_stays_broken_is_dropped_after_three_repairs_and_recorded(fault: str) -> None:
    asked: list[Request] = []
    made = await context(FunctionLM(lambda request: (asked.append(request), answer(BAD[fault][0]))[1]))
    assert await CodeRepair().propose(made) == []
    assert len(asked) == 4
    assert made.dropped[-1].tries == 4
    assert BAD[fault][1] in made.dropped[-1].problem


@pytest.mark.anyio
@pytest.mark.parametrize(
    "form",
    [
        lambda source: f"Here it is:\n```python\nimport math\n\n@ao.bundle(trainable=True)\n{source}```\nDone.",
        lambda source: source,
        lambda source: json.dumps({"suggestion": [{"name": "price.code", "value": f"```python\n{source}```"}]}),
    ],
)
async def test_code_is_found_in_any_form(form: Callable[[str], str]) -> None:
    [update] = await CodeRepair().propose(await context(FunctionLM(lambda _: form(FIXED))))
    [edit] = update.edits
    assert isinstance(edit, SetCode)
    assert "trainable" not in edit.source
    assert "if items >= 10" in edit.source


@pytest.mark.anyio
async def test_raising_as_a_good_run_did_is_no_problem() -> None:
    @ao.bundle(trainable=True)
    def parse(text: str) -> int:
        """The number in a text; ValueError when there is none."""
        return int(text)

    @ao.agent
    def count(text: str) -> int:
        try:
            found: Any = parse(text)
        except ValueError:
            return -1
        return getattr(found, "value", found) + (1 if text == "7" else 0)

    train = Dataset("train", [Example("", {"text": "x"}, -1), Example("", {"text": "7"}, 7)])
    evaluator = Evaluator(load_program(count), resolve_metric("exact_match"), EvaluationOptions(keep_traces="all"))
    specs = graph.declared_parameters()
    parent = Candidate({"parse.code": specs["parse.code"].default})
    rollouts = list((await evaluator.evaluate(parent, train)).rollouts)
    new = "def parse(text: str) -> int:\n    return int(text.strip()) - (text == '7')"
    made = ProposeContext("count", parent, specs, train, rollouts, lm=FunctionLM(lambda _: answer(new)))  # pyright: ignore[reportArgumentType]
    [update] = await CodeRepair().propose(made)
    assert update.edits == (SetCode("parse.code", new),)


@pytest.mark.anyio
async def test_a_tools_code_is_repaired_when_it_is_tuned() -> None:
    @ao.tool
    def double(number: int) -> int:
        """Twice a number."""
        return number + 2

    @ao.agent
    def work(number: int) -> int:
        return double(number)

    data = [
        Dataset(name, [Example("", {"number": n}, 2 * n) for n in range(a, a + 20)])
        for name, a in (("t", 3), ("v", 30))
    ]
    result = await ao.atune(
        work,
        train=data[0],
        val=data[1],
        metric="exact_match",
        optimizer="code",
        models={"optimizer": OracleLM(lambda _: answer("def double(number: int) -> int:\n    return 2 * number"))},
        options=ao.TuneOptions(tune=("double.code",)),
        store=":memory:",
    )
    assert "2 * number" in str(result.best.get("double.code"))


@pytest.mark.anyio
async def test_a_method_is_rewritten_too_and_only_compiled_before() -> None:
    class Till:
        rate = 0.5

        def __init__(self) -> None:
            self.share = 2

        @ao.bundle(trainable=True, name="till")
        def part(self, total: int) -> int:
            return total * self.share

    till = Till()

    @ao.agent
    def work(total: int) -> int:
        found: Any = till.part(total)
        return getattr(found, "value", found)

    name = next(name for name in graph.declared_parameters() if name.endswith(".code"))
    new = "def part(self, total: int) -> int:\n    return total // self.share"
    sets = [
        Dataset(split, [Example("", {"total": n}, n // 2) for n in range(a, a + 12)])
        for split, a in (("t", 5), ("v", 50))
    ]
    result = await ao.atune(
        work,
        train=sets[0],
        val=sets[1],
        metric="exact_match",
        optimizer="code",
        models={"optimizer": OracleLM(lambda _: answer(new))},
        store=":memory:",
    )
    assert result.best.get(name) == new


@pytest.mark.anyio
async def test_the_two_worst_functions_take_turns_and_the_template_can_be_overridden(tmp_path: Path) -> None:
    asked: list[str] = []
    path = tmp_path / "mine.txt"
    path.write_text("=== code.system ===\nMY OWN WORDS\n", encoding="utf-8")
    made = await context(FunctionLM(lambda request: (asked.append(said(request)), answer(FIXED))[1]), count=2)
    other = graph.ParameterSpec("other.code", "code", "def other() -> int:\n    return 1")
    parent = made.parent.with_values({"other.code": other.default})
    made = replace(made, specs={**made.specs, "other.code": other}, parent=parent)
    updates = await CodeRepair(template=path).propose(made)
    assert [update.edits[0].name for update in updates] == ["price.code"]  # the other one was never called
    assert all(text.startswith("MY OWN WORDS") for text in asked)


class NoSandbox:
    def compile(self, source: str, name: str, uses: Any = ()) -> str:
        raise SandboxUnavailable("no namespaces here")

    def call(self, function_id: str, args: Any, kwargs: Any) -> Any:
        raise AssertionError

    async def acall(self, function_id: str, args: Any, kwargs: Any) -> Any:
        raise AssertionError


@pytest.mark.anyio
async def test_a_sandbox_that_does_not_work_is_not_held_against_the_code() -> None:
    made = await context(FunctionLM(lambda _: answer(FIXED)))
    with use_code_runner(NoSandbox()), pytest.raises(SandboxUnavailable):
        await CodeRepair().propose(made)


@pytest.mark.anyio
async def test_without_a_model_or_runs_nothing_is_proposed() -> None:
    made = await context(None)
    assert await CodeRepair().propose(made) == []
    assert await CodeRepair().propose(replace(made, lm=FunctionLM(lambda _: ""), rollouts=())) == []
