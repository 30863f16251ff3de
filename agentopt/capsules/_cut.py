"""The hard cut: what is rendered is counted, and the least worth per token leaves until it is within the limit.

Selection adds up the counts of units, which is an estimate: tokenizers need not be additive, nor even monotone. So
every draft is rendered and counted as a whole, and only a draft that was counted is given back. The floor is counted
before anything is refused: its count is the `minimum` of `BudgetInfeasible`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules._pieces import Pieces
from agentopt.capsules._render import render
from agentopt.capsules._tokens import Meter
from agentopt.capsules._types import Document

_PIECES_TRIED = 16
"""Units that a last-resort cut looks at, best first."""
_SMALLEST_TRIED = 48
"""Units among which the smallest piece is looked for."""
_REFILLS = 12
_CLOSE = 0.985
"""A draft that uses this share of a long budget is not refilled: each refill counts the whole again."""


@dataclass(frozen=True, slots=True)
class Item:
    """What is chosen or left as one: a unit, or all units of a demonstration."""

    part: int
    units: tuple[int, ...]
    cost: int
    value: float


@dataclass(slots=True)
class Draft:
    """One way to keep and cut."""

    kept: list[list[bool]]
    cuts: list[dict[int, list[int]]]
    """Per document: for a unit that was cut, the atoms that stay."""


@dataclass(slots=True)
class Cutter:
    """Everything that fitting needs, and what it has worked out."""

    documents: Sequence[Document]
    meter: Meter
    costs: Sequence[Sequence[int]]
    """Tokens of each unit on its own."""
    items: Sequence[Item]
    """What may leave; units that must stay are in none."""
    order: Callable[[float], Iterable[int]]
    """Items, the one to take first first, given the tokens there are to spend."""
    pieces: list[Pieces] = field(default_factory=list[Pieces])

    def __post_init__(self) -> None:
        self.pieces = [Pieces(document) for document in self.documents]

    def texts(self, draft: Draft) -> list[str]:
        """The rendered documents."""
        out: list[str] = []
        for part, document in enumerate(self.documents):
            if not (document.units or document.whole):
                out.append("")
                continue
            cuts = {index: self.pieces[part].join(index, atoms) for index, atoms in draft.cuts[part].items()}
            out.append(render(document, draft.kept[part], cuts))
        return out

    def total(self, draft: Draft) -> int:
        """Tokens of the whole."""
        return self.meter.total(self.texts(draft))

    def empty(self) -> Draft:
        """Whole documents and nothing else."""
        kept = [[document.whole] * len(document.units) for document in self.documents]
        return Draft(kept, [{} for _ in self.documents])

    def mandatory(self) -> Draft:
        """Every unit that must stay, whole."""
        return Draft(
            [[document.whole or unit.keep for unit in document.units] for document in self.documents],
            [{} for _ in self.documents],
        )

    def floor(self) -> Draft:
        """What must stay, cut down as far as it may be."""
        draft = self.empty()
        for part, document in enumerate(self.documents):
            if document.whole:
                continue
            for index, unit in enumerate(document.units):
                if unit.keep:
                    self.cut(draft, part, index, self.pieces[part].shortest(index))
        return draft

    def cut(self, draft: Draft, part: int, index: int, atoms: list[int]) -> None:
        """Keep only some atoms of a unit."""
        if len(atoms) == len(self.pieces[part].atoms(index)):
            draft.kept[part][index] = True
            draft.cuts[part].pop(index, None)
        else:
            draft.kept[part][index] = False
            draft.cuts[part][index] = atoms

    def with_items(self, base: Draft, chosen: Iterable[int]) -> Draft:
        """A draft with items added, and the headings that govern them."""
        draft = Draft([list(kept) for kept in base.kept], [dict(cuts) for cuts in base.cuts])
        for number in chosen:
            item = self.items[number]
            kept, units = draft.kept[item.part], self.documents[item.part].units
            for index in item.units:
                kept[index] = True
                above = units[index].heading
                while above >= 0 and not kept[above] and above not in draft.cuts[item.part]:
                    kept[above] = True
                    above = units[above].heading
        return draft

    def infeasible(self, minimum: int, because: str) -> BudgetInfeasible:
        """The error for a limit below `minimum`."""
        return BudgetInfeasible(
            minimum=minimum, limit=self.meter.limit, tokenizer=self.meter.tokenizer.name, because=because
        )


def fit(cutter: Cutter) -> Draft:
    """The best draft found whose rendering is within the limit.

    Raises:
        BudgetInfeasible: what must stay is longer; a call with the error's minimum succeeds.
    """
    base, must = _base(cutter)
    draft = _fill(cutter, base)
    if any(any(kept) for kept in draft.kept) or any(draft.cuts) or must:
        return draft
    return _piece(cutter)


def _base(cutter: Cutter) -> tuple[Draft, bool]:
    """What must stay, as much of it as fits, and whether anything must."""
    full = cutter.mandatory()
    if not any(any(kept) for kept in full.kept):
        return full, False
    totals = [cutter.total(full)]
    if totals[0] <= cutter.meter.limit:
        return full, True
    floor = cutter.floor()
    totals.append(cutter.total(floor))
    if totals[1] <= cutter.meter.limit:
        return _upgrade(cutter, floor, totals[1]), True
    everything = Draft([[True] * len(document.units) for document in cutter.documents], [{} for _ in cutter.documents])
    totals.append(cutter.total(everything))
    if totals[2] <= cutter.meter.limit:
        return everything, True
    raise cutter.infeasible(min(totals), "keep spans and whole parts")


def _upgrade(cutter: Cutter, floor: Draft, total: int) -> Draft:
    """Give back to cut units their clauses, then all of their words, as far as there is room."""
    steps: list[tuple[int, int, list[int]]] = []
    for clauses in (True, False):
        for part, cuts in enumerate(floor.cuts):
            pieces = cutter.pieces[part]
            for index in cuts:
                atoms = pieces.needed_clauses(index) if clauses else list(range(len(pieces.atoms(index))))
                steps.append((part, index, atoms))
    now = {(part, index): pieces for part, cuts in enumerate(floor.cuts) for index, pieces in cuts.items()}
    before = cutter.meter.units([cutter.pieces[part].join(index, atoms) for (part, index), atoms in now.items()])
    spent = dict(zip(now, before, strict=True))
    after = cutter.meter.units([cutter.pieces[part].join(index, atoms) for part, index, atoms in steps])
    taken: list[int] = []
    room = cutter.meter.limit - total
    for number, ((part, index, _), tokens) in enumerate(zip(steps, after, strict=True)):
        more = tokens - spent[part, index]
        if more <= room:
            room -= more
            spent[part, index] = tokens
            taken.append(number)
    while taken:
        draft = Draft([list(kept) for kept in floor.kept], [dict(cuts) for cuts in floor.cuts])
        for number in taken:
            cutter.cut(draft, *steps[number])
        if cutter.total(draft) <= cutter.meter.limit:
            return draft
        del taken[len(taken) // 2 :]
    return floor


def _fill(cutter: Cutter, base: Draft) -> Draft:
    """Add items to a base that fits (or is empty), best first, and count the whole until it fits."""
    limit = cutter.meter.limit
    used = _estimate(cutter, base)
    order = list(cutter.order(limit - used))
    chosen, estimate = _take(cutter, base, order, limit - used)
    best, draft, total = base, base, 0
    force = 1.0
    while chosen:
        draft = cutter.with_items(base, chosen)
        total = cutter.total(draft)
        if total <= limit:
            best = draft
            break
        chosen, estimate = _shed(cutter, chosen, estimate, (total - limit) * force)
        force *= 1.5
    if not chosen:
        draft, total = base, 0
    return _refill(cutter, base, best, chosen, order, total)


def _estimate(cutter: Cutter, draft: Draft) -> float:
    """Tokens of a draft: exact where something stays already, as messages' templates count too."""
    return (
        float(cutter.total(draft))
        if any(any(kept) for kept in draft.kept) or any(draft.cuts)
        else float(cutter.meter.total([""] * len(cutter.documents)))
    )


