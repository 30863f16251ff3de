"""`agentopt finetune` as a person runs it: plan, progress, claim, files; killed, interrupted and resumed; bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.acceptance.warm import Run, WarmCommands
from tests.weights.moods import moods, write_rows

pytest.importorskip("torch")

ENVIRONMENT = {
    **os.environ,
    "COLUMNS": "80",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
TASK = ("model", "--data", "rows.jsonl", "--prompt", "{text} It was", "--labels", "0=terrible,1=great")
TRAIN = (*TASK, "--method", "zo-sgd-sign", "--lr", "3e-3", "--steps", "60", "--eval-every", "20", "--patience", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moods(tmp_path_factory.mktemp("finetune") / "project")


@pytest.fixture(scope="module")
def run(warm: WarmCommands, folder: Path) -> Run:
    """Commands that end before a model is needed."""
    return warm.command("finetune", folder, ENVIRONMENT)


@pytest.fixture(scope="module")
def train(folder: Path) -> Iterator[Run]:
    """Commands that train, with torch imported for all of them at once."""
    warm = WarmCommands()
    warm.import_once("transformers.models.llama.modeling_llama", "agentopt.weights.finetuning._run")
    yield warm.command("finetune", folder, ENVIRONMENT)
    warm.close()


@pytest.fixture(scope="module")
def tuned(train: Run) -> subprocess.CompletedProcess[str]:
    """A run that nothing interrupts, in `folder / "tuned"`."""
    done = train(*TRAIN, "--out", "tuned")
    assert done.returncode == 0, done.stderr
    return done


def test_a_run_shows_its_plan_its_validations_and_one_claim(
    tuned: subprocess.CompletedProcess[str], folder: Path
) -> None:
    for line in (*tuned.stderr.splitlines(), *tuned.stdout.splitlines()):
        assert len(line.rstrip()) <= 80
    for part in ("80 train, 40 validation, 40 test", "0 = terrible, 1 = great", "120 in all", "majority", "step 60"):
        assert part in " ".join(tuned.stderr.split())
    said = " ".join(tuned.stdout.split())
    assert said.startswith("Improved: accuracy ")
    assert "on 40 untouched test rows" in said
    assert "label bias removed" in said
    assert "zero-shot" in said
    result = json.loads((folder / "tuned" / "result.json").read_text(encoding="utf-8"))
    assert result["claim"]["status"] == "improved"
    assert result["test"]["tuned"] > result["test"]["zero-shot"]
    report = (folder / "tuned" / "report.md").read_text(encoding="utf-8")
    assert result["claim"]["text"] in report
    assert "- rows: 80 train, 40 validation, 40 test" in report
    assert "--labels 0=terrible,1=great --method zo-sgd-sign --steps 60 --lr 0.003" in report
    kinds = [
        json.loads(line)["kind"]
        for line in (folder / "tuned" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert kinds.count("stepped") == 60
    assert kinds[-1] == "finished"


def test_what_was_written_loads_with_transformers(tuned: subprocess.CompletedProcess[str], folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert tuned.returncode == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "tuned").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tuned")
    great, terrible = (tokenizer.convert_tokens_to_ids(word) for word in ("great", "terrible"))
    right = 0
    for text, label in (
        ("the film was kind and the room very sweet", 1),
        ("the meal was sour and the play very dark", 0),
    ):
        logits = model(**tokenizer(f"{text} It was", return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
        right += int(logits[great] > logits[terrible]) == label
    assert right >= 1


def test_the_same_command_again_gives_the_same_result_at_once(
    tuned: subprocess.CompletedProcess[str], run: Run
) -> None:
    again = run(*TRAIN, "--out", "tuned")
    assert again.returncode == 0
    assert again.stdout == tuned.stdout
    assert again.stderr == ""
    as_json = json.loads(run("--resume", "--out", "tuned", "--json").stdout)
    assert as_json["claim"]["status"] == "improved"


def test_killed_then_interrupted_then_resumed_gives_the_same_weights(
    tuned: subprocess.CompletedProcess[str], train: Run, folder: Path
) -> None:
    assert tuned.returncode == 0
    steps = folder / "again" / "steps.zo"

    def after(number: int) -> Callable[[], bool]:
        return lambda: steps.exists() and steps.stat().st_size > 700 + number * (16 + 4)

    killed = train(*TRAIN, "--out", "again", send=(signal.SIGKILL, after(10)))
    assert killed.returncode == -signal.SIGKILL
    size = steps.stat().st_size
    stopped = train("--resume", "--out", "again", send=(signal.SIGINT, after(30)))
    assert stopped.returncode == 130
    assert "resumed" in stopped.stderr
    assert "go on with: agentopt finetune --resume --out again" in stopped.stderr
    assert size < steps.stat().st_size < (folder / "tuned" / "steps.zo").stat().st_size
    done = train("--resume", "--out", "again")
    assert done.returncode == 0, done.stderr
    for name in ("steps.zo", "model.safetensors"):
        assert (folder / "again" / name).read_bytes() == (folder / "tuned" / name).read_bytes()
    claims = [json.loads((folder / name / "result.json").read_text("utf-8"))["claim"] for name in ("again", "tuned")]
    assert claims[0] == claims[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (TASK, "--out is missing"),
        (("--out", "x"), "MODEL is missing"),
        (("model", "--out", "x"), "--data is missing"),
        (("--resume", "--out", "nowhere"), "nowhere: found no run.json"),
        (("model", "--data", "gone.jsonl", "--out", "x"), "--data 'gone.jsonl': no such file"),
        ((*TASK, "--out", "x", "--method", "mezzo"), "method: found 'mezzo', expected one of mezo, sparse-mezo"),
        ((*TASK, "--out", "x", "--lr", "quick"), "lr is 'quick', expected a number that is not negative, or auto"),
        ((*TASK, "--out", "x", "--steps", "0"), "steps is 0"),
        ((*TASK, "--out", "x", "--labels", "great"), "expected LABEL=WORD"),
        ((*TASK, "--out", "x", "--labels", "0=bad,0=good"), "label '0' twice"),
        ((*TASK, "--out", "x", "--labels", "0=bad"), "the label is '1', expected one of '0'"),
        ((*TASK, "--out", "x", "--prompt", "{txt} It was"), "no column 'txt'; did you mean {text}?"),
        ((*TASK, "--out", "x", "--quantize-base", "int8"), "--tune lora or prefix"),
        ((*TASK, "--out", "x", "--method", "mezo", "--density", "0.5"), "--density does nothing with --method mezo"),
        ((*TASK, "--out", "x", "--method", "adamw", "--eps", "1e-3"), "--eps belongs to zeroth-order methods"),
        ((*TASK, "--out", "x", "--objective", "acuracy"), "--objective acuracy: expected loss, accuracy or a metric"),
        ((*TASK, "--out", "model"), "found config.json"),
        ((*TASK, "--out", "rows.jsonl"), "expected a folder"),
        ((*TASK, "--out", "x", "--val", "rows.jsonl"), "--val and --test belong together"),
        ((*TASK, "--out", "x", "--val", "gone.jsonl", "--test", "rows.jsonl"), "--val 'gone.jsonl': no such file"),
        ((*TASK, "--out", "x", "--val", "rows.jsonl", "--test", "model"), "--test 'model': found a folder"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    run: Run, folder: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
    assert not (folder / "x").exists()


def test_a_run_is_not_gone_on_with_under_other_options(tuned: subprocess.CompletedProcess[str], run: Run) -> None:
    assert tuned.returncode == 0
    done = run(*TRAIN, "--seed", "7", "--out", "tuned")
    assert done.returncode == 2
    assert "tuned: found a run with seed 0, now 7" in done.stderr
    done = run("--resume", "--out", "tuned", "--steps", "61")
    assert done.returncode == 2
    assert "tuned: found a run with steps 60, now 61" in done.stderr


def test_options_of_the_configuration_file(run: Run, folder: Path) -> None:
    (folder / "own.toml").write_text(
        '[finetune]\nmodel = "model"\ndata = "rows.jsonl"\nout = "tuned-by-file"\nsteps = -1\n', encoding="utf-8"
    )
    done = run("--config", "own.toml")
    assert done.returncode == 2
    assert "finetune: steps is -1" in done.stderr
    done = run("--config", "own.toml", "--steps", "5", "--method", "nothing")
    assert "method: found 'nothing'" in done.stderr


def test_methods_are_listed(run: Run) -> None:
    shown = run("--list-methods")
    assert shown.returncode == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80
    found = {method["name"]: method for method in json.loads(run("--list-methods", "--json").stdout)}
    assert {"mezo", "sparse-mezo", "fzoo", "lowrank-population", "lora", "adamw"} <= set(found)
    for name in found:
        assert name in shown.stdout


@pytest.mark.slow
@pytest.mark.embedded
def test_a_real_language_model(train: Run, folder: Path) -> None:
    write_rows(folder / "few.jsonl", 20)
    done = train(
        "embedded/smollm2-135m-instruct", "--data", "few.jsonl", "--prompt", "{text}. It was", "--labels",
        "0=terrible,1=great", "--steps", "2", "--batch", "4", "--eval-every", "2", "--out", "real", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps_done"] == 2
    assert result["claim"]["status"] in ("no_claim", "not_improved")
    assert set(result["validation"]) >= {"zero-shot", "majority", "calibrated"}
