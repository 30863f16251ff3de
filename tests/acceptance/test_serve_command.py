"""`agentopt serve` as a person runs it: the address it prints, its commands, and mistakes.

All of it with the engine that repeats what it is told.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from tests.acceptance.conftest import Shell
from tests.acceptance.served import ENVIRONMENT, FAKE, HELLO, PATIENCE, Server, asked, client, server, until
from tests.acceptance.warm import WarmCommands
from tests.serving.adapters.folders import adapter, base_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


# --- one server that has everything ----------------------------------------------------------------------------------


class Full:
    """A server with keys, capture and a tuned prompt, and the commands that go with it."""

    def __init__(self, folder: Path, warm: WarmCommands, running: Server, key: str) -> None:
        self.folder, self.running, self.key = folder, running, key
        self.serving = running.serving()
        self.agentopt = Shell(folder, warm)
        self.openai = client(self.serving, key)

    def json(self, *arguments: str) -> Any:
        """What a command says in JSON."""
        done = self.agentopt("serve", *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, warm: WarmCommands) -> Iterator[Full]:
    folder = tmp_path_factory.mktemp("full")
    base_folder(folder / "double")
    adapter(folder / "handbook")
    adapter(folder / "pricelist")
    ao.Candidate({"desk.instruction": "Answer as a pirate."}).save(folder / "pirate.json")
    made = Shell(folder, warm)(
        "serve", "keys", "create", "first-client", "--keys", "keys.db", "--rpm", "1000", "--json"
    )
    key = json.loads(made.stdout)["key"]
    options = ("--keys", "keys.db", "--capture", "--candidate", "desk=pirate.json", "--candidate", "desk=base@0.5")
    options += ("--adapter", "handbook=handbook", "--cors", "https://app.example.org")
    with server(folder, *FAKE, *options) as running:
        yield Full(folder, warm, running, key)
        assert running.stop(signal.SIGTERM) == 0


def test_the_client_chats_streams_and_lists(full: Full) -> None:
    chatted = full.openai.chat.completions.create(model="double", messages=HELLO)
    assert chatted.choices[0].message.content == "one two three four"
    parts = list(full.openai.chat.completions.create(model="double", messages=HELLO, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == "one two three four"
    assert {model.id for model in full.openai.models.list()} >= {"double", "desk", "handbook"}


def test_without_a_key_nothing_is_answered(full: Full) -> None:
    status, headers, said = asked(f"{full.serving['base_url']}/models")
    assert (status, headers["www-authenticate"][:6]) == (401, "Bearer")
    assert said["error"]["type"] == "authentication_error"
    health = full.serving["base_url"].removesuffix("/v1")
    assert asked(f"{health}/health")[0] == asked(f"{health}/ready")[0] == 200
    assert asked(f"{health}/metrics", key=full.key)[0] == 404


def test_status_says_what_it_serves(full: Full) -> None:
    status = full.json("status")
    assert status["engine"]["name"] == "fake"
    assert status["model"] == "double"
    assert status["base_url"] == full.serving["base_url"]
    shown = full.agentopt("serve", "status")
    assert shown.returncode == 0
    assert "double" in shown.stdout
    assert max(len(line) for line in shown.stdout.splitlines()) <= 80


def test_variants_are_compared(full: Full) -> None:
    for number in range(4):
        full.openai.chat.completions.create(model="desk", messages=HELLO, user=f"user {number}")
    rows = full.json("variants")
    rows = rows if isinstance(rows, list) else next(iter(rows.values()))
    assert {row["variant"] for row in rows} == {"pirate", "base"}
    assert sum(row["requests"] for row in rows) >= 4
    assert full.agentopt("serve", "variants").returncode == 0


def test_a_tuned_prompt_is_a_model(full: Full) -> None:
    _, headers, _ = asked(
        f"{full.serving['base_url']}/chat/completions", {"model": "desk", "messages": HELLO}, key=full.key
    )
    assert headers["x-agentopt-variant"] in ("desk/pirate", "desk/base")


def test_adapters_come_and_go_while_it_runs(full: Full) -> None:
    def names() -> set[str]:
        return {model.id for model in full.openai.models.list()}

    assert full.agentopt("serve", "adapters", "add", "prices=pricelist").returncode == 0
    assert {"handbook", "prices"} <= names()
    assert full.openai.chat.completions.create(model="prices", messages=HELLO).model == "prices"
    listed = full.agentopt("serve", "adapters", "list")
    assert "prices" in listed.stdout
    assert max(len(line) for line in listed.stdout.splitlines()) <= 80
    again = full.agentopt("serve", "adapters", "add", "double=pricelist")
    assert (again.returncode, "double" in again.stderr) == (2, True)
    assert full.agentopt("serve", "adapters", "remove", "prices").returncode == 0
    assert "prices" not in names()


def test_pages_of_the_named_origin_may_ask(full: Full) -> None:
    url = f"{full.serving['base_url']}/models"
    _, headers, _ = asked(url, key=full.key, Origin="https://app.example.org")
    assert headers["access-control-allow-origin"] == "https://app.example.org"
    _, headers, _ = asked(url, key=full.key, Origin="https://elsewhere.example.org")
    assert "access-control-allow-origin" not in headers


def test_traffic_and_feedback_are_in_the_store(full: Full) -> None:
    base, body = full.serving["base_url"], {"model": "double", "messages": HELLO}
    _, headers, _ = asked(f"{base}/chat/completions", body, key=full.key)
    given = {"request_id": headers["x-request-id"], "score": "up", "text": "just so"}
    status, _, said = asked(f"{base}/feedback", given, key=full.key)
    assert (status, said["request_id"]) == (200, headers["x-request-id"])
    listed = full.agentopt("runs", "ls", "--json")
    assert any(run["id"] == full.serving["captured_as"] for run in json.loads(listed.stdout)), listed.stdout


def test_a_comparison_goes_on_in_the_next_server(full: Full) -> None:
    base = full.serving["base_url"]
    _, headers, _ = asked(f"{base}/chat/completions", {"model": "desk", "messages": HELLO}, key=full.key)
    liked = {"request_id": headers["x-request-id"], "score": 1}
    assert asked(f"{base}/feedback", liked, key=full.key)[0] == 200
    options = ("--capture", "--candidate", "desk=pirate.json", "--candidate", "desk=base@0.5", "--run-dir", "second")
    with server(full.folder, *FAKE, *options) as running:
        running.serving()
        about = json.loads((full.folder / "second" / "server.json").read_text(encoding="utf-8"))
        _, _, said = asked(f"{about['admin_url']}/variants", key=about["admin_token"])
        assert running.stop() == 0
    rows = {f"desk/{row['variant']}": row for row in said["variants"]}
    assert rows[headers["x-agentopt-variant"]]["feedback"]["n"] >= 1


def lists(openai: Any) -> bool:
    """Whether the key is taken."""
    from openai import AuthenticationError

    try:
        return bool(openai.models.list().data)
    except AuthenticationError:
        return False


def test_keys_are_listed_and_revoked_while_it_runs(full: Full) -> None:
    made = full.json("keys", "create", "second-client", "--keys", "keys.db")
    second = client(full.serving, made["key"])
    until(lambda: lists(second))
    listed = full.agentopt("serve", "keys", "list", "--keys", "keys.db")
    assert "second-client" in listed.stdout
    assert made["key"] not in listed.stdout
    assert full.agentopt("serve", "keys", "revoke", "second-client", "--keys", "keys.db").returncode == 0
    until(lambda: not lists(second))


def test_the_admin_side_has_metrics_and_needs_its_token(full: Full) -> None:
    admin = full.serving["admin_url"]
    status, _, text = asked(f"{admin}/metrics")
    assert status == 200
    assert "agentopt_engine_up 1" in text
    assert asked(f"{admin}/status")[0] == 401


def test_the_run_folder_is_for_its_owner_alone(full: Full) -> None:
    place = full.folder / full.serving["run_dir"]
    about = json.loads((place / "server.json").read_text(encoding="utf-8"))
    assert stat.S_IMODE((place / "server.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert about["pid"] == full.running.process.pid
    log = (place / "gateway.log").read_text(encoding="utf-8")
    assert full.key not in log + (place / "engine.log").read_text(encoding="utf-8")
    assert "one two three four" not in log


def test_a_second_server_is_told_of_the_first(full: Full) -> None:
    port = full.serving["base_url"].rpartition(":")[2].removesuffix("/v1")
    done = full.agentopt("serve", *FAKE, "--port", port)
    assert done.returncode == 2
    assert f"--port {port}: cannot listen on 127.0.0.1:{port}: another program listens there" in done.stderr
    done = full.agentopt("serve", *FAKE, "--port", "0", "--run-dir", full.serving["run_dir"])
    assert done.returncode == 2
    assert f"found a server that runs (process {full.running.process.pid})" in done.stderr


# --- what a person sees ----------------------------------------------------------------------------------------------


def test_the_printed_line_works(folder: Path) -> None:
    """The terminal's form: at most 80 columns where nothing is to be copied, and a curl line that runs."""
    command = [sys.executable, "-m", "agentopt", "serve", *FAKE, "--port", "0"]
    with (folder / "err.txt").open("w", encoding="utf-8") as err:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, stderr=err, text=True
        )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("Ctrl-C"):
                break
        curl = "\n".join(line for line in lines if line.startswith("  "))
        done = subprocess.run(["bash", "-c", f"{curl} -sS"], capture_output=True, text=True, timeout=PATIENCE)
        assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "Say hello."
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    told = (folder / "err.txt").read_text(encoding="utf-8")
    assert re.search(r"^ready +fake answers", told, re.MULTILINE)
    assert re.search(r"^stopped +cleanly after 1 request", told, re.MULTILINE)
    assert max(len(line) for line in [*lines, *told.splitlines()]) <= 80


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("./nowhere",), "model './nowhere': no such folder"),
        (("stauts",), "is the command agentopt serve status meant?"),
        (("drain", "extra"), "extra"),
        (("--port", "9", "drain"), "write it first: agentopt serve drain"),
        (("double", "more", "--engine", "fake"), "more"),
        ((*FAKE, "--keys", "nowhere.db"), "nowhere.db"),
        ((*FAKE, "--keys", "text.db"), "text.db"),
        ((*FAKE, "--candidate", "desk=nowhere.json"), "nowhere.json"),
        ((*FAKE, "--candidate", "double=pirate.json"), "double"),
        ((*FAKE, "--host", "0.0.0.0"), "other machines could use the model without a key"),
        ((*FAKE, "--", "--uds", "x"), "--uds"),
        (("embedded", "--engine", "vllm"), "a Python without vLLM"),
        (
            ("embedded", "--engine", "embedded", "--adapter", "a=nowhere"),
            "a=nowhere: expected the folder of an adapter",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    agentopt: Shell, project: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    if "vllm" in arguments:  # also where there is one, it is not found
        monkeypatch.setenv("AGENTOPT_VLLM_PYTHON", sys.executable)
    (project / "text.db").write_text("no database", encoding="utf-8")
    ao.Candidate({"desk.instruction": "Answer as a pirate."}).save(project / "pirate.json")
    port = () if "--port" in arguments else ("--port", "0")
    done = agentopt("serve", *port, *arguments, timeout=240)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_admin_port_is_told(agentopt: Shell) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = agentopt("serve", *FAKE, "--port", "0", "--admin-port", str(port))
    assert done.returncode == 2
    assert f"--admin-port {port}: cannot listen on 127.0.0.1:{port}" in done.stderr


def test_a_folder_called_like_a_command_is_served_by_its_path(agentopt: Shell, project: Path) -> None:
    (project / "keys").mkdir()
    done = agentopt("serve", "./keys", "--port", "0")
    assert done.returncode == 2
    assert "found a folder without config.json" in done.stderr


@pytest.mark.parametrize("command", [(), ("keys",), ("keys", "create"), ("adapters", "add"), ("status",), ("drain",)])
def test_help_reads_in_80_columns(agentopt: Shell, command: tuple[str, ...]) -> None:
    done = agentopt("serve", *command, "--help")
    assert done.returncode == 0
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    if not command:
        assert done.stdout.startswith("Usage: ")
        assert "serve MODEL [OPTIONS] [-- ENGINE OPTIONS]" in done.stdout
        assert all(f"\n  {name} " in done.stdout for name in ("status", "variants", "drain", "keys", "adapters"))


@pytest.mark.parametrize("command", ["status", "variants", "drain"])
def test_without_a_server_there_is_nothing_to_ask(agentopt: Shell, command: str) -> None:
    done = agentopt("serve", command)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