def _take(cutter: Cutter, base: Draft, order: Sequence[int], room: float) -> tuple[list[int], float]:
    """Items in order, each that still fits by estimate; and the estimate."""
    chosen: list[int] = []
    headed: set[tuple[int, int]] = set()
    spent = 0.0
    for number in order:
        item = cutter.items[number]
        new, cost = _headings(cutter, base, item, headed)
        if spent + item.cost + cost > room:
            continue
        spent += item.cost + cost
        headed.update(new)
        chosen.append(number)
    return chosen, spent


def _headings(
    cutter: Cutter, base: Draft, item: Item, headed: set[tuple[int, int]]
) -> tuple[list[tuple[int, int]], int]:
    """The headings that come with an item and are not there yet, and their tokens."""
    units, kept = cutter.documents[item.part].units, base.kept[item.part]
    new: list[tuple[int, int]] = []
    cost = 0
    for index in item.units:
        above = units[index].heading
        while above >= 0 and not kept[above] and (item.part, above) not in headed and (item.part, above) not in new:
            new.append((item.part, above))
            cost += cutter.costs[item.part][above]
            above = units[above].heading
    return new, cost


def _shed(cutter: Cutter, chosen: list[int], estimate: float, excess: float) -> tuple[list[int], float]:
    """Drop the last taken items until at least `excess` tokens are gone by estimate, and always one."""
    stays = list(chosen)
    gone = 0.0
    while stays and gone < max(excess, 1):
        gone += cutter.items[stays.pop()].cost
    return stays, estimate - gone


