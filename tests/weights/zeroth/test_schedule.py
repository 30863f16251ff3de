"""The learning rate of a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.weights.zeroth._schedule import Schedule


def test_a_constant_rate_stays() -> None:
    assert {Schedule().lr(step, 0.5) for step in (0, 10, 10**7)} == {0.5}


def test_warmup_rises_in_equal_parts() -> None:
    assert [Schedule(warmup=4).lr(step, 1.0) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_and_cosine_fall_to_zero_just_after_the_last_step() -> None:
    linear = [Schedule("linear", total=4).lr(step, 1.0) for step in range(6)]
    assert linear == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    cosine = [Schedule("cosine", warmup=2, total=6).lr(step, 1.0) for step in range(8)]
    np.testing.assert_allclose(cosine, [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447, 0.0, 0.0], atol=1e-6)


@settings(max_examples=50)
@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(0, 50),
    st.integers(1, 100),
    st.integers(0, 200),
    st.floats(1e-9, 1.0),
)
def test_a_rate_lies_between_zero_and_the_base_and_survives_the_log(
    kind: Any, warmup: int, rest: int, step: int, base: float
) -> None:
    found = Schedule(kind, warmup, warmup + rest).lr(step, base)
    assert 0.0 <= found <= float(np.float32(base))
    assert found == float(np.float32(found))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "step"}, "expected one of constant"),
        ({"kind": "linear"}, "needs total"),
        ({"warmup": -1}, "warmup is -1"),
        ({"kind": "cosine", "warmup": 10, "total": 10}, "more than the 10 steps"),
    ],
)
def test_wrong_schedules_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Schedule(**arguments)
