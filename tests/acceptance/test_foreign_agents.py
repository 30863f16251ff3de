"""Agents that were not written for agentopt: a client of their own, threads of their own, a prompt read too early."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]

DATA = ("--train", "train.jsonl", "--val", "val.jsonl", "--test", "test.jsonl", "--metric", "exact_match")
BUDGET = ("--budget", "rollouts=400")

OPENAI_CLIENT = """
import openai
import agentopt as ao
from agent import answer

instruction = ao.prompt("Say something.", name="plain.instruction")
ao.configure(models={"agent": ao.FunctionLM(answer, name="colour-knower")})
client = None


async def colour(thing: str) -> str:
    global client
    if client is None:
        client = openai.AsyncOpenAI()
    messages = [{"role": "system", "content": str(instruction)}, {"role": "user", "content": thing}]
    reply = await client.chat.completions.create(model="any-name", messages=messages)
    return reply.choices[0].message.content
"""

OWN_THREAD = """
import threading
import agentopt as ao

instruction = ao.prompt("Say something.", name="thread.instruction")


def colour(thing: str) -> str:
    found = []
    worker = threading.Thread(target=lambda: found.append(str(instruction)))
    worker.start()
    worker.join()
    return found[0] if found else "nothing"
"""

BOUND_THREAD = OWN_THREAD.replace(
    "target=lambda: found.append(str(instruction))", "target=ao.bind_context(lambda: found.append(str(instruction)))"
)

IMPORT_TIME = """
import agentopt as ao

instruction = ao.prompt("Say something.", name="early.instruction")
other = ao.prompt("Unused by mistake.", name="early.frozen")
FROZEN = f"{other}"


def colour(thing: str) -> str:
    return "blue" if "blue" in str(instruction) else FROZEN
"""


def test_an_agent_with_a_plain_openai_client_is_seen_cached_and_tuned(agentopt: Run, project: Path) -> None:
    (project / "plain_client.py").write_text(OPENAI_CLIENT, encoding="utf-8")
    done = agentopt("tune", "plain_client.py:colour", *DATA, *BUDGET, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["claim"]["status"] == "improved"
    assert result["cost"]["calls"] > 0


def test_a_thread_that_lost_its_context_stops_the_run_with_place_and_fix(agentopt: Run, project: Path) -> None:
    (project / "own_thread.py").write_text(OWN_THREAD, encoding="utf-8")
    done = agentopt("tune", "own_thread.py:colour", *DATA, *BUDGET)
    assert done.returncode == 2
    for word in ("thread.instruction", "own_thread.py:10", "ao.bind_context"):
        assert word in done.stderr.replace("\n", "")


def test_a_thread_that_carries_its_context_is_tuned(agentopt: Run, project: Path) -> None:
    (project / "bound_thread.py").write_text(BOUND_THREAD, encoding="utf-8")
    done = agentopt("tune", "bound_thread.py:colour", *DATA, *BUDGET)
    assert done.returncode == 0, done.stderr


def test_a_prompt_read_at_import_time_is_a_warning_with_the_place(agentopt: Run, project: Path) -> None:
    (project / "import_time.py").write_text(IMPORT_TIME, encoding="utf-8")
    done = agentopt("tune", "import_time.py:colour", *DATA, *BUDGET)
    assert done.returncode == 0, done.stderr
    for word in ("early.frozen", "import_time.py:6"):
        assert word in done.stdout.replace("\n", "")
