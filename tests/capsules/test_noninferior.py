"""The paired bound: exact where theory says so, never too sure, and right about how many rows it wants."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.capsules.gating._noninferior import Wager, bounds, holm, needed, rows_needed, units_of
from agentopt.errors import UserError


def flips(gains: int, losses: int, n: int) -> list[float]:
    return [1.0] * gains + [-1.0] * losses + [0.0] * (n - gains - losses)


@pytest.mark.parametrize("n", [1, 5, 20, 58, 124])
def test_all_ties_leave_room_for_the_flips_that_were_not_seen(n: int) -> None:
    found = bounds(units_of(flips(0, 0, n)), 0.05)
    assert found.difference == 0
    assert found.lower == pytest.approx(-(1 - 0.05 ** (1 / n)), rel=0.03)
    assert found.upper == -found.lower


def test_ties_are_accepted_only_from_sixty_rows_on() -> None:
    verdicts = {n: bounds(units_of(flips(0, 0, n)), 0.05).verdict for n in (5, 30, 57, 62, 100)}
    assert verdicts == {5: "undecided", 30: "undecided", 57: "undecided", 62: "accepted", 100: "accepted"}


@pytest.mark.parametrize(("losses", "n"), [(1, 40), (3, 40), (10, 120)])
def test_losses_alone_give_the_exact_binomial_bound(losses: int, n: int) -> None:
    from agentopt.evaluation import binomial_lower_bound

    upper = 1 - binomial_lower_bound(n - losses, n, 0.95)
    assert bounds(units_of(flips(0, losses, n)), 0.05).lower == pytest.approx(-upper, rel=0.02)


def false_accepts(n: int, margin: float, gain_rate: float) -> float:
    """Exactly, over every number of gains and losses, with the true difference at -margin."""
    loss_rate, total = gain_rate + margin, 0.0
    for gains, losses in product(range(n + 1), repeat=2):
        if gains + losses > n:
            continue
        tied = n - gains - losses
        ways = math.lgamma(n + 1) - math.lgamma(gains + 1) - math.lgamma(losses + 1) - math.lgamma(tied + 1)
        logs = [(gains, gain_rate), (losses, loss_rate), (tied, 1 - gain_rate - loss_rate)]
        if any(count and rate <= 0 for count, rate in logs):
            continue
        chance = math.exp(ways + sum(count * math.log(rate) for count, rate in logs if count))
        if chance > 1e-7 and bounds(units_of(flips(gains, losses, n)), margin).verdict == "accepted":
            total += chance
    return total


@pytest.mark.parametrize(("n", "margin", "gain_rate"), [(8, 0.1, 0.45), (14, 0.2, 0.0), (14, 0.05, 0.2)])
def test_false_accepts_counted_exactly_stay_below_five_percent(n: int, margin: float, gain_rate: float) -> None:
    assert false_accepts(n, margin, gain_rate) <= 0.0502


def test_a_rare_large_loss_that_the_bootstrap_cannot_see() -> None:
    """Every difference seen is a small gain; the bootstrap's interval lies above zero, the true mean may not."""
    from agentopt.evaluation import bootstrap_interval

    d = [0.01, 0.02] * 15
    assert bootstrap_interval(d, 0.90)[0] > 0
    assert bounds(units_of(d), 0.05).verdict == "undecided"


