"""All parts of one server, put together from its options; what was opened is closed by the exit stack it is given.

First comes what only reads files (keys, candidates, patterns), then the model and the engine, then what stands between
it and the clients: a mistake is told before it has cost time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from agentopt.errors import RunError, UserError
from agentopt.serving._news import EngineChosen, News
from agentopt.serving._options import UPSTREAM_VARIABLE, ServeOptions
from agentopt.serving._run_folder import RunFolder
from agentopt.store import DEFAULT_PATH

if TYPE_CHECKING:
    from agentopt.serving._catalog import ServedCatalog
    from agentopt.serving.adapters import AdapterRegistry
    from agentopt.serving.admin import Control
    from agentopt.serving.capture import FeedbackStore, Recorder
    from agentopt.serving.engines import ExternalEngine, Prepared, Supervisor
    from agentopt.serving.gateway import Gateway, Limits
    from agentopt.serving.keys import StoredKeyring
    from agentopt.serving.metrics import Meter
    from agentopt.serving.variants import VariantScores, VirtualModel
    from agentopt.store import Store

CACHE = Path(".agentopt") / "cache"
"""Models that were converted or quantized, and hashes of bases: kept for the next start."""
MEGABYTE = 1 << 20
DEFAULT_TOKENIZER = "o200k_base"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server listens, and its folder."""

    folder: RunFolder
    base_url: str
    admin_url: str
    token: str = field(repr=False)
    """Of the admin side."""
    ports: tuple[int, int]
    """The public one and the admin side's."""


@dataclass(frozen=True, slots=True)
class Parts:
    """A server that is put together and not started."""

    engine: Supervisor | ExternalEngine
    catalog: ServedCatalog
    gateway: Gateway
    control: Control
    keyring: StoredKeyring | None
    recorder: Recorder | None
    limits: Limits

    def model(self) -> str:
        """By which clients ask the base; empty while an engine elsewhere has not said it."""
        return next(iter(self.catalog.base), self.engine.abilities.model)

    def state(self) -> dict[str, Any]:
        """Counts since the start."""
        totals = self.control.meter.totals()
        tokens = totals["prompt_tokens"] + totals["completion_tokens"]
        return {**totals, "tokens": tokens, "in_flight": self.gateway.in_flight}


