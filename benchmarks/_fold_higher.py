"""One meta-gradient of a batch of documents, computed by `higher` and by our inner loop; each in a process of its own.

The same problem for both: documents of random facts (each fact a row), inner steps of SGD with a learned rate per
tensor and step, then questions whose last tokens are the answers; wanted is the gradient of the summed outer loss with
respect to where the inner loop starts and to all rates. `higher` (arXiv 1910.01727) is used as RECKONING uses it:
document by document, `track_higher_grads`, `copy_initial_weights=False`, the outer losses summed, one backward pass for
the batch; and once more with a backward pass per document, which needs less memory. It gets attention that can be
differentiated twice (the fused kernel cannot), and the very layers that ours uses.

    python benchmarks/_fold_higher.py --cases KEY ... --size SIZE --peers FOLDER      prints a line of JSON for each
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from zeroth_cost import peak_mib, settle

DOCUMENTS, STEPS, RANK, QUESTIONS, ANSWER = 16, 4, 16, 2, 6
VOCABULARY = 1024


@dataclass(frozen=True)
class Size:
    """The shape of a random model, and what a document is."""

    width: int
    layers: int
    facts: int
    tokens: int
    adapts: str = "lora"
    kind: str = "GPT-2"

    @property
    def name(self) -> str:
        what = "LoRA" if self.adapts == "lora" else "all weights"
        return f"{what}, {self.kind} of {self.layers} x {self.width}, {self.facts} facts of {self.tokens} tokens"


SIZES = {
    "tiny": Size(32, 1, 4, 8),
    "study": Size(64, 2, 8, 12),
    "small": Size(128, 4, 8, 16),
    "middle": Size(256, 6, 8, 16),
    "llama": Size(128, 4, 8, 16, kind="Llama"),
    "all": Size(128, 4, 8, 16, "all"),
}


@dataclass(frozen=True)
class Case:
    """One way to compute it."""

    key: str
    name: str
    peer: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    at_once: int | None = None


CASES = (
    Case("batch", "higher, one backward pass for all documents", True),
    Case("each", "higher, one backward pass per document", True),
    Case("higher-first", "higher, first order", True),
    Case("ours", "ours", settings=(("unroll", None),)),
    Case("ours-4", "ours, 4 documents at a time", settings=(("unroll", None),), at_once=4),
    Case("ours-plain", "ours, no checkpointing", settings=(("unroll", None), ("checkpoint", False))),
    Case("ours-2", "ours, last 2 of 4 steps (the default)", settings=(("unroll", 2),)),
    Case("ours-first", "ours, first order", settings=(("unroll", 0),)),
)


def random_model(size: Size) -> Any:
    """GPT-2, the base of RECKONING, or a Llama."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    none = {"bos_token_id": None, "eos_token_id": None}
    if size.kind == "GPT-2":
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape = {"n_embd": size.width, "n_layer": size.layers, "n_head": 4, "n_positions": 256}
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **shape, **off, **none)).eval()

    class Sliced(torch.nn.ModuleList):
        """`higher` cannot cut slices of a list of layers, and today's Llama asks for one: it gets a plain list."""

        def __getitem__(self, which: Any) -> Any:
            return list(self._modules.values())[which] if isinstance(which, slice) else super().__getitem__(which)

    shape = {"hidden_size": size.width, "intermediate_size": 3 * size.width, "num_hidden_layers": size.layers}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=4, **shape, **none)).eval()
    model.model.layers = Sliced(model.model.layers)
    return model


