"""The nouns of the capsulator: spans, units, documents, and the capsule with its reports.

A document is a text cut into units; a unit is what may leave as a whole. Two levels of protection hold inside it. A
*keep* span is never dropped. An *intact* span is never altered inside a unit that stays, and leaves only with its whole
unit, which is reported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

SpanKind = Literal[
    # keep
    "placeholder",
    "schema",
    "format",
    "pattern",
    # intact
    "number",
    "date",
    "money",
    "name",
    "quote",
    "url",
    "path",
    "identifier",
    "code",
    "json",
    "xml",
    "negation",
    "quantifier",
]
UnitKind = Literal[
    "instruction",
    "constraint",
    "schema",
    "tool",
    "demonstration",
    "heading",
    "sentence",
    "item",
    "code",
    "table",
    "json",
    "xml",
    "log",
    "turn",
]
Mode = Literal["auto", "extract", "rewrite", "trained"]
Made = Literal["unchanged", "lossless", "mask", "extract", "rewrite", "trained"]
Recommended = Literal["capsule", "original"]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of characters with an identity: `text[start:end]` of its document."""

    start: int
    end: int
    level: Literal["keep", "intact"]
    kind: SpanKind

    def of(self, text: str) -> str:
        """The characters of the span."""
        return text[self.start : self.end]


@dataclass(frozen=True, slots=True)
class Unit:
    """What may leave as a whole: `text[start:end]`, without white space at either end.

    Units cover every character of their document that is not white space, in order and without overlap.
    """

    start: int
    end: int
    kind: UnitKind
    block: int
    """Number of the paragraph, list, table, code block or demonstration it belongs to; ascending."""
    heading: int = -1
    """Index of the heading unit that governs it; -1 for none. A heading leaves when nothing it governs stays."""
    keep: bool = False
    """Holds a keep span, so it is never dropped (it may be cut down to the part around the span)."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text with its units and its keep spans (sorted, not overlapping)."""

    text: str
    units: tuple[Unit, ...]
    keep: tuple[Span, ...] = ()
    role: str = ""
    """The role of the chat message it is the content of; empty for a plain text."""
    whole: bool = False
    """Every unit must stay (the last user turn, tool definitions, ...)."""


@dataclass(frozen=True, slots=True)
class DroppedUnit:
    """A unit, or the rest of a unit that was cut, that is not in the capsule."""

    text: str
    kind: UnitKind
    reason: Literal["value", "duplicate", "cut", "masked"]
    """`value`: others were worth more per token; `duplicate`: said elsewhere; `cut`: a part of a unit that stayed."""
    part: int = 0
    """Which message it was in; 0 for a plain text."""

    @property
    def spans(self) -> tuple[str, ...]:
        """The intact spans that left with it."""
        from agentopt.capsules.units._spans import find_intact

        return tuple(span.of(self.text) for span in find_intact(self.text))

    def to_dict(self) -> dict[str, Any]:
        """A JSON value."""
        return {"text": self.text, "kind": self.kind, "reason": self.reason, "part": self.part}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was verified about a capsule."""

    name: str
    passed: bool
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON value."""
        return {"name": self.name, "passed": self.passed, "detail": self.detail}


@dataclass(frozen=True, slots=True)
class GateReport:
    """Whether the capsule was shown not to harm, and from what.

    The capsule is `accepted` when the one-sided lower bound of mean(score with capsule - score with original) over the
    gate part lies above `-margin`, `rejected` when the data show harm beyond it, else `undecided`.
    """

    verdict: Literal["accepted", "rejected", "undecided"]
    kind: Literal["accuracy", "agreement"]
    """`agreement`: no labels; answers with the capsule are compared with answers with the original."""
    margin: float
    confidence: float
    n_select: int
    n_gate: int
    original: float
    capsule: float
    difference: float
    lower_bound: float
    method: str
    needed: int
    """Rows that would show a capsule without harm with 80 % power, given how often the answers flip here."""
    output_ratio: float | None = None
    """Output tokens with the capsule over those with the original; None when the reader reports none."""
    candidates: tuple[dict[str, Any], ...] = ()
    """What was compared on the select part: made, tokens, score."""
    inputs: str = ""
    """`part=HASH` for each part of what was gated; `regate_needed` compares them with what is there now."""
    reason: str = ""
    usd: float | None = None
    """What the calls of the gate cost; None when a price is unknown."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON value."""
        return {name: getattr(self, name) for name in self.__slots__} | {"candidates": list(self.candidates)}


