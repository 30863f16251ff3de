"""The model in training, as a policy over texts: what it is told, what it writes, how likely what it wrote is.

What it is told is conditioned on the budget: the limit and the tokenizer's name stand before the text, and every unit
stands behind a tag that names its kind, with a `!` where it must not be dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from agentopt.capsules._types import Document
from agentopt.capsules.counting._tokens import Meter
from agentopt.errors import RunError, UserError
from agentopt.weights.load import need


def instruction(document: Document, meter: Meter) -> str:
    """The text the policy is given for one document and one budget."""
    units = [
        f"[{unit.kind}{' !' if unit.keep else ''}] {document.text[unit.start : unit.end]}" for unit in document.units
    ]
    tokenizer = meter.tokenizer.name.rpartition("/")[2]
    head = f"Shorten to at most {meter.limit} tokens of {tokenizer} ; keep [ ! ] as it is .\n"
    return head + ("\n".join(units) or document.text)


@dataclass
class Written:
    """What a policy wrote: one row per text."""

    ids: Any
    """Prompt (padded on the left) and text (padded on the right), [rows, prompt + text]."""
    attention: Any
    mask: Any
    """1.0 for the text's tokens up to and including its end, [rows, text]."""
    texts: list[str]

    def rows(self, start: int, end: int) -> Written:
        """A part of the batch."""
        return Written(self.ids[start:end], self.attention[start:end], self.mask[start:end], self.texts[start:end])


class Policy:
    """A causal model with the weights that are trained; the others stay as they are."""

    def __init__(self, model: Any, tokenizer: Any, *, temperature: float = 1.0) -> None:
        self.torch = need("torch")
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature
        self.trained: list[Any] = [weight for weight in model.parameters() if weight.requires_grad]
        self.reference: list[Any] = []
        self.device = next(model.parameters()).device

    # --- what goes in ------------------------------------------------------------------------------------------------

    def prompt(self, document: Document, meter: Meter) -> str:
        """The instruction, in the model's chat form when it has one."""
        text = instruction(document, meter)
        if not self.tokenizer.chat_template:
            return text + "\n"
        turn = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)

    def prompt_ids(self, document: Document, meter: Meter) -> list[int]:
        """Token ids of the prompt; UserError when the model cannot read that many."""
        ids, room = self._read(document, meter), self.room
        if room is not None and len(ids) >= room:
            raise UserError(
                f"document of {len(document.text):,} characters: found {len(ids):,} tokens with its instruction, the "
                f"model reads {room:,}; give shorter documents (split them) or another model."
            )
        return ids

    def readable(self, document: Document, meter: Meter) -> bool:
        """Whether the model can read the document and write a text of the budget after it."""
        room = self.room
        return room is None or len(self._read(document, meter)) + min(meter.limit, room // 2) < room

    @property
    def room(self) -> int | None:
        """Tokens that the model takes in all; None when it does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def _read(self, document: Document, meter: Meter) -> list[int]:
        special = not self.tokenizer.chat_template
        return self.tokenizer(self.prompt(document, meter), add_special_tokens=special)["input_ids"]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text the policy should write, with the end token."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]

    # --- what comes out ----------------------------------------------------------------------------------------------

    def write(
        self, prompts: Sequence[list[int]], *, each: int, longest: int, seed: int, greedy: bool = False
    ) -> Written:
        """`each` texts for every prompt, of at most `longest` tokens, drawn from the unmodified distribution."""
        torch = self.torch
        ids, attention = self._left([prompt for prompt in prompts for _ in range(each)])
        drawing: dict[str, Any] = {"do_sample": False}
        if not greedy:
            drawing = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=attention,
                max_new_tokens=longest,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                **drawing,
            )
        text = out[:, ids.shape[1] :]
        end = text == self.tokenizer.eos_token_id
        mask = ((end.cumsum(1) - end.long()) == 0).float()
        texts = [
            self.tokenizer.decode(row[keep.bool()], skip_special_tokens=True).strip()
            for row, keep in zip(text, mask, strict=True)
        ]
        attention = torch.cat([attention, mask.long()], 1)
        return Written(out, attention, mask, texts)

    def given(self, prompts: Sequence[list[int]], texts: Sequence[str]) -> Written:
        """Texts from elsewhere, in the same form as written ones."""
        torch = self.torch
        ids, attention = self._left(list(prompts))
        rows = [self.text_ids(text) for text in texts]
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        right = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows], device=self.device)
        return Written(torch.cat([ids, right], 1), torch.cat([attention, mask.long()], 1), mask, list(texts))

    def log_probs(self, written: Written) -> Any:
        """Log-probability of every token of the texts, 0 after their end, [rows, text]."""
        torch, length = self.torch, written.mask.shape[1]
        logits = self._run(written, logits_to_keep=length + 1).logits[:, -length - 1 : -1]
        logits = logits.float() / self.temperature
        tokens = written.ids[:, -length:]
        chosen = logits.gather(2, tokens.unsqueeze(2)).squeeze(2) - torch.logsumexp(logits, 2)
        return chosen * written.mask

    def hidden(self, written: Written) -> Any:
        """Mean of the last hidden state over the texts' tokens, [rows, width]."""
        length = written.mask.shape[1]
        state = self._run(written, output_hidden_states=True, logits_to_keep=1).hidden_states[-1][:, -length:].float()
        mask = written.mask.unsqueeze(2)
        return (state * mask).sum(1) / mask.sum(1).clamp(min=1.0)

    def _run(self, written: Written, **more: Any) -> Any:
        positions = (written.attention.cumsum(1) - 1).clamp(min=0)
        return self.model(
            input_ids=written.ids, attention_mask=written.attention, position_ids=positions, use_cache=False, **more
        )

    def _left(self, prompts: Sequence[list[int]]) -> tuple[Any, Any]:
        width, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
        seen = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return self.torch.tensor(ids, device=self.device), self.torch.tensor(seen, device=self.device)

    # --- the reference -----------------------------------------------------------------------------------------------

    def freeze_reference(self) -> None:
        """From now on the reference is the policy as it is: a copy of what is trained (small for an adapter)."""
        self.reference = [weight.detach().clone() for weight in self.trained]

    @contextlib.contextmanager
    def as_reference(self) -> Generator[None]:
        """The model with the reference's weights in place of the trained ones, and no gradients."""
        if not self.reference:
            self.freeze_reference()
        current = [weight.data for weight in self.trained]
        try:
            for weight, frozen in zip(self.trained, self.reference, strict=True):
                weight.data = frozen
            with self.torch.no_grad():
                yield
        finally:
            for weight, kept in zip(self.trained, current, strict=True):
                weight.data = kept


@contextlib.contextmanager
def memory_explained(torch: Any, doing: str, advice: str) -> Generator[None]:
    """Out of memory becomes one sentence that says what to lower."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; on the CPU it is a plain RuntimeError
        if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
            raise RunError(f"out of memory while {doing}: lower {advice}.") from error
        raise
