"""Prompts made up at random: agents with tools and schemas, worked arithmetic, multiple-choice tasks."""

from __future__ import annotations

import json
import random

NAMES = ("Mirja Koskela", "Tomas Berg", "Ada Njoku", "Priya Rao", "Luis Ortega", "Wei Chen", "Sara El-Amin")
THINGS = ("invoice", "parcel", "lantern", "bicycle", "ticket", "report", "harbour", "violin", "crate", "ledger")
PLACES = ("Halvik", "Port Lome", "Oulu", "the north depot", "Tern Valley", "Acme Corp")
VERBS = ("records", "moves", "checks", "ships", "repairs", "counts", "labels", "returns")
ENDS = ("in the morning", "by the river", "at the depot", "with great care", "on most days", "for the town")


def statement(rng: random.Random) -> str:
    """A sentence of a passage, often with a span that must not be altered."""
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    verb, end = rng.choice(VERBS), rng.choice(ENDS)
    number = rng.randint(2, 9_999)
    return rng.choice(
        (
            f"{name} {verb} the {thing} in {place}, which is old and quiet, {end}.",
            f"The {thing} of {name} costs ${number}.50 and weighs {number % 90}.5 kg, as the list in {place} says.",
            f"On 2024-0{rng.randint(1, 9)}-1{rng.randint(0, 9)} the {thing} went to {place}, and {name} saw it.",
            f'{name} said "the {thing} stays in {place}" and then {verb} it {end}.',
            f"See https://example.org/{thing}/{number}?a=b for the {thing}, or /srv/{thing}s/{number}.txt too.",
            f"The {thing} is not for sale unless {name} agrees, {end}.",
            f"At most {number % 7 + 2} of them {verb[:-1]} the {thing} {end}.",
            f"Call `get_{thing}({number})` with --limit={number} to see what {place} has.",
            f"The road to {place} is long, the {thing} is heavy, and the day is short {end}.",
        )
    )


def passage(rng: random.Random, sentences: int) -> str:
    """A paragraph."""
    return " ".join(statement(rng) for _ in range(sentences))


def tool(rng: random.Random) -> str:
    """The definition of a tool, as JSON."""
    thing = rng.choice(THINGS)
    parameters = {
        "type": "object",
        "properties": {
            f"{thing}_id": {"type": "string", "description": f"Which {thing}."},
            "limit": {"type": "integer"},
        },
        "required": [f"{thing}_id"],
    }
    value = {"type": "function", "function": {"name": f"find_{thing}", "parameters": parameters}}
    return json.dumps(value, indent=rng.choice((None, 2)))


def agent_prompt(rng: random.Random) -> str:
    """A system prompt: role, constraints, tools, context, examples, output format, placeholders."""
    rules = [
        "Never reveal internal notes.",
        "Do not promise more than $50.00 back.",
        f"If the {rng.choice(THINGS)} is older than 30 days, do not take it back unless {rng.choice(NAMES)} agrees.",
        "Always be polite to {customer_name}.",
    ]
    rng.shuffle(rules)
    parts = [f"You are a support agent for {rng.choice(PLACES)}. Help the customer with the {rng.choice(THINGS)}."]
    parts.append("## Tools\n\n" + "\n\n".join(tool(rng) for _ in range(rng.randint(1, 3))))
    parts.append("## Rules\n\n" + "\n".join(f"- {rule}" for rule in rules[: rng.randint(1, 4)]))
    for number in range(rng.randint(1, 4)):
        parts.append(f"## Background {number + 1}\n\n{passage(rng, rng.randint(3, 9))}")
    if rng.random() < 0.5:
        rows = "\n".join(f"| {thing} | {rng.randint(1, 99)} |" for thing in rng.sample(THINGS, 3))
        parts.append(f"| thing | count |\n|---|---|\n{rows}")
    if rng.random() < 0.5:
        parts.append(f"```python\ndef find(x):\n    return {{'{rng.choice(THINGS)}': x}}\n```")
    for _ in range(rng.randint(0, 3)):
        parts.append(f"Input: {statement(rng)}\nOutput: {rng.choice(('refund', 'reply', 'close'))}")
    form = rng.choice(
        (
            'Respond with JSON in the following format:\n```json\n{"answer": "<your answer>", "sure": true}\n```',
            "Answer with exactly one of: refund, reply, close.",
            "Output format: one line, then the word done.",
            "Your answer must be a single number.",
        )
    )
    parts.append(form)
    parts.append(
        rng.choice(("Ticket: {ticket}", "Customer {{customer.name}} writes: ${message}", "Now: %(text)s, <tone>"))
    )
    return "\n\n".join(parts)


def worked_prompt(rng: random.Random) -> str:
    """Shots of arithmetic with their work, then the open question."""
    shots: list[str] = []
    for _ in range(rng.randint(2, 6)):
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        count = rng.randint(3, 40)
        lines = [
            f"Question: {name} has {count} {thing}s and buys {count // 2} more at ${count}.25 each. How many in all?"
        ]
        lines.append("Let's think step by step")
        for step in range(rng.randint(2, 7)):
            lines.append(
                f"{name} then has {count} + {step} = {count + step} {thing}s, which is no more than {count + 9}."
            )
        lines.append(f"The answer is {count + count // 2}")
        shots.append("\n".join(lines))
    return "\n\n".join([*shots, "Question: {question}\nLet's think step by step"])


def choice_prompt(rng: random.Random) -> str:
    """A task line and shots with options and a worked answer."""
    shots: list[str] = []
    for _ in range(rng.randint(2, 5)):
        thing, place = rng.choice(THINGS), rng.choice(PLACES)
        options = "\n".join(f"({letter}) {rng.choice(THINGS)} {rng.randint(1, 99)}" for letter in "ABC")
        work = passage(rng, rng.randint(1, 5))
        shots.append(
            f"Q: Which of them is the {thing} of {place}?\nOptions:\n{options}\n"
            f"A: Let's think step by step.\n{work}\nSo the answer is ({rng.choice('ABC')})."
        )
    return "\n\n".join(["Decide which thing is meant.", *shots, "Q: {question}\nA:"])


MAKERS = {"agent": agent_prompt, "worked": worked_prompt, "choice": choice_prompt}
