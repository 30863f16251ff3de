"""Optimizers, drivers, objectives and executors from the command line, with the words and exit codes a user meets."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

DATA = ("--train", "train.jsonl", "--val", "val.jsonl", "--test", "test.jsonl", "--metric", "exact_match")
TUNE = ("tune", "agent.py:colour", *DATA, "--budget", "rollouts=300")

GARBAGE = '''
import hashlib
import agentopt as ao
from agent import answer, colour

JUNK = ["", "I cannot help with that.", '{"suggestion": {"colour.instruction": "Answ', "lorem ipsum dolor", "[]", "```"]


def junk(request):
    """Random text, nothing, truncated JSON, refusals."""
    return JUNK[int(hashlib.sha256(repr(request.messages).encode()).hexdigest(), 16) % len(JUNK)]


ao.configure(
    models={
        "agent": ao.FunctionLM(answer, name="colour-knower"),
        "optimizer": ao.FunctionLM(junk, name="talks-garbage"),
    }
)
'''

PIPELINE = """
import agentopt as ao
from agent import answer

ANSWER = (
    '{"analysis": "no labels", "problem": "no labels", "suggestion": "name the labels", "demand_on_previous": "", '
    '"score": 0, "comments": "no label", "text": "Answer blue, green or red: {thing}"}'
)
pipe = ao.Pipeline(
    {
        "nodes": {"look": {"prompt": "Look at {thing}."}, "say": {"prompt": {"task": "Say something: {thing}"}}},
        "edges": {"look": ["say"], "say": ["end"]},
    },
    name="pipe",
)
ao.configure(
    models={
        "agent": ao.FunctionLM(answer, name="colour-knower"),
        "optimizer": ao.FunctionLM(lambda request: ANSWER, name="names-the-labels"),
    }
)
"""

PARTS = '''
import agentopt as ao
from agent import answer
from agentopt import graph
from agentopt.optimizers import Update

NEW_TOOL = """
def colour_of(thing: str) -> str:
    "The colour of a thing that is often seen, by the word that names it."
    known = {"sky": "blue", "sea": "blue", "grass": "green", "leaf": "green", "rose": "red", "blood": "red"}
    return next((colour for word, colour in known.items() if word in thing), "grey")
