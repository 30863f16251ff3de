"""What is said when Ctrl-C ends a command: how to go on, where there is something to go on with."""

from __future__ import annotations

import pytest

from agentopt.cli import _app


@pytest.mark.parametrize(("command", "hint"), [("tune", True), ("serve", False)])
def test_only_runs_can_be_resumed(
    command: str, hint: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_app, "app", interrupted)
    monkeypatch.setattr("sys.argv", ["agentopt", command, "x"])
    with pytest.raises(SystemExit) as ended:
        _app.run()
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert said.startswith("agentopt: interrupted") and ("runs resume" in said) == hint
