"""A process of its own that runs vLLM: reads a job as JSON from its input, writes what it measured to a file.

    python tests/serve/vllm_worker.py OUT.json < job.json

A job holds `model`, `dtype`, `rank`, `adapters` (name -> folder), `targets` (the layers they adapt) and `cases`: each
an `adapter` (a name or null for the base), the tokens of a `prompt` and those of an `answer`. All cases go through the
engine in one batch, whatever adapter they use.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """For every case: log-probabilities of its answer, and what is written greedily in its place."""
    job: dict[str, Any] = json.load(sys.stdin)
    vllm: Any = importlib.import_module("vllm")
    request: Any = importlib.import_module("vllm.lora.request").LoRARequest
    engine = vllm.LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=128,
        max_num_seqs=32,
        enforce_eager=True,
        enable_lora=True,
        # One slot more than adapters: on a CPU, rows without an adapter get what is in the last one (vllm#48421).
        max_loras=len(job["adapters"]) + 1,
        max_lora_rank=job["rank"],
        # Without the head: with it, asking for the log-probabilities of a prompt stops the engine (vllm#29955).
        lora_target_modules=job["targets"],
        distributed_executor_backend="uni",
        seed=0,
    )
    adapters = {name: request(name, number, path) for number, (name, path) in enumerate(job["adapters"].items(), 1)}
    used = [adapters.get(case["adapter"]) for case in job["cases"]]
    forced = engine.generate(
        [{"prompt_token_ids": case["prompt"] + case["answer"]} for case in job["cases"]],
        vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1),
        lora_request=used,
        use_tqdm=False,
    )
    free = engine.generate(
        [{"prompt_token_ids": case["prompt"]} for case in job["cases"]],
        [
            vllm.SamplingParams(temperature=0.0, max_tokens=len(case["answer"]), ignore_eos=True)
            for case in job["cases"]
        ],
        lora_request=used,
        use_tqdm=False,
    )
    found: list[dict[str, Any]] = []
    for case, read, written in zip(job["cases"], forced, free, strict=True):
        places = read.prompt_logprobs[len(case["prompt"]) :]
        logprobs = [place[token].logprob for place, token in zip(places, case["answer"], strict=True)]
        found.append({"logprobs": logprobs, "written": list(written.outputs[0].token_ids)})
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
