"""Small tuning problems whose best score is known to be 1, for `optimizers.py`.

The unit is one problem of one seed: a program, its rows, a metric, the true score of a candidate (computed, never
sampled) and one step of improvement. A step fixes one thing: it moves one number, repairs one bug or states one rule;
`_oracles.py` puts it into the form that an optimizer asks for.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import agentopt as ao
from agentopt.evaluation import Dataset, Example
from agentopt.models import FunctionLM, Request

ROWS = 16
"""Rows of train and of validation each."""


class Problem:
    """What all problems share. An object lives within one `parameter_scope`."""

    name = ""
    tune: tuple[str, ...] = ()
    """Parameters that are frozen unless asked for."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(f"{self.name}/{seed}")
        self.program: Callable[..., Any]
        self.build()
        self.train = Dataset("train", [self.row(number, 0) for number in range(ROWS)])
        self.validation = Dataset("validation", [self.row(number, 1) for number in range(ROWS)])

    def build(self) -> None:
        """Declare the parameters and the program."""
        raise NotImplementedError

    def row(self, number: int, split: int) -> Example:
        """Row `number` of the training (0) or validation (1) part."""
        raise NotImplementedError

    def agent(self, request: Request) -> str:
        """The program's own language model, where it has one."""
        raise NotImplementedError

    def metric(self, output: Any, expected: Any, example: Example) -> tuple[float, str]:
        """Score and feedback of one row."""
        raise NotImplementedError

    def truth(self, candidate: ao.Candidate) -> float:
        """The score on everything that could be asked; 1 is the optimum."""
        raise NotImplementedError

    def step(self, values: Mapping[str, str], evidence: str, rng: random.Random) -> tuple[str, str] | None:
        """(name, better value), one thing better than `values`; None when the evidence shows nothing to better."""
        raise NotImplementedError

    def hint(self, evidence: str) -> str:
        """What a critic who knows the problem says about the evidence."""
        raise NotImplementedError

    def models(self, optimizer: Any) -> dict[str, Any]:
        """Language models by role."""
        return {"agent": FunctionLM(self.agent), "optimizer": optimizer}


# --- numbers ---------------------------------------------------------------------------------------------------------

_NUMBERS = ("curve.bend", "curve.slope", "curve.level")
_TOLERANCE = 0.1


class Numbers(Problem):
    """A traced chain of arithmetic with three numbers that must meet a curve (as the numeric problem of Trace)."""

    name = "numbers"

    def build(self) -> None:
        bounds = (3.0, 5.0, 8.0)
        self.target = {name: round(self.rng.uniform(-b, b), 2) for name, b in zip(_NUMBERS, bounds, strict=True)}
        bend, slope, level = (ao.number(-10.0, 10.0, name=name, default=0.0) for name in _NUMBERS)

        @ao.bundle()
        def bent(x: float, by: float) -> float:
            """The square of x, times a factor."""
            return x * x * by

        @ao.bundle()
        def sloped(x: float, by: float) -> float:
            """x, times a factor."""
            return x * by

        @ao.bundle()
        def raised(left: float, right: float, by: float) -> float:
            """The sum of two numbers, and a third."""
            return left + right + by

        @ao.agent
        def curve(x: float) -> float:
            """The height of a curve at x."""
            found: Any = raised(bent(x, bend.value), sloped(x, slope.value), level.value)
            return float(getattr(found, "value", found))

        self.program = curve

    def height(self, x: float, values: Mapping[str, float]) -> float:
        """The curve with these numbers at x."""
        bend, slope, level = (values[name] for name in _NUMBERS)
        return x * x * bend + x * slope + level

    def row(self, number: int, split: int) -> Example:
        x = round(-2 + 4 * (number + 0.5 * split) / ROWS, 3)
        return Example("", {"x": x}, round(self.height(x, self.target), 4))

    @staticmethod
    def closeness(distance: float) -> float:
        """1 within the tolerance, a half at 4 beyond it."""
        return 1 / (1 + max(0.0, abs(distance) - _TOLERANCE) / 4)

    def metric(self, output: Any, expected: Any, example: Example) -> tuple[float, str]:
        distance = float(output) - float(expected)
        said = "about right" if abs(distance) <= _TOLERANCE else "too low" if distance < 0 else "too high"
        return self.closeness(distance), f"The result is {said}."

    def truth(self, candidate: ao.Candidate) -> float:
        values = {name: float(candidate.get(name, 0.0)) for name in _NUMBERS}
        places = [-2 + number / 10 for number in range(41)]
        return sum(self.closeness(self.height(x, values) - self.height(x, self.target)) for x in places) / len(places)

    def step(self, values: Mapping[str, str], evidence: str, rng: random.Random) -> tuple[str, str] | None:
        """Move one number by 40 to 90 % of its distance, or onto the target when it is near."""
        far = {name: self.target[name] - float(value) for name, value in values.items() if name in self.target}
        wrong = [name for name, distance in far.items() if abs(distance) > 0.02]
        if not wrong:
            return None
        name = rng.choice(wrong)
        share = 1.0 if abs(far[name]) < 0.3 else rng.uniform(0.4, 0.9)
        return name, f"{float(values[name]) + share * far[name]:.3f}"

    def hint(self, evidence: str) -> str:
        words = [word for word in ("too low", "too high") if word in evidence]
        return f"The value is at fault: results are {' and '.join(words) or 'off'}; move it towards the expected ones."


