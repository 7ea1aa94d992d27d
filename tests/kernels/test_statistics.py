"""Statistics against their definitions: cells, mixtures, merging, and the arrays that travel."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import special
from scipy.integrate import quad
from scipy.stats import norm as normal
from scipy.stats import truncnorm

from qoda_kernels import statistics as module
from qoda_kernels.errors import CodebookError, WireError
from qoda_kernels.levels import quantization_variance, uniform_levels
from qoda_kernels.statistics import (
    BLOCK_COUNT,
    CELL_COUNT,
    HistogramStatistics,
    NormStatistics,
    PiecewiseUniform,
    TruncatedNormalStatistics,
    statistics_class,
)

pytestmark = pytest.mark.filterwarnings("error")

KINDS = [HistogramStatistics, TruncatedNormalStatistics]


def draw(size: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, size).astype(np.float32)


def cell_edges() -> list[float]:
    """Lower ends of cells 1 to the last, from the words at the top of the module."""
    edges = [0.0]
    for octave in range(-24, 0):
        parts = 16 if octave < -8 else 64
        edges += [2.0**octave * (1 + part / parts) for part in range(parts)]
    return [*edges, 1.0]


def naive_cells(values: np.ndarray, bucket_size: int, norm: str) -> np.ndarray:
    """The histogram by its definition, one coordinate at a time."""
    edges = cell_edges()
    cells = np.zeros((CELL_COUNT, 3))
    for start in range(0, values.size, bucket_size):
        bucket = values[start : start + bucket_size]
        if not np.all(np.isfinite(bucket)):
            continue
        exact = bucket.astype(np.float64)
        size = np.float32(np.max(np.abs(exact)) if norm == "max" else math.sqrt(math.fsum(exact * exact)))
        for value in bucket[np.full(bucket.size, size > 0)]:
            u = float(min(abs(value) / size, np.float32(1)))
            cell = 0 if u == 0 else int(np.searchsorted(edges, u, side="right"))
            cells[cell] += float(size) ** 2 * np.array([1, u, u * u])
    return cells


values_of_any_kind = npst.arrays(
    np.float32,
    st.integers(0, 120),
    elements=st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-8, 2.0**-24, 2.0**-25, np.nan, np.inf, 1e-40, 3e38]),
        st.floats(-1, 1, width=32),
        st.floats(-(2.0**-10), 2.0**-10, width=32),
    ),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(values=values_of_any_kind, bucket=st.sampled_from([1, 5, 32, 500]), norm=st.sampled_from(["max", "l2"]))
def test_histogram_equals_its_definition(values, bucket, norm):
    statistics = HistogramStatistics.gather(values, bucket, norm)
    blocks = [values[start : start + bucket] for start in range(0, values.size, bucket)]
    with np.errstate(over="ignore"):
        finite = [
            np.all(np.isfinite(b)) and (norm == "max" or np.isfinite(np.float32(np.sqrt(np.sum(b.astype(float) ** 2)))))
            for b in blocks
        ]
    kept = np.concatenate(
        [b if keep else np.full_like(b, np.nan) for b, keep in zip(blocks, finite, strict=True)] or [values]
    )
    np.testing.assert_allclose(statistics.cells, naive_cells(kept, bucket, norm), rtol=1e-12)
    assert (statistics.bucket_count, statistics.skipped_buckets) == (sum(finite), len(finite) - sum(finite))


def test_the_grid():
    edges = cell_edges()
    assert CELL_COUNT == len(edges) + 1 == 771
    inside = np.array([(low + high) / 2 for low, high in pairwise(edges)])
    for place, u in enumerate(np.concatenate((inside, edges[1:])).astype(np.float32)):
        cells = HistogramStatistics.gather(np.array([u, 1.0], dtype=np.float32), 2, "max").cells
        expected = place % (len(edges) - 1) + (1 if place < inside.size else 2)
        found = np.flatnonzero(cells[:, 0])
        assert set(found) == {expected, CELL_COUNT - 1}, u


@pytest.mark.parametrize("norm", ["max", "l2"])
def test_weight_and_squared_norm_are_those_of_the_values(norm):
    values = draw(5000)
    statistics = HistogramStatistics.gather(values, 512, norm)
    blocks = [values[start : start + 512].astype(np.float64) for start in range(0, 5000, 512)]
    sizes = [np.max(np.abs(b)) if norm == "max" else np.linalg.norm(b) for b in blocks]
    assert statistics.weight == pytest.approx(sum(b.size * s**2 for b, s in zip(blocks, sizes, strict=True)), rel=1e-6)
    assert statistics.squared_norm == pytest.approx(np.sum(values.astype(np.float64) ** 2), rel=1e-6)
    # All ten buckets are sampled.
    sampled = TruncatedNormalStatistics.gather(values, 512, norm)
    assert sampled.weight == pytest.approx(statistics.weight, rel=1e-6)
    assert sampled.squared_norm == pytest.approx(statistics.squared_norm, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("values", "bucket", "norm", "message"),
    [
        (np.zeros(4), 4, "max", "float32"),
        (np.zeros((2, 2), np.float32), 4, "max", "one dimension"),
        (np.zeros(4, np.float32), 0, "max", "bucket size"),
        (np.zeros(4, np.float32), 4, "l1", "norm"),
    ],
)
def test_what_gather_refuses(kind, values, bucket, norm, message):
    with pytest.raises(CodebookError, match=message):
        kind.gather(values, bucket, norm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_buckets_that_are_not_finite_are_skipped_and_counted(kind, norm, bad):
    values = draw(1000)
    expected = kind.gather(np.delete(values, np.s_[200:300]), 100, norm)
    values[250] = bad
    statistics = kind.gather(values, 100, norm)
    assert (statistics.bucket_count, statistics.skipped_buckets) == (9, 1)
    assert statistics.weight == pytest.approx(expected.weight, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_buckets_weigh_nothing(kind):
    statistics = kind.gather(np.zeros(1000, dtype=np.float32), 100, "max")
    assert (statistics.bucket_count, statistics.skipped_buckets, statistics.weight) == (10, 0, 0.0)
    points = np.linspace(0, 1, 5)
    for answer in (*statistics.cumulative_moments(points), statistics.density(points), statistics.quantile(points)):
        np.testing.assert_array_equal(answer, np.zeros(5))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    inside=npst.arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 0.999)),
    weights=npst.arrays(np.float64, 12, elements=st.floats(0.1, 10)),
    cell=st.integers(1, CELL_COUNT - 3),
)
def test_cells_keep_their_moments(inside, weights, cell):
    edges = np.array(cell_edges())
    low, width = edges[cell], edges[cell + 1] - edges[cell]
    u, w = low + width * inside, weights[: inside.size]
    cells = np.zeros((CELL_COUNT - 2, 3))
    cells[cell] = [np.sum(w), np.sum(w * u), np.sum(w * u * u)]
    table = PiecewiseUniform.from_cells(edges, cells)
    zero, one, two = (float(m[0]) for m in table.cumulative_moments(np.ones(1)))
    mean = one / zero
    assert zero == pytest.approx(np.sum(w), rel=1e-12)
    assert mean == pytest.approx(np.sum(w * u) / np.sum(w), abs=1e-9 * width + 1e-15)
    # The second moment too, unless the weight is mostly at the ends of the cell: then it is smaller.
    position, spread = (mean - low) / width, np.sum(w * u * u) / zero - mean**2
    largest = (4 * max(position, 1 - position) - 1) / 3 - max(position, 1 - position) ** 2
    expected = min(spread, width**2 * largest)
    assert two / zero - mean**2 == pytest.approx(expected, abs=1e-5 * width**2 + 1e-14)
    assert np.all(table.starts >= low)
    assert np.all(table.starts + table.widths <= low + width)


def test_table_methods_are_consistent():
    statistics = HistogramStatistics.gather(draw(1 << 14), 512, "max")
    points = np.linspace(0, 1, 4001)
    zero, one, two = statistics.cumulative_moments(points)
    assert all(np.all(np.diff(m) >= 0) for m in (zero, one, two))
    inner = statistics.cells[1:-1].sum(axis=0)
    np.testing.assert_allclose([zero[-1], one[-1], two[-1]], inner, rtol=1e-5)
    # A cell with one value is 2**-40 wide: the spacing of float64 is a 4096th of it.
    shares = np.linspace(0.001, 0.999, 777) * zero[-1]
    np.testing.assert_allclose(statistics.cumulative_moments(statistics.quantile(shares))[0], shares, rtol=1e-5)
    table = PiecewiseUniform.from_cells(np.array(cell_edges()), statistics.cells[1:-1])
    wide = table.widths > 2.0**-20
    middle, quarter = (table.starts + table.widths / 2)[wide], table.widths[wide] / 4
    above, below = (statistics.cumulative_moments(middle + side * quarter)[0] for side in (1, -1))
    np.testing.assert_allclose(statistics.density(middle), (above - below) / (2 * quarter), rtol=1e-6)


def test_standard_normal():
    points = np.concatenate((np.linspace(-9, 9, 4001), [-1e150, 1e150, 0.0]))
    found = np.array([module._normal(x) for x in points])
    np.testing.assert_allclose(found[:, 0], special.ndtr(points), rtol=0, atol=4e-16)
    np.testing.assert_allclose(found[:, 1], normal.pdf(points), rtol=0, atol=4e-16)


@pytest.mark.parametrize("mean", [-0.7, -0.02, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("deviation", [0.003, 0.05, 0.3, 1.0])
def test_mixture_moments_against_quadrature(mean, deviation):
    statistics = TruncatedNormalStatistics(np.array([[2.5, mean, deviation]]))
    model = truncnorm((-1 - mean) / deviation, (1 - mean) / deviation, loc=mean, scale=deviation)
    points = np.array([1e-3, 0.02, 0.25, 0.5, 0.71, 1.0])
    found = statistics.mixture_moments(points)
    for power in range(3):
        for place, point in enumerate(points):
            peaks = sorted({min(max(abs(mean) + k * deviation, 0.0), point) for k in (-6, -2, 0, 2, 6)})
            expected, _ = quad(
                lambda u, power=power: u**power * (model.pdf(u) + model.pdf(-u)),
                0,
                point,
                points=peaks,
                limit=400,
                epsabs=0,
                epsrel=1e-11,
            )
            assert found[power][place] == pytest.approx(2.5 * expected, rel=1e-9, abs=1e-13)


def test_tabulated_mixture_equals_the_closed_form():
    statistics = TruncatedNormalStatistics.gather(draw(1 << 16), 512, "max")
    points = np.linspace(0, 1, 1001)
    for exact, tabulated in zip(statistics.mixture_moments(points), statistics.cumulative_moments(points), strict=True):
        np.testing.assert_allclose(tabulated, exact, rtol=0, atol=2e-5 * exact[-1])
    # At the edges of cells there is no difference but rounding.
    edges = np.array(cell_edges())
    exact, tabulated = statistics.mixture_moments(edges)[0], statistics.cumulative_moments(edges)[0]
    np.testing.assert_allclose(tabulated, exact, rtol=0, atol=1e-12 * exact[-1])
    shares = np.linspace(0.01, 0.99, 99) * exact[-1]
    np.testing.assert_allclose(
        statistics.mixture_moments(statistics.quantile(shares))[0], shares, rtol=0, atol=2e-5 * exact[-1]
    )


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("buckets", [1, 10, BLOCK_COUNT, 1000])
def test_truncated_normal_samples_evenly_spaced_buckets(norm, buckets):
    values = draw(100 * buckets - 30) + np.float32(0.2)
    statistics = TruncatedNormalStatistics.gather(values, 100, norm)
    count = min(buckets, BLOCK_COUNT)
    assert statistics.blocks.shape == (count, 3)
    for n in range(count):
        start = n * buckets // count * 100
        bucket = values[start : start + 100].astype(np.float64)
        size = np.max(np.abs(bucket)) if norm == "max" else np.linalg.norm(bucket)
        expected = [size**2 * bucket.size * buckets / count, np.mean(bucket / size), np.std(bucket / size)]
        np.testing.assert_allclose(statistics.blocks[n], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rank_order_merge_equals_the_concatenated_data_and_is_the_same_on_every_rank(kind):
    tensors = [draw(1024 * (rank + 1), seed=rank) * np.float32(10.0**rank) for rank in range(4)]
    parts = [kind.gather(tensor, 256, "max") for tensor in tensors]
    exchanged = [part.to_array() for part in parts]
    merged = [kind.merge_in_order([kind.from_array(array) for array in exchanged]) for _rank in range(4)]
    assert len({m.to_array().tobytes() for m in merged}) == 1
    one_by_one = kind.empty()
    for part in parts:
        one_by_one = one_by_one.merge(part)
    np.testing.assert_array_equal(one_by_one.to_array(), merged[0].to_array())
    whole = kind.gather(np.concatenate(tensors), 256, "max")
    np.testing.assert_allclose(merged[0].to_array(), whole.to_array(), rtol=1e-12)
    levels = uniform_levels(4)
    assert quantization_variance(levels, merged[0]) == pytest.approx(quantization_variance(levels, whole), rel=1e-9)
    assert (merged[0].bucket_count, merged[0].skipped_buckets) == (40, 0)


def test_joined_blocks_keep_the_mixture():
    parts = [
        TruncatedNormalStatistics.gather(draw(1 << 15, seed=rank) * np.float32(rank + 1), 512, "max")
        for rank in range(16)
    ]
    merged = TruncatedNormalStatistics.merge_in_order(parts)
    whole = TruncatedNormalStatistics(np.concatenate([part.blocks for part in parts]))
    assert len(merged.blocks) <= BLOCK_COUNT < len(whole.blocks)
    assert merged.weight == pytest.approx(whole.weight, rel=1e-12)
    assert merged.squared_norm == pytest.approx(whole.squared_norm, rel=1e-12)
    points = np.linspace(0, 1, 101)
    for joined, exact in zip(merged.mixture_moments(points), whole.mixture_moments(points), strict=True):
        np.testing.assert_allclose(joined, exact, rtol=0, atol=2e-3 * exact[-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 100, 1 << 15])
def test_arrays_have_one_length_and_come_back_exactly(kind, size):
    statistics = kind.gather(draw(size), 128, "l2")
    array = statistics.to_array()
    assert array.dtype == np.float64
    assert array.shape == (kind.array_length,)
    again = kind.from_array(array)
    np.testing.assert_array_equal(again.to_array(), array)
    points = np.linspace(0, 1, 64)
    np.testing.assert_array_equal(again.cumulative_moments(points), statistics.cumulative_moments(points))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_arrays_are_refused(kind):
    array = kind.gather(draw(4096), 128, "max").to_array()
    with pytest.raises(WireError, match="float64"):
        kind.from_array(array[:-1])
    with pytest.raises(WireError, match="float64"):
        kind.from_array(array.astype(np.float32))
    for place, value, message in ((3, np.nan, "finite"), (2, -1.0, "negative"), (0, -1.0, "negative")):
        damaged = array.copy()
        damaged[place] = value
        with pytest.raises(WireError, match=message):
            kind.from_array(damaged)
    if kind is TruncatedNormalStatistics:
        array[3] = 1.5
        with pytest.raises(WireError, match="beyond 1"):
            kind.from_array(array)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_do_not_change(kind):
    statistics = kind.gather(draw(512), 128, "max")
    array = statistics.cells if kind is HistogramStatistics else statistics.blocks
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        statistics.bucket_count = 3
    exchanged = statistics.to_array()
    restored = kind.from_array(exchanged)
    exchanged[:] = 0.0
    assert restored.weight == statistics.weight > 0


def test_kinds_by_name():
    for kind in KINDS:
        assert statistics_class(kind.statistics_kind) is kind
    with pytest.raises(CodebookError, match="histogram"):
        statistics_class("quantiles")


def test_norms_are_those_of_the_finite_buckets() -> None:
    values = draw(1000)
    values[300] = np.inf
    values[700] = np.nan
    values[999] = 3e38  # its square is beyond float32
    found = NormStatistics.gather(values, 128, "max")
    kept = np.delete(values, np.r_[256:384, 640:768]).astype(np.float64)
    assert found.squared_norm == pytest.approx(math.fsum(kept * kept), rel=1e-14)
    assert (found.bucket_count, found.skipped_buckets) == (6, 2)
    received = NormStatistics.from_array(found.to_array())
    assert received == found
    assert found.merge(received) == NormStatistics(2 * found.squared_norm, 12, 4)
    assert NormStatistics.empty().merge(found) == found


@pytest.mark.parametrize("array", [[1.0, 0.0], [1.0, 0.0, -1.0], [1.0, 0.0, math.inf]])
def test_damaged_norms_are_refused(array: list[float]) -> None:
    with pytest.raises(WireError):
        NormStatistics.from_array(np.array(array))
