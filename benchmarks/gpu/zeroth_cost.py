"""What a step of zeroth-order tuning costs on a GPU: its time in forward passes, its memory in that of inference.

    python benchmarks/gpu/zeroth_cost.py [--minutes 5]
    python benchmarks/gpu/zeroth_cost.py --device cpu --tiny      # the same code on a tiny shape

Llama shapes of 1.3B and 8B weights with random values in bfloat16; 256, 1,024 and 4,096 tokens a step in rows of 256;
logits at the last position only. `time` is the median step over twice the median forward pass over the same batch,
`memory` the peak of allocated memory over the peak of forward passes alone.

The levels of ours: L0 is the torch reference; L1 builds shifted slices of each weight in a scratch, one sign after the
other; L2 adds the shift inside the multiplication, one sign after the other; L3 is both signs in one batch, by slices
or inside the multiplication. "as shipped" is L3 with the way chosen by the number of tokens.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _gpu import Bench, Row, measure, median, options

TIME_GOAL, MEMORY_GOAL, GOAL_TOKENS = "<= 1.2", "<= 1.02", 1024
ROW_TOKENS = 256
ALWAYS, NEVER = 1 << 30, 0


@dataclass(frozen=True)
class Shape:
    """A Llama shape; `adam` where all of AdamW's state fits one card."""

    name: str
    width: int
    inner: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    adam: bool = False


SHAPES = (
    Shape("1.3B", 2048, 5504, 24, 16, 16, 32_000, adam=True),
    Shape("8B", 4096, 14_336, 32, 32, 8, 128_256),
)
TINY = (Shape("tiny", 128, 256, 2, 4, 2, 96, adam=True),)


@dataclass(frozen=True)
class Level:
    """A way to run our step: variants per pass, kernels or torch, tokens up to which the shift is in the product."""

    name: str
    copies: int
    kernels: bool = True
    fused: int | None = None
    mask: str = "small"


LEVELS = (
    Level("as shipped, small 50 %", 2),
    Level("as shipped, no mask", 2, mask="none"),
    Level("L3 both signs, in the product", 2, fused=ALWAYS),
    Level("L3 both signs, slices", 2, fused=NEVER),
    Level("L2 in the product", 1, fused=ALWAYS),
    Level("L1 slices", 1, fused=NEVER),
)
REFERENCE = Level("L0 torch reference", 2, kernels=False)


def main() -> None:
    given = options(__doc__ or "", minutes=5)
    bench = Bench("zeroth_cost", given)
    for shape in TINY if given.tiny else SHAPES:
        if bench.late(shape.name):
            continue
        model = build(shape, given.device)
        for action in (ours, in_place, low_rank, first_order):
            action(bench, shape, model)
            gc.collect()
        del model
        free(given.device)
    bench.finish()


