"""Tokens per second of decoding with a Llama of the 8B shape and random weights, in bf16, FP8 and rf8-gg.

    python benchmarks/gpu/serve_tokens.py [--minutes 8]
    python benchmarks/gpu/serve_tokens.py --device cpu --tiny      # the same code on a tiny shape

"kernels": a decode step of torch and agentopt's kernels alone, captured in a CUDA graph: 512 tokens of context per
sequence, the head in bfloat16, batches of 1, 8 and 64. FP8 is `torch._scaled_mm` with a scale per row on both sides,
activations quantized within the step. It has no scheduler, sampler or HTTP, so it is above what an engine reaches.

"vLLM", where it can be imported: the same shape through `LLM.generate`, the difference between long and short replies,
so that prompts and the start are not in it. bf16 and FP8 (vLLM's own online quantization) load random weights; for
rf8-gg a checkpoint of random codes is written to a temporary folder (about 9 GB). Each runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _decoder import BUILDERS, LLAMA_8B, TINY, Decoder
from _gpu import ROOT, Bench, Row, measure, median, options
from gg_gemm import timed

BATCHES = (1, 8, 64)
CONTEXT = 512
GOALS = {1: ">= 1.5", 8: ">= 1.4", 64: ">= 1.0"}
"""Of rf8-gg over bf16: the bound at batch 1 with the head in bfloat16 is 1.87."""


def main() -> None:
    given = options(__doc__ or "", minutes=8)
    bench = Bench("serve_tokens", given)
    found: dict[str, dict[int, list[float]]] = {}
    bench.extra["missing"] = {}
    for format in BUILDERS:
        if not bench.late(f"kernels {format}"):
            found[format] = steps(bench, format)
            rows(bench, "kernels", format, found)
    if importlib.util.find_spec("vllm") is None:
        bench.extra["vllm"] = "not installed here"
    else:
        by_vllm(bench)
    bench.finish()


def steps(bench: Bench, format: str) -> dict[int, list[float]]:
    """Seconds of a step for each batch; nothing where this torch or GPU lacks the format."""
    shape, context = (TINY, 16) if bench.tiny else (LLAMA_8B, CONTEXT)
    found: dict[int, list[float]] = {}
    try:
        decoder = Decoder(shape, format, bench.device, 1, context)
        for batch in BATCHES:
            decoder.resize(batch)
            if bench.device == "cpu":
                found[batch], _ = measure(decoder.step, bench.device, 3)
            else:
                found[batch] = timed(bench, [lambda _, d=decoder: d.step()], None)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        if format != "fp8":
            raise
        bench.extra["missing"][format] = str(error).splitlines()[0][:200]
    return found


def rows(bench: Bench, by: str, format: str, found: dict[str, dict[int, list[float]]]) -> None:
    """Tokens per second, and how many times those of bf16."""
    for batch, times in found[format].items():
        rates = [batch / time for time in times]
        bench.add(Row(f"{by}, {format}, batch {batch}", median(rates), "tokens/s", (min(rates), max(rates))))
        base = found.get("bf16", {}).get(batch)
        if format != "bf16" and base:
            goal = GOALS[batch] if format == "rf8-gg" and not bench.tiny else None
            ratio = median(base) / median(times)
            peer = ("bf16, tokens/s", batch / median(base))
            bench.add(Row(f"{by}, {format}, batch {batch}: over bf16", ratio, "x", None, goal, *peer))


def by_vllm(bench: Bench) -> None:
    """The same through vLLM, a process for each format; what does not start is noted."""
    found: dict[str, dict[int, list[float]]] = {}
    for format in BUILDERS:
        if bench.late(f"vllm {format}"):
            return
        with tempfile.TemporaryDirectory() as folder:
            worker = Path(__file__).with_name("_vllm_tokens.py")
            argv = [sys.executable, str(worker), folder, format, "tiny" if bench.tiny else "8b"]
            done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=900, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"steps"')]
        if not lines:
            why: list[str] = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
            bench.extra["missing"][f"vllm {format}"] = why[-1][:200]
            continue
        answer: dict[str, Any] = json.loads(lines[-1])
        bench.extra["vllm"] = answer["version"]
        found[format] = {int(batch): times for batch, times in answer["steps"].items()}
        rows(bench, "vLLM", format, found)


if __name__ == "__main__":
    main()
