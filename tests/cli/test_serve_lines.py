"""What `agentopt serve` prints for people to copy: lines that fit a terminal and find the server they stand under."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from agentopt.cli._serve_live import LiveServer
from agentopt.serving._news import Serving


def printed(run_dir: str, keys: int | None, host: str = "127.0.0.1") -> list[str]:
    event = Serving(
        base_url="http://127.0.0.1:9001/v1",
        admin_url="http://127.0.0.1:9002",
        engine="fake",
        model="smollm2-135m-instruct",
        models=("smollm2-135m-instruct",),
        keys=keys,
        host=host,
        run_dir=run_dir,
        captured_as=None,
        state=dict,
    )
    results = Console(file=io.StringIO(), width=80)
    LiveServer(quiet=True, console=Console(file=io.StringIO(), width=80), results=results).print_address(event)
    return results.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_line_with_a_key_fits() -> None:
    lines = printed(".agentopt/serve/9001", 2)
    assert '    -H "Authorization: Bearer $AGENTOPT_KEY" \\' in lines
    assert max(map(len, lines)) <= 80
    place = lines.index('python: OpenAI(base_url="http://127.0.0.1:9001/v1",')
    assert lines[place + 1].strip() == 'api_key=os.environ["AGENTOPT_KEY"])'


@pytest.mark.parametrize(
    ("run_dir", "look"), [(".agentopt/serve/9001", "status --port 9001;"), ("my run", "status --run-dir 'my run';")]
)
def test_the_line_that_looks_finds_this_server(run_dir: str, look: str) -> None:
    assert any(look in line for line in printed(run_dir, None))


def test_who_may_ask_is_who_can_reach_it() -> None:
    assert "anybody on this machine may ask; --keys FILE changes that" in printed(".agentopt/serve/9001", None)
    assert any("anybody who reaches 0.0.0.0:9001 may ask" in line for line in printed("x", None, "0.0.0.0"))
