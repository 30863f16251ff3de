"""Exp-Golomb and rANS: what comes out is what went in, the size is what was counted, damage is told."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.weights.gg.archive import _expgolomb as eg
from agentopt.weights.gg.archive import _rans as rans
from agentopt.weights.gg.archive import _streams as streams
from agentopt.weights.gg.archive import _tables as tables
from agentopt.weights.gg.archive._expgolomb import DamagedStream

WILD = st.lists(st.integers(0, 9) | st.integers(0, eg.LARGEST), max_size=60)


def laplace(count: int, sigma: float, seed: int = 0) -> np.ndarray:
    return np.rint(np.random.default_rng(seed).laplace(size=count) * sigma / 2**0.5).astype(np.int64)


def counted(symbols: np.ndarray) -> streams.Counts:
    low = int(symbols.min())
    return streams.Counts(low, np.bincount(symbols - low))


@pytest.mark.parametrize("k", range(9))
def test_exp_golomb_of_all_small_numbers(k: int) -> None:
    numbers = np.arange(20_000 if k else 100_001)
    coded = eg.encode(numbers, k)
    assert np.array_equal(eg.decode(coded, len(numbers), k), numbers)
    assert len(coded) == eg.stream_bytes(len(numbers), int(eg.bits(numbers, k).sum()))


def test_exp_golomb_lengths() -> None:
    assert eg.bits(np.array([0]), 0).tolist() == [1]
    assert eg.bits(np.array([0]), 1).tolist() == [2]
    assert eg.bits(np.array([1, 2, 3, 6, 7]), 0).tolist() == [3, 3, 5, 5, 7]


def test_one_code_by_hand() -> None:
    # n = 5, k = 1: 5 + 2 = 7 = 0b111, which has 3 bits, behind 3 - 1 - 1 = 1 zero: 0111, in a lane of 4 bits.
    assert eg.encode(np.array([5]), 1) == bytes([4, 0, 0, 0, 0b01110000])


@given(WILD, st.integers(0, eg.LARGEST_ORDER))
@settings(max_examples=60, deadline=None)
def test_exp_golomb_round_trip(numbers: list[int], k: int) -> None:
    array = np.array(numbers, np.int64)
    assert eg.decode(eg.encode(array, k), len(array), k).tolist() == numbers


@given(st.lists(st.integers(0, 40) | st.integers(0, 2**20), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_best_order_is_the_best_of_all(numbers: list[int]) -> None:
    array = np.array(numbers, np.int64)
    every = [sum(2 * ((n + 2**k).bit_length() - 1) - k + 1 for n in numbers) for k in range(eg.LARGEST_ORDER + 1)]
    assert eg.best_order(array) == (every.index(min(every)), min(every))


def test_zigzag_is_its_own_way_back() -> None:
    values = np.array([0, 1, -1, 2, -2, 2**31 - 1, -(2**31) + 1])
    assert eg.zigzag(values).tolist()[:5] == [0, 1, 2, 3, 4]
    assert np.array_equal(eg.unzigzag(eg.zigzag(values)), values)
    assert eg.zigzag(values).max() <= eg.LARGEST


@given(
    st.lists(st.integers(0, 4000), min_size=1, max_size=300),
    st.sampled_from(streams.TABLE_BITS),
)
@settings(max_examples=60, deadline=None)
def test_rans_round_trip(symbols: list[int], bits: int) -> None:
    array = np.array(symbols)
    table = tables.from_counts(np.bincount(array), bits)
    assert table is not None
    values = np.arange(len(table.frequencies)).astype(np.float32)
    assert rans.decode(rans.encode(array, table), len(array), table, values).tolist() == symbols


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 2049, 10_000])
def test_rans_with_lanes_that_are_not_full(count: int) -> None:
    symbols = laplace(count, 9.0)
    symbols -= symbols.min()
    table = tables.from_counts(np.bincount(symbols), 14)
    assert table is not None
    found = rans.decode(rans.encode(symbols, table), count, table, np.arange(len(table.frequencies)))
    assert np.array_equal(found, symbols)


def test_rans_is_near_the_entropy() -> None:
    # Laplace, a step of 1/36.4 of its standard deviation: h / ln 2 - log2(step) = 7.13 bits.
    symbols = laplace(1 << 18, 36.4)
    counts = counted(symbols)
    coding = streams.choose(counts, step=1.0, raw=False)
    coded = streams.encode(coding, symbols)
    assert len(coded) * 8 < counts.entropy() * 1.006
    assert abs(len(coded) / coding.size - 1) < 0.002
    assert counts.entropy() / len(symbols) == pytest.approx((1 + np.log(2 * 36.4 / 2**0.5)) / np.log(2), abs=0.02)


@given(st.binary(max_size=40), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_noise_is_no_stream(noise: bytes, count: int) -> None:
    table = tables.from_counts(np.array([5, 3, 1]), 12)
    assert table is not None
    coding = streams.Coding("rans", 0, table=table)
    for decode in (
        lambda: eg.decode(noise, count, 3),
        lambda: rans.decode(noise, count, table, np.arange(3)),
        lambda: streams.decode(coding, noise, count, np.abs),
    ):
        with contextlib.suppress(DamagedStream):
            assert len(decode()) == count


@pytest.mark.parametrize("coder", ["eg", "rans"])
def test_a_stream_of_another_length_is_refused(coder: str) -> None:
    symbols = np.abs(laplace(3000, 20.0))
    table = tables.from_counts(np.bincount(symbols), 12)
    assert table is not None
    values = np.arange(len(table.frequencies))
    coded = eg.encode(symbols, 4) if coder == "eg" else rans.encode(symbols, table)
    for bad, count in [(coded[:-2], 3000), (coded + b"\0\0", 3000), (coded, 2999), (coded, 3001), (b"", 3000)]:
        with pytest.raises(DamagedStream):
            _ = eg.decode(bad, count, 4) if coder == "eg" else rans.decode(bad, count, table, values)


@pytest.mark.parametrize("kind", ["eg", "rans", "gg"])
def test_values_outside_of_the_table_and_every_coding(kind: str) -> None:
    symbols = laplace(5000, 8.0)
    symbols[[0, 77, 4999]] = [2**31 - 1, -(2**31) + 1, 40_000]
    table = {
        "eg": None,
        "rans": tables.from_counts(counted(symbols[np.abs(symbols) < 30]).counts, 12),
        "gg": tables.from_gg(1.0, 6.0, 1.0, 30, 12),
    }[kind]
    low = int(symbols[np.abs(symbols) < 30].min()) if kind == "rans" else -30
    coding = streams.Coding(kind, 0, k=3, low=low, table=table)
    coded = streams.encode(coding, symbols)
    assert np.array_equal(streams.decode(coding, coded, len(symbols), np.positive), symbols)


def test_a_table_from_a_gg_is_the_same_everywhere() -> None:
    """The very frequencies: a machine that disagrees could not read what another one wrote."""
    table = tables.from_gg(0.7, 0.013, 0.0011, 200, 14)
    assert table.frequencies[190:201].tolist() == [220, 235, 251, 268, 288, 310, 336, 366, 402, 450, 704]
    assert streams.Coding("gg", 0, table=table).checksum == 3469946663
    assert int(table.frequencies.sum()) == 1 << 14
    assert np.array_equal(table.frequencies, table.frequencies[::-1])


@pytest.mark.parametrize(("nu", "sigma"), [(0.5, 30.0), (1.0, 12.0), (2.0, 36.0)])
def test_a_gg_costs_little_more_than_the_counts(nu: float, sigma: float) -> None:
    rng = np.random.default_rng(3)
    sample = np.sign(rng.normal(size=1 << 17)) * rng.gamma(1 / nu, 1.0, 1 << 17) ** (1 / nu)
    symbols = np.rint(sample / sample.std() * sigma).astype(np.int64)
    reach = int(np.abs(symbols).max())
    counts = np.bincount(symbols + reach, minlength=2 * reach + 1)
    found, b = tables.fit_gg(np.abs(np.arange(-reach, reach + 1)), counts)
    assert found == pytest.approx(nu, rel=0.05)
    table = tables.from_gg(found, b * 0.5, 0.5, reach, 16)
    assert table.cost(counts) < 1.012 * streams.Counts(-reach, counts).entropy()


def test_the_stored_table_is_the_best_of_small_ones() -> None:
    """Against all tables of 3 symbols that add up to 256."""
    counts = np.array([700, 41, 3])
    table = tables.from_counts(counts, 8)
    assert table is not None
    every = [
        rans.Table(np.array([a, b, 256 - a - b]), 8).cost(counts) for a in range(1, 255) for b in range(1, 256 - a)
    ]
    assert table.cost(counts) == pytest.approx(min(every))


def test_a_few_numbers_take_exp_golomb_and_many_take_a_table() -> None:
    few, many = np.array([0, 1, -1, 0, 2, 0]), laplace(50_000, 5.0)
    assert streams.choose(counted(few), step=1.0, raw=False).kind == "eg"
    assert streams.choose(counted(many), step=1.0, raw=False).kind in ("rans", "gg")
    assert streams.choose(streams.Counts(0, np.full(256, 9)), step=None, raw=True).kind == "raw"
