"""The lists of commands are read whole: no line of them is cut off in a terminal of 80 columns."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from agentopt.cli._app import app, run


@pytest.mark.parametrize("group", [[], ["runs"], ["trace"], ["fold"], ["serve", "keys"], ["serve", "adapters"]])
def test_no_command_is_described_by_half_a_sentence(group: list[str]) -> None:
    shown = CliRunner().invoke(app, [*group, "--help"], env={"COLUMNS": "80"}).stdout
    assert "Commands:" in shown
    assert "..." not in shown.partition("Commands:")[2]
    assert max(map(len, shown.splitlines())) <= 80


def test_a_budget_without_a_name_is_told_with_an_example_of_a_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["agentopt", "tune", "x.py:f", "--budget", "600"])
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    assert "for example rollouts=600" in capsys.readouterr().err
