"""The algebra of kinship: eleven roles, their words, and what two of them in a row amount to.

(r1, r2) -> r reads: if z is the r1 of a and b is the r2 of z, then b is the r of a, for a and b who are not the same
person. Only compositions that hold in every family are here, given that couples have all their children together and
that uncles, aunts, nephews and nieces are related by blood. So "grandparent of my child" is missing: it may be a parent
or a parent-in-law.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

WORDS: dict[str, tuple[str, str]] = {
    "child": ("daughter", "son"),
    "parent": ("mother", "father"),
    "spouse": ("wife", "husband"),
    "sibling": ("sister", "brother"),
    "grandchild": ("granddaughter", "grandson"),
    "grandparent": ("grandmother", "grandfather"),
    "child-in-law": ("daughter-in-law", "son-in-law"),
    "parent-in-law": ("mother-in-law", "father-in-law"),
    "sibling-in-law": ("sister-in-law", "brother-in-law"),
    "nephew": ("niece", "nephew"),
    "uncle": ("aunt", "uncle"),
}
"""For a woman and for a man."""
NEUTRAL = {role: role for role in WORDS} | {"nephew": "nephew-or-niece", "uncle": "uncle-or-aunt"}

_PAIRS = (
    ("child", "parent"),
    ("spouse", "spouse"),
    ("sibling", "sibling"),
    ("grandchild", "grandparent"),
    ("child-in-law", "parent-in-law"),
    ("sibling-in-law", "sibling-in-law"),
    ("nephew", "uncle"),
)
INVERSE: dict[str, str] = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}

_RULES = """
child child grandchild; child spouse child-in-law; child sibling child; child parent spouse; child nephew grandchild;
parent sibling uncle; parent parent grandparent; parent child sibling; parent spouse parent;
parent parent-in-law grandparent; spouse parent parent-in-law; spouse grandchild grandchild; spouse child child;
spouse sibling sibling-in-law; spouse parent-in-law parent; spouse child-in-law child-in-law; sibling sibling sibling;
sibling grandparent grandparent; sibling child nephew; sibling parent parent; sibling spouse sibling-in-law;
sibling uncle uncle; grandchild sibling grandchild; grandparent spouse grandparent; nephew sibling nephew;
uncle parent grandparent; child-in-law child grandchild; child-in-law spouse child; parent-in-law spouse parent-in-law
"""
COMPOSE: dict[tuple[str, str], str] = {
    (first, second): whole for first, second, whole in (rule.split() for rule in _RULES.split(";"))
}
PARTS: dict[str, tuple[tuple[str, str], ...]] = {
    role: tuple(pair for pair, whole in COMPOSE.items() if whole == role) for role in WORDS
}
"""What a role can be taken apart into."""


def word(role: str, *, woman: bool, gendered: bool = True) -> str:
    """The English word for somebody in a role."""
    return WORDS[role][0 if woman else 1] if gendered else NEUTRAL[role]


def compose(path: Sequence[str]) -> frozenset[str]:
    """Every role that the steps of a path amount to, whatever is composed first."""
    spans: dict[tuple[int, int], frozenset[str]] = {(i, i + 1): frozenset({role}) for i, role in enumerate(path)}
    for length in range(2, len(path) + 1):
        for start in range(len(path) - length + 1):
            end = start + length
            spans[start, end] = frozenset(
                COMPOSE[first, second]
                for middle in range(start + 1, end)
                for first in spans[start, middle]
                for second in spans[middle, end]
                if (first, second) in COMPOSE
            )
    return spans[0, len(path)]


def closure(edges: Iterable[tuple[str, str, str]]) -> dict[tuple[str, str], set[str]]:
    """All that a story says: the roles of every two people, from edges (a, role, b) under inverses and composition."""
    known: dict[tuple[str, str], set[str]] = {}
    near: dict[str, set[str]] = {}
    waiting = [fact for a, role, b in edges for fact in ((a, role, b), (b, INVERSE[role], a))]
    while waiting:
        a, role, b = waiting.pop()
        if a == b or role in known.get((a, b), ()):
            continue
        known.setdefault((a, b), set()).add(role)
        near.setdefault(a, set()).add(b)
        near.setdefault(b, set()).add(a)
        for c in near[b]:
            waiting += [(a, COMPOSE[role, next_], c) for next_ in known.get((b, c), ()) if (role, next_) in COMPOSE]
        for c in near[a]:
            waiting += [(c, COMPOSE[before, role], b) for before in known.get((c, a), ()) if (before, role) in COMPOSE]
    return known
