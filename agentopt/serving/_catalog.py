"""What a model's name means: the base, an adapter, a tuned prompt, or another model of an engine elsewhere."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol

from agentopt.errors import UserError
from agentopt.serving._types import Choice, Engine, Exchange, Key, Listed, Refusal
from agentopt.serving.variants import Rewriting, Variant, VirtualModel, sticky_of

if TYPE_CHECKING:
    from agentopt.serving._shortening import Shortening

VARIANT_HEADER = "X-Agentopt-Variant"
CAPSULE_HEADER = "X-Agentopt-Capsule"
_CONTINUING = ("vllm", "transformers")
_ECHOING = ("embedded",)
"""They repeat in a whole reply the words that it was begun with; what was measured is a reply without them."""
EXTERNAL = "external"
_LISTED = 20  # names in an error message


class Adapters(Protocol):
    """What the catalog asks of the registry of adapters."""

    def names(self) -> Iterable[str]:
        """Those that can be asked for."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def hold(self, name: str) -> AbstractAsyncContextManager[None]:
        """Resident at the engine while it is entered."""
        ...


class ServedCatalog:
    """The models of one endpoint.

    Args:
        base: names by which the base model may be asked, the one to show first; empty: the engine's own name, which an
            engine elsewhere says when it answers.
        engine: its abilities say by what name it knows its base.
        registry: the adapters.
        virtual: the tuned prompts.
        shortening: shortens the clients' long system prompts.
        created: seconds since the epoch that model lists show; now when None.

    Raises:
        UserError: two things have one name, or a variant's adapter is not there.
    """

    def __init__(
        self,
        base: Sequence[str],
        engine: Engine,
        *,
        registry: Adapters | None = None,
        virtual: Sequence[VirtualModel] = (),
        shortening: Shortening | None = None,
        created: float | None = None,
    ) -> None:
        self._base = tuple(dict.fromkeys(base))
        self.virtual = tuple(_settled(model, engine.name) for model in virtual)
        self._engine = engine
        self._registry = registry
        self._virtual = {model.name: model for model in self.virtual}
        self._shortening = shortening
        self._created = int(time.time() if created is None else created)
        self._check()

    @property
    def base(self) -> tuple[str, ...]:
        """Names by which the base model may be asked; none while an engine elsewhere has not said its own."""
        own = self._engine.abilities.model
        return self._base or ((own,) if own and own not in self._virtual else ())

    def _others(self) -> list[Listed]:
        """What an engine elsewhere serves besides; a name that is given here as well means what it means here."""
        others = self._engine.abilities.others
        return [one for one in others if one.name not in self._virtual and one.name not in self.base]

    def _other(self, name: str) -> Listed | None:
        return next((one for one in self._engine.abilities.others if one.name == name), None)

    def _check(self) -> None:
        adapters = set(self._adapters())
        elsewhere = self._engine.name == EXTERNAL  # what it serves is not known yet, and may change
        for model in self.virtual:
            if model.name in self.base or model.name in adapters:
                what = "the base model" if model.name in self.base else "an adapter"
                raise UserError(f"--candidate {model.name}: {what} has this name already; give the tuned one another.")
            for variant in model.variants:
                if variant.adapter is not None and variant.adapter not in adapters and not elsewhere:
                    raise UserError(
                        f"--candidate {model.name}: its variant {variant.label!r} needs the adapter "
                        f"{variant.adapter!r}, which is not served; start with --adapter {variant.adapter}=DIR."
                    )
        if clash := sorted(adapters & set(self.base)):
            raise UserError(f"--adapter {clash[0]}: the base model has this name already; give the adapter another.")

    # ---- names

    def names(self, key: Key | None = None) -> list[str]:
        """Every name that can be asked for, or that this key may ask for."""
        names = [*self.base, *self._virtual, *sorted(self._adapters()), *(one.name for one in self._others())]
        if key is None:
            return names
        return [name for name in names if any(fnmatchcase(name, glob) for glob in key.models)]

    def known(self, name: str) -> bool:
        """Whether there is a model of this name; such names may be labels of metrics."""
        return self.taken(name) is not None

    def taken(self, name: str) -> str | None:
        """What has this name, in words; None when nothing has."""
        if name in self.base:
            return "the base model"
        if name in self._virtual:
            return "a tuned model"
        if self._registry is not None and name in self._registry:
            return "an adapter"
        return "a model of the engine" if self._other(name) is not None else None

    def _adapters(self) -> Iterable[str]:
        return () if self._registry is None else self._registry.names()

    def entries(self) -> list[dict[str, Any]]:
        """OpenAI model objects."""
        base = self.base
        root, context = (base[0] if base else None), self._engine.abilities.context
        made = [self._entry(name, None if name == root else root, context) for name in base]
        made += [self._entry(name, root, context) for name in (*self._virtual, *sorted(self._adapters()))]
        return made + [self._entry(one.name, self._shown(one.parent), one.context) for one in self._others()]

    def _shown(self, parent: str | None) -> str | None:
        """The name that the engine's base has here."""
        return self.base[0] if parent is not None and parent == self._engine.abilities.model else parent

    def _entry(self, name: str, parent: str | None, context: int | None) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "agentopt",
            "root": parent or name,
            "parent": parent,
        }
        return entry if context is None else entry | {"max_model_len": context}

    # ---- one request

    def choose(self, exchange: Exchange) -> Choice:
        """What the exchange's name means; a virtual model's variant depends on who asks alone.

        Raises:
            Refusal: 404, with the names that there are.
        """
        asked, model = exchange.asked, self._engine.abilities.model
        if not asked or asked in self.base:
            return self._choice(exchange, Choice(model))
        if asked in self._virtual:
            return self._tuned(exchange, self._virtual[asked], model)
        if self._registry is not None and asked in self._registry:
            return self._choice(exchange, Choice(asked, adapter=asked))
        if self._other(asked) is not None:
            return self._choice(exchange, Choice(asked))
        raise self._unknown(exchange)

    def _tuned(self, exchange: Exchange, virtual: VirtualModel, model: str) -> Choice:
        variant: Variant = virtual.pick(sticky_of(exchange))
        exchange.notes[VARIANT_HEADER] = f"{virtual.name}/{variant.label}"
        made = variant.rewrite
        echoes = self._engine.name in _ECHOING
        finish = made.finish if echoes and isinstance(made, Rewriting) and made.parts.cue else None
        choice = Choice(variant.adapter or model, variant.adapter, variant.label, made or _plain, finish)
        return self._choice(exchange, choice)

    def _choice(self, exchange: Exchange, choice: Choice) -> Choice:
        """With the client's system prompt shortened before anything else is done with the request."""
        shortening, rewrite = self._shortening, choice.rewrite
        if shortening is None:
            return choice

        def both(route: str, body: dict[str, Any]) -> dict[str, Any]:
            shorter = shortening.apply(route, body, lambda note: exchange.notes.update({CAPSULE_HEADER: note}))
            return shorter if rewrite is None else rewrite(route, shorter)

        return replace(choice, rewrite=both)

    def _unknown(self, exchange: Exchange) -> Refusal:
        names = self.names(exchange.key)
        there = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        return Refusal(
            404,
            f"There is no model {exchange.asked[:128]!r} here; there are: {there or 'none for this key'}.",
            code="model_not_found",
            param="model",
        )

    def hold(self, choice: Choice) -> AbstractAsyncContextManager[None]:
        """Entered around the exchange: the adapter is resident.

        Raises:
            Refusal: (on entering) it cannot be loaded.
        """
        if choice.adapter is None or self._registry is None:
            return _nothing()
        return self._registry.hold(choice.adapter)


def _settled(model: VirtualModel, engine: str) -> VirtualModel:
    """The model, where nobody said otherwise asking an engine to go on with a cue only if it understands that.

    llama.cpp goes on by itself, and strict servers refuse fields that they do not know.
    """
    variants: list[Variant] = []
    for variant in model.variants:
        made = variant.rewrite
        if isinstance(made, Rewriting) and made.continues is None:
            made = replace(made, continues=engine in _CONTINUING)
        variants.append(replace(variant, rewrite=made))
    return VirtualModel(model.name, tuple(variants))


def _plain(route: str, body: dict[str, Any]) -> dict[str, Any]:
    """The plain base as a variant: a field that is meant for the other variants goes no further."""
    return {name: value for name, value in body.items() if name != "agentopt"}


@asynccontextmanager
async def _nothing() -> AsyncGenerator[None]:
    yield