@dataclass(frozen=True, slots=True)
class CostReport:
    """USD over a horizon of calls, with and without the capsule; provider caching and output tokens counted."""

    advice: Literal["compress", "do not compress"]
    calls: int
    original_usd: float
    capsule_usd: float
    making_usd: float
    """What making and gating the capsule cost; part of `capsule_usd`."""
    saving_usd: float
    break_even: int | None
    """Calls from which the capsule is cheaper; 0 when it is from the first one on; None when it never is."""
    reason: str
    """One sentence a person can act on."""
    assumptions: dict[str, Any] = field(default_factory=dict[str, Any])
    """Prices with their date, caching rule, reuse, output tokens."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON value."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Capsule:
    """A shorter text that holds the promises, and everything that can be said about it.

    `text` is always within the budget. The gate and the cost model set `recommended` only.
    """

    text: str
    tokens: int
    limit: int
    tokenizer: str
    original: str
    original_tokens: int
    made: Made
    recommended: Recommended
    messages: tuple[dict[str, Any], ...] | None = None
    """The capsule as chat messages, where messages were given; `text` is then their contents, joined."""
    kept: tuple[tuple[str, SpanKind], ...] = ()
    """The keep spans: text and kind, in order."""
    dropped: tuple[DroppedUnit, ...] = ()
    lossless_saved: int = 0
    """Tokens saved by edits that lose nothing (white space, JSON white space, exact repeats)."""
    checks: tuple[Check, ...] = ()
    gate: GateReport | None = None
    cost: CostReport | None = None
    making_usd: float | None = 0.0
    """What the calls for making and gating it cost; None when a price is unknown."""
    fallback: str = ""
    """Why a stronger way of compressing was not used; empty when the asked one was."""
    handle: str = ""
    """Address of the original in the store: `cap:` and hex digits."""
    seed: int = 0

    @property
    def ratio(self) -> float:
        """Tokens of the capsule over tokens of the original; 1.0 for an empty original."""
        return self.tokens / self.original_tokens if self.original_tokens else 1.0

    @property
    def best(self) -> str:
        """The recommended text."""
        return self.text if self.recommended == "capsule" else self.original

    def to_dict(self) -> dict[str, Any]:
        """A JSON value; the inverse is `from_dict`."""
        value = {name: getattr(self, name) for name in self.__slots__}
        value["messages"] = None if self.messages is None else list(self.messages)
        value["kept"] = [list(pair) for pair in self.kept]
        for name in ("dropped", "checks"):
            value[name] = [item.to_dict() for item in value[name]]
        for name in ("gate", "cost"):
            value[name] = None if value[name] is None else value[name].to_dict()
        return value

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Capsule:
        """The inverse of `to_dict`; raises KeyError or TypeError when `data` has another shape."""
        value = {name: data[name] for name in cls.__slots__}
        value["messages"] = None if data["messages"] is None else tuple(data["messages"])
        value["kept"] = tuple((text, kind) for text, kind in data["kept"])
        value["dropped"] = tuple(DroppedUnit(**item) for item in data["dropped"])
        value["checks"] = tuple(Check(**item) for item in data["checks"])
        cost: dict[str, Any] | None = data["cost"]
        gate: dict[str, Any] | None = data["gate"]
        if gate is not None:
            gate = {**gate, "candidates": tuple(gate["candidates"])}
        value["gate"] = None if gate is None else GateReport(**gate)
        value["cost"] = None if cost is None else CostReport(**cost)
        return cls(**value)
