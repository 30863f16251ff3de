"""Forms of knowledge: the same documents in the prompt, as capsules of a few lengths, or folded into an adapter.

The unit is one knowledge parameter. Its menu is short and always the same (it is made of the documents, never of the
form that is active), so after a few rounds everything has been measured. What is kept is decided by score and cost as
for every other proposal: with the score alone a form must score higher; with tokens or cost as further objectives a
cheaper form stays that is not shown to score lower.

Folding happens here, once for the same documents and the same META folder; adapters are kept in `adapters/` beside the
run's store. A fold that the gate refuses is dropped with the reason, and nothing is spent on measuring it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from agentopt.capsules.counting._tokens import TokenBudget
from agentopt.capsules.units._lossless import lossless
from agentopt.capsules.units._units import parse
from agentopt.errors import AgentoptError, UserError
from agentopt.graph import JSONValue, describe_knowledge, knowledge_source, set_value
from agentopt.models import adapter_problem, resolve
from agentopt.optimizers._capsules import TOKENIZER, extracted
from agentopt.optimizers._legal import Proposals, current_value
from agentopt.optimizers._protocol import ProposeContext, Update

if TYPE_CHECKING:
    from agentopt.graph import KnowledgeSource, ParameterSpec

_FILES = ".agentopt"
_MARK = re.compile(r"^(?:[-*+•]|#{1,6}|[0-9]{1,3}[.)])\s+")
"""What stands before a list item or a heading and says nothing."""
_NO_NAME = re.compile(r"[^A-Za-z0-9_.-]+")

Fold = Callable[[Path, Sequence[str], Path], Mapping[str, Any]]
"""(META folder, facts, where the adapter belongs) → what `fold.json` says of it."""


@dataclass(frozen=True, slots=True)
class KnowledgeOptions:
    """Settings of `KnowledgeForms`."""

    ratios: tuple[float, ...] = (0.5, 0.25, 0.75)
    """Lengths of the capsules that are tried, as shares of the documents, in this order."""

    def __post_init__(self) -> None:
        if not all(0 < ratio < 1 for ratio in self.ratios):
            raise UserError(f"KnowledgeOptions: ratios must lie between 0 and 1, found {self.ratios!r}.")


class KnowledgeForms:
    """Proposes the other forms of knowledge parameters.

    Args:
        options: which capsules are tried.
        fold: who folds; a `Folder` of the declared META folder when None.
    """

    name = "knowledge"

    def __init__(self, options: KnowledgeOptions | None = None, *, fold: Fold | None = None) -> None:
        self.options = options or KnowledgeOptions()
        self._fold = fold

    async def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates of one parameter each; [] when every form was tried."""
        proposals = Proposals(context)
        specs = [spec for spec in context.specs.values() if spec.kind == "knowledge"]
        menus = [(spec, await self._menu(context, spec, proposals)) for spec in specs]
        for place in range(max((len(menu) for _, menu in menus), default=0)):
            for spec, menu in menus:
                if place < len(menu):
                    proposals.offer(self._update(context, spec, *menu[place]))
        return proposals.updates

    def _update(self, context: ProposeContext, spec: ParameterSpec, value: dict[str, JSONValue], note: str) -> Update:
        before = describe_knowledge(current_value(context, spec), spec.name)
        why = f"{spec.name}: {before} -> {describe_knowledge(value, spec.name)}{note}"
        return Update((set_value(spec, value),), why, f"{self.name}.{value['form']}")

    async def _menu(
        self, context: ProposeContext, spec: ParameterSpec, proposals: Proposals
    ) -> list[tuple[dict[str, JSONValue], str]]:
        """Every form, with what is to be said about it; the active one is not new, so nobody takes it."""
        source = knowledge_source(spec)
        menu: list[tuple[dict[str, JSONValue], str]] = [
            ({"form": "capsule", "of": source.hash, "text": text}, "") for text in self._capsules(source)
        ]
        if source.folder:
            try:
                menu.insert(0, await self._folded(context, spec, source))
            except AgentoptError as error:  # no META folder, no torch, a refusal: the other forms are there still
                proposals.drop(f"{self.name}.folded", f"{spec.name}: {error}")
        return [*menu, ({"form": "in-context"}, "")]

    def _capsules(self, source: KnowledgeSource) -> list[str]:
        """Shorter texts of whole units, query-free: without what carries nothing, then by worth within each share."""
        edited = lossless(source.text)[0]
        texts = [edited] if len(edited) < len(source.text) else []
        document = parse(edited)
        whole = TokenBudget(1, tokenizer=TOKENIZER).meter().total([source.text])
        for ratio in self.options.ratios:
            found = extracted(document, max(1, round(ratio * whole)), 0)
            if found is not None and found.strip():
                texts.append(found)
        return list(dict.fromkeys(texts))

    async def _folded(
        self, context: ProposeContext, spec: ParameterSpec, source: KnowledgeSource
    ) -> tuple[dict[str, JSONValue], str]:
        """The folded form.

        Raises:
            UserError: no call would use it, the folder is not there, or the gate refuses the adapter.
            RunError: folding broke off.
        """
        _check_reach(context, spec.name)
        meta = _beside(source.folder, Path(spec.file).parent)
        facts = facts_of(source.documents)
        out = _place(context, spec.name, meta, facts)
        card = await anyio.to_thread.run_sync(self._fold or _fold, meta, facts, out)
        if not card["accepted"]:
            raise UserError(f"the documents were folded, and the gate refuses the adapter: {card['reason']}")
        _check_reach(context, spec.name, str(out))
        recall = round(float(card["recall"]), 4)
        said = [str(pair["sentence"]) for pair in card.get("contradictions") or ()]
        note = f"; the documents contradict themselves: {'; '.join(said[:3])}" if said else ""
        value: dict[str, JSONValue] = {
            "form": "folded",
            "of": source.hash,
            "adapter": str(out),
            "base_hash": str(card["base_hash"]),
            "recall": min(1.0, max(0.0, recall)),
        }
        return value, note


