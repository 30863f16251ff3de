"""The nouns of a rule theory: literals, clauses (a fact is a clause without a body) and the theory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from typing import Literal as OneOf

ANY = "?"
"""The subject of a literal that is about whoever the rule is about; a rule has one such variable at most."""
IS = "is"
"""The verb of an attribute: "Ada is red" is (Ada, is, red)."""
World = OneOf["open", "closed"]


class Literal(NamedTuple):
    """A statement about one subject: an attribute (`verb` is "is") or a relation to another."""

    subject: str
    verb: str
    object: str
    positive: bool = True

    def opposite(self) -> Literal:
        """The same with the other sign."""
        return Literal(self.subject, self.verb, self.object, not self.positive)

    def about(self, entity: str) -> Literal:
        """With the variable replaced."""
        return Literal(entity, self.verb, self.object, self.positive) if self.subject == ANY else self


class Clause(NamedTuple):
    """Body implies head; a fact has no body."""

    head: Literal
    body: tuple[Literal, ...] = ()

    def record(self) -> dict[str, Any]:
        """As JSON: {"head": [subject, verb, object, positive], "body": [...]}."""
        return {"head": list(self.head), "body": [list(literal) for literal in self.body]}


def clause_of(record: Mapping[str, Any]) -> Clause:
    """A clause from its record."""
    return Clause(Literal(*record["head"]), tuple(Literal(*literal) for literal in record["body"]))


@dataclass(frozen=True, slots=True)
class Theory:
    """Facts and rules in the order of their sentences.

    In the open world a negative literal is a statement like any other, and what is not derived is unknown. In the
    closed world what is not derived is false: a negative literal in a body holds when its positive form cannot be
    derived (stratified), and a clause with a negative head says nothing new.
    """

    clauses: tuple[Clause, ...]
    world: World = "open"

    def entities(self) -> tuple[str, ...]:
        """Every name, in the order of appearance."""
        found: dict[str, None] = {}
        for clause in self.clauses:
            for literal in (*clause.body, clause.head):
                if literal.subject != ANY:
                    found[literal.subject] = None
                if literal.verb != IS:
                    found[literal.object] = None
        return tuple(found)
