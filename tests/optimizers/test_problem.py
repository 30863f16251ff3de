from __future__ import annotations

from typing import Any

from agentopt import graph
from agentopt.evaluation import EvaluationRow, Example, Rollout
from agentopt.graph import Candidate, SetText
from agentopt.optimizers import OptoPrime, OptoPrimeOptions, PastProposal, Update, load_templates
from agentopt.optimizers._feedback import cut, graphs_of
from agentopt.optimizers._memory import render_memory
from agentopt.optimizers._problem import cases_of, estimate_tokens, render_problem

SECTIONS = [
    "Instruction",
    "Code",
    "Documentation",
    "Variables",
    "Constraints",
    "Inputs",
    "Others",
    "Outputs",
    "Feedback",
]


def section(text: str, name: str) -> str:
    return text.split(f"#{name}\n", 1)[1].split("\n\n#", 1)[0]


def problem(world: Any, budget: int = 3000, **changes: Any) -> str:
    context = world.context(**changes)
    values = {name: context.parent.get(name) for name in context.specs}
    return render_problem(
        cases_of(context.rollouts, context.graphs, context.specs),
        values,
        context.specs,
        template=load_templates()["optoprime.problem"],
        instruction="Get better.",
        budget=budget,
    )


def test_all_sections_are_there_in_order_and_none_is_empty(make: Any) -> None:
    text = problem(make.classifier(variables=True))
    places = [text.index(f"#{name}\n") for name in SECTIONS]
    assert places == sorted(places)
    for name in SECTIONS:
        assert section(text, name).strip()
    assert "toy.instruction" in section(text, "Code")
    assert "Sort the support ticket" in section(text, "Variables")
    assert "{ticket}" in section(text, "Constraints")
    assert "about my parcel" in section(text, "Inputs")
    assert "Expected 'shipping', got 'billing'" in section(text, "Feedback")


def test_failing_cases_come_first_and_passing_ones_are_counted(make: Any) -> None:
    feedback = section(problem(make.classifier()), "Feedback")
    assert feedback.startswith("[case 1] score 0.00")
    assert "3 of 9 cases had full score" in feedback


def test_cases_that_say_the_same_are_folded(make: Any) -> None:
    world = make.classifier()
    text = problem(world, batch=36)
    assert "more cases like:" in section(text, "Feedback")
    assert text.count("Expected 'shipping'") <= 4


def test_an_error_is_shown_with_its_place_and_before_wrong_answers(make: Any) -> None:
    world = make.classifier()

    @graph.step
    def explode(ticket: str) -> str:
        raise ValueError("no such queue")

    inner = world.program

    @graph.agent
    def sometimes(ticket: str) -> str:
        queue = inner(ticket=ticket)
        return explode(ticket) if "invoice" in ticket else queue

    world.program = sometimes
    text = problem(world)
    assert "The run failed" in section(text, "Feedback").splitlines()[0]
    assert "no such queue" in section(text, "Feedback")


def chain(size: int) -> Rollout:
    text = graph.prompt("start", name="long.text")

    @graph.step
    def grow(value: list[int]) -> list[int]:
        return [value[0] + len(str(text))]

    @graph.agent
    def program(seed: str) -> str:
        value = [len(seed)]
        for _ in range(size):
            value = grow(value)
        return str(value[0])

    example = Example("e1", {"seed": "s"}, "never this")
    with graph.record() as recording:
        output = program("s")
    row = EvaluationRow("h", "d", "e1", 0, 0, 0.0, "wrong", {}, output)
    return Rollout(example, row, recording.trace)


def test_a_trace_of_5000_calls_fits_the_token_budget_with_visible_folding() -> None:
    rollout = chain(5000)
    specs = graph.declared_parameters()
    cases = cases_of([rollout], graphs_of([rollout]), specs)
    template = load_templates()["optoprime.problem"]
    values = {"long.text": "start"}
    for budget in (160, 400, 1000, 4000):
        text = render_problem(cases, values, specs, template=template, instruction="Better.", budget=budget)
        assert estimate_tokens(text) <= budget
        assert "(folded)" in text or "chars]" in text
        assert "start" in text
    assert "4,997 more calls of grow like this (folded)" in section(text, "Code")


def test_a_huge_parameter_is_cut_visibly_and_only_as_a_last_resort(make: Any) -> None:
    world = make.classifier()
    long = "Sort the ticket. " * 200
    parent = Candidate({"toy.instruction": long})
    assert long in problem(world, 4000, parent=parent)
    short = problem(world, 300, parent=parent)
    assert estimate_tokens(short) <= 300
    assert "chars]" in short


def test_cut_keeps_both_ends_and_says_how_much_is_gone() -> None:
    assert cut("short", 10) == "short"
    assert cut("a" * 50 + "b" * 50, 30).startswith("a" * 20 + " [+70 chars] ")
    assert cut("a" * 50 + "b" * 50, 30).endswith("b" * 10)


def past(number: int, screen: float | None, validation: float | None = None) -> PastProposal:
    update = Update((SetText("toy.instruction", f"text number {number} " * 8),), "why", "optoprime")
    return PastProposal(f"h{number}", "p", update, screen, validation, validation is not None, "not better", 0.5)


def test_memory_has_values_scores_and_outcomes_of_the_best_and_the_latest() -> None:
    history = [past(number, number / 40, 0.9 if number == 3 else None) for number in range(30)]
    text = render_memory(history, 2000)
    assert "<round 4> minibatch 0.07 (parent 0.50), validation 0.90; accepted" in text
    assert "<round 30> minibatch 0.72" in text
    assert "rejected: not better" in text
    assert "text number 29" in text
    assert "<round 10>" not in text
    assert estimate_tokens(render_memory(history, 120)) <= 120
    assert render_memory([], 100) == ""


def test_the_messages_hold_the_memory_and_are_the_same_twice(make: Any) -> None:
    world = make.classifier()
    history = [past(1, 0.25)]
    one, two = (OptoPrime().messages(world.context(history=history)) for _ in range(2))
    assert one == two
    assert "minibatch 0.25" in one[1]["content"]
    assert "toy.instruction" in one[1]["content"]
    without = OptoPrime(OptoPrimeOptions(memory=False)).messages(world.context(history=history))
    assert "minibatch 0.25" not in without[1]["content"]
