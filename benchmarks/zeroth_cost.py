"""What a step of zeroth-order tuning costs: its time in forward passes, its memory in that of inference.

    python benchmarks/zeroth_cost.py [--quick] [--repeats 3] [--threads 2] [--only WORD ...]

The embedded model's 134.5M weights in float32, a batch of 16 rows of 64 tokens, logits at the last position only. Every
method runs in a process of its own. Its steps alternate with forward passes over the same batch, and `time` is the
median step over twice the median forward pass, for first-order steps as well.
`memory` is the peak resident memory of the process during the steps (the mark is reset after loading and one warm-up
pass), against the peak of a process that only runs forward passes, loaded in the same way. With `--threads 1` seconds
are those of the processor, which is what to take on a machine that has other work.

The quick form takes random weights of a small Llama shape: it shows that everything runs, not what it costs.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _report import Row, write_results

ROWS, TOKENS = 16, 64
TIME_GOAL, MEMORY_GOAL = "<= 1.25", "<= 1.05"


@dataclass(frozen=True)
class Case:
    """One row of the table: a key for the command line, a name, and whether it has goals."""

    key: str
    name: str
    ours: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


CASES = (
    Case("forward", "forward passes only"),
    Case("mezo", "MeZO as published (in place, normal noise)"),
    Case("sparse", "Sparse-MeZO, stored bool mask (in place, normal noise)"),
    Case("ours-two", "ours, no mask, one side after the other", True, (("copies", 1),)),
    Case("ours", "ours, no mask, both signs in one batch", True),
    Case("small-two", "ours, small 50 %, one side after the other", True, (("mask", "small"), ("copies", 1))),
    Case("small", "ours, small 50 %, both signs in one batch", True, (("mask", "small"),)),
    Case("random", "ours, random 50 %, both signs in one batch", False, (("mask", "random"),)),
    Case("block", "ours, one block per step, both signs in one batch", False, (("mask", "block"), ("density", 0.03))),
    Case("normal", "ours, normal noise, both signs in one batch", False),
    Case("lora", "ours on LoRA adapters, rank 8", False),
    Case(
        "lora-mapped",
        "ours on LoRA adapters, large blocks mapped (MALLOC_MMAP_THRESHOLD_=1048576)",
        False,
        environment=(("MALLOC_MMAP_THRESHOLD_", "1048576"),),
    ),
    Case("prefix", "ours on a prefix of 5 tokens", False),
    Case("adamw-lora", "AdamW on LoRA adapters, rank 8"),
    Case("adamw", "AdamW on all weights"),
)


class LastToken:
    """Cross-entropy of the token after each row; several copies of the weights in one pass."""

    def __init__(self, vocabulary: int, seed: int = 0, rows: int = ROWS, tokens: int = TOKENS) -> None:
        import torch

        dice = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, vocabulary, (rows, tokens), generator=dice)
        self.answers = torch.randint(0, vocabulary, (rows,), generator=dice)

    def __call__(self, model: Any) -> Any:
        return self.losses(model, 1)[0]

    def losses(self, model: Any, copies: int) -> Any:
        import torch

        ids = self.ids.repeat(copies, 1)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, use_cache=False).logits
        found = torch.nn.functional.cross_entropy(logits[:, -1].float(), self.answers.repeat(copies), reduction="none")
        return found.view(copies, -1)


def stepper(case: Case, model: Any) -> tuple[Any, Callable[[Any], Any] | None]:
    """What a forward pass calls, and what makes a step (None for forward passes only)."""
    from _zeroth_peers import FullAdam, InPlace, LoraAdam, stored_masks

    from agentopt.weights import adapters, prefix
    from agentopt.weights.zeroth import Probe, ZerothOrder

    match case.key:
        case "forward":
            return model, None
        case "mezo":
            return model, InPlace(model, 1e-6).step
        case "sparse":
            return model, InPlace(model, 1e-6, masks=stored_masks(model, 0.5)).step
        case "adamw":
            return model, FullAdam(model.requires_grad_(True), 1e-6).step
        case "adamw-lora":
            return model, LoraAdam(model, 1e-6).step
        case "lora" | "lora-mapped":
            adapters.attach(model, rank=8)
        case "prefix":
            model = prefix.attach(model, tokens=5)
        case _:
            model.requires_grad_(True)
    probe = Probe(kind="normal" if case.key == "normal" else "rademacher")
    return model, ZerothOrder(model, lr=1e-6, probe=probe, **dict(case.settings)).step


def one(options: argparse.Namespace) -> None:
    """The process of one case: prints its numbers as JSON."""
    import torch

    torch.set_num_threads(options.threads)
    case = next(case for case in CASES if case.key == options.case)
    import transformers  # noqa: F401  what it takes belongs to the libraries, not to the model

    from agentopt.weights import zeroth  # noqa: F401

    settle()
    libraries = peak_mib()
    model = load(Path(options.weights))
    called, step = stepper(case, model)
    loss = LastToken(model.config.vocab_size)

    def forward() -> None:
        with torch.no_grad():
            loss(called)

    forward()
    settle()
    forwards: list[float] = []
    steps: list[float] = []
    for repeat in range(options.repeats + 1):  # the first of each is a warm-up, whose memory counts
        forwards.append(timed(forward, options.threads))
        if step is not None:
            steps.append(timed(lambda: step(loss), options.threads))
        del forwards[: repeat == 0], steps[: repeat == 0]
    found = {"forward_s": forwards, "step_s": steps, "peak_mib": peak_mib(), "libraries_mib": libraries}
    print(json.dumps(found))


def timed(action: Callable[[], Any], threads: int) -> float:
    """Seconds; with one thread those of the processor, which other work on the machine disturbs less."""
    clock = time.process_time if threads == 1 else time.perf_counter
    begun = clock()
    action()
    return clock() - begun


def settle() -> None:
    """Give back what loading left behind, and begin the peak anew."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib() -> float:
    """Peak resident memory since `settle`."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


def save(folder: Path, quick: bool) -> None:
    """Weights and configuration, written once, so that every process loads in the same way."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from agentopt.weights import load as loading

    if quick:
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = LlamaForCausalLM(config)
    else:
        model, _ = loading.model("embedded")
    state = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
    save_file(state, folder / "weights.safetensors")
    plain = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(plain, default=str), encoding="utf-8")


