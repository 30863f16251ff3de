"""`agentopt fold` as a person runs it: make, train (killed, interrupted, resumed), apply, ask, estimate; bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.warm import Done, Run, WarmCommands
from tests.weights.tiny import tiny

pytest.importorskip("torch")

ENVIRONMENT = {
    **os.environ,
    "COLUMNS": "80",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
MAKE = ("make", "chains", "--count", "60", "--depth", "1", "--distractors", "2", "--names", "4", "--attributes", "6")
OPTIONS = (
    "--rank", "2", "--inner-steps", "2", "--row-tokens", "16", "--documents", "4", "--questions", "1", "--lr", "1e-2",
)  # fmt: skip
TRAIN = ("train", "model", "--tasks", "tasks.jsonl", *OPTIONS, "--steps", "6", "--eval-every", "2")
IMPORTED = (
    "transformers.models.llama.modeling_llama",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.integrations.mistral",
    "safetensors.torch",
    "agentopt.weights.adapters",
    "agentopt.weights.fold._answers",
    "agentopt.weights.fold._engine",
    "agentopt.weights.fold._estimator",
    "agentopt.weights.fold._inner",
    "agentopt.weights.fold._meta",
    "agentopt.weights.fold._training",
    "agentopt.weights.fold.worlds",
    *(f"agentopt.cli._fold{part}" for part in ("", "_make", "_print", "_run", "_use")),
)
FACTS = "bob is brave\n\nbrave is calm\nbob is brave\nclara is not calm\nclara is calm\n" + "bob is calm " * 6 + "\n"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fold")


@pytest.fixture(scope="module")
def light(warm: WarmCommands, path: Path) -> Run:
    """Commands that end before a model is needed."""
    return warm.command("fold", path, ENVIRONMENT)


@pytest.fixture(scope="module")
def run(path: Path) -> Iterator[Run]:
    """Commands that need a model, with torch imported for all of them at once."""
    warm = WarmCommands()
    warm.import_once(*IMPORTED)
    yield warm.command("fold", path, ENVIRONMENT)
    warm.close()


@pytest.fixture(scope="module")
def made(light: Run) -> Done:
    return light(*MAKE, "--out", "tasks.jsonl")


@pytest.fixture(scope="module")
def folder(made: Done, path: Path) -> Path:
    """The folder that commands run in, with tasks, a model that knows their words, and documents."""
    assert made.returncode == 0, made.stderr
    tasks = [json.loads(line) for line in (path / "tasks.jsonl").read_text(encoding="utf-8").splitlines()]
    words = {word for task in tasks for fact in task["facts"] for word in fact.split()}
    model, tokenizer = tiny(sorted(words | {"bob", "clara", "not", "Question:", "Answer:", "So:"}))
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    (path / "facts.txt").write_text(FACTS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(run: Run, folder: Path) -> Done:
    """A run that nothing interrupts, in `folder / "meta"`."""
    done = run(*TRAIN, "--out", "meta")
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def applied(run: Run, trained: Done) -> Done:
    assert trained.returncode == 0
    done = run("apply", "meta", "--docs", "facts.txt", "--out", "adapter")
    assert done.returncode == 0, done.stderr
    return done


def lines(done: Done) -> list[str]:
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


def words(text: str) -> str:
    return " ".join(text.split())


def fits(done: Done) -> bool:
    """No line is longer than the terminal, but those to be copied."""
    copied = ("next:", "ask:", "serve:", "peft:", "agentopt: ", "in-context:", "recalled:")
    return all(len(line.rstrip()) <= 80 or line.startswith(copied) for line in lines(done))


def test_made_tasks_are_described(made: Done) -> None:
    assert made.returncode == 0, made.stderr
    said = words(made.stdout)
    assert "60 knowledge bases to tasks.jsonl" in said
    assert "4 to 4, 4.0 on average" in said
    assert "depth 1: 100%" in said
    assert "next agentopt fold train MODEL --tasks tasks.jsonl" in said
    assert fits(made)


def test_training_shows_plan_baselines_validations_and_one_result(trained: Done, folder: Path) -> None:
    said = words(trained.stderr)
    for part in (
        "48 train, 6 validation, 6 test (split by content); 4.0 facts and 1.0 questions each",
        "LoRA of rank 2 in all layers",
        "second order through 2 of 2 inner steps",
        "most frequent answer",
        "in context, untuned",
        "folded, untrained",
        "step 2",
        "step 6",
    ):
        assert part in said
    result = words(trained.stdout)
    assert "of 6 questions about 6 knowledge bases" in result
    assert "6 knowledge bases are too few to conclude from: at least 30 are needed" in result
    assert "gate: " in result
    assert "next: agentopt fold apply meta --docs FACTS.txt --out ADAPTER" in result
    assert fits(trained)
    report = json.loads((folder / "meta" / "result.json").read_text(encoding="utf-8"))
    assert report["part"] == "test"
    assert report["steps"] == 6
    assert set(report["accuracy"]) == {"most frequent answer", "in context, untuned", "folded"}
    assert {"meta.json", "init.safetensors"} <= set(report["files"])


def test_the_same_command_again_gives_the_same_result_at_once(trained: Done, light: Run) -> None:
    again = light(*TRAIN, "--out", "meta")
    assert again.returncode == 0, again.stderr
    assert (again.stdout, again.stderr) == (trained.stdout, "")
    assert json.loads(light("train", "--resume", "--out", "meta", "--json").stdout)["steps"] == 6
    other = light(*TRAIN, "--out", "meta", "--seed", "3")
    assert other.returncode == 2
    assert "meta: found a run without --seed, now 3" in other.stderr


def test_interrupted_then_resumed_gives_the_same_folder(trained: Done, run: Run, folder: Path) -> None:
    assert trained.returncode == 0
    events = folder / "again" / "events.jsonl"

    def after_three_steps() -> bool:
        return events.exists() and events.read_text(encoding="utf-8").count('"kind": "stepped"') >= 3

    stopped = run(*TRAIN, "--out", "again", send=(signal.SIGINT, after_three_steps))
    assert stopped.returncode == 130
    assert "what was trained is kept; go on with: agentopt fold train --resume --out again" in stopped.stderr
    done = run("train", "--resume", "--out", "again")
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stderr
    assert (folder / "again" / "init.safetensors").read_bytes() == (folder / "meta" / "init.safetensors").read_bytes()
    results = [json.loads((folder / name / "result.json").read_text(encoding="utf-8")) for name in ("again", "meta")]
    for name in ("accuracy", "interval", "gate", "best_step"):
        assert results[0][name] == results[1][name]


def test_an_adapter_says_how_well_it_holds_its_facts(applied: Done, folder: Path) -> None:
    said = words(applied.stdout)
    assert "5 facts (6 rows) into adapter, recall 0." in said
    assert "1 repeated fact was left out" in said
    assert "worst 0." in said
    assert "contrary facts.txt:5 clara is not calm facts.txt:6 clara is calm" in said
    assert "vllm serve" in said and "--lora-modules adapter=adapter" in said
    assert fits(applied)
    card = json.loads((folder / "adapter" / "fold.json").read_text(encoding="utf-8"))
    assert "note facts.txt:7 has 18 tokens, more than a row of 16" in said
    assert card["facts"][:4] == ["bob is brave", "brave is calm", "clara is not calm", "clara is calm"]
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["r"]) == ("LORA", 2)
    assert config["base_model_name_or_path"] == str(folder / "model")


def test_answers_go_to_stdout_and_where_they_come_from_to_stderr(applied: Done, run: Run, folder: Path) -> None:
    assert applied.returncode == 0
    asked = ("ask", "meta", "adapter", "bob is", "--choices", "brave, calm")
    forced = run(*asked, "--no-gate")
    assert forced.returncode == 0, forced.stderr
    assert forced.stdout in ("brave\n", "calm\n")
    assert forced.stderr.startswith("folded: recall 0.")
    rows = [{"question": "bob is", "answer": "calm", "choices": ["brave", "calm"]}, {"question": "clara is"}]
    (folder / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    many = run("ask", "meta", "adapter", "--questions", "ask.jsonl")
    assert many.returncode == 0, many.stderr
    assert "2 questions: " in many.stdout
    assert "of 1 with a known answer" in many.stdout
    assert fits(many)


def test_what_the_gate_turns_away_is_answered_in_context(applied: Done, run: Run, folder: Path) -> None:
    assert applied.returncode == 0
    shutil.copytree(folder / "meta", folder / "strict")
    head: dict[str, Any] = json.loads((folder / "strict" / "meta.json").read_text(encoding="utf-8"))
    head["gate"] = {"recall": 0.999, "margin": 0.0, "calibration": None}
    (folder / "strict" / "meta.json").write_text(json.dumps(head), encoding="utf-8")
    asked = run("ask", "strict", "adapter", "bob is", "--choices", "brave,calm", "--json")
    assert asked.returncode == 0, asked.stderr
    value = json.loads(asked.stdout)
    assert value["source"] == "in-context"
    assert "below the gate's 0.999" in value["reason"]


def test_estimate_compares_the_ways_on_this_machine(run: Run, folder: Path) -> None:
    assert (folder / "model").is_dir()
    done = run("estimate", "model", "--context", "150", "--questions", "18")
    assert done.returncode == 0, done.stderr
    for part in (
        "operations",
        "all 18",
        "KV memory",
        "fold and ask",
        "cached context",
        "re-reading",
        "Folding is cheaper",
    ):
        assert part in done.stdout
    assert fits(done)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "model", "--tasks", "tasks.jsonl"), "--out is missing"),
        (("train", "--out", "x"), "MODEL is missing"),
        (("train", "model", "--out", "x"), "--tasks is missing"),
        (("train", "--resume", "--out", "nowhere"), "nowhere: found no command.json"),
        (("train", "model", "--tasks", "gone.jsonl", "--out", "x"), "gone.jsonl"),
        ((*TRAIN, "--out", "x", "--rule", "magic"), 'rule is "magic"'),
        ((*TRAIN, "--out", "x", "--inner-lr", "-1"), "inner_lr is -1"),
        ((*TRAIN, "--out", "x", "--unroll", "some"), "--unroll: found 'some'"),
        ((*TRAIN, "--out", "x", "--adapts", "all"), "--rank does nothing with --adapts all"),
        ((*TRAIN, "--out", "x", "--single-task", "--recall-weight", "2"), "--recall-weight does nothing"),
        ((*TRAIN, "--out", "x", "--val", "tasks.jsonl"), "are training or validation tasks too"),
        ((*TRAIN, "--out", "x", "--guard", "gone.txt"), "--guard 'gone.txt'"),
        ((*TRAIN, "--out", "model"), "model: found config.json"),
        ((*TRAIN, "--out", "facts.txt"), "facts.txt: found a file, expected a folder"),
        (("train", "model", "--tasks", "two.jsonl", "--out", "x"), "found 2 knowledge bases, too few to split"),
        (("make", "rules"), "--out is missing"),
        (("make", "rules", "--out", "x", "--facts", "many"), "--facts: found 'many'"),
        (("make", "rules", "--out", "x", "--world", "flat"), "world is"),
        (("make", "kinship", "--out", "x", "--noise", "loud"), "noise is"),
        (("apply", "meta", "--out", "x"), "--docs is missing"),
        (("apply", "gone", "--docs", "facts.txt", "--out", "x"), "gone: no such folder"),
        (("apply", "model", "--docs", "facts.txt", "--out", "x"), "model: found no meta.json"),
        (("apply", "meta", "--docs", "gone.txt", "--out", "x"), "gone.txt: no such file"),
        (("apply", "meta", "--docs", "empty.jsonl", "--out", "x"), "empty.jsonl:2: fact is"),
        (("apply", "meta", "--docs", "facts.txt", "--out", "model"), "model: found config.json"),
        (("ask", "meta", "adapter"), "give one question"),
        (("ask", "meta", "adapter", "bob is", "--choices", "one"), "--choices: found 'one'"),
        (("ask", "meta", "gone", "bob is"), "gone: no such folder"),
        (("ask", "meta", "model", "bob is"), "model: found a folder without fold.json"),
        (("ask", "meta", "adapter", "--questions", "empty.jsonl"), "empty.jsonl:1: expected an object with a question"),
        (("estimate", "model", "--questions", "3"), "--context is missing"),
        (("estimate", "model", "--context", "0", "--questions", "3"), "--context is 0"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    applied: Done, light: Run, folder: Path, arguments: tuple[str, ...], said: str
) -> None:
    assert applied.returncode == 0
    two = (folder / "tasks.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:2]
    (folder / "two.jsonl").write_text("".join(two), encoding="utf-8")
    (folder / "empty.jsonl").write_text('{"fact": "bob is brave"}\n{"fact": " "}\n', encoding="utf-8")
    refused(light(*arguments), folder, said)


def refused(done: Done, folder: Path, said: str) -> None:
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stdout == ""
    assert not (folder / "x").exists()


def test_what_the_model_does_not_allow_is_one_sentence(run: Run, folder: Path) -> None:
    refused(run("train", "model", "--tasks", "tasks.jsonl", "--out", "x", "--quiet", "--layers", "9"), folder, "layers")


def test_an_adapter_of_another_base_is_refused_by_its_hash(applied: Done, run: Run, folder: Path) -> None:
    assert applied.returncode == 0
    shutil.copytree(folder / "adapter", folder / "foreign")
    card = json.loads((folder / "foreign" / "fold.json").read_text(encoding="utf-8"))
    card["base_hash"] = "0" * 32
    (folder / "foreign" / "fold.json").write_text(json.dumps(card), encoding="utf-8")
    refused(run("ask", "meta", "foreign", "bob is"), folder, "another base (hash 000000000000")


def test_an_inner_loop_that_breaks_says_what_to_do(run: Run, folder: Path) -> None:
    assert (folder / "model").is_dir()
    done = run(*TRAIN, "--inner-lr", "1e30", "--out", "broken", "--quiet")
    assert done.returncode == 1
    assert "a lower --inner-lr, or --rule normalized" in done.stderr
    assert "Traceback" not in done.stderr


def test_options_of_the_configuration_file(light: Run, folder: Path) -> None:
    (folder / "own.toml").write_text('[fold]\nmodel = "model"\ntasks = "tasks.jsonl"\nout = "x"\nstep = 3\n', "utf-8")
    done = light("train", "--config", "own.toml")
    assert done.returncode == 2
    assert "[fold]: unknown option 'step'; did you mean 'steps'?" in done.stderr
    (folder / "own.toml").write_text('[fold]\nmodel = "model"\ntasks = "tasks.jsonl"\nout = "x"\nrank = 0\n', "utf-8")
    assert "[fold]: rank is 0" in light("train", "--config", "own.toml").stderr
