"""Second solvers, built otherwise than the first ones, to check what the generators claim.

Rule theories: goal-directed search by depth, on the literals as they are written, instead of rounds over grounded
rules; and a checker of proofs. Kinship: steps up, down and across through the family, instead of the algebra.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cache
from itertools import count

from agentopt.weights.fold.worlds._family import Family
from agentopt.weights.fold.worlds._logic import ANY, Clause, Literal, Theory

_STEPS = {
    "U": "parent",
    "D": "child",
    "M": "spouse",
    "UD": "sibling",
    "DD": "grandchild",
    "UU": "grandparent",
    "DM": "child-in-law",
    "MU": "parent-in-law",
    "MUD": "sibling-in-law",
    "UDM": "sibling-in-law",
    "UDD": "nephew",
    "UUD": "uncle",
}
"""Up to a parent, down to a child, across a marriage: the shortest way from a to b says what b is to a."""


class BackwardChainer:
    """Proves a goal by looking for a fact or a rule that ends in it, one level of rules deeper at a time."""

    def __init__(self, theory: Theory) -> None:
        self._theory = theory
        self._closed = theory.world == "closed"
        self._within = cache(self._search)
        self.depth = cache(self._least)
        """The least depth of a proof of a literal; None when there is none."""

    def _least(self, goal: Literal) -> int | None:
        """Deeper and deeper, until the goal is reached or a level proves no more of what it depends on."""
        goals = self._subgoals(goal)
        before: set[Literal] = set()
        for depth in count():
            now = {one for one in goals if self._within(one, depth)}
            if goal in now:
                return depth
            if depth and now == before:
                return None
            before = now
        raise AssertionError("a level always adds something or ends the search")

    def _subgoals(self, goal: Literal) -> list[Literal]:
        """Everything a proof of the goal could use, the goal included."""
        found = {goal: None}
        waiting = [goal]
        while waiting:
            for body in self._bodies(waiting.pop()):
                for part in body:
                    if part not in found and not (self._closed and not part.positive):
                        found[part] = None
                        waiting.append(part)
        return list(found)

    def truth(self, literal: Literal) -> bool | None:
        """As `Solution.truth`."""
        if self._closed:
            return (self.depth(literal._replace(positive=True)) is not None) == literal.positive
        if self.depth(literal) is not None:
            return True
        return False if self.depth(literal.opposite()) is not None else None

    def _search(self, goal: Literal, depth: int) -> bool:
        bodies = self._bodies(goal)
        if not depth or () in bodies:
            return () in bodies
        return any(all(self._holds(part, depth - 1) for part in body) for body in bodies)

    def _bodies(self, goal: Literal) -> list[tuple[Literal, ...]]:
        """What would have to hold, one entry for each way; a fact asks for nothing."""
        found: list[tuple[Literal, ...]] = []
        for head, body in self._theory.clauses:
            if self._closed and not head.positive:
                continue
            if head == goal:
                found += self._instances(body)
            elif head.subject == ANY and head[1:] == goal[1:]:
                found.append(tuple(literal.about(goal.subject) for literal in body))
        return found

    def _instances(self, body: Sequence[Literal]) -> list[tuple[Literal, ...]]:
        if all(literal.subject != ANY for literal in body):
            return [tuple(body)]
        return [tuple(literal.about(name) for literal in body) for name in self._theory.entities()]

    def _holds(self, literal: Literal, depth: int) -> bool:
        if self._closed and not literal.positive:
            return self.depth(literal.opposite()) is None
        return self._within(literal, depth)


def is_proof(theory: Theory, goal: Literal, places: Sequence[int]) -> bool:
    """Whether the statements at these places, taken in this order, lead to the goal and each can be used when it comes.

    What a closed world takes from absence is absent in the whole theory.
    """
    judge = BackwardChainer(theory)
    known: set[Literal] = set()
    seen: list[Clause] = []
    for place in places:
        clause = theory.clauses[place]
        new = _conclusions(theory, clause, known, judge)
        if not new:
            return False
        seen.append(clause)
        known |= new
        while True:  # a rule may serve again for somebody else
            more = {found for rule in seen for found in _conclusions(theory, rule, known, judge)} - known
            if not more:
                break
            known |= more
    return goal in known


def _conclusions(theory: Theory, clause: Clause, known: set[Literal], judge: BackwardChainer) -> set[Literal]:
    if not clause.body:
        return {clause.head}
    found: set[Literal] = set()
    for name in theory.entities():
        body = [literal.about(name) for literal in clause.body]
        absent = [part for part in body if theory.world == "closed" and not part.positive]
        needed = [part for part in body if part not in absent]
        if all(part in known for part in needed) and all(judge.truth(part) for part in absent):
            found.add(clause.head.about(name))
    return found


def role_by_steps(family: Family, a: int, b: int) -> str | None:
    """What b is to a, by the shortest way through parents, children and marriages; None for more distant kin."""
    ways = {a: ""}
    queue = deque([a])
    while queue and b not in ways:
        here = queue.popleft()
        person = family.people[here]
        across = [] if person.spouse is None else [person.spouse]
        for step, others in (("U", person.parents), ("D", person.children), ("M", across)):
            for other in others:
                if other not in ways:
                    ways[other] = ways[here] + step
                    queue.append(other)
    return _STEPS.get(ways.get(b, ""))
