"""One quantized checkpoint says the same through transformers, peft over it, vLLM eager and vLLM compiled."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.serve import quantized
from tests.serve.quantized import JOBS, SPECS, Checkpoint
from tests.weights.fold.forced import Said, compare

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-serve"),
    # peft asks transformers by a name that is on its way out.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.timeout(900),
]

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    return [Checkpoint(tmp_path_factory.mktemp("quantized"), spec) for spec in SPECS]


@pytest.fixture(scope="module")
def served(checkpoints: list[Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> list[list[Said]]:
    """What vLLM says, job by job; all engines in one process."""
    jobs = [(checkpoints[number], eager) for number, eager in JOBS]
    return quantized.by_vllm(jobs, tmp_path_factory.mktemp("vllm"))


def agree(dtype: str, one: Sequence[Said], other: Sequence[Said]) -> None:
    """Log-probabilities within the tolerance; the same tokens wherever the margin is wider than it."""
    found = compare(one, other)
    assert found.difference <= TOLERANCE[dtype]
    assert all(margin <= TOLERANCE[dtype] for margin in found.flips)
    assert found.tokens >= 8 * len(one)


@pytest.mark.parametrize("job", range(len(JOBS)), ids=quantized.label)
def test_the_same_log_probabilities_and_tokens(
    checkpoints: list[Checkpoint], served: list[list[Said]], job: int
) -> None:
    """The base and the adapter in one batch of vLLM; transformers for the base, peft for the adapter."""
    checkpoint = checkpoints[JOBS[job][0]]
    agree(checkpoint.spec.dtype, quantized.by_transformers(checkpoint), served[job])


@pytest.mark.parametrize("number", range(len(SPECS)), ids=lambda number: str(SPECS[number]))
def test_there_is_something_to_tell_apart(checkpoints: list[Checkpoint], number: int) -> None:
    """Otherwise agreement would say nothing. (In bfloat16 rf8-gg is as near to the original as rounding is.)"""
    checkpoint = checkpoints[number]
    said = quantized.by_transformers(checkpoint)
    base, adapted = said[::2], said[1::2]
    least = TOLERANCE[checkpoint.spec.dtype]
    assert compare(base, adapted).difference > 5 * least
    if checkpoint.spec.dtype == "float32":
        assert compare(base, quantized.by_source(checkpoint)[::2]).difference > 10 * least


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_ranks_say_what_one_does(checkpoints: list[Checkpoint], tmp_path: Path) -> None:
    """Tensor-parallel for real: fused and row-parallel layers, and a vocabulary that is cut in two with its codes."""
    chosen = [checkpoints[0], checkpoints[3]]
    for checkpoint, said in zip(chosen, quantized.by_vllm([(one, True) for one in chosen], tmp_path, 2), strict=True):
        agree(checkpoint.spec.dtype, quantized.by_transformers(checkpoint), said)


def test_several_books_are_in_use(checkpoints: list[Checkpoint]) -> None:
    from safetensors.torch import load_file

    tensors = load_file(str(checkpoints[0].folder / "model.safetensors"))
    for name, tensor in tensors.items():
        if name.endswith("book_id"):
            assert len(tensor.unique()) > 1, name
    assert "model.layers.0.self_attn.q_proj.book_id" in tensors
