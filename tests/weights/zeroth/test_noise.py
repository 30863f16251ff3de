"""Noise is a pure function of (seed, tensor, index), however it is cut into tiles; rounding at random is unbiased."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentopt.weights.zeroth import _noise, _philox, _rounding

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]


def signs(seed: int, identity: int, start: int, stop: int, scale: float = 1.0) -> Any:
    out = torch.empty(stop - start)
    _noise.fill_sign_range(seed, identity, start, stop, scale, out)
    return out


def test_signs_are_the_bits_of_the_words_lowest_first() -> None:
    expected = [
        1.0 if word >> bit & 1 else -1.0
        for block in range(2)
        for word in _philox.words(9, block, 17, 0)
        for bit in range(32)
    ]
    assert signs(9, 17, 0, 256).tolist() == expected
    assert signs(9, 17, 0, 256, -0.5).tolist() == [-0.5 * sign for sign in expected]


@given(st.integers(0, 700), st.integers(0, 300))
def test_any_range_of_signs_is_a_part_of_the_whole(start: int, count: int) -> None:
    whole = signs(3, 4, 0, 1000, 0.25)
    assert torch.equal(signs(3, 4, start, start + count, 0.25), whole[start : start + count])


def test_filled_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = signs(3, 4, 0, 5000)
    monkeypatch.setattr(_noise, "_FILL", 256)
    assert torch.equal(signs(3, 4, 0, 5000), whole)
    assert abs(float(whole.mean())) < 0.05


def test_packed_signs_start_on_a_word() -> None:
    whole = _noise.sign_words(1, 2, 0, 1024, CPU)
    assert torch.equal(_noise.sign_words(1, 2, 96, 300, CPU), whole[3:10])
    with pytest.raises(ValueError, match="multiple of 32"):
        _noise.sign_words(1, 2, 5, 64, CPU)


@given(st.integers(0, 60), st.integers(0, 60))
def test_any_range_of_normals_and_masks_is_a_part_of_the_whole(start: int, count: int) -> None:
    whole, part = torch.empty(120), torch.empty(count)
    _noise.fill_normals(5, 6, 0, 120, 0.1, whole)
    _noise.fill_normals(5, 6, start, start + count, 0.1, part)
    assert torch.equal(part, whole[start : start + count])
    kept = _noise.random_mask(5, 6, 0, 120, 0.4, CPU)
    assert torch.equal(_noise.random_mask(5, 6, start, start + count, 0.4, CPU), kept[start : start + count])


def test_normals_look_normal() -> None:
    out = torch.empty(200_001)
    _noise.fill_normals(1, 2, 0, out.numel(), 1.0, out)
    assert abs(float(out.mean())) < 0.01
    assert float(out.std()) == pytest.approx(1.0, abs=0.01)
    assert float((out.abs() < 1).float().mean()) == pytest.approx(0.6827, abs=0.005)
    assert abs(float((out[:-1] * out[1:]).mean())) < 0.01


@pytest.mark.parametrize("density", [0.0, 0.25, 1.0])
def test_random_masks_keep_their_share(density: float) -> None:
    kept = _noise.random_mask(1, 2, 0, 100_000, density, CPU)
    assert float(kept.float().mean()) == pytest.approx(density, abs=0.01)


def test_streams_tensors_and_seeds_are_apart() -> None:
    assert _noise.tensor_id("a.weight") != _noise.tensor_id("b.weight")
    assert 0 <= _noise.tensor_id("a.weight") < 1 << 32
    assert not torch.equal(signs(1, 2, 0, 128), signs(1, 3, 0, 128))
    assert not torch.equal(signs(1, 2, 0, 128), signs(2, 2, 0, 128))
    left, right = _noise.factors(1, 2, 3, 40, 30, 2, CPU)
    assert left.shape == (40, 2)
    assert right.shape == (30, 2)
    again, other = _noise.factors(9, 2, 3, 40, 30, 2, CPU)
    assert torch.equal(right, other)
    assert not torch.equal(left, again)


def test_an_example_keeps_its_signs_in_a_larger_batch() -> None:
    few, many = (_noise.example_signs(1, 2, 0, examples, 150, CPU) for examples in (2, 5))
    assert torch.equal(few, many[:2])
    assert few.abs().eq(1).all()
    assert not torch.equal(few, _noise.example_signs(1, 2, 1, 2, 150, CPU))


def rounded(value: Any, dtype: Any, seed: int = 1, start: int = 0) -> Any:
    out = torch.empty(value.numel(), dtype=dtype)
    _rounding.round_(out, value, seed, 2, start)
    return out


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_number_is_kept(dtype: Any) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    again = rounded(every.float(), dtype)
    numbers = ~every.isnan()
    assert torch.equal(again.view(torch.int16)[numbers], every.view(torch.int16)[numbers])
    assert again[~numbers].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [0.020011, -0.30003, 3.3e-6, -1e-9, 7.1e-8])
def test_the_mean_is_kept(dtype: Any, value: float) -> None:
    out = rounded(torch.full((200_000,), value), dtype)
    assert out.unique().numel() == 2
    low, high = (float(edge) for edge in out.float().aminmax())
    assert low < value < high
    share = (value - low) / (high - low)
    found = (float(out.double().mean()) - low) / (high - low)
    assert found == pytest.approx(share, abs=5 * (share * (1 - share) / 200_000) ** 0.5)


@pytest.mark.parametrize("dtype", HALVES)
def test_too_large_saturates(dtype: Any) -> None:
    largest = torch.finfo(dtype).max
    assert rounded(torch.tensor([3.4e38, -3.4e38]), dtype).tolist() == [largest, -largest]


@pytest.mark.parametrize("dtype", HALVES)
@given(start=st.integers(0, 90))
def test_rounding_does_not_depend_on_tiles(dtype: Any, start: int) -> None:
    value = torch.linspace(-1, 1, 100) * 1e-3
    assert torch.equal(rounded(value[start:], dtype, start=start), rounded(value, dtype)[start:])
