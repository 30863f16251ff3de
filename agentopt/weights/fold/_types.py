"""The nouns of folding: a knowledge base with questions about it, and what is asked of a fold.

Folding writes a knowledge base (facts, each a row of its own) into an adapter by a few gradient steps, so that
questions are answered without the facts in the prompt (RECKONING, arXiv 2305.06349; PERK, arXiv 2507.06415).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agentopt.errors import UserError

OptionsT = TypeVar("OptionsT", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a knowledge base."""

    text: str
    answer: str
    relevant: tuple[int, ...] = ()
    """Places of the facts that decide the answer, in the order of the proof; every other fact is a distractor."""
    depth: int | None = None
    """Rule applications (theories) or hops (kinship) of the shortest proof."""
    choices: tuple[str, ...] = ()
    """The answers there are; empty when any text may be one."""


@dataclass(frozen=True, slots=True)
class FoldTask:
    """A knowledge base and questions about it: one episode of meta-training."""

    id: str
    facts: tuple[str, ...]
    """One sentence each; a longer one is cut into rows."""
    questions: tuple[Question, ...]
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What a generator knows about it: world, depth, noise, ..."""


class FoldFormat(BaseModel):
    """How facts, questions and answers are written for the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fact: str = "{fact}"
    """A row of the inner loop, and a line of the context when the model reads it."""
    question: str = "Question: {question}\nAnswer:"
    answer: str = " {answer}"
    """What follows the question; also the end of the multi-task target."""
    recall: str = " {facts}\nSo:"
    """What stands between question and answer in the multi-task form: the relevant facts, joined by `joiner`."""
    joiner: str = " "
    """Between recalled facts. In context, facts are lines."""


class FoldOptions(BaseModel):
    """What a folder adapts and how its inner loop runs; kept in the META folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapts: Literal["lora", "all"] = "lora"
    """What the inner loop moves: LoRA factors (PERK) or all weights (RECKONING)."""
    trains: Literal["init", "all"] = "init"
    """What meta-training learns beside the rates: the factors' start on a frozen base, or the base's weights as well.
    With `adapts="all"` it is "all"."""
    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    """LoRA's alpha; None for the rank, so that the scale is 1."""
    layers: int | None = Field(default=None, ge=1)
    """Adapt only so many of the topmost decoder layers; None for all."""
    targets: str | tuple[str, ...] = "all-linear"
    """As in `adapters.attach`, within those layers."""

    inner_steps: int = Field(default=4, ge=1)
    unroll: int | None = Field(default=2, ge=0)
    """Second-order terms of the last so many inner steps; 0 is first order, None keeps all."""
    rule: Literal["sgd", "adamw", "normalized"] = "sgd"
    """Direction of an inner step: the gradient, AdamW's, or the gradient over its root mean square per tensor."""
    lr: float | None = Field(default=None, gt=0)
    """Where the inner rates start (one per tensor and step); None for what the rule recommends."""
    learn_lr: bool = True
    """Meta-train the inner rates; False is the static ablation."""
    token_weights: bool = False
    """Learn a weight for every token's loss in the inner loop (a small network on the hidden states)."""
    checkpoint: bool = True
    """Recompute each inner step in the backward pass: memory of one step's graph instead of `unroll` of them."""

    sum_over: Literal["row", "root", "document"] = "row"
    """What the inner loss adds up to: every row's mean ("row"), those over the root of the number of rows ("root", for
    documents of many more facts than were trained), or the mean over the document."""
    row_tokens: int = Field(default=128, ge=8)
    """Longest row of the inner loop; longer facts are cut at sentence ends."""
    multi_task: bool = True
    """The target is the relevant facts and then the answer, not the answer alone."""
    recall_weight: float = Field(default=1.0, ge=0)
    """Weight of the recalled facts' loss beside the answer's."""
    fact_share: float = Field(default=0.1, ge=0)
    """Share of the recall loss that the relevant facts have as rows of their own. At 0 (RECKONING as published) folds
    answer as well, but how likely they find their facts, by which the gate judges them, says little."""
    guard_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the untouched base on unrelated prompts."""
    format: FoldFormat = FoldFormat()
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _all_trains_all(self) -> FoldOptions:
        if self.adapts == "all" and self.trains != "all":
            object.__setattr__(self, "trains", "all")
        return self


class MetaOptions(BaseModel):
    """The outer loop: how long and how fast a folder is meta-trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=500, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    """AdamW's rate for the start of the adapted tensors (and the token weights)."""
    base_lr: float | None = Field(default=None, gt=0)
    """For the base's weights when they are trained; None for `lr`."""
    rates_lr: float | None = Field(default=None, gt=0)
    """For the inner learning rates (in log space, without decay); None for ten times `lr`."""
    documents: int = Field(default=8, ge=1)
    """Knowledge bases folded at once in one step."""
    questions: int = Field(default=4, ge=1)
    """Questions asked of each."""
    accumulate: int = Field(default=1, ge=1)
    warmup: int = Field(default=0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the meta-gradient."""
    weight_decay: float = Field(default=0.0, ge=0)
    eval_every: int = Field(default=100, ge=1)
    patience: int = Field(default=0, ge=0)
    """Validations without a new best after which training stops; 0 for never."""
    eval_tasks: int = Field(default=64, ge=1)
    """Validation knowledge bases looked at each time."""
    seed: int = Field(default=0, ge=0, lt=2**31)


def options_from(kind: type[OptionsT], values: Mapping[str, Any], place: str) -> OptionsT:
    """Check values field by field; `place` names where they stand.

    Raises:
        UserError: an unknown field, a value of another type or out of range.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "options"
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise UserError(f"{place}: unknown option {name!r}; the options are {known}.") from None
        if first["type"] == "value_error":  # a check of our own names the option itself
            raise UserError(f"{place}: {first['msg'].removeprefix('Value error, ')}.") from None
        found = json.dumps(first["input"], default=str)
        raise UserError(f"{place}: {name} is {found}, expected: {first['msg']}.") from None
