"""One acceptance test per command, as a subprocess, with the words and exit codes a user meets."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import agentopt as ao

Run = Callable[..., subprocess.CompletedProcess[str]]

DATA = ("--train", "train.jsonl", "--val", "val.jsonl", "--test", "test.jsonl", "--metric", "exact_match")
TUNE = ("tune", "agent.py:colour", *DATA, "--budget", "rollouts=400")


def tuned(agentopt: Run) -> str:
    done = agentopt(*TUNE, "--json")
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["run_id"])


def test_tune_improves_reports_and_leaves_files(agentopt: Run, project: Path) -> None:
    done = agentopt(*TUNE)
    assert done.returncode == 0, done.stderr
    assert "Improved: 0.000" in done.stdout
    assert "colour.instruction" in done.stdout
    assert "- Say something." in done.stdout
    assert "baseline" in done.stderr
    folder = next((project / ".agentopt" / "runs").iterdir())
    assert {path.name for path in folder.iterdir()} == {"best.json", "config.json", "report.html"}
    assert ao.load(folder / "best.json")["colour.instruction"] != "Say something."
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Improved" in page
    assert "http://" not in page
    assert "https://" not in page
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


def test_tune_json_is_one_object_and_nothing_else(agentopt: Run) -> None:
    done = agentopt(*TUNE, "--json")
    result = json.loads(done.stdout)
    assert result["claim"]["status"] == "improved"
    assert result["cost"]["rollouts"] <= 400
    assert done.stderr == ""


def test_tune_reads_agentopt_toml(agentopt: Run, project: Path) -> None:
    (project / "agentopt.toml").write_text(
        'target = "agent.py:colour"\ntrain = "train.jsonl"\nval = "val.jsonl"\ntest = "test.jsonl"\n'
        'metric = "exact_match"\n[budget]\nrollouts = 400\n',
        encoding="utf-8",
    )
    done = agentopt("tune", "--quiet", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    config = json.loads(next((project / ".agentopt" / "runs").iterdir()).joinpath("config.json").read_text())
    assert config["seed"] == 3


def test_one_file_is_split_and_small_test_sets_make_no_claim(agentopt: Run) -> None:
    done = agentopt("tune", "agent.py:colour", "--train", "train.jsonl", "--metric", "exact_match")
    assert done.returncode == 0, done.stderr
    assert "no claim" in done.stdout


def test_evaluate_prints_score_interval_and_examples(agentopt: Run, project: Path) -> None:
    done = agentopt("evaluate", "agent.py:colour", "--data", "test.jsonl", "--metric", "exact_match")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0.000")
    assert "36 rows" in done.stdout
    ao.Candidate({"colour.instruction": "Answer blue, green or red."}).save(project / "good.json")
    better = agentopt(
        "evaluate",
        "agent.py:colour",
        "--data",
        "test.jsonl",
        "--metric",
        "exact_match",
        "--candidate",
        "good.json",
        "--json",
    )
    assert json.loads(better.stdout)["mean"] == 1.0


def test_runs_ls_show_diff_and_export(agentopt: Run, project: Path) -> None:
    run = tuned(agentopt)
    listing = agentopt("runs", "ls")
    assert run in listing.stdout
    assert "improved" in listing.stdout
    shown = agentopt("runs", "show", run[:-1])
    assert "accepted" in shown.stdout
    assert json.loads(agentopt("runs", "show", "last", "--json").stdout)["id"] == run
    assert "- Say something." in agentopt("runs", "diff", run).stdout
    assert "no parameter differs" in agentopt("runs", "diff", run, run).stdout
    for name in ("best.toml", "best.json"):
        assert agentopt("export", run, "--out", name).returncode == 0
        assert ao.load(project / name)["colour.instruction"] != "Say something."


def test_resuming_a_finished_run_gives_the_same_result(agentopt: Run) -> None:
    run = tuned(agentopt)
    again = agentopt("runs", "resume", run, "--json")
    assert json.loads(again.stdout)["run_id"] == run
    other = agentopt("tune", "--resume", run, "--json")
    assert json.loads(other.stdout) == json.loads(again.stdout)
    unknown = agentopt("tune", "--resume", "20200101")
    assert unknown.returncode == 2
    assert "20200101" in unknown.stderr
    assert run in unknown.stderr


def test_trace_show_prints_a_tree_and_one_op(agentopt: Run, project: Path) -> None:
    code = (
        "import agentopt as ao, agent, asyncio\n"
        "with ao.record() as recording:\n"
        "    asyncio.run(agent.colour('the sky'))\n"
        "recording.trace.save('one.trace.jsonl')\n"
    )
    (project / "record.py").write_text(code, encoding="utf-8")
    import sys

    subprocess.run([sys.executable, "record.py"], cwd=project, check=True)
    done = agentopt("trace", "show", "one.trace.jsonl")
    assert done.returncode == 0, done.stderr
    for word in ("colour", "length", "lm", "colour.instruction", "Say something."):
        assert word in done.stdout
    data = json.loads(agentopt("trace", "show", "one.trace.jsonl", "--json").stdout)
    assert data
    number = next(line.split("#")[1].split()[0] for line in done.stdout.splitlines() if "length" in line)
    assert "inputs" in agentopt("trace", "show", "one.trace.jsonl", "--op", number).stdout


def test_doctor_tells_what_is_installed(agentopt: Run) -> None:
    done = agentopt("doctor", "--no-engine")
    assert "agentopt" in done.stdout
    assert "provider keys" in done.stdout
    names = {check["name"] for check in json.loads(agentopt("doctor", "--no-engine", "--json").stdout)["checks"]}
    assert {"python", "store", "xllamacpp", "litellm"} <= names


def test_help_lists_every_command(agentopt: Run) -> None:
    for word in ("tune", "evaluate", "runs", "trace", "export", "doctor"):
        assert word in agentopt("--help").stdout
    assert agentopt("--version").stdout.strip() == f"agentopt {ao.__version__}"


BAD = {
    "missing file": (("tune", "agent.py:colour", "--train", "nowhere.jsonl", "--metric", "f1"), ["nowhere.jsonl"]),
    "wrong column": ((*TUNE, "--inputs", "thinge"), ["thinge", "thing"]),
    "wrong label": ((*TUNE, "--label", "answerr"), ["answerr", "expected"]),
    "unknown metric": ((*TUNE, "--metric", "exact_mach"), ["exact_mach", "exact_match"]),
    "unknown model": ((*TUNE, "--model", "agent=embedded/smolm"), ["embedded/smolm", "smollm2"]),
    "target not found": (("tune", "agent.py:color", *DATA), ["color", "colour"]),
    "target file not found": (("tune", "agnt.py:colour", *DATA), ["agnt.py"]),
    "target without parameters": (("tune", "plain.py:constant", *DATA), ["constant", "ao.prompt"]),
    "empty dataset": (("tune", "agent.py:colour", "--train", "empty.jsonl", "--metric", "f1"), ["empty.jsonl"]),
    "broken line": (("tune", "agent.py:colour", "--train", "broken.jsonl", "--metric", "f1"), ["broken.jsonl", "2"]),
    "invalid toml key": (("tune", "--config", "bad.toml"), ["bad.toml", "metrik", "metric"]),
    "budget too small": ((*TUNE[:-1], "rollouts=30"), ["rollouts=30", "one proposal"]),
    "unknown budget": ((*TUNE[:-1], "rolouts=30"), ["rolouts"]),
    "unknown optimizer": ((*TUNE, "--optimizer", "optoprim"), ["optoprim"]),
    "unknown driver": ((*TUNE, "--driver", "greedi"), ["greedi"]),
    "glob without match": ((*TUNE, "--tune", "nothing.*"), ["nothing.*", "colour.instruction"]),
    "nothing left": ((*TUNE, "--freeze", "*"), ["freeze"]),
    "nothing given": (("tune",), ["target"]),
    "unknown option": (("tune", "--bogus"), ["--bogus"]),
    "no store": (("tune", "--resume", "20200101"), ["no store here"]),
    "no such trace": (("trace", "show", "none.trace.jsonl"), ["none.trace.jsonl"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_sentence_and_exit_code_2(agentopt: Run, project: Path, case: str) -> None:
    (project / "empty.jsonl").write_text("", encoding="utf-8")
    (project / "broken.jsonl").write_text('{"thing": "sky", "expected": "blue"}\n{"thing": \n', encoding="utf-8")
    (project / "bad.toml").write_text('metrik = "f1"\n', encoding="utf-8")
    (project / "plain.py").write_text("def constant(thing: str) -> str:\n    return 'blue'\n", encoding="utf-8")
    arguments, words = BAD[case]
    done = agentopt(*arguments)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
