"""Scoring label choices: the model's own probability of each label as the beginning of its reply.

The score of a label is the log-probability of all its tokens, renormalised over the labels. Labels of one token each
take one forward pass over the prompt; each further token of a longer label takes a pass over one token more. A label
that is the beginning of another ("no" and "not sure") counts without the replies that go on as the other.

Why not only the first token where those differ: the first token of a long label can be the first token of anything
(with "abbreviation" among six question types, 89 of 100 questions were called that, because replies like to begin
with "a").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

NextLogprobs = Callable[[Sequence[int], Sequence[int], bool], Mapping[int, float]]
"""(tokens after the prompt, candidate next tokens, absolute) → log-probability of each candidate; with `absolute` under
the whole vocabulary, else up to a common constant."""

_FLOOR = 1e-9


def score_choices(choices: Mapping[str, Sequence[int]], next_logprobs: NextLogprobs) -> dict[str, float]:
    """Natural-log probability of each choice, summing to one in probability. `choices` maps a label to its tokens."""
    scores = dict.fromkeys(choices, 0.0)

    def descend(labels: list[str], depth: int) -> None:
        ended = [label for label in labels if len(choices[label]) == depth]
        groups: dict[int, list[str]] = {}
        for label in labels:
            if len(choices[label]) > depth:
                groups.setdefault(choices[label][depth], []).append(label)
        if not groups:
            return
        logprobs = next_logprobs(choices[labels[0]][:depth], sorted(groups), depth > 0)
        for label in ended:
            rest = 1.0 - sum(math.exp(logprobs[token]) for token in groups)
            scores[label] += math.log(max(rest, _FLOOR))
        for token, members in groups.items():
            for label in members:
                scores[label] += logprobs[token]
            descend(members, depth + 1)

    if len(choices) > 1:
        descend(list(choices), 0)
    return normalised(scores)


def normalised(scores: Mapping[str, float]) -> dict[str, float]:
    """The log-probabilities shifted so that the probabilities sum to one."""
    top = max(scores.values())
    norm = top + math.log(sum(math.exp(score - top) for score in scores.values()))
    return {label: score - norm for label, score in scores.items()}
