"""`python -m agentopt.weights.fold.worlds [TASKS] [SEED]`: draws tasks of every kind and solves them a second time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from agentopt.errors import UserError
from agentopt.evaluation._draws import seeded
from agentopt.weights.fold._types import FoldTask
from agentopt.weights.fold.worlds._chains import chains
from agentopt.weights.fold.worlds._checking import check
from agentopt.weights.fold.worlds._kinship import kinship, story
from agentopt.weights.fold.worlds._options import KinshipOptions
from agentopt.weights.fold.worlds._relations import compose
from agentopt.weights.fold.worlds._rules import rules
from agentopt.weights.fold.worlds._second import role_by_steps

_Make = Callable[..., list[FoldTask]]
KINDS: tuple[tuple[_Make, dict[str, Any]], ...] = (
    (rules, {"kind": "mixed"}),
    (rules, {"kind": "mixed", "world": "closed", "depth": 2}),
    (rules, {"kind": "mixed", "depth": 5, "style": "plain", "nonsense": True}),
    (rules, {"kind": "mixed", "world": "closed", "distractors": (0, 20)}),
    (rules, {"negation": False, "depth": 1, "templates": "head-first", "proof": "goal-first"}),
    (rules, {"kind": "mixed", "distractors": (0, 20), "templates": "test"}),
    (chains, {"depth": (0, 5), "distractors": (0, 20), "ask": "statement", "style": "sentences"}),
    (chains, {"depth": (1, 4), "distractors": (10, 20), "questions": 3}),
    (kinship, {"hops": (2, 10), "questions": 3}),
    (kinship, {"hops": (2, 10), "noise": "supporting", "distractors": (2, 8), "style": "plain"}),
    (kinship, {"hops": (2, 10), "noise": "irrelevant", "distractors": (1, 8), "templates": "test"}),
    (kinship, {"hops": (2, 10), "noise": "disconnected", "distractors": (1, 8), "gendered": False}),
)


def main(arguments: Sequence[str]) -> int:
    """Print a line for every kind; 1 when the two solvers differ anywhere."""
    try:
        count, seed = (int(text) for text in (*arguments, *("1200", "0")[len(arguments) :]))
    except ValueError:
        raise UserError("expected two numbers at most: how many tasks, and a seed.") from None
    differ = 0
    for make, options in KINDS:
        began = time.process_time()
        tasks = make(max(1, count // len(KINDS)), seed=seed, **options)
        made = time.process_time()
        found = check(tasks)
        differ += len(found.disagreements)
        said = ", ".join(f"{name}={value}" for name, value in options.items())
        sys.stdout.write(
            f"{make.__name__}({said}): {found.tasks} tasks ({found.tasks / (made - began):.0f} a second of CPU), "
            f"{found.questions} questions, {found.proofs} proofs, {len(found.disagreements)} disagreements\n"
        )
        for sentence in found.disagreements[:5]:
            sys.stdout.write(f"  {sentence}\n")
    wrong = families(count, seed)
    sys.stdout.write(f"algebra against family trees: {count} stories, {wrong} disagreements\n")
    return 1 if differ or wrong else 0


def families(count: int, seed: int) -> int:
    """How many stories have another answer by the algebra than in the family they are about."""
    options = KinshipOptions(hops=(1, 10))
    wrong = 0
    for index in range(count):
        told = story(seeded("worlds.families", seed, index), options)
        a, b = told.path[0][0], told.path[-1][2]
        truth = role_by_steps(told.family, a, b)
        edges = all(role_by_steps(told.family, x, y) == role for x, role, y in told.path)
        wrong += not edges or compose([role for _, role, _ in told.path]) != frozenset({truth})
    return wrong


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
