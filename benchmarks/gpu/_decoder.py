"""One decode step of a Llama of random weights: the shape of the 8B model, its linear layers in one of several formats.

Nothing here is trained and no text comes out; it reads and multiplies what a real step reads and multiplies, with keys
and values of `context` tokens in place for every sequence. Layers do not share weights: they come from memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gg_gemm import random_layer

Product = Callable[[Any], Any]


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    layers: int
    heads: int
    groups: int
    """Heads of keys and values."""
    width: int
    """Of a head."""
    inner: int
    vocabulary: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers of one block."""
        return {
            "qkv": ((self.heads + 2 * self.groups) * self.width, self.hidden),
            "o": (self.hidden, self.heads * self.width),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }

    @property
    def weights(self) -> int:
        """Numbers in the linear layers of all blocks, without the head."""
        return self.layers * sum(height * width for height, width in self.linears.values())


LLAMA_8B = Shape(4096, 32, 32, 8, 128, 14_336, 128_256)
TINY = Shape(64, 2, 4, 2, 16, 96, 256)


def bf16(height: int, width: int, device: str, seed: int) -> Product:
    """torch's own product."""
    import torch

    dice = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(height, width, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=dice)
    return functools.partial(torch.nn.functional.linear, weight=weight)


def fp8(height: int, width: int, device: str, seed: int) -> Product:
    """Weights and activations in E4M3 with a scale per row; the activations are quantized within the time."""
    import torch

    product: Any = torch._scaled_mm
    dice = torch.Generator(device).manual_seed(seed)
    wide = torch.empty(height, width, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=dice)
    by_row = wide.abs().amax(1, keepdim=True).float() / 448
    weight = (wide / by_row).to(torch.float8_e4m3fn).t()
    scale = by_row.t().contiguous()
    del wide

    def run(x: Any) -> Any:
        largest = x.abs().amax(-1, keepdim=True).float().clamp_min_(1e-12) / 448
        narrow = (x / largest).to(torch.float8_e4m3fn)
        return product(narrow, weight, largest, scale, out_dtype=torch.bfloat16)

    return run


def coded(height: int, width: int, device: str, seed: int, *, format: str) -> Product:
    """agentopt's kernels: one byte per weight, activations as they are."""
    from agentopt.weights.gg.kernels import linear

    codes, scale, table, book = random_layer(format, height, width, device, seed)
    return lambda x: linear(x, codes, scale, table, book, format=format)


BUILDERS: dict[str, Callable[..., Product]] = {
    "bf16": bf16,
    "fp8": fp8,
    "rf8-gg": functools.partial(coded, format="rf8-gg"),
}


class Decoder:
    """`step(batch)` in a format; the head stays in bfloat16 in all of them, as checkpoints leave it."""

    def __init__(self, shape: Shape, format: str, device: str, batch: int, context: int) -> None:
        import torch

        self.shape, self.device, self.context = shape, device, context
        build = BUILDERS[format]
        self.blocks = [
            {
                name: build(height, width, device, 16 * block + place)
                for place, (name, (height, width)) in enumerate(shape.linears.items())
            }
            for block in range(shape.layers)
        ]
        self.embedding: Any = torch.randn(shape.vocabulary, shape.hidden, dtype=torch.bfloat16, device=device)
        self.head = bf16(shape.vocabulary, shape.hidden, device, 1)
        self.norm: Any = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
        angles = torch.outer(torch.arange(context + 1), 500_000.0 ** (-torch.arange(0, shape.width, 2) / shape.width))
        self.turn: Any = (
            angles.cos().to(device, torch.bfloat16)[context],
            angles.sin().to(device, torch.bfloat16)[context],
        )
        self.resize(batch)

    def resize(self, batch: int) -> None:
        """Keys and values for another number of sequences."""
        import torch

        shape = (self.shape.layers, 2, batch, self.shape.groups, self.context + 1, self.shape.width)
        self.cache: Any = torch.randn(shape, dtype=torch.bfloat16, device=self.device)
        self.tokens: Any = torch.zeros(batch, dtype=torch.long, device=self.device)

    def step(self) -> None:
        """The next token of every sequence, written to `tokens`."""
        import torch

        rows = torch.nn.functional.rms_norm
        size = (self.shape.hidden,)
        x = self.embedding[self.tokens]
        for block, cache in zip(self.blocks, self.cache, strict=True):
            x = x + block["o"](self._attend(block["qkv"](rows(x, size, self.norm, 1e-5)), cache))
            gate, up = block["gate_up"](rows(x, size, self.norm, 1e-5)).chunk(2, -1)
            x = x + block["down"](torch.nn.functional.silu(gate) * up)
        self.tokens.copy_(self.head(rows(x, size, self.norm, 1e-5)).argmax(-1))

    def _attend(self, qkv: Any, cache: Any) -> Any:
        import torch

        shape, batch = self.shape, len(qkv)
        parts = qkv.view(batch, shape.heads + 2 * shape.groups, 1, shape.width)
        query, key, value = parts.split([shape.heads, shape.groups, shape.groups], 1)
        cache[0][:, :, self.context : self.context + 1].copy_(self._turned(key))
        cache[1][:, :, self.context : self.context + 1].copy_(value)
        seen = torch.nn.functional.scaled_dot_product_attention(
            self._turned(query), cache[0], cache[1], enable_gqa=True
        )
        return seen.reshape(batch, shape.heads * shape.width)

    def _turned(self, x: Any) -> Any:
        import torch

        cosine, sine = self.turn
        one, other = x.chunk(2, -1)
        return torch.cat((one * cosine - other * sine, other * cosine + one * sine), -1)
