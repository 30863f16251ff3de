"""LLMLingua's causal path with a model folder: compresses the jobs of one JSON line, says what failed.

Runs in the peers' environment: `python llmlingua_.py MODEL_FOLDER`, jobs on standard input as
`[{"demonstrations": [...], "instruction": "...", "target": 123}, ...]`, the answer after the word RUN. The folder that
tiktoken looks for its vocabularies in is litellm's, because LLMLingua fetches one over the network at its start, also
for a local model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def offline() -> None:
    """Let tiktoken find what litellm brought along."""
    spec = importlib.util.find_spec("litellm")
    if spec is not None and spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations))) / "litellm_core_utils" / "tokenizers"
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(folder))


def main() -> int:
    """Answer one line of jobs."""
    offline()
    import torch
    from llmlingua import PromptCompressor  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    jobs: list[dict[str, Any]] = json.loads(sys.stdin.readline())
    compressor = PromptCompressor(sys.argv[1], device_map="cpu", model_config={"dtype": torch.float32})
    answers: list[dict[str, Any]] = []
    for job in jobs:
        began = time.perf_counter()
        try:
            reply = compressor.compress_prompt(
                job["demonstrations"], instruction=job["instruction"], question="", target_token=job["target"]
            )
            answer: dict[str, Any] = {"text": reply["compressed_prompt"], "error": ""}
        except Exception as error:  # noqa: BLE001  (what a peer raises is its result)
            answer = {"text": "", "error": f"{type(error).__name__}: {error}"}
        answers.append({**answer, "seconds": time.perf_counter() - began})
    print("RUN " + json.dumps(answers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
