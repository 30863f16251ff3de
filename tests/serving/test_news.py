"""What a server tells: nobody who listens can end it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from agentopt.serving._news import Draining, News
from agentopt.serving.gateway import AccessLog


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.ENOSPC, "No space left on device"), SystemExit(1)])
def test_a_terminal_that_is_gone_does_not_end_the_server(tmp_path: Path, error: BaseException) -> None:
    def listener(event: Any) -> None:
        raise error  # rich's consoles raise SystemExit where nobody reads any more

    news = News(listener)
    news.log = AccessLog(tmp_path / "gateway.log")
    news(Draining(3, 30.0))
    news.close()
    assert '"in_flight":3' in (tmp_path / "gateway.log").read_text("utf-8")
