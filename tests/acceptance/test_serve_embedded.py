"""`agentopt serve embedded`: a real model through the client that people use."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.served import PATIENCE, server


@pytest.mark.embedded
def test_the_embedded_model_chats_and_streams(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from openai import OpenAI

    with server(tmp_path, "embedded", "--engine", "embedded") as running, contextlib.ExitStack() as stack:
        serving = running.serving()
        openai: Any = stack.enter_context(OpenAI(base_url=serving["base_url"], api_key="none", timeout=PATIENCE))
        asks: dict[str, Any] = {
            "model": serving["model"],
            "messages": [{"role": "user", "content": "What is the capital of France? One word."}],
            "max_tokens": 12,
            "temperature": 0,
        }
        whole = openai.chat.completions.create(**asks)
        assert "Paris" in whole.choices[0].message.content
        parts = list(openai.chat.completions.create(**asks, stream=True, stream_options={"include_usage": True}))
        assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == (
            whole.choices[0].message.content
        )
        assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert running.stop() == 0