@dataclass(frozen=True, slots=True)
class _Base:
    """The engine, and what is known of its model."""

    engine: Supervisor | ExternalEngine
    name: str | None
    """By which clients ask for it; None: by the name that an engine elsewhere gives it."""
    registry: AdapterRegistry | None = None
    tokenizer: str = DEFAULT_TOKENIZER
    """That counts system prompts: the model's own where it is at hand."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """Puts one server together.

    Attributes:
        options: what is asked for.
        place: where it listens.
        on_event: told of the engine's events too; gets the log when there is one.
        stack: closes what was opened, the engine first.
        stop: ends the server; the admin side may.
    """

    options: ServeOptions
    place: Place
    on_event: News
    stack: AsyncExitStack
    stop: Callable[[], None]

    async def parts(self) -> Parts:
        """All of it.

        Raises:
            UserError: a file, a model, an adapter or an engine that is not as it must be.
        """
        from agentopt.serving.variants import VariantScores, load_candidates

        keyring = await self._keyring()
        virtual = load_candidates(self.options.candidates, warn=self._warn)
        scores = VariantScores(virtual) if virtual else None
        recorder = await self._recorder(scores)
        base = self._external() if self.options.upstream is not None else await self._supervised(virtual)
        return await self._around(base, keyring, recorder, virtual, scores)

    def _warn(self, message: str) -> None:
        from agentopt.serving.engines import Warned

        self.on_event(Warned(message))

    # --- what only reads files ---------------------------------------------------------------------------------------

    async def _keyring(self) -> StoredKeyring | None:
        from agentopt.serving.keys import StoredKeyring

        path = self.options.keys_file
        if path is None:
            return None
        try:
            keyring = StoredKeyring(path, on_warning=self._warn)
        except RunError as error:  # before the start a damaged file is a wrong one
            raise UserError(str(error)) from None
        return await self.stack.enter_async_context(keyring)

    async def _recorder(self, scores: VariantScores | None) -> Recorder | None:
        options = self.options
        if not options.capture:
            return None
        from agentopt.serving.capture import Recorder, Redaction

        loop = asyncio.get_running_loop()

        def warn(message: str) -> None:  # from the thread that writes
            loop.call_soon_threadsafe(self._warn, message)

        about: dict[str, Any] = {"base_url": self.place.base_url, "engine": options.engine}
        if scores is not None:
            about["variants"] = scores.identities()
        recorder = Recorder(
            options.store,
            model=options.name or options.model or "",
            redact=Redaction.of(options.redact),
            sample=options.capture_sample,
            days=options.capture_days,
            about=about,
            on_warning=warn,
            on_news=warn,
        )
        self.stack.push_async_callback(recorder.aclose, 5.0)
        await asyncio.to_thread(recorder.start)  # it waits where another process holds the store
        if scores is not None and recorder.store is not None:
            await asyncio.to_thread(_restore, scores, recorder.store)
        return recorder

    # --- the engine --------------------------------------------------------------------------------------------------

    def _external(self) -> _Base:
        """An engine that somebody else started."""
        from agentopt.serving.engines import ExternalEngine

        options = self.options
        assert options.upstream is not None
        token = os.environ.get(UPSTREAM_VARIABLE)
        self.on_event(EngineChosen("external", options.upstream, options.model or ""))
        engine = ExternalEngine(options.upstream, token, model=options.model, on_event=self.on_event)
        self.stack.push_async_callback(engine.aclose)
        return _Base(engine, options.name or options.model)

    async def _supervised(self, virtual: list[VirtualModel]) -> _Base:
        """Choose, prepare and launch; the adapters of the command line are checked before anything runs."""
        from agentopt.serving.engines import EngineOptions, Supervisor, choose_engine, launch, prepare

        options = self.options
        assert options.model is not None
        for name, path in options.adapter_pairs().items():
            if not Path(path).is_dir():
                found = "a file" if Path(path).exists() else "nothing"
                raise UserError(f"--adapter {name}={path}: expected the folder of an adapter, found {found}.")
        chosen = await asyncio.to_thread(choose_engine, options.model, options.engine)
        self.on_event(EngineChosen(chosen.engine, chosen.why, options.model))
        prepared = await prepare(options.model, chosen, quantize=options.quantize, cache=CACHE, on_event=self.on_event)
        # llama.cpp takes no adapters of ours; asked for one, it says so.
        resident = options.resident if chosen.engine != "embedded" or options.adapters else 0
        launched = launch(
            chosen,
            prepared,
            EngineOptions(resident=resident, max_rank=options.max_rank, extra=options.engine_options),
            name=options.name,
        )
        engine = Supervisor(launched, run_dir=self.place.folder.path, on_event=self.on_event)
        self.stack.push_async_callback(engine.aclose)
        name = options.name or prepared.name
        registry = None
        # The double has no weights that an adapter could be checked against, unless it is given a model's folder.
        known = options.adapters or (prepared.path / "config.json").is_file()
        if resident and launched.abilities.adapters and known:
            taken = {one.name: "a virtual model" for one in virtual} | {name: "the base model"}
            registry = await self._registry(engine, prepared, chosen.python, taken)
        return _Base(engine, name, registry, _tokenizer(options.model, prepared.path))

    async def _registry(
        self, engine: Supervisor, prepared: Prepared, python: str | None, taken: dict[str, str]
    ) -> AdapterRegistry:
        from agentopt.serving.adapters import AdapterRegistry, BaseFacts, BaseHashes, EngineDriver

        options, folder = self.options, self.place.folder
        facts = BaseFacts.of(prepared.path, options.max_rank, origins=[str(options.model), prepared.source])
        registry = AdapterRegistry(
            facts,
            EngineDriver(engine),
            resident=options.resident,
            path=folder.adapters,
            staging=folder.path / "adapters",
            hashes=BaseHashes(facts, CACHE, python=python),
            taken=taken.get,
        )
        self.stack.push_async_callback(registry.aclose)
        for name, path in options.adapter_pairs().items():
            found = await registry.add(name, path)
            for note in found.notes:
                self._warn(f"adapter {name}: {note}")
        for problem in await registry.restore():
            self._warn(problem)
        engine.on_start(registry.after_restart)
        return registry

    # --- what stands between clients and the engine ------------------------------------------------------------------

    async def _around(
        self,
        base: _Base,
        keyring: StoredKeyring | None,
        recorder: Recorder | None,
        virtual: list[VirtualModel],
        scores: VariantScores | None,
    ) -> Parts:
        from agentopt.serving._catalog import ServedCatalog
        from agentopt.serving.admin import Control
        from agentopt.serving.gateway import AccessLog, Gateway
        from agentopt.serving.metrics import Meter

        options, place = self.options, self.place
        catalog = ServedCatalog(
            [] if base.name is None else [base.name],
            base.engine,
            registry=base.registry,
            virtual=virtual,
            shortening=await self._shortening(base.tokenizer),
        )
        meter = Meter(catalog, model=base.name or "")
        log = AccessLog(place.folder.gateway_log, log_text=options.log_text)
        self.on_event.log = log
        self.stack.callback(self.on_event.close)
        observers = [one for one in (meter, log, scores, recorder) if one is not None]
        limits = _limits(options)
        gateway = Gateway(
            base.engine,
            catalog,
            keyring=keyring,
            observers=observers,
            feedback=_feedback(recorder, meter, scores),
            limits=limits,
        )
        control = Control(
            engine=base.engine,
            gateway=gateway,
            catalog=catalog,
            meter=meter,
            token=place.token,
            model=base.name or "",
            adapters=base.registry,
            keyring=keyring,
            capture=recorder,
            scores=None if scores is None else scores.rows,
            host=options.admin_host,
            base_url=place.base_url,
            stop=self.stop,
        )
        meter.bind(control)
        return Parts(base.engine, catalog, gateway, control, keyring, recorder, limits)

    async def _shortening(self, tokenizer: str) -> Any:
        if not self.options.capsule:
            return None
        from agentopt.serving._shortening import Shortening

        options = self.options
        # Prompts go to the disk only where that was asked for.
        store = (options.store or os.environ.get("AGENTOPT_DB") or DEFAULT_PATH) if options.capture else options.store
        made = Shortening(options.capsule_tokens, tokenizer=tokenizer, store=store, on_event=self._warn)
        return await self.stack.enter_async_context(made)


def _limits(options: ServeOptions) -> Limits:
    from agentopt.serving.gateway import Limits

    usual = Limits()
    return Limits(
        body_bytes=round(options.max_body * MEGABYTE),
        total_seconds=options.timeout,
        first_seconds=min(usual.first_seconds, options.timeout),
        cors=options.cors,
        # Without keys only pages of this machine may ask (no name that points to it), unless that is meant.
        hosts=("*",) if options.open else (),
    )


def _feedback(recorder: Recorder | None, meter: Meter, scores: VariantScores | None) -> FeedbackStore | None:
    if recorder is None:
        return None
    from agentopt.serving.capture import FeedbackStore, GivenFeedback

    def count(given: GivenFeedback) -> None:
        meter.feedback(given.asked, given.variant, given.score, before=given.before)
        if scores is not None:
            scores.feedback(given.asked, given.variant, given.score, request=given.request_id)

    return FeedbackStore(recorder, listeners=[count])


def _restore(scores: VariantScores, store: Store) -> None:
    """An A/B test goes on where earlier servers with the same candidates left it."""
    for run in reversed(store.runs()):  # newest first there; of one request the newest score counts
        variants = run.config.get("variants") if run.config.get("kind") == "serve" else None
        if isinstance(variants, dict):
            scores.restore(store.feedback(run_id=run.id), cast("dict[str, str | None]", variants))


def _tokenizer(model: str, path: Path) -> str:
    """The model's own, as capsules name it."""
    if path.is_dir():
        return str(path) if (path / "tokenizer.json").is_file() else DEFAULT_TOKENIZER
    return model if model == "embedded" else str(path)
