"""The loss of Nano-Capsulator (Chuang et al. 2024, arXiv 2402.18700) as published: the baseline to beat.

    loss = mean squared error(e_K, e_C) * R
    R    = share of questions that a frozen reader answers from Phi(C) as it answers from K

K is the original, C the capsule the model writes; e_K is the model's embedding of K when told to repeat it, e_C that of
C when told to shorten K, both hidden states of the model in training; Phi cuts C at the budget, so what lies beyond it
is invisible to the reader. R is a number: the gradient reaches the weights through the embeddings only, there is no
term in which a token of the capsule becomes more or less likely because of R.

What the paper leaves open, and what is chosen here: the layer (the last, after its norm), the pooling (mean over the
tokens of K or of C), the wording of both instructions (ours), K as given tokens after the instruction to repeat, one
sampled C per K, gradients through both embeddings, and the number of questions per step (the reward settings'). Adam
and gradient clipping are the trainer's; the published rate is 5e-6, the published clip 0.8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentopt.capsules.counting._tokens import Meter
from agentopt.capsules.training._policy import Policy, Written
from agentopt.capsules.training._rewards import Reward, Sample
from agentopt.errors import UserError

_REPEAT = "Repeat this text word for word :\n"


def cut_off(text: str, meter: Meter) -> str:
    """Phi: the longest run of leading words that is within the limit; empty when not even the first word is."""
    if meter.fits([text]):
        return text
    words = text.split(" ")
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if meter.fits([" ".join(words[:middle])]):
            low = middle
        else:
            high = middle - 1
    return " ".join(words[:low])


def utilities(reward: Reward, sample: Sample, texts: Sequence[str], meter: Meter, *, seed: int) -> list[float]:
    """R of each capsule: agreement of the answers from what is left of it with the answers from the original."""
    reader, questions = reward.drawn(sample, seed)
    if reader is None:
        raise UserError("algorithm 'nano': found a reward that asks no reader, expected a task or agree weight.")
    asked = [question.text for question in questions]
    expected = reward.originals(sample, reader, asked)
    result: list[float] = []
    for text in texts:
        reward.calls += len(asked)
        answers = reader.answers(cut_off(text, meter), asked)
        result.append(sum(map(reward.metric, answers, expected)) / len(asked))
    return result


def repeated(policy: Policy, samples: Sequence[Sample]) -> Written:
    """The originals, as what the model is told to repeat."""
    texts = [sample.document.text for sample in samples]
    prompts: list[list[int]] = [policy.tokenizer(_REPEAT + text + "\n")["input_ids"] for text in texts]
    return policy.given(prompts, texts)


def nano_loss(policy: Policy, originals: Written, capsules: Written, utility: Any) -> Any:
    """One value per row: the distance of the two embeddings, times R."""
    distance = (policy.hidden(originals) - policy.hidden(capsules)).pow(2).mean(1)
    return distance * utility
