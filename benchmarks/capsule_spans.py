"""What survives of the spans of a prompt: keep spans, intact spans, sentences that may not be cut.

    python benchmarks/capsule_spans.py --data DIR [--quick] [--seeds 3]

Prompts: the GSM8K chain-of-thought prompt followed by a test question, the twelve BBH prompts followed by a test item,
and made-up agent prompts (tools, schemas, placeholders, constraints, examples). Budgets: 75, 50, 25 and 10 % of the
tokens of a prompt. Beside the extractive engine: the beginning of the prompt that fits (truncation), and words left out
at random until the rest fits (word deletion: what pruning does, without a model to choose). Every method is seen as the
set of characters that it keeps. A span is *gone* when none of it is kept and *altered* when a part is. Where the keep
spans alone are longer than the budget, the engine refuses; all methods then get the minimum that it names instead.
Intervals are exact one-sided 95 % bounds (Clopper-Pearson), as if the spans of one prompt were independent.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _report import Row, write_results

from agentopt.capsules import BudgetInfeasible, Document, TokenBudget, parse
from agentopt.capsules.extraction._extract import Extraction, extract
from agentopt.capsules.units._spans import find_intact, uncuttable
from agentopt.evaluation._statistics import binomial_lower_bound
from tests.capsules.prompts import agent_prompt

SHARES = (0.75, 0.5, 0.25, 0.1)
TOKENIZER = "o200k_base"
SHOT = "gsm8k_cot_prompt/prompt_hardest.txt"
QUESTIONS = "gsm8k/test.jsonl"
TASKS, ITEMS = "bbh/cot-prompts", "bbh/bbh"


def gsm8k(data: Path, count: int, rng: random.Random) -> Iterator[str]:
    """The prompt and a question."""
    prompt = (data / SHOT).read_text(encoding="utf-8").strip()
    rows = [json.loads(line) for line in (data / QUESTIONS).read_text(encoding="utf-8").splitlines()]
    for row in rng.sample(rows, count):
        yield f"{prompt}\n\nQuestion: {row['question']}\nLet's think step by step\n"


def bbh(data: Path, count: int, rng: random.Random) -> Iterator[str]:
    """Each task's prompt and some of its items; the two lines of the canary are no part of the prompt."""
    for path in sorted((data / TASKS).glob("*.txt")):
        prompt = path.read_text(encoding="utf-8").split("\n", 2)[2].strip()
        items = json.loads((data / ITEMS / f"{path.stem}.json").read_text(encoding="utf-8"))["examples"]
        for item in rng.sample(items, count):
            yield f"{prompt}\n\nQ: {item['input']}\nA: Let's think step by step.\n"


def agents(count: int, rng: random.Random) -> Iterator[str]:
    """Made-up prompts."""
    for _ in range(count):
        yield agent_prompt(rng)


# --- methods: the characters that stay --------------------------------------------------------------------------------


def ours(document: Document, found: Extraction) -> bytearray:
    """The characters of the capsule; raises when the capsule is anything else than these."""
    text = document.text
    mask = bytearray(len(text))
    cuts = [dropped.text for dropped in found.dropped if dropped.reason == "cut"]
    for _, index in found.kept:
        unit = document.units[index]
        mask[unit.start : unit.end] = b"\1" * (unit.end - unit.start)
    expected = "".join(found.texts[0].split())
    at = 0
    for cut in cuts:  # in the order of the text
        at = text.index(cut, at)
        mask[at : at + len(cut)] = bytes(len(cut))
        at += len(cut)
    have = "".join(character for character, stays in zip(text, mask, strict=True) if stays and not character.isspace())
    if have != expected:
        raise AssertionError("the capsule is not made of verbatim units and pieces of the prompt")
    return mask


def truncation(text: str, limit: int, budget: TokenBudget) -> bytearray:
    """The longest beginning that fits."""
    meter = budget.meter()
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if meter.total([text[:middle]]) <= limit else (low, middle - 1)
    return bytearray(b"\1" * low + bytes(len(text) - low))


def deletion(text: str, limit: int, budget: TokenBudget, rng: random.Random) -> bytearray:
    """Words left out at random, as few as it takes."""
    meter = budget.meter()
    words: list[tuple[int, int]] = []
    at = 0
    for word in text.split():
        at = text.index(word, at)
        words.append((at, at + len(word)))
        at += len(word)
    order = rng.sample(range(len(words)), len(words))

    def kept(number: int) -> str:
        return " ".join(text[slice(*words[index])] for index in sorted(order[:number]))

    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if meter.total([kept(middle)]) <= limit else (low, middle - 1)
    mask = bytearray(len(text))
    for index in order[:low]:
        start, end = words[index]
        mask[start:end] = b"\1" * (end - start)
    return mask


