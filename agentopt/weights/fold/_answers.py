"""What a model answers: it recalls the facts that matter, then says or chooses the answer. Folded or reading, alike.

`write_answers` runs one batch whose rows stay where they are from the first token to the last, so that a batch over
several folded documents can give each row its own adapter. Rows that are done are fed padding that nobody sees.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from agentopt.errors import UserError
from agentopt.weights.load import need
from agentopt.weights.tasks._predictions import measuring

if TYPE_CHECKING:
    from agentopt.weights.fold._codec import Codec


@dataclass(frozen=True, slots=True)
class Written:
    """What a model wrote after one prompt."""

    text: str
    """The answer alone."""
    recalled: tuple[str, ...]
    """Sentences that it recalled before the answer."""
    closed: bool
    """The recalled facts were closed by the model itself (True in the single-task form)."""
    margin: float
    """With choices: mean log-probability per token of the best less that of the second (infinite for one choice).
    Without: mean over the answer's tokens of the log-probability of the likeliest token less that of the second."""
    logprob: float
    """Mean log-probability per token of the answer."""
    tokens: int
    """Tokens that were generated."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and where it comes from."""

    text: str
    source: Literal["folded", "in-context"]
    recalled: tuple[str, ...] = ()
    margin: float = math.inf
    recall: float | None = None
    """How well the fold recalls its facts; None when the model read them."""
    logprob: float = 0.0
    reason: str = ""
    """Why the gate let it pass or fell back."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Keys and values of several contexts that a batch goes on from; it is never changed by that."""

    cache: Any
    mask: tuple[tuple[int, ...], ...]
    """(contexts, tokens): 0 where a shorter context is padded on its left."""

    def taken(self, index: Sequence[int]) -> Any:
        """A cache whose row r is that of context `index[r]`; a copy."""
        torch = need("torch")
        taken = _branch(self.cache)
        device = next(layer.keys.device for layer in self.cache.layers if layer.is_initialized)
        taken.batch_select_indices(torch.tensor(list(index), device=device))
        return taken


