"""The problem that `peers.py` gives to every system: cases whose right answer needs rules the instruction must state.

Six short rules are hidden. A case needs one or two of them; the task model answers it rightly only when its instruction
states them word for word. The metric's feedback names the rules a wrong case needs, the same text for every system.
Nothing here imports anything but the standard library: the file is used in our environment and in the peers'.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from functools import lru_cache

RULES = (
    "Name the harbour before the ship.",
    "Count only crates with blue lids.",
    "Round every weight up to full tons.",
    "Leave out cargo that was returned.",
    "Read dates as day, month and year.",
    "Treat a missing mark as a grey tag.",
)
WEIGHTS = (0.22, 0.20, 0.18, 0.16, 0.13, 0.11)
"""How often a case needs each rule; without any one of them less than 90 % of the cases can be right."""
PAIRS = 0.4
"""Share of the cases that need two rules."""
START = "Give the tag of the case."
WRONG = "tag-none"
HIDDEN_ROWS = 1000
ALL = (1 << len(RULES)) - 1

_HEADS = (
    ("Give", "State", "Write", "Return", "Find", "Report"),
    ("the tag", "the right tag", "the fitting tag", "one tag", "the tag alone", "the proper tag"),
    ("of the case.", "for the case.", "for this case.", "that fits the case.", "of the given case.", "for each case."),
)
_CASE = re.compile(r"Case (\d+):")


@dataclass(frozen=True)
class Row:
    """One case: its text, the right answer, and the rules it needs as bits."""

    case: str
    answer: str
    needs: int

    @property
    def remark(self) -> str:
        """What the metric says about a wrong answer."""
        named = [f"rule R{i + 1}: {RULES[i]}" for i in range(len(RULES)) if self.needs >> i & 1]
        return "wrong: this case needs " + " and ".join(named)


def stated(text: str) -> int:
    """The rules that a text states, as bits."""
    return sum(1 << i for i, rule in enumerate(RULES) if rule in text)


def shown(text: str) -> int:
    """The rules that feedback in a text names in full, as bits."""
    return sum(1 << i for i, rule in enumerate(RULES) if f"R{i + 1}: {rule}" in text)


def _draw(rng: random.Random, start: int, count: int) -> list[Row]:
    rows: list[Row] = []
    for number in range(start, start + count):
        first = rng.choices(range(len(RULES)), WEIGHTS)[0]
        needs = 1 << first
        if rng.random() < PAIRS:
            others = [i for i in range(len(RULES)) if i != first]
            needs |= 1 << rng.choices(others, [WEIGHTS[i] for i in others])[0]
        ship = rng.choice(("brig", "sloop", "barge", "ketch", "tug", "yawl"))
        cargo = rng.choice(("salt", "wool", "tea", "coal", "rope", "grain", "glass"))
        text = f"Case {number}: {ship}, {cargo}, quay {rng.randrange(1, 30)}."
        answer = "tag-" + hashlib.sha256(f"{number}/{rng.random()}".encode()).hexdigest()[:4]
        rows.append(Row(text, answer, needs))
    return rows


class World:
    """The rows of one seed. Train and validation are what a system sees; the hidden rows judge it."""

    def __init__(self, seed: int, train: int = 40, validation: int = 40) -> None:
        rng = random.Random(f"peers/{seed}")
        self.seed = seed
        self.train = _draw(rng, 1000, train)
        self.validation = _draw(rng, 2000, validation)
        self._hidden = [row.needs for row in _draw(rng, 3000, HIDDEN_ROWS)]
        self._rows = {self.number(row.case): row for row in (*self.train, *self.validation)}

    @staticmethod
    def number(text: str) -> str:
        """The number of the last case that a text speaks of; empty when there is none."""
        found = _CASE.findall(text)
        return found[-1] if found else ""

    def row(self, text: str) -> Row:
        """The row of the last case that a text speaks of."""
        return self._rows[self.number(text)]

    def judge(self, text: str, reply: str) -> tuple[float, str]:
        """The metric: score and feedback for the reply to a case."""
        row = self.row(text)
        return (1.0, "right") if reply.strip() == row.answer else (0.0, row.remark)

    def reply(self, instruction: str, text: str) -> str:
        """What the task model answers."""
        row = self._rows.get(self.number(text))
        return row.answer if row is not None and not row.needs & ~stated(instruction) else WRONG

    def truth(self, instruction: str) -> float:
        """Accuracy on the hidden rows; 1 is the optimum."""
        return self._truth(stated(instruction))

    @lru_cache(maxsize=128)  # noqa: B019  (a world lives as long as its process)
    def _truth(self, known: int) -> float:
        return sum(not needs & ~known for needs in self._hidden) / len(self._hidden)


def draw(seed: int, number: int) -> random.Random:
    """What decides rewrite `number` of a run: a function of the run's seed and that number, never of the system."""
    return random.Random(f"rewrite/{seed}/{number}")


def rewrite(current: str, prompt: str, rng: random.Random, quality: float) -> str:
    """An instruction in new words that states what `current` states; with chance `quality` one more rule.

    The rule is one that the feedback in `prompt` names and `current` does not state; without such a rule the rewrite
    is of no use.
    """
    useful = rng.random() < quality
    head = " ".join(rng.choice(part) for part in _HEADS)
    pick = rng.random()
    known = stated(current)
    missing = [i for i in range(len(RULES)) if (shown(prompt) & ~known) >> i & 1]
    order = sorted((i for i in range(len(RULES)) if known >> i & 1), key=lambda i: current.index(RULES[i]))
    if useful and missing:
        order.append(missing[int(pick * len(missing))])
    return " ".join([head, *(RULES[i] for i in order)])
