"""Documents into adapters: checked, cut into rows, folded side by side, and looked at afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from agentopt.errors import RunError, UserError
from agentopt.weights.fold._adapter import Adapter
from agentopt.weights.fold._contradictions import contradictions
from agentopt.weights.fold._encoding import Encoder, FactRows, grouped

if TYPE_CHECKING:
    from agentopt.weights.fold._folder import Folder


def fold_bases(folder: Folder, bases: Sequence[Sequence[str]], documents: int) -> list[Adapter]:
    """An adapter of each knowledge base; see `Folder.fold_many`."""
    kit, base, meta = folder.kit, folder.base_hash, folder.meta_hash
    prepared = [_prepared(docs, kit.encoder) for docs in bases]
    found: list[Adapter] = []
    for places in grouped([one for _, one, _ in prepared], documents):
        begin, group = places.start, [prepared[place] for place in places]
        rows = [one for _, one, _ in group]
        try:
            state = kit.fold(rows, graph=False)
        except RunError as error:
            counted = f" (the first of these is knowledge base {begin})" if begin else ""
            raise RunError(f"{error}{counted}") from None
        after = kit.recalled(state, rows)
        before = kit.recalled(kit.start(len(rows)), rows)
        for place, (facts, one, notes) in enumerate(group):
            if not all(map(math.isfinite, after[place])):
                raise RunError(
                    f"fold: knowledge base {begin + place} is folded, but its facts' loss is no number; use a "
                    "smaller inner learning rate, or look at its documents."
                )
            adapter = Adapter(
                state={name: tensor[place].detach().clone() for name, tensor in state.items()},
                facts=facts,
                rows=len(one.ids),
                fact_recall=tuple(after[place]),
                recall_before=sum(before[place]) / len(before[place]),
                base_hash=base,
                meta_hash=meta,
                contradictions=contradictions(facts),
                write=folder.write_adapter,
            )
            notes = [*notes, *(f"{one.sentence}; both were folded." for one in adapter.contradictions)]
            adapter.warnings = tuple(notes)
            folder.judge(adapter)
            found.append(adapter)
    return found


def _prepared(docs: Sequence[str], encoder: Encoder) -> tuple[tuple[str, ...], FactRows, list[str]]:
    """Facts without repetitions, their rows, and what there is to say about them."""
    if isinstance(docs, str):
        raise UserError("fold: found one text, expected a list of documents: fold([text]).")
    if not docs:
        raise UserError("fold: found no documents, expected at least one sentence.")
    for place, doc in enumerate(docs):
        if not isinstance(doc, str) or not doc.strip():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(f"fold: document {place} is {doc!r}, expected a text that is not empty.")
    kept = {" ".join(doc.split()): doc.strip() for doc in reversed(docs)}
    facts = tuple(kept[key] for key in dict.fromkeys(" ".join(doc.split()) for doc in docs))
    rows = encoder.facts(facts)
    notes = list(rows.cuts)
    codec = encoder.codec
    again = len(docs) - len(facts)
    if again:
        notes.append(f"{again} repeated {'document was' if again == 1 else 'documents were'} folded once.")
    if codec.multi_task and any(codec.marker in " ".join(fact.split()) for fact in facts):
        notes.append(f"a fact holds {codec.marker!r}, which closes what is recalled; change the format's recall.")
    return facts, rows, notes
