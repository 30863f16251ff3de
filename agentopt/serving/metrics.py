"""What Prometheus is told: counted as exchanges end, or read from the parts of the server when it asks.

The number of series stays bounded whatever clients send: a model's name is a label only when the catalog has it, a key
is its id, and each label takes a limited number of values in the life of the server; what comes later is "other".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentopt.serving._exposition import PREFIX, merged
from agentopt.serving._types import FORWARDED, Exchange, Phase

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram

    from agentopt.serving._types import Catalog
    from agentopt.serving.admin import Control

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"
LABELS = {"model": 1000, "variant": 500, "key": 1000, "code": 100}
"""Different values of a label, at most."""
TOTALS = ("requests", "errors", "refused", "prompt_tokens", "completion_tokens", "feedback")
REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
FIRST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Meter:
    """Counts exchanges, refusals and feedback; an `Observer`. Its methods are called on one event loop.

    Args:
        catalog: whose names may be labels; None: all names, up to the bound.
        model: the label of requests that name no model.
    """

    def __init__(self, catalog: Catalog | None = None, *, model: str = "") -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._catalog, self._model = catalog, model
        self._seen: dict[str, set[str]] = {label: set() for label in LABELS}
        self.registry = CollectorRegistry(auto_describe=False)
        self._state: _State | None = None
        self._kinds: dict[tuple[str, str, str, int], _Series] = {}
        self._numbers: dict[str, int] = {name: 0 for name in TOTALS}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, ("route", "model"), buckets=buckets, registry=self.registry)

        self._requests = counter("requests", "Requests that are over.", "route", "model", "variant", "status")
        self._seconds = histogram("request_seconds", "From a request's head to its end.", REQUEST_SECONDS)
        self._first = histogram("first_byte_seconds", "From a request's head to its reply's.", FIRST_SECONDS)
        self._tokens = counter("tokens", "As the engine counted them.", "kind", "model", "variant")
        self._refused = counter("refused", "Requests that were answered with an error of ours.", "code")
        self._key_requests = counter("key_requests", "Requests of a key, refused ones too.", "key")
        self._key_tokens = counter("key_tokens", "Prompt and completion tokens of a key.", "key")
        self._feedback = counter("feedback", "Feedback by its score's sign.", "model", "variant", "sign")
        self._score = Gauge(
            PREFIX + "feedback_score_sum",
            "Sum of the scores, each in [-1, 1].",
            ("model", "variant"),
            registry=self.registry,
        )

    def bind(self, control: Control) -> None:
        """From now on also show the state of these parts, read when Prometheus asks."""
        self._catalog = self._catalog or control.catalog
        self._model = self._model or control.model
        if self._state is not None:
            self.registry.unregister(self._state)
        self._state = _State(control)
        self.registry.register(self._state)

    # ---- what is told to us

    def wants_reply(self, exchange: Exchange) -> bool:
        """Never: nothing here depends on what was said."""
        return False

    def ended(self, exchange: Exchange, reply: bytes | None) -> None:
        """Count one exchange."""
        series = self._series(exchange)
        series.requests.inc()
        self._numbers["requests"] += 1
        self._numbers["errors"] += exchange.status >= 500
        if exchange.ended is not None:
            series.seconds.observe(max(0.0, exchange.ended - exchange.began))
        if exchange.first is not None:
            series.first.observe(max(0.0, exchange.first - exchange.began))
        use, tokens = exchange.use, 0
        if use is not None:
            prompt, completion, tokens = max(0, use.prompt), max(0, use.completion), max(0, use.total)
            series.prompt.inc(prompt)
            series.completion.inc(completion)
            series.cached.inc(max(0, use.cached))
            self._numbers["prompt_tokens"] += prompt
            self._numbers["completion_tokens"] += completion
        if exchange.key is not None:
            key = self._bounded("key", exchange.key.id)
            self._key_requests.labels(key).inc()
            self._key_tokens.labels(key).inc(tokens)

    def refused(self, code: str | None) -> None:
        """A request was answered with an error of ours; `code` as in the error object, or the status."""
        self._refused.labels(self._bounded("code", code or OTHER)).inc()
        self._numbers["refused"] += 1

    def feedback(self, model: str, variant: str | None, score: float | None, *, before: float | None = None) -> None:
        """Feedback was stored; `before` is the same request's earlier score that this one replaces."""
        labels = self._known(model), self._bounded("variant", variant or "")
        sign = "none" if score is None else "up" if score > 0 else "down" if score < 0 else "zero"
        self._feedback.labels(*labels, sign).inc()
        self._numbers["feedback"] += 1
        if score is not None:
            self._score.labels(*labels).inc(score - (before or 0.0))

    # ---- what others ask

    def totals(self) -> dict[str, int]:
        """Sums since the start: requests, errors (5xx), refused, prompt_tokens, completion_tokens, feedback."""
        return dict(self._numbers)

    def text(self, engine: str = "") -> bytes:
        """All metrics, with the engine's own behind ours. May take some milliseconds: call it in a thread."""
        from prometheus_client import generate_latest

        return merged(generate_latest(self.registry).decode(), engine).encode()

    # ---- labels

    def _series(self, exchange: Exchange) -> _Series:
        """What this kind of exchange counts in; looked up once for each kind, which takes most of the time."""
        route = exchange.route if exchange.route in FORWARDED else OTHER
        model, variant = self._model_label(exchange), self._bounded("variant", exchange.variant or "")
        kind = (route, model, variant, exchange.status)
        found = self._kinds.get(kind)
        if found is None:
            found = self._kinds[kind] = _Series(
                self._requests.labels(route, model, variant, str(exchange.status)),
                self._seconds.labels(route, model),
                self._first.labels(route, model),
                *(self._tokens.labels(name, model, variant) for name in ("prompt", "completion", "cached")),
            )
        return found

    def _model_label(self, exchange: Exchange) -> str:
        if exchange.asked:
            return self._known(exchange.asked)
        return self._bounded("model", self._model or exchange.model) if exchange.model else OTHER

    def _known(self, name: str) -> str:
        if name not in self._seen["model"] and self._catalog is not None and not _has(self._catalog, name):
            return OTHER
        return self._bounded("model", name)

    def _bounded(self, label: str, value: str) -> str:
        seen = self._seen[label]
        if value not in seen:
            if len(seen) >= LABELS[label]:
                return OTHER
            seen.add(value)
        return value


