"""Kernels give what the torch code gives: updates to the last bit, linear layers up to the order of additions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from agentopt.weights.zeroth import _kernels
from tests.weights.interpreted import errors_of

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def cases() -> dict[str, float]:
    """Error of each case over what is allowed."""
    return errors_of("tests.weights.zeroth.kernel_cases")


@pytest.mark.parametrize(("part", "count"), [("philox", 3), ("linear", 14), ("update", 9), ("step", 2)])
def test_kernels_give_what_torch_gives(cases: dict[str, float], part: str, count: int) -> None:
    found = {name: error for name, error in cases.items() if name.startswith(part)}
    assert len(found) == count
    assert {name: error for name, error in found.items() if not error <= 1} == {}


def test_without_a_gpu_the_torch_code_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not _kernels.usable(torch.zeros(4))


def test_pairs_of_opposite_shifts_are_found() -> None:
    groups = _kernels._groups([5, 5, 6, 7, 7, 7, 8], [1.0, -1.0, 1.0, 0.0, 2.0, -2.0, 1.0])
    assert groups == ([0, 4], [2, 6], [3])


def test_slices_are_whole_tiles_of_a_matrix_product() -> None:
    assert _kernels._slice_rows(100_000, 8192) == 2048
    assert _kernels._slice_rows(1000, 8192) == 1000
    assert _kernels._slice_rows(100_000, 1 << 20) == 16
    assert _kernels._slice_rows(10, 1 << 30) == 1
