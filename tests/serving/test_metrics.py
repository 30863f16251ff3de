"""Metrics: what is counted, how many series there can be, and one valid text of ours and the engine's."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as EngineCounter
from prometheus_client.parser import text_string_to_metric_families

from agentopt.serving._exposition import families, merged
from agentopt.serving._types import CHAT, Exchange, Key, Observer, Phase, TokenUse
from agentopt.serving.metrics import LABELS, Meter


class Catalog:
    def __init__(self, *names: str) -> None:
        self.names = list(names)

    def entries(self) -> list[dict[str, Any]]:
        return [{"id": name, "object": "model"} for name in self.names]


def exchange(asked: str = "base", **fields: Any) -> Exchange:
    made = Exchange(id="req_0", route=CHAT, client="1.2.3.4", asked=asked, model="engine-name", status=200)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """By name and labels; fails on what Prometheus' own parser does not take, and on what is there twice."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    names: list[str] = []
    for family in text_string_to_metric_families(text.decode()):
        names.append(family.name)
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    assert len(names) == len(set(names))
    return found


def value(text: bytes, name: str, **labels: str) -> float:
    return samples(text).get((name, frozenset(labels.items())), math.nan)


def test_an_exchange_is_counted() -> None:
    meter = Meter(cast("Any", Catalog("base", "tuned")))
    observer: Observer = meter
    assert not observer.wants_reply(exchange())
    began = 100.0
    one = exchange("tuned", variant="a", key=Key("k-1", "team"), use=TokenUse(10, 5, 4), began=began)
    one.first, one.ended = began + 0.3, began + 2
    observer.ended(one, None)
    observer.ended(exchange("", status=499), None)
    text = meter.text()
    assert value(text, "agentopt_requests_total", route=CHAT, model="tuned", variant="a", status="200") == 1
    assert value(text, "agentopt_requests_total", route=CHAT, model="engine-name", variant="", status="499") == 1
    assert value(text, "agentopt_request_seconds_sum", route=CHAT, model="tuned") == 2
    assert value(text, "agentopt_first_byte_seconds_bucket", route=CHAT, model="tuned", le="0.5") == 1
    assert value(text, "agentopt_first_byte_seconds_bucket", route=CHAT, model="tuned", le="0.25") == 0
    for kind, tokens in (("prompt", 10), ("completion", 5), ("cached", 4)):
        assert value(text, "agentopt_tokens_total", kind=kind, model="tuned", variant="a") == tokens
    assert value(text, "agentopt_key_requests_total", key="k-1") == 1
    assert value(text, "agentopt_key_tokens_total", key="k-1") == 15
    assert b"_created" not in text and b"team" not in text


def test_refusals_and_feedback() -> None:
    meter = Meter(cast("Any", Catalog("tuned")))
    meter.refused("invalid_api_key")
    meter.refused(None)
    for score in (1.0, 0.5, -1.0, 0.0, None):
        meter.feedback("tuned", "a", score)
    meter.feedback("tuned", "a", -1.0, before=1.0)
    text = meter.text()
    assert value(text, "agentopt_refused_total", code="invalid_api_key") == 1
    assert value(text, "agentopt_refused_total", code="other") == 1
    for sign, number in (("up", 2), ("down", 2), ("zero", 1), ("none", 1)):
        assert value(text, "agentopt_feedback_total", model="tuned", variant="a", sign=sign) == number
    assert value(text, "agentopt_feedback_score_sum", model="tuned", variant="a") == pytest.approx(-1.5)
    assert meter.totals()["feedback"] == 6 and meter.totals()["refused"] == 2


def test_clients_cannot_make_series(monkeypatch: pytest.MonkeyPatch) -> None:
    for label in LABELS:
        monkeypatch.setitem(LABELS, label, 20)
    meter = Meter(cast("Any", Catalog("base", *(f"adapter-{n}" for n in range(50)))))
    for n in range(60):
        meter.ended(exchange(f"no-such-{n}", key=Key(f"k-{n}", "n"), variant=f"v{n}", use=TokenUse(1, 1)), None)
        meter.ended(exchange(f"adapter-{n}", route=f"/v1/{n}"), None)
        meter.refused(f"code-{n}")
        meter.feedback(f"free-{n}", f"v{n}", 1.0)
    seen = samples(meter.text())
    for label, most in LABELS.items():
        values = {value for _, labels in seen for name, value in labels if name == label}
        assert "other" in values and len(values) == most + 1
    assert {value for _, labels in seen for name, value in labels if name == "route"} == {CHAT, "other"}


