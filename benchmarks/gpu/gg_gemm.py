"""What a layer of one byte per weight costs on a GPU, beside cuBLAS in bfloat16 and torch's own 8-bit products.

    python benchmarks/gpu/gg_gemm.py [--minutes 8]
    python benchmarks/gpu/gg_gemm.py --device cpu --tiny      # the same code on a tiny shape, without kernels

First what is decoded and multiplied is compared with a float32 reference. Then one layer at a time is measured inside a
CUDA graph that goes around as many copies of its weights as fill the L2 cache four times over, so that weights come
from memory. A time is the median of the graph's replays over its calls; the range is that of the replays. `bandwidth`
is the bytes of the weights over that time, as a share of what a copy inside the GPU reads and writes.

Beside it stand `torch._weight_int8pack_mm` (8-bit weights, 16-bit activations) and `torch._scaled_mm` with a scale per
row (both in FP8; the activations are quantized outside the time), where this torch has them for this GPU.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _gpu import Bench, Row, measure, median, options, synchronize

FORMATS = ("rf8-gg", "rf8", "e3m4")
SHAPES = ((4096, 4096), (14_336, 4096), (4096, 14_336), (8192, 8192))
TOKENS = (1, 8, 2, 4, 512, 2048, 4096, 16, 32, 64, 128, 256)
"""Those with goals first."""
FEW_GOAL, MANY_GOAL, STOCK_GOAL = ">= 1.7", ">= 0.9", ">= 0.9"
CACHES = 4


Calls = list[Callable[[Any], Any]]
"""The product with each copy of one layer's weights."""


def _torch() -> Any:
    """Without types: half of what is used here has none."""
    import torch

    return torch


def main() -> None:
    given = options(__doc__ or "", minutes=8)
    bench = Bench("gg_gemm", given)
    correctness(bench)
    bandwidth = copy_bandwidth(bench)
    sizes = ((64, 48),) if bench.tiny else SHAPES
    tokens = (1, 3, 512) if bench.tiny else TOKENS
    bench.extra.update(microseconds={}, missing={})
    for count in tokens:
        for height, width in sizes:
            if not bench.late(f"{height}x{width} M={count}"):
                compare(bench, height, width, count, bandwidth)
    if not bench.late("ways"):
        ways(bench, *sizes[-1])
    bench.finish()


def table_of(format: str, device: str) -> Any:
    """Its values; for rf8-gg eight books, the compander of a normal distribution made wider and wider."""
    torch = _torch()
    from agentopt.weights.gg import _tables

    if format != "rf8-gg":
        return _tables.table(format).to(device)
    levels = torch.zeros(8, 256)
    levels[:, :255] = (
        torch.special.ndtri((torch.arange(255) + 0.5) / 255) * torch.linspace(1.0, 2.0, 8)[:, None] * 3**0.5
    )
    return levels.to(device)


