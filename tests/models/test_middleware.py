"""What surrounds a client: retries with a bounded wait, timeouts, throttle, cache, single-flight. Time is virtual."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import anyio
import pytest

from agentopt import graph
from agentopt.models import (
    LM,
    CacheWarning,
    FunctionLM,
    LMError,
    LMOptions,
    LMRateLimit,
    LMRefused,
    LMSettings,
    LMTimeout,
    LMUnavailable,
    OpenAICompatible,
    Reply,
    Request,
    RetryPolicy,
    Throttle,
    ThrottleLimits,
    ThrottleTable,
)
from agentopt.store import Store
from tests.models.conftest import MemoryCache, VirtualClock, lm_for
from tests.models.fake_server import FakeServer

pytestmark = pytest.mark.anyio


# ---- retries


async def test_f6_429_for_a_minute_completes_with_every_try_counted(server: FakeServer, clock: VirtualClock) -> None:
    server.script([{"status": 429, "retry_after": 10}] * 6)
    with graph.metered() as meter:
        reply = await lm_for(server, clock).complete("x")
    assert reply.text == "ok"
    assert reply.usage.tries == 7
    assert reply.usage.calls == 1
    assert meter.usage == reply.usage
    assert clock.time == pytest.approx(60)


async def test_429_without_retry_after_backs_off_within_the_bound(server: FakeServer, clock: VirtualClock) -> None:
    server.default = {"status": 429}
    with pytest.raises(LMRateLimit, match=r"after 1[0-9] tries") as caught:
        await lm_for(server, clock, retry=RetryPolicy(max_wait=120, cap=20)).complete("x")
    assert clock.time <= 120
    assert caught.value.tries == len(server.requests)
    assert min(clock.slept) >= 0.25


async def test_a_retry_after_beyond_the_bound_fails_at_once(server: FakeServer, clock: VirtualClock) -> None:
    server.script([{"status": 429, "retry_after": 4000}])
    with pytest.raises(LMRateLimit):
        await lm_for(server, clock).complete("x")
    assert clock.time == 0


@pytest.mark.parametrize("step", [{"status": 500}, {"status": 503}, {"drop": True}, {"malformed": True}, {"body": {}}])
async def test_transport_failures_and_5xx_are_retried(server: FakeServer, clock: VirtualClock, step: Any) -> None:
    server.script([step, step])
    reply = await lm_for(server, clock).complete("x")
    assert reply.usage.tries == 3


async def test_retries_of_failures_are_bounded_by_number(server: FakeServer, clock: VirtualClock) -> None:
    server.default = {"status": 500}
    with graph.metered() as meter, pytest.raises(LMUnavailable, match="after 5 tries"):
        await lm_for(server, clock).complete("x")
    assert meter.usage == graph.Usage(tries=5)
    assert meter.unpriced_calls == 0


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_a_refused_request_is_not_tried_again(server: FakeServer, clock: VirtualClock, status: int) -> None:
    server.default = {"status": status, "message": "no such thing"}
    with pytest.raises(LMRefused, match="no such thing"):
        await lm_for(server, clock).complete("x")
    assert len(server.requests) == 1


async def test_an_unreachable_server_is_one_sentence(clock: VirtualClock) -> None:
    client = OpenAICompatible("http://127.0.0.1:9/v1", "m")
    with pytest.raises(LMUnavailable, match=r"cannot reach http://127\.0\.0\.1:9/v1"):
        await LM(client, settings=LMSettings(retry=RetryPolicy(max_tries=2), clock=clock)).complete("x")


async def test_f6_a_hanging_server_times_out_and_leaves_the_pool_usable(
    server: FakeServer, clock: VirtualClock
) -> None:
    server.script([{"hang": True}, {"hang": True}])
    lm = lm_for(server, clock, options=LMOptions(timeout=0.4))
    assert (await lm.complete("x")).usage.tries == 3
    server.default = {"hang": True}
    with pytest.raises(LMTimeout, match=r"no reply within 0\.05 s"):
        await lm.complete("y", options=LMOptions(timeout=0.05))
    server.default = "back"
    assert (await lm.complete("z", options=LMOptions(timeout=60))).text == "back"


async def test_a_hanging_double_times_out_too(clock: VirtualClock) -> None:
    async def hang(_: Request) -> str:
        await anyio.sleep_forever()
        return ""

    lm = LM(FunctionLM(hang), settings=LMSettings(clock=clock, retry=RetryPolicy(max_tries=1)))
    with pytest.raises(LMTimeout):
        await lm.complete("x", options=LMOptions(timeout=0.01))


async def test_cancelling_a_call_closes_its_connection(server: FakeServer) -> None:
    server.default = {"hang": True}
    with anyio.move_on_after(0.05):
        await lm_for(server).complete("x")
    with anyio.fail_after(60):
        while server.active:
            await anyio.sleep(0.01)
    assert not server.active


# ---- throttle


async def test_the_throttle_bounds_calls_in_flight(server: FakeServer) -> None:
    server.latency = 0.01
    table = ThrottleTable(ThrottleLimits(start=3, minimum=1, maximum=3))
    lm = LM(OpenAICompatible(server.url, "m"), settings=LMSettings(throttle=table))
    async with anyio.create_task_group() as group:
        for number in range(12):
            group.start_soon(lm.complete, str(number))
    assert server.peak == 3


async def test_the_throttle_cuts_once_per_cooldown_and_grows_after_clean_rounds(clock: VirtualClock) -> None:
    throttle = Throttle(ThrottleLimits(start=20, minimum=10), clock=clock)
    throttle.active = 20
    throttle.limited(None)
    throttle.limited(None)
    assert throttle.limit == 16
    clock.time += 16
    throttle.active = 16
    throttle.limited(None)
    assert throttle.limit == pytest.approx(12.8)
    clock.time += 16
    throttle._saturated = True
    for _ in range(12):
        throttle.succeeded()
    assert throttle.limit == pytest.approx(13.8)
    for _ in range(1000):
        clock.time += 16
        throttle.active = 11
        throttle.limited(None)
    assert throttle.limit == 10


async def test_a_round_that_never_filled_the_limit_does_not_grow_it(clock: VirtualClock) -> None:
    throttle = Throttle(clock=clock)
    for _ in range(100):
        async with throttle.slot():
            pass
        throttle.succeeded()
    assert throttle.limit == 20


async def test_a_retry_after_holds_back_new_calls(clock: VirtualClock) -> None:
    throttle = Throttle(clock=clock)
    throttle.limited(30.0)
    async with throttle.slot():
        assert clock.time == 30


async def test_cancelled_waiters_leave_no_slot_taken() -> None:
    throttle = Throttle(ThrottleLimits(start=1, minimum=1))

    async def wait() -> None:
        async with throttle.slot():
            await anyio.sleep_forever()

    for _ in range(20):
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
    assert throttle.active == 0
    async with throttle.slot():
        assert throttle.active == 1


def test_one_throttle_is_shared_by_loops_in_several_threads() -> None:
    throttle = Throttle(ThrottleLimits(start=2, minimum=1, maximum=2))
    peak, lock = 0, threading.Lock()

    async def use() -> None:
        nonlocal peak
        async with throttle.slot():
            with lock:
                peak = max(peak, throttle.active)
            await anyio.sleep(0)

    async def many() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(use)

    threads = [threading.Thread(target=anyio.run, args=(many,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert throttle.active == 0
    assert peak <= 2


# ---- cache


async def test_d15_a_cache_that_is_given_is_used(server: FakeServer, cache: MemoryCache) -> None:
    lm = lm_for(server, cache=cache)
    first, second = await lm.complete("x"), await lm.complete("x")
    assert len(server.requests) == 1
    assert (cache.gets, cache.puts) == (2, 1)
    assert (first.cached, second.cached) == (False, True)
    assert second.text == first.text
    took = first.usage
    assert took.input_tokens and took.output_tokens
    assert second.usage == graph.Usage(
        cached_calls=1,
        cached_input_tokens=took.input_tokens,
        cached_output_tokens=took.output_tokens,
        cached_cost=None,  # no price is known for this server's model
    )
    assert second.cost == 0.0
    assert second.saved_usage == first.usage


async def test_a_cached_reply_is_parsed_again_and_repairs_are_cached_with_it(cache: MemoryCache) -> None:
    calls: list[Request] = []

    def answer(request: Request) -> str:
        calls.append(request)
        return "no" if len(request.messages) == 1 else "[1]"

    lm = LM(FunctionLM(answer, name="f"), cache=cache)
    first = await lm.complete("x", output=list[int])
    again = await lm.complete("x", output=list[int])
    assert first.parsed == again.parsed == [1]
    assert again.cached
    assert again.usage == graph.Usage(
        cached_calls=2,
        cached_input_tokens=first.usage.input_tokens,
        cached_output_tokens=first.usage.output_tokens,
    )
    assert len(calls) == 2


async def test_a_cached_reply_tells_meters_what_it_would_cost_and_charges_nothing(cache: MemoryCache) -> None:
    usage = graph.Usage(input_tokens=30, output_tokens=4, calls=1, tries=1)
    lm = LM(FunctionLM(lambda _request: Reply("ok", usage=usage, cost=0.25), name="f"), cache=cache)
    with graph.metered() as meter:
        for text in ("x", "x", "x", "y"):
            await lm.complete(text)
    assert (meter.cost, meter.usage.input_tokens, meter.usage.calls, meter.usage.cached_calls) == (0.5, 60, 2, 2)
    assert (meter.usage.cached_input_tokens, meter.usage.cached_output_tokens) == (60, 8)
    assert meter.usage.cached_cost == 0.5
    assert meter.unpriced_calls == 0


@pytest.mark.parametrize("row", [{}, {"text": 3}, [], {"text": "x", "usage": None}, "text"])
async def test_a_corrupted_cache_row_is_a_miss_with_a_warning(server: FakeServer, cache: MemoryCache, row: Any) -> None:
    lm = lm_for(server, cache=cache)
    await lm.complete("x")
    cache.rows = dict.fromkeys(cache.rows, row)
    with pytest.warns(CacheWarning, match="unreadable"):
        reply = await lm.complete("x")
    assert reply.text == "ok"
    assert not reply.cached
    assert (await lm.complete("x")).cached


async def test_the_cache_in_the_store_outlives_the_process_object(server: FakeServer) -> None:
    with Store.open("cache.db") as store:
        first = await lm_for(server, cache=store).complete("x", options=LMOptions(temperature=0.5, sample=3))
    with Store.open("cache.db") as store:
        second = await lm_for(server, cache=store).complete("x", options=LMOptions(temperature=0.5, sample=3))
        third = await lm_for(server, cache=store).complete("x", options=LMOptions(temperature=0.5, sample=4))
    assert second.cached
    assert second.text == first.text
    assert not third.cached


async def test_a_reply_is_durable_before_it_is_used(server: FakeServer) -> None:
    order: list[str] = []

    class Slow(MemoryCache):
        def put_reply(self, key: str, reply: dict[str, Any], *, model: str, request: dict[str, Any] | None) -> None:
            order.append("stored")

    await lm_for(server, cache=Slow()).complete("x")
    order.append("used")
    assert order == ["stored", "used"]


async def test_unnamed_doubles_are_not_cached(cache: MemoryCache) -> None:
    lm = LM(FunctionLM(lambda _: "x"), cache=cache)
    await lm.complete("x")
    assert not (await lm.complete("x")).cached


# ---- single-flight


async def test_equal_requests_at_the_same_time_are_one_call(server: FakeServer) -> None:
    server.latency = 0.05
    lm, replies = lm_for(server), list[Reply]()

    async def ask() -> None:
        replies.append(await lm.complete("x"))

    with graph.metered() as meter:
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(ask)
    assert len(server.requests) == 1
    assert {reply.text for reply in replies} == {"ok"}
    assert meter.usage.calls == 1
    assert meter.usage.cached_calls == 9


async def test_when_the_caller_that_pays_is_cancelled_another_takes_over(server: FakeServer) -> None:
    server.script([{"hang": True}])
    lm, replies = lm_for(server), list[Reply]()

    async def ask() -> None:
        replies.append(await lm.complete("x"))

    async with anyio.create_task_group() as group:
        first = anyio.CancelScope()

        async def leader() -> None:
            with first:
                await lm.complete("x")

        group.start_soon(leader)
        with anyio.fail_after(60):
            while not server.requests:
                await anyio.sleep(0.01)
        group.start_soon(ask)
        group.start_soon(ask)
        await anyio.sleep(0.05)
        first.cancel()
    assert [reply.text for reply in replies] == ["ok", "ok"]
    assert len(server.requests) == 2


async def test_a_cancelled_follower_leaves_the_call_alone(server: FakeServer) -> None:
    server.latency = 0.1
    lm, replies = lm_for(server), list[Reply]()

    async def ask() -> None:
        replies.append(await lm.complete("x"))

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await anyio.sleep(0.02)
        with anyio.move_on_after(0.02):
            await lm.complete("x")
    assert [reply.text for reply in replies] == ["ok"]


async def test_followers_get_the_error_of_the_one_who_paid(server: FakeServer, clock: VirtualClock) -> None:
    server.default = {"status": 400, "message": "bad", "latency": 0.05}
    lm, errors = lm_for(server, clock), list[LMError]()

    async def ask() -> None:
        try:
            await lm.complete("x")
        except LMError as error:
            errors.append(error)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(ask)
    assert len(server.requests) == 1
    assert len(errors) == 3
    assert len({id(error) for error in errors}) == 3


async def test_different_samples_are_different_calls(server: FakeServer) -> None:
    lm = lm_for(server)
    warm = LMOptions(temperature=1.0, seed=1)
    async with anyio.create_task_group() as group:
        for sample in range(3):
            group.start_soon(lambda sample=sample: lm.complete("x", options=replace(warm, sample=sample)))
    assert len(server.requests) == 3
