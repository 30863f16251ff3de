"""Optimizers that share the work between optimizers: `Auto` decides by itself, `Together` takes turns.

The unit is one `propose` call, whose wanted proposals are dealt out to arms. `Auto` looks at what there is to tune, how
much data there is, how strong the optimizer's model is by its name, and which arm's proposals were accepted so far
(Thompson sampling on acceptance, seeded). No arm's failure hurts the others: it is recorded, and its share is dealt out
again.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from agentopt.evaluation import seeded
from agentopt.graph import SetText, set_value
from agentopt.models import BudgetExhausted, LMError
from agentopt.optimizers._capsules import KINDS as CAPSULE_KINDS
from agentopt.optimizers._capsules import SHORTER, Capsules
from agentopt.optimizers._code import CodeRepair
from agentopt.optimizers._demonstrations import Demonstrations
from agentopt.optimizers._instructions import Instructions
from agentopt.optimizers._knowledge import KnowledgeForms
from agentopt.optimizers._legal import Proposals, current_value, merged
from agentopt.optimizers._memory import gain
from agentopt.optimizers._optoprime import EDITABLE, OptoPrime
from agentopt.optimizers._playbook import Playbook, PlaybookOptions
from agentopt.optimizers._protocol import DroppedEdit, Optimizer, ProposeContext, Update
from agentopt.optimizers._tpe import Tpe, available, measured_settings
from agentopt.optimizers._values import KINDS, Values, neighbours
from agentopt.optimizers.symbolic import Symbolic

if TYPE_CHECKING:
    from collections.abc import Mapping

_SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", re.IGNORECASE)
_WEAK_BELOW = 4e9
"""Models with fewer parameters rarely write usable proposals (reports of 1.5B to 3B reflectors emitting junk)."""
_SMALL_DATA = 30
_TPE_AFTER = 8
"""Measured settings of numbers and choices from which TPE takes over from neighbours and ends of ranges."""
_WITH_SETTING = 0.3
"""Share of the joint updates that change a number or a choice besides the texts and demonstrations."""


def is_weak(model: str) -> bool:
    """Whether a model's name says that it is too small to write proposals; an unknown name counts as strong."""
    sizes = [float(number) * (1e9 if unit in "bB" else 1e6) for number, unit in _SIZE.findall(model)]
    if sizes:
        return max(sizes) < _WEAK_BELOW
    return model.startswith("embedded")


def model_name(context: ProposeContext) -> str:
    """The optimizer model's name: as given by the search loop, else the client's own."""
    if context.optimizer_model or context.lm is None:
        return context.optimizer_model
    client = getattr(context.lm, "client", context.lm)
    return str(getattr(client, "name", ""))


class Named:
    """Gives a name to an object that has only `propose`."""

    def __init__(self, inner: Optimizer, name: str) -> None:
        self.name = name
        self._inner = inner

    def propose(self, context: ProposeContext) -> list[Update] | Awaitable[list[Update]]:
        """What the object proposes."""
        return self._inner.propose(context)


async def call(optimizer: Optimizer, context: ProposeContext) -> list[Update]:
    """`optimizer.propose`, whether it is sync or async."""
    result = optimizer.propose(context)
    return await result if inspect.isawaitable(result) else result