def facts_of(documents: Sequence[str]) -> list[str]:
    """What is folded, a row each: a document of one line as it is, a longer one by its sentences and list items."""
    facts: list[str] = []
    for text in documents:
        if "\n" not in text.strip():
            facts.append(text.strip())
            continue
        for unit in parse(text).units:
            facts.append(_MARK.sub("", " ".join(text[unit.start : unit.end].split())))
    return list(dict.fromkeys(fact for fact in facts if fact))


def _fold(meta: Path, facts: Sequence[str], out: Path) -> Mapping[str, Any]:
    from agentopt.weights.fold.client import fold_once

    return fold_once(meta, facts, out)


def _beside(folder: str, place: Path) -> Path:
    """The META folder: in the working directory, else beside the file that declares the parameter."""
    here = Path(folder).expanduser()
    return here if here.exists() or not (place / folder).exists() else place / folder


def _place(context: ProposeContext, name: str, meta: Path, facts: Sequence[str]) -> Path:
    """Where the adapter of these facts and this META folder is kept; its last part is its name on a server."""
    try:
        trained = (meta / "meta.json").read_bytes()
    except OSError:
        raise UserError(f"the META folder {str(meta)!r} has no meta.json; make one with agentopt fold train") from None
    content = hashlib.sha256(trained + b"\0" + json.dumps(list(facts)).encode("ascii")).hexdigest()[:12]
    files = Path(context.files or _FILES).resolve() / "adapters"
    out = files / f"{_NO_NAME.sub('-', name).strip('-.') or 'knowledge'}-{content}"
    with contextlib.suppress(ValueError):
        return out.relative_to(Path.cwd())  # so that the folder may be moved together with its project
    return out


def _check_reach(context: ProposeContext, name: str, adapter: str | None = None) -> None:
    """Refuse what no call of the program could use, as far as the recorded runs and their models tell.

    Raises:
        UserError: no call names the knowledge, or the model that is called takes no adapters.
    """
    calls = 0
    roles: set[str] = set()
    for rollout in context.rollouts:
        for op in rollout.trace.ops if rollout.trace is not None else ():
            if op.kind == "lm":
                calls += 1
                about: Mapping[str, Any] = op.meta or {}
                if name in about.get("knowledge", ()):
                    roles.add(str(about.get("role", "agent")))
    if calls and not roles:
        raise UserError(
            "no language-model call of the program names it, so no model would get the adapter; name it in the call: "
            "complete(..., knowledge=handle)"
        )
    for role in sorted(roles):
        client = resolve(role).client
        if adapter is None and not hasattr(client, "adapter_problem"):
            raise UserError(f"the model {client.name} takes no adapters")
        problem = None if adapter is None else adapter_problem(client, adapter)
        if problem is not None:
            raise UserError(problem)