def build(shape: Shape, device: str) -> Any:
    """The shape with random weights, made on the device in bfloat16 (float32 on a CPU)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def free(device: str) -> None:
    """Give freed memory back, so that it does not stand in the next peak."""
    import torch

    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def batches(bench: Bench, shape: Shape) -> Iterator[tuple[int, Any]]:
    """The numbers of tokens that are measured, the one with goals first, each with its loss."""
    from _methods import LastToken

    sizes = ((8, 4),) if bench.tiny else ((1024, ROW_TOKENS), (256, ROW_TOKENS), (4096, ROW_TOKENS))
    for tokens, row in sizes:
        yield tokens, LastToken(shape.vocabulary, tokens // row, row, bench.device)


def record(
    bench: Bench, shape: Shape, name: str, tokens: int, loss: Any, model: Any, step: Callable[[Any], Any]
) -> None:
    """One case at one size: time and memory beside those of forward passes."""
    import torch

    label = f"{shape.name}, {tokens} tokens, {name}"
    if bench.late(label):
        return
    key = f"forward {shape.name} {tokens}"
    if key not in bench.extra:
        with torch.no_grad():
            times, peak = measure(lambda: loss(model), bench.device, 1 if bench.tiny else 7)
        bench.extra[key] = {"seconds": median(times), "peak_gib": peak}
        bench.add(Row(f"{shape.name}, {tokens} tokens, forward pass", 1000 * median(times), "ms"))
    forward = bench.extra[key]
    try:
        once = bench.tiny or name.endswith(REFERENCE.name)  # the reference takes seconds
        times, peak = measure(lambda: step(loss), bench.device, 1 if once else 5)
    except torch.OutOfMemoryError:
        free(bench.device)
        bench.add(Row(f"{label}: time", None, "x 2 forward passes", note="out of memory"))
        return
    bench.extra[label] = {"seconds": median(times), "peak_gib": peak}
    goal = tokens == GOAL_TOKENS and name.startswith("ours, as shipped")
    unit = 2 * forward["seconds"]
    spread = (min(times) / unit, max(times) / unit)
    bench.add(
        Row(f"{label}: time", median(times) / unit, "x 2 forward passes", spread, TIME_GOAL if goal else None),
        *(
            [Row(f"{label}: memory", peak / forward["peak_gib"], "x inference", None, MEMORY_GOAL if goal else None)]
            if peak is not None
            else []
        ),
    )


def ours(bench: Bench, shape: Shape, model: Any) -> None:
    """Every level, masked and not."""
    from agentopt.weights.zeroth import ZerothOrder

    model.requires_grad_(True)
    for mask in ("small", "none"):
        if bench.late(f"{shape.name}, ours, mask {mask}"):
            return
        # The first weights give the thresholds of the mask; one optimizer then serves all levels.
        tuned = ZerothOrder(model, lr=1e-6, mask=mask, density=0.5)
        levels = [level for level in LEVELS if level.mask == mask]
        if mask == "small" and (bench.tiny or shape.adam):
            levels.append(REFERENCE)
        for tokens, loss in batches(bench, shape):
            for level in levels:
                if level is REFERENCE and tokens not in (GOAL_TOKENS, 8):
                    continue
                with at(tuned, level):
                    record(bench, shape, f"ours, {level.name}", tokens, loss, model, tuned.step)
        del tuned
    model.requires_grad_(False)


@contextmanager
def at(tuned: Any, level: Level) -> Iterator[None]:
    """Run the optimizer's steps in the way of a level."""
    from agentopt.weights.zeroth import _kernels

    before = _kernels.FUSED_TOKENS
    tuned.copies = level.copies
    tuned._prober.kernels = tuned._updater.kernels = level.kernels
    _kernels.FUSED_TOKENS = before if level.fused is None else level.fused
    try:
        yield
    finally:
        _kernels.FUSED_TOKENS = before


def in_place(bench: Bench, shape: Shape, model: Any) -> None:
    """MeZO as published, then with stored masks."""
    from _methods import InPlace, stored_masks

    for name, masked in (("MeZO in place", False), ("Sparse-MeZO, stored mask", True)):
        if bench.late(f"{shape.name}, {name}"):
            return
        peer = InPlace(model, 1e-6, masks=stored_masks(model) if masked else None)
        for tokens, loss in batches(bench, shape):
            record(bench, shape, name, tokens, loss, model, peer.step)
        del peer
        free(bench.device)


def low_rank(bench: Bench, shape: Shape, model: Any) -> None:
    """Our step on LoRA adapters of peft."""
    from agentopt.weights.zeroth import ZerothOrder

    if bench.late(f"{shape.name}, LoRA"):
        return
    wrapped = with_adapters(model)
    tuned = ZerothOrder(wrapped, lr=1e-4, eps=1e-2)
    for tokens, loss in batches(bench, shape):
        record(bench, shape, "ours on LoRA adapters", tokens, loss, wrapped, tuned.step)
    wrapped.unload()


def with_adapters(model: Any) -> Any:
    """Adapters of rank 8 on every linear layer but the head; the base is frozen."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def first_order(bench: Bench, shape: Shape, model: Any) -> None:
    """AdamW on adapters, and on all weights where that fits."""
    from _methods import Adam

    if bench.late(f"{shape.name}, AdamW"):
        return
    wrapped = with_adapters(model)
    peer = Adam(wrapped, 1e-4)
    for tokens, loss in batches(bench, shape):
        record(bench, shape, "AdamW on LoRA adapters", tokens, loss, wrapped, peer.step)
    del peer
    model = wrapped.unload()
    if shape.adam:
        model.requires_grad_(True)
        peer = Adam(model, 1e-6)
        for tokens, loss in batches(bench, shape):
            record(bench, shape, "AdamW on all weights", tokens, loss, model, peer.step)


if __name__ == "__main__":
    main()
