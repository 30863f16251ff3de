"""One way to keep and cut: which units stay, with their headings and closing tags, and the texts that gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules._types import Document
from agentopt.capsules.counting._tokens import Meter
from agentopt.capsules.extraction._items import Item
from agentopt.capsules.extraction._pieces import Pieces
from agentopt.capsules.extraction._render import render
from agentopt.capsules.units._units import closing_tags


@dataclass(slots=True)
class Draft:
    """Which units stay whole, and which atoms of those that were cut."""

    kept: list[list[bool]]
    cuts: list[dict[int, list[int]]]

    def copy(self) -> Draft:
        """One that can be changed."""
        return Draft([list(kept) for kept in self.kept], [dict(cuts) for cuts in self.cuts])

    def stays(self, part: int, index: int) -> bool:
        """Whether a unit stays, whole or cut."""
        return self.kept[part][index] or index in self.cuts[part]

    def __bool__(self) -> bool:
        """Whether anything stays."""
        return any(any(kept) for kept in self.kept) or any(self.cuts)


@dataclass(slots=True)
class Cutter:
    """Everything that fitting needs, and what it has worked out."""

    documents: Sequence[Document]
    meter: Meter
    costs: Sequence[Sequence[int]]
    """Tokens of each unit on its own."""
    items: Sequence[Item]
    """What may leave; units that must stay are in none."""
    order: Callable[[float], list[int]]
    """All items, the one to take first first, given the tokens there are to spend."""
    pieces: list[Pieces] = field(default_factory=list[Pieces])
    closing: list[dict[int, int]] = field(default_factory=list[dict[int, int]])

    def __post_init__(self) -> None:
        self.pieces = [Pieces(document) for document in self.documents]
        self.closing = [closing_tags(document) for document in self.documents]

    @property
    def limit(self) -> int:
        """Tokens that the whole may have."""
        return self.meter.limit

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

    def everything(self) -> Draft:
        """All units."""
        return Draft([[True] * len(document.units) for document in self.documents], [{} for _ in self.documents])

    def mandatory(self) -> Draft:
        """Every unit that must stay, whole."""
        draft = self.empty()
        for part, document in enumerate(self.documents):
            if not document.whole:
                draft.kept[part] = [unit.keep for unit in document.units]
                self._close(draft, part)
        return draft

    def tight(self) -> bool:
        """Whether what must stay has to be cut."""
        return any(any(kept) for kept in self.mandatory().kept) and self.total(self.mandatory()) > self.limit

    def floor(self) -> Draft:
        """What must stay, cut down as far as it may be."""
        draft = self.empty()
        for part, document in enumerate(self.documents):
            if document.whole:
                continue
            for index, unit in enumerate(document.units):
                if unit.keep:
                    self.cut(draft, part, index, self.pieces[part].shortest(index))
            self._close(draft, part)
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
        draft = base.copy()
        touched: set[int] = set()
        for number in chosen:
            item = self.items[number]
            touched.add(item.part)
            for index in (*item.units, *self.headings(draft, item)):
                draft.kept[item.part][index] = True
                draft.cuts[item.part].pop(index, None)
        for part in touched:
            self._close(draft, part)
        return draft

    def headings(self, draft: Draft, item: Item) -> list[int]:
        """The headings above an item that are not in the draft."""
        units = self.documents[item.part].units
        out: list[int] = []
        for index in item.units:
            above = units[index].heading
            while above >= 0 and above not in out and not draft.stays(item.part, above):
                out.append(above)
                above = units[above].heading
        return out

    def heading_cost(self, part: int, index: int) -> int:
        """Tokens of a heading and of the tag that closes it."""
        closing = self.closing[part].get(index)
        return self.costs[part][index] + (0 if closing is None else self.costs[part][closing])

    def infeasible(self, minimum: int, because: str) -> BudgetInfeasible:
        """The error for a limit below `minimum`."""
        return BudgetInfeasible(minimum=minimum, limit=self.limit, tokenizer=self.meter.tokenizer.name, because=because)

    def _close(self, draft: Draft, part: int) -> None:
        """A closing tag stays where its opening tag does."""
        for opening, closing in self.closing[part].items():
            if draft.stays(part, opening) and not draft.stays(part, closing):
                draft.kept[part][closing] = True
