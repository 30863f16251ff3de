"""Claim: a tuned prompt behind a model name costs microseconds a request; `--capsule` saves tokens, and loses content.

    python benchmarks/serve_variants.py [--quick] [--seeds 5]

The rewriting of one request (a system text, 8 demonstrations, a cue), the choice of a variant, and the look-up of a
system prompt that was shortened before are timed in CPU time, the median of repeats. Prompts are the pages of docs/,
each under one line of instruction, at the default limit of 1,024 tokens of the embedded model's tokenizer. What they
lose is counted: the numbers, and the sentences with a "must", "never", "only" or "do not" (which are kept on purpose)
or another negation, that are not in the shorter text. The losing case is a prompt of 80 rules of equal worth that use
none of these words: whatever leaves is a rule. A loop that ticks every millisecond
tells how much later other requests are served while texts are shortened in their process.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from _report import ROOT, Row, arguments, middle, write_results

import agentopt as ao
from agentopt.capsules import BudgetInfeasible, Capsule, CapsuleOptions, make_capsule
from agentopt.serving._shortening import Shortening
from agentopt.serving._shortening_process import RULES
from agentopt.serving._types import CHAT
from agentopt.serving.variants import Rewriting, Variant, VirtualModel, Wanted, parts_of

LIMIT = 1024
TASK = 'You answer questions about this page. Answer in one sentence, as JSON: {"answer": text}.\n\n'
DUTY = re.compile(r"\b(?:never|must|only|do not|cannot)\b", re.IGNORECASE)
NEGATION = re.compile(r"\b(?:not|no|nor|none|nothing|without)\b", re.IGNORECASE)
NUMBER = re.compile(r"\d[\d,.]*\d|\d")
SENTENCE = re.compile(r"[^.!?\n]+")


def timed(name: str, call: Callable[[], Any], repeats: int, times: int, goal: str | None = None) -> Row:
    """Microseconds of CPU for one call: median and range of the repeats."""
    out: list[float] = []
    for _ in range(repeats):
        began = time.process_time()
        for _ in range(times):
            call()
        out.append((time.process_time() - began) / times * 1e6)
    value, interval = middle(out)
    return Row(name, value, "us", interval, goal)


def rewriting_rows(repeats: int, times: int) -> list[Row]:
    demos = [{"input": f"question {n} " * 10, "output": f"answer {n}", "source": ""} for n in range(8)]
    values: dict[str, Any] = {"a.instruction": "Sort the ticket. " * 20, "a.demos": demos, "a.cue": "Queue:"}
    rewrite = Rewriting(parts_of(ao.Candidate(values), Wanted(), "a")[0])
    template = Rewriting(parts_of(ao.Candidate({"a.prompt": "Sort {ticket}."}), Wanted(), "a")[0])
    one = {"model": "m", "messages": [{"role": "user", "content": "My parcel is late."}]}
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"turn {n}"} for n in range(101)]
    model = VirtualModel("m", tuple(Variant(f"v{n}", n + 1.0) for n in range(4)))
    return [
        timed("rewriting, one user turn", lambda: rewrite(CHAT, one), repeats, times, "<= 50"),
        timed("rewriting, 101 turns", lambda: rewrite(CHAT, {"messages": turns}), repeats, times // 10),
        timed("rewriting, a template", lambda: template(CHAT, one), repeats, times),
        timed("choice among 4 variants", lambda: model.pick("user:7"), repeats, times),
    ]


async def looked_up(repeats: int, times: int, prompt: str) -> list[Row]:
    """What a request pays for `--capsule`: a short prompt, one that is known, one that is known to be left alone."""
    rows: list[Row] = []
    async with Shortening(LIMIT, tokenizer="embedded") as shortening:
        for name, text in (("of 400 characters", TASK * 4), (f"of {len(prompt):,} characters, shortened", prompt)):
            body = {"messages": [{"role": "system", "content": text}, {"role": "user", "content": "Why?"}]}
            shortening.apply(CHAT, body, lambda _: None)
            await shortening.settled()
            what = f"--capsule: look-up of a prompt {name}"
            rows.append(timed(what, lambda b=body: shortening.apply(CHAT, b, lambda _: None), repeats, times))
    return rows


async def lag(prompts: list[str]) -> tuple[float, float, float]:
    """Milliseconds that a tick came late while texts were shortened: median, 99th percentile, the worst."""
    late: list[float] = []
    async with Shortening(LIMIT, tokenizer="embedded") as shortening:
        for text in prompts:
            shortening.apply(CHAT, {"messages": [{"role": "system", "content": text}]}, lambda _: None)
        done = asyncio.create_task(shortening.settled())
        while not done.done():
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append((time.perf_counter() - began - 0.001) * 1e3)
    late.sort()
    return statistics.median(late), late[int(len(late) * 0.99)], late[-1]


def shares(text: str, shorter: str) -> dict[str, tuple[int, int]]:
    """How many of the text's numbers and sentences are in the shorter one, and how many there were."""
    sentences = [" ".join(one.split()) for one in SENTENCE.findall(text)]
    held = " ".join(shorter.split())
    duties = [one for one in sentences if DUTY.search(one)]
    negations = [one for one in sentences if NEGATION.search(one) and not DUTY.search(one)]
    numbers, left = Counter(NUMBER.findall(text)), Counter(NUMBER.findall(shorter))
    return {
        "numbers": ((numbers & left).total(), numbers.total()),
        "sentences with must/never/only/cannot/do not": (sum(one in held for one in duties), len(duties)),
        "other sentences with a negation": (sum(one in held for one in negations), len(negations)),
    }