def _branch(cache: Any) -> Any:
    """A cache that can grow by itself: layers replace their tensors when they grow, so the tensors are shared."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    return branch


def write_answers(
    model: Any,
    codec: Codec,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[str]],
    *,
    memory: Memory | None = None,
    index: Sequence[int] = (),
    max_new: int = 96,
) -> list[Written]:
    """What the model writes after each prompt, greedily, as one batch in the given order.

    In the multi-task form a row first recalls facts until the format's mark (which is put there after `max_new` tokens
    without it). Then the row's choices are compared by their mean log-probability per token, end of text counted where
    one choice begins with another; a row without choices writes until end of text or the end of a line.

    Args:
        model: a causal language model; adapters that are in use stay in use.
        codec: tokenizer and format.
        prompts: token ids, at least one each.
        choices: the answers of each row; empty for any text.
        memory: contexts that were read before.
        index: the context of each row.
        max_new: most tokens of the recalled facts, and of an answer without choices.

    Raises:
        UserError: a choice without a token, or two that are the same to the tokenizer.
    """
    if not prompts:
        return []
    if max_new < 1:
        raise UserError(f"max_new: found {max_new}, expected at least 1.")
    rows = [_Row(codec, options, max_new) for options in choices]
    before = len(memory.mask[0]) if memory is not None else 0
    if len(rows) > 1 and not may_batch(model, before + max(map(len, prompts)), max_new):
        raise UserError(
            f"answers: this model looks back {lookback(model.config)} tokens only, and rows of several lengths in one "
            "batch would see less; ask one question at a time (batch=1)."
        )
    with measuring(model):
        feeder = _Feeder(model, codec.pad, memory, index)
        logits = feeder.feed([list(prompt) for prompt in prompts], left=True)
        while not all(row.done for row in rows):
            ranked = logits.log_softmax(-1)
            top = ranked.topk(2, -1)
            best, tokens = top.values.tolist(), top.indices[:, 0].tolist()
            for number, row in enumerate(rows):
                if not row.done:
                    row.take(ranked[number], best[number], tokens[number])
            if not all(row.done for row in rows):
                logits = feeder.feed([row.feed for row in rows])
        _score_rest(feeder, rows)
    return [row.written() for row in rows]


def may_batch(model: Any, tokens: int, max_new: int) -> bool:
    """Whether rows of so many tokens can be answered side by side.

    Rows of a batch have padding between what they read and what they write. A layer that looks back a fixed number of
    places (sliding windows) counts the padding, so all of a row must be within that number.
    """
    back = lookback(model.config)
    return back is None or tokens + 2 * max_new + 32 <= back


def lookback(config: Any) -> int | None:
    """How many tokens the narrowest layer looks back; None for all."""
    own = config.get_text_config(decoder=True)
    if getattr(own, "use_sliding_window", True) is False:
        return None
    kinds = getattr(own, "layer_types", None)
    if kinds and all(kind == "full_attention" for kind in kinds):
        return None
    sizes = [getattr(own, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if isinstance(size, int)), default=None)


@dataclass(slots=True)
class _Row:
    """One row on its way: it recalls, then it answers."""

    codec: Codec
    options: Sequence[str]
    max_new: int
    ids: list[int] = field(default_factory=list[int])
    """Generated, the mark included."""
    answer: list[int] = field(default_factory=list[int])
    """Of a row without choices."""
    recalling: bool = False
    closed: bool = True
    done: bool = False
    feed: list[int] = field(default_factory=list[int])
    """What the model reads next."""
    parts: list[list[int]] = field(default_factory=list[list[int]])
    """Token ids of each choice."""
    scores: list[float] = field(default_factory=list[float])
    """Sum of the log-probabilities of each choice's tokens so far."""
    margins: list[float] = field(default_factory=list[float])
    logprobs: list[float] = field(default_factory=list[float])

    def __post_init__(self) -> None:
        self.recalling = self.codec.multi_task
        self.parts = _choices(self.codec, self.options)

    def take(self, ranked: Any, best: list[float], token: int) -> None:
        """Look at the log-probabilities of the next token; afterwards `feed` holds what comes next, or `done` is set.

        Args:
            ranked: (vocabulary,)
            best: the two largest of them.
            token: the likeliest.
        """
        if self.recalling:
            self._recall(token)
        elif self.parts:
            self.scores = ranked[[part[0] for part in self.parts]].tolist()
            self._finish()
        else:
            self._answer(token, best)

    def _recall(self, token: int) -> None:
        if token == self.codec.eos or len(self.ids) >= self.max_new:
            self.closed, self.recalling, self.feed = False, False, self.codec.mark()
            return
        self.ids.append(token)
        self.feed = [token]
        self.recalling = not self.codec.marked(self.ids)

    def _answer(self, token: int, best: list[float]) -> None:
        self.margins.append(best[0] - best[1])
        self.logprobs.append(best[0])
        if token == self.codec.eos:
            return self._finish()
        self.answer.append(token)
        self.feed = [token]
        text = self.codec.text(self.answer)
        if len(self.answer) >= self.max_new or (text.strip() and "\n" in text.lstrip()):
            self._finish()

    def _finish(self) -> None:
        self.done, self.feed = True, []

    def written(self) -> Written:
        recalled = self.codec.parse(self.codec.text(self.ids))[0] if self.closed and self.codec.multi_task else None
        if recalled is None and self.ids:
            recalled = " ".join(self.codec.text(self.ids).split())
        text, margin, logprob = self._chosen() if self.parts else self._said()
        return Written(
            text=text,
            recalled=self.codec.sentences(recalled or ""),
            closed=self.closed,
            margin=margin,
            logprob=logprob,
            tokens=len(self.ids) + len(self.answer),
        )

    def _said(self) -> tuple[str, float, float]:
        lines = self.codec.text(self.answer).strip().splitlines()
        text = self.codec.plain(lines[0] if lines else "")
        return text, sum(self.margins) / len(self.margins), sum(self.logprobs) / len(self.logprobs)

    def _chosen(self) -> tuple[str, float, float]:
        means = [score / len(part) for score, part in zip(self.scores, self.parts, strict=True)]
        order = sorted(range(len(means)), key=lambda number: (-means[number], number))
        margin = means[order[0]] - means[order[1]] if len(order) > 1 else math.inf
        return self.options[order[0]], margin, means[order[0]]


