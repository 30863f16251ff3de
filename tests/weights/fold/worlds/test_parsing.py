"""English sentences to clauses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.weights.fold import worlds
from agentopt.weights.fold.worlds import Clause, Literal, parse_statement, parse_theory, sentences
from agentopt.weights.fold.worlds._names import base, third


def literal(text: str) -> Literal:
    """ "? not is red": subject, perhaps "not", verb, object."""
    words = text.replace(" not ", " ").split()
    return Literal(words[0], words[1], " ".join(words[2:]), " not " not in text)


@pytest.mark.parametrize(
    ("text", "body", "head"),
    [
        ("Ada is brave.", "", "Ada is brave"),
        ("The cat chases the bald eagle.", "", "cat chases bald eagle"),
        ("The cat does not chase Ada.", "", "cat not chases Ada"),
        ("It is known that Ada is red.", "", "Ada is red"),
        ("All red, cold things are round.", "? is red, ? is cold", "? is round"),
        ("Nice people are not sad.", "? is nice", "? not is sad"),
        ("Everyone who is red and not shy is calm.", "? is red, ? not is shy", "? is calm"),
        ("If someone is red and not shy then they are calm.", "? is red, ? not is shy", "? is calm"),
        ("If something eats Bo and it does not need Eva then it is red.", "? eats Bo, ? not needs Eva", "? is red"),
        ("If someone sees the cat then they see the cow.", "? sees cat", "? sees cow"),
        ("If something likes Eva and Eva is big then Eva sees the dog.", "? likes Eva, Eva is big", "Eva sees dog"),
        ("If Ada is red and Ada is shy then Ada is calm.", "Ada is red, Ada is shy", "Ada is calm"),
        ("Someone is calm if they are red and shy.", "? is red, ? is shy", "? is calm"),
        ("Ada is calm if Eva is red.", "Eva is red", "Ada is calm"),
    ],
)  # fmt: skip
def test_forms(text: str, body: str, head: str) -> None:
    (clause,) = parse_theory(text).clauses
    assert clause == Clause(literal(head), tuple(literal(part) for part in body.split(", ") if part))


def test_a_kind_of_animal_may_have_two_words() -> None:
    (clause,) = parse_theory("The bald eagle is not kind.").clauses
    assert clause.head == Literal("bald eagle", "is", "kind", positive=False)


def test_the_plain_style_tells_names_from_attributes() -> None:
    said = ["ada is red", "red is big", "big and not shy is old", "calm if old"]
    said += ["if x sees cat and x is big then x is shy", "cat not sees cat"]
    clauses = parse_theory("\n".join(said)).clauses
    assert [len(clause.body) for clause in clauses] == [0, 1, 2, 1, 2, 0]
    assert clauses[-1].head == Literal("cat", "sees", "cat", positive=False)
    assert parse_theory(["red is big"], names=["red"]).clauses[0].body == ()


def test_questions() -> None:
    for text in (
        "Is it true that Ada is not red?",
        "Based on the above information, is the following statement true, false, or unknown? Ada is not red.",
        "Ada is not red",
    ):
        assert parse_statement(text) == Literal("Ada", "is", "red", positive=False)
    with pytest.raises(UserError, match="no statement"):
        parse_statement("Is somebody there?")
    with pytest.raises(UserError, match="no statement"):
        parse_statement("Is it true that someone is red?")


def test_a_sentence_that_cannot_be_read_is_named() -> None:
    with pytest.raises(UserError, match=r"sentence 2 is 'Perhaps not\.'"):
        parse_theory("Ada is red. Perhaps not.")
    assert sentences("A is b. C is d!\n\nE is f") == ("A is b.", "C is d!", "E is f")


@given(st.text(max_size=60))
def test_wild_text_is_read_or_refused(text: str) -> None:
    try:
        parse_theory(text)
        parse_statement(text)
    except UserError:
        pass


def test_what_the_generator_writes_is_what_it_meant() -> None:
    from agentopt.weights.fold.worlds._logic import clause_of

    for style in ("sentences", "plain"):
        for task in worlds.rules(30, seed=12, kind="mixed", style=style):
            meant = [clause_of(record) for record in task.meta["logic"]]
            names = {part.subject for clause in meant for part in (clause.head, *clause.body)}
            names |= {part.object for clause in meant for part in (clause.head, *clause.body) if part.verb != "is"}
            read = parse_theory(task.facts, names=sorted(names)).clauses
            assert [str(clause).lower() for clause in read] == [str(clause).lower() for clause in meant]


def test_verbs_have_two_forms() -> None:
    for verb in ("chase", "see", "carry", "play", "watch", "pass", "use", "like", "go"):
        assert base(third(verb)) == verb
