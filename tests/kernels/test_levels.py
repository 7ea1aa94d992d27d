"""Levels against brute force, and the promises about variance: never worse, bounded, the same bits everywhere."""

import hashlib
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.optimize import minimize

from qoda_kernels.errors import CodebookError
from qoda_kernels.levels import (
    SMALLEST_LEVEL,
    check_levels,
    exponential_levels,
    minimum_variance_levels,
    quantization_variance,
    uniform_levels,
    variance_bound,
)
from qoda_kernels.statistics import HistogramStatistics, TruncatedNormalStatistics

pytestmark = pytest.mark.filterwarnings("error")

KINDS = [HistogramStatistics, TruncatedNormalStatistics]
BUCKET = 512


def sample(name: str, size: int = 1 << 16) -> np.ndarray:
    rng = np.random.default_rng(20261122)
    draws = {
        "normal": lambda: rng.standard_normal(size),
        "laplace": lambda: rng.laplace(size=size),
        "student": lambda: rng.standard_t(3, size),
        "beta": lambda: rng.beta(0.7, 4.0, size) * rng.choice((-1.0, 1.0), size),
    }
    return draws[name]().astype(np.float32)


def normalised(values: np.ndarray, bucket: int, norm: str) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes u and weights of all coordinates, bucket by bucket: the definition, in NumPy."""
    u, weights = [], []
    for start in range(0, values.size, bucket):
        block = np.abs(values[start : start + bucket])
        size = block.max() if norm == "max" else np.float32(np.sqrt(np.sum(block.astype(np.float64) ** 2)))
        if size > 0:
            u.append(np.minimum(block / size, np.float32(1)).astype(np.float64))
            weights.append(np.full(block.size, float(size) ** 2))
    return (np.concatenate(u), np.concatenate(weights)) if u else (np.zeros(0), np.zeros(0))


def sample_variance(levels, u: np.ndarray, weights: np.ndarray) -> float:
    """Psi over the samples themselves, without any grid."""
    points = np.asarray(levels, dtype=np.float64)
    low = np.clip(np.searchsorted(points, u, side="right") - 1, 0, points.size - 2)
    return float(np.sum(weights * (points[low + 1] - u) * (u - points[low])))


class Samples:
    """Exact cumulative moments of samples, for the brute-force search."""

    def __init__(self, u, weights):
        order = np.argsort(u)
        self.u = u[order]
        self.sums = [np.concatenate(([0.0], np.cumsum(weights[order] * self.u**k))) for k in range(3)]

    def moments(self, points):
        place = np.searchsorted(self.u, points, side="right")
        return [total[place] for total in self.sums]


def brute_force_variance(moments, count: int, candidates: np.ndarray) -> float:
    """Least Psi with ``count`` levels: dynamic programming over candidates, then a local search between them."""
    m0, m1, m2 = moments(candidates)
    low, high = candidates[:, None], candidates[None, :]
    cost = (low + high) * (m1[None] - m1[:, None]) - low * high * (m0[None] - m0[:, None]) - (m2[None] - m2[:, None])
    cost = np.where(high > low, cost, np.inf)
    best = cost[0]
    came_from = []
    for _ in range(count - 2):
        through = best[:, None] + cost
        came_from.append(np.argmin(through, axis=0))
        best = np.min(through, axis=0)
    path = [candidates.size - 1]
    for step in reversed(came_from):
        path.append(int(step[path[-1]]))
    inner = candidates[path[1:][::-1]]

    def variance(x):
        points = np.concatenate(([0.0], np.sort(np.clip(x, 0.0, 1.0)), [1.0]))
        p0, p1, p2 = (np.diff(m) for m in moments(points))
        a, c = points[:-1], points[1:]
        return float(np.sum((a + c) * p1 - a * c * p0 - p2))

    options = {"xatol": 1e-9, "fatol": 0.0, "maxiter": 4000, "maxfev": 4000, "adaptive": True}
    return min(float(best[-1]), minimize(variance, inner, method="Nelder-Mead", options=options).fun)


def candidate_levels(u: np.ndarray) -> np.ndarray:
    inner = np.concatenate((np.linspace(0, 1, 402)[1:-1], np.quantile(u, np.linspace(0, 1, 402)[1:-1])))
    return np.unique(np.concatenate(([0.0], inner[(inner > 0) & (inner < 1)], [1.0])))


@pytest.mark.parametrize("bits", range(2, 9))
def test_fixed_sequences(bits):
    count = 2 ** (bits - 1)
    uniform, exponential = uniform_levels(bits), exponential_levels(bits)
    np.testing.assert_allclose(uniform, np.arange(count) / (count - 1), rtol=1e-7)
    ratio = 0.5 if bits < 8 else 0.5**0.5
    np.testing.assert_allclose(exponential[1:], ratio ** np.arange(count - 2, -1.0, -1.0), rtol=1e-7)
    for levels in (uniform, exponential):
        assert levels.dtype == np.float32
        np.testing.assert_array_equal(check_levels(levels, bits), levels)
    assert exponential[1] >= SMALLEST_LEVEL


@pytest.mark.parametrize("bits", [1, 9, 32, 3.0, "4"])
def test_impossible_bits(bits):
    for make in (uniform_levels, exponential_levels):
        with pytest.raises(CodebookError, match="bits"):
            make(bits)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([0, 0.5, 1], "need 4 levels"),
        ([[0, 0.25, 0.5, 1]], "need 4 levels"),
        ([0.1, 0.25, 0.5, 1], "begin with 0"),
        ([0, 0.25, 0.5, 0.9], "end with 1"),
        ([0, 0.5, 0.5, 1], "increase strictly"),
        ([0, 0.75, 0.5, 1], "increase strictly"),
        ([0, 0.5, np.nan, 1], "finite"),
        ([0, 1e-30, 0.5, 1], "2\\*\\*-63"),
        ([0, 0.1, 0.5, 1], "float32"),
        (["a", "b", "c", "d"], "numbers"),
    ],
)
def test_levels_that_cannot_be(levels, message):
    with pytest.raises(CodebookError, match=message):
        check_levels(levels, 3)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("name", ["normal", "laplace", "student", "beta"])
def test_histogram_levels_reach_the_optimum_over_the_samples(name, norm, bits):
    values = sample(name)
    u, weights = normalised(values, BUCKET, norm)
    levels = minimum_variance_levels(HistogramStatistics.gather(values, BUCKET, norm), bits)
    best = brute_force_variance(Samples(u, weights).moments, levels.size, candidate_levels(u))
    assert sample_variance(levels, u, weights) <= best * (1 + 1e-4)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("name", ["normal", "laplace", "student"])
def test_truncated_normal_levels_reach_the_optimum_of_the_mixture(name, bits):
    values = sample(name)
    statistics = TruncatedNormalStatistics.gather(values, BUCKET, "max")
    levels = minimum_variance_levels(statistics, bits).astype(np.float64)
    u, _ = normalised(values, BUCKET, "max")
    best = brute_force_variance(statistics.mixture_moments, levels.size, candidate_levels(u))
    m0, m1, m2 = (np.diff(m) for m in statistics.mixture_moments(levels))
    reached = np.sum((levels[:-1] + levels[1:]) * m1 - levels[:-1] * levels[1:] * m0 - m2)
    assert reached <= best * (1 + 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [3, 5, 8])
def test_gradient_is_zero_at_the_optimum(kind, bits):
    statistics = kind.gather(sample("laplace"), BUCKET, "max")
    levels = minimum_variance_levels(statistics, bits, sweeps=200, tolerance=1e-12).astype(np.float64)
    low, inner, high = levels[:-2], levels[1:-1], levels[2:]

    def relative_gradient(at):
        zero, one, _ = zip(*(statistics.cumulative_moments(points) for points in (low, at, high)), strict=True)
        from_below = one[1] - one[0] - low * (zero[1] - zero[0])
        from_above = high * (zero[2] - zero[1]) - (one[2] - one[1])
        return (from_below - from_above) / (from_below + from_above)

    # A level may stand on a cell that holds a single value: there the gradient jumps through zero.
    nearby = 1e-6 * np.minimum(inner - low, high - inner)
    assert np.max(relative_gradient(inner - nearby)) < 1e-4
    assert np.min(relative_gradient(inner + nearby)) > -1e-4
    if bits == 3:
        assert np.max(np.abs(relative_gradient(inner))) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["normal", "laplace", "student", "beta"])
def test_more_bits_and_more_sweeps_never_hurt(kind, name):
    statistics = kind.gather(sample(name), BUCKET, "max")
    variances = [quantization_variance(minimum_variance_levels(statistics, bits), statistics) for bits in range(2, 9)]
    assert all(fewer > 2 * more for fewer, more in pairwise(variances))
    by_sweeps = [
        quantization_variance(minimum_variance_levels(statistics, 5, sweeps=sweeps), statistics) for sweeps in range(5)
    ]
    assert all(fewer >= more for fewer, more in pairwise(by_sweeps))


magnitudes = st.one_of(
    st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0, 3.0]),
    st.floats(-10, 10, width=32),
    st.floats(0, 2**-10, width=32),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    values=npst.arrays(np.float32, st.integers(0, 200), elements=magnitudes),
    bucket=st.sampled_from([1, 7, 64, 128]),
    norm=st.sampled_from(["max", "l2"]),
    bits=st.integers(2, 8),
    kind=st.sampled_from(KINDS),
)
def test_never_worse_than_fixed_or_previous_levels(values, bucket, norm, bits, kind):
    statistics = kind.gather(values, bucket, norm)
    levels = minimum_variance_levels(statistics, bits)
    np.testing.assert_array_equal(check_levels(levels, bits), levels)
    reached = quantization_variance(levels, statistics)
    assert reached >= 0.0
    assert reached <= quantization_variance(uniform_levels(bits), statistics)
    assert reached <= quantization_variance(exponential_levels(bits), statistics)
    other = np.sqrt(uniform_levels(bits))
    other[1:-1] = other[1:-1].astype(np.float32)
    again = minimum_variance_levels(statistics, bits, previous=other)
    assert quantization_variance(again, statistics) <= quantization_variance(other, statistics)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    values=npst.arrays(np.float32, st.integers(1, 200), elements=magnitudes),
    bucket=st.sampled_from([7, 64, 128]),
    norm=st.sampled_from(["max", "l2"]),
    bits=st.integers(2, 8),
    adaptive=st.booleans(),
)
def test_histogram_variance_is_that_of_the_samples_up_to_the_grid(values, bucket, norm, bits, adaptive):
    statistics = HistogramStatistics.gather(values, bucket, norm)
    levels = (minimum_variance_levels(statistics, bits) if adaptive else uniform_levels(bits)).astype(np.float64)
    u, weights = normalised(values, bucket, norm)
    # Psi is the integral of a function with kinks at the levels, minus the second moment. The model of a cell of
    # width W and weight w has the cell's mean, so a change J of slope inside errs by at most w W J / 4, and its
    # second moment by at most w W**2 / 4.
    wide = (u > 0) & (u < 1)
    exponent = np.frexp(np.where(wide, u, 0.5))[1]
    width = np.where(exponent > -8, 2.0 ** (exponent - 7), np.where(exponent > -24, 2.0 ** (exponent - 5), 2.0**-24))
    start = np.where(exponent > -24, np.floor(u / width) * width, 0.0)
    kink = [
        np.sum((levels[2:] - levels[:-2])[(levels[1:-1] >= s) & (levels[1:-1] <= s + w)])
        for s, w in zip(start, width, strict=True)
    ]
    bound = np.sum(np.where(wide, weights * (width * np.array(kink) + width**2) / 4, 0.0)) if u.size else 0.0
    error = abs(quantization_variance(levels, statistics) - sample_variance(levels, u, weights))
    assert error <= bound + 1e-12 * np.sum(weights)


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("name", ["normal", "laplace", "student", "beta"])
def test_histogram_variance_on_smooth_data(name, norm):
    values = sample(name)
    statistics = HistogramStatistics.gather(values, BUCKET, norm)
    u, weights = normalised(values, BUCKET, norm)
    for bits, tolerance in ((3, 2e-5), (5, 2e-4), (8, 5e-3)):
        for levels in (uniform_levels(bits), exponential_levels(bits), minimum_variance_levels(statistics, bits)):
            expected = sample_variance(levels, u, weights)
            assert quantization_variance(levels, statistics) == pytest.approx(expected, rel=tolerance)


def test_both_kinds_agree_on_normal_data():
    values = sample("normal", 1 << 18)
    histogram = HistogramStatistics.gather(values, BUCKET, "max")
    normal = TruncatedNormalStatistics.gather(values, BUCKET, "max")
    for bits in (3, 4, 5):
        exact = quantization_variance(minimum_variance_levels(histogram, bits), histogram)
        modelled = quantization_variance(minimum_variance_levels(normal, bits), histogram)
        assert modelled <= 1.01 * exact


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_levels_per_type_are_never_worse_than_common_levels(kind, bits):
    types = [kind.gather(sample(name) * scale, BUCKET, "max") for name, scale in (("normal", 1.0), ("beta", 4.0))]
    common = minimum_variance_levels(types[0].merge(types[1]), bits)
    separate = [minimum_variance_levels(statistics, bits) for statistics in types]
    together = sum(quantization_variance(common, statistics) for statistics in types)
    apart = sum(quantization_variance(levels, s) for levels, s in zip(separate, types, strict=True))
    # Strictly better: the two types are different.
    assert apart < together * 0.999


def expected_error(values: np.ndarray, types: np.ndarray, levels_of_types, norm: str) -> float:
    """E|Q(v) - v|**2 of one block whose coordinates have the given types."""
    size = np.max(np.abs(values)) if norm == "max" else np.sqrt(np.sum(values**2))
    u = np.minimum(np.abs(values) / size, 1.0)
    ones = np.ones_like(u)
    return size**2 * sum(
        sample_variance(levels, u[types == m], ones[types == m]) for m, levels in enumerate(levels_of_types)
    )


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_variance_bound_holds(data):
    norm = data.draw(st.sampled_from(["max", "l2"]))
    inner = st.lists(st.floats(1e-4, 0.9999), max_size=14, unique=True)
    levels_of_types = [[0.0, *sorted(levels), 1.0] for levels in data.draw(st.lists(inner, min_size=1, max_size=3))]
    size = data.draw(st.integers(1, 300))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    # Most of the bound is used where coordinates sit near zero or in the middle of the widest bin.
    shape = data.draw(st.sampled_from(["normal", "power", "one", "first bin"]))
    values = {
        "normal": lambda: rng.standard_normal(size),
        "power": lambda: rng.standard_normal(size) ** 5,
        "one": lambda: np.concatenate(([1.0], np.full(size - 1, 1e-3))),
        "first bin": lambda: np.concatenate(([1.0], np.full(size - 1, max(l[1] for l in levels_of_types) / 2))),
    }[shape]()
    types = rng.integers(0, len(levels_of_types), size)
    bound = variance_bound(levels_of_types, size, norm) * np.sum(values**2)
    assert expected_error(values, types, levels_of_types, norm) <= bound * (1 + 1e-9)


def test_variance_bound_values():
    # Ternary: no bin above the first, d = 100: sqrt(d) - 1.
    assert variance_bound([[0, 1]], 100, "max") == pytest.approx(9.0)
    # d = 2 < (2 / .5)**2; ratio 2: (2 + .5)/4 - .5 + .25 * .25 * 2.
    assert variance_bound([[0, 0.5, 1]], 2, "l2") == pytest.approx(0.125 + 0.125)
    # The worst type decides.
    assert variance_bound([[0, 0.5, 1], [0, 0.25, 1]], 64, "l2") == pytest.approx(4.25 / 4 - 0.5 + 4 - 1)
    for levels, dimension, norm in (([], 4, "max"), ([[0, 1]], 0, "max"), ([[0, 1]], 4, "l1")):
        with pytest.raises(CodebookError):
            variance_bound(levels, dimension, norm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", [np.zeros(0), np.zeros(1000), np.full(1000, np.nan), np.tile((-2.0, 0.0, 2.0), 99)])
def test_without_weight_between_0_and_1_the_previous_levels_stay(kind, values):
    # Ternary values: only the histogram has atoms at 0 and 1, a truncated normal spreads them.
    kind = HistogramStatistics if 2.0 in values else kind
    statistics = kind.gather(values.astype(np.float32), 9, "max")
    np.testing.assert_array_equal(minimum_variance_levels(statistics, 4), uniform_levels(4))
    previous = exponential_levels(4)
    np.testing.assert_array_equal(minimum_variance_levels(statistics, 4, previous), previous)


def test_previous_levels_are_checked():
    with pytest.raises(CodebookError, match="need 8 levels"):
        minimum_variance_levels(HistogramStatistics.empty(), 4, previous=uniform_levels(3))


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_fewer_distinct_values_than_levels(bits):
    atoms = np.array([1.0, 0.3, 0.01], dtype=np.float32)[: 2 ** (bits - 1) - 1]
    values = np.resize(atoms, 1000).astype(np.float32)
    statistics = HistogramStatistics.gather(values, 1000, "max")
    levels = minimum_variance_levels(statistics, bits)
    check_levels(levels, bits)
    # Every atom lies on a level, so nothing is lost.
    u, weights = normalised(values, 1000, "max")
    assert sample_variance(levels, u, weights) <= 1e-9 * np.sum(weights)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_values(kind):
    levels = minimum_variance_levels(kind.gather(np.full(4096, 0.37, dtype=np.float32), BUCKET, "l2"), 5)
    check_levels(levels, 5)
    assert np.min(np.abs(levels - 1 / np.sqrt(BUCKET))) < 1e-5


def level_digests() -> str:
    digest = hashlib.sha256()
    rng = np.random.default_rng(1)
    cells = rng.random((64, 3)) * (1.0, 0.02, 0.5)
    blocks = np.concatenate((np.array([64.0, 0.0]), cells.ravel()))
    histogram = np.zeros(HistogramStatistics.array_length)
    # Built from integers, so that the input does not depend on the processor.
    low = np.arange(1, 769) / 1024
    histogram[2:] = np.concatenate(([[0, 0, 0]], np.stack((1 + low, low, low**2), axis=1), [[0, 0, 0]] * 2)).ravel()
    for statistics in (TruncatedNormalStatistics.from_array(blocks), HistogramStatistics.from_array(histogram)):
        for bits in (3, 5, 8):
            digest.update(minimum_variance_levels(statistics, bits).tobytes())
        digest.update(np.stack(statistics.cumulative_moments(np.linspace(0, 1, 100))).tobytes())
    return digest.hexdigest()


def test_the_same_bits_on_a_lesser_processor():
    """The same levels and moments with every vector extension of NumPy, Numba and the C library turned off."""
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    lesser = {
        "NPY_DISABLE_CPU_FEATURES": " ".join(found),
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    code = f"import runpy; print(runpy.run_path({__file__!r})['level_digests']())"
    other = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | lesser, capture_output=True, text=True, timeout=240, check=False
    )
    assert other.returncode == 0, other.stderr
    assert other.stdout.strip() == level_digests()
