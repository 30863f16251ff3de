"""The proposer model of `peers.py`: it reads each system's own meta-prompt and answers in that system's own format.

A call that asks for a new instruction is a rewrite (`_peer_world.rewrite`). Calls that only pass feedback on (a text
gradient, a summary of the data) are answered faithfully and never fail: they cost a call, no luck.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from _peer_world import RULES, shown

Rewrite = Callable[[str, str], str]
"""(current instruction, text with the feedback) → new instruction."""


@dataclass(frozen=True)
class Format:
    """One meta-prompt: how it is known, and what answers it. `answer(system, user, rewrite)`."""

    name: str
    known: Callable[[str, str], bool]
    answer: Callable[[str, str, Rewrite], str]


def remarks(text: str, *, without: int = 0) -> list[str]:
    """The rules that a text's feedback names, one line each."""
    bits = shown(text) & ~without
    return [f"Some cases need rule R{i + 1}: {rule}" for i, rule in enumerate(RULES) if bits >> i & 1]


def between(text: str, start: str, end: str) -> str:
    """What stands between the first `start` and the next `end`; empty when they are not there."""
    _, mark, rest = text.partition(start)
    return rest.partition(end)[0].strip() if mark else ""


# --- gepa, dspy.GEPA -------------------------------------------------------------------------------------------------


def _gepa(system: str, user: str, rewrite: Rewrite) -> str:
    text = system + user
    return f"Here is the new instruction.\n```\n{rewrite(between(text, '```', '```'), text)}\n```"


# --- dspy: field formats ---------------------------------------------------------------------------------------------


def field(text: str, name: str) -> str:
    """An input field of DSPy's chat format in the last message."""
    return between(text, f"[[ ## {name} ## ]]", "\n[[ ##")


_ASKS = "Respond with the corresponding output fields"
_ASKS_JSON = "Respond with a JSON object in the following order of fields"


def _fields(user: str) -> list[str]:
    if _ASKS_JSON in user:
        return re.findall(r"`(\w+)`", user[user.rfind(_ASKS_JSON) :])
    return re.findall(r"\[\[ ## (\w+) ## \]\]`", user[user.rfind(_ASKS) :])


def _dspy(system: str, user: str, rewrite: Rewrite) -> str:
    values: dict[str, str] = {}
    for name in _fields(user):
        if name == "completed":
            continue
        if name == "proposed_instruction":
            values[name] = rewrite(field(user, "basic_instruction"), user)
        elif name == "new_instruction":
            values[name] = rewrite(field(user, "current_instruction"), user)
        elif name == "observations":
            new = remarks(user, without=shown(field(user, "prior_observations")))
            prior = bool(field(user, "prior_observations"))
            values[name] = " ".join(new) or ("COMPLETE" if prior else "Short cases with a tag each.")
        elif name == "summary":
            values[name] = " ".join(["Cases of ships and cargo, each with a tag.", *remarks(user)])
        else:
            values[name] = "It gives the tag of a case."
    if _ASKS_JSON in user:
        return json.dumps(values)
    lines = [f"[[ ## {name} ## ]]\n{value}\n" for name, value in values.items()]
    return "\n".join([*lines, "[[ ## completed ## ]]"])


# --- textgrad --------------------------------------------------------------------------------------------------------


def _gradient(system: str, user: str, rewrite: Rewrite) -> str:
    found = remarks(user)
    return " ".join(found) + " The prompt should state it." if found else "The output is right; nothing to change."


def _textgrad(system: str, user: str, rewrite: Rewrite) -> str:
    current = between(user, "<LM_SYSTEM_PROMPT>", "</LM_SYSTEM_PROMPT>") or between(user, "<VARIABLE>", "</VARIABLE>")
    return f"<IMPROVED_VARIABLE>{rewrite(current, user)}</IMPROVED_VARIABLE>"


# --- trace-opt -------------------------------------------------------------------------------------------------------


def _trace(system: str, user: str, rewrite: Rewrite) -> str:
    variables = between(user, "\n#Variables\n", "\n#Constraints\n")
    name, current = re.match(r"\(str\) (\w+)=(.*)", variables, re.DOTALL).groups()  # type: ignore[union-attr]
    answer = {"reasoning": "The feedback says so.", "answer": "", "suggestion": {name: rewrite(current, user)}}
    return json.dumps(answer)


# --- agentopt --------------------------------------------------------------------------------------------------------


def _optoprime(system: str, user: str, rewrite: Rewrite) -> str:
    part = between(user, "#Variables\n", "#Constraints\n")
    name = re.findall(r"\(prompt\) (\S+) =", part)[0]
    value = rewrite(between(part, "<<<", ">>>"), user)
    return json.dumps({"reasoning": "The feedback says so.", "suggestion": [{"name": name, "value": value}]})


def _instructions(system: str, user: str, rewrite: Rewrite) -> str:
    return json.dumps({"instruction": rewrite(between(user, "<instruction>", "</instruction>"), user)})


def _reflection(system: str, user: str, rewrite: Rewrite) -> str:
    return f"```\n{rewrite(between(user, '```', '```'), user)}\n```"


FORMATS = (
    Format("gepa", lambda s, u: "I provided an assistant with the following instructions" in s + u, _gepa),
    Format("dspy rewrite", lambda s, u: bool({"new_instruction", "proposed_instruction"} & set(_fields(u))), _dspy),
    Format("dspy summary", lambda s, u: bool(_fields(u)), _dspy),
    Format("gradient", lambda s, u: "You are the gradient (feedback) engine" in s, _gradient),
    Format("textgrad", lambda s, u: "You are part of an optimization system that improves text" in s, _textgrad),
    Format("trace", lambda s, u: "You're tasked to solve a coding/algorithm problem" in s, _trace),
    Format("optoprime", lambda s, u: "You improve programs." in s, _optoprime),
    Format("reflection", lambda s, u: "how the program did with that text. Each record has" in u, _reflection),
    Format("instructions", lambda s, u: "You write instructions for a language model" in s, _instructions),
)


def answer(system: str, user: str, rewrite: Rewrite) -> tuple[str, str]:
    """The reply and the name of the format; format "unknown" is a gap of this file and fails the benchmark."""
    for known in FORMATS:
        if known.known(system, user):
            return known.answer(system, user, rewrite), known.name
    return "I cannot read this.", "unknown"
