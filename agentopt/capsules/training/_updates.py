"""The policy gradients, as plain formulas: who is compared with whom, and how a comparison moves the log-probabilities.

* REINFORCE (Williams 1992): reward minus a running mean of earlier rewards.
* RLOO (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740): reward minus the mean of the *other* rewards of the
  same document, an unbiased baseline; the whole text is one action; the divergence from the reference is part of the
  reward.
* GRPO (Shao et al. 2024, arXiv 2402.03300): reward minus the group's mean, over the group's standard deviation; every
  token is an action; the divergence is part of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

TIE = 1e-2
"""Below this standard deviation a group is not scaled up to unit variance: the differences would be noise."""
_MEMORY = 0.95


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Each reward minus the mean of the others."""
    total, others = sum(rewards), len(rewards) - 1
    return [reward - (total - reward) / others for reward in rewards]


def group_normalised(rewards: Sequence[float]) -> list[float]:
    """Each reward minus the mean, over the standard deviation unless the group (almost) ties."""
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    scale = deviation if deviation > TIE else 1.0
    return [(reward - mean) / scale for reward in rewards]


def tells_nothing(rewards: Sequence[float]) -> bool:
    """Whether all rewards of a group are equal, so that no comparison in it has a sign."""
    return max(rewards) - min(rewards) < 1e-9


class RunningMean:
    """The baseline of plain REINFORCE: a mean that forgets; the first value it sees is its start."""

    def __init__(self, value: float | None = None) -> None:
        self.value = value

    def centred(self, rewards: Sequence[float]) -> list[float]:
        """Each reward minus the mean so far; then the mean moves towards them."""
        if self.value is None:
            self.value = sum(rewards) / len(rewards)
        result = [reward - self.value for reward in rewards]
        for reward in rewards:
            self.value += (1 - _MEMORY) * (reward - self.value)
        return result


def whole_text_loss(torch: Any, new: Any, old: Any, advantage: Any, clip: float | None) -> Any:
    """RLOO and REINFORCE, one value per row: minus advantage times the log-probability of the whole text.

    `new` and `old` are log-probabilities per token, 0 after the end of a text.
    """
    total = new.sum(1)
    if clip is None:
        return -advantage * total
    ratio = torch.exp(total - old.sum(1))
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def token_loss(
    torch: Any, new: Any, old: Any, reference: Any, mask: Any, advantage: Any, *, clip: float | None, kl: float
) -> Any:
    """GRPO, one value per row: the mean over tokens of minus ratio times advantage, plus `kl` times the divergence."""
    ratio = torch.exp(new - old)
    gain = ratio * advantage.unsqueeze(1)
    if clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * advantage.unsqueeze(1))
    each = -gain + kl * divergence(torch, new, reference)
    return (each * mask).sum(1) / mask.sum(1).clamp(min=1.0)


def divergence(torch: Any, new: Any, reference: Any) -> Any:
    """Per token: an unbiased, never negative estimate of KL(policy, reference) from the token that was drawn."""
    behind = reference - new
    return torch.exp(behind) - behind - 1.0
