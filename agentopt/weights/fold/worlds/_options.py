"""What may be asked of the generators; every option is checked by name, type and range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal as OneOf
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from agentopt.errors import UserError
from agentopt.weights.fold.worlds._logic import World
from agentopt.weights.fold.worlds._names import (
    ADJECTIVES,
    ANIMALS,
    MEN,
    PEOPLE,
    VERBS,
    WOMEN,
    base,
    chosen,
    nonsense,
    third,
)
from agentopt.weights.fold.worlds._parsing import RESERVED
from agentopt.weights.fold.worlds._render import Style, Templates

Range = tuple[int, int]
Kind = OneOf["attributes", "relations", "mixed"]


_LEAST = {"names": 1, "animals": 1, "attributes": 1, "verbs": 1, "women": 0, "men": 0}


@dataclass(frozen=True, slots=True)
class Words:
    """A vocabulary: names (or kinds of animals), attributes, and verbs in the third person."""

    names: tuple[str, ...]
    attributes: tuple[str, ...]
    verbs: tuple[str, ...] = ()


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    style: Style = "sentences"
    """"plain" for word-level models: few words, lower case, no stops."""
    nonsense: bool = False
    """Words that mean nothing instead of names and adjectives, against what a model knows already."""
    nonsense_seed: int = Field(default=0, ge=0)
    """Which such words; the same for every task, so that a vocabulary can be listed."""
    shuffle: bool = True
    """Statements in random order; otherwise what is relevant comes first."""

    @model_validator(mode="after")
    def _vocabulary_is_enough(self) -> Self:
        for field, least in _LEAST.items():
            count = getattr(self, field, least)
            if isinstance(count, int) and count < least:
                raise ValueError(f"{field} is {count}, expected {least} or more")
        words: tuple[str, ...] = getattr(self, "words", ())
        said = {word.strip().casefold() for word in words}
        if "" in said or len(said) < len(words):
            raise ValueError(f"words is {list(words)}, expected answers that differ")
        return self

    def _list(self, given: int | tuple[str, ...], usual: tuple[str, ...], what: str, kind: str) -> tuple[str, ...]:
        if self.nonsense and isinstance(given, int):
            words = nonsense(given, kind, self.nonsense_seed)
            return tuple(word.capitalize() for word in words) if kind == "name" else words
        return chosen(given, usual, what)


class ChainOptions(_Options):
    """Options of `chains`."""

    depth: int | Range = 2
    """Rules applied: a chain is a fact and so many rules."""
    distractors: int | Range = 0
    """Statements beside the chain of a question: exactly so many, or so many to so many."""
    questions: int = Field(default=1, ge=1)
    """Per task, each with a chain of its own; the others' chains are distractors too."""
    ask: OneOf["end", "statement"] = "end"
    """"end" asks for the last attribute of a chain, "statement" whether somebody has an attribute (closed world)."""
    names: int | tuple[str, ...] = Field(default=8)
    attributes: int | tuple[str, ...] = Field(default=16)
    templates: Templates = "all"
    style: Style = "plain"
    proof: OneOf["facts-first", "goal-first"] = "facts-first"
    """Order of the relevant statements: premises before what follows from them, or from the goal down to the facts."""
    words: tuple[str, str] = ("yes", "no")

    @model_validator(mode="after")
    def _checked(self) -> Self:
        _range(self.depth, "depth", 0)
        _range(self.distractors, "distractors", 0)
        return self

    def vocabulary(self) -> Words:
        """The words the tasks are made of."""
        names = self._list(self.names, PEOPLE, "names", "name")
        return _apart(Words(names, self._list(self.attributes, ADJECTIVES, "attributes", "attribute")))


