"""The random numbers: uniform, independent between coordinates, rows, ranks, phases and exchanges."""

import itertools
import math

import numpy as np
import pytest

from qoda_kernels import reference
from qoda_kernels.dither import DitherKey, hash32

COUNT = 1 << 18


def chi_square_score(observed: np.ndarray, expected: float) -> float:
    """How many standard deviations a chi-square statistic lies from its mean."""
    degrees = observed.size - 1
    return float((np.sum((observed - expected) ** 2) / expected - degrees) / math.sqrt(2 * degrees))


def streams() -> dict[str, tuple[DitherKey, int]]:
    """Keys (and high words of coordinates) that training uses side by side."""
    return {
        "rank 0": (DitherKey.derive(0, 0, 0, 0), 0),
        "rank 1": (DitherKey.derive(0, 0, 1, 0), 0),
        "phase 1": (DitherKey.derive(0, 0, 0, 1), 0),
        "next exchange": (DitherKey.derive(0, 1, 0, 0), 0),
        "other seed": (DitherKey.derive(1, 0, 0, 0), 0),
        "next 2^32 coordinates": (DitherKey.derive(0, 0, 0, 0), 1),
    }


def words(stream: tuple[DitherKey, int]) -> np.ndarray:
    key, high = stream
    return hash32(np.arange(COUNT, dtype=np.uint32), high, key)


@pytest.mark.parametrize("name", streams())
def test_each_half_is_uniform_and_serially_independent(name: str) -> None:
    found = words(streams()[name])
    for half in (found & 0xFFFF, found >> 16):
        counts = np.bincount(half >> 6, minlength=1024)
        assert abs(chi_square_score(counts, COUNT / 1024)) < 5
        for lag in (1, 2, 16, 32, 64, 128, 512):
            pairs = (half[:-lag] >> 12).astype(np.int64) * 16 + (half[lag:] >> 12)
            assert abs(chi_square_score(np.bincount(pairs, minlength=256), (COUNT - lag) / 256)) < 5


@pytest.mark.parametrize("name", streams())
def test_the_two_halves_are_independent(name: str) -> None:
    found = words(streams()[name])
    pairs = ((found & 0xFFFF) >> 11).astype(np.int64) * 32 + (found >> 27)
    assert abs(chi_square_score(np.bincount(pairs, minlength=1024), COUNT / 1024)) < 5


@pytest.mark.parametrize("pair", list(itertools.combinations(streams(), 2)), ids=str)
def test_streams_are_independent(pair: tuple[str, str]) -> None:
    first, second = (words(streams()[name]) for name in pair)
    for shift in (0, 16):
        a, b = (first >> shift) & 0xFFFF, (second >> shift) & 0xFFFF
        pairs = (a >> 11).astype(np.int64) * 32 + (b >> 11)
        assert abs(chi_square_score(np.bincount(pairs, minlength=1024), COUNT / 1024)) < 5
        total = (a.astype(np.int64) + b) % 65536 >> 6
        assert abs(chi_square_score(np.bincount(total, minlength=1024), COUNT / 1024)) < 5


def test_mean_over_many_ranks_averages_out() -> None:
    """The mean over K ranks of the dither has variance 1/K of one rank's, for every coordinate block."""
    ranks = 64
    total = np.zeros(COUNT // 8)
    for rank in range(ranks):
        key = DitherKey.derive(5, 9, rank, 0)
        total += (hash32(np.arange(COUNT // 8, dtype=np.uint32), 0, key) & 0xFFFF) / 65536 - 0.5
    variance = np.mean((total / ranks) ** 2)
    assert variance == pytest.approx(1 / 12 / ranks, rel=5 * math.sqrt(2 / (COUNT // 8)))


def test_two_seeds_are_no_permutations_of_one_stream() -> None:
    """With `index ^ key` alone, 256 aligned coordinates would get the same set of numbers from many keys."""
    sets = {
        tuple(np.sort(hash32(np.arange(256, dtype=np.uint32), 0, DitherKey(first, second))))
        for first in range(8)
        for second in range(8)
    }
    assert len(sets) == 64


def test_rows_take_their_halves_as_documented() -> None:
    key = DitherKey.derive(1, 2, 3, 0)
    coordinate = 5 * 2**32 + 1000
    random = reference.dither(512, 32, coordinate, key)
    for row, lane, tile in itertools.product(range(8), (0, 31), (0, 1)):
        low = np.array([1000 + tile * 256 + (row % 4) * 32 + lane], dtype=np.uint32)
        word = int(hash32(low, 5, key)[0])
        wanted = word & 0xFFFF if row < 4 else word >> 16
        assert random[tile * 256 + row * 32 + lane] == wanted


def test_keys_differ_in_every_argument() -> None:
    keys = {
        DitherKey.derive(s, c, r, p) for s in (0, 1, 2**63) for c in (0, 1, 2**40) for r in range(4) for p in (0, 1)
    }
    assert len(keys) == 3 * 3 * 4 * 2