class Problem:
    """The model, the documents, and both ways to the gradient."""

    def __init__(self, size: Size, case: Case) -> None:
        import torch

        from agentopt.weights.fold import FoldOptions
        from agentopt.weights.fold._engine import make_engine
        from agentopt.weights.fold._meta import new_meta
        from agentopt.weights.fold._rows import Rows

        dice = torch.Generator().manual_seed(0)

        def rows(count: int, tokens: int, first: int) -> Rows:
            ids = torch.randint(0, VOCABULARY, (DOCUMENTS, count, tokens), generator=dice)
            weight = torch.zeros(ids.shape)
            weight[:, :, first:] = 1
            return Rows(ids, weight).scaled("row")

        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = random_model(size)
        self.facts = rows(size.facts, size.tokens, 1)
        self.outer = rows(QUESTIONS, size.tokens, size.tokens - ANSWER)
        options = FoldOptions(
            adapts=size.adapts, rank=RANK, inner_steps=STEPS, rule="sgd", lr=0.05, seed=0, **dict(case.settings)
        )
        self.case, self.size = case, size
        self.engine = make_engine(self.model, options)
        self.meta = new_meta(self.engine, options)

    def gradient(self) -> dict[str, Any]:
        """By name: "init/..." and "rates/..." (none of the latter from first-order `higher`)."""
        if not self.case.peer:
            return self._ours()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.MATH):
            return self._theirs()

    def _ours(self) -> dict[str, Any]:
        import torch

        from agentopt.weights.fold._inner import fold_rows

        leaves = {f"init/{name}": one for name, one in self.meta.init.items()}
        leaves |= {f"rates/{name}": one for name, one in self.meta.rates.items()}
        state = fold_rows(self.engine, self.meta, self.facts, graph=True, documents_at_once=self.case.at_once)
        loss = (self.engine.nll(state, self.outer) * self.outer.weight).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return dict(zip(leaves, found, strict=True))

    # --- higher ------------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Any]:
        """The model's own tensors that the inner loop moves, holding the start."""
        import torch

        own: dict[str, Any] = dict(self.model.named_parameters())
        if self.size.adapts == "lora":
            own = self.engine.adapters.parameters()
        with torch.no_grad():
            for name, one in own.items():
                one.copy_(self.meta.init[name])
                one.requires_grad_(True)
        return own

    def _loss(self, model: Any, ids: Any, weight: Any) -> Any:
        import torch

        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return (nll * weight[:, 1:].flatten()).sum()

    def _theirs(self) -> dict[str, Any]:
        import higher
        import torch

        from agentopt.weights.fold._rates import rate

        own = self._tensors()
        rates = self.meta.rates
        second = self.case.key != "higher-first"
        inner = torch.optim.SGD([{"params": [one], "lr": 0.0} for one in own.values()], lr=0.0)
        leaves = [*own.values(), *(rates[name] for name in own)] if second else list(own.values())
        total: Any = None
        outer: Any = 0.0
        for number in range(DOCUMENTS):
            with higher.innerloop_ctx(self.model, inner, copy_initial_weights=False, track_higher_grads=second) as (
                fast,
                optimizer,
            ):
                for step in range(STEPS):
                    loss = self._loss(fast, self.facts.ids[number], self.facts.weight[number])
                    numbers = [rate(rates[name][step]) for name in own]
                    optimizer.step(loss, override={"lr": numbers if second else [one.detach() for one in numbers]})
                loss = self._loss(fast, self.outer.ids[number], self.outer.weight[number])
                if self.case.key == "batch":
                    outer = outer + loss
                    continue
                places = leaves
                if not second:  # the gradient at the end of the inner loop stands for that at its start
                    every = dict(zip((n for n, _ in self.model.named_parameters()), fast.fast_params, strict=True))
                    places = [every[name] for name in own]
                found = torch.autograd.grad(loss, places, allow_unused=True)
            total = list(found) if total is None else [_plus(a, b) for a, b in zip(total, found, strict=True)]
        if self.case.key == "batch":
            total = torch.autograd.grad(outer, leaves, allow_unused=True)
        for one in own.values():
            one.requires_grad_(False)
        names = [f"init/{name}" for name in own] + ([f"rates/{name}" for name in own] if second else [])
        return dict(zip(names, total, strict=True))


def _plus(one: Any, other: Any) -> Any:
    return other if one is None else one if other is None else one + other


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference within a tensor, relative to the tensor's largest number; over the tensors both have."""
    worst = 0.0
    for name, theirs in other.items():
        mine = one[name]
        if theirs is None or mine is None:
            assert theirs is None or not theirs.abs().max(), name
            continue
        scale = theirs.abs().max()
        if scale > 0:
            worst = max(worst, float((mine - theirs).abs().max() / scale))
    return worst


def compared(size: Size) -> dict[str, float]:
    """Differences of the gradients, in one process."""
    found = {case.key: Problem(size, case).gradient() for case in CASES}
    second = {key: apart(found[key], found["batch"]) for key in ("each", "ours", "ours-4", "ours-plain")}
    return {**second, "ours-first": apart(found["ours-first"], found["higher-first"])}


def timed(act: Callable[[], Any]) -> float:
    """Seconds of the processor."""
    begun = time.process_time()
    act()
    return time.process_time() - begun


def measured(size: Size, case: Case, repeats: int) -> dict[str, Any]:
    """Seconds of every repeat but the first, and by how much the peak of memory grew in all of them."""
    import torch

    problem = Problem(size, case)
    with torch.no_grad():
        problem.model(input_ids=problem.facts.ids[0], use_cache=False)
    settle()
    before = peak_mib()
    seconds = [timed(problem.gradient) for _ in range(repeats + 1)][1:]
    return {"seconds": seconds, "mib": peak_mib() - before, "before_mib": before}


def apart_from_here(act: Callable[[], Any]) -> Any:
    """What `act` returns in a process of its own, which has everything imported already."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with os.fdopen(writing, "w", encoding="utf-8") as out:
                json.dump(act(), out)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as found:
        text = found.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("a case failed; its message is above")
    return json.loads(text)


def main(arguments: Sequence[str] | None = None) -> None:
    known = {case.key: case for case in CASES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", required=True, nargs="+", choices=[*known, "compare"])
    parser.add_argument("--size", required=True, choices=SIZES)
    parser.add_argument("--peers", required=True, help="folder with the package `higher`")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    sys.path.append(options.peers)  # last: everything else is this environment's own
    import higher  # noqa: F401
    import torch
    from transformers import GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401

    from agentopt.weights.fold import _engine, _inner, _meta  # noqa: F401

    torch.set_num_threads(1)
    size = SIZES[options.size]
    for key in options.cases:
        act = (lambda: compared(size)) if key == "compare" else (lambda: measured(size, known[key], options.repeats))  # noqa: B023
        print(json.dumps({key: apart_from_here(act)}), flush=True)


if __name__ == "__main__":
    main()
