"""The gate: what it lets through, what it says, and that its thresholds are the best on their rows."""

from __future__ import annotations

import json
import math
import re
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.weights.fold._gate import Gate, GateRow, calibrate, lift, recall_of

NUMBERS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
ROWS = st.lists(
    st.builds(
        GateRow,
        recall=NUMBERS,
        margin=st.one_of(NUMBERS, st.sampled_from([math.inf, math.nan])),
        folded=st.booleans(),
        in_context=st.sampled_from([True, False, None]),
    ),
    min_size=1,
    max_size=12,
)


def value(gate: Gate, rows: list[GateRow]) -> tuple[float, int]:
    """Right answers behind the gate, and how many it lets through."""
    known = [row.in_context for row in rows if row.in_context is not None]
    share = sum(known) / len(known) if known else 0.5
    passed = [row for row in rows if gate.decide(row.recall, row.margin).accepted]
    turned = [row for row in rows if not gate.decide(row.recall, row.margin).accepted]
    read = sum(share if row.in_context is None else row.in_context for row in turned)
    return round(sum(row.folded for row in passed) + read, 9), len(passed)


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_no_pair_of_thresholds_is_better_on_the_same_rows(rows: list[GateRow]) -> None:
    gate = calibrate(rows)
    limits = [-1.0, 0.05, 0.2, 0.3, 0.6, 0.8, 0.95, 2.0]
    others = [value(Gate(recall, margin), rows) for recall, margin in product(limits, limits)]
    assert value(gate, rows) == max(others)
    assert gate.calibration is not None
    right, passed = value(gate, rows)
    assert gate.calibration.gated == pytest.approx(right / len(rows))
    assert gate.calibration.fallbacks == pytest.approx(1 - passed / len(rows))
    assert gate.calibration.gated >= gate.calibration.folded - 1e-9 or any(math.isnan(row.margin) for row in rows)


def test_calibration_turns_away_what_reading_answers_better() -> None:
    rows = (
        [GateRow(0.9, 2.0, True, False)] * 6 + [GateRow(0.9, 0.1, False, True)] * 3 + [GateRow(0.2, 3.0, False, True)]
    )
    gate = calibrate(rows)
    assert 0.2 < gate.recall < 0.9
    assert 0.1 < gate.margin < 2.0
    assert gate.calibration is not None
    assert gate.calibration.gated == 1.0
    assert (gate.calibration.folded, gate.calibration.in_context, gate.calibration.fallbacks) == (0.6, 0.4, 0.4)
    assert gate.calibration.sentence == (
        "on 10 validation questions: folded 60.0%, in context 40.0%, gated 100.0% with 40.0% of the questions read in "
        "context"
    )


def test_where_folding_is_always_right_everything_seen_passes() -> None:
    gate = calibrate([GateRow(recall, 0.5, True, True) for recall in (0.6, 0.7, 0.8)])
    assert gate.decide(0.6, 0.4).accepted
    assert not gate.decide(0.3, 0.5).accepted
    assert gate.calibration is not None
    assert gate.calibration.fallbacks == 0


@pytest.mark.parametrize(
    ("recall", "margin", "accepted", "said"),
    [
        (0.9, None, True, r"recalls its facts with 0\.900, the gate asks for 0\.500"),
        (0.4, None, False, r"0\.400, below the gate's 0\.500: the facts are read in context"),
        (0.4, 9.0, False, r"0\.400, below the gate's 0\.500"),
        (math.nan, 9.0, False, "not a number"),
        (0.9, 0.1, False, r"beats the next one by 0\.100, below the gate's 0\.200"),
        (0.9, 0.2, True, r"recall 0\.900 and margin 0\.200 reach the gate's 0\.500 and 0\.200"),
        (0.9, math.inf, True, "reach"),
        (0.9, math.nan, False, "not a number"),
    ],
)
def test_a_decision_names_the_number_and_the_threshold(
    recall: float, margin: float | None, accepted: bool, said: str
) -> None:
    decision = Gate(0.5, 0.2).decide(recall, margin)
    assert decision.accepted is accepted
    assert re.search(said, decision.reason)


def test_what_was_known_before_folding_is_said() -> None:
    assert "0.300 (0.28 before folding), below the gate's 0.500" in Gate(0.5).adapter(0.3, base=0.28).reason


def test_a_gate_goes_through_json() -> None:
    gate = calibrate([GateRow(0.9, 1.0, True, True), GateRow(0.5, 0.5, False, None)])
    assert Gate.from_dict(json.loads(json.dumps(gate.to_dict(), allow_nan=False))) == gate
    opened = Gate.from_dict(json.loads(json.dumps(Gate.open().to_dict(), allow_nan=False)))
    assert opened == Gate.open()
    assert opened.decide(0.0, 0.0).accepted
    assert not opened.decide(math.nan).accepted


@pytest.mark.parametrize("values", [{}, {"recall": "high", "margin": 0}, {"recall": 1, "margin": 0, "calibration": {}}])
def test_a_broken_gate_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match="expected recall, margin and calibration"):
        Gate.from_dict(values)


def test_bad_rows_are_refused() -> None:
    with pytest.raises(UserError, match="no validation rows"):
        calibrate([])
    with pytest.raises(UserError, match="not a number"):
        calibrate([GateRow(math.nan, 1.0, True)])
    with pytest.raises(UserError, match="expected numbers"):
        Gate(math.nan)


def test_recall_is_a_mean_probability_per_token() -> None:
    assert recall_of([0.0, math.log(2)]) == pytest.approx(0.75)
    assert lift(0.75, 0.5) == pytest.approx(0.5)
    assert lift(1.0, 1.0) == 0.0
    with pytest.raises(UserError, match="no facts"):
        recall_of([])