def random_layer(format: str, height: int, width: int, device: str, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Codes, scale, table, book_id; codes as often as those of normal weights in their compander."""
    torch = _torch()
    dice = torch.Generator(device).manual_seed(seed)
    draw = torch.randn(height, width, generator=dice, device=device)
    codes = torch.special.ndtr(draw / 3**0.5).mul_(255).to(torch.uint8)
    scale = torch.rand(height, 1, generator=dice, device=device) * 0.02 + 0.01
    book = torch.randint(0, 8, (height, 1), generator=dice, device=device, dtype=torch.uint8)
    return codes, scale, table_of(format, device), book if format == "rf8-gg" else None


def correctness(bench: Bench) -> None:
    """Every code, and products of odd and of even shapes in every way, beside float32."""
    torch = _torch()
    from agentopt.weights.gg.kernels import decode, linear

    device = bench.device
    for format in FORMATS:
        codes, scale, table, book = random_layer(format, 8, 1024, device)
        codes = torch.arange(255, device=device, dtype=torch.uint8).repeat(8, 5)[:, :1024].contiguous()
        rows = torch.zeros(8, 1, dtype=torch.long, device=device) if book is None else book.long()
        exact = (table[rows, codes.long()] * scale).bfloat16()
        found = decode(codes, scale, table, book, dtype=torch.bfloat16, format=format)
        bench.add(Row(f"{format}: codes that decode otherwise", float((found != exact).sum()), "codes", goal="<= 0"))
        worst = 0.0
        for count, height, width in ((1, 257, 1000), (7, 130, 512), (16, 96, 2050), (33, 300, 520), (300, 200, 256)):
            parts = random_layer(format, height, width, device, seed=count)
            x = torch.randn(count, width, generator=torch.Generator(device).manual_seed(1), device=device).bfloat16()
            out = linear(x, *parts, format=format).double()
            weight = decode(*parts, dtype=torch.float32, format=format).double()
            wanted = x.double() @ weight.t()
            worst = max(worst, float((out - wanted).norm() / wanted.norm()))
        bench.add(Row(f"{format}: error of a product", worst, "of the norm", goal="<= 1e-2"))


def copy_bandwidth(bench: Bench) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    torch = _torch()
    source = torch.randint(0, 255, (1 << 16 if bench.tiny else 1 << 30,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    times, _ = measure(lambda: target.copy_(source), bench.device, 20)
    rates = [2 * len(source) / time for time in times]
    bench.add(Row("copy bandwidth", median(rates) / 1e9, "GB/s", (min(rates) / 1e9, max(rates) / 1e9)))
    return median(rates)


def compare(bench: Bench, height: int, width: int, count: int, bandwidth: float) -> None:
    """One product in every form."""
    torch = _torch()
    where = f"{height}x{width} M={count}"
    x = torch.randn(count, width, device=bench.device).bfloat16()
    found: dict[str, list[float]] = {}
    for build in (bf16, *(coded(format) for format in FORMATS), int8_packed, fp8_rowwise):
        name = build.__name__
        try:
            layer = build(height, width, copies(bench, height * width * (2 if build is bf16 else 1)), x)
            found[name] = timed(bench, layer, x)
        except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
            if name in ("bf16", *FORMATS):
                raise
            bench.extra["missing"].setdefault(name, {})[where] = str(error).splitlines()[0][:200]
    bench.extra["microseconds"][where] = {name: [round(1e6 * t, 3) for t in times] for name, times in found.items()}
    base = median(found["bf16"])
    goal = FEW_GOAL if count <= 8 else MANY_GOAL if count >= 512 else None
    for format in FORMATS:
        mine = median(found[format])
        spread = (base / max(found[format]), base / min(found[format]))
        share = height * width / mine / bandwidth
        note = f"{1e6 * mine:.1f} us" + (f", {share:.0%} of the copy bandwidth" if count <= 16 else "")
        peer = ("cuBLAS bf16, us", 1e6 * base)
        bench.add(Row(f"{format} {where}: speed over bf16", base / mine, "x", spread, goal, *peer, note=note))
    stock(bench, where, found, count)


def stock(bench: Bench, where: str, found: dict[str, list[float]], count: int) -> None:
    """Ours beside what torch has."""
    for name, goal in (("int8_packed", STOCK_GOAL if count <= 8 else None), ("fp8_rowwise", None)):
        if name not in found:
            continue
        peer = median(found[name])
        for format in FORMATS:
            ratio = peer / median(found[format])
            bench.add(Row(f"{format} {where}: speed over {name}", ratio, "x", None, goal, f"{name}, us", 1e6 * peer))


def copies(bench: Bench, size: int) -> int:
    """How many copies of a weight fill the cache so often that none of it is left when its turn comes."""
    if bench.device == "cpu":
        return 2
    torch = _torch()
    return max(2, -(-CACHES * torch.cuda.get_device_properties(0).L2_cache_size // size))


def bf16(height: int, width: int, number: int, x: Any) -> Calls:
    torch = _torch()
    weights = [torch.randn(height, width, device=x.device).mul_(0.02).bfloat16() for _ in range(number)]

    def run(x: Any, weight: Any) -> Any:
        return torch.nn.functional.linear(x, weight)

    return [functools.partial(run, weight=weight) for weight in weights]


def coded(format: str) -> Callable[[int, int, int, Any], Calls]:
    """Ours, in one format."""

    def build(height: int, width: int, number: int, x: Any) -> Calls:
        from agentopt.weights.gg.kernels import linear

        layers = [random_layer(format, height, width, str(x.device), seed) for seed in range(number)]
        return [lambda x, one=one: linear(x, *one, format=format) for one in layers]

    build.__name__ = format
    return build


def int8_packed(height: int, width: int, number: int, x: Any) -> Calls:
    torch = _torch()
    product: Any = torch._weight_int8pack_mm
    scale = torch.full((height,), 0.01, dtype=torch.bfloat16, device=x.device)
    weights = [torch.randint(-127, 127, (height, width), dtype=torch.int8, device=x.device) for _ in range(number)]
    return [lambda x, w=weight: product(x, w, scale) for weight in weights]


def fp8_rowwise(height: int, width: int, number: int, x: Any) -> Calls:
    torch = _torch()
    product: Any = torch._scaled_mm
    kind = torch.float8_e4m3fn
    weights = [torch.randn(height, width, device=x.device).to(kind) for _ in range(number)]
    by_row, by_column = torch.ones(len(x), 1, device=x.device), torch.ones(1, height, device=x.device)
    narrow = x.to(kind)

    def run(weight: Any) -> Any:
        return product(narrow, weight.t(), by_row, by_column, out_dtype=torch.bfloat16, use_fast_accum=True)

    return [lambda _x, w=weight: run(w) for weight in weights]


def timed(bench: Bench, calls: Sequence[Callable[[Any], Any]], x: Any, repeats: int = 15) -> list[float]:
    """Seconds per call, of each replay of a graph that holds them all."""
    if bench.device == "cpu":
        times, _ = measure(lambda: [call(x) for call in calls], bench.device, 2)
        return [time / len(calls) for time in times]
    torch = _torch()
    side: Any = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call(x)
    graph.replay()
    synchronize(bench.device)
    found: list[float] = []
    for _ in range(repeats):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        found.append(begun.elapsed_time(ended) / 1e3 / len(calls))
    return found


def ways(bench: Bench, height: int, width: int) -> None:
    """The same product in each of the three ways, around the thresholds between them."""
    torch = _torch()
    from agentopt.weights.gg.kernels import _dispatch

    fitting = {
        "few": [config for _, config in _dispatch.CONFIGS if config.way == "few"][-1],
        "tiled": [config for _, config in _dispatch.CONFIGS if config.way == "tiled"][-1],
        "scratch": _dispatch.Config("scratch"),
    }
    for format in FORMATS[:1]:
        for count in (3,) if bench.tiny else (24, 48, 96, 192, 384, 768):
            x = torch.randn(count, width, device=bench.device).bfloat16()
            layer = coded(format)(height, width, copies(bench, height * width), x)
            found: dict[str, float] = {}
            for name, config in fitting.items():
                if bench.late(f"ways M={count} {name}"):
                    return
                _dispatch.OVERRIDES[count, height, width] = config
                found[name] = statistics.median(timed(bench, layer, x))
            _dispatch.OVERRIDES.clear()
            for name, time in found.items():
                bench.add(Row(f"{format} {height}x{width} M={count} by {name}", 1e6 * time, "us"))


if __name__ == "__main__":
    main()
