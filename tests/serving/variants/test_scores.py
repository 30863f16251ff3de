"""Counts, feedback and what may be said of it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from agentopt.serving._types import CHAT, Exchange, TokenUse
from agentopt.serving.variants import Variant, VariantScores, VirtualModel, difference, liking_of


def as_it_is(route: str, body: dict[str, Any]) -> dict[str, Any]:
    return body


MODEL = VirtualModel("m", (Variant("a", 3.0, as_it_is, "11", "a.json"), Variant("b", 1.0, as_it_is, "22")))


def exchange(variant: str | None, *, status: int = 200, error: str | None = None, asked: str = "m") -> Exchange:
    made = Exchange("req_1", CHAT, "c", asked=asked, variant=variant, status=status, error=error)
    made.sent = {"messages": []}
    made.use = TokenUse(prompt=10, completion=5)
    made.ended = made.began + 0.25
    return made


def row_of(scores: VariantScores, label: str) -> dict[str, Any]:
    return next(row for row in scores.rows() if row["variant"] == label)


def test_exchanges_are_counted_by_variant() -> None:
    scores = VariantScores([MODEL])
    refused = exchange("a", status=400, error="invalid_request_error")
    refused.sent = {}
    for one in (
        refused,
        exchange("a"),
        exchange("a", status=500, error="engine_died"),
        exchange("a", status=200, error="engine_died"),
        exchange("a", status=499, error="client_gone"),
        exchange("b"),
        exchange(None, asked="base"),
        exchange("unknown"),
    ):
        assert scores.wants_reply(one) is False
        scores.ended(one, None)
    first = row_of(scores, "a")
    assert (first["requests"], first["errors"], first["prompt_tokens"], first["completion_tokens"]) == (4, 2, 40, 20)
    assert first["mean_ms"] == pytest.approx(250)
    assert first["weight"] == 0.75
    assert first["against"] is None
    second = row_of(scores, "b")
    assert second["requests"] == 1
    assert second["feedback"] == {"n": 0, "mean": None, "interval": None, "method": ""}
    assert second["against"] == {"variant": "a", "difference": None, "interval": None, "shown": None}


def test_a_second_score_of_a_request_replaces_the_first() -> None:
    scores = VariantScores([MODEL])
    scores.feedback("m", "a", 1.0, request="req_1")
    scores.feedback("m", "a", -1.0, request="req_1")
    scores.feedback("m", "a", 1.0, request="req_2")
    for ignored in (None, 2.0, float("nan")):
        scores.feedback("m", "a", ignored)
    scores.feedback("m", "nobody", 1.0)
    scores.feedback("base", None, 1.0)
    assert row_of(scores, "a")["feedback"]["n"] == 2
    assert row_of(scores, "a")["feedback"]["mean"] == 0


def test_a_difference_is_shown_only_when_it_is_there() -> None:
    scores = VariantScores([MODEL])
    for number in range(200):
        scores.feedback("m", "a", 1.0 if number % 2 else -1.0)
        scores.feedback("m", "b", 1.0 if number % 10 else -1.0)
    against = row_of(scores, "b")["against"]
    assert against["difference"] == pytest.approx(0.8)
    assert against["interval"][0] < 0.8 < against["interval"][1]
    assert against["shown"] is True
    few = VariantScores([MODEL])
    few.feedback("m", "a", -1.0)
    few.feedback("m", "b", 1.0)
    assert row_of(few, "b")["against"]["shown"] is False, "one thumb each says nothing"


def test_variants_are_compared_with_the_plain_base_where_it_is_one() -> None:
    model = VirtualModel("m", (Variant("a", rewrite=as_it_is), Variant("base"), Variant("b", rewrite=as_it_is)))
    rows = VariantScores([model]).rows()
    assert [row["variant"] for row in rows] == ["a", "base", "b"]
    assert [row["against"] and row["against"]["variant"] for row in rows] == ["base", None, "base"]


def test_intervals_by_kind_of_feedback() -> None:
    up = liking_of({1.0: 20})
    assert up.interval is not None
    assert up.interval[0] == pytest.approx(0.663, abs=0.001)  # Clopper-Pearson: 0.8316 to 1, on -1..1
    assert up.interval[1] == 1
    assert liking_of({0.5: 3, 0.2: 2}).interval is None
    assert liking_of({0.5: 30}).interval is None, "scores all alike have no spread to learn from"
    graded = liking_of({0.0: 10, 0.5: 10, 1.0: 10})
    assert graded.method == "BCa bootstrap"
    assert graded.interval is not None
    assert graded.interval[0] < 0.5 < graded.interval[1]
    thumbs, exact = liking_of({1.0: 1501, -1.0: 1000}), liking_of({1.0: 1200, -1.0: 800})
    assert (thumbs.method, exact.method) == ("Wilson", "exact")
    assert thumbs.interval is not None
    assert thumbs.interval[0] == pytest.approx(0.1616, abs=1e-3)
    assert thumbs.interval[1] == pytest.approx(0.2383, abs=1e-3)
    many = liking_of({number / 1000: 5 for number in range(-1000, 1001)})
    assert many.method == "normal"
    assert many.interval is not None
    assert many.mean == pytest.approx(0)
    assert many.interval[1] == pytest.approx(1.96 * 0.5777 / 10005**0.5, abs=1e-4)
    assert liking_of({}).n == 0


def test_the_interval_of_a_difference_covers_it_about_as_often_as_it_says() -> None:
    draw = random.Random(7)
    known = [liking_of({1.0: up, -1.0: 60 - up}) for up in range(61)]
    covered = 0
    for _ in range(2000):
        likings: list[Any] = []
        for chance in (0.5, 0.7):
            up = sum(draw.random() < chance for _ in range(60))
            likings.append(known[up])
        _, interval = difference(*likings)
        assert interval is not None
        covered += interval[0] <= 0.4 <= interval[1]
    assert covered >= 1870  # 1900 expected of an exact interval; the exact binomial ones are wider


def test_an_earlier_servers_feedback_counts_for_the_same_candidate_only() -> None:
    rows = [
        {"exchange_id": "r1", "asked": "m", "variant": "a", "score": -1.0},
        {"exchange_id": "r1", "asked": "m", "variant": "a", "score": 1.0},
        {"exchange_id": "r2", "asked": "m", "variant": "b", "score": 1.0},
        {"exchange_id": "r3", "asked": "m", "variant": "a", "score": None},
        {"exchange_id": "r4", "asked": "base", "variant": None, "score": 1.0},
    ]
    scores = VariantScores([MODEL])
    assert scores.identities() == {"m/a": "11", "m/b": "22"}
    assert scores.restore(rows, {"m/a": "11", "m/b": "99"}) == 2
    assert row_of(scores, "a")["feedback"] == {**row_of(scores, "a")["feedback"], "n": 1, "mean": 1.0}
    assert row_of(scores, "b")["feedback"]["n"] == 0
