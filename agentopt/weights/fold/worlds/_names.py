"""Word lists of our own, nonsense words drawn from a seed, and the two forms of a verb."""

from __future__ import annotations

from collections.abc import Sequence

from agentopt.errors import UserError
from agentopt.evaluation._draws import seeded


def _list(words: str) -> tuple[str, ...]:
    return tuple(words.split())


WOMEN = _list(
    """
    Ada Bella Clara Dora Edith Freya Greta Hilda Ines Judith Karin Lena Mona Nadia Olga Paula Rita Selma Tilda
    Ursula Vera Wanda Yvonne Zora Alma Bianca Celia Delia Elsa Flora Gisela Helga Irma Johanna Klara Lydia
    Martha Nora Ottilie Petra Rosa Sonja Thea Ulla Viola Wilma Agnes Berta Cora Dagmar Esther Frieda Gerda
    Hedwig Ilse Jana Katja Lotte Mathilda Ronja
    """
)
MEN = _list(
    """
    Albert Boris Conrad Dario Emil Felix Gustav Hugo Igor Jonas Karl Ludwig Max Nils Otto Pavel Ralf Simon Theo
    Ulrich Viktor Walter Yannick Zeno Anton Bruno Clemens Dieter Erwin Franz Georg Henrik Ingo Jakob Kurt Leo
    Moritz Norbert Oskar Philip Ruben Stefan Tobias Uwe Valentin Wilhelm Adrian Bernd Cyrill David Edgar Fabian
    Gregor Hannes Ivan Julius Klaus Lorenz Marius Rolf
    """
)
PEOPLE = tuple(name for pair in zip(WOMEN, MEN, strict=True) for name in pair)
ANIMALS = _list("otter heron badger falcon hedgehog lynx mole raven toad weasel ferret stork marten ibex beaver")
ADJECTIVES = _list(
    """
    brave calm clever eager gentle happy honest lazy proud quick shy strong tidy wise merry stern curious polite
    loyal jolly humble patient modest nervous
    """
)
VERBS = _list("trusts greets follows helps admires warns finds meets calls hears")
"""In the third person, as they stand in a literal."""

_ONSETS = _list("b d f g k l m n p r t v z bl dr fl gr kl pl st tr")
_VOWELS = _list("a e i o u")
_CODAS = _list("b d g k l m n p r t x")


def nonsense(count: int, kind: str, seed: int, *, taken: Sequence[str] = ()) -> tuple[str, ...]:
    """So many words that mean nothing ("blomik"); the first ones are the same however many are asked for."""
    draw = seeded("nonsense", kind, seed)
    known = {word.lower() for word in (*taken, *PEOPLE, *ANIMALS, *ADJECTIVES)}
    found: list[str] = []
    while len(found) < count:
        word = draw.choice(_ONSETS) + draw.choice(_VOWELS) + draw.choice(_CODAS)
        if draw.random() < 0.6 or len(found) > 400:
            word += draw.choice(_VOWELS) + draw.choice(_CODAS)
        if kind == "verb" and word.endswith("x"):
            continue
        if len(word) > 3 and word not in known:
            known.add(word)
            found.append(word)
    return tuple(found)


def third(verb: str) -> str:
    """The third person of a regular verb: chase, chases; carry, carries."""
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        return verb + "es"
    if verb.endswith("y") and verb[-2:-1] not in _list("a e i o u"):
        return verb[:-1] + "ies"
    return verb + "s"


def base(verb: str) -> str:
    """The infinitive of a regular verb's third person."""
    if verb.endswith("ies") and len(verb) > 4:
        return verb[:-3] + "y"
    if verb.endswith(("sses", "shes", "ches", "xes", "zes", "oes")):
        return verb[:-2]
    return verb.removesuffix("s")


def chosen(given: int | tuple[str, ...], usual: Sequence[str], what: str) -> tuple[str, ...]:
    """The words of a vocabulary: the first so many of our list, or the caller's own.

    Raises:
        UserError: more than the list has, or words that are given twice or are no single words.
    """
    if isinstance(given, int):
        if given > len(usual):
            raise UserError(f"{what} is {given}; the list has {len(usual)}: give your own words, or nonsense=True.")
        return tuple(usual[:given])
    for word in given:
        if not word.replace("-", "").isalpha():
            raise UserError(f"{what}: {word!r} is no single word of letters.")
    lowered = [word.lower() for word in given]
    twice = next((word for word in lowered if lowered.count(word) > 1), None)
    if twice is not None:
        raise UserError(f"{what}: {twice!r} is given twice.")
    if not given:
        raise UserError(f"{what} is empty; expected at least one word.")
    return given
