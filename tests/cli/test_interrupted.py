"""What is said when Ctrl-C ends a command that has begun nothing that could be gone on with."""

from __future__ import annotations

import pytest

from agentopt.cli import _app


@pytest.mark.parametrize("command", ["tune", "serve"])
def test_without_a_run_nothing_is_said_of_going_on(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_app, "app", interrupted)
    monkeypatch.setattr("sys.argv", ["agentopt", command, "x"])
    with pytest.raises(SystemExit) as ended:
        _app.run()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "agentopt: interrupted\n"
