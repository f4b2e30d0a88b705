"""Number formats: parity with torch, one rounding only, NaN stays NaN."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from slsgu_cli.checkpoints.number_formats import narrow, rounded, widen

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def awkward() -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    special = np.array(
        [0.0, -0.0, 1.0, 65504, 65519.99, 65520, 3.4e38, 1e-45, 6e-8, 2.98e-8, np.inf, -np.inf],
        np.float32,
    )
    halfway = (np.arange(1, 2000, dtype=np.uint32) << np.uint32(16)) + np.uint32(0x8000)
    return np.concatenate([bits.view(np.float32), special, halfway.view(np.float32)])


@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_rounding_agrees_with_torch(dtype: str) -> None:
    values = awkward()
    expected = torch.from_numpy(values.copy()).to(TORCH[dtype]).float().numpy()
    ours = rounded(values, dtype)
    np.testing.assert_array_equal(ours, expected)
    signed = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(ours[signed]), np.signbit(expected[signed]))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_stored_number_survives_a_round_trip_to_the_bit(dtype: str) -> None:
    stored = np.arange(2**16, dtype="<u2").view("<f2" if dtype == "F16" else "<u2")
    wide = widen(stored, dtype)
    known = ~np.isnan(wide)
    back = narrow(wide, dtype)
    np.testing.assert_array_equal(back.view("<u2")[known], stored.view("<u2")[known])
    assert np.isnan(widen(back, dtype))[~known].all()


def test_a_nan_with_a_small_payload_does_not_become_infinity() -> None:
    nan = np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32)
    assert np.isnan(rounded(nan, "BF16")).all()


@pytest.mark.parametrize(("dtype", "digits"), [("F16", 11), ("BF16", 8)])
def test_fp64_is_rounded_once(dtype: str, digits: int) -> None:
    generator = np.random.default_rng(1)
    base = np.ldexp(generator.integers(2 ** (digits - 1), 2**digits, 4000).astype(float), -digits)
    half = 2.0 ** (-digits - 1)
    # Just off a tie, by less than fp32 can hold: rounding twice would call it a tie.
    values = np.concatenate([base + half + s * 2.0**-45 for s in (-1, 0, 1)])
    values = np.concatenate([values, -values])
    got = rounded(values, dtype).astype(np.float64)
    for value, near in zip(values.tolist(), got.tolist(), strict=True):
        scaled = Fraction(abs(value)) * 2**digits
        assert Fraction(abs(near)) * 2**digits == round(scaled)
        assert (near < 0) == (value < 0)


def test_bf16_from_fp64_agrees_with_fp32_where_fp32_is_exact() -> None:
    values = awkward()
    values = values[~np.isnan(values)]
    np.testing.assert_array_equal(rounded(values, "BF16"), rounded(values.astype("f8"), "BF16"))


def test_a_number_without_axes_stays_one() -> None:
    assert narrow(np.float32(1.5).reshape(()), "BF16").shape == ()
