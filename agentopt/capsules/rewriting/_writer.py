"""One candidate of the rewriting engine: ask, read, restore, cut, verify, send back, at most so many rounds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules._types import Check, Document, Unit, UnitKind
from agentopt.capsules.rewriting._asking import Amount, again, amount_for, next_amount, request
from agentopt.capsules.rewriting._chunks import Piece
from agentopt.capsules.rewriting._probes import answered, recall
from agentopt.capsules.rewriting._replies import Read, read_reply
from agentopt.capsules.rewriting._sentinels import Masked, mask
from agentopt.capsules.rewriting._verify import verify_against
from agentopt.capsules.rewriting._wording import fenced, fill
from agentopt.evaluation import seed_number
from agentopt.models import LMError, LMOptions, Message, Reply

if TYPE_CHECKING:
    from agentopt.models import LM

_WANTED = 12
_PROSE: frozenset[UnitKind] = frozenset({"instruction", "constraint", "sentence", "item"})
_NEWLINE = re.compile(r"[ \t]*\n\s*")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One reply of the model and what became of it."""

    part: int
    piece: int
    style: str
    round: int
    """0 for the first ask, then one per repair."""
    asked: str
    """How much was asked for."""
    text: str = ""
    """With the spans restored, cut where it was too long; empty when nothing could be read."""
    tokens: int = 0
    """Of the reply with its spans restored, before it was cut."""
    recall: float = 0.0
    checks: tuple[Check, ...] = ()
    problem: str = ""
    """Why it cannot be used; empty when it can."""


@dataclass(frozen=True, slots=True)
class Writer:
    """A model and how it is asked."""

    lm: LM
    wording: Mapping[str, str]
    query: str | None
    repairs: int
    seed: int
    temperature: float
    timeout: float
    examples: tuple[str, ...] = ()

    async def candidate(self, piece: Piece, style: str) -> list[Attempt]:
        """All rounds for one style; the last one is the candidate. A failure of the model ends them.

        Raises:
            BudgetExhausted: the budget does not cover the call.
        """
        document = piece.document
        masked = mask(document)
        fence = fenced("\n".join((masked.text, *self.examples)), self.seed, style)
        amount = amount_for(masked, document.text, piece.meter)
        messages = request(
            masked, amount, self.wording, style=style, query=self.query, fence=fence, examples=self.examples
        )
        attempts: list[Attempt] = []
        sizes: list[tuple[Amount, int]] = []
        room = 1
        for turn in range(self.repairs + 1):
            options = LMOptions(
                temperature=self.temperature,
                max_tokens=amount.reply_tokens * room,
                seed=seed_number("capsule", self.seed, piece.part, piece.number, style, turn),
                timeout=self.timeout,
                sample=turn,
            )
            place = (piece.part, piece.number, style, turn, str(amount))
            try:
                reply = await self.lm.complete(list(messages), options=options)
            except LMError as error:
                attempts.append(Attempt(*place, problem=f"the model failed: {' '.join(str(error).split())[:200]}"))
                break
            read = read_reply(reply.text, document.text, finish_reason=reply.finish_reason, fence=fence.strip("-"))
            attempt = self._judged(piece, masked, read, place)
            attempts.append(attempt)
            if not attempt.problem and attempt.recall >= piece.floor:
                break
            if not read.text:
                if read.problem.startswith("the model refused"):
                    break
                room *= 4
                continue
            sizes.append((amount, attempt.tokens))
            amount = next_amount(sizes, piece.meter.limit)
            messages = [*messages[:2], *self._sent_back(piece, masked, reply, attempt, amount)]
        return attempts

    def _judged(self, piece: Piece, masked: Masked, read: Read, place: tuple[int, int, str, int, str]) -> Attempt:
        if read.problem:
            return Attempt(*place, problem=read.problem)
        text = masked.marks.restore(read.text)
        tokens = piece.meter.total([text])
        if tokens > piece.meter.limit:
            text = cut_by_value(text, piece, query=self.query, seed=self.seed)
        checks = [*verify_against(piece.source, text, meter=piece.meter), _marks(masked, text)]
        failed = [check for check in checks if not check.passed]
        problem = "; ".join(f"{check.name} ({check.detail})" for check in failed)
        return Attempt(
            *place,
            text=text,
            tokens=tokens,
            recall=recall(piece.source.probes, text),
            checks=tuple(checks),
            problem=problem,
        )

    def _sent_back(self, piece: Piece, masked: Masked, reply: Reply, attempt: Attempt, amount: Amount) -> list[Message]:
        failed = [check for check in attempt.checks if not check.passed]
        wanted: list[str] = []
        if not failed:
            probes = piece.source.probes
            unanswered = zip(probes, answered(probes, attempt.text), strict=True)
            wanted = [probe.answer for probe, good in unanswered if not good][:_WANTED]
        turn = again(masked, attempt.text, failed, amount, self.wording, wanted=wanted)
        return [{"role": "assistant", "content": reply.text}, turn]


def cut_by_value(text: str, piece: Piece, *, query: str | None, seed: int) -> str:
    """`text` within the piece's limit: the units worth least leave, never a keep span; as it is where none can."""
    from agentopt.capsules.extraction._extract import extract
    from agentopt.capsules.units._units import parse

    keep = [re.escape(span) for span in dict.fromkeys(piece.source.keep)]
    try:
        return extract([by_lines(parse(text, keep))], piece.meter, query=query, seed=seed).texts[0]
    except BudgetInfeasible:
        return text


def by_lines(document: Document) -> Document:
    """`document` with a unit for every line of its prose.

    Models asked for short lines write fragments in lower case, which read like one wrapped sentence.
    """
    units: list[Unit] = []
    for unit in document.units:
        start = unit.start
        if unit.kind in _PROSE:
            for match in _NEWLINE.finditer(document.text, unit.start, unit.end):
                if not any(span.start < match.start() < span.end for span in document.keep):
                    units.append(_part(document, unit, start, match.start()))
                    start = match.end()
        units.append(_part(document, unit, start, unit.end))
    places = {unit.start: number for number, unit in enumerate(units)}
    heads = [places[unit.start] for unit in document.units]
    moved = (replace(unit, heading=heads[unit.heading] if unit.heading >= 0 else -1) for unit in units)
    return replace(document, units=tuple(moved))


def _part(document: Document, unit: Unit, start: int, end: int) -> Unit:
    keep = unit.keep and any(span.start < end and start < span.end for span in document.keep)
    return replace(unit, start=start, end=end, keep=keep)


def _marks(masked: Masked, text: str) -> Check:
    left = masked.marks.leftover(text) if masked.marks.spans else []
    return Check("marks", not left, f"stand for nothing: {', '.join(left[:4])}" if left else "")


async def entailed(
    piece: Piece, text: str, judge: LM, wording: Mapping[str, str], *, seed: int, timeout: float
) -> Check:
    """Whether a judge finds every statement of `text` supported; a judge that cannot say is a no.

    Raises:
        BudgetExhausted: the budget does not cover the call.
    """
    source = piece.document.text
    values = {"fence": fenced(f"{source}\n{text}", "judge", seed), "document": source, "capsule": text}
    options = LMOptions(max_tokens=16, seed=seed_number("judge", seed), timeout=timeout)
    try:
        reply = await judge.complete(fill(wording["judge.entailment"], values), choices=("yes", "no"), options=options)
    except LMError as error:
        return Check("entailment", False, f"the judge failed: {' '.join(str(error).split())[:160]}")
    return Check("entailment", reply.text == "yes", f"the judge says {reply.text}")