def _has(catalog: Catalog, name: str) -> bool:
    known = getattr(catalog, "known", None)  # ours answers without making a list of all
    return bool(known(name)) if known else any(entry.get("id") == name for entry in catalog.entries())


@dataclass(frozen=True, slots=True)
class _Series:
    """One exchange's counters and histograms, with their labels."""

    requests: Counter
    seconds: Histogram
    first: Histogram
    prompt: Counter
    completion: Counter
    cached: Counter


class _State:
    """The parts' own numbers, read at each scrape. A part that is not there has no metrics."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def collect(self) -> Iterator[Any]:
        """One family after the other, as prometheus_client wants them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for kind, name, text, value in self._values():
            family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            yield family(PREFIX + name, text, value=float(value))
        capture = self._control.capture
        if capture is not None:
            drops = CounterMetricFamily(PREFIX + "capture_dropped", "Exchanges not captured.", labels=["reason"])
            for reason, number in dict(capture.drops).items():
                drops.add_metric([str(reason)], float(number))
            yield drops

    def _values(self) -> Iterable[tuple[str, str, str, float]]:
        control = self._control
        engine, adapters, keys, capture = control.engine, control.adapters, control.keyring, control.capture
        yield "gauge", "start_time_seconds", "When the server was started, since the epoch.", control.started
        yield "gauge", "in_flight", "Requests under way.", control.gateway.in_flight
        yield "gauge", "draining", "1 while no new requests are taken.", bool(control.gateway.draining)
        yield "gauge", "engine_up", "1 while the engine takes requests.", engine.phase is Phase.READY
        yield "counter", "engine_restarts", "Starts of the engine after the first.", max(0, engine.generation - 1)
        if adapters is not None:
            yield "gauge", "adapters_known", "Adapters that can be asked for.", adapters.known
            yield "gauge", "adapters_resident", "Adapters that the engine holds.", adapters.resident
            yield "counter", "adapter_loads", "Adapters loaded into the engine.", adapters.loads
        if keys is not None:
            yield "gauge", "keys_valid", "API keys that are valid.", keys.known
            yield "gauge", "keys_trouble", "1 while the key file cannot be read or written.", keys.trouble is not None
        if capture is not None:
            yield "counter", "captured", "Exchanges captured.", capture.captured