def test_a_document_is_one_unit_however_many_rows_it_has() -> None:
    d = flips(0, 0, 100)
    assert bounds(units_of(d), 0.05).verdict == "accepted"
    documents = [row // 20 for row in range(100)]
    assert bounds(units_of(d, documents), 0.05).lower == pytest.approx(bounds(units_of([0.0] * 5), 0.05).lower)
    uneven = units_of(d, [0] * 60 + list(range(1, 41)))
    assert uneven.sums.size == 41 and uneven.rows == 100
    assert bounds(uneven, 0.05).lower < bounds(units_of(d), 0.05).lower


@settings(max_examples=25)
@given(
    st.lists(st.floats(-1, 1, allow_nan=False), min_size=1, max_size=30),
    st.integers(0, 3),
    st.floats(0.01, 0.5),
)
def test_bounds_enclose_the_mean_agree_with_the_p_value_and_repeat(d: list[float], groups: int, margin: float) -> None:
    units = units_of(d, [place % groups for place in range(len(d))] if groups else None)
    found = bounds(units, margin)
    assert -1 <= found.lower <= found.difference <= found.upper <= 1
    assert found == bounds(units, margin)
    if abs(found.p_value - 0.05) > 0.001:
        assert (found.p_value < 0.05) == (found.lower > -margin)
    wider = bounds(units, margin, confidence=0.99)
    assert wider.lower <= found.lower and wider.upper >= found.upper


def test_wrong_differences_are_refused() -> None:
    for bad in ([], [2.0], [math.nan]):
        with pytest.raises(UserError):
            units_of(bad)
    with pytest.raises(UserError, match="group"):
        units_of([0.0], [1, 2])
    with pytest.raises(UserError, match="confidence"):
        bounds(units_of([0.0]), 0.05, confidence=1.0)


def test_holm_steps_down_until_one_fails() -> None:
    assert holm([0.04]) == [0.95]
    assert holm([0.01, 0.02]) == pytest.approx([0.975, 0.95])
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([1 - 0.05 / 3, 0.975, 0.975])
    assert holm([0.03, 0.04]) == pytest.approx([0.975, 0.975])


@pytest.mark.parametrize(
    ("margin", "rows"), [(0.05, (124, 248, 495)), (0.03, (344, 688, 1375)), (0.02, (774, 1547, 3093))]
)
def test_rows_needed_by_the_normal_approximation(margin: float, rows: tuple[int, int, int]) -> None:
    assert tuple(needed(margin, flip_rate) for flip_rate in (0.05, 0.1, 0.2)) == rows


def test_this_bound_needs_some_rows_more_and_has_the_power_it_says() -> None:
    assert rows_needed(0.05, 0.0) == 60
    assert all(needed(0.05, rate) < rows_needed(0.05, rate) < needed(0.05, rate) + 60 for rate in (0.02, 0.1, 0.4))
    n, rng = rows_needed(0.1, 0.2), np.random.default_rng(0)
    pairs, counts = np.unique(rng.multinomial(n, [0.1, 0.1, 0.8], size=250)[:, :2], axis=0, return_counts=True)
    accepted = [bounds(units_of(flips(int(g), int(b), n)), 0.1).verdict == "accepted" for g, b in pairs]
    assert float(counts[np.array(accepted)].sum()) / 250 == pytest.approx(0.8, abs=0.08)
    for bad in (0.0, 1.0):
        with pytest.raises(UserError, match="margin"):
            needed(bad, 0.1)
    with pytest.raises(UserError, match="flip rate"):
        needed(0.1, -0.1)


# ---- stopping early


def played(differences: list[float], margin: float = 0.05, **more: float) -> tuple[str, int, Wager]:
    wager = Wager(margin, **more)
    for count, d in enumerate(differences, start=1):
        if wager.add(d) != "undecided":
            return wager.verdict, count, wager
    return wager.verdict, len(differences), wager


def test_bets_decide_clear_cases_early_and_leave_the_others() -> None:
    verdict, count, wager = played([0.0] * 300)
    assert verdict == "accepted" and 60 <= count <= 110 and wager.lower >= -0.0501
    verdict, count, wager = played([-1.0] * 300)
    assert verdict == "rejected" and count <= 10 and wager.upper <= -0.0499
    assert played([0.0] * 5)[0] == "undecided"
    assert played([1.0] * 300)[1] <= 10


def test_false_accepts_with_a_look_after_every_row_stay_below_five_percent() -> None:
    """The true difference is -margin; 80 runs of 150 rows, each looked at 150 times."""
    rng = np.random.default_rng(7)
    for gain, margin in ((0.0, 0.1), (0.2, 0.1)):
        draws = rng.choice([1.0, -1.0, 0.0], p=[gain, gain + margin, 1 - 2 * gain - margin], size=(80, 150))
        accepted = sum(played(row.tolist(), margin)[0] == "accepted" for row in draws)
        assert accepted <= 0.05 * 80 + 2 * math.sqrt(80 * 0.05 * 0.95)


def test_bounds_of_the_bets_only_narrow_and_units_stay_within_what_was_announced() -> None:
    wager, previous = Wager(0.05, largest=4), (-1.0, 1.0)
    rng = np.random.default_rng(1)
    for _ in range(60):
        rows = float(rng.integers(1, 5))
        wager.add(float(rng.uniform(-0.2, 0.2)) * rows, rows)
        low, high = wager.look()
        assert low >= previous[0] and high <= previous[1] and low < high
        previous = (low, high)
    assert previous[0] > -0.5 and wager.evidence >= 0
    with pytest.raises(UserError, match="announced"):
        wager.add(0.0, 5)
    with pytest.raises(UserError, match="announced"):
        wager.add(2.0, 1)