def test_state_is_read_when_it_is_asked_for() -> None:
    meter = Meter()
    engine = SimpleNamespace(phase=Phase.READY, generation=1)
    gateway = SimpleNamespace(in_flight=0, draining=False)
    capture = SimpleNamespace(captured=7, drops={"full": 2})
    control: Any = SimpleNamespace(
        engine=engine, gateway=gateway, catalog=Catalog("m"), model="m", started=5.0, capture=capture,
        adapters=SimpleNamespace(known=3, resident=1, loads=4), keyring=SimpleNamespace(known=2, trouble="gone"),
    )  # fmt: skip
    meter.bind(control)
    meter.bind(control)  # no harm
    gateway.in_flight, engine.phase, engine.generation = 4, Phase.RESTARTING, 3
    text = meter.text()
    expected = {
        "in_flight": 4, "engine_up": 0, "engine_restarts_total": 2, "adapters_known": 3, "adapters_resident": 1,
        "adapter_loads_total": 4, "captured_total": 7, "keys_valid": 2, "keys_trouble": 1, "start_time_seconds": 5,
        "draining": 0,
    }  # fmt: skip
    assert {name: value(text, f"agentopt_{name}") for name in expected} == expected
    assert value(text, "agentopt_capture_dropped_total", reason="full") == 2


def test_the_engines_metrics_come_behind_ours_and_once() -> None:
    registry = CollectorRegistry()
    EngineCounter("vllm:prompt_tokens", "Tokens.", ["model"], registry=registry).labels('a"b\\c\nd').inc(3)
    Histogram("vllm:e2e_seconds", "Time.", registry=registry).observe(0.2)
    engine = generate_latest(registry).decode()
    engine += engine  # two processes of one engine
    engine += "# TYPE agentopt_in_flight gauge\nagentopt_in_flight 99\nagentopt_sneaky 1\n"
    engine += '# TYPE split gauge\nsplit{a="1"} 1\nbare 2 1700000000000\n# TYPE split gauge\n'
    engine += 'split{a="2",b="x"} NaN\nsplit{b="x",a="2"} 4\n'
    engine += '<html>\nno sample\nsplit{a=1} 3\nsplit 1_000\nsplit{a="3"} 5 # {trace_id="x"} 1\n# EOF'
    meter = Meter()
    meter.refused("x")
    text = meter.text(engine)
    seen = samples(text)
    assert seen["vllm:prompt_tokens_total", frozenset({("model", 'a"b\\c\nd')})] == 3
    assert seen["vllm:e2e_seconds_count", frozenset()] == 1
    assert ("agentopt_in_flight", frozenset()) not in seen and b"sneaky" not in text
    assert seen["bare", frozenset()] == 2
    assert [name for name, _ in seen].count("split") == 2
    assert text.index(b"agentopt_refused_total") < text.index(b"vllm:")
    assert text.endswith(b"\n")


@given(st.text() | st.lists(st.sampled_from([
    "# TYPE a counter", "# TYPE a histogram", "# HELP a b", "a 1", "a_total 2", 'a{b="c"} 3', "a_bucket{le=\"1\"} 1",
    'a{b="\\', "\n", "# TYPE", "a_count 5", "b 1", "{} 1", "a\t1", "a 1 2 3", "\x00", "a +Inf",
])).map("\n".join))  # fmt: skip
def test_whatever_the_engine_sends_each_series_is_there_once(text: str) -> None:
    done = merged("# TYPE agentopt_x gauge\nagentopt_x 1\n", text)
    names = [line.rpartition(" ")[0] for line in done.splitlines() if not line.startswith("#")]
    assert names.count("agentopt_x") == 1
    assert merged("", done.partition("agentopt_x 1\n")[2]) == merged("", text)  # what was merged stays as it is
    heads = [line.split(" ")[1:3] for line in done.splitlines() if line.startswith("#")]
    assert len(heads) == len({tuple(head) for head in heads})
    assert all(family.samples for family in families(text).values())