class RuleOptions(_Options):
    """Options of `rules`."""

    depth: int = Field(default=3, ge=0, le=12)
    """The deepest literal of a theory has exactly this depth."""
    depths: tuple[int, ...] | None = None
    """Depths of the questions that have a proof; None for 0 to `depth`."""
    world: World = "open"
    negation: bool = True
    """Open world: negative facts and heads. Closed world: negation as failure in bodies (stratified)."""
    kind: Kind = "attributes"
    """Attributes of people, relations between animals (30 % attributes), or either, drawn for each theory."""
    facts: Range = (1, 16)
    rules: Range = (1, 8)
    """Facts and rules of a theory; at least as many as its depth needs."""
    body: Range = (1, 2)
    """Conditions of a rule."""
    people: Range = (2, 4)
    """Different names (or animals) of one theory."""
    distractors: int | Range | OneOf["all"] = "all"
    """"all": whole theories with `questions` questions. A number: one question per task, its proof and exactly so many
    other statements."""
    questions: int = Field(default=18, ge=1)
    proof: OneOf["facts-first", "goal-first"] = "facts-first"
    """Order of the relevant statements: premises before what follows from them, or from the goal down to the facts."""
    negated: bool = True
    """Ask negated statements too."""
    unknown: bool = True
    """Open world: ask what nothing settles too. Without it negation is needed, or the sign would tell the answer."""
    unique_heads: bool = False
    """No two rules of a theory conclude the same attribute (or relation to the same one)."""
    names: int | tuple[str, ...] = 8
    animals: int | tuple[str, ...] = 10
    attributes: int | tuple[str, ...] = 14
    verbs: int | tuple[str, ...] = 6
    """Infinitives of regular verbs, when they are your own."""
    templates: Templates = "all"
    """Sentences in all forms, in all but the last one ("train"), or in the last one only ("test"); rules that all
    begin with their head or with their body."""
    words: tuple[str, str, str] = ("yes", "no", "unknown")

    @model_validator(mode="after")
    def _checked(self) -> Self:
        _range(self.facts, "facts", 1)
        _range(self.rules, "rules", 0)
        _range(self.body, "body", 1)
        _range(self.people, "people", 1)
        if self.distractors != "all":
            _range(self.distractors, "distractors", 0)
        if self.rules[1] < self.depth:
            raise ValueError(f"rules is at most {self.rules[1]}, a depth of {self.depth} needs as many rules")
        if self.world == "open" and not self.unknown and not self.negation:
            raise ValueError("without unknown questions and without negation every statement asked would be true")
        wrong = [depth for depth in self.depths or () if not 0 <= depth <= self.depth]
        if wrong or self.depths == ():
            raise ValueError(f"depths is {list(self.depths or ())}, expected numbers from 0 to {self.depth}")
        return self

    def vocabulary(self, *, relations: bool) -> Words:
        """The words of theories about attributes, or of those about relations."""
        attributes = self._list(self.attributes, ADJECTIVES, "attributes", "attribute")
        if not relations:
            return _apart(Words(self._list(self.names, PEOPLE, "names", "name"), attributes))
        names = self._list(self.animals, ANIMALS, "animals", "animal")
        if isinstance(self.verbs, int) and not self.nonsense:
            return _apart(Words(names, attributes, chosen(self.verbs, VERBS, "verbs")))
        verbs = self._list(self.verbs, VERBS, "verbs", "verb")
        irregular = next((verb for verb in verbs if base(third(verb)) != verb), None)
        if irregular is not None:
            raise UserError(f"verbs: {irregular!r} cannot be told from its third person {third(irregular)!r}.")
        return _apart(Words(names, attributes, tuple(third(verb) for verb in verbs)))


class KinshipOptions(_Options):
    """Options of `kinship`."""

    hops: int | Range = (2, 4)
    """Edges on the path of a question."""
    noise: OneOf["none", "supporting", "irrelevant", "disconnected"] = "none"
    """Distractors: detours between two people of the path, edges from it to an outsider, or edges among outsiders."""
    distractors: int | Range | None = None
    """Exactly so many noise edges; None for 1 to half the hops."""
    questions: int = Field(default=1, ge=1)
    """At most so many: further ones are about two people on the same path."""
    gendered: bool = True
    """Answers are "grandson" and "granddaughter" rather than "grandchild"; facts always tell."""
    women: int | tuple[str, ...] = 60
    men: int | tuple[str, ...] = 60
    templates: OneOf["all", "train", "test", "source-first", "target-first"] = "all"
    """Sentences in all forms, in all but the last one ("train") or in that one alone ("test"); or in the one that
    begins with the person whose relative is told, or with the relative."""
    split: OneOf["all", "train", "test"] = "all"
    """Stories whose sequence of relations falls in 80 % ("train") or in the other 20 % ("test"), whatever the seed."""

    @model_validator(mode="after")
    def _checked(self) -> Self:
        _range(self.hops, "hops", 1)
        if self.noise == "none" and self.distractors not in (None, 0):
            raise ValueError("distractors need a kind of noise: supporting, irrelevant or disconnected")
        if self.distractors is not None:
            low, _ = _range(self.distractors, "distractors", 0)
            if self.noise == "supporting" and low == 1:
                raise ValueError("a supporting detour has two edges at least; distractors is 1")
        return self

    def vocabulary(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of women, names of men."""
        women = self._list(self.women, WOMEN, "women", "name")
        if self.nonsense and isinstance(self.women, int) and isinstance(self.men, int):
            everybody = self._list(self.women + self.men, (), "names", "name")
            return everybody[: self.women], everybody[self.women :]
        men = self._list(self.men, MEN, "men", "name")
        shared = {name.lower() for name in women} & {name.lower() for name in men}
        if shared:
            raise UserError(f"{sorted(shared)[0]!r} is both among women and men; choose another name.")
        return women, men


def _range(given: int | Range, what: str, least: int) -> Range:
    low, high = both(given)
    if low < least or high < low:
        raise ValueError(f"{what} is {given}, expected {least} or more, the smaller number first")
    return low, high


def checked_count(count: int, where: str) -> int:
    """A number of tasks.

    Raises:
        UserError: fewer than one.
    """
    if count < 1:
        raise UserError(f"{where}: count is {count}, expected 1 or more tasks.")
    return count


def both(given: int | Range) -> Range:
    """A number as a range of one."""
    return (given, given) if isinstance(given, int) else given


def _apart(words: Words) -> Words:
    """No word may be both a name and an attribute, or a sentence could be read in two ways."""
    said = (*words.names, *words.attributes, *words.verbs)
    glue = next((word for word in said if word.lower() in RESERVED), None)
    if glue is not None:
        raise UserError(f"{glue!r} has a meaning of its own in the sentences of rules; choose another word.")
    names = {name.lower() for name in words.names}
    shared = names & {word.lower() for word in (*words.attributes, *words.verbs)}
    if shared:
        raise UserError(f"{sorted(shared)[0]!r} is both a name and an attribute or a verb; choose another word.")
    return words
