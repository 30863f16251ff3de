"""Tuned programs at the endpoint: a candidate's prompt, demonstrations and cue behind a model name of its own.

models = load_candidates(["triage=best.json@3", "triage=base@1"], warn=print)
variant = models[0].pick("session:42")
body = variant.rewrite("/v1/chat/completions", body) if variant.rewrite else body
"""

from __future__ import annotations

from agentopt.serving.variants._load import BASE, load_candidates, read_spec
from agentopt.serving.variants._rewrite import Rewriting
from agentopt.serving.variants._roles import Parts, Wanted, parts_of
from agentopt.serving.variants._scores import Liking, VariantScores, difference, liking_of
from agentopt.serving.variants._turns import conversation
from agentopt.serving.variants._virtual import Variant, VirtualModel, sticky_of

__all__ = [
    "BASE",
    "Liking",
    "Parts",
    "Rewriting",
    "Variant",
    "VariantScores",
    "VirtualModel",
    "Wanted",
    "conversation",
    "difference",
    "liking_of",
    "load_candidates",
    "parts_of",
    "read_spec",
    "sticky_of",
]
