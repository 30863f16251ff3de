"""Claim: the extractive engine reads at least 1 MB of prose a second on one core, and a stream in bounded memory.

    python benchmarks/capsule_speed.py [--quick] [--seeds 5]

Generated prose (`_prose.py`), budgets in tokens of o200k_base. Rates are of CPU time, all threads together, so that
what else runs on the machine does not count; parsing, counting, scoring, choosing and the exact recount are all in
them. Each is the median of the repeats, each repeat with another text. Memory is the peak resident size of a process
of its own that reads a generated stream, beside that of a tenth of the stream.

Beside it LLMLingua-2 (llmlingua 0.2.2) on CPU, one thread and CPU time, with a model of mBERT's size (12 layers,
768 wide, vocabulary of 119,547) and random weights: the same arithmetic as with trained ones, so fair for speed and
nothing else. Its rate is that of `compress_prompt` at `rate=0.33` on prose of the same kind.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator

from _prose import paragraphs, prose
from _report import ROOT, Row, arguments, middle, peer_python, write_results

import agentopt as ao
from agentopt.capsules import extract, parse, stream

PEERS = ("llmlingua==0.2.2", "torch==2.13.0", "transformers==5.23.0")
ADAPTER = ROOT / "benchmarks" / "peer_adapters" / "llmlingua_speed.py"
QUESTION = "Where was Vegaki built, and by whom?"


def rate(
    texts: list[str], share: float, query: str | None, *, whole: bool = False
) -> tuple[float, tuple[float, float]]:
    """MB per second of CPU: the engine alone, or with `whole` everything that `ao.capsule` does."""
    out: list[float] = []
    for text in texts:
        budget = ao.TokenBudget(int(len(text) / 4 * share))
        began = time.process_time()
        if whole:
            ao.capsule(text, budget=budget, query=query)
        else:
            extract([parse(text)], budget.meter(), query=query)
        out.append(len(text.encode()) / 1e6 / (time.process_time() - began))
    return middle(out)


def worker(megabytes: int) -> None:
    """Read a stream and print what it took."""
    import resource

    spent = 0.0

    def chunks() -> Iterator[str]:
        nonlocal spent
        source = paragraphs(7)
        base = [next(source) for _ in range(1_700)]
        size = number = 0
        while size < megabytes * 1_000_000:
            began = time.process_time()
            number += 1
            turn = number % len(base)
            piece = "\n\n".join(base[turn:] + base[:turn]).replace(". ", f" {number}. ", 400) + "\n\n"
            size += len(piece)
            spent += time.process_time() - began
            for start in range(0, len(piece), 1 << 16):
                yield piece[start : start + (1 << 16)]

    began = time.process_time()
    found = stream(chunks(), ao.TokenBudget(4_000))
    took = time.process_time() - began - spent
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert found.tokens <= found.limit
    print(json.dumps({"megabytes": found.characters / 1e6, "seconds": took, "peak": peak, "tokens": found.tokens}))


def streamed(megabytes: int) -> dict[str, float]:
    """Run the worker in a process of its own."""
    command = [sys.executable, __file__, "--worker", str(megabytes)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    return json.loads(done.stdout.splitlines()[-1])


def lingua(quick: bool) -> tuple[dict[str, float] | None, str]:
    """LLMLingua-2's rate, or why there is none."""
    python, problem = peer_python(*PEERS)
    if python is None:
        return None, problem
    job = {"texts": [prose(size, seed=90) for size in ((4_000,) if quick else (4_000, 20_000, 60_000))]}
    done = subprocess.run(
        [python, str(ADAPTER)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), "")
    return (json.loads(line[7:]), "") if line else (None, done.stderr.strip().splitlines()[-1][:200])


def main() -> int:
    """Measure, print, write."""
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        worker(int(sys.argv[2]))
        return 0
    options = arguments(__doc__ or "", seeds=5)
    repeats = 2 if options.quick else options.seeds
    megabytes = 10 if options.quick else 100
    extract([parse(prose(20_000))], ao.TokenBudget(500).meter())  # the vocabulary is read once, before the clock runs
    one = [prose(1_000_000, seed) for seed in range(repeats)]
    small = [prose(20_000, 50 + seed) for seed in range(4 * repeats)]
    peer, problem = lingua(options.quick)
    if peer is None:
        print(f"llmlingua is left out: {problem}")
    beside = ("LLMLingua-2, mBERT size, random weights", peer["rate"]) if peer else (None, None)
    rows: list[Row] = []
    for share in (0.5, 0.1, 0.01):
        for query in (None, QUESTION):
            value, spread = rate(one, share, query)
            title = f"1 MB, {share:.0%} kept, {'a query' if query else 'no query'}"
            rows.append(Row(title, value, "MB/s", spread, ">= 1", *beside))
    value, spread = rate(small, 0.33, None)
    rows.append(Row("20 kB, 33% kept, no query", value, "MB/s", spread, None, *beside))
    for query in (None, QUESTION):
        value, spread = rate(one, 0.1, query, whole=True)
        title = f"ao.capsule (lossless edits and checks too), 1 MB, 10% kept, {'a query' if query else 'no query'}"
        rows.append(Row(title, value, "MB/s", spread, None, *beside))
    tenth, all_ = streamed(megabytes // 10), streamed(megabytes)
    rows.append(
        Row(f"stream of {megabytes} MB to 4,000 tokens", all_["megabytes"] / all_["seconds"], "MB/s", goal=">= 1")
    )
    rows.append(Row(f"stream of {megabytes} MB: peak memory", all_["peak"], "MB", goal="<= 300"))
    growth = f"stream: peak memory of {megabytes} MB over that of {megabytes // 10} MB"
    rows.append(Row(growth, all_["peak"] / tenth["peak"], "x", goal="<= 1.2"))
    if peer:
        rows.append(Row("LLMLingua-2: peak memory", peer["peak"], "MB", note=f"on {peer['characters']:.0f} characters"))
    write_results("capsule_speed", rows, quick=options.quick, extra={"llmlingua": peer, "stream": [tenth, all_]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