class Together:
    """Several optimizers; the wanted proposals are dealt out evenly, starting with another one each iteration."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.name = "+".join(part.name for part in parts)
        self._parts = tuple(parts)

    async def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates.

        Raises:
            LMError: every part that proposed nothing failed, and nothing was proposed.
        """
        deal = _Deal(context)
        size = len(self._parts)
        order = [self._parts[(context.iteration + turn) % size] for turn in range(size)]
        shares = [context.count // size + (1 if turn < context.count % size else 0) for turn in range(size)]
        for part, share in zip(order, shares, strict=True):
            await deal.ask(part, share)
        for part in order:
            await deal.ask(part, deal.missing)
        return deal.finish()


class _Deal:
    """Collects one round's updates from several optimizers."""

    def __init__(self, context: ProposeContext) -> None:
        self._context = context
        self.proposals = Proposals(context)
        self.failed: list[str] = []
        self._error: LMError | None = None

    @property
    def missing(self) -> int:
        return self._context.count - len(self.proposals.updates)

    async def ask(self, part: Optimizer, count: int, source: str = "") -> int:
        """Take up to `count` updates from `part` and return how many; a model that failed is not asked again."""
        if count <= 0 or part.name in self.failed or self.missing <= 0:
            return 0
        context = replace(self._context, count=count, taken=frozenset(self.proposals.seen))
        try:
            updates = await call(part, context)
        except BudgetExhausted:
            raise
        except LMError as error:
            self.failed.append(part.name)
            self._error = error
            self._context.dropped.append(DroppedEdit(part.name, f"the language model failed: {error}"))
            return 0
        taken = 0
        for update in updates:
            if taken >= count:
                break
            taken += self.proposals.offer(replace(update, source=source or update.source))
        return taken

    def finish(self) -> list[Update]:
        """The updates; the last failure when there are none because of it."""
        if not self.proposals.updates and self._error is not None:
            raise self._error
        return self.proposals.updates


class Joint:
    """Several parameters in one update: texts from frames, a demonstration set and, now and then, a number or choice.

    A prompt and the demonstrations (or an instruction and the beginning of the answer, or both and a switch that
    corrects for what they do) can help together where none helps alone, and a race that changes one at a time never
    sees it.
    """

    name = "joint"

    def __init__(self, instructions: Instructions, demonstrations: Demonstrations) -> None:
        self._instructions = instructions
        self._demonstrations = demonstrations

    async def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates of two or more parameters; the best of each come together first."""
        wanted = 2 * context.count + len(context.taken)
        queues: list[list[Update]] = []
        for spec in context.specs.values():
            if spec.kind == "prompt":
                texts = self._instructions.free_texts(context, spec, wanted)
                queues.append([Update((SetText(spec.name, text),), why) for text, why in texts])
        sets = self._demonstrations.propose(replace(context, count=wanted, taken=frozenset()))
        queues.append(sets)
        queues = [queue for queue in queues if queue]
        settings = _settings(context)
        proposals = Proposals(context)
        for place in range(wanted if queues and len(queues) + len(settings) > 1 else 0):
            rng = seeded("joint", context.seed, context.iteration, context.parent.hash, place)
            chosen = rng.sample(range(len(queues)), rng.randint(min(2, len(queues)), len(queues)))
            parts = [_pick(queues[at], place, rng) for at in sorted(chosen)]
            if settings and (len(parts) < 2 or rng.random() < _WITH_SETTING):
                parts.append(_pick(rng.choice(settings), place, rng))
            update = merged(parts, self.name)
            if update is not None:
                proposals.offer(update)
        return proposals.updates


def _settings(context: ProposeContext) -> list[list[Update]]:
    """For each number and choice the values near the parent's, one update each, nearest first."""
    queues: list[list[Update]] = []
    for spec in context.specs.values():
        if spec.kind in KINDS:
            values = neighbours(spec, current_value(context, spec))
            queues.append([Update((set_value(spec, value),), f"{spec.name} = {value!r}") for value in values])
    return [queue for queue in queues if queue]


def _pick(queue: Sequence[Update], place: int, rng: random.Random) -> Update:
    """The proposal at `place`; of a short list one from near its front, where the better ones stand."""
    return queue[place % len(queue)] if len(queue) > 24 else queue[int(len(queue) * rng.random() ** 2)]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to propose, and how promising it is before anything was measured (pseudo-counts of a Beta)."""

    optimizer: Optimizer
    good: float
    bad: float


class Auto:
    """The default optimizer: a portfolio that needs no setting.

    Args:
        template: a file that overrides fragments of the shipped meta-prompts and frames.
        max_written: proposals one round may ask a language model for.

    Raises:
        UserError: the template file cannot be used.
    """

    name = "auto"

    def __init__(self, *, template: str | Path | None = None, max_written: int = 4) -> None:
        self._free = Instructions(lm=False, template=template)
        self._written = Instructions(lm=True, template=template, max_calls=max_written)
        self._optoprime = OptoPrime(template=template)
        self._demonstrations = Demonstrations()
        self._joint = Joint(self._free, self._demonstrations)
        self._playbook = Playbook(PlaybookOptions(max_calls=max_written), template=template)
        self._code = CodeRepair(template=template)
        self._symbolic = Symbolic(template=template)
        self._values = Values()
        self._capsules = Capsules()
        self._knowledge = KnowledgeForms()
        self._tpe = Tpe() if available() else None
        self._max_written = max_written
        self._asking: tuple[Optimizer, ...] = (
            self._written,
            self._optoprime,
            self._playbook,
            self._code,
            self._symbolic,
        )

    def arms(self, context: ProposeContext) -> list[Arm]:
        """The ways to propose that fit this program, data and model, with their prior odds."""
        kinds = {spec.kind for spec in context.specs.values()}
        weak = context.lm is None or is_weak(model_name(context))
        arms = [*self._free_arms(context, weak=weak), *self._asking_arms(context, weak=weak)]
        if kinds & KINDS:
            arms.append(Arm(self._setting(context), 1.5, 4.0))
        if kinds & CAPSULE_KINDS and SHORTER & set(context.objectives):
            arms.append(Arm(self._capsules, 3.0, 3.0))
        if "knowledge" in kinds:
            arms.append(Arm(self._knowledge, 3.0, 3.0))
        return arms

    def _free_arms(self, context: ProposeContext, *, weak: bool) -> list[Arm]:
        """Arms that ask no model."""
        kinds = [spec.kind for spec in context.specs.values()]
        plenty = len(context.train) >= _SMALL_DATA
        arms: list[Arm] = []
        prompts = kinds.count("prompt")
        if prompts:
            arms.append(Arm(self._free, 3.0, 3.0) if weak else Arm(self._free, 1.5, 4.0))
        shown = Arm(self._demonstrations, (3.0 if weak else 2.0) if plenty else 1.0, 3.0 if weak else 4.0)
        if "demos" in kinds:
            arms.append(shown)
        texts = prompts + ("demos" in kinds)
        if texts and texts + len(KINDS & set(kinds)) > 1:
            arms.append(replace(shown, optimizer=self._joint))
        return arms

    def _asking_arms(self, context: ProposeContext, *, weak: bool) -> list[Arm]:
        """Arms that ask the optimizer's model; a weak one only where nothing else could change a parameter."""
        kinds = {spec.kind for spec in context.specs.values()}
        if context.lm is None or (weak and "prompt" in kinds):
            return []
        fits: list[tuple[Optimizer, bool, float]] = [
            (self._written, "prompt" in kinds, 3.0),
            (self._optoprime, bool(kinds & EDITABLE), 4.0),
            (self._playbook, "principles" in kinds, 4.0),
            (self._code, "code" in kinds, 4.0),
            (self._symbolic, bool(kinds & {"tools", "pipeline"}), 4.0),
        ]
        if weak:
            fits[1] = (self._optoprime, bool(kinds & (EDITABLE - KINDS)), 4.0)
        return [Arm(part, 1.0, 4.0) if weak else Arm(part, good, 3.0) for part, fit, good in fits if fit]

    def _setting(self, context: ProposeContext) -> Optimizer:
        """Who proposes numbers and choices: TPE once enough of them were measured (its updates say so)."""
        enough = self._tpe is not None and measured_settings(context) >= _TPE_AFTER
        return self._tpe if self._tpe is not None and enough else self._values

    def shares(self, context: ProposeContext) -> list[tuple[Optimizer, int]]:
        """How many proposals each arm is asked for. A pure function of the context."""
        arms = self.arms(context)
        if not arms:
            return []
        results = _results(context)
        counts = dict.fromkeys(range(len(arms)), 0)
        for place in range(context.count):
            rng = seeded("auto", context.seed, context.iteration, context.parent.hash, place)

            draws: list[float] = []
            for arm in arms:
                good, bad = results.get(_arm_of(arm.optimizer.name), (0.0, 0.0))
                draws.append(rng.betavariate(arm.good + good, arm.bad + bad))
            counts[draws.index(max(draws))] += 1
        self._spread(context, arms, counts)
        return [(arm.optimizer, counts[at]) for at, arm in enumerate(arms)]

    def _spread(self, context: ProposeContext, arms: Sequence[Arm], counts: dict[int, int]) -> None:
        """A round of several proposals gives every arm one; asking a model is limited; nothing stays untouched."""
        by_share = sorted(counts, key=lambda at: -counts[at])
        for at, arm in enumerate(arms):
            written = arm.optimizer in self._asking
            if written and counts[at] > self._max_written:
                rest = counts[at] - self._max_written
                counts[at] = self._max_written
                other = next((o for o in by_share if arms[o].optimizer not in self._asking), None)
                if other is not None:
                    counts[other] += rest
        if context.count >= 2 * len(arms):
            for at in counts:
                if counts[at] == 0:
                    counts[max(counts, key=lambda other: counts[other])] -= 1
                    counts[at] = 1
        elif self._values_due(context, arms):
            at = next(at for at, arm in enumerate(arms) if _arm_of(arm.optimizer.name) == Values.name)
            if counts[at] == 0 and context.count:
                counts[max(counts, key=lambda other: counts[other])] -= 1
                counts[at] = 1

    def _values_due(self, context: ProposeContext, arms: Sequence[Arm]) -> bool:
        touched = {edit.name for past in context.history for edit in past.update.edits}
        waiting = any(spec.kind in KINDS and spec.name not in touched for spec in context.specs.values())
        return (
            waiting and context.iteration % 3 == 2 and any(_arm_of(arm.optimizer.name) == Values.name for arm in arms)
        )

    async def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates, arms taking turns.

        Raises:
            LMError: a language model failed and no other arm had anything to propose.
        """
        deal = _Deal(context)
        shares = self.shares(context)
        for optimizer, share in shares:
            await deal.ask(optimizer, share)
        cheap = [optimizer for optimizer, _ in shares if optimizer not in self._asking]
        for optimizer in cheap:
            await deal.ask(optimizer, deal.missing)
        if not deal.proposals.updates:
            for optimizer, _ in shares:
                await deal.ask(optimizer, min(deal.missing, self._max_written))
        return deal.finish()


def _results(context: ProposeContext) -> Mapping[str, tuple[float, float]]:
    """Per source: how much of its past counts as success and how much as failure.

    An accepted proposal is a success; a rejected one that beat its parent on the minibatch is half of one.
    """
    found: dict[str, tuple[float, float]] = {}
    for past in context.history:
        better = gain(past)
        good = 1.0 if past.accepted else (0.5 if better is not None and better > 0 else 0.0)
        source = _arm_of(past.update.source)
        before = found.get(source, (0.0, 0.0))
        found[source] = (before[0] + good, before[1] + 1.0 - good)
    return found


def _arm_of(source: str) -> str:
    """The arm that a source's results count for: its part before the dot; TPE goes on with what neighbours began."""
    arm = source.partition(".")[0]
    return Values.name if arm == Tpe.name else arm
