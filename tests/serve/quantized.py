"""Quantized checkpoints of models that vLLM serves, and what each way of loading them says of the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from agentopt.weights import gg
from agentopt.weights.gg._types import Format
from tests.serve.harness import ENVIRONMENT, START
from tests.weights.fold.forced import Case, Said, said
from tests.weights.tiny import tiny

WORKER = Path(__file__).with_name("quantized_worker.py")
WORDS = tuple(f"w{number}" for number in range(90))
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDTH = 128
SPREAD = {"float32": 0.12, "bfloat16": 0.05}
HEAD_SPREAD = {"float32": 0.05, "bfloat16": 0.02}
"""Standard deviations. In bfloat16 they are such that the format's own error stays below 1e-2: logits of 3 are rounded
to 1/64, and a signal that every layer widens carries its rounding along."""
ANSWER = 12


@dataclass(frozen=True, slots=True)
class Spec:
    """One model in one format. The smallest shape that vLLM's attention takes, with grouped keys and values."""

    format: Format
    dtype: str
    architecture: str = "Llama"
    tied: bool = False
    head: bool = False

    def __str__(self) -> str:
        ties = "tied" if self.tied else "untied"
        return f"{self.format}, {self.dtype}, {self.architecture}, {ties}{', head quantized' if self.head else ''}"


SPECS = (
    Spec("rf8-gg", "float32"),
    Spec("rf8", "bfloat16", tied=True),
    Spec("rf8-gg", "bfloat16", head=True),
    Spec("e3m4", "float32", "Qwen2", tied=True, head=True),
)
JOBS = ((0, True), (0, False), (1, True), (1, False), (2, False), (3, True))
"""Which checkpoint, and whether eager."""


def label(job: int) -> str:
    """What a job is called."""
    number, eager = JOBS[job]
    return f"{SPECS[number]}, {'eager' if eager else 'compiled'}"


class Quantized:
    """A folder that is served; maybe with a LoRA adapter."""

    spec: Spec
    folder: Path
    adapter: Path | None

    @cached_property
    def cases(self) -> list[Case]:
        """What is asked."""
        raise NotImplementedError

    def load(self) -> Any:
        """The quantized model by transformers."""
        import torch
        from transformers import AutoModelForCausalLM

        import agentopt.weights.gg.transformers_plugin  # noqa: F401  # pyright: ignore[reportUnusedImport]

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=getattr(torch, self.spec.dtype)).eval()


class Checkpoint(Quantized):
    """A quantized model folder, the folder it came from, and a LoRA adapter on top."""

    def __init__(self, place: Path, spec: Spec) -> None:
        self.spec, self.source, self.folder = spec, place / "source", place / "quantized"
        self.adapter = place / "adapter"
        _make(self.source, spec)
        options = gg.QuantizeOptions(head=spec.head)
        gg.quantize(str(self.source), str(self.folder), spec.format, options=options)
        _adapt(self)

    @cached_property
    def cases(self) -> list[Case]:
        """Random prompts with random answers, each for the base and for the adapter."""
        import torch

        drawn = torch.Generator().manual_seed(3)
        found: list[Case] = []
        for length in (1, 5, 9, 14):
            tokens = torch.randint(3, len(WORDS), (length + ANSWER,), generator=drawn).tolist()
            found += [Case(name, tokens[:length], tokens[length:]) for name in (None, "adapter")]
        return found


def _make(folder: Path, spec: Spec) -> None:
    """Random weights; rows of several shapes, so that several books are chosen."""
    import torch
    import transformers

    tokenizer: Any = tiny(WORDS)[1]
    config: Any = getattr(transformers, f"{spec.architecture}Config")(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=spec.tied,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: Any = getattr(transformers, f"{spec.architecture}ForCausalLM")(config)
        for name, weight in model.named_parameters():
            drawn = torch.randn_like(weight)
            if weight.ndim == 2:
                drawn[1::3] *= drawn[1::3].abs()
                spread = (HEAD_SPREAD if "embed" in name or "head" in name else SPREAD)[spec.dtype]
                weight.data = drawn / drawn.std() * spread
            elif name.endswith("bias"):
                weight.data = drawn * SPREAD[spec.dtype]
    model.to(getattr(torch, spec.dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}", encoding="utf-8")


def _adapt(checkpoint: Checkpoint) -> None:
    """An adapter that changes much, written by peft over the quantized model."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model: Any = get_peft_model(checkpoint.load(), config)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = torch.randn_like(weight) * SPREAD[checkpoint.spec.dtype]
    model.save_pretrained(str(checkpoint.adapter))


# --- the loaders -----------------------------------------------------------------------------------------------------


def by_transformers(checkpoint: Checkpoint) -> list[Said]:
    """transformers for the base, peft over it for the adapter."""
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(checkpoint.load(), str(checkpoint.adapter)).eval()
    plain: Any = checkpoint.load()
    return [said(plain if case.adapter is None else model, case) for case in checkpoint.cases]


def by_source(checkpoint: Checkpoint) -> list[Said]:
    """The model before it was quantized; without its adapter in every case."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.source, dtype=getattr(torch, checkpoint.spec.dtype)).eval()
    return [said(model, case) for case in checkpoint.cases]


def by_vllm(jobs: Sequence[tuple[Quantized, bool]], place: Path, ranks: int = 1) -> list[list[Said]]:
    """vLLM in a process of its own: an engine for every checkpoint, eager where told, else compiled."""
    told = [
        {
            "model": str(checkpoint.folder),
            "dtype": checkpoint.spec.dtype,
            "eager": eager,
            "ranks": ranks,
            "adapter": checkpoint.adapter and str(checkpoint.adapter),
            "targets": TARGETS,
            "cases": [
                {"adapted": case.adapter is not None, "prompt": case.prompt, "answer": case.answer}
                for case in checkpoint.cases
            ],
        }
        for checkpoint, eager in jobs
    ]
    out = place / "vllm.json"
    environment = {**os.environ, **ENVIRONMENT, "VLLM_CACHE_ROOT": str(place / "cache")}
    if ranks > 1:  # every rank is bound to a core of its own
        cores = sorted(os.sched_getaffinity(0))[:ranks]
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(out)],
        input=json.dumps(told),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        timeout=START * len(told),
    )
    if done.returncode:
        raise RuntimeError(f"vLLM failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found = json.loads(out.read_text(encoding="utf-8"))
    return [[Said(row["logprobs"], row["written"], []) for row in one["said"]] for one in found]
