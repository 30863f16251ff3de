"""Kernels in Triton's interpreter beside the torch code; prints one JSON line per case.

A program of its own: the interpreter has to be chosen before Triton is first imported, and would then be used by every
other test of the process.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from agentopt.weights.zeroth import Probe, ZerothOrder, _kernels, _noise
from agentopt.weights.zeroth._philox import philox, probe_seed

IDENTITY = 0xF0000001
SEEDS = [1 << 63 | 5, 77, 3]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def direction(seed: int, scale: float, size: int) -> Any:
    out = torch.empty(size)
    _noise.fill_sign_range(seed, IDENTITY, 0, size, scale, out)
    return out


def linear_by_hand(x: Any, weight: Any, scales: list[float], seeds: list[int], **mask: Any) -> Any:
    flat, outs = weight.view(-1), []
    for part, seed, scale in zip(x.chunk(len(seeds)), seeds, scales, strict=True):
        kept = {
            "none": lambda: torch.ones_like(flat),
            "small": lambda: flat.abs() <= mask["threshold"],
            "large": lambda: flat.abs() >= mask["threshold"],
            "random": lambda: _noise.random_mask(
                mask["mask_seed"], IDENTITY, 0, flat.numel(), mask["density"], x.device
            ),
        }[mask["mask"]]()
        shifted = (flat.float() + direction(seed, scale, flat.numel()) * kept).to(weight.dtype).view_as(weight)
        outs.append(part.float() @ shifted.float().t())
    return torch.cat(outs).to(x.dtype)


def linear_cases() -> Iterator[tuple[str, float]]:
    shapes = [("fused", 70, 128), ("sliced", 20, 50), ("sliced", 5, 7)]
    for (way, height, width), mask in itertools.product(shapes, ("none", "small", "large", "random")):
        for name in ("float32", "bfloat16") if mask == "small" and width > 7 else ("float32",):
            _kernels.FUSED_TOKENS = 256 if way == "fused" else 0
            _kernels.SLICE_BYTES = 13 * width * DTYPES[name].itemsize
            weight = (torch.randn(height, width) * 0.05).to(DTYPES[name])
            x = torch.randn(10, 3, width).to(DTYPES[name])
            seeds, scales = [SEEDS[0], SEEDS[0], 7, 8, 8], [1e-2, -1e-2, 2e-2, 0.0, -1e-2]
            kept: dict[str, Any] = {
                "mask": mask,
                "threshold": float(weight.abs().float().median()),
                "mask_seed": 1 << 63 | 9,
                "density": 0.3,
            }
            expected = linear_by_hand(x, weight, scales, seeds, **kept)
            bias = torch.zeros(height, dtype=x.dtype)
            found = _kernels.linear(x, weight, bias, seeds, scales, 2, IDENTITY, **kept)
            error = float((found - expected).float().norm() / expected.float().norm())
            yield f"linear {way} {height}x{width} {mask} {name}", error / (1e-5 if name == "float32" else 1e-2)


def network() -> Any:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(50, 30), torch.nn.LayerNorm(30, bias=False))


def update_cases() -> Iterator[tuple[str, float]]:
    """A matrix and a norm moved by both ways; every bit of every weight must be the same."""
    settings: list[tuple[Any, Any, float]] = [
        ("small", "fixed", 0.1),
        ("random", "dynamic", 0.1),
        ("none", "fixed", 0.0),
        ("large", "fixed", 0.0),
        ("small", "dynamic", 0.0),
    ]
    for name, dtype in DTYPES.items():
        for mask, update, decay in settings if name == "bfloat16" else settings[:2]:
            models: list[Any] = []
            for kernels in (False, True):
                model = network().to(dtype)
                zo = ZerothOrder(
                    model,
                    lr=0.1,
                    mask=mask,
                    density=0.4,
                    mask_update=update,
                    probe=Probe(population=3),
                    weight_decay=decay,
                    kernels=kernels,
                )
                for step in range(2):
                    zo.update(step, probe_seed(0, step), [0.013, -0.2, 0.0007], 0.1)
                models.append(model.state_dict())
            different = sum(
                int((one.view(torch.int16 if dtype.itemsize == 2 else torch.int32) != other).sum())
                for one, other in (
                    (first, second.view(torch.int16 if dtype.itemsize == 2 else torch.int32))
                    for first, second in zip(models[0].values(), models[1].values(), strict=True)
                )
            )
            yield f"update {mask} {update} {name}", 2.0 * different


def step_cases() -> Iterator[tuple[str, float]]:
    """A whole step: the losses of both ways agree."""
    x = torch.randn(6, 50)
    masks: tuple[Any, ...] = ("small", "random")
    for mask in masks:
        found = [
            ZerothOrder(network(), lr=0.0, mask=mask, kernels=kernels).step(lambda model: float(model(x).pow(3).mean()))
            for kernels in (False, True)
        ]
        apart = max(abs(one - other) for one, other in zip(found[0].losses, found[1].losses, strict=True))
        yield f"step {mask}", apart / (1e-5 * abs(found[0].loss))


def generator_cases() -> Iterator[tuple[str, float]]:
    """Triton's own generator draws our words; a seed is any 64 bits."""
    for seed in (0, 12345, (1 << 64) - 1):
        out = torch.zeros((16, 4), dtype=torch.int32)
        wrapped = torch.tensor([seed - (1 << 64) if seed >= 1 << 63 else seed])
        words_kernel[(1,)](out, wrapped)
        yield f"philox {seed:x}", 2.0 * int((out != philox(seed, torch.arange(16), 5, 3, 1)).sum())


@triton.jit
def words_kernel(out: Any, seed: Any) -> None:
    counter = tl.arange(0, 16)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), counter, 5, 3, 1)
    tl.store(out + counter * 4, w0)
    tl.store(out + counter * 4 + 1, w1)
    tl.store(out + counter * 4 + 2, w2)
    tl.store(out + counter * 4 + 3, w3)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, error in itertools.chain(generator_cases(), linear_cases(), update_cases(), step_cases()):
        print(json.dumps({"name": name, "error": error}), flush=True)


if __name__ == "__main__":
    main()