def _refill(cutter: Cutter, base: Draft, best: Draft, chosen: list[int], order: Sequence[int], total: int) -> Draft:
    """Use what is left of the limit for further items, in batches that are counted as a whole."""
    limit = cutter.meter.limit
    total = total or int(_estimate(cutter, base))
    tried = set(chosen)
    for _ in range(_REFILLS):
        room = limit - total
        if room <= 0 or (limit > 2000 and total >= limit * _CLOSE):
            break
        batch, _ = _take(cutter, best, [number for number in order if number not in tried], room)
        if not batch:
            break
        draft = cutter.with_items(best, batch)
        count = cutter.total(draft)
        while count > limit and len(batch) > 1:
            tried.update(batch[len(batch) // 2 :])
            batch = batch[: len(batch) // 2]
            draft = cutter.with_items(best, batch)
            count = cutter.total(draft)
        tried.update(batch)
        if count <= limit:
            best, total = draft, count
    return best


def _piece(cutter: Cutter) -> Draft:
    """No whole unit fits: the longest beginning of a good unit, by clauses, then words; at last the smallest piece."""
    ranked = sorted(range(len(cutter.items)), key=lambda number: (-cutter.items[number].value, number))
    for number in ranked[:_PIECES_TRIED]:
        found = _beginning(cutter, cutter.items[number])
        if found is not None:
            return found
    return _smallest(cutter)


def _beginning(cutter: Cutter, item: Item) -> Draft | None:
    """The longest beginning of the item's first unit that fits."""
    index, pieces = item.units[0], cutter.pieces[item.part]
    atoms = pieces.atoms(index)
    if len(item.units) > 1 or len(atoms) < 2:
        return None
    ends: list[int] = []
    for clause in pieces.clauses(index)[:-1]:
        ends.append(clause[-1] + 1)
    for lengths in (ends, list(range(1, len(atoms)))):
        low, high, best = 0, len(lengths), None
        while low < high:
            middle = (low + high) // 2
            draft = cutter.empty()
            cutter.cut(draft, item.part, index, list(range(lengths[middle])))
            if cutter.total(draft) <= cutter.meter.limit:
                low, best = middle + 1, draft
            else:
                high = middle
        if best is not None:
            return best
    return None


def _smallest(cutter: Cutter) -> Draft:
    """The smallest piece of anything; the units looked at do not depend on the limit, so the minimum is achievable."""
    lengths = [
        (unit.end - unit.start, part, index)
        for part, document in enumerate(cutter.documents)
        for index, unit in enumerate(document.units)
    ]
    lowest, smallest = None, None
    for _, part, index in sorted(lengths)[:_SMALLEST_TRIED]:
        draft = cutter.empty()
        cutter.cut(draft, part, index, cutter.pieces[part].shortest(index))
        total = cutter.total(draft)
        if lowest is None or total < lowest:
            lowest, smallest = total, draft
    if smallest is None or lowest is None:
        return cutter.empty()
    if lowest > cutter.meter.limit:
        raise cutter.infeasible(lowest, "no piece that may stand alone is smaller")
    return smallest