# --- counting ---------------------------------------------------------------------------------------------------------


def fate(text: str, start: int, end: int, mask: bytearray) -> str:
    """Whether a stretch is whole, gone or altered; white space does not count."""
    stays = [mask[at] for at in range(start, end) if not text[at].isspace()]
    return "whole" if all(stays) else "altered" if any(stays) else "gone"


def count(document: Document, mask: bytearray, counts: Counter[str]) -> None:
    """Add what became of the spans of one prompt."""
    text = document.text
    for span in document.keep:
        counts[f"keep {fate(text, span.start, span.end, mask)}"] += 1
    for unit in document.units:
        content = text[unit.start : unit.end]
        if uncuttable(content):
            counts[f"uncuttable {fate(text, unit.start, unit.end, mask)}"] += 1
        for span in find_intact(content):
            counts[f"intact {fate(text, unit.start + span.start, unit.start + span.end, mask)}"] += 1


def run(prompts: list[str], share: float, rng: random.Random) -> dict[str, Counter[str]]:
    """One kind of prompt at one budget, by every method."""
    counts = {name: Counter[str]() for name in ("ours", "truncation", "deletion")}
    for text in prompts:
        document = parse(text)
        whole = TokenBudget(1, TOKENIZER).meter().total([text])
        limit = max(1, int(share * whole))
        try:
            found = extract([document], TokenBudget(limit, TOKENIZER).meter())
        except BudgetInfeasible as error:
            counts["ours"]["refused"] += 1
            limit = error.minimum
            found = extract([document], TokenBudget(limit, TOKENIZER).meter())
        budget = TokenBudget(limit, TOKENIZER)
        counts["ours"]["over"] += budget.meter().total(found.texts) > limit
        counts["ours"]["prompts"] += 1
        counts["ours"]["cut"] += any(dropped.reason == "cut" for dropped in found.dropped)
        count(document, ours(document, found), counts["ours"])
        count(document, truncation(text, limit, budget), counts["truncation"])
        count(document, deletion(text, limit, budget, rng), counts["deletion"])
    return counts


def rows(label: str, counts: dict[str, Counter[str]]) -> list[Row]:
    """The rows of one cell: ours against each baseline."""
    out: list[Row] = []
    mine = counts["ours"]
    note = f"{mine['prompts']} prompts, {mine['cut']} with a sentence cut, {mine['refused']} at the minimum it named"
    for baseline in ("truncation", "deletion"):
        theirs = counts[baseline]
        peer = {"truncation": "truncation", "deletion": "word deletion"}[baseline]
        for what, good, title in (
            ("keep", ("whole",), "keep spans that survive"),
            ("intact", ("whole", "gone"), "intact spans not altered"),
            ("uncuttable", ("whole", "gone"), "sentences with a negation, quantifier or condition not cut"),
        ):
            total = sum(mine[f"{what} {state}"] for state in ("whole", "gone", "altered"))
            if not total:
                continue
            hits = sum(mine[f"{what} {state}"] for state in good)
            low = 100 * binomial_lower_bound(hits, total, 0.95)
            peer_hits = sum(theirs[f"{what} {state}"] for state in good)
            out.append(
                Row(
                    f"{label}: {title} ({total:,})",
                    100 * hits / total,
                    "%",
                    (low, 100.0),
                    ">= 100",
                    peer,
                    100 * peer_hits / total,
                    note if what == "keep" and baseline == "truncation" else None,
                )
            )
    return out


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help=f"folder that holds {SHOT}, {QUESTIONS} and {TASKS}")
    parser.add_argument("--quick", action="store_true", help="few prompts, two budgets")
    parser.add_argument("--seeds", type=int, default=3, help="draws of questions and prompts")
    options = parser.parse_args()
    if not (options.data / SHOT).exists():
        print(f"--data: found no {SHOT} below {options.data}, expected the GSM8K and BBH prompts", file=sys.stderr)
        return 2
    found: list[Row] = []
    for share in (0.5, 0.1) if options.quick else SHARES:
        kinds: dict[str, list[str]] = {"GSM8K": [], "BBH": [], "agents": []}
        for seed in range(1 if options.quick else options.seeds):
            rng = random.Random(seed)
            kinds["GSM8K"] += gsm8k(options.data, 3 if options.quick else 20, rng)
            kinds["BBH"] += bbh(options.data, 1 if options.quick else 5, rng)
            kinds["agents"] += agents(10 if options.quick else 100, rng)
        for kind, prompts in kinds.items():
            print(f"{kind} at {share:.0%}: {len(prompts)} prompts", flush=True)
            found += rows(f"{kind} at {share:.0%}", run(prompts, share, random.Random(0)))
    write_results("capsule_spans", found, quick=options.quick)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
