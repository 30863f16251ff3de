"""Kinship stories (in the manner of CLUTRR, arXiv 1908.06177): a path of relations in a family, told and shuffled.

A story starts as one edge between two people and grows: again and again an edge is replaced by two that amount to it,
through somebody who is not on the path yet. What is asked is the first edge; what is told is the path and the noise.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass
from typing import Any

from agentopt.errors import UserError
from agentopt.evaluation._draws import seeded
from agentopt.weights.fold._types import FoldTask, Question, options_from
from agentopt.weights.fold.worlds._family import Family
from agentopt.weights.fold.worlds._options import KinshipOptions, both, checked_count
from agentopt.weights.fold.worlds._relations import NEUTRAL, PARTS, WORDS, compose, word

_TRIES = 1200
Edge = tuple[int, str, int]
"""(a, role, b): b is the role of a."""


@dataclass(frozen=True, slots=True)
class Story:
    """What is told: a path and noise, of people of a family (outsiders are of another one, with negative numbers)."""

    family: Family
    outsiders: Family
    path: tuple[Edge, ...]
    noise: tuple[Edge, ...]

    def woman(self, person: int) -> bool:
        """Whether it is a woman."""
        return self.family.people[person].woman if person >= 0 else self.outsiders.people[-1 - person].woman

    def people(self) -> list[int]:
        """Everybody who is mentioned."""
        return list(dict.fromkeys(person for a, _, b in (*self.path, *self.noise) for person in (a, b)))

    def cast(self) -> tuple[int, int]:
        """How many women and men."""
        women = sum(self.woman(person) for person in self.people())
        return women, len(self.people()) - women


def kinship(count: int, *, seed: int, options: KinshipOptions | None = None, **fields: Any) -> list[FoldTask]:
    """Stories about a family, each with a question about two people who are linked by a path of facts.

    Args:
        count: how many tasks.
        seed: task i of a seed is the same however many are asked for.
        options: see `KinshipOptions`.
        fields: its fields by name: hops, noise, distractors, questions, gendered, split, ...

    Raises:
        UserError: an unknown option, a value out of range, or more noise than families have room for.
    """
    given = {} if options is None else options.model_dump()
    chosen = options_from(KinshipOptions, {**given, **fields}, "worlds.kinship")
    names = chosen.vocabulary()
    return [_task(index, seed, chosen, names) for index in range(checked_count(count, "worlds.kinship"))]


def side(pattern: tuple[str, ...]) -> str:
    """Which side a sequence of relations is on: "train" for four of five sequences of them, "test" for the others."""
    return "test" if hashlib.sha256(" ".join(pattern).encode()).digest()[0] < 256 // 5 else "train"


def story(draw: random.Random, options: KinshipOptions, names: tuple[int, int] = (60, 60)) -> Story:
    """A story of the wanted length, noise and side of the split, with as many women and men as there are names.

    Raises:
        UserError: none was found.
    """
    hops = draw.randint(*both(options.hops))
    wanted = options.distractors if options.distractors is not None else (1, max(1, hops // 2))
    noise = 0 if options.noise == "none" else draw.randint(*both(wanted))
    if options.noise == "supporting" and noise == 1:
        noise = 2
    role, woman = draw.choice(list(WORDS)), draw.random() < 0.5
    family = Family(draw)
    for attempt in range(_TRIES):
        if attempt and attempt % 30 == 0:  # some roles have no long paths, or none on this side of the split
            role, woman = draw.choice(list(WORDS)), draw.random() < 0.5
        if attempt and attempt % 5 == 0:
            family = Family(draw)
        path = _path(draw, family, (role, woman), hops)
        if path is None or (options.split != "all" and side(tuple(edge[1] for edge in path)) != options.split):
            continue
        outsiders = Family(draw)
        extra = _Noise(draw, family, outsiders, path).edges(options.noise, noise)
        if extra is None:
            continue
        told = Story(family, outsiders, tuple(path), tuple(extra))
        if all(count <= room for count, room in zip(told.cast(), names, strict=True)):
            return told
    raise UserError(
        f"worlds.kinship: found no story of {hops} hops with {noise} {options.noise} facts for {names[0]} women and "
        f"{names[1]} men; ask for fewer facts or give more names."
    )


def _path(draw: random.Random, family: Family, target: tuple[str, bool], hops: int) -> list[Edge] | None:
    role, woman = target
    pairs = [
        (a, b)
        for a in range(len(family.people))
        for b, found in family.kin(a).items()
        if found == role and family.people[b].woman == woman
    ]
    if not pairs:
        return None
    a, b = draw.choice(pairs)
    path: list[Edge] = [(a, role, b)]
    used = {a, b}
    while len(path) < hops:
        places = list(range(len(path)))
        draw.shuffle(places)
        for place in places:
            longer = _expanded(draw, family, path[place], used)
            if longer is not None:
                path[place : place + 1] = longer
                used.add(longer[0][2])
                break
        else:
            return None
    return path if compose([edge[1] for edge in path]) == frozenset({role}) else None


def _expanded(draw: random.Random, family: Family, edge: Edge, used: set[int]) -> tuple[Edge, Edge] | None:
    """Two edges that amount to one, through somebody new."""
    x, role, y = edge
    parts = list(PARTS[role])
    draw.shuffle(parts)
    for first, second in parts:
        found = [
            z for z, at in family.kin(x).items() if at == first and z not in used and family.kin(z).get(y) == second
        ]
        if found:
            z = draw.choice(found)
            return (x, first, z), (z, second, y)
    return None


class _Noise:
    """Edges beside the path that leave every answer as it is."""

    def __init__(self, draw: random.Random, family: Family, outsiders: Family, path: list[Edge]) -> None:
        self.draw, self.family, self.outsiders, self.path = draw, family, outsiders, path
        self.used = {person for a, _, b in path for person in (a, b)}

    def edges(self, kind: str, count: int) -> list[Edge] | None:
        """So many of a kind; None when there is no room."""
        if kind == "disconnected":
            return self._disconnected(count)
        found: list[Edge] = []
        while len(found) < count:
            left = count - len(found)
            more = self._dangling() if kind == "irrelevant" else self._detour(3 if left == 3 else 2)
            if more is None:
                return None
            found += more
        return found

    def _dangling(self) -> list[Edge] | None:
        """From the path to somebody new who leads nowhere."""
        people = list(dict.fromkeys(person for a, _, b in self.path for person in (a, b)))
        self.draw.shuffle(people)
        for x in people:
            new = [z for z in self.family.kin(x) if z not in self.used]
            if new:
                z = self.draw.choice(new)
                self.used.add(z)
                a, b = (x, z) if self.draw.random() < 0.5 else (z, x)
                return [(a, self.family.kin(a)[b], b)]
        return None

    def _detour(self, length: int) -> list[Edge] | None:
        """From one person of the path to the next through new ones, so that no way becomes shorter."""
        path = list(self.path)
        self.draw.shuffle(path)
        for a, _, b in path:
            between = self._between(a, b, length)
            if between is not None:
                self.used |= set(between)
                walk = [a, *between, b]
                return [(x, self.family.kin(x)[y], y) for x, y in itertools.pairwise(walk)]
        return None

    def _between(self, a: int, b: int, length: int) -> list[int] | None:
        kin = self.family.kin
        first = [z for z in kin(a) if z not in self.used]
        self.draw.shuffle(first)
        for z in first:
            if length == 2:
                if b in kin(z):
                    return [z]
                continue
            rest = [other for other in kin(z) if other not in self.used and other != z and b in kin(other)]
            if rest:
                return [z, self.draw.choice(rest)]
        return None

    def _disconnected(self, count: int) -> list[Edge] | None:
        """Among people of another family."""
        kin = self.outsiders.kin
        pairs = [(a, b) for a in range(len(self.outsiders.people)) for b in kin(a)]
        self.draw.shuffle(pairs)
        told: dict[frozenset[int], Edge] = {}
        for a, b in pairs:
            if len(told) == count:
                break
            told.setdefault(frozenset((a, b)), (-1 - a, kin(a)[b], -1 - b))
        return list(told.values()) if len(told) == count else None


def _task(index: int, seed: int, options: KinshipOptions, names: tuple[tuple[str, ...], tuple[str, ...]]) -> FoldTask:
    draw = seeded("worlds.kinship", seed, index)
    told = story(draw, options, (len(names[0]), len(names[1])))
    edges = [*told.path, *told.noise]
    called = _called(draw, told, names)
    order = list(range(len(edges)))
    if options.shuffle:
        draw.shuffle(order)
    where = {place: position for position, place in enumerate(order)}
    facts = tuple(_fact(edges[place], told, called, options, draw) for place in order)
    questions: list[Question] = []
    for start, end, role in _asked(draw, told, options):
        a, b = told.path[start][0], told.path[end - 1][2]
        answer = word(role, woman=told.woman(b), gendered=options.gendered)
        relevant = tuple(where[place] for place in range(start, end))
        questions.append(
            Question(_question(called[a], called[b], options), answer, relevant, end - start, choices(options))
        )
    meta = {
        "generator": "kinship",
        "hops": len(told.path),
        "noise": options.noise,
        "pattern": [role for _, role, _ in told.path],
        "style": options.style,
        "logic": [[called[a], role, called[b], told.woman(b)] for a, role, b in (edges[place] for place in order)],
    }
    return FoldTask(f"kinship-{seed}-{index}", facts, tuple(questions), meta)


def choices(options: KinshipOptions) -> tuple[str, ...]:
    """The answers there are."""
    return tuple(kind for pair in WORDS.values() for kind in pair) if options.gendered else tuple(NEUTRAL.values())


def _asked(draw: random.Random, told: Story, options: KinshipOptions) -> list[tuple[int, int, str]]:
    """The whole path first, then shorter stretches of it that amount to one role."""
    roles = [role for _, role, _ in told.path]
    (whole,) = compose(roles)
    low = both(options.hops)[0]
    spans = [
        (start, end)
        for start in range(len(roles))
        for end in range(start + low, len(roles) + 1)
        if end - start < len(roles)
    ]
    draw.shuffle(spans)
    found = [(0, len(roles), whole)]
    for start, end in spans:
        if len(found) >= options.questions:
            break
        amounts = compose(roles[start:end])
        if len(amounts) == 1:
            found.append((start, end, next(iter(amounts))))
    return found


def _called(draw: random.Random, told: Story, names: tuple[tuple[str, ...], tuple[str, ...]]) -> dict[int, str]:
    """A name for everybody in the story."""
    women = [person for person in told.people() if told.woman(person)]
    men = [person for person in told.people() if not told.woman(person)]
    return dict(
        zip([*women, *men], [*draw.sample(names[0], len(women)), *draw.sample(names[1], len(men))], strict=True)
    )


def _fact(edge: Edge, told: Story, called: dict[int, str], options: KinshipOptions, draw: random.Random) -> str:
    a, role, b = edge
    source, target, kind = called[a], called[b], word(role, woman=told.woman(b))
    if options.style == "plain":
        source, target = source.lower(), target.lower()
        if options.templates == "target-first":
            return f"{target} is {kind} of {source}"
        return f"{source} has {kind} {target}"
    forms = [
        f"{target} is the {kind} of {source}.",
        f"{source} has {'an' if kind[0] in 'aeiou' else 'a'} {kind} called {target}.",
        f"{target} is {source}'s {kind}.",
    ]
    allowed = {
        "all": forms,
        "train": forms[:-1],
        "test": forms[-1:],
        "target-first": forms[:1],
        "source-first": forms[1:2],
    }
    return draw.choice(allowed[options.templates])


def _question(source: str, target: str, options: KinshipOptions) -> str:
    if options.style == "plain":
        return f"what is {target.lower()} to {source.lower()}"
    return f"How is {target} related to {source}?"
