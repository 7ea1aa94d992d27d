"""Statistical and exact properties of the quantizer (invariants 2, 3 and 4 of the design)."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qoda_kernels import reference
from qoda_kernels.codebook import Codebook
from qoda_kernels.levels import variance_bound
from tests.kernels.codebooks import codebook_for, methods_of, power_codebook, round_trip

ALL_KINDS = [(bits, method) for bits in range(2, 9) for method in methods_of(bits)]
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def read_norm(bucket: np.ndarray, norm: str, norm_format: str) -> float:
    """Norm of a bucket as the receiver reads it."""
    scale = reference.bucket_scale(bucket)
    word = reference.norm_word(reference.bucket_norm(bucket * scale, norm), norm_format, scale)
    found, power = reference.norm_of_word(word, norm_format, reference.LARGEST["float32"])
    return float(found) * float(power)


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize(("bits", "method"), ALL_KINDS)
def test_unbiased_to_five_standard_errors(bits: int, method: str, norm: str) -> None:
    """The mean over 4,000 draws is the gradient: the errors' sum of z^2 and the largest |z| are as for noise."""
    codebook = codebook_for(method, bits, bucket_size=256, norm=norm)
    values = np.random.default_rng(bits).standard_normal(256).astype(np.float32)
    # 40 exchanges of 100 equal buckets: the random numbers differ between exchanges and between coordinates.
    copies = np.tile(values, 100)
    draws = np.concatenate([round_trip(copies, codebook, counter=n).reshape(100, 256) for n in range(40)])
    draws = draws.astype(np.float64)
    spread = draws.std(axis=0)
    error = draws.mean(axis=0) - values
    gap = np.max(np.diff(codebook.levels)) * float(np.max(np.abs(values)) if norm == "max" else np.linalg.norm(values))
    fixed_point_bias = gap * 2.0 ** -(reference.fraction_bits(bits) + 1)
    moving = spread > 0
    scores = np.maximum(np.abs(error[moving]) - fixed_point_bias, 0) / (spread[moving] / math.sqrt(4000))
    assert scores.max() < 5
    assert np.sum(scores**2) < moving.sum() + 5 * math.sqrt(2 * moving.sum())
    assert np.all(np.abs(error[~moving]) <= gap * 15 / 4000)  # a level never reached in 4,000 draws is improbable


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=hnp.arrays(np.float32, st.integers(1, 128), elements=st.floats(-1, 1, width=32)),
    kind=st.sampled_from(ALL_KINDS),
    norm=st.sampled_from(["max", "l2"]),
    norm_format=st.sampled_from(["fp32", "bf16"]),
)
def test_any_bucket_is_unbiased(values: np.ndarray, kind: tuple[int, str], norm: str, norm_format: str) -> None:
    """The mean over 2,000 draws is within 5 standard errors; these follow from the levels, not from the draws."""
    bits, method = kind
    codebook = codebook_for(method, bits, bucket_size=128, norm=norm, norm_format=norm_format)
    length = float(reference.bucket_norm(values, norm))
    if length < 1e-20:
        return
    bucket = np.zeros(128, np.float32)
    bucket[: values.size] = values
    draws = np.stack([round_trip(np.tile(bucket, 500), codebook, counter=n).reshape(500, 128) for n in range(4)])
    error = np.abs(draws.astype(np.float64).mean(axis=(0, 1)) - bucket)[: values.size]
    levels = np.array(codebook.levels)
    length *= 1 + (2.0**-7 if norm_format == "bf16" else 0.0)  # that format rounds up
    u = np.abs(values.astype(np.float64)) / length
    above = np.clip(np.searchsorted(levels, u, side="right"), 1, levels.size - 1)
    # A bf16 norm is anywhere up to the one assumed here, so u may lie in the bin above: the wider of both counts.
    gap = length * np.maximum(*(np.diff(levels)[np.minimum(above - 1 + k, levels.size - 2)] for k in (0, 1)))
    standard_error = gap / 2 / math.sqrt(2000)
    fixed_point_bias = length * np.max(np.diff(levels)) * 2.0 ** -(reference.fraction_bits(bits) + 1)
    assert np.all(error <= 5 * standard_error + fixed_point_bias)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    values=hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-1, 1, width=32)),
    kind=st.sampled_from(ALL_KINDS),
    norm=st.sampled_from(["max", "l2"]),
)
def test_variance_is_the_formula_and_below_the_bound(values: np.ndarray, kind: tuple[int, str], norm: str) -> None:
    """E|Q(v)-v|^2 = N^2 sum (l_{t+1}-u)(u-l_t), from the exact probabilities of the codes, is at most eps_Q |v|^2."""
    bits, method = kind
    codebook = codebook_for(method, bits, bucket_size=512, norm=norm)
    length = float(reference.bucket_norm(values, norm))
    if length < 1e-20:
        return
    levels = np.array(codebook.levels)
    normalised = np.abs(values.astype(np.float64)) / length
    index = np.clip(np.searchsorted(levels, normalised, side="right") - 1, 0, levels.size - 2)
    formula = length**2 * np.sum((levels[index + 1] - normalised) * (normalised - levels[index]))
    table = reference.rounding_table(codebook)
    one = 2.0 ** reference.fraction_bits(bits)
    position = reference.fixed_point(values, np.float32(length), table, bits, np.zeros(values.size, np.uint32)) / one
    low = np.minimum(np.floor(position).astype(int), levels.size - 2)
    up = position - low
    codes_variance = (1 - up) * (levels[low] - normalised) ** 2 + up * (levels[low + 1] - normalised) ** 2
    assert length**2 * np.sum(codes_variance) == pytest.approx(formula, rel=1e-2, abs=length**2 * values.size / one)
    bound = variance_bound([levels], values.size, norm)
    assert formula <= bound * float(np.sum(values.astype(np.float64) ** 2)) * (1 + 1e-6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    values=hnp.arrays(np.float32, st.integers(0, 700), elements=finite),
    kind=st.sampled_from(ALL_KINDS),
    norm=st.sampled_from(["max", "l2"]),
    norm_format=st.sampled_from(["fp32", "bf16"]),
    counter=st.integers(0, 2**40),
)
def test_decoded_values_are_the_two_levels_around(
    values: np.ndarray, kind: tuple[int, str], norm: str, norm_format: str, counter: int
) -> None:
    bits, method = kind
    codebook = codebook_for(method, bits, bucket_size=128, norm=norm, norm_format=norm_format)
    decoded = round_trip(values, codebook, counter=counter)
    levels = np.array(codebook.levels, dtype=np.float64)
    for begin in range(0, values.size, 128):
        bucket, result = values[begin : begin + 128].astype(np.float64), decoded[begin : begin + 128].astype(np.float64)
        length = read_norm(values[begin : begin + 128], norm, norm_format)
        assert length >= np.abs(bucket).max()
        assert np.all(bucket * result >= 0)
        if length == 0:
            assert np.array_equal(result, np.zeros_like(result))
            continue
        u, decoded_u = np.abs(bucket) / length, np.abs(result) / length
        index = np.clip(np.searchsorted(levels, u, side="right") - 1, 0, levels.size - 2)
        gap = levels[index + 1] - levels[index]
        slack = 2.0 ** -(reference.fraction_bits(bits)) * gap + 1e-6 + 2.0**-149 / length
        assert np.all(decoded_u >= levels[index] - slack - 1e-6)
        assert np.all(decoded_u <= levels[index + 1] + slack + 1e-6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(kind=st.sampled_from(ALL_KINDS), exponent=st.integers(-90, 90), seed=st.integers(0, 10**6), norm=st.just("max"))
def test_values_on_a_level_and_zeros_are_exact(kind: tuple[int, str], exponent: int, seed: int, norm: str) -> None:
    """Whatever the random numbers, what lies on a level stays there: encoding decoded values changes nothing."""
    bits, method = kind
    codebook = codebook_for(method, bits, bucket_size=256, norm=norm)
    rng = np.random.default_rng(seed)
    scale = np.float32(rng.uniform(1, 2) * 2.0**exponent)
    signed = reference.signed_levels(codebook)
    values = (scale * signed[rng.integers(signed.size, size=300)]).astype(np.float32)
    values[[0, 256]] = scale
    np.testing.assert_array_equal(round_trip(values, codebook, counter=seed), values)
    zeros = np.zeros(300, dtype=np.float32)
    np.testing.assert_array_equal(round_trip(zeros, codebook, counter=seed), zeros)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(ALL_KINDS),
    place=st.integers(0, 1023),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    norm=st.sampled_from(["max", "l2"]),
    norm_format=st.sampled_from(["fp32", "bf16"]),
)
def test_non_finite_stays_in_its_bucket(
    kind: tuple[int, str], place: int, bad: float, norm: str, norm_format: str
) -> None:
    bits, method = kind
    codebook = codebook_for(method, bits, bucket_size=256, norm=norm, norm_format=norm_format)
    values = np.random.default_rng(place).standard_normal(1024).astype(np.float32)
    clean = round_trip(values, codebook)
    values[place] = bad
    decoded = round_trip(values, codebook)
    inside = np.arange(1024) // 256 == place // 256
    assert not np.isfinite(decoded[inside]).any()
    np.testing.assert_array_equal(decoded[~inside], clean[~inside])