# --- code ------------------------------------------------------------------------------------------------------------

_BUGS = {
    "foot": ("return value * 0.3084", "return value * 0.3048"),
    "mile": ("return value * 1609.0 / 1000", "return value * 1.609344"),
    "pound": ("return value / 0.45359237", "return value * 0.45359237"),
    "fahrenheit": ("return value - 32 * 5 / 9", "return (value - 32) * 5 / 9"),
}


_RIGHT: dict[str, Callable[[float], float]] = {
    "foot": lambda value: value * 0.3048,
    "mile": lambda value: value * 1.609344,
    "pound": lambda value: value * 0.45359237,
    "fahrenheit": lambda value: (value - 32) * 5 / 9,
}
BUGGY = "\n".join(
    [
        "def convert(value: float, unit: str) -> float:",
        '    """A measure in metric units: feet to metres, miles to km, pounds to kg, Fahrenheit to Celsius."""',
        *(f'    if unit == "{unit}":\n        {wrong}' for unit, (wrong, _) in _BUGS.items()),
        "    return value",
    ]
)
"""The tool's source, for an optimizer that is not shown it."""


class Code(Problem):
    """A function with four planted bugs, one in each branch; every row is a unit test of one branch."""

    name = "code"
    parameter = "convert.code"

    def build(self) -> None:
        @ao.bundle(trainable=True)
        def convert(value: float, unit: str) -> float:
            """A measure in metric units: feet to metres, miles to km, pounds to kg, Fahrenheit to Celsius."""
            if unit == "foot":
                return value * 0.3084
            if unit == "mile":
                return value * 1609.0 / 1000
            if unit == "pound":
                return value / 0.45359237
            if unit == "fahrenheit":
                return value - 32 * 5 / 9
            return value

        @ao.agent
        def measure(value: float, unit: str) -> float:
            """Measures in metric units."""
            found: Any = convert(value, unit)
            return float(getattr(found, "value", found))

        self.program = measure

    def row(self, number: int, split: int) -> Example:
        unit = list(_BUGS)[number % len(_BUGS)]
        value = 50.0 + 3 * number + 101 * split + self.seed
        return Example("", {"value": value, "unit": unit}, _RIGHT[unit](value))

    def metric(self, output: Any, expected: Any, example: Example) -> tuple[float, str]:
        if abs(float(output) - float(expected)) < 1e-6:
            return 1.0, "Right."
        return 0.0, f"The unit test of {example.inputs['unit']} fails."

    def truth(self, candidate: ao.Candidate) -> float:
        source = str(candidate.get(self.parameter, ""))
        return sum(right in source for _, right in _BUGS.values()) / len(_BUGS)

    def step(self, values: Mapping[str, str], evidence: str, rng: random.Random) -> tuple[str, str] | None:
        """Repair one bug: one that a failing test shows, where tests are shown."""
        name, source = next(iter(values.items()))
        left = [unit for unit, (wrong, _) in _BUGS.items() if wrong in source]
        failing = [unit for unit in left if f"test of {unit}" in evidence] or left
        if not failing:
            return None
        wrong, right = _BUGS[rng.choice(failing)]
        return name, source.replace(wrong, right)

    def hint(self, evidence: str) -> str:
        units = [unit for unit in _BUGS if f"test of {unit}" in evidence]
        return "The branch is wrong of the " + " and ".join(f"test of {unit}" for unit in units or _BUGS) + "."


# --- rules -----------------------------------------------------------------------------------------------------------

RULES = (
    "Rule 1: answer in Latin letters.",
    "Rule 2: name the colour first.",
    "Rule 3: round down to tens.",
    "Rule 4: use the short form.",
    "Rule 5: leave out the unit.",
    "Rule 6: prefer the newer entry.",
)
_START = "Process the item."
_KIND = re.compile(r"\bkind (\d+)\b")
_NAMED = re.compile(r"\b(?:Rule|kind) (\d+)\b")


