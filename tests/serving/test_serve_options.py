"""What `agentopt serve` can be told: what fits together, what would do nothing, and what is not safe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentopt.cli._serve import settings_of
from agentopt.errors import UserError
from agentopt.serving import ServeOptions, serve_forever


def options(**given: Any) -> ServeOptions:
    return ServeOptions.of({"model": "embedded", **given}, "command line")


@pytest.fixture(autouse=True)
def no_keys_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTOPT_KEYS", raising=False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": None}, "MODEL is missing: give embedded"),
        ({"cors": "https://app.example.org"}, "--cors: found 'https://app.example.org', expected a list"),
        ({"engine_options": ("--port", "5")}, "engine argument '--port': the server sets"),
        ({"port": 70000}, "--port: found 70000, expected less than or equal to 65535"),
        ({"engine": "vlm"}, "--engine: found 'vlm', expected 'auto', 'vllm'"),
        ({"enginee": "vllm"}, "unknown option 'enginee'; did you mean 'engine'?"),
        ({"adapters": ("handbook",)}, "--adapter: found 'handbook', expected NAME=DIR"),
        ({"adapters": ("a=x", "a=y")}, "the name 'a' is given twice"),
        ({"adapters": ("a=x",), "resident": 0}, "--resident 0 serves no adapter"),
        ({"name": "two words"}, "--name: found 'two words'"),
        ({"host": "0.0.0.0"}, "--host 0.0.0.0: other machines could use the model without a key"),
        ({"host": "example.org"}, "give --keys FILE"),
        ({"open": True, "keys": "k.db"}, "--open means no keys"),
        ({"admin_port": 8000}, "--admin-port 8000 is the public port"),
        ({"port": 65535}, "there is none after it"),
        ({"capsule_tokens": 300}, "--capsule-tokens does nothing without --capsule"),
        ({"redact": ("x",)}, "--redact does nothing without --capture"),
        ({"capture_days": 30}, "--capture-days does nothing without --capture"),
        ({"capture": True, "capture_days": 0}, "--capture-days: found 0, expected greater than 0"),
        ({"cors": ("example.org",)}, "--cors: found 'example.org', expected an origin"),
        ({"upstream": "10.0.0.5:8000"}, "--upstream '10.0.0.5:8000': expected http://HOST:PORT/v1"),
        ({"upstream": "http://x", "quantize": "rf8"}, "--quantize: nothing is started with --upstream"),
        ({"upstream": "http://x", "engine_options": ("--seed", "1")}, "options after --: nothing is started"),
        ({"upstream": "http://x", "engine": "vllm"}, "--engine vllm: the engine of --upstream runs already"),
        ({"upstream": "http://x", "adapters": ("a=b",)}, "are loaded where it was started"),
    ],
)
def test_a_mistake_is_one_sentence(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        options(**given)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_this_machine_may_be_served_without_keys(host: str) -> None:
    assert options(host=host).keys_file is None


def test_other_machines_need_keys_or_a_clear_word(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options(host="0.0.0.0", keys="k.db").keys_file == "k.db"
    assert options(host="0.0.0.0", open=True).keys_file is None
    monkeypatch.setenv("AGENTOPT_KEYS", "from-environment.db")
    assert options(host="0.0.0.0").keys_file == "from-environment.db"
    assert options(host="0.0.0.0", open=True).keys_file is None


def test_the_admin_side_has_the_port_after() -> None:
    assert options().admin == 8001
    assert options(port=0).admin == 0
    assert options(admin_port=9).admin == 9


def test_the_table_of_a_file_is_below_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    (folder / "base").mkdir(parents=True)
    (folder / "agentopt.toml").write_text(
        'seed = 3\n[serve]\nmodel = "base"\nport = 9000\nkeys = "keys.db"\n'
        '[serve.adapters]\nhandbook = "adapters/handbook"\n'
        '[serve.candidates]\nsupport = ["best.json?system=a.b@3", "base@1"]\n',
        encoding="utf-8",
    )
    found = settings_of({"port": 9100, "name": None}, str(folder / "agentopt.toml"))
    assert found.model == str(folder / "base")
    assert found.port == 9100
    assert found.keys == str(folder / "keys.db")
    assert found.adapter_pairs() == {"handbook": str(folder / "adapters/handbook")}
    assert found.candidates == (f"support={folder / 'best.json'}?system=a.b@3", "support=base@1")


def test_a_wrong_key_of_the_table_is_told_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "agentopt.toml").write_text('[serve]\nmodle = "embedded"\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"\[serve\]: unknown option 'modle'; did you mean 'model'\?"):
        settings_of({}, None)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs httptools and prometheus_client: pip install 'agentopt\[serve\]'"):
        serve_forever(options(), print)


def test_other_commands_leave_the_table_alone(tmp_path: Path) -> None:
    from agentopt.cli._settings import load_settings

    (tmp_path / "agentopt.toml").write_text('seed = 3\n[serve]\nmodel = "embedded"\n', encoding="utf-8")
    assert load_settings(None, {}).seed == 3
