"""The keyring of a running server: who may ask, and how much."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.serving._types import Key, Keyring, Refusal
from agentopt.serving.keys import KeyStore, may_ask
from agentopt.serving.keys._budgets import Use
from tests.serving.keys.rings import Time, make, refusal, ring, until

# --- who may ask -----------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_only_the_secret_finds_its_key(path: Path) -> None:
    secret = make(path)
    keyring: Keyring = ring(path)
    found = keyring.find(secret)
    assert found is not None and found.name == "team"
    stored = KeyStore(path).list()[0]
    for wrong in (
        "",
        "ak-",
        secret[:-1],
        secret + "A",
        secret.upper(),
        stored.hash.hex(),
        found.id,
        "x" * 10**6,
        "\ud800",
    ):
        assert keyring.find(wrong) is None
    await ring(path).close()


def test_models_are_globs_of_whole_names() -> None:
    key = Key("k", "n", models=("base", "tuned-*", "org/?odel"))
    asked = ["base", "base2", "tuned-", "tuned-a/b", "org/model", "org/mmodel", "Base", ""]
    assert [may_ask(key, name) for name in asked] == [True, False, True, True, True, False, False, False]
    assert may_ask(Key("k", "n"), "any/thing:at-all")


@pytest.mark.anyio
async def test_a_thousand_wrong_keys_leave_nothing_in_memory(path: Path) -> None:
    make(path)
    keyring = ring(path)
    wrong = [f"ak-{n:043d}" for n in range(2000)]
    tracemalloc.start()
    try:
        for secret in wrong[:1000]:
            assert keyring.find(secret) is None
        before = tracemalloc.get_traced_memory()[0]
        for secret in wrong[1000:]:
            assert keyring.find(secret) is None
        assert tracemalloc.get_traced_memory()[0] - before < 10_000
    finally:
        tracemalloc.stop()
    await keyring.close()


@pytest.mark.anyio
async def test_a_key_revoked_by_another_process_ends_at_once(path: Path) -> None:
    secret = make(path)
    async with ring(path) as keyring:
        ended: list[str] = []

        def broken(key: str) -> None:
            raise RuntimeError("a watcher with a fault")

        keyring.watch(broken)
        keyring.watch(ended.append)
        key = keyring.find(secret)
        assert key is not None
        keyring.admit(key)
        KeyStore(path).revoke("team")
        await until(lambda: ended == [key.id])
        assert keyring.find(secret) is None
        assert refusal(keyring, key).status == 401  # found before, admitted after
        keyring.release(key, 7)  # what was under way still counts
        await until(lambda: KeyStore(path).list()[0].tokens == 7)
        other = make(path, name="new")
        await until(lambda: keyring.find(other) is not None)


@pytest.mark.anyio
async def test_keys_expire_by_the_clock_of_the_day(path: Path) -> None:
    secret, times = make(path, expires_days=1), Time()
    async with ring(path, times) as keyring:
        ended: list[str] = []
        keyring.watch(ended.append)
        assert keyring.find(secret) is not None and keyring.known == 1
        times.wall += 86400  # also when the clock jumps
        assert keyring.find(secret) is None and keyring.known == 0
        await until(lambda: len(ended) == 1)
        times.wall -= 86400  # and when it is set right again
        assert keyring.find(secret) is not None
        await until(lambda: bool(keyring._file._valid))
        times.wall += 90000
        await until(lambda: len(ended) == 2)


# --- how much --------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_requests_a_minute(path: Path) -> None:
    secret, times = make(path, requests_per_minute=6), Time()
    keyring = ring(path, times)
    key = keyring.find(secret)
    assert key is not None
    for _ in range(6):
        keyring.admit(key)
        keyring.release(key, 0)
    refused = refusal(keyring, key)
    assert (refused.status, refused.kind, refused.code) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert refused.retry_after == 10
    times.wall -= 10**6  # a clock set back changes nothing
    times.ticks += 9
    assert refusal(keyring, key).retry_after == 1
    times.ticks += 1
    keyring.admit(key)
    assert refusal(keyring, key).retry_after == 10
    times.ticks += 10**6  # no more than a minute's worth is saved up
    for _ in range(6):
        keyring.admit(key)
    refusal(keyring, key)
    await keyring.close()


@pytest.mark.anyio
async def test_tokens_a_minute_may_be_overdrawn_once_and_are_waited_off(path: Path) -> None:
    secret, times = make(path, tokens_per_minute=60), Time()
    keyring = ring(path, times)
    key = keyring.find(secret)
    assert key is not None
    keyring.admit(key)
    keyring.admit(key)
    keyring.release(key, 100)
    refused = refusal(keyring, key)
    assert refused.retry_after == 41 and "60 tokens a minute" in str(refused)
    keyring.release(key, 20)
    times.ticks += 41
    assert refusal(keyring, key).retry_after == 20
    times.ticks += 20
    keyring.admit(key)
    await keyring.close()


@pytest.mark.anyio
async def test_requests_at_a_time(path: Path) -> None:
    secret = make(path, concurrency=2, requests_per_minute=3)
    keyring = ring(path, Time())
    key = keyring.find(secret)
    assert key is not None
    keyring.admit(key)
    keyring.admit(key)
    assert refusal(keyring, key).retry_after == 1
    keyring.release(key, 1)
    keyring.admit(key)  # the refused one took nothing of the three a minute
    keyring.release(key, 1)
    assert "3 times a minute" in str(refusal(keyring, key))
    await keyring.close()


@pytest.mark.anyio
async def test_a_budget_survives_a_restart_and_is_shared_by_servers(path: Path) -> None:
    secret = make(path, token_budget=100)
    async with ring(path) as first, ring(path) as second:
        key = first.find(secret)
        assert key is not None
        for _ in range(2):
            first.admit(key)
            first.release(key, 25)
        second.admit(key)
        second.release(key, 30)
        await until(lambda: first.used(key.id) == second.used(key.id) == 80)
        first.admit(key)
        first.release(key, 20)
    keyring = ring(path)
    refused = refusal(keyring, key)
    assert (refused.status, refused.kind, refused.code) == (429, "insufficient_quota", "insufficient_quota")
    assert refused.retry_after is None
    stored = KeyStore(path).list()[0]
    assert (stored.requests, stored.tokens, stored.state()) == (4, 100, "used up")
    assert stored.last_used is not None
    await keyring.close()


@given(
    st.integers(1, 50),
    st.lists(st.one_of(st.just(None), st.floats(0, 200)), max_size=200),
)
def test_no_stretch_of_time_lets_through_more_than_burst_and_rate(rate: int, steps: list[float | None]) -> None:
    key, use, now = Key("k", "n", requests_per_minute=rate), Use(), 0.0
    admitted: list[float] = []
    for step in steps:
        if step is not None:
            now += step
            continue
        try:
            use.admit(key, 0, now)
        except Refusal as refused:
            assert refused.retry_after is not None
        else:
            admitted.append(now)
    for first, start in enumerate(admitted):
        for last in range(first, len(admitted)):
            assert last - first + 1 <= rate + (admitted[last] - start) * rate / 60 + 1e-6
