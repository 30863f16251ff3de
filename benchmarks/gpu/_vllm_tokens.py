"""Decoding through vLLM in one format, for `serve_tokens.py`: writes what it needs to FOLDER, prints seconds per step.

python _vllm_tokens.py FOLDER bf16|fp8|rf8-gg tiny|8b
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from _decoder import LLAMA_8B, Shape  # noqa: E402

TINY = Shape(256, 2, 4, 2, 64, 512, 512)
"""The smallest heads that vLLM's attention takes on every platform."""
BATCHES = (1, 8, 64)


def config(shape: Shape, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """config.json of a Llama."""
    found: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.width,
        "intermediate_size": shape.inner,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    return found | ({"quantization_config": quantization} if quantization else {})


def write_codes(folder: Path, shape: Shape) -> dict[str, Any]:
    """A checkpoint of random codes, one file per block; gives its `quantization_config`."""
    import torch
    from gg_gemm import table_of
    from safetensors.torch import save_file

    from agentopt.weights.gg._checkpoint import BOOK, CODES, SCALE, Checkpoint

    table = table_of("rf8-gg", "cpu")[:, :255]
    books = tuple(tuple(sorted(float(level) for level in row)) for row in table)
    queries, keys = shape.heads * shape.width, shape.groups * shape.width
    sizes = {
        "self_attn.q_proj": (queries, shape.hidden),
        "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden),
        "self_attn.o_proj": (shape.hidden, queries),
        "mlp.gate_proj": (shape.inner, shape.hidden),
        "mlp.up_proj": (shape.inner, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.inner),
    }
    index: dict[str, str] = {}

    def save(name: str, tensors: dict[str, Any]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    dice = torch.Generator().manual_seed(0)
    for block in range(shape.layers):
        before, tensors = f"model.layers.{block}.", dict[str, Any]()
        for name, (height, width) in sizes.items():
            tensors[f"{before}{name}.{CODES}"] = torch.randint(
                0, 255, (height, width), dtype=torch.uint8, generator=dice
            )
            tensors[f"{before}{name}.{SCALE}"] = torch.full((height, 1), 0.02)
            tensors[f"{before}{name}.{BOOK}"] = torch.randint(
                0, len(books), (height, 1), dtype=torch.uint8, generator=dice
            )
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{before}{name}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
        save(f"model-{block:05d}.safetensors", tensors)
    wide = (shape.vocabulary, shape.hidden)
    save(
        "model-rest.safetensors",
        {
            "model.embed_tokens.weight": torch.randn(wide, generator=dice).bfloat16(),
            "lm_head.weight": torch.randn(wide, generator=dice).mul_(0.02).bfloat16(),
            "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
        },
    )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8"
    )
    return Checkpoint("rf8-gg", books=books, nus=tuple(range(3, 3 + len(books)))).to_dict()


def main() -> None:
    folder, format, size = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    shape = TINY if size == "tiny" else LLAMA_8B
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    quantization = write_codes(folder, shape) if format == "rf8-gg" else None
    (folder / "config.json").write_text(json.dumps(config(shape, quantization)), encoding="utf-8")
    import torch
    import vllm

    given: dict[str, Any] = {} if format == "rf8-gg" else {"load_format": "dummy"}
    if format == "fp8":
        given["quantization"] = "fp8"
    cpu = not torch.cuda.is_available()
    engine: Any = vllm.LLM(
        str(folder), skip_tokenizer_init=True, max_model_len=1024 if size == "8b" else 256, seed=0,
        max_num_seqs=max(BATCHES), enable_prefix_caching=False, enforce_eager=cpu, dtype="bfloat16", **given,
    )  # fmt: skip
    short, long = (64, 320) if size == "8b" else (4, 36)
    found = {batch: [step(engine, batch, short, long) for _ in range(3)] for batch in BATCHES}
    print(json.dumps({"steps": found, "version": f"vLLM {vllm.__version__}"}), flush=True)


def step(engine: Any, batch: int, short: int, long: int) -> float:
    """Seconds per token of each sequence: what the longer replies take more."""
    import vllm

    prompts: list[Any] = [{"prompt_token_ids": [3 + (7 * place) % 400] * 16} for place in range(batch)]
    times: dict[int, float] = {}
    for length in (short, short, long):  # the first warms up
        told = vllm.SamplingParams(
            temperature=0, max_tokens=length, min_tokens=length, ignore_eos=True, detokenize=False
        )
        begun = time.perf_counter()
        engine.generate(prompts, told, use_tqdm=False)
        times[length] = time.perf_counter() - begun
    return (times[long] - times[short]) / (long - short)


if __name__ == "__main__":
    main()
