"""The models whose weights are quantized in gg_numerics.py and gg_quality.py: the embedded one, and small ones of ours.

Ours are Llamas of two blocks, trained here on the text of `_gg_lm.py`: their weights were never in another format, as
those of the embedded model were (it is unpacked from a file of 4 and 8 bits).
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from _gg_lm import SIZE, Text, load_text

LENGTH, BATCH = 128, 8
RATE = 2e-3


@functools.cache
def _text(data: Path) -> Text:
    return load_text(data, SIZE)


def linears(model: Any) -> dict[str, Any]:
    """The layers that are quantized, by name: all but the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and name.rpartition(".")[2] != "lm_head"
    }


def embedded() -> tuple[Any, Any]:
    """The embedded model and its tokenizer; unpacked once, then kept in the temporary folder."""
    from agentopt.weights import load

    kept = Path(tempfile.gettempdir()) / "agentopt-gg-embedded"
    if (kept / "done").exists():
        return load.model(kept)
    model, tokenizer = load.model("embedded")
    model.save_pretrained(kept)
    tokenizer.save_pretrained(kept)
    (kept / "done").touch()
    return model, tokenizer


def trained(width: int, seed: int, steps: int, data: Path) -> tuple[Any, torch.Tensor, float]:
    """A model, the held-out tokens, and its last training loss. Kept in the temporary folder for the next run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SIZE.vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    text = _text(data)
    kept = Path(tempfile.gettempdir()) / f"agentopt-gg-{text.name.replace(' ', '-')}-{width}-{seed}-{steps}.pt"
    if kept.exists():
        found = torch.load(kept, weights_only=True)
        model.load_state_dict(found["model"])
        return model.eval(), text.valid, found["loss"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    recent: list[float] = []
    for _ in range(steps):
        starts = torch.randint(len(text.train) - LENGTH, (BATCH,), generator=order)
        rows = torch.stack([text.train[start : start + LENGTH] for start in starts.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent = [*recent[-19:], float(loss.detach())]
    final = sum(recent) / len(recent)
    torch.save({"model": model.state_dict(), "loss": final}, kept)
    return model.eval(), text.valid, final