def test_l2_norm_neither_overflows_nor_vanishes() -> None:
    for scale in (1e-44, 1e-38, 1e-25, 1.0, 1e18, 1e30, 1e37):
        values = np.random.default_rng(0).uniform(-1, 1, 500).astype(np.float32) * np.float32(scale)
        wanted = np.linalg.norm(values.astype(np.float64))
        found = float(reference.bucket_norm(values, "l2"))
        assert found == pytest.approx(wanted, rel=1e-5, abs=2e-45)
        assert found >= np.abs(values).max()
    largest = np.full(8, np.finfo(np.float32).max, dtype=np.float32)
    assert reference.bucket_norm(largest, "l2") == np.finfo(np.float32).max
    assert np.isfinite(round_trip(largest, Codebook.uniform(4, norm="l2"))).all()


@pytest.mark.parametrize("method", ["uniform", "minimum"])
def test_coordinates_on_levels_stay_there_whatever_the_random_number(method: str) -> None:
    """Truncation would misplace several per cent of on-level inputs; rounding to nearest misplaces none."""
    codebook = power_codebook(5, 1.5 if method == "minimum" else 1.0, bucket_size=256)
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.5, 2, 2000).astype(np.float32)
    table = reference.rounding_table(codebook)
    assert table.method == method
    levels = np.array(codebook.levels, dtype=np.float32)
    one = 1 << reference.fraction_bits(5)
    random = rng.integers(one, size=(2000, 16), dtype=np.uint32)
    positions = np.stack(
        [reference.fixed_point(levels * s, s, table, 5, r) for s, r in zip(scales, random, strict=True)]
    )
    np.testing.assert_array_equal(positions, np.arange(16) * one + random)
