"""The forward chainer: everything that follows from a theory, with the depth and one smallest proof of each literal.

Rules are grounded over the names of the theory and applied in rounds: a literal that appears in round d has a proof in
which no branch applies more than d rules, and none with fewer. Of the proofs of that depth the one that cites fewest
statements is kept (chosen step by step, so it is not always the smallest of all). Negation as failure is computed
stratum by stratum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from agentopt.errors import UserError
from agentopt.weights.fold.worlds._logic import ANY, Literal, Theory

_Ground = tuple[int, tuple[int, ...], tuple[int, ...], int]
"""Clause, premises that must be derived, premises that must not be, head."""


class NotStratified(UserError):
    """A closed world in which something depends on its own absence."""


class Solution:
    """What follows from a theory. Made by `solve`."""

    def __init__(self, theory: Theory) -> None:
        self.theory = theory
        entities = {name: place for place, name in enumerate(theory.entities())}
        self._entities = entities
        self._properties: dict[tuple[str, str], int] = {}
        self._depth: dict[int, int] = {}
        self._cited: dict[int, int] = {}  # a bit for every statement of the proof
        self._support: dict[int, tuple[int, tuple[int, ...]]] = {}
        closed = theory.world == "closed"
        ground: list[_Ground] = []
        for place, clause in enumerate(theory.clauses):
            if closed and not clause.head.positive:
                continue
            if not clause.body:
                self._add_fact(place, clause.head)
            else:
                ground += self._grounded(place, clause.head, clause.body, closed)
        for rules in self._strata(ground) if closed and any(rule[2] for rule in ground) else (ground,):
            self._close(rules)

    def truth(self, literal: Literal) -> bool | None:
        """True or False where the theory says so; None for unknown (open world only)."""
        if self.theory.world == "closed":
            found = self._code(literal if literal.positive else literal.opposite()) in self._depth
            return found == literal.positive
        if self._code(literal) in self._depth:
            return True
        return False if self._code(literal.opposite()) in self._depth else None

    def depth(self, literal: Literal) -> int | None:
        """Rule applications on the longest branch of the shallowest proof of the literal or of its opposite."""
        found = self._settled(literal)
        return None if found is None else self._depth[found]

    def proof(self, literal: Literal) -> tuple[int, ...]:
        """Places of the statements that prove the literal or its opposite, premises first; empty when none do."""
        found = self._settled(literal)
        order: dict[int, None] = {}
        if found is not None:
            self._walk(found, order)
        return tuple(order)

    def derived(self) -> dict[Literal, int]:
        """Every literal that can be proved, with its depth."""
        names = tuple(self._entities)
        properties = tuple(self._properties)
        found: dict[Literal, int] = {}
        for code, depth in self._depth.items():
            signed, subject = divmod(code, len(names))
            verb, what = properties[signed >> 1]
            found[Literal(names[subject], verb, what, not signed & 1)] = depth
        return found

    @property
    def deepest(self) -> int:
        """The largest depth; 0 when no rule applies."""
        return max(self._depth.values(), default=0)

    @property
    def contradictory(self) -> bool:
        """Whether some statement and its negation can both be proved (open world)."""
        count = len(self._entities)
        return any(code + count in self._depth for code in self._depth if not code // count & 1)

    def _code(self, literal: Literal) -> int:
        """A number for a ground literal: 2 x property + sign, times the names, plus the name; -1 for a new one."""
        name = self._entities.get(literal.subject)
        what = self._properties.get((literal.verb, literal.object))
        if name is None or what is None:
            return -1
        return (2 * what + (not literal.positive)) * len(self._entities) + name

    def _signed(self, literal: Literal) -> int:
        properties = self._properties
        what = properties.setdefault((literal.verb, literal.object), len(properties))
        return (2 * what + (not literal.positive)) * len(self._entities)

    def _settled(self, literal: Literal) -> int | None:
        for code in (self._code(literal), self._code(literal.opposite())):
            if code in self._depth:
                return code
        return None

    def _add_fact(self, place: int, literal: Literal) -> None:
        if literal.subject == ANY:
            raise UserError(f"a fact about everything ({literal.verb} {literal.object}); expected a name.")
        code = self._signed(literal) + self._entities[literal.subject]
        if code not in self._depth:
            self._depth[code] = 0
            self._cited[code] = 1 << place
            self._support[code] = (place, ())

    def _grounded(self, place: int, head: Literal, body: Sequence[Literal], closed: bool) -> list[_Ground]:
        """One instance for every name, or one when the rule has no variable."""
        entities = self._entities
        needs: list[tuple[int, int]] = []
        absent: list[tuple[int, int]] = []
        for literal in body:
            where = -1 if literal.subject == ANY else entities[literal.subject]
            if closed and not literal.positive:
                absent.append((self._signed(literal.opposite()), where))
            else:
                needs.append((self._signed(literal), where))
        base = self._signed(head)
        at = -1 if head.subject == ANY else entities[head.subject]
        everyone = range(len(entities)) if at < 0 or any(where < 0 for _, where in (*needs, *absent)) else range(1)
        return [
            (
                place,
                tuple([code + (name if where < 0 else where) for code, where in needs]),
                tuple([code + (name if where < 0 else where) for code, where in absent]),
                base + (name if at < 0 else at),
            )
            for name in everyone
        ]

    def _strata(self, ground: list[_Ground]) -> list[list[_Ground]]:
        """The rules in layers: what a layer needs absent is decided in the layers before it."""
        count = len(self._entities)
        level = dict.fromkeys(range(2 * len(self._properties)), 0)
        for _ in range(len(level) + 1):
            changed = False
            for _, needs, absent, head in ground:
                least = max(
                    [level[code // count] for code in needs] + [level[code // count] + 1 for code in absent], default=0
                )
                if level[head // count] < least:
                    level[head // count] = least
                    changed = True
            if not changed:
                break
        else:
            raise NotStratified("a closed-world theory in which something follows from its own absence; no answer.")
        layers: list[list[_Ground]] = [[] for _ in range(max(level.values(), default=0) + 1)]
        for rule in ground:
            layers[level[rule[3] // count]].append(rule)
        return layers

    def _close(self, rules: Iterable[_Ground]) -> None:
        """Apply rules until nothing new follows, shallow conclusions first."""
        depth, cited, support = self._depth, self._cited, self._support
        waiting = [rule for rule in rules if rule[3] not in depth and not any(code in depth for code in rule[2])]
        last = max(depth.values(), default=0)
        round_ = 0
        while waiting and round_ <= last:
            found: dict[int, tuple[int, int, tuple[int, ...]]] = {}
            left: list[_Ground] = []
            for rule in waiting:
                place, needs, _, head = rule
                marks = 1 << place
                for code in needs:
                    if depth.get(code, round_ + 1) > round_:
                        left.append(rule)
                        break
                    marks |= cited[code]
                else:
                    if head not in found or marks.bit_count() < found[head][0].bit_count():
                        found[head] = (marks, place, needs)
            round_ += 1
            for head, (marks, place, needs) in found.items():
                depth[head], cited[head], support[head] = round_, marks, (place, needs)
            if found:
                last = max(last, round_)
                left = [rule for rule in left if rule[3] not in found]
            waiting = left

    def _walk(self, code: int, order: dict[int, None]) -> None:
        place, needs = self._support[code]
        for premise in needs:
            self._walk(premise, order)
        order[place] = None


def solve(theory: Theory) -> Solution:
    """Everything that follows from the theory.

    Raises:
        UserError: a closed world in which something depends on its own absence.
    """
    return Solution(theory)
