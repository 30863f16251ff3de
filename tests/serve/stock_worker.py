"""A process of its own that runs vLLM over exported checkpoints, as it comes: no plug-in of ours.

    python tests/serve/stock_worker.py OUT.json FOLDER ... < prompts.json

For every folder and prompt (tokens): the log-probability of every token after the first.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def run(folder: str, prompts: list[list[int]]) -> list[list[float]]:
    """One engine."""
    vllm: Any = importlib.import_module("vllm")
    parallel: Any = importlib.import_module("vllm.distributed.parallel_state")
    engine = vllm.LLM(
        model=folder,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=8,
        enforce_eager=True,
        distributed_executor_backend="uni",
        seed=0,
    )
    done = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1),
        use_tqdm=False,
    )
    found = [
        [place[token].logprob for place, token in zip(one.prompt_logprobs[1:], prompt[1:], strict=True)]
        for one, prompt in zip(done, prompts, strict=True)
    ]
    del engine
    parallel.cleanup_dist_env_and_memory()
    return found


def main() -> None:
    """All folders."""
    out, *folders = sys.argv[1:]
    prompts: list[list[int]] = json.load(sys.stdin)
    Path(out).write_text(json.dumps([run(folder, prompts) for folder in folders]), encoding="utf-8")


if __name__ == "__main__":
    main()
