"""How `agentopt serve` ends, and what ends with it: Ctrl-C, drain, kill -9, engines that die or never come."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.conftest import Shell
from tests.acceptance.served import ENVIRONMENT, FAKE, HELLO, PATIENCE, Server, asked, client, gone, server, until
from tests.acceptance.warm import WarmCommands


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


LONG = {"chunks": 100_000, "rate": 10}
"""A reply that does not end while a test runs."""


def stream_of(serving: dict[str, Any], **fake: Any) -> Any:
    """A stream that goes as the fake engine is told."""
    body = {"fake": fake}
    return client(serving).chat.completions.create(model="double", messages=HELLO, stream=True, extra_body=body)


def go_on(running: Server) -> None:
    """Tell the fake engine to go on with the replies that it holds."""
    words = Path(f"/proc/{running.engine_pid}/cmdline").read_text(encoding="utf-8").split("\0")
    socket = words[words.index("--uds") + 1]  # in the run folder, unless that has too long a name
    with httpx.Client(transport=httpx.HTTPTransport(uds=socket), timeout=PATIENCE) as engine:
        assert engine.post("http://engine/control", json={"go_on": True}).status_code == 200


def test_ctrl_c_lets_a_stream_end(folder: Path) -> None:
    with server(folder, *FAKE, "--", "--control") as running:
        serving = running.serving()
        stream = stream_of(serving, hold_after=2)
        parts = [next(stream)]
        running.process.send_signal(signal.SIGINT)
        assert running.until("draining")["in_flight"] == 1
        go_on(running)
        parts += list(stream)
        assert running.end() == 0
    said = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert said == "one two three four"
    assert running.told[-1] == {"kind": "ended", "cut_off": 0}
    assert not (folder / serving["run_dir"] / "server.json").exists()
    assert gone(running.engine_pid)


def test_a_second_ctrl_c_stops_at_once(folder: Path) -> None:
    import openai

    with server(folder, *FAKE) as running:
        stream = stream_of(running.serving(), **LONG)
        next(stream)
        running.process.send_signal(signal.SIGINT)
        running.until("draining")
        running.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError):  # an event that says so, not a connection that breaks
            list(stream)
        assert running.end() == 0
    assert running.told[-1] == {"kind": "ended", "cut_off": 1}
    assert gone(running.engine_pid)


def test_killed_with_9_it_leaves_no_engine(folder: Path) -> None:
    with server(folder, *FAKE) as running:
        running.serving()
        running.process.kill()
        running.process.wait()
        assert gone(running.engine_pid)


def test_an_engine_killed_in_a_stream_is_started_again(folder: Path) -> None:
    import openai

    with server(folder, *FAKE) as running:
        serving = running.serving()
        stream = stream_of(serving, **LONG)
        next(stream)
        os.kill(running.engine_pid, signal.SIGKILL)
        with pytest.raises(openai.APIError) as raised:
            list(stream)
        assert "engine" in str(raised.value)
        running.until("ready", generation=2)
        again = client(serving).chat.completions.create(model="double", messages=HELLO)
        assert again.choices[0].message.content == "one two three four"
        assert running.stop() == 0


def test_drain_ends_it_from_elsewhere(folder: Path, warm: WarmCommands) -> None:
    with server(folder, *FAKE) as running:
        running.serving()
        assert Shell(folder, warm)("serve", "drain").returncode == 0
        assert running.end() == 0


def test_ctrl_c_before_it_serves_ends_it_as_well(folder: Path) -> None:
    with server(folder, "inner", "--upstream", f"unix://{folder}/nobody.sock") as running:
        running.until("waiting")
        assert running.stop() == 0
    assert running.told[-1] == {"kind": "ended", "cut_off": 0}


def test_an_engine_elsewhere_is_served_with_its_own_token(folder: Path) -> None:
    place = folder / "engine.sock"
    command = [sys.executable, "-m", "agentopt.serving.fake_engine", "--uds", str(place), "--model", "inner"]
    variables = {"AGENTOPT_UPSTREAM_TOKEN": "secret of the engine"}
    elsewhere = None
    try:
        with server(folder, "--upstream", f"unix://{place}", environment=variables) as running:
            url = running.until("listening")["base_url"]  # though nobody knows yet what the engine's model is called
            assert httpx.get(url.removesuffix("v1") + "health", timeout=PATIENCE).status_code == 200
            assert httpx.get(url.removesuffix("v1") + "ready", timeout=PATIENCE).status_code == 503
            elsewhere = subprocess.Popen(
                [*command, "--token", "secret of the engine"], stdout=subprocess.PIPE, env={**os.environ, **ENVIRONMENT}
            )
            serving = running.serving()
            assert (serving["model"], serving["engine"]) == ("inner", "external")
            said = client(serving).chat.completions.create(model="inner", messages=HELLO)
            assert said.choices[0].message.content == "one two three four"
            about = json.loads((folder / serving["run_dir"] / "server.json").read_text(encoding="utf-8"))
            refused = asked(f"{about['admin_url']}/adapters", key=about["admin_token"])
            assert refused[0] == 501 and "load them where that engine runs" in str(refused[2])
            assert running.stop() == 0
        assert elsewhere.poll() is None  # whoever started it stops it
    finally:
        if elsewhere is not None:
            elsewhere.kill()
            elsewhere.communicate()


def test_an_engine_that_cannot_start_is_a_failed_run(agentopt: Shell) -> None:
    done = agentopt("serve", *FAKE, "--port", "0", "--", "--no-such-option", timeout=240)
    assert done.returncode == 1
    assert "--no-such-option" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_terminal_that_is_stopped_does_not_stop_the_server(folder: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"\n" * 4096)
    os.set_blocking(writing, True)
    command = [sys.executable, "-m", "agentopt", "serve", *FAKE, "--json", "--port", "0"]
    with (folder / "stderr.txt").open("w", encoding="utf-8") as err:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | ENVIRONMENT, stdout=writing, stderr=err)
    os.close(writing)
    try:
        found = until(lambda: next(folder.glob(".agentopt/serve/*/server.json"), None))
        where = json.loads(found.read_text(encoding="utf-8"))["base_url"].removesuffix("/v1")
        until(lambda: asked(f"{where}/ready")[0] == 200)
        assert asked(f"{where}/v1/chat/completions", {"messages": HELLO})[0] == 200
        kinds: list[str] = []
        with open(reading, encoding="utf-8") as told:
            for line in filter(str.strip, told):
                kinds.append(json.loads(line)["kind"])
                if kinds[-1] == "serving":
                    process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
    assert (kinds[0], kinds[-1]) == ("engine_chosen", "ended")
