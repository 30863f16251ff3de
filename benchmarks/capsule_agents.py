"""What an agent's history costs under prompt caching: sent whole, recompressed at every call, masked, and append-only.

A synthetic agent of 60 steps (tool results of 50 to 2,500 tokens, four user turns that set constraints, errors) under a
budget of 16,000 tokens. Every policy decides what is sent at every call; what of it the provider has in its cache is
the common beginning of one call's messages and the next one's, by the shipped caching rules. No language model runs:
input tokens are priced, output is the same for all and left out.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from _report import Row, arguments, write_results

from agentopt.capsules import BudgetInfeasible, CachingRule, History, HistoryOptions, TokenBudget
from agentopt.capsules.agents._compact import Compactor, Rules
from agentopt.capsules.agents._counter import Counter
from agentopt.capsules.agents._epochs import Sent, call_cost, read_tokens
from agentopt.capsules.agents._steps import read_all
from agentopt.capsules.gating._caching import default_caching
from agentopt.models import default_prices

TOKENIZER = "o200k_base"
LIMIT = 16_000
KEEP_LAST = 3
MODELS = {"Anthropic-like": "anthropic/claude-sonnet-5", "OpenAI-like": "openai/gpt-5.5"}
CONSTRAINTS = {
    0: "Find out why the invoices of May are late. Do not write to customers.",
    15: "From now on give amounts in euros.",
    30: "Correction: the cut-off is 14 May, not 12 May. Never touch the archive tables.",
    45: "Always name the source of a number.",
}
WORDS = (
    *("invoice", "ledger", "harbour", "account", "batch", "queue", "worker", "retry", "schema", "column", "index"),
    *("cursor", "payment", "vendor", "region", "office", "balance", "transfer", "record", "update", "delete", "select"),
    *("status", "pending", "settled", "partial", "amount", "currency", "rate", "window", "log", "table", "archive"),
    *("export", "import", "node", "cluster", "shard", "replica", "quota", "limit", "token", "session", "request"),
)
Message = dict[str, Any]
Policy = Callable[[list[Message]], Sequence[Message]]


@dataclass
class Outcome:
    """One run of one policy under one caching rule."""

    read: int = 0
    written: int = 0
    units: float = 0.0
    """Tokens at the plain price."""
    over: int = 0
    """Calls above the budget."""
    refused: int = 0
    kept: int = 0
    asked: int = 0
    longest: int = 0
    seconds: float = 0.0


def words(draw: random.Random, count: int) -> str:
    """About `count` tokens of log lines, rows and prose."""
    lines: list[str] = []
    left = count
    while left > 0:
        kind, size = draw.random(), draw.randint(6, 14)
        said = " ".join(draw.choice(WORDS) for _ in range(size))
        if kind < 0.3:
            lines.append(f"2026-05-{draw.randint(1, 31):02d} 12:{draw.randint(10, 59)} INFO {said}")
        elif kind < 0.6:
            lines.append(json.dumps({"id": draw.randint(1, 9999), "note": said, "amount": draw.randint(1, 500)}))
        else:
            lines.append(said.capitalize() + ".")
        left -= 2 * size
    return "\n".join(lines)


def run_of(seed: int, steps: int) -> Iterator[list[Message]]:
    """The messages up to each call of the agent (they only grow)."""
    draw = random.Random(f"capsule-agents-{seed}")
    messages: list[Message] = [
        {"role": "system", "content": "You are a careful accounting agent. " + words(draw, 1200)}
    ]
    tools = ("query", "read_file", "search_log", "run_report")
    for step in range(steps):
        if step in CONSTRAINTS:
            if step:
                messages.append({"role": "assistant", "content": f"So far: {words(draw, 60)}"})
            messages.append({"role": "user", "content": CONSTRAINTS[step]})
        yield messages
        tool = draw.choice(tools)
        call = {
            "id": f"call_{step}",
            "type": "function",
            "function": {"name": tool, "arguments": json.dumps({"q": step})},
        }
        messages.append({"role": "assistant", "content": words(draw, 30), "tool_calls": [call]})
        size = min(2500, max(50, int(draw.lognormvariate(6.2, 0.8))))
        text = words(draw, size)
        if draw.random() < 0.1:
            text = f"Error: the {tool} timed out.\n{words(draw, 80)}"
        messages.append({"role": "tool", "tool_call_id": f"call_{step}", "content": text})
    yield messages


def grown() -> Policy:
    """Everything, always."""
    return list


def masked_each_call() -> Policy:
    """Old tool results masked anew at every call; no other limit."""
    compactor = Compactor(Counter(TokenBudget(LIMIT, TOKENIZER)), Rules(keep_last=KEEP_LAST))

    def send(messages: list[Message]) -> Sequence[Message]:
        done = compactor.masked(messages, read_all(messages))
        return messages if done is None else done.messages

    return send


def recompressed_each_call(mask: bool) -> Policy:
    """Above the budget the whole history is compressed anew at every call, as a proxy without memory does."""
    counter = Counter(TokenBudget(LIMIT, TOKENIZER))
    compactor = Compactor(counter, Rules(keep_last=KEEP_LAST, mask=mask, query="last user turn", room=0.0))

    def send(messages: list[Message]) -> Sequence[Message]:
        if counter.total(messages) <= LIMIT:
            return list(messages)
        return compactor.compact(messages, read_all(messages), LIMIT).messages

    return send


def truncated_each_call() -> Policy:
    """The system prompt and the newest messages that fit."""
    counter = Counter(TokenBudget(LIMIT, TOKENIZER))

    def send(messages: list[Message]) -> Sequence[Message]:
        first = 1
        while counter.total([messages[0], *messages[first:]]) > LIMIT:
            first += 1
            while messages[first]["role"] == "tool":  # no answer without its call
                first += 1
        return [messages[0], *messages[first:]]

    return send


def history(rule: CachingRule | None, **options: Any) -> Policy:
    """Ours."""
    kept = History(TokenBudget(LIMIT, TOKENIZER), keep_last=KEEP_LAST, options=HistoryOptions(caching=rule, **options))

    def send(messages: list[Message]) -> Sequence[Message]:
        kept.extend(messages[len(kept) :])
        return kept.messages()

    return send


def policies(rule: CachingRule | None) -> dict[str, Policy]:
    """By name; a fresh state each."""
    return {
        "no compression": grown(),
        "truncated at every call": truncated_each_call(),
        "recompressed at every call": recompressed_each_call(mask=False),
        "masked and recompressed at every call": recompressed_each_call(mask=True),
        "masked at every call, no budget": masked_each_call(),
        "History, epochs by budget only": history(rule, early=False),
        "History": history(rule),
    }


def measure(policy: Policy, rule: CachingRule, seed: int, steps: int) -> Outcome:
    """One run."""
    counter = Counter(TokenBudget(LIMIT, TOKENIZER))
    outcome = Outcome()
    before: Sequence[Message] = ()
    for step, messages in enumerate(run_of(seed, steps)):
        started = time.perf_counter()
        try:
            sent = policy(messages)
        except BudgetInfeasible:
            outcome.refused += 1
            continue
        outcome.seconds += time.perf_counter() - started
        tokens = counter.total(sent)
        shared = 0
        for one, other in zip(before, sent, strict=False):
            if one != other:
                break
            shared += counter.size(other)
        now = Sent(min(shared, tokens), tokens)
        read = read_tokens(rule, now)
        outcome.read += read
        outcome.written += tokens - read
        outcome.units += call_cost(rule, now)
        outcome.over += tokens > LIMIT
        outcome.longest = max(outcome.longest, tokens)
        text = "\n".join(str(message["content"]) for message in sent)
        said = [sentence for at, sentence in CONSTRAINTS.items() if at <= step and at < steps]
        outcome.asked += len(said)
        outcome.kept += sum(sentence in text for sentence in said)
        before = [dict(message) for message in sent]
    return outcome


def rows_of(provider: str, model: str, seeds: int, steps: int) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one provider, and all figures."""
    rule = default_caching().of(model)
    price = default_prices().of(model)
    assert rule is not None and price is not None
    found: dict[str, list[Outcome]] = {}
    for seed in range(seeds):
        for name, policy in policies(rule).items():
            found.setdefault(name, []).append(measure(policy, rule, seed, steps))
    rows: list[Row] = []
    usd = {name: [one.units * price.input / 1e6 for one in runs] for name, runs in found.items()}
    others = [name for name in found if not name.startswith("History")]
    cheapest = min(others, key=lambda name: statistics.mean(usd[name]))
    for name, runs in found.items():
        peer = cheapest if name.startswith("History") else None
        longest = max(one.longest for one in runs)
        notes = f"{sum(one.over for one in runs)} calls over the budget, longest {longest:,} tokens"
        kept = sum(one.kept for one in runs) / max(1, sum(one.asked for one in runs))
        middle = statistics.mean(usd[name])
        rows.append(
            Row(
                f"{provider}: {name}",
                middle,
                "USD a run",
                interval=(min(usd[name]), max(usd[name])),
                goal=f"<= {statistics.mean(usd[peer]):.4g}" if peer else None,
                peer=peer,
                peer_value=statistics.mean(usd[peer]) if peer else None,
                note=f"{notes}, constraints in the prompt {kept:.1%}, refused {sum(one.refused for one in runs)}, "
                f"read {statistics.mean(one.read for one in runs):,.0f}, "
                f"written {statistics.mean(one.written for one in runs):,.0f} tokens, "
                f"{1000 * sum(one.seconds for one in runs) / (seeds * (steps + 1)):.1f} ms a call",
            )
        )
    ours = [one for name, runs in found.items() if name.startswith("History") for one in runs]
    rows.append(Row(f"{provider}: History, calls over the budget", sum(one.over for one in ours), "calls", goal="<= 0"))
    kept = sum(one.kept for one in ours) / sum(one.asked for one in ours)
    rows.append(Row(f"{provider}: History, constraints in the prompt", kept, "share", goal=">= 1"))
    figures = {name: [vars(one) | {"seconds": round(one.seconds, 3)} for one in runs] for name, runs in found.items()}
    return rows, {"model": model, "caching": rule.scope, "usd_per_million": price.input, "runs": figures}


def main() -> None:
    """Measure and write."""
    options = arguments(__doc__ or "", seeds=10)
    steps, seeds = (30, 2) if options.quick else (60, options.seeds)
    rows: list[Row] = []
    extra: dict[str, Any] = {"limit": LIMIT, "tokenizer": TOKENIZER, "steps": steps, "seeds": seeds}
    for provider, model in MODELS.items():
        more, figures = rows_of(provider, model, seeds, steps)
        rows += more
        extra[provider] = figures
    write_results("capsule_agents", rows, quick=options.quick, extra=extra)


if __name__ == "__main__":
    main()
