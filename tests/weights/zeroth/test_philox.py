"""The generator is Philox4x32-10: Random123's published vectors, and one result in plain Python and in torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentopt.weights.zeroth import _philox

WORD = (1 << 32) - 1
KNOWN = [
    (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((1 << 64) - 1, (WORD, WORD, WORD, WORD), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
words = st.integers(0, WORD)


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN)
def test_known_answers(key: int, counter: tuple[int, int, int, int], expected: str) -> None:
    assert " ".join(f"{word:08x}" for word in _philox.words(key, *counter)) == expected
    drawn = _philox.philox(key, torch.tensor([counter[0]]), *counter[1:])
    assert " ".join(f"{int(word) & WORD:08x}" for word in drawn[0]) == expected


@given(st.integers(0, (1 << 64) - 1), st.lists(words, min_size=1, max_size=5), words, words, words)
def test_tensors_of_counters_give_what_each_counter_gives(key: int, c0: list[int], c1: int, c2: int, c3: int) -> None:
    drawn = _philox.philox(key, torch.tensor(c0), c1, c2, c3)
    expected = [_philox.words(key, one, c1, c2, c3) for one in c0]
    assert [tuple(int(word) & WORD for word in row) for row in drawn] == expected


def test_more_counters_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = torch.arange(1000)
    whole = _philox.philox(7, counters, 3)
    monkeypatch.setattr(_philox, "_TILE", 64)
    assert torch.equal(_philox.philox(7, counters, 3), whole)
    assert torch.equal(_philox.philox(7, counters[100:], 3), whole[100:])
    assert _philox.philox(7, counters[:0], 3).shape == (0, 4)


def test_probe_seeds_differ_by_step_and_direction() -> None:
    seeds = {_philox.probe_seed(run, step, k) for run in (0, 1) for step in range(50) for k in range(4)}
    assert len(seeds) == 400
    assert all(0 <= seed < 1 << 64 for seed in seeds)
    low, high, _, _ = _philox.words(5, 9, 2, 100)
    assert _philox.probe_seed(5, 9, 2) == low | high << 32