class Rules(Problem):
    """An instruction that must state four hidden rules: a row is answered rightly when the rule it needs is stated."""

    name = "rules"
    parameter = "rules.instruction"
    k = 4

    def build(self) -> None:
        instruction = ao.prompt(_START, name=self.parameter)

        @ao.agent
        async def answer_item(question: str) -> str:
            """Answers a question about one item; what kind of item it is decides which rule holds."""
            return (await ao.lm("agent").complete(system=instruction, user=question)).text

        self.program = answer_item

    def row(self, number: int, split: int) -> Example:
        serial = 1000 * (split + 1) + 50 * self.seed + number
        kind = number % self.k + 1
        where = self.rng.choice(("harbour", "station", "market", "museum", "garden", "library"))
        return Example("", {"question": f"Parcel {serial} of kind {kind}, {where} gate"}, self.answer(serial))

    @staticmethod
    def answer(serial: int) -> str:
        """The right answer about one parcel."""
        return f"code {serial * 7919 % 9973} seal {serial}"

    def agent(self, request: Request) -> str:
        system = "\n".join(str(turn["content"]) for turn in request.messages if turn["role"] == "system")
        question = str(request.messages[-1]["content"])
        kind, serial = _KIND.search(question), re.search(r"Parcel (\d+)", question)
        if kind is None or serial is None:
            return "unknown"
        shown = "\n".join(str(turn["content"]) for turn in request.messages[:-1] if turn["role"] == "user")
        known = RULES[int(kind[1]) - 1] in system or kind[1] in _KIND.findall(shown)
        return self.answer(int(serial[1])) if known else f"unsure {serial[1]}"

    def metric(self, output: Any, expected: Any, example: Example) -> tuple[float, str]:
        if output == expected:
            return 1.0, "Right."
        kind = int(_KIND.findall(str(example.inputs["question"]))[0])
        return 0.0, f"This rule was not followed: {RULES[kind - 1]}"

    def truth(self, candidate: ao.Candidate) -> float:
        return len(self.stated(str(candidate.get(self.parameter, "")))) / self.k

    def stated(self, text: str) -> set[int]:
        """Numbers of the rules that a text states."""
        return {number for number in range(1, self.k + 1) if RULES[number - 1] in text}

    def lesson(self, stated: str, evidence: str, rng: random.Random) -> str | None:
        """One rule that the evidence speaks of and `stated` does not say."""
        found = {int(number) for number in _NAMED.findall(evidence)} & set(range(1, self.k + 1))
        missing = sorted(found - self.stated(stated))
        return RULES[rng.choice(missing) - 1] if missing else None

    def step(self, values: Mapping[str, str], evidence: str, rng: random.Random) -> tuple[str, str] | None:
        """State one more rule."""
        name, text = next(iter(values.items()))
        lesson = self.lesson(text, evidence, rng)
        return None if lesson is None else (name, f"{text.strip()}\n{lesson}")

    def hint(self, evidence: str) -> str:
        numbers = sorted({int(number) for number in _NAMED.findall(evidence)} & set(range(1, self.k + 1)))
        return " ".join(f"It should state {RULES[number - 1]}" for number in numbers) or "Nothing is to blame here."


class Examples(Rules):
    """The same with demonstrations besides: one of the right kind of item does what stating its rule does."""

    name = "examples"
    k = 6

    def build(self) -> None:
        instruction = ao.prompt(_START, name=self.parameter)
        shown = ao.demos(name="rules.examples", max_items=4)

        @ao.agent
        async def answer_item(question: str) -> str:
            """Answers a question about one item; what kind of item it is decides which rule holds."""
            return (await ao.lm("agent").complete(system=instruction, user=question, demos=shown)).text

        self.program = answer_item

    def truth(self, candidate: ao.Candidate) -> float:
        demos: Any = candidate.get("rules.examples", [])
        shown = {int(number) for item in demos for number in _KIND.findall(item["input"])}
        return len(self.stated(str(candidate.get(self.parameter, ""))) | shown) / self.k


# --- structured values -----------------------------------------------------------------------------------------------


