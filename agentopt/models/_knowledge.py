"""`knowledge=` of a call: what of it stands in the messages, and which adapter the request asks for.

The text of an in-context or capsule form stands before the system text, in the same turn; without a system text it is
a system turn of its own. A text that the messages hold already (the program put `{handbook}` into its prompt) is not
placed twice. A folded form puts nothing into the messages: the request names its adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, Final, cast

from agentopt import graph
from agentopt.errors import UserError
from agentopt.models._protocol import Client, Message

_CARD: Final = "fold.json"
"""What folding writes beside an adapter: its facts, and the hashes of base and META."""


@dataclass(slots=True)
class Named:
    """The knowledge that a call names, resolved."""

    texts: list[str] = field(default_factory=list[str])
    specs: list[graph.ParameterSpec] = field(default_factory=list[graph.ParameterSpec])
    adapter: str | None = None
    folded: str = ""
    """The parameter whose adapter it is."""

    @property
    def names(self) -> list[str]:
        """The parameters' names."""
        return [spec.name for spec in self.specs]


def named_knowledge(given: Any) -> Named:
    """What `knowledge=` asks for; the reads are recorded by the `LM`.

    Raises:
        UserError: something else than knowledge handles was given, a value does not fit its documents, or two of them
            are folded (a request has one adapter).
    """
    found = Named()
    handles: list[Any] = []
    if given is not None:
        handles = list(cast("Sequence[Any]", given)) if isinstance(given, (list, tuple)) else [given]
    for handle in handles:
        if not isinstance(handle, graph.Knowledge):
            raise UserError(
                f"knowledge=: expected what ao.knowledge(...) gave, or a list of such, found {type(handle).__name__}"
            )
        value = graph.checked_knowledge(handle.spec, graph.peek_value(handle.spec))
        found.specs.append(handle.spec)
        if value["form"] != "folded":
            found.texts.append(graph.knowledge_text(handle.spec, cast("graph.JSONValue", value)))
        elif found.adapter is None:
            found.adapter, found.folded = str(value["adapter"]), handle.name
        else:
            raise UserError(
                f"knowledge=: {found.folded!r} and {handle.name!r} are both folded, and a request names one adapter; "
                "give one of them another form, or declare the documents as one knowledge"
            )
    return found


def placed(turns: list[Message], texts: Sequence[str], system: int | None) -> list[Message]:
    """The turns with the texts that they do not hold yet before the system text, which stands in turn `system`."""
    held = "\n".join(_shown(turn) for turn in turns)
    missing = "\n\n".join(text for text in texts if text not in held)
    if not missing:
        return turns
    if system is None:
        return [{"role": "system", "content": missing}, *turns]
    turn = turns[system]
    content = turn.get("content")
    if isinstance(content, list):
        joined: Any = [{"type": "text", "text": missing}, *cast("list[Any]", content)]
    else:
        joined = f"{missing}\n\n{content}" if content else missing
    return [*turns[:system], {**turn, "content": joined}, *turns[system + 1 :]]


def _shown(turn: Message) -> str:
    content = turn.get("content")
    if isinstance(content, str):
        return content
    parts = cast("list[Any]", content) if isinstance(content, list) else []
    texts = (cast("dict[str, Any]", part).get("text") for part in parts if isinstance(part, dict))
    return "\n".join(text for text in texts if isinstance(text, str))


def adapter_name(adapter: str) -> str:
    """The name that a server knows an adapter by: a name as it is, of a folder its last part."""
    return PurePath(adapter).name or adapter


def adapter_version(adapter: str | None) -> str:
    """A hash that changes when the adapter's folder is written again with other facts; "" where no folder is here.

    A folder keeps its name when its documents are folded anew, and cached replies must not outlive them.
    """
    if adapter is None:
        return ""
    try:
        card = Path(adapter).expanduser() / _CARD
        about = card.stat()
        return _card_hash(str(card.resolve()), about.st_mtime_ns, about.st_size)
    except (OSError, ValueError):
        return ""


@lru_cache(maxsize=256)
def _card_hash(card: str, _written: int, _size: int) -> str:
    return hashlib.sha256(Path(card).read_bytes()).hexdigest()[:16]


def adapter_problem(client: Client, adapter: str) -> str | None:
    """Why the client cannot answer with the adapter, as a clause; None when it can."""
    told = getattr(client, "adapter_problem", None)
    return f"the model {client.name} takes no adapters" if told is None else told(adapter)


def check_adapter(client: Client, adapter: str | None, parameter: str = "") -> None:
    """Refuse a request with an adapter that the client cannot use.

    Raises:
        UserError: naming the parameter, where it is known, and what can be done.
    """
    problem = None if adapter is None else adapter_problem(client, adapter)
    if problem is not None:
        whose = f"parameter {parameter!r} is" if parameter else "a knowledge is"
        raise UserError(
            f"{problem}, and {whose} folded into {adapter}; use a model that has this adapter (fold:META, or a server "
            'of OpenAI\'s form that was started with it), or set the parameter to {"form": "in-context"}'
        )
