"""A small project in an empty folder, and the command line run on it as a user does: as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.acceptance.served import CLIENTS
from tests.acceptance.warm import WarmCommands

AGENT = '''
import agentopt as ao

COLOURS = {"sky": "blue", "sea": "blue", "grass": "green", "leaf": "green", "rose": "red", "blood": "red"}
LABELS = ["blue", "green", "red"]
instruction = ao.prompt("Say something.", name="colour.instruction")


def answer(request):
    """A model that knows the right colour and only says it when the instruction names the labels."""
    text = str(request.messages[-1]["content"]) + " ".join(str(m["content"]) for m in request.messages[:-1])
    thing = next((word for word in COLOURS if word in str(request.messages[-1]["content"])), "sky")
    return COLOURS[thing] if all(label in text for label in LABELS) else "grey"


ao.configure(models={"agent": ao.FunctionLM(answer, name="colour-knower")})


@ao.tool
def length(thing: str) -> int:
    """Letters of the word."""
    return len(thing)


@ao.agent
async def colour(thing: str) -> str:
    length(thing)
    reply = await ao.lm("agent").complete(system=instruction, user=thing)
    return reply.text


def constant(thing: str) -> str:
    return "blue"
'''


@dataclass
class Shell:
    """Runs `agentopt ...` in the project folder: a fork of a process that has it imported, or from a `cold` start."""

    folder: Path
    warm: WarmCommands

    def __call__(self, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        done = self.warm.run(arguments, self.folder, self.environment(), b"", timeout)
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def cold(self, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "agentopt", *arguments],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    @staticmethod
    def environment() -> dict[str, str]:
        return {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmCommands]:
    commands = WarmCommands()
    yield commands
    commands.close()


@pytest.fixture(autouse=True, scope="module")
def clients_are_closed() -> Iterator[None]:
    """Those of tests with `agentopt serve`."""
    yield
    CLIENTS.close()


def write_rows(path: Path, start: int, number: int) -> None:
    things = ["sky", "sea", "grass", "leaf", "rose", "blood"]
    colours = ["blue", "blue", "green", "green", "red", "red"]
    rows = [
        {"thing": f"the {things[i % 6]} seen on day {i}", "expected": colours[i % 6]}
        for i in range(start, start + number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "agent.py").write_text(AGENT, encoding="utf-8")
    for name, start, number in (("train", 0, 24), ("val", 100, 24), ("test", 200, 36)):
        write_rows(tmp_path / f"{name}.jsonl", start, number)
    return tmp_path


@pytest.fixture
def agentopt(project: Path, warm: WarmCommands) -> Shell:
    return Shell(project, warm)
