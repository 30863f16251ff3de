"""How likely a causal model holds each candidate, in as few forward passes and positions as that takes.

All candidates of a row share one pass over its prompt: the row is laid out as a tree, prompt first, then the tokens of
each candidate, and the attention mask lets a candidate see the prompt and itself alone. Rows are padded on the left, so
what the head has to read stands at the end, and the head (for a small model a fifth of the work) runs there only. It is
called through the model's own forward: a head whose weights are being probed is probed here as well. Computing the
candidates' columns of the head alone would save little (16 x 49152 x 576 multiplications of a batch of short prompts)
and would have to reach around that forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from agentopt.weights.load import need
from agentopt.weights.tasks._encode import EncodedExample

_TREE_MODELS = frozenset(
    {"gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
)
"""Model types that take positions and a four-dimensional mask as given; others run one row per candidate."""
_CHUNK = 1 << 22
"""Logits normalised at once: 16 MB of float32."""


def log_likelihoods(
    model: Any,
    examples: Sequence[EncodedExample],
    copies: int = 1,
    *,
    pad: int,
    mean: bool = False,
    normalised: bool = True,
) -> Any:
    """Log-probability of every candidate after its prompt: float32 tensor (copies, examples, candidates).

    The batch is repeated copy by copy along its first axis. Rows with fewer candidates than others end in -inf. The
    result carries a gradient when the model does.

    Args:
        model: a causal language model, or what is called like one.
        examples: rows, each with at least one candidate.
        copies: how often the batch is repeated.
        pad: token id that fills short rows.
        mean: the mean over a candidate's tokens rather than the sum.
        normalised: False lets a row's values miss a constant, when only their differences count: with candidates of
            one token no normalisation over the vocabulary is computed.
    """
    width = max(example.length for example in examples)
    if _branches(examples) and not takes_trees(model, width):
        return _one_row_each(model, examples, copies, pad, mean)
    torch = need("torch")
    device = next(iter(model.parameters())).device
    ids, segments, positions = _layout(torch, examples, width, pad, device)
    mask: Any = (segments >= 0).long()
    if _branches(examples):
        mask = _tree_mask(torch, segments, _dtype(torch, model))
    rows, local, target, real, keep = _reads(torch, examples, device)
    logits = model(
        input_ids=ids.repeat(copies, 1),
        attention_mask=mask.repeat(copies, *[1] * (mask.dim() - 1)),
        position_ids=positions.repeat(copies, 1),
        use_cache=False,
        logits_to_keep=keep,
    ).logits
    logits = logits[:, -keep:].unflatten(0, (copies, len(examples)))
    found = logits[:, rows, local, target].float()
    if normalised or any(len(one) > 1 for example in examples for one in example.candidates):
        found = found - _log_sums(torch, logits)[:, rows, local]
    total = (found * real).sum(3)
    if mean:
        total = total / real.sum(2).clamp(min=1)
    return total.masked_fill(~real[:, :, 0], float("-inf"))


def takes_trees(model: Any, width: int) -> bool:
    """Whether the model reads a custom attention mask and positions, so that candidates can share a prompt's pass."""
    if not isinstance(model, need("transformers").PreTrainedModel):
        return False  # a wrapper may put a prefix in front, which a finished mask would not let in
    config: Any = model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    known = config.model_type in _TREE_MODELS and config._attn_implementation in ("sdpa", "eager")
    return known and (window is None or width <= window)


def _branches(examples: Sequence[EncodedExample]) -> bool:
    """Whether some row reads tokens of more than one candidate, which must not see each other."""
    return any(sum(len(one) > 1 for one in example.candidates) > 1 for example in examples)


def _one_row_each(model: Any, examples: Sequence[EncodedExample], copies: int, pad: int, mean: bool) -> Any:
    """One row per candidate; short rows repeat a candidate, so that every example has the same number of rows."""
    torch = need("torch")
    most = max(len(example.candidates) for example in examples)
    single = [
        replace(example, candidates=(example.candidates[min(number, len(example.candidates) - 1)],))
        for example in examples
        for number in range(most)
    ]
    found = log_likelihoods(model, single, copies, pad=pad, mean=mean)
    counts = torch.tensor([len(example.candidates) for example in examples], device=found.device)
    absent = torch.arange(most, device=found.device) >= counts[:, None]
    return found.reshape(copies, len(examples), most).masked_fill(absent, float("-inf"))


def _layout(torch: Any, examples: Sequence[EncodedExample], width: int, pad: int, device: Any) -> tuple[Any, Any, Any]:
    """Token ids, segments (-1 padding, 0 prompt, then the candidates) and positions, each (rows, width)."""
    ids: list[list[int]] = []
    segments: list[list[int]] = []
    positions: list[list[int]] = []
    for example in examples:
        fill, prompt = width - example.length, len(example.prompt)
        row, segment, position = [pad] * fill, [-1] * fill, [0] * fill
        row += example.prompt
        segment += [0] * prompt
        position += range(prompt)
        for number, one in enumerate(example.candidates, start=1):
            row += one[:-1]
            segment += [number] * (len(one) - 1)
            position += range(prompt, prompt + len(one) - 1)
        ids.append(row)
        segments.append(segment)
        positions.append(position)
    return (
        torch.tensor(ids, device=device),
        torch.tensor(segments, device=device),
        torch.tensor(positions, device=device),
    )


def _tree_mask(torch: Any, segments: Any, dtype: Any) -> Any:
    """What is added to attention scores: nothing where a token may look, the lowest number elsewhere."""
    width = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    before = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    itself = torch.eye(width, dtype=torch.bool, device=segments.device)  # padding looks at itself: no empty softmax
    seen = (((key == 0) | (key == query)) & (key >= 0) & before) | itself
    mask = torch.zeros(seen.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)


def _reads(torch: Any, examples: Sequence[EncodedExample], device: Any) -> tuple[Any, Any, Any, Any, int]:
    """Where each candidate's tokens are predicted.

    Returns:
        Row numbers (rows, 1, 1); positions among the kept ones, token ids and whether there is such a token, each
        (rows, candidates, tokens); how many positions at the end are kept.
    """
    tails = [example.length - len(example.prompt) for example in examples]
    keep = 1 + max(tails)
    most = max(len(example.candidates) for example in examples)
    longest = max(len(one) for example in examples for one in example.candidates)
    shape = (len(examples), most, longest)
    local, target = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    real = torch.zeros(shape, dtype=torch.bool)
    for row, (example, tail) in enumerate(zip(examples, tails, strict=True)):
        last = keep - 1 - tail
        following = last + 1
        for number, one in enumerate(example.candidates):
            read = [last, *range(following, following + len(one) - 1)]
            following += len(one) - 1
            local[row, number, : len(one)] = torch.tensor(read)
            target[row, number, : len(one)] = torch.tensor(one)
            real[row, number, : len(one)] = True
    rows = torch.arange(len(examples), device=device)[:, None, None]
    return rows, local.to(device), target.to(device), real.to(device), keep


def _log_sums(torch: Any, logits: Any) -> Any:
    """Log of the sum of exponentials over the vocabulary in float32, a few positions at a time."""
    flat = logits.flatten(0, -2)
    step = max(1, _CHUNK // flat.shape[1])
    parts = [flat[at : at + step].float().logsumexp(1) for at in range(0, flat.shape[0], step)]
    return torch.cat(parts).reshape(logits.shape[:-1])


def _dtype(torch: Any, model: Any) -> Any:
    found: Any = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    return found