class Principles(Rules):
    """The rules as a list of principles; one that does harm stands in it at the start."""

    name = "principles"
    parameter = "rules.book"
    harm = "Keep silent about the seal."

    def build(self) -> None:
        book = ao.principles(["Stay friendly.", self.harm], name=self.parameter)

        @ao.agent
        async def answer_item(question: str) -> str:
            """Answers a question about one item; what kind of item it is decides which rule holds."""
            return (await ao.lm("agent").complete(system=f"{_START}\n{book}", user=question)).text

        self.program = answer_item

    def agent(self, request: Request) -> str:
        silent = self.harm in str(request.messages[0]["content"]) and "0 of kind" in str(request.messages[-1])
        return "..." if silent else super().agent(request)

    def metric(self, output: Any, expected: Any, example: Example) -> tuple[float, str]:
        if output == "...":
            return 0.0, f"It was silent because of: {self.harm}"
        return super().metric(output, expected, example)

    def hint(self, evidence: str) -> str:
        harm = f" It was silent because of: {self.harm}" if "It was silent" in evidence else ""
        return super().hint(evidence) + harm

    def truth(self, candidate: ao.Candidate) -> float:
        items: Any = candidate.get(self.parameter, [])
        text = "\n".join(item["text"] for item in items)
        return len(self.stated(text)) / self.k * (0.9 if self.harm in text else 1.0)


_STEPS = {"tariff": "Add the tariff to", "date": "Add the date to", "sender": "Add the sender to"}


class Steps(Problem):
    """A pipeline of one node that lacks three steps; every row needs one of them."""

    name = "pipeline"
    parameter = "desk"

    def build(self) -> None:
        pipeline = ao.Pipeline({"nodes": {"write": "Write an answer to: {question}"}}, name=self.parameter)

        @ao.agent
        async def desk(question: str) -> str:
            """Answers letters in several steps."""
            return str((await pipeline.run(question=question))["output"])

        self.program = desk

    def row(self, number: int, split: int) -> Example:
        what = list(_STEPS)[number % len(_STEPS)]
        serial = 1000 * (split + 1) + 50 * self.seed + number
        return Example("", {"question": f"Letter {serial} asks for the {what}"}, what)

    def agent(self, request: Request) -> str:
        text = "\n".join(str(turn["content"]) for turn in request.messages)
        done = set(re.findall(r"with (\w+)", text)) | {name for name, task in _STEPS.items() if task in text}
        return "Answer " + " ".join(f"with {name}" for name in _STEPS if name in done)

    def metric(self, output: Any, expected: Any, example: Example) -> tuple[float, str]:
        return (1.0, "Right.") if f"with {expected}" in str(output) else (0.0, f"A step is missing: {expected}.")

    def truth(self, candidate: ao.Candidate) -> float:
        value: Any = candidate.get(self.parameter, None)
        tasks = [node["prompt"]["task"] for node in value["nodes"].values()] if value else []
        return sum(any(task in one for one in tasks) for task in _STEPS.values()) / len(_STEPS)

    def node(self, pipeline: str, evidence: str, rng: random.Random) -> tuple[str, str] | None:
        """(name, task) of one missing step that the evidence speaks of."""
        missing = [name for name, task in _STEPS.items() if f"missing: {name}" in evidence and task not in pipeline]
        name = rng.choice(missing) if missing else None
        return None if name is None else (name, f"{_STEPS[name]} {{previous}}")

    def step(self, values: Mapping[str, str], evidence: str, rng: random.Random) -> tuple[str, str] | None:
        return None

    def hint(self, evidence: str) -> str:
        found = [name for name in _STEPS if f"missing: {name}" in evidence]
        return " ".join(f"A step is missing: {name}." for name in found) or "Nothing is to blame here."


class Tools(Code):
    """The function with the bugs as a tool of a toolbox."""

    name = "tools"
    parameter = "kit"
    tune = ("kit",)

    def build(self) -> None:
        def convert(value: float, unit: str) -> float:
            """A measure in metric units: feet to metres, miles to km, pounds to kg, Fahrenheit to Celsius."""
            if unit == "foot":
                return value * 0.3084
            if unit == "mile":
                return value * 1609.0 / 1000
            if unit == "pound":
                return value / 0.45359237
            if unit == "fahrenheit":
                return value - 32 * 5 / 9
            return value

        box = ao.toolbox([convert], name=self.parameter)

        @ao.agent
        def measure(value: float, unit: str) -> float:
            """Measures in metric units with a tool."""
            return float(box.call("convert", {"value": value, "unit": unit}))

        self.program = measure

    def truth(self, candidate: ao.Candidate) -> float:
        tools: Any = candidate.get(self.parameter, [])
        source = "\n".join(tool["source"] for tool in tools)
        return sum(right in source for _, right in _BUGS.values()) / len(_BUGS)


PROBLEMS: dict[str, type[Problem]] = {
    problem.name: problem for problem in (Numbers, Code, Rules, Examples, Principles, Steps, Tools)
}
