"""One scripted model that answers every optimizer in its own form; `optimizers.py` gives it a quality.

The unit is one request. A family of optimizers has one function here, which takes the present values and the evidence
out of the meta-prompt and answers with ONE step of improvement (`Problem.step`). So all optimizers get answers that are
equally good, and what differs is what optimizer and driver make of them. Passing criticism on (a gradient, a summary)
is answered with what the evidence says.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from _problems import BUGGY, Principles, Problem, Rules, Steps

import agentopt as ao
from agentopt.models import Reply, Request

_UNREADABLE = "I cannot read this."


@dataclass(frozen=True)
class Asked:
    """One request, taken apart."""

    problem: Problem
    system: str
    user: str
    """The first user turn: the question; later ones are repairs or second thoughts."""
    last: str
    before_last: str
    rng: random.Random

    def between(self, start: str, end: str) -> str:
        """What stands between the first `start` and the next `end` of the question."""
        return between(self.user, start, end)


def between(text: str, start: str, end: str) -> str:
    """What stands between the first `start` and the next `end`; empty when they are not there."""
    _, mark, rest = text.partition(start)
    return rest.partition(end)[0].strip() if mark else ""


def _pairs(step: tuple[str, str] | None) -> str:
    suggestion = [] if step is None else [{"name": step[0], "value": step[1]}]
    return json.dumps({"reasoning": "the feedback says so", "suggestion": suggestion})


# --- values by name: optoprime, optoprime-multi, opro, textgrad -------------------------------------------------------


def optoprime(asked: Asked) -> str:
    """The problem text with its variables; second thoughts go on from the earlier suggestion."""
    section = asked.between("#Variables\n", "\n#Constraints")
    values = dict(re.findall(r"^\(\w+\) (\S+) =\n<<<\n(.*?)\n>>>", section, re.DOTALL | re.MULTILINE))
    values |= dict(re.findall(r"^\(\w+\) (\S+) = (.+)$", section, re.MULTILINE))
    if "your earlier suggestion" in asked.last:
        earlier: Any = json.loads(asked.before_last)["suggestion"]
        values |= {pair["name"]: str(pair["value"]) for pair in earlier}
    return _pairs(asked.problem.step(values, asked.user, asked.rng))


def opro(asked: Asked) -> str:
    """Scored solutions, the best one last."""
    history = asked.between("A score of 1 is best.", "What the program has to do")
    solutions = [block for block in re.split(r"^score: [\d.]+$", history, flags=re.MULTILINE) if block.strip()]
    values = dict(re.findall(r"^(\S+) =\n(.*?)(?=\n\S+ =\n|\Z)", solutions[-1].strip(), re.DOTALL | re.MULTILINE))
    return _pairs(asked.problem.step(values, asked.user, asked.rng))


def textgrad(asked: Asked) -> str:
    """A gradient for one edge, or the new value of one variable from its gradients."""
    if "You pass" in asked.system or "you pass the criticism on" in asked.system:
        return asked.problem.hint(asked.user)
    name = asked.between("The value ", ", now:")
    values = {name: asked.between("<value>\n", "\n</value>")}
    return _pairs(asked.problem.step(values, asked.user, asked.rng))


# --- whole texts: reflection, instructions, grounded, code ------------------------------------------------------------


def reflection(asked: Asked) -> str:
    """One component's text between fences, and records."""
    name, text = asked.between("One part of this program is ", ". Its text now:"), asked.between("```\n", "\n```")
    step = asked.problem.step({name: text}, asked.user, asked.rng)
    return f"Here it is.\n```\n{text if step is None else step[1]}\n```"


def instructions(asked: Asked) -> str:
    """An instruction between tags; the questions that grounded proposal asks before are answered from the evidence."""
    if "<instruction>" not in asked.user:
        return "Short cases. " + asked.problem.hint(asked.user)
    text = asked.between("<instruction>\n", "\n</instruction>")
    step = asked.problem.step({"instruction": text}, asked.user, asked.rng)
    return json.dumps({"instruction": text if step is None else step[1]})


def code(asked: Asked) -> str:
    """The whole function."""
    source = asked.between("```python\n", "\n```")
    step = asked.problem.step({"source": source}, asked.user, asked.rng)
    return json.dumps({"reasoning": "a test fails", "source": source if step is None else step[1]})


# --- playbook --------------------------------------------------------------------------------------------------------


def playbook(asked: Asked) -> str:
    """The reflector names one lesson and what did harm; the curator adds the one and drops the other."""
    problem = asked.problem
    assert isinstance(problem, Rules)
    if "You review runs" in asked.system:
        stated = asked.between("each with its id:", "What the runs were given:")
        lesson = problem.lesson(stated, asked.user, asked.rng)
        harmful = _harmful(stated) if "It was silent" in asked.user else []
        lessons = [lesson] if lesson else []
        return json.dumps({"reasoning": "the runs say so", "lessons": lessons, "helpful": [], "harmful": harmful})
    lessons = re.findall(r"^- (.+)$", asked.between("Lessons from the latest runs:", "Decide which"), re.MULTILINE)
    operations = [{"op": "add", "ids": [], "text": text} for text in lessons if text.startswith("Rule")]
    bad = re.findall(r"^\[(p\d+)\] \(\+\d+ -[1-9]\d*\)", asked.user, re.MULTILINE)
    operations += [{"op": "drop", "ids": [name], "text": ""} for name in bad]
    return json.dumps({"reasoning": "lessons", "operations": operations})


