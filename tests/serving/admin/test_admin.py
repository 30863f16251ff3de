"""The admin side: who may ask it, what it shows, and what it changes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from agentopt.errors import RunError, UserError
from agentopt.serving._types import Address, Phase, Refusal
from agentopt.serving.admin import Control, admin_app
from agentopt.serving.fake_engine import FakeEngine, Ready
from agentopt.serving.gateway import Gateway, serving
from agentopt.serving.keys import KeyStore, NewKey, StoredKeyring
from agentopt.serving.metrics import Meter

TOKEN = "an-admin-token-of-a-test"
OWNER = {"authorization": f"Bearer {TOKEN}"}
GUARDED = [
    ("GET", "/status"), ("GET", "/openapi.json"), ("GET", "/adapters"), ("POST", "/adapters"),
    ("DELETE", "/adapters/a"), ("GET", "/variants"), ("POST", "/drain"),
]  # fmt: skip


@dataclass
class Listed:
    name: str

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "rank": 8, "bytes": 1000, "resident": False, "users": 0, "loads": 0, "facts": 0}


@dataclass
class Registry:
    """Adapters without an engine."""

    folders: dict[str, str] = field(default_factory=dict[str, str])
    resident: int = 0
    loads: int = 0

    @property
    def known(self) -> int:
        return len(self.folders)

    def __contains__(self, name: object) -> bool:
        return name in self.folders

    def list(self) -> list[Listed]:
        return [Listed(name) for name in self.folders]

    async def add(self, name: str, folder: str, *, keep: bool = False) -> object:
        assert keep
        if "pickle" in folder:
            raise UserError(f"{folder}: found model.bin, which can run code; expected safetensors only.")
        if "engine" in folder:
            raise RunError("the engine refused it")
        if "bug" in folder:
            raise KeyError("secret insides")
        self.folders[name] = folder
        return None

    async def remove(self, name: str) -> None:
        del self.folders[name]


class Catalog:
    def entries(self) -> list[dict[str, Any]]:
        return [{"id": "base", "object": "model"}]

    def taken(self, name: str) -> str | None:
        return "the base model" if name == "base" else None


@dataclass
class Door:
    in_flight: int = 0
    draining: bool = False
    asked: list[float] = field(default_factory=list[float])

    async def drain(self, seconds: float) -> bool:
        self.draining = True
        self.asked.append(seconds)
        return self.in_flight == 0


def control(**fields: Any) -> Control:
    given: dict[str, Any] = {
        "engine": Ready(Address(port=1)),
        "gateway": Door(),
        "catalog": Catalog(),
        "meter": Meter(),
        "token": TOKEN,
        "model": "base",
        **fields,
    }
    return Control(**given)


def client(parts: Control, host: str = "127.0.0.1:8001", headers: dict[str, str] | None = None) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(cast("Any", admin_app(parts)), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=f"http://{host}", headers=headers)


# --- who may ask -----------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_all_but_health_and_metrics_want_the_token() -> None:
    parts = control(adapters=Registry(), stop=lambda: pytest.fail("stopped"))
    async with client(parts) as asked:
        assert (await asked.get("/health")).json() == {"status": "ok"}
        assert (await asked.get("/metrics")).status_code == 200
        for method, path in GUARDED:
            for wrong in (
                [], [("authorization", f"bearer {TOKEN}x")], [("authorization", f"Bearer {TOKEN[:-1]}")],
                [("authorization", TOKEN)], [("authorization", f"Basic {TOKEN}")], [("authorization", "Bearer ")],
                [("authorization", f"Bearer {TOKEN}")] * 2, [("x-api-key", TOKEN)],
                [("authorization", b"Bearer \xff\xfe")],
            ):  # fmt: skip
                headers: Any = wrong
                reply = await asked.request(method, path, headers=headers)
                assert reply.status_code == 401, (method, path, wrong)
                assert reply.json()["error"]["code"] == "invalid_admin_token"
                assert reply.headers["www-authenticate"] == "Bearer" and TOKEN not in reply.text
    assert not cast("Door", parts.gateway).draining


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("bound", "host", "status"),
    [
        ("127.0.0.1", "localhost:8001", 200),
        ("127.0.0.1", "LOCALHOST", 200),
        ("127.0.0.1", "127.0.0.1:8001", 200),
        ("127.0.0.1", "127.9.9.9", 200),
        ("::1", "[::1]:8001", 200),
        ("localhost", "evil.example:8001", 421),
        ("127.0.0.1", "127.0.0.1.evil.example", 421),
        ("127.0.0.1", "localhost.evil.example", 421),
        ("127.0.0.1", "192.168.0.7", 421),
        ("127.0.0.1", "0.0.0.0", 421),
        ("127.0.0.1", "evil.example@127.0.0.1:x", 421),
        ("127.0.0.1", "", 421),
        ("0.0.0.0", "gateway:8001", 200),
    ],
)
async def test_on_loopback_the_host_header_must_be_loopback(bound: str, host: str, status: int) -> None:
    async with client(control(host=bound)) as asked:
        for path in ("/health", "/metrics", "/status"):
            reply = await asked.get(path, headers={"host": host, **OWNER})
            assert reply.status_code == status, reply.text


def test_a_short_token_is_refused_at_the_start() -> None:
    for token in ("", "admin", "x" * 15, "x" * 20 + "\n", "ü" * 30):
        with pytest.raises(UserError, match="AGENTOPT_ADMIN_TOKEN: expected at least 16"):
            control(token=token)
    assert TOKEN not in repr(control())


@pytest.mark.anyio
async def test_what_is_no_route() -> None:
    async with client(control(), headers=OWNER) as asked:
        assert (await asked.get("/v1/models")).status_code == 404
        wrong = await asked.post("/status")
        assert wrong.status_code == 405 and "GET" in wrong.headers["allow"]
        assert "error" in wrong.json()
        assert (await asked.get("/adapters")).status_code == 501
        assert (await asked.get("/variants")).json() == {"variants": []}


# --- what it shows ---------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_status_names_what_is_wrong(tmp_path: Path) -> None:
    KeyStore(tmp_path / "keys.db").create(NewKey("team"))
    async with StoredKeyring(tmp_path / "keys.db", poll=0.01) as keyring:
        engine = Ready(Address(port=1), phase=Phase.RESTARTING, generation=2)
        parts = control(engine=engine, adapters=Registry({"a": "x"}), keyring=keyring)
        async with client(parts, headers=OWNER) as asked:
            found = (await asked.get("/status")).json()
            assert found["engine"]["phase"] == "restarting" and found["engine"]["generation"] == 2
            assert found["keys"] == {"valid": 1} and found["adapters"] == {"known": 1, "resident": 0}
            assert found["models"] == ["base"] and found["warnings"] == [] and found["capture"] is None
            assert found["totals"]["requests"] == 0 and found["in_flight"] == 0
            (tmp_path / "keys.db").unlink()
            for _ in range(1000):
                if (found := (await asked.get("/status")).json())["warnings"]:
                    break
                await asyncio.sleep(0.01)
            assert "the key file is gone" in found["warnings"][0]
            assert b"agentopt_keys_trouble 1.0" in (await asked.get("/metrics")).content


@pytest.mark.anyio
async def test_the_engines_metrics_are_shown_while_it_answers() -> None:
    async with FakeEngine(token="engine-token") as fake:
        engine = Ready(fake.address, fake.abilities)
        async with client(control(engine=engine)) as asked:
            reply = await asked.get("/metrics")
            assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
            engines_own = [line for line in reply.text.splitlines() if line and "agentopt_" not in line]
            assert "agentopt_engine_up 1.0" in reply.text and engines_own
            await fake.kill()
            reply = await asked.get("/metrics")
            assert "agentopt_engine_up 1.0" in reply.text
            assert not [line for line in reply.text.splitlines() if line and "agentopt_" not in line]


@pytest.mark.anyio
async def test_the_document_is_of_the_public_routes() -> None:
    async with client(control(), headers=OWNER) as asked:
        found = (await asked.get("/openapi.json")).json()
    assert found["openapi"].startswith("3.1") and "/v1/chat/completions" in found["paths"]
    assert not {"/drain", "/adapters", "/status", "/metrics"} & set(found["paths"])


@pytest.mark.anyio
async def test_variants_are_asked_of_the_scores() -> None:
    rows = [{"model": "support", "variant": "a"}]
    async with client(control(scores=lambda: rows), headers=OWNER) as asked:
        assert (await asked.get("/variants")).json() == {"variants": rows}


# --- what it changes -------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_adapters_come_and_go() -> None:
    registry = Registry()
    async with client(control(adapters=registry), headers=OWNER) as asked:
        added = await asked.post("/adapters", json={"name": "team/book", "path": "/adapters/book"})
        assert added.status_code == 201 and added.json()["rank"] == 8
        assert registry.folders == {"team/book": "/adapters/book"}
        assert [one["name"] for one in (await asked.get("/adapters")).json()["adapters"]] == ["team/book"]
        assert (await asked.delete("/adapters/team/book")).json() == {"name": "team/book", "removed": True}
        assert (await asked.delete("/adapters/team/book")).status_code == 404
        await asked.post("/adapters", json={"name": "book@v1:b", "path": "/data/book"})
        assert (await asked.delete("/adapters/book%40v1%3Ab")).json() == {"name": "book@v1:b", "removed": True}
        for body, status, said in (
            ({"name": "x", "path": "/pickle"}, 400, "can run code"),
            ({"name": "x", "path": "/engine"}, 502, "refused it"),
            ({"name": "base", "path": "/fine"}, 409, "base is the base model already"),
            ({"name": "x"}, 400, "Expected"),
            ({"name": 3, "path": []}, 400, "Expected"),
            ([], 400, "not a JSON object"),
        ):
            reply = await asked.post("/adapters", json=body)
            assert (reply.status_code, said in reply.text) == (status, True), reply.text
        assert (await asked.post("/adapters", content=b'{"a":' * 9000)).status_code == 400
        assert (await asked.post("/adapters", content=b" " * 70_000)).status_code == 413
        fault = await asked.post("/adapters", json={"name": "x", "path": "/bug"})
        assert fault.status_code == 500 and "secret insides" not in fault.text


@pytest.mark.anyio
async def test_drain_ends_the_server_when_asked_to() -> None:
    stopped: list[bool] = []
    parts = control(gateway=Door(in_flight=2), stop=lambda: stopped.append(True))
    async with client(parts, headers=OWNER) as asked:
        for wrong in ({"seconds": -1}, {"seconds": "5"}, {"seconds": True}, {"seconds": 1e9}, {"stop": 1}):
            assert (await asked.post("/drain", json=wrong)).status_code == 400
        kept = await asked.post("/drain", json={"seconds": 2, "stop": False})
        assert kept.json() == {"drained": False, "in_flight": 2, "stops": False} and not stopped
        cast("Door", parts.gateway).in_flight = 0
        assert (await asked.post("/drain")).json() == {"drained": True, "in_flight": 0, "stops": True}
    assert stopped == [True] and cast("Door", parts.gateway).asked == [2.0, 30.0]


@pytest.mark.anyio
async def test_with_the_gateway_itself(tmp_path: Path) -> None:
    """A key, its limits, and the numbers they leave, through real sockets."""
    store = KeyStore(tmp_path / "keys.db")
    stored, secret = store.create(NewKey("team", requests_per_minute=2))
    meter = Meter(cast("Any", Known()), model="fake")
    async with FakeEngine() as fake, StoredKeyring(store.path, poll=0.01, flush=0.01) as keyring:
        gateway = Gateway(Ready(fake.address, fake.abilities), cast("Any", Known()), keyring=keyring, observers=[meter])
        parts = control(
            engine=Ready(fake.address, fake.abilities), gateway=gateway, meter=meter, catalog=Known(), keyring=keyring
        )
        async with (
            serving(gateway) as server,
            client(parts, headers=OWNER) as admin,
            httpx.AsyncClient(timeout=60) as http,
        ):
            url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
            body = {"model": "fake", "messages": [{"role": "user", "content": "one two three"}]}
            owner = {"authorization": f"Bearer {secret}"}
            codes = [(await http.post(url, json=body, headers=owner)).status_code for _ in range(3)]
            assert codes == [200, 200, 429]
            assert (await http.post(url, json=body, headers={"authorization": "Bearer ak-wrong"})).status_code == 401
            text = (await admin.get("/metrics")).text
            for line in (
                'agentopt_refused_total{code="rate_limit_exceeded"} 1.0',
                'agentopt_refused_total{code="invalid_api_key"} 1.0',
                f'agentopt_key_requests_total{{key="{stored.key.id}"}} 3.0',
                'agentopt_requests_total{model="fake",route="/v1/chat/completions",status="200",variant=""} 2.0',
            ):
                assert line in text
            store.revoke("team")
            for _ in range(1000):
                if keyring.find(secret) is None:
                    break
                await asyncio.sleep(0.01)
            assert (await http.post(url, json=body, headers=owner)).status_code == 401
            drained = await admin.post("/drain", json={"seconds": 5})
            assert drained.json()["drained"] is True
            assert (await http.post(url, json=body, headers=owner)).status_code in (401, 503)
        gateway.close()
    assert store.list()[0].requests == 2 and store.list()[0].tokens > 0


class Known:
    """The catalog of one model."""

    def entries(self) -> list[dict[str, Any]]:
        return [{"id": "fake", "object": "model", "created": 1, "owned_by": "test"}]

    def choose(self, exchange: Any) -> Any:
        from agentopt.serving._types import Choice

        if exchange.asked not in ("", "fake"):
            raise Refusal(404, "no such model")
        return Choice("fake")

    def hold(self, choice: Any) -> Any:
        from contextlib import nullcontext

        return nullcontext()