def _choices(codec: Codec, options: Sequence[str]) -> list[list[int]]:
    parts = [codec.answer(option) for option in options]
    for number, part in enumerate(parts):
        if not part:
            raise UserError(f"choices: the tokenizer makes no token of {options[number]!r}, expected a text.")
        if part in parts[:number]:
            other = options[parts.index(part)]
            raise UserError(f"choices: {other!r} and {options[number]!r} are the same to the tokenizer.")
    nested = any(a is not b and b[: len(a)] == a for a in parts for b in parts)
    # Of two choices of which one begins with the other, the shorter needs its end to be told apart.
    return [[*part, codec.eos] for part in parts] if nested else parts


def _score_rest(feeder: _Feeder, rows: Sequence[_Row]) -> None:
    """Add the log-probabilities of the choices' second and later tokens, one choice of every row in each pass."""
    for number in range(max(len(row.parts) for row in rows)):
        parts = [row.parts[number] if number < len(row.parts) else [] for row in rows]
        if all(len(part) < 2 for part in parts):
            continue
        ranked = feeder.peek([part[:-1] for part in parts]).log_softmax(-1)
        for place, (row, part) in enumerate(zip(rows, parts, strict=True)):
            for at, token in enumerate(part[1:]):
                row.scores[number] += float(ranked[place, at, token])


class _Feeder:
    """Gives a model the next ids of every row; knows what each row has read and where its next position is."""

    def __init__(self, model: Any, pad: int, memory: Memory | None, index: Sequence[int]) -> None:
        self.torch = need("torch")
        self.model, self.pad = model, pad
        self.device = next(iter(model.parameters())).device
        self.cache: Any = None if memory is None else memory.taken(index)
        seen = [] if memory is None else [memory.mask[number] for number in index]
        self.mask: Any = self.torch.tensor(seen, dtype=self.torch.long, device=self.device) if seen else None

    def feed(self, ids: Sequence[list[int]], *, left: bool = False) -> Any:
        """Read these ids, which stay read; log-odds of the token after them, float32 (rows, vocabulary).

        Rows without ids are given padding that stays unseen. Padding is on the left of the first ids, so that the last
        column is the last token of every row, and on the right later on.
        """
        block, mask = self._block(ids, left)
        out = forward(self.model, block, mask, self.cache, keep=1 if left else block.shape[1])
        self.cache, self.mask = out.past_key_values, mask
        logits = out.logits.float()
        if logits.shape[1] == 1 or left:
            return logits[:, -1]
        last = self.torch.tensor([max(len(one), 1) - 1 for one in ids], device=self.device)
        return logits[self.torch.arange(len(ids), device=self.device), last]

    def peek(self, ids: Sequence[list[int]]) -> Any:
        """Log-odds after each of these ids, float32 (rows, longest, vocabulary); they are forgotten at once."""
        block, mask = self._block(ids, False)
        return forward(self.model, block, mask, _branch(self.cache), keep=block.shape[1]).logits.float()

    def _block(self, ids: Sequence[list[int]], left: bool) -> tuple[Any, Any]:
        width = max(1, max(map(len, ids)))
        fill = [[0] * (width - len(one)) for one in ids]
        real = [[1] * len(one) for one in ids]
        pads = [[self.pad] * (width - len(one)) for one in ids]
        block = [a + b if left else b + a for a, b in zip(pads, ids, strict=True)]
        mask = [a + b if left else b + a for a, b in zip(fill, real, strict=True)]
        new = self.torch.tensor(mask, dtype=self.torch.long, device=self.device)
        whole = new if self.mask is None else self.torch.cat([self.mask, new], 1)
        return self.torch.tensor(block, device=self.device), whole


def forward(model: Any, ids: Any, mask: Any, cache: Any, *, keep: int) -> Any:
    """The model over these ids after what the cache holds; logits of the last `keep` tokens where it can do that.

    Args:
        model: a causal language model.
        ids: (rows, tokens)
        mask: (rows, tokens of the cache and of `ids`), 0 where nobody may look.
        cache: what was read before; None for nothing. It grows.
        keep: last positions whose logits are wanted.
    """
    places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    extra = {"position_ids": places, "logits_to_keep": keep}
    takes = inspect.signature(model.forward).parameters
    return model(
        input_ids=ids,
        attention_mask=None if bool(mask.all()) else mask,
        past_key_values=cache,
        use_cache=True,
        **{name: value for name, value in extra.items() if name in takes},
    )
