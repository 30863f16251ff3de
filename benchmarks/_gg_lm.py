"""The small language model of gg_training.py: its text, its training in one of several ways, and what it then costs.

The text is GSM8K (problems with worked answers, MIT licence) where `../shared/data/gsm8k` is present, else generated
prose; tokens are byte-pair encoded with a vocabulary learnt from the training part.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _prose import prose

from agentopt.weights import gg

RATE, WARMUP, DECAY = 3e-3, 0.05, 0.1
STEPS = tuple(2.0**-power for power in range(3, 13))
"""Grids on which every trained model is rounded."""


@dataclass(frozen=True)
class Way:
    """One way to train: initialisation, and a wrapper around the optimizer."""

    init: str = "plain"
    """plain: as transformers does (Gaussian, 0.02); gg: `gg.init_`."""
    shape: float = 1.0
    xi: float = 1.0
    """Of `gg.init_`: nu, and the activation coefficient."""
    lam: float = 0.0
    """Strength of BackSlash; 0 for none."""
    nu: float | str = "auto"
    eps: float = 1e-5
    start: float = 0.0
    """BackSlash begins after this share of the steps."""
    prox: bool = True
    stop: float = 1.0
    """After this share of the steps nothing is shrunk any more, and zeros stay zero."""


@dataclass(frozen=True)
class Size:
    """Of the model, of a batch, of the training."""

    name: str
    width: int
    layers: int
    hidden: int
    length: int
    steps: int
    batch: int = 16
    vocabulary: int = 512
    held_out: int = 256
    """Sequences of the validation text."""


SIZE = Size("0.7M", 128, 3, 384, 96, 600)
QUICK = Size("0.1M", 64, 2, 192, 64, 30, held_out=32)


@dataclass(frozen=True)
class Text:
    """Token streams, and what is trained on them."""

    name: str
    size: Size
    train: torch.Tensor
    valid: torch.Tensor


def load_text(data: Path, size: Size) -> Text:
    """The tokens; the name says which text it is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = data / "gsm8k"
    if (folder / "train.jsonl").exists():
        name, train, valid = "GSM8K", _problems(folder / "train.jsonl"), _problems(folder / "test.jsonl")
    else:
        name, train, valid = "generated prose", prose(4_000_000, seed=0), prose(400_000, seed=1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [train[:1_000_000]],
        trainers.BpeTrainer(vocab_size=size.vocabulary, initial_alphabet=alphabet, show_progress=False),
    )
    return Text(name, size, _tokens(tokenizer, train), _tokens(tokenizer, valid))


def _problems(path: Path) -> str:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)


def _tokens(tokenizer: Any, text: str) -> torch.Tensor:
    parts = text.split("\n\n")
    return torch.tensor(
        [token for one in tokenizer.encode_batch([f"{part}\n\n" for part in parts]) for token in one.ids]
    )


def new_model(way: Way, seed: int, size: Size) -> Any:
    """A Llama with a tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=size.length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    if way.init == "gg":
        gg.init_(model, nu=way.shape, xi=way.xi, seed=seed)
    return model


def run(way: Way, seed: int, text: Text, tell: Callable[[str], None]) -> dict[str, Any]:
    """Train and measure. The batches depend on the seed alone."""
    begun = time.process_time()
    size, steps = text.size, text.size.steps
    model = new_model(way, seed, size)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY, fused=True)
    if way.lam:
        optimizer = gg.BackSlash(optimizer, way.lam, way.nu, way.eps, prox=way.prox, log_every=max(1, steps // 10))  # pyright: ignore[reportArgumentType]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    order = torch.Generator().manual_seed(seed)
    curve: list[tuple[int, float]] = []
    validation: list[tuple[int, float]] = []
    recent: list[float] = []
    for step in range(1, steps + 1):
        starts = torch.randint(len(text.train) - size.length, (size.batch,), generator=order)
        rows = torch.stack([text.train[start : start + size.length] for start in starts.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lam"] = way.lam if step > way.start * steps else 0.0
        if way.lam and step == round(way.stop * steps) + 1:
            optimizer.freeze_zeros()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(float(loss.detach()))
        if step % max(1, steps // 40) == 0:
            curve.append((step, sum(recent) / len(recent)))
            recent = []
        if step % max(1, steps // 5) == 0:
            validation.append((step, perplexity(model, text)))
            tell(f"  step {step}: loss {curve[-1][1]:.3f}, validation perplexity {validation[-1][1]:.3f}")
    return {
        "perplexity": validation[-1][1],
        "curve": curve,
        "validation": validation,
        "grids": [grid(model, text, step) for step in STEPS],
        "log": [[record.step, record.nu, record.sigma, record.zeros, record.bits] for record in optimizer.log()]
        if way.lam
        else [],
        "weights": sum(one.numel() for one in model.parameters() if one.ndim == 2),
        "exact_zeros": _share(model, lambda one: int((one == 0).sum())),
        "fitted_nu": _share(model, lambda one: gg.fit(one).nu * one.numel()),
        "cpu_seconds": round(time.process_time() - begun, 1),
    }


def grid(model: Any, text: Text, step: float) -> dict[str, float]:
    """Every matrix rounded to multiples of `step`: perplexity, and bits per weight with one code per matrix."""
    before = {name: one.detach().clone() for name, one in model.named_parameters() if one.ndim == 2}
    total = sum(one.numel() for one in before.values())
    bits = dict.fromkeys(("entropy", "huffman", "eg", "zeros"), 0.0)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if name in before:
                rates = gg.bits_per_weight(one, step)
                for key in bits:
                    bits[key] += getattr(rates, key) * one.numel() / total
                one.copy_(torch.round(one / step) * step)
        found = perplexity(model, text)
        for name, one in model.named_parameters():
            if name in before:
                one.copy_(before[name])
    return {"step": step, "perplexity": found, **bits}


@torch.no_grad()
def perplexity(model: Any, text: Text) -> float:
    """Of the first sequences of the validation text."""
    size = text.size
    rows = text.valid[: size.held_out * size.length].view(-1, size.length)
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) for part in rows.split(32)]
    model.train()
    return math.exp(min(20.0, sum(losses) / len(losses)))


def _share(model: Any, of: Callable[[torch.Tensor], float]) -> float:
    matrices = [one.detach() for one in model.parameters() if one.ndim == 2]
    return sum(of(one) for one in matrices) / sum(one.numel() for one in matrices)


def _rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine to a tenth."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