"""
rules = ao.principles(["Answer in one word.", "Do not guess."], name="desk.rules")


def lookup(order: str) -> dict:
    """Look an order up by its number."""
    return {"order": order, "price": 10}


tools = ao.toolbox([lookup], name="desk.tools")


@ao.tool
def first(text: str) -> str:
    """First word."""
    return text.split()[0]


@ao.agent
async def colour(thing: str) -> str:
    tools.call("lookup", {"order": first(thing)})
    reply = await ao.lm("agent").complete(system=rules, user=thing)
    return reply.text


class Toolmaker:
    name = "toolmaker"

    def propose(self, context):
        edits = (
            graph.CreateTool("desk.tools", "colour_of", "Gives the colour of a thing.", NEW_TOOL),
            graph.SetCode("first.code", 'def first(text: str) -> str:\\n    return text.partition(" ")[0]'),
            graph.AddPrinciple("desk.rules", "Say blue, green or red."),
        )
        return [Update(edits, "tools for colours", self.name)]


if __name__ == "__main__":
    ao.configure(models={"agent": ao.FunctionLM(answer, name="colour-knower")})
    ao.tune(
        colour,
        train="train.jsonl",
        val="val.jsonl",
        test="test.jsonl",
        metric="exact_match",
        optimizer=Toolmaker(),
        driver="greedy",
        budget=ao.Budget(rollouts=300),
        options=ao.TuneOptions(tune=("desk.*", "first.code"), sandbox="process"),
    )
'''


def narrow(text: str) -> bool:
    return max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize("driver", ["greedy", "beam", "ucb", "pareto", "bayes", "islands"])
def test_every_driver_finishes_and_is_named(agentopt: Run, driver: str) -> None:
    done = agentopt(*TUNE, "--driver", driver, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["driver"], result["driver_reason"]) == (driver, "as asked")
    assert result["claim"]["status"] == "improved"
    assert result["cost"]["rollouts"] <= 300
    shown = agentopt("runs", "show", "last").stdout
    assert f"optimizer auto, driver {driver} (as asked)" in shown
    assert narrow(shown)


def test_auto_says_which_driver_it_took_and_why(agentopt: Run) -> None:
    done = agentopt(*TUNE)
    found = json.loads(agentopt("runs", "show", "last", "--json").stdout)
    assert found["driver_reason"].startswith("auto: ")
    assert f"driver {found['driver']} ({found['driver_reason']})" in " ".join(done.stderr.split())


BAD = {
    "driver": (("--driver", "nonsense"), ["nonsense", "pareto", "islands"]),
    "optimizer": (("--optimizer", "nonsense"), ["nonsense", "reflection", "symbolic"]),
    "one of two optimizers": (("--optimizer", "grounded+nonsense"), ["nonsense", "grounded"]),
    "objective": (("--objectives", "speed"), ["speed", "latency"]),
    "objective twice": (("--objectives", "score,tokens,tokens"), ["twice"]),
    "sandbox": (("--sandbox", "nonsense"), ["nonsense", "namespace"]),
    "executor": (("--executor", "nonsense"), ["nonsense", "local", "ray"]),
    "no workers": (("--executor", "ray", "--workers", "0"), ["workers", "0", "greater than or equal to 1"]),
    "workers without ray": (("--workers", "2"), ["--executor ray", "--concurrency"]),
    "template": (("--template", "nowhere.txt"), ["nowhere.txt"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_choice_is_one_sentence_and_exit_code_2(agentopt: Run, case: str) -> None:
    arguments, words = BAD[case]
    done = agentopt(*TUNE, *arguments)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert done.stderr.startswith("agentopt: ")
    assert len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr


def test_objectives_print_the_front_and_the_report_holds_the_trade_offs(agentopt: Run, project: Path) -> None:
    done = agentopt(*TUNE, "--objectives", "score,tokens", "--optimizer", "instructions-free")
    assert done.returncode == 0, done.stderr
    assert "driver pareto (auto: 2 objectives" in " ".join(done.stderr.split())
    assert "on the front" in done.stdout
    assert "prompt tokens" in done.stdout
    assert narrow(done.stdout)
    page = next((project / ".agentopt" / "runs").glob("*/report.html")).read_text(encoding="utf-8")
    assert "Trade-offs" in page
    assert "on the front</span>" in page


@pytest.mark.parametrize("optimizer", ["symbolic", "reflection", "textgrad", "opro", "optoprime+code"])
def test_a_model_that_talks_garbage_keeps_the_baseline(agentopt: Run, project: Path, optimizer: str) -> None:
    (project / "garbage.py").write_text(GARBAGE, encoding="utf-8")
    done = agentopt("tune", "garbage.py:colour", *DATA, "--budget", "rollouts=200", "--optimizer", optimizer)
    assert done.returncode == 0, done.stderr
    assert "the baseline is kept" in " ".join(done.stdout.split())
    assert "no parameter differs" in done.stdout
    assert "given up: " in " ".join(done.stderr.split())
    shown = agentopt("runs", "show", "last").stdout
    assert "given up before measuring" in " ".join(shown.split())
    assert narrow(shown)
    page = next((project / ".agentopt" / "runs").glob("*/report.html")).read_text(encoding="utf-8")
    assert "Given up before measuring" in page


def test_a_pipeline_is_a_target_and_is_shown_node_by_node(agentopt: Run, project: Path) -> None:
    (project / "pipe.py").write_text(PIPELINE, encoding="utf-8")
    freeze = ("--freeze", "colour.*")
    done = agentopt(
        "tune", "pipe.py:pipe", *DATA, "--budget", "rollouts=300", "--optimizer", "symbolic-pipeline+symbolic", *freeze
    )
    assert done.returncode == 0, done.stderr
    assert "Improved" in done.stdout
    shown, changed = agentopt("runs", "show", "last").stdout, agentopt("runs", "diff", "last").stdout
    for text in (done.stdout, shown, changed):
        assert "    look -> say" in text
        assert "  +     Answer blue, green or red: {thing}" in text
        assert narrow(text)


def test_principles_tools_and_code_are_shown_as_a_person_would_write_them(agentopt: Run, project: Path) -> None:
    (project / "parts.py").write_text(PARTS, encoding="utf-8")
    run = subprocess.run([sys.executable, "parts.py"], cwd=project, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    shown, changed = agentopt("runs", "show", "last").stdout, agentopt("runs", "diff", "last").stdout
    for text in (shown, changed):
        for line in (
            "    p1: Answer in one word.",
            "  + p3: Say blue, green or red.",
            "    lookup(order): Look an order up by its number.",
            "  + colour_of(thing): Gives the colour of a thing.",
            "  -     return text.split()[0]",
        ):
            assert line in text.splitlines()
        assert narrow(text)
        assert '"helpful"' not in text
    trace = shown.split("agentopt trace show ")[1].split()[0]
    tree = agentopt("trace", "show", trace).stdout
    assert "desk.rules = p1: Answer in one word.; p2: Do not guess." in tree
    assert narrow(tree)


def test_an_interrupt_says_how_to_go_on_and_the_run_can_be_resumed(agentopt: Run, project: Path) -> None:
    (project / "slow.py").write_text(
        "import time\nfrom itertools import count\nfrom pathlib import Path\nimport agentopt as ao\n"
        "from agent import answer, colour\n\ncalls = count(1)\n\n\n"
        "def slowly(request):\n    late = next(calls) > 60  # the baseline is known\n"
        "    while late and not Path('hurry').exists():\n        time.sleep(0.05)\n    return answer(request)\n\n\n"
        'ao.configure(models={"agent": ao.FunctionLM(slowly, name="slow")})\n',
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "agentopt", "tune", "slow.py:colour", *DATA, "--budget", "rollouts=300"]

    def heed() -> None:  # a job that a shell put into the background hands on that SIGINT is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=project, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if line.startswith("baseline"))
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
    assert process.returncode == 130
    (run,) = json.loads(agentopt("runs", "ls", "--json").stdout)
    assert said.endswith(f"go on with: agentopt runs resume {run['id']}\n")
    assert run["status"] == "interrupted"
    (project / "hurry").touch()
    assert agentopt("runs", "resume", run["id"]).returncode == 0
