"""A folded knowledge through the client that people use: vLLM's chat endpoint, the adapter by its name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt import graph
from agentopt.models import LM, OpenAICompatible
from agentopt.weights.fold.client import FolderLM
from tests.serve import harness

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-serve"),
    pytest.mark.timeout(900),
]


@pytest.fixture(autouse=True)
def own_parameters() -> Iterator[None]:
    with graph.parameter_scope():
        yield


def test_a_call_that_names_folded_knowledge_is_answered_by_its_adapter(tmp_path: Path) -> None:
    served = harness.make(tmp_path, "float32")
    (served.base / "chat_template.jinja").write_text(served.folder.chat_template, encoding="utf-8")
    owned = {name: ao.knowledge(f"{name}.things", harness.sentences(name)) for name in served.paths}
    values: dict[str, Any] = {
        handle.name: {"form": "folded", "of": handle.spec.knowledge.hash, "adapter": str(served.paths[name])}
        for name, handle in owned.items()
        if handle.spec.knowledge is not None
    }
    with served.folder, harness.endpoint(served, tmp_path / "server.log") as url:
        model = LM(OpenAICompatible(f"{url}/v1", "base"))
        for name, question in served.questions():
            with ao.Candidate(values).active():
                reply = model.complete_sync(
                    user=question.text, knowledge=owned[name], options=ao.LMOptions(max_tokens=12)
                )
            assert reply.model == name
            assert reply.text.rpartition("so:")[2].split()[0] == question.answer
            assert reply.usage.input_tokens == len(question.text.split())
            with ao.Candidate(values).active():
                told: dict[str, Any] = {"system": "so: not\n\n a lot", "user": question.text, "knowledge": owned[name]}
                told["options"] = ao.LMOptions(max_tokens=12)
                reply, own = model.complete_sync(**told), FolderLM(served.folder).complete_sync(**told)
            assert reply.usage.input_tokens == own.usage.input_tokens == 4 + len(question.text.split())
