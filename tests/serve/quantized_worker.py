"""A process of its own that runs vLLM over quantized checkpoints, one engine after another.

    python tests/serve/quantized_worker.py OUT.json < jobs.json

A job holds `model`, `dtype`, `eager`, `ranks` (tensor-parallel), `adapter` (a folder), `targets` (the layers it adapts)
and `cases`: each whether it is `adapted`, the tokens of a `prompt` and those of an `answer`. Without an `adapter` LoRA
is off. No option names a quantization: the checkpoint does.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any


def run(job: dict[str, Any]) -> dict[str, Any]:
    """For every case: log-probabilities of its answer, and what is written greedily in its place."""
    vllm: Any = importlib.import_module("vllm")
    request: Any = importlib.import_module("vllm.lora.request").LoRARequest
    parallel: Any = importlib.import_module("vllm.distributed.parallel_state")
    began = time.monotonic()
    lora = {
        "enable_lora": True,
        # One slot more than adapters: on a CPU, rows without an adapter get what is in the last one (vllm#48421).
        "max_loras": 2,
        "max_lora_rank": 8,
        # Without the head: with it, asking for the log-probabilities of a prompt stops the engine (vllm#29955).
        "lora_target_modules": job["targets"],
    }
    engine = vllm.LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=64,
        max_num_seqs=16,
        enforce_eager=job["eager"],
        **(lora if job["adapter"] else {}),
        tensor_parallel_size=job.get("ranks", 1),
        distributed_executor_backend="uni" if job.get("ranks", 1) == 1 else "mp",
        seed=0,
    )
    seconds = time.monotonic() - began
    adapter = request("adapter", 1, job["adapter"]) if job["adapter"] else None
    used = [adapter if case["adapted"] else None for case in job["cases"]]
    forced = engine.generate(
        [{"prompt_token_ids": case["prompt"] + case["answer"]} for case in job["cases"]],
        vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1),
        lora_request=used,
        use_tqdm=False,
    )
    free = engine.generate(
        [{"prompt_token_ids": case["prompt"]} for case in job["cases"]],
        vllm.SamplingParams(temperature=0.0, max_tokens=len(job["cases"][0]["answer"]), ignore_eos=True),
        lora_request=used,
        use_tqdm=False,
    )
    found: list[dict[str, Any]] = []
    for case, read, written in zip(job["cases"], forced, free, strict=True):
        places = read.prompt_logprobs[len(case["prompt"]) :]
        logprobs = [place[token].logprob for place, token in zip(places, case["answer"], strict=True)]
        found.append({"logprobs": logprobs, "written": list(written.outputs[0].token_ids)})
    del engine
    parallel.cleanup_dist_env_and_memory()
    return {"said": found, "seconds": seconds}


def main() -> None:
    """All jobs, in this order."""
    done = [run(job) for job in json.load(sys.stdin)]
    Path(sys.argv[1]).write_text(json.dumps(done), encoding="utf-8")


if __name__ == "__main__":
    main()
