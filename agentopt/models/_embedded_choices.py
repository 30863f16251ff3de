"""Scoring label choices in one pass.

The score of a label is its log-probability under decoding constrained to the label set: at every position the model's
distribution is restricted to the tokens with which some label goes on, and renormalised. Where the first tokens of all
labels differ (the usual case), one forward pass over the prompt gives every score, whatever the labels' lengths; labels
that share a beginning need one more pass per fork. The scores of all labels sum to one in probability. Unlike the
unconstrained log-probability of the whole string this has no bias against labels of many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

NextLogprobs = Callable[[Sequence[int], Sequence[int]], Mapping[int, float]]
"""(tokens after the prompt, candidate next tokens) → log-probability of each, renormalised over the candidates."""


def score_choices(choices: Mapping[str, Sequence[int]], end: int, next_logprobs: NextLogprobs) -> dict[str, float]:
    """Natural-log probability of each choice, summing to one. `choices` maps a label to its tokens; `end` is the
    end-of-turn token, which is a candidate where one label is the beginning of another ("no" and "not sure").
    """
    scores = dict.fromkeys(choices, 0.0)

    def descend(labels: list[str], depth: int) -> None:
        groups: dict[int, list[str]] = {}
        for label in labels:
            tokens = choices[label]
            groups.setdefault(tokens[depth] if depth < len(tokens) else end, []).append(label)
        if len(groups) > 1:
            logprobs = next_logprobs(choices[labels[0]][:depth], sorted(groups))
            for token, members in groups.items():
                for label in members:
                    scores[label] += logprobs[token]
        for token, members in groups.items():
            if token != end and len(members) > 1:
                descend(members, depth + 1)

    if len(choices) > 1:
        descend(list(choices), 0)
    return scores