async def pages(prompts: list[str]) -> list[Row]:
    """Tokens before and after, how long it took, what was lost."""
    before = after = changed = 0
    seconds: list[float] = []
    kept: Counter[str] = Counter()
    there: Counter[str] = Counter()
    budget = ao.TokenBudget(LIMIT, tokenizer="embedded")
    meter = budget.meter()
    for text in prompts:
        began = time.process_time()
        try:
            made = await shorten(text, budget)
        except BudgetInfeasible:
            made = None
        seconds.append(time.process_time() - began)
        shorter = text if made is None else made.text
        before, after = before + meter.total([text]), after + meter.total([shorter])
        if made is None or made.text == text:
            continue
        changed += 1
        for name, (held, count) in shares(text, shorter).items():
            kept[name] += held
            there[name] += count
    middle_ms, range_ms = middle([1e3 * second for second in seconds])
    return [
        Row("--capsule on docs/*.md: pages shortened", changed, "pages", note=f"of {len(prompts)}"),
        Row("tokens before", before, "tokens"),
        Row("tokens after", after, "tokens", note=f"{1 - after / before:.0%} fewer"),
        *(
            Row(f"{name} that are still there", 100 * kept[name] / there[name], "%", note=f"of {there[name]:,}")
            for name in there
        ),
        Row("CPU to shorten a page, once", middle_ms, "ms", range_ms),
    ]


async def shorten(text: str, budget: ao.TokenBudget) -> Capsule:
    """As the server does it."""
    options = CapsuleOptions(scorer="coverage")
    return await make_capsule(text, budget=budget, keep=RULES, mode="extract", options=options)


async def rules_only() -> Row:
    """The losing case: rules of equal worth."""
    rules = [
        f"Rule {n}: for region {n * 37 % 101}, parcels go to hall {n * 53 % 97} and the fee is {n * 7 % 89} euros."
        for n in range(80)
    ]
    budget = ao.TokenBudget(LIMIT, tokenizer="embedded")
    made = await shorten("\n".join([TASK, *rules]), budget)
    kept = sum(rule in made.text for rule in rules)
    note = f"losing case; {made.original_tokens:,} -> {made.tokens:,} tokens; {80 - kept} rules are gone"
    return Row("80 rules of equal worth: rules still there", 100 * kept / 80, "%", note=note)


def main() -> None:
    options = arguments(__doc__ or "", seeds=5)
    times = 2_000 if options.quick else 20_000
    texts = [TASK + path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    texts = texts[:6] if options.quick else texts
    rows = rewriting_rows(options.seeds, times)
    longest = max(texts, key=len)
    rows += asyncio.run(looked_up(options.seeds, times, longest))
    rows += asyncio.run(pages(texts))
    rows.append(asyncio.run(rules_only()))
    median, high, worst = asyncio.run(lag(texts))
    note = f"median {median:.2f}, worst {worst:.1f}"
    rows.append(Row("a tick is late while pages are shortened, 99th percentile", high, "ms", note=note))
    write_results("serve_variants", rows, quick=options.quick)


if __name__ == "__main__":
    main()