def _harmful(listed: str) -> list[str]:
    return re.findall(rf"\b(p\d+)\b[^\n]*{re.escape(Principles.harm)}", listed)


# --- symbolic learning -----------------------------------------------------------------------------------------------


def symbolic(asked: Asked) -> str:
    """Loss, gradient, then one edit of a prompt, a tool or a pipeline."""
    user, problem = asked.user, asked.problem
    if "You look at one call of it" in user:
        return json.dumps({"suggestion": problem.hint(user), "demand_on_previous": ""})
    if "Say what is wrong with its result" in user:
        return json.dumps({"comments": problem.hint(user), "score": 2})
    if "You change one part of a prompt" in user:
        return _symbolic_prompt(asked)
    if "The agent has tools" in user:
        name = re.search(r"^tool (\w+)", user, re.MULTILINE)
        return json.dumps({"analysis": "a test fails", "operation": "edit_code", "tool": name[1] if name else ""})
    if "Rewrite the code of the tool" in user:
        found = re.search(r"^def .*?(?=\n\s*example:|\n\nCalls in failing runs)", user, re.DOTALL | re.MULTILINE)
        source = found[0] if found else BUGGY
        step = problem.step({"source": source}, user, asked.rng)
        return json.dumps({"analysis": "a test fails", "source": source if step is None else step[1]})
    if "The agent is a pipeline" in user:
        return json.dumps({"analysis": problem.hint(user), "change": "step is missing" in user})
    if "Change the structure of the pipeline" in user:
        return _symbolic_pipeline(asked)
    return _UNREADABLE


def _symbolic_prompt(asked: Asked) -> str:
    problem, current = asked.problem, asked.between("The part to change at present:\n", "\nWhat it is for:")
    if isinstance(problem, Principles):
        lesson = problem.lesson(current, asked.user, asked.rng)
        drop = _harmful(current) if "It was silent" in asked.user else []
        answer = {"add": [lesson] if lesson else [], "rewrite": [], "merge": [], "drop": drop}
        return json.dumps({"analysis": "a rule is missing", **answer, "helpful": [], "harmful": []})
    if '"drop"' in asked.user:  # demonstrations: the oracle knows rules, not examples
        return json.dumps({"analysis": "", "add": [], "drop": []})
    step = problem.step({"text": current}, asked.user, asked.rng)
    return json.dumps({"analysis": "a rule is missing", "text": current if step is None else step[1]})


def _symbolic_pipeline(asked: Asked) -> str:
    problem = asked.problem
    assert isinstance(problem, Steps)
    pipeline, _, rest = asked.user.partition("What has to change:")
    found = problem.node(pipeline, rest, asked.rng)
    if found is None:
        return json.dumps({"operations": []})
    after = re.findall(r"^node (\w+):[^\n]*\n  next: end", pipeline, re.MULTILINE)
    fields: dict[str, Any] = dict.fromkeys(("role", "output_format", "route", "route_prompt", "route_field"), "")
    node = {"operation": "add_node", "node": found[0], "after": after[0] if after else "write", "to": []}
    fields |= {"description": "one more step", "task": found[1], "route_cases": [], "max_visits": 0}
    return json.dumps({"operations": [{**node, **fields}]})


# --- all of them -----------------------------------------------------------------------------------------------------

FAMILIES: tuple[tuple[Callable[[str, str], bool], Callable[[Asked], str]], ...] = (
    (lambda system, user: system.startswith("You improve programs"), optoprime),
    (lambda system, user: system.startswith("You search for values"), opro),
    (lambda system, user: "part of a program that improves itself" in system, textgrad),
    (lambda system, user: system.startswith("You improve one value of a program"), textgrad),
    (lambda system, user: "how the program did with that text. Each record has" in user, reflection),
    (lambda system, user: system.startswith("You repair and improve single Python"), code),
    (lambda system, user: "You review runs" in system or "You keep a list of principles" in system, playbook),
    (lambda system, user: system.startswith("You improve an agent"), symbolic),
    (lambda system, user: system.startswith("You write instructions"), instructions),
    (lambda system, user: not system, instructions),  # what grounded proposal asks about data and program
)


class CountedOracle(ao.OracleLM):
    """The oracle of one run; it counts its calls and remembers questions that no family knows."""

    def __init__(self, problem: Problem, *, quality: float, seed: int) -> None:
        super().__init__(lambda request: answer(problem, request, seed, self.unknown), quality=quality, seed=seed)
        self.calls = 0
        self.unknown: list[str] = []

    async def send(self, request: Request) -> Reply:
        """As the oracle, counted."""
        self.calls += 1
        return await super().send(request)


def answer(problem: Problem, request: Request, seed: int, unknown: list[str]) -> str:
    """The right answer to a request: a pure function of it and the seed."""
    texts = [(turn["role"], str(turn["content"])) for turn in request.messages]
    users = [text for role, text in texts if role == "user"]
    system = "\n".join(text for role, text in texts if role == "system")
    before = texts[-2][1] if len(texts) > 1 else ""
    asked = Asked(problem, system, users[0], users[-1], before, random.Random(f"{seed}/{request.key()}"))
    for known, family in FAMILIES:
        if known(system, users[0]):
            return family(asked)
    unknown.append(f"{system[:80]} | {users[0][:80]}")
    return _UNREADABLE
