"""The chainer against a goal-directed search, on any theory there is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.weights.fold.worlds import Clause, Literal, NotStratified, Theory, parse_theory, solve
from agentopt.weights.fold.worlds._logic import ANY, clause_of
from agentopt.weights.fold.worlds._second import BackwardChainer, is_proof

NAMES = ("a", "b", "c")
signs = st.booleans()


@st.composite
def literals(draw: Any, subjects: tuple[str, ...] = NAMES, *, negative: bool = True) -> Literal:
    verb = draw(st.sampled_from(("is", "sees")))
    target = draw(st.sampled_from(("red", "big", "old", "shy") if verb == "is" else NAMES))
    return Literal(draw(st.sampled_from(subjects)), verb, target, not negative or draw(st.integers(0, 3)) > 0)


@st.composite
def theories(draw: Any) -> Theory:
    world = draw(st.sampled_from(("open", "closed")))
    facts = [Clause(one) for one in draw(st.lists(literals(negative=world == "open"), min_size=1, max_size=5))]
    rules: list[Clause] = []
    for _ in range(draw(st.integers(0, 7))):
        body = tuple(draw(st.lists(literals((ANY, ANY, *NAMES)), min_size=1, max_size=3)))
        unnamed = any(part.subject == ANY for part in body)
        head = draw(literals((ANY, *NAMES) if unnamed else NAMES, negative=world == "open"))
        rules.append(Clause(head, body))
    return Theory(tuple(facts + rules), world)


@settings(max_examples=120, deadline=None)
@given(theories(), st.lists(literals(), min_size=6, max_size=6))
def test_rounds_over_grounded_rules_and_a_search_from_the_goal_agree(theory: Theory, asked: list[Literal]) -> None:
    try:
        solution = solve(theory)
    except NotStratified:
        return
    second = BackwardChainer(theory)
    for literal in [*asked, *solution.derived()]:
        if solution.contradictory:
            # Then "true" is what is found first; what can be proved must be the same all the same.
            assert (literal in solution.derived()) == (second.depth(literal) is not None)
            continue
        assert solution.truth(literal) == second.truth(literal)
        proved = literal if second.depth(literal) is not None else literal.opposite()
        if theory.world == "closed":
            proved = literal._replace(positive=True)
        assert solution.depth(literal) == second.depth(proved)
        proof = solution.proof(literal)
        assert bool(proof) == (solution.depth(literal) is not None)
        assert not proof or is_proof(theory, proved, proof)


def test_a_proof_has_premises_first_and_the_fewest_rules_in_a_row() -> None:
    theory = parse_theory(
        "Ada is red. Red people are big. Big people are old. If someone is red and old then they are shy. Red people "
        "are shy. If Ada is shy then Ada is calm."
    )
    solution = solve(theory)
    assert solution.proof(Literal("Ada", "is", "calm")) == (0, 4, 5)
    assert solution.depth(Literal("Ada", "is", "calm")) == 2
    assert solution.deepest == 2
    assert solution.truth(Literal("Ada", "is", "calm", positive=False)) is False
    assert solution.truth(Literal("Ada", "is", "tall")) is None
    assert solution.truth(Literal("Eva", "is", "red")) is None


def test_absence_counts_in_a_closed_world_only() -> None:
    text = "Ada is red. Eva is big. If someone is red and not big then they are old. Old people are calm."
    old, calm = Literal("Ada", "is", "old"), Literal("Ada", "is", "calm")
    assert solve(parse_theory(text)).truth(calm) is None
    closed = solve(parse_theory(text, world="closed"))
    assert closed.truth(calm) is True and closed.depth(calm) == 2 and closed.proof(old) == (0, 2)
    assert closed.truth(Literal("Eva", "is", "old")) is False
    with pytest.raises(NotStratified, match="its own absence"):
        solve(parse_theory("Ada is red. If someone is not big then they are big.", world="closed"))


def test_contradictions_are_seen() -> None:
    assert solve(parse_theory("Ada is red. Red people are not calm. Ada is calm.")).contradictory
    assert not solve(parse_theory("Ada is red. Red people are not calm.")).contradictory


def test_records_of_clauses_are_read_back() -> None:
    for clause in parse_theory("Ada is red. If something chases the dog then it is not red.").clauses:
        assert clause_of(clause.record()) == clause
    with pytest.raises(UserError, match="about everything"):
        solve(Theory((Clause(Literal(ANY, "is", "red")),)))
