"""Who is let in: keys, wrong keys, and web pages that come through a name of their own."""

from __future__ import annotations

import pytest

from agentopt.serving._types import CHAT, COUNT, MESSAGES, Key, Refusal
from agentopt.serving.gateway import Limits
from agentopt.serving.gateway._doors import Doors, check_host
from tests.serving.gateway.kit import HELLO, Ring, house

pytestmark = pytest.mark.anyio


async def test_everything_under_v1_needs_a_key() -> None:
    async with house(keyring=Ring(secret=Key("k1", "me")), limits=Limits(failures_per_minute=1000)) as home:
        for method, path in (
            ("POST", CHAT), ("GET", "/v1/models"), ("GET", "/v1/models/fake"), ("GET", "/v1/nothing"),
            ("POST", "/v1/feedback"), ("DELETE", "/v1/models"), ("POST", "/v1/load_lora_adapter"),
        ):  # fmt: skip
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "Basic secret"},
                {"authorization": "secret"},
            ):
                reply = await home.client.request(method, path, headers=headers)
                assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
                assert reply.json()["error"]["code"] == "invalid_api_key"
        for path in ("/health", "/ready"):
            assert (await home.client.get(path)).status_code == 200
        assert home.fake.count == 0
        assert (await home.client.get("/v1/nothing", headers={"authorization": "Bearer secret"})).status_code == 404


async def test_messages_take_their_own_header() -> None:
    async with house(keyring=Ring(secret=Key("k1", "me"))) as home:
        own = {"x-api-key": "secret"}
        assert (await home.ask(MESSAGES, headers=own, messages=HELLO, max_tokens=4)).status_code == 200
        assert (await home.ask(COUNT, headers=own, messages=HELLO)).status_code == 200
        assert (await home.ask(CHAT, headers=own)).status_code == 401


async def test_a_thousand_wrong_keys_are_slowed_down_and_a_right_one_is_not() -> None:
    async with house(keyring=Ring(secret=Key("k1", "me"))) as home:
        codes = [
            (await home.client.get("/v1/models", headers={"authorization": f"Bearer wrong{n}"})).status_code
            for n in range(200)
        ]
        assert codes[:20] == [401] * 20
        assert set(codes[25:]) == {429}
        reply = await home.client.get("/v1/models", headers={"authorization": "Bearer wrong"})
        assert int(reply.headers["retry-after"]) >= 1
        assert (await home.ask(headers={"authorization": "Bearer secret"})).status_code == 200


def refused(doors: Doors, client: str, now: float) -> int:
    with pytest.raises(Refusal) as caught:
        doors.key(CHAT, {}, client, now)
    return caught.value.status


def test_failures_are_forgiven_with_time_and_counted_per_address() -> None:
    doors = Doors(Ring(), Limits(failures_per_minute=3))
    assert [refused(doors, "1.1.1.1", 0.0) for _ in range(5)] == [401, 401, 401, 429, 429]
    assert refused(doors, "1.1.1.2", 0.0) == 401
    assert refused(doors, "1.1.1.1", 21.0) == 401
    assert refused(doors, "1.1.1.1", 21.0) == 429
    assert [refused(doors, f"2001:db8:1:1::{n}", 0.0) for n in range(4)] == [401, 401, 401, 429]
    assert refused(doors, "2001:db8:1:2::1", 0.0) == 401


def test_the_memory_of_failures_is_bounded() -> None:
    doors = Doors(Ring(), Limits())
    for number in range(12_000):
        refused(doors, f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 0.0)
    assert len(doors._wrong) == 10_000


@pytest.mark.parametrize(
    ("host", "server", "fine"),
    [
        ("localhost:8000", "127.0.0.1", True),
        ("127.0.0.1:8000", "127.0.0.1", True),
        ("[::1]:8000", "::1", True),
        ("[::1]", "::1", True),
        ("app.localhost", "127.0.0.1", True),
        ("192.168.1.5:80", "127.0.0.1", True),
        ("evil.example:8000", "127.0.0.1", False),
        ("127.0.0.1.evil.example", "127.0.0.1", False),
        ("localhost.evil.example", "::1", False),
        ("", "127.0.0.1", False),
        ("inside.example", "127.0.0.1", True),
        ("anything", "10.0.0.2", True),
    ],
)
def test_a_keyless_server_on_loopback_answers_to_its_own_names(host: str, server: str, fine: bool) -> None:
    limits = Limits(hosts=("inside.example",))
    if fine:
        check_host(host, server, limits)
    else:
        with pytest.raises(Refusal, match="localhost only"):
            check_host(host, server, limits)
    check_host(host, server, Limits(hosts=("*",)))


async def test_a_page_with_a_name_of_its_own_is_refused() -> None:
    async with house() as home:
        assert (await home.ask(headers={"host": "evil.example"})).status_code == 403
        assert (await home.client.get("/health", headers={"host": "evil.example"})).status_code == 200
    async with house(keyring=Ring(secret=Key("k1", "me"))) as home:
        named = {"host": "llm.example", "authorization": "Bearer secret"}
        assert (await home.ask(headers=named)).status_code == 200
