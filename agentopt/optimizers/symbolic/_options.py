"""Settings of symbolic learning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from agentopt.errors import UserError
from agentopt.optimizers.symbolic._bound import LearningRate

Kind = Literal["pipeline", "tool", "prompt"]
Component = Literal["task", "principles", "demos", "output_format", "extra"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class SymbolicOptions:
    """Settings of `Symbolic`."""

    kinds: tuple[Kind, ...] = KINDS
    """What may be changed, in the order of "round"."""
    order: Literal["all", "round"] = "all"
    """"round": one kind per iteration, pipeline, then tools, then prompts. "all": every kind, and all in one update."""
    loss: Literal["lm", "metric"] = "lm"
    """Who comments on a failing case: the language model, or the metric's own words alone (no call)."""
    labels: bool = True
    """Whether the expected answer is shown; without it a case is judged from the task alone."""
    scores: bool = True
    """Whether the metric's score is shown; without it the language model is asked for one from 0 to 10."""
    cases: int = 6
    """Failing cases looked at in one call of `propose`."""
    visits: int = 8
    """Calls of one case that get a gradient; the last ones count."""
    max_calls: int = 48
    """Language model calls of one `propose`, repairs included (the client's own second try for a missed form is not).
    A third is planned for losses and gradients; a model that needs two calls for an answer takes two thirds."""
    concurrency: int = 4
    """Cases that are looked at side by side."""
    components: tuple[Component, ...] = COMPONENTS
    """Parts of a prompt that may be changed."""
    questions: int = 6
    """Parts of prompts that are asked about for one update; where there are more, they take turns."""
    rate: LearningRate = field(default_factory=LearningRate)
    repairs: int = 3
    """Times that illegal edits are sent back before they are dropped."""
    temperature: float = 0.7
    """Of the second and later updates of one kind; the first is asked at temperature 0."""
    reply_tokens: int = 1500
    """Upper bound of generated tokens of one answer."""
    text_chars: int = 6000
    """Characters of recorded values shown in one question."""

    def __post_init__(self) -> None:
        if self.repairs < 0 or self.reply_tokens < 1 or self.text_chars < 100:
            raise UserError("SymbolicOptions: repairs must not be negative, reply_tokens at least 1, text_chars 100.")
        for name, least in (("cases", 1), ("visits", 1), ("max_calls", 4), ("concurrency", 1), ("questions", 1)):
            if getattr(self, name) < least:
                raise UserError(f"SymbolicOptions: {name} must be at least {least}, found {getattr(self, name)!r}.")
        for name, known in (("kinds", KINDS), ("components", COMPONENTS)):
            given = getattr(self, name)
            unknown = [item for item in given if item not in known]
            if unknown or not given:
                found = repr(unknown[0]) if unknown else "none"
                raise UserError(f"SymbolicOptions: {name} must be some of {', '.join(known)}; found {found}.")
        for name, known in (("order", ("all", "round")), ("loss", ("lm", "metric"))):
            if getattr(self, name) not in known:
                raise UserError(
                    f"SymbolicOptions: {name} must be one of {', '.join(known)}; found {getattr(self, name)!r}."
                )