def load(folder: Path) -> Any:
    """The model with its weights in memory of its own (not the pages of a mapped file)."""
    import torch
    from safetensors import safe_open
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**json.loads((folder / "config.json").read_text(encoding="utf-8")), "dtype": "float32"})
    model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    with safe_open(folder / "weights.safetensors", "pt") as file, torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(file.get_tensor(name))
    return model


def measure(case: Case, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one case in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--case", case.key, "--weights", str(folder)]
    command += ["--repeats", str(options.repeats), "--threads", str(options.threads)]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env={**os.environ, **dict(case.environment)}
    )
    if done.returncode:
        raise RuntimeError(f"{case.name} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(found: dict[str, dict[str, Any]], quick: bool) -> list[Row]:
    """A row for the time and one for the memory of every case."""
    unit, libraries = found["forward"]["peak_mib"], found["forward"]["libraries_mib"]
    rows: list[Row] = []
    for case in CASES:
        if case.key not in found or case.key == "forward":
            continue
        steps, forward = found[case.key]["step_s"], statistics.median(found[case.key]["forward_s"])
        ratios = [step / (2 * forward) for step in steps]
        goal = TIME_GOAL if case.ours and not quick else None
        note = f"a step {statistics.median(steps):.2f} s, a forward pass {forward:.2f} s"
        rows.append(
            Row(
                f"{case.name}: time",
                statistics.median(ratios),
                "of two forward passes",
                (min(ratios), max(ratios)),
                goal,
                note=note,
            )
        )
    for case in CASES:
        if case.key in found:
            peak = found[case.key]["peak_mib"]
            goal = MEMORY_GOAL if case.ours and not quick else None
            strict = (peak - libraries) / (unit - libraries)
            note = f"{peak:,.0f} MiB; {strict:.3f} without the {libraries:,.0f} MiB of the libraries"
            rows.append(Row(f"{case.name}: memory", peak / unit, "of inference", goal=goal, note=note))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="random weights of a small shape")
    parser.add_argument("--repeats", type=int, default=3, help="steps that count, after one that does not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="keys of cases; forward is always run")
    parser.add_argument("--folder", type=Path, help="keep weights and measured cases here; the same command goes on")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        one(options)
        return
    only = options.only or (("mezo", "ours", "small", "lora") if options.quick else ())
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").exists():
            save(folder, options.quick)
        for case in CASES:
            if only and case.key not in (*only, "forward"):
                continue
            kept = folder / f"{case.key}.json"
            try:
                found[case.key] = json.loads(kept.read_text()) if kept.exists() else measure(case, folder, options)
                kept.write_text(json.dumps(found[case.key]), encoding="utf-8")
            except RuntimeError as error:  # what was measured before is still a result
                print(error, flush=True)
                continue
            print(case.name, found[case.key], flush=True)
    extra = {"rows": ROWS, "tokens": TOKENS, "threads": options.threads, "runs": found}
    write_results("zeroth_cost", rows_of(found, options.quick), quick=options.quick, extra=extra)


if __name__ == "__main__":
    main()
