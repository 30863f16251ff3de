"""A folded adapter answers the same through the folder, through peft and through vLLM's multi-LoRA."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.serve import harness
from tests.serve.harness import Served
from tests.weights.fold.forced import Said, compare

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-serve"),
    # peft asks transformers by a name that is on its way out.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.timeout(900),
]

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}


@pytest.fixture(scope="module", params=[("float32", None), ("bfloat16", None), ("float32", 1)], ids=str)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A base in one number format with two adapters, for all layers or for the topmost alone."""
    dtype, layers = request.param
    found = harness.make(tmp_path_factory.mktemp("served"), dtype, layers=layers)
    yield found
    found.folder.close()


def agree(served: Served, one: Sequence[Said], other: Sequence[Said]) -> None:
    """Log-probabilities within the tolerance; the same tokens wherever the margin is wider than it."""
    tolerance = TOLERANCE[served.dtype]
    folded = [place for place, case in enumerate(served.cases()) if case.adapter is not None]
    # In bfloat16 an unlikely token's logit is rounded by more than the tolerance, by transformers alone: what the base
    # makes of these answers is compared in float32.
    places = range(len(one)) if served.dtype == "float32" else folded
    found = compare([one[place] for place in places], [other[place] for place in places])
    assert found.difference <= tolerance
    assert all(margin <= tolerance for margin in found.flips)
    assert found.tokens >= 40


def test_the_same_log_probabilities_and_tokens_three_ways(served: Served, tmp_path: Path) -> None:
    ours, peft, vllm = harness.by_folder(served), harness.by_peft(served), harness.by_vllm(served, tmp_path)
    agree(served, ours, peft)
    agree(served, ours, vllm)
    agree(served, [Said(x.logprobs, x.written, y.margins) for x, y in zip(peft, ours, strict=True)], vllm)


def test_the_folds_know_what_the_base_does_not(served: Served) -> None:
    """Otherwise agreement would say nothing: each adapter is sure of its own answers, the base is not."""
    by_name: dict[str | None, list[float]] = {}
    for case, said in zip(served.cases(), harness.by_folder(served), strict=True):
        if case.own:
            by_name.setdefault(case.adapter, []).append(sum(said.logprobs))
    assert min(by_name["one"] + by_name["two"]) > -1
    assert max(by_name[None]) < -5


def test_the_endpoint_serves_both_adapters(tmp_path: Path) -> None:
    """An adapter is a model's name; what it writes is what `Folder.ask` says."""
    served = harness.make(tmp_path, "float32")
    with served.folder, harness.endpoint(served, tmp_path / "server.log") as url:
        agree(served, harness.by_folder(served), harness.by_endpoint(url, served))
        codec = served.folder.codec
        for name, question in served.questions():
            prompt = served.folder.options.format.question.format(question=question.text)
            body = {"model": name, "prompt": prompt, "max_tokens": 12, "temperature": 0}
            text = harness.post(url, body)["choices"][0]["text"]
            answer = served.folder.ask(served.adapters[name], question)
            assert codec.parse(text)[1].strip() == answer.text == question.answer
