"""What `agentopt fold` says: results that claim no more than they show, refused folds, estimates; and its options."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from agentopt.cli._fold_live import passes
from agentopt.cli._fold_make import numbers_of, range_of
from agentopt.cli._fold_print import gate_text, print_adapter, print_answers, print_estimate, training_sentences
from agentopt.cli._fold_run import clustered_interval, compared, trimmed
from agentopt.cli._fold_settings import FoldSettings, settings_of
from agentopt.errors import UserError
from agentopt.weights.fold import FoldOptions, FoldTask, Question, estimate

GIVEN = {"model": "m", "tasks": "t.jsonl"}


def printed(write: Any, *arguments: Any) -> str:
    console = Console(file=io.StringIO(), width=80)
    write(*arguments, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(
        len(line.rstrip()) <= 80 or line.startswith(("ask:", "serve:", "peft:", "BASE:")) for line in text.splitlines()
    )
    return " ".join(text.split())


# --- options ---------------------------------------------------------------------------------------------------------


def test_one_lr_is_of_the_outer_loop_and_the_other_of_the_inner() -> None:
    settings = FoldSettings.of({**GIVEN, "lr": 0.5, "inner_lr": 0.25, "unroll": "all", "guard": "g.txt"}, "here")
    assert (settings.meta.lr, settings.fold.lr, settings.fold.unroll) == (0.5, 0.25, None)
    assert settings.fold.guard_weight == 1.0
    assert FoldSettings.of({**GIVEN, "unroll": 1}, "here").fold.unroll == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lr": -1}, "here: lr is -1"),
        ({"inner_lr": -1}, "here: inner_lr is -1"),
        ({"unroll": "x"}, "--unroll: found 'x', expected a number of inner steps"),
        ({"ranks": 3}, "here: unknown option 'ranks'; did you mean 'rank'?"),
        ({"zebra": 3}, "here: unknown option 'zebra'; see agentopt fold train --help"),
        ({"val": 3}, "here: val is 3, expected text"),
        ({"base_lr": 0.1}, "--base-lr does nothing with --trains init"),
        ({"rates_lr": 0.1, "learn_lr": False}, "--rates-lr does nothing with --static-lr"),
        ({"alpha": 2.0, "adapts": "all"}, "--alpha does nothing with --adapts all"),
    ],
)
def test_what_does_not_fit_is_one_sentence(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        FoldSettings.of({**GIVEN, **given}, "here")
    assert said in str(error.value)


def test_a_file_of_options_is_below_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").write_text("", encoding="utf-8")
    text = '[fold]\nmodel = "embedded"\ntasks = "t.jsonl"\nout = "meta"\nrank = 3\nsteps = 7\n'
    (tmp_path / "agentopt.toml").write_text(text, encoding="utf-8")
    settings, out = settings_of({"rank": 5, "steps": None}, resume=False, config=None)
    assert (settings.fold.rank, settings.meta.steps, settings.model) == (5, 7, "embedded")
    assert settings.tasks == str(tmp_path / "t.jsonl")
    assert out == tmp_path / "meta"


def test_ranges_and_numbers() -> None:
    assert range_of("--hops", "2-6") == (2, 6)
    assert range_of("--hops", "4") == 4
    assert range_of("--facts", "4", both=True) == (4, 4)
    assert numbers_of("--depths", "0, 2") == (0, 2)
    for text in ("-1", "a", "2-", "2.5"):
        with pytest.raises(UserError, match="--hops: found"):
            range_of("--hops", text)
    with pytest.raises(UserError, match="--depths: found '1;2'"):
        numbers_of("--depths", "1;2")


def test_passes_of_a_step_are_those_of_the_cost_model() -> None:
    assert passes(FoldOptions(inner_steps=4, unroll=0)) == 12
    assert passes(FoldOptions(inner_steps=4, unroll=2, checkpoint=False)) == 24
    assert passes(FoldOptions(inner_steps=4, unroll=None, checkpoint=False)) == 36
    assert passes(FoldOptions(inner_steps=4, unroll=2)) == 30


# --- figures ---------------------------------------------------------------------------------------------------------


def test_trimmed_tasks_are_drawn_and_keep_their_order() -> None:
    tasks = [FoldTask(str(n), ("f",), tuple(Question(f"q{k}", "a") for k in range(9))) for n in range(20)]
    found = trimmed(tasks, 5, 3, 0)
    assert found == trimmed(tasks, 5, 3, 0) != trimmed(tasks, 5, 3, 1)
    assert [int(task.id) for task in found] == sorted(int(task.id) for task in found)
    assert all(len(task.questions) == 3 for task in found)
    assert trimmed(tasks, 50, 50, 0) == tasks


def test_intervals_draw_knowledge_bases_and_never_claim_certainty() -> None:
    alone = [(str(n), 0, n % 2 == 0) for n in range(40)]
    fourfold = [(task, place, right) for task, _, right in alone for place in range(4)]
    low, high = clustered_interval(alone, seed=0)
    assert low < 0.5 < high
    # four answers that always agree are no more evidence than one
    assert clustered_interval(fourfold, seed=0) == pytest.approx((low, high))
    low, high = clustered_interval([(str(n), 0, True) for n in range(40)], seed=0)
    assert (high, low < 0.95) == (1.0, True)
    assert clustered_interval([(str(n), 0, False) for n in range(3)], seed=0)[1] > 0.7


def test_comparison_is_paired_by_knowledge_base() -> None:
    before = [[str(n), place, False] for n in range(8) for place in range(2)]
    after = [(str(n), place, True) for n in range(8) for place in range(2)]
    found = compared(before, after, seed=0)
    assert found is not None
    assert (found["n"], found["difference"]) == (8, 1.0)
    assert compared(None, after, seed=0) is None
    assert compared(before[:3], after, seed=0) is None


# --- words -----------------------------------------------------------------------------------------------------------

REPORT: dict[str, Any] = {
    "interval": [0.5, 0.7],
    "accuracy": {"folded": 0.6},
    "tasks": 50,
    "least_tasks": 30,
    "questions": 100,
    "part": "test",
    "unread": "",
    "against_reading": {"mean_a": 0.4, "difference": 0.2, "interval": [0.1, 0.3], "n": 50},
}


def test_a_result_says_what_it_was_measured_on() -> None:
    said = " ".join(training_sentences(REPORT))
    assert "0.600 of 100 questions about 50 knowledge bases" in said
    assert "95 % interval 0.500 to 0.700; test tasks, untouched until now" in said
    assert "difference +0.200, 95 % interval +0.100 to +0.300" in said
    few = " ".join(training_sentences({**REPORT, "tasks": 10, "part": "validation"}))
    assert "interval" not in few
    assert "the figure is optimistic; give --test" in few
    assert "10 knowledge bases are too few to conclude from" in few
    long = " ".join(training_sentences({**REPORT, "against_reading": None, "unread": "too long"}))
    assert long.endswith("Too long")


def test_the_gate_tells_its_limits_and_what_they_did() -> None:
    seen = {"rows": 9, "folded": 0.5, "in_context": None, "gated": 0.75, "fallbacks": 0.25}
    gate = {"recall": 0.5, "margin": None, "calibration": seen}
    assert gate_text(gate) == (
        "gate: answers in context below recall 0.50 (on validation: folded 0.500, gated 0.750 with 25% in context)"
    )
    assert gate_text({"recall": None, "margin": None}) == "gate: lets every answer pass"


def adapter(**changes: Any) -> dict[str, Any]:
    facts = [{"place": f"a.txt:{n}", "fact": f"fact {n} " * 20, "recall": n / 4} for n in range(4)]
    report = {
        "adapter": "out/hand book",
        "meta": "meta",
        "base": "owner/model",
        "base_hash": "abc",
        "rank": 32,
        "facts": 4,
        "rows": 6,
        "repeated": 2,
        "recall": 0.375,
        "recall_before": 0.1,
        "accepted": True,
        "reason": "high enough",
        "fact_recall": facts,
        "contradictions": [{"places": ["a.txt:0", "a.txt:3"], "facts": ["it is", "it is not"]}],
        "warnings": ["fact 2 was cut"],
        "bytes": 12_345,
    }
    return {**report, **changes}


def test_an_adapter_is_described_with_its_worst_facts_and_how_to_serve_it() -> None:
    said = printed(print_adapter, adapter())
    assert "Folded: 4 facts (6 rows) into out/hand book, recall 0.375, 0.100 before folding." in said
    assert "2 repeated facts were left out." in said
    assert said.index("0.00 a.txt:0") < said.index("0.25 a.txt:1") < said.index("0.50 a.txt:2")
    assert "a.txt:3 fact 3" not in said
    assert "contrary a.txt:0 it is a.txt:3 it is not" in said
    assert "note fact 2 was cut" in said
    assert "--max-lora-rank 32 --lora-modules 'hand book'='out/hand book'" in said
    embedded = printed(print_adapter, adapter(base="embedded"))
    assert "vllm serve BASE" in embedded
    assert "BASE: load.model('embedded')" in embedded
    whole = printed(print_adapter, adapter(rank=None, facts=1, rows=1, repeated=0, contradictions=[], warnings=[]))
    assert "1 fact into" in whole
    assert "--lora-modules" not in whole
    assert "hardly taken up" not in said
    assert "hardly taken up" in printed(print_adapter, adapter(recall_before=0.35))


def test_a_fold_that_is_not_accepted_says_what_happens_then() -> None:
    said = printed(print_adapter, adapter(accepted=False, reason="recall 0.375 is below 0.8"))
    assert said.startswith("Folded, not accepted: ")
    assert "Questions will be answered in context: recall 0.375 is below 0.8." in said


def test_answers_are_counted_by_where_they_come_from() -> None:
    row = {"question": "why " * 40, "answer": "because", "correct": True, "source": "folded", "margin": 0.5}
    said = printed(print_answers, [row, {**row, "correct": None, "source": "in-context"}], 1.0, 1)
    assert "2 questions: 1 folded, 1 in context" in said
    assert "accuracy 1.000 of 1 with a known answer" in said
    assert "right" not in printed(print_answers, [{**row, "correct": None}], None, 0)


def test_an_estimate_says_when_folding_loses_and_when_reading_is_impossible() -> None:
    config = SimpleNamespace(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=100,
        max_position_embeddings=1024,
    )
    said = printed(print_estimate, estimate(config, context_tokens=512, questions=18))
    assert "folding loses" in said
    assert "once" not in said
    beyond = printed(print_estimate, estimate(config, context_tokens=4096, questions=18))
    assert "Reading is impossible" in beyond
    assert beyond.count("too long") == 2
