"""From a text to a capsule: parse, shorten, verify, cut, gate, price.

Each step is a function of its own file; here is only the order, and the rule that the text of a capsule is decided by
the budget and the spans alone, while the gate and the price decide what is recommended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from agentopt.capsules._drafts import Draft, Job, drafts_of
from agentopt.capsules._options import CapsuleOptions
from agentopt.capsules._types import Capsule, Check, CostReport, Document, GateReport, Mode, Recommended
from agentopt.capsules.counting._parts import check_messages, parts_of, with_texts
from agentopt.capsules.counting._templates import uncounted
from agentopt.capsules.counting._tokens import TokenBudget
from agentopt.capsules.units._lossless import lossless
from agentopt.capsules.units._units import parse
from agentopt.errors import UserError
from agentopt.graph import metered

if TYPE_CHECKING:
    from agentopt.capsules.gating._task import Task
    from agentopt.models import LM

MODES: tuple[Mode, ...] = ("auto", "extract", "rewrite", "trained")
Source = str | Sequence[Mapping[str, Any]]
_DECIDES = ("lossless", "scorer", "styles", "repairs", "tools")
"""The options that decide the text."""


async def make_capsule(
    source: Source,
    *,
    budget: TokenBudget,
    keep: Sequence[str] = (),
    task: Task | None = None,
    mode: Mode = "auto",
    query: str | None = None,
    lm: LM | None = None,
    options: CapsuleOptions | None = None,
) -> Capsule:
    """A capsule of a text or of chat messages.

    Args:
        source: the text, or messages in OpenAI form; of messages the last user turn stays as it is.
        budget: the hard limit, in the reader's tokens.
        keep: regular expressions; what they match is never dropped.
        task: examples, program and metric on which the capsule must be shown not to harm.
        mode: `extract` keeps whole units; `rewrite` asks `lm`, verifies, and falls back to extraction; `trained` asks a
            trained capsulator likewise; `auto` takes extraction, and a rewrite where a model is given and passes.
        query: what the reader will be asked; units that answer it are worth more.
        lm: the rewriting model.
        options: everything else.

    Raises:
        BudgetInfeasible: what must stay is longer than the budget; its `minimum` would do.
        UserError: unusable arguments.
    """
    options = options or CapsuleOptions()
    if isinstance(keep, str):
        keep = (keep,)
    _check_types(source, budget, keep)
    _check(mode, lm, task, source, options)

    async def make() -> Capsule:
        return await _make(_job(source, budget, keep, query, options), mode, task, lm)

    if options.store is None:
        return await make()
    from agentopt.capsules._library import Library, capsule_key
    from agentopt.capsules.agents._originals import Originals

    if task is not None or not (lm is None or getattr(lm.client, "cacheable", True)):
        made = await make()
    else:
        key = capsule_key(
            source,
            budget,
            keep=keep,
            query=query,
            mode=mode,
            model="|".join((lm.name if lm else "", identity(options.trained))),
            options={name: getattr(options, name) for name in _DECIDES} | {"rewriting": _wording(options)},
            seed=options.seed,
        )
        made = await Library(options.store).once(key, make)
    made = replace(made, handle=Originals(options.store, tokenizer=budget.tokenizer).put(made.original))
    return made if task is not None else _judged(made, options, query)


def _check_types(source: Any, budget: Any, keep: Sequence[Any]) -> None:
    """What a caller without a type checker gets wrong."""
    if isinstance(source, bytes | dict) or not isinstance(source, Sequence):
        found = type(cast("object", source)).__name__
        raise UserError(f"source: found {found}, expected text or a list of chat messages.")
    if not isinstance(budget, TokenBudget):
        raise UserError(f"budget: found {budget!r:.60}, expected TokenBudget(tokens), for example TokenBudget(300).")
    for pattern in keep:
        if not isinstance(pattern, str):
            raise UserError(f"keep: found {pattern!r:.60}, expected regular expressions as text.")


def _check(mode: str, lm: LM | None, task: Task | None, source: Source, options: CapsuleOptions) -> None:
    if mode not in MODES:
        raise UserError(f"mode: found {mode!r}, expected one of {', '.join(MODES)}.")
    if mode == "rewrite" and lm is None:
        raise UserError("mode 'rewrite' needs a model that writes: give lm= (on the command line --model NAME).")
    if mode == "extract" and (lm is not None or options.trained is not None):
        raise UserError("mode 'extract' asks no model: leave lm= and trained= out (--model, --trained), or use 'auto'.")
    if mode == "trained" and options.trained is None:
        raise UserError("mode 'trained' needs a trained capsulator: give CapsuleOptions(trained=FOLDER) (--trained).")
    if task is not None and not isinstance(source, str):
        raise UserError("task: a gate compares two texts; give the text of the message that the program reads.")


def identity(trained: str | Path | Any) -> str:
    """What tells one trained capsulator from another, in every process: its files and their times, or its weights."""
    if trained is None:
        return ""
    if isinstance(trained, str | Path):
        path = Path(trained)
        files = [path] if path.is_file() else [*sorted(path.glob("*.json")), *sorted(path.glob("*.safetensors"))]
        return "|".join([str(trained), *(f"{file.name}:{file.stat().st_mtime_ns}" for file in files)])
    return f"{type(trained).__name__}:{trained.digest()}"


def _wording(options: CapsuleOptions) -> list[Any]:
    """What of the rewriting options decides the text."""
    chosen = options.rewriting
    if chosen is None:
        return []
    from agentopt.capsules.rewriting._wording import load_wording

    told = dict(load_wording(chosen.template))
    judge = "" if chosen.judge is None else chosen.judge.name
    wins = [[win.style, win.original, win.capsule] for win in chosen.wins]
    return [chosen.chunk, chosen.temperature, told, judge, wins]


def _job(source: Source, budget: TokenBudget, keep: Sequence[str], query: str | None, options: CapsuleOptions) -> Job:
    if isinstance(source, str):
        messages, roles = None, [""]
        texts: tuple[str, ...] = (source,)
    else:
        messages = check_messages(source)
        parts = parts_of(messages)
        texts, roles = tuple(part.text for part in parts), [part.role for part in parts]
    last = max((place for place, role in enumerate(roles) if role == "user"), default=-1)
    documents: list[Document] = []
    for place, (text, role) in enumerate(zip(texts, roles, strict=True)):
        whole = len(texts) > 1 and place == last
        edited = lossless(text, keep)[0] if options.lossless and not whole else text
        documents.append(parse(edited, keep, role=role, whole=whole))
    joined = source if isinstance(source, str) else "\n\n".join(texts)
    meter = budget.meter(messages, tools=options.tools)
    return Job(joined, messages, texts, meter, tuple(documents), tuple(keep), query, options)


async def _make(job: Job, mode: Mode, task: Task | None, lm: LM | None) -> Capsule:
    if job.meter.fits(job.texts):
        return _settled(job, Draft("unchanged", job.texts), None)
    edited = tuple(document.text for document in job.documents)
    with metered() as spent:
        drafts = [Draft("lossless", edited)] if job.meter.fits(edited) else await drafts_of(job, mode, lm)
        chosen, gate = drafts[0], None
        if task is not None:
            from agentopt.capsules.gating._gate import gate as run_gate

            winner, gate = await run_gate(
                job.source,
                [(draft.made, draft.texts[0]) for draft in drafts],
                task,
                margin=job.options.margin,
                confidence=job.options.confidence,
                seed=job.options.seed,
                store=job.options.store,
                tokenizer=job.meter.tokenizer,
            )
            chosen = drafts[winner or 0]
    usd = None if spent.unpriced_calls else spent.cost
    return _settled(job, replace(chosen, usd=usd), gate)


def _settled(job: Job, draft: Draft, gate: GateReport | None) -> Capsule:
    """The capsule of a draft, with its price and what is recommended."""
    before = job.meter.total(job.texts)
    edited = job.meter.total([document.text for document in job.documents])
    messages = None if job.messages is None else with_texts(job.messages, draft.texts)
    made = Capsule(
        text=draft.texts[0] if messages is None else "\n\n".join(text for text in draft.texts if text),
        tokens=job.meter.total(draft.texts),
        limit=job.meter.limit,
        tokenizer=job.meter.tokenizer.name,
        original=job.source,
        original_tokens=before,
        made=draft.made,
        recommended="capsule",
        messages=None if messages is None else tuple(messages),
        kept=tuple((span.of(document.text), span.kind) for document in job.documents for span in document.keep),
        dropped=draft.dropped,
        lossless_saved=0 if draft.made == "unchanged" else max(0, before - edited),
        checks=(*draft.checks, *_uncounted(job.messages)),
        gate=gate,
        making_usd=draft.usd,
        fallback=draft.fallback,
        seed=job.options.seed,
    )
    return _judged(made, job.options, job.query)


def _uncounted(messages: Sequence[Mapping[str, Any]] | None) -> tuple[Check, ...]:
    """Images and files stay as they are, and no tokenizer of text counts them: that is said."""
    parts = uncounted(messages or ())
    return (Check("parts that are no text", True, f"{parts} stay as they are and are not counted"),) if parts else ()


def _judged(made: Capsule, options: CapsuleOptions, query: str | None) -> Capsule:
    """With what it costs over the horizon, and with the recommendation."""
    cost = _priced(made, options, query)
    return replace(made, cost=cost, recommended=_recommended(made, cost, options))


def _priced(made: Capsule, options: CapsuleOptions, query: str | None) -> CostReport | None:
    if options.horizon is None or made.made == "unchanged":
        return None
    from agentopt.capsules.gating._cost import price_capsule

    prefix = options.prefix or ("static" if query is None else "query")
    making, horizon = made.making_usd or 0.0, options.horizon
    if prefix != "static":  # made anew for every call
        horizon, making = replace(horizon, compress_usd=horizon.compress_usd + making), 0.0
    return price_capsule(
        made.original_tokens,
        made.tokens,
        horizon=horizon,
        output_ratio=1.0 if made.gate is None or made.gate.output_ratio is None else made.gate.output_ratio,
        making_usd=making,
        prefix=prefix,
    )


def _recommended(made: Capsule, cost: CostReport | None, options: CapsuleOptions) -> Recommended:
    gate = made.gate
    if made.made == "unchanged" or (cost is not None and cost.advice == "do not compress"):
        return "original"
    if gate is not None and gate.verdict == "rejected":
        return "original"
    if gate is not None and gate.verdict == "undecided" and options.undecided == "original":
        return "original"
    return "capsule"
