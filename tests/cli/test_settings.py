"""agentopt.toml: layers, absolute paths, and one sentence for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentopt.cli._settings import load_settings, table_of
from agentopt.errors import UserError


def write(folder: Path, text: str, name: str = "agentopt.toml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_file_below_environment_below_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 'seed = 1\nconcurrency = 2\nmetric = "f1"\n')
    monkeypatch.setenv("AGENTOPT_SEED", "2")
    monkeypatch.setenv("AGENTOPT_CONCURRENCY", "3")
    settings = load_settings(None, {"seed": 4, "metric": None})
    assert (settings.seed, settings.concurrency, settings.metric) == (4, 3, "f1")


def test_paths_and_target_are_relative_to_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, 'target = "agent.py:run"\ntrain = "data/train.jsonl"\n', "deep/agentopt.toml")
    settings = load_settings(str(path), {})
    assert settings.target == f"{tmp_path / 'deep' / 'agent.py'}:run"
    assert settings.train == str(tmp_path / "deep" / "data" / "train.jsonl")


def test_tables_are_merged_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, '[models]\nagent = "a"\njudge = "j"\n[budget]\nrollouts = 10\n')
    settings = load_settings(None, {"models": {"agent": "b"}, "budget": {"usd": "2"}})
    assert settings.models == {"agent": "b", "judge": "j"}
    assert (settings.budget.rollouts, settings.budget.usd) == (10, 2.0)


def test_pyproject_table_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "[tool.agentopt]\nseed = 9\n", "pyproject.toml")
    assert load_settings(str(path), {}).seed == 9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sed = 1", ["agentopt.toml", "'sed'", "'seed'"]),
        ("[budget]\nrollout = 5", ["budget.rollout", "'rollouts'"]),
        ('seed = "many"', ["agentopt.toml", "seed", "'many'", "integer"]),
        ("concurrency = 0", ["concurrency", "0", "greater than or equal to 1"]),
        ("seed = ", ["agentopt.toml", "TOML"]),
        ("zzz = 1", ["'zzz'", "known keys", "target"]),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, text: str, words: list[str]) -> None:
    write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_settings(None, {})
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_bad_option_names_the_command_line() -> None:
    with pytest.raises(UserError, match=r"command line: budget\.rollouts is '-3'"):
        load_settings(None, {"budget": {"rollouts": "-3"}})


def test_a_named_file_must_exist() -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml: configuration file not found"):
        load_settings("nowhere.toml", {})


def test_a_misspelt_table_is_not_left_out_unsaid(tmp_path: Path) -> None:
    path = write(tmp_path, '[serv]\nkeys = "keys.db"\n')
    with pytest.raises(UserError, match=r"agentopt\.toml: unknown key 'serv'; did you mean 'serve'\?"):
        table_of(str(path), "serve", paths=())
