"""What is asked of a rewriting model: how much to write, in which words, and what to say when it has to be done again.

Models do not obey a number of tokens, but roughly a number of words (or characters, in scripts without spaces), so the
budget is translated with the source's own rate. Protected spans come back as marks: what they will cost is set apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentopt.capsules._types import Check
from agentopt.capsules.counting._tokens import Meter
from agentopt.capsules.rewriting._sentinels import Marks, Masked
from agentopt.capsules.rewriting._verify import missing_spans
from agentopt.capsules.rewriting._wording import fill
from agentopt.models import Message

SHARE = 0.9
"""Of the budget that is asked for: the rest is for models that overshoot."""
_LEAST = 5
_CHARACTERS_PER_WORD = 14
_LISTED_MARKS = 200


@dataclass(frozen=True, slots=True)
class Amount:
    """How much to write."""

    count: int
    unit: str
    """"words" or "characters"."""
    marks: int
    """How many marks must be in it; each is one word."""

    def __str__(self) -> str:
        return f"{self.count} {self.unit}"

    def times(self, factor: float) -> Amount:
        """Another size of the same."""
        return Amount(max(_LEAST + self.marks, int(self.count * factor)), self.unit, self.marks)

    @property
    def reply_tokens(self) -> int:
        """Room for such a reply in any model's tokens."""
        words = 4 * self.count if self.unit == "words" else 3 * self.count
        return max(96, min(16_384, words + 8 * self.marks + 64))


def amount_for(masked: Masked, text: str, meter: Meter) -> Amount:
    """What to ask for so that the restored reply takes about `SHARE` of the limit."""
    marks = masked.marks
    required = [span for span, keep in zip(marks.spans, marks.kept, strict=True) if keep]
    plain = marks.pattern.sub(" ", masked.text) if marks.spans else masked.text
    spoken = len(plain.split())
    by_words = spoken * _CHARACTERS_PER_WORD >= len(plain.strip())
    size = max(1, spoken if by_words else len("".join(plain.split())))
    tokens, *costs = meter.units([plain, *required])
    free = max(0.0, SHARE * meter.limit - sum(costs))
    # Spans that are not required are part of the free text: their share of the source's tokens goes with it.
    others = meter.units([text])[0] - sum(costs)
    count = int(free * size / max(tokens, others, 1)) + len(required)
    return Amount(max(_LEAST + len(required), count), "words" if by_words else "characters", len(required))


def next_amount(history: Sequence[tuple[Amount, int]], limit: int) -> Amount:
    """What to ask for next, after replies that took so many tokens.

    Too long: ask for less in proportion. If a smaller ask did not bring a shorter reply ("token elasticity": pressed
    too hard, models write more), ask for more than before; the cut by value does the rest.
    """
    last, got = history[-1]
    if got <= limit:
        return last
    earlier = [(amount, tokens) for amount, tokens in history[:-1] if amount.count > last.count]
    if any(tokens <= got for _, tokens in earlier):
        return max((amount for amount, _ in earlier), key=lambda amount: amount.count).times(1.25)
    return last.times(max(0.5, 0.95 * limit / got))


def request(
    masked: Masked,
    amount: Amount,
    wording: Mapping[str, str],
    *,
    style: str,
    query: str | None,
    fence: str,
    examples: Sequence[str] = (),
) -> list[Message]:
    """The messages that ask for one candidate."""
    marks = masked.marks
    values = {
        "fence": fence,
        "document": masked.text,
        "amount": str(amount),
        "style": wording[f"rewrite.style.{style}"],
        "query": "" if query is None else fill(wording["rewrite.query"], {"query": " ".join(query.split())}),
        "marks": _about_marks(marks, wording),
        "example": "\n".join(fill(wording["rewrite.example"], {"capsule": example}) for example in examples),
    }
    return [
        {"role": "system", "content": wording["rewrite.system"]},
        {"role": "user", "content": fill(wording["rewrite.task"], values)},
    ]


def _about_marks(marks: Marks, wording: Mapping[str, str]) -> str:
    if not marks.spans:
        return ""
    text = fill(wording["rewrite.marks"], {"labelled": marks.labelled(1), "bare": marks.bare(1)})
    required = [number for number, keep in enumerate(marks.kept, 1) if keep]
    if not required:
        return text
    listed = " ".join(marks.bare(number) for number in required[:_LISTED_MARKS])
    return f"{text}\n{fill(wording['rewrite.required'], {'required': listed})}"


def again(
    masked: Masked,
    text: str,
    failed: Sequence[Check],
    amount: Amount,
    wording: Mapping[str, str],
    *,
    wanted: Sequence[str] = (),
) -> Message:
    """The turn that sends a reply back: the failed checks, the marks to put back, and the room there is.

    `text` is the reply with its spans restored; `wanted` are spans that it has room for and would be worth it.
    """
    marks = masked.marks
    required = [number for number, keep in enumerate(marks.kept, 1) if keep]
    lacking = missing_spans([marks.spans[number - 1] for number in required], text)
    named = [marks.labelled(required[place]) for place in lacking]
    numbers = {span: number for number, span in reversed(list(enumerate(marks.spans, 1)))}
    named += [marks.labelled(numbers[span]) if span in numbers else span for span in wanted]
    problems = "\n".join(f"- {check.name}: {check.detail}" for check in failed) or "- it leaves out too much"
    missing = fill(wording["rewrite.missing"], {"missing": ", ".join(dict.fromkeys(named))}) if named else ""
    values = {"problems": problems, "missing": missing, "amount": str(amount)}
    return {"role": "user", "content": fill(wording["rewrite.repair"], values)}
