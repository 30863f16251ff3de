"""The hard cut: what is rendered is counted, and the least worth per token leaves until it is within the limit.

Selection adds up the counts of units, which is an estimate: tokenizers need not be additive, nor even monotone. So
every draft is rendered and counted as a whole, and only a draft that was counted is given back. The floor is counted
before anything is refused: its count is the `minimum` of `BudgetInfeasible`.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentopt.capsules.extraction._draft import Cutter, Draft
from agentopt.capsules.extraction._items import Item

_PIECES_TRIED = 16
"""Units that a last-resort cut looks at, best first."""
SMALLEST_TRIED = 48
"""Units among which the smallest piece is looked for."""
_REFILLS = 12
_LONG = 4000
_CLOSE = 0.985
"""A draft that uses this share of a limit over _LONG is not refilled: each refill counts the whole again."""
_ROOMY = 0.9
"""A draft that uses less than this share of the limit is filled up with the clauses of one more unit."""


def fit(cutter: Cutter) -> Draft:
    """The best draft found whose rendering is within the limit.

    Raises:
        BudgetInfeasible: what must stay is longer; a call with the error's minimum succeeds.
    """
    base, used = _base(cutter)
    order = cutter.order(cutter.limit - used)
    draft, total = _fill(cutter, base, order, used)
    draft, total = _upgrade(cutter, draft, total)
    if not draft:
        return _piece(cutter, order)
    if total < _ROOMY * cutter.limit:
        return _clauses(cutter, draft, order)
    return draft


def _base(cutter: Cutter) -> tuple[Draft, int]:
    """What must stay, as much of it as fits, and its count."""
    full = cutter.mandatory()
    totals = [cutter.total(full)]
    if not full or totals[0] <= cutter.limit:
        return full, totals[0]
    floor = cutter.floor()
    totals.append(cutter.total(floor))
    if totals[1] <= cutter.limit:
        return floor, totals[1]
    everything = cutter.everything()
    totals.append(cutter.total(everything))
    if totals[2] <= cutter.limit:
        return everything, totals[2]
    raise cutter.infeasible(min(totals), "keep spans and whole parts")


def _fill(cutter: Cutter, base: Draft, order: Sequence[int], used: int) -> tuple[Draft, int]:
    """Add items to a base that fits (or is empty), best first, and count the whole until it fits."""
    chosen = take(cutter, base, order, cutter.limit - used)
    force = 1.0
    while chosen:
        draft = cutter.with_items(base, chosen)
        total = cutter.total(draft)
        if total <= cutter.limit:
            return _refill(cutter, draft, total, chosen, order)
        chosen = _shed(cutter, chosen, (total - cutter.limit) * force)
        force *= 1.5
    return _refill(cutter, base, used, [], order)


def take(cutter: Cutter, base: Draft, order: Sequence[int], room: float) -> list[int]:
    """Items in order, each that still fits by estimate."""
    chosen: list[int] = []
    draft = base.copy()
    groups: set[int] = set()
    for number in order:
        item = cutter.items[number]
        if item.cost > room or item.group in groups:
            continue
        above = cutter.headings(draft, item)
        cost = item.cost + sum(cutter.heading_cost(item.part, index) for index in above)
        if cost > room:
            continue
        room -= cost
        for index in (*item.units, *above):
            draft.kept[item.part][index] = True
        groups.add(item.group)
        chosen.append(number)
    return chosen


def _shed(cutter: Cutter, chosen: Sequence[int], excess: float) -> list[int]:
    """Drop the last taken items until at least `excess` tokens are gone by estimate, and always one."""
    stays = list(chosen)
    gone = 0.0
    while stays and gone < max(excess, 1):
        gone += cutter.items[stays.pop()].cost
    return stays


def _refill(cutter: Cutter, draft: Draft, total: int, chosen: Sequence[int], order: Sequence[int]) -> tuple[Draft, int]:
    """Use what is left of the limit for further items, in batches that are counted as a whole."""
    limit = cutter.limit
    done = {cutter.items[number].group for number in chosen}
    for _ in range(_REFILLS):
        if total >= limit or (limit > _LONG and total >= limit * _CLOSE):
            break
        left = [number for number in order if cutter.items[number].group not in done]
        batch = take(cutter, draft, left, limit - total)
        if not batch:
            break
        while batch:
            longer = cutter.with_items(draft, batch)
            count = cutter.total(longer)
            if count <= limit:
                draft, total = longer, count
                done.update(cutter.items[number].group for number in batch)
                break
            done.update(cutter.items[number].group for number in batch[len(batch) // 2 :])
            batch = batch[: len(batch) // 2]
    return draft, total


def _upgrade(cutter: Cutter, base: Draft, total: int) -> tuple[Draft, int]:
    """Give back to cut units their clauses, then all of their words, as far as there is room."""
    now = [(part, index) for part, cuts in enumerate(base.cuts) for index in cuts]
    steps: list[tuple[int, int, list[int]]] = []
    for clauses in (True, False):
        for part, index in now:
            pieces = cutter.pieces[part]
            atoms = pieces.needed_clauses(index) if clauses else list(range(len(pieces.atoms(index))))
            steps.append((part, index, atoms))
    before = cutter.meter.units([cutter.pieces[part].join(index, base.cuts[part][index]) for part, index in now])
    after = cutter.meter.units([cutter.pieces[part].join(index, atoms) for part, index, atoms in steps])
    spent = dict(zip(now, before, strict=True))
    taken: list[int] = []
    room = cutter.limit - total
    for number, ((part, index, _), tokens) in enumerate(zip(steps, after, strict=True)):
        more = tokens - spent[part, index]
        if more <= room:
            room -= more
            spent[part, index] = tokens
            taken.append(number)
    while taken:
        draft = base.copy()
        for number in taken:
            cutter.cut(draft, *steps[number])
        count = cutter.total(draft)
        if count <= cutter.limit:
            return draft, count
        del taken[len(taken) // 2 :]
    return base, total


def _clauses(cutter: Cutter, draft: Draft, order: Sequence[int]) -> Draft:
    """Whole units leave much of the limit unused: the beginning of one more, up to the end of a clause."""
    looked = 0
    for number in order:
        item = cutter.items[number]
        if any(draft.stays(item.part, index) for index in item.units):
            continue
        found = _beginning(cutter, draft, item, words=False)
        if found is not None:
            return found
        looked += 1
        if looked == _PIECES_TRIED:
            break
    return draft


def _piece(cutter: Cutter, order: Sequence[int]) -> Draft:
    """No whole unit fits: the longest beginning of a good unit, by clauses, then words; at last the smallest piece."""
    for number in order[:_PIECES_TRIED]:
        found = _beginning(cutter, cutter.empty(), cutter.items[number], words=True)
        if found is not None:
            return found
    return _smallest(cutter)


def _beginning(cutter: Cutter, base: Draft, item: Item, *, words: bool) -> Draft | None:
    """The base with the longest beginning of the item's first unit that fits."""
    index, pieces = item.units[0], cutter.pieces[item.part]
    atoms = pieces.atoms(index)
    if len(item.units) > 1 or len(atoms) < 2:
        return None
    ends = [clause[-1] + 1 for clause in pieces.clauses(index)[:-1]]
    for lengths in (ends, list(range(1, len(atoms))) if words else []):
        low, high, best = 0, len(lengths), None
        while low < high:
            middle = (low + high) // 2
            draft = cutter.with_items(base, ())
            for above in cutter.headings(draft, item) if base else ():
                draft.kept[item.part][above] = True
            cutter.cut(draft, item.part, index, list(range(lengths[middle])))
            if cutter.total(draft) <= cutter.limit:
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
    lowest, smallest = None, cutter.empty()
    for _, part, index in sorted(lengths)[:SMALLEST_TRIED]:
        draft = cutter.empty()
        cutter.cut(draft, part, index, cutter.pieces[part].shortest(index))
        total = cutter.total(draft)
        if lowest is None or total < lowest:
            lowest, smallest = total, draft
    if lowest is not None and lowest > cutter.limit:
        raise cutter.infeasible(lowest, "no piece that may stand alone is smaller")
    return smallest
