"""A family drawn at random, and who is what to whom: read off parents, spouses and children, without the algebra."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

_CHILDREN = ((2, 4), (1, 3), (0, 2))
"""Of a couple, by generation; everybody who can have children is married."""


@dataclass(slots=True)
class Person:
    """One member. People who married in have no parents here."""

    woman: bool
    spouse: int | None = None
    parents: tuple[int, ...] = ()
    children: list[int] = field(default_factory=list[int])


class Family:
    """A root couple and its descendants with their spouses."""

    def __init__(self, draw: random.Random) -> None:
        self.people: list[Person] = []
        couples = [self._couple(draw, ())]
        for low, high in _CHILDREN:
            couples = [self._couple(draw, couple) for couple in couples for _ in range(draw.randint(low, high))]
        self._kin: dict[int, dict[int, str]] = {}

    def _couple(self, draw: random.Random, parents: tuple[int, ...]) -> tuple[int, int]:
        woman = draw.random() < 0.5
        one, other = len(self.people), len(self.people) + 1
        self.people += [Person(woman, other, parents), Person(not woman, one)]
        for parent in parents:
            self.people[parent].children.append(one)
        return one, other

    def kin(self, person: int) -> dict[int, str]:
        """Everybody who has a role for this person."""
        if person not in self._kin:
            self._kin[person] = {other: role for role, others in self._roles(person).items() for other in others}
        return self._kin[person]

    def siblings(self, person: int) -> list[int]:
        """Brothers and sisters."""
        parents = self.people[person].parents
        return [child for child in self.people[parents[0]].children if child != person] if parents else []

    def _spouses(self, person: int) -> list[int]:
        spouse = self.people[person].spouse
        return [] if spouse is None else [spouse]

    def _roles(self, person: int) -> dict[str, list[int]]:
        people, siblings = self.people, self.siblings(person)
        me = people[person]
        spouses = self._spouses(person)
        return {
            "child": me.children,
            "parent": list(me.parents),
            "spouse": spouses,
            "sibling": siblings,
            "grandchild": [other for child in me.children for other in people[child].children],
            "grandparent": [other for parent in me.parents for other in people[parent].parents],
            "child-in-law": [other for child in me.children for other in self._spouses(child)],
            "parent-in-law": [other for spouse in spouses for other in people[spouse].parents],
            "sibling-in-law": [
                *(other for spouse in spouses for other in self.siblings(spouse)),
                *(other for sibling in siblings for other in self._spouses(sibling)),
            ],
            "nephew": [other for sibling in siblings for other in people[sibling].children],
            "uncle": [other for parent in me.parents for other in self.siblings(parent)],
        }
