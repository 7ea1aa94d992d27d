"""Random numbers that are stratified among the ranks: each rank's is uniform, and the errors of the ranks cancel."""

import math

import numpy as np
import pytest
import torch

from qoda_kernels import reference
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.dither import MAX_STRATA, DitherKey, stratified
from tests.kernels.codebooks import context, power_codebook, round_trip, single_slice_plan

BUCKET = 512


def mean_error(gradients: np.ndarray, codebook: Codebook, ranks: int, strata: int, counter: int) -> float:
    """Squared error of the ranks' mean."""
    decoded = [
        round_trip(gradients[rank], codebook, rank=rank, counter=counter, strata=strata).astype(np.float64)
        for rank in range(ranks)
    ]
    return float(np.sum((np.mean(decoded, axis=0) - gradients.astype(np.float64).mean(axis=0)) ** 2))


@pytest.mark.parametrize("strata", [2, 3, 5, 48, 63, MAX_STRATA])
def test_each_ranks_number_is_exactly_uniform_given_a_uniform_rotation(strata: int) -> None:
    """Over all rotations and all independent numbers, every 16-bit number occurs equally often, whatever the shift."""
    random = np.arange(2**16, dtype=np.uint32)
    for common in (0, 1, 100, 255):
        counts = np.zeros(2**16, dtype=np.int64)
        for position in range(strata):
            key = DitherKey(0, 0, 0, 0, position, strata)
            found = stratified(random, np.full_like(random, common), key)
            assert np.ptp(found) <= 2**16 // strata + 1  # inside one stratum
            counts += np.bincount(found, minlength=2**16)
        assert counts.min() == counts.max() == strata


def test_the_division_in_float32_is_exact() -> None:
    """What kernels compute, trunc(fma(x, 1/S, 1/(2 S))), is floor(x / S) around every multiple and at random."""
    rng = np.random.default_rng(0)
    for strata in range(2, MAX_STRATA + 1):
        multiples = np.arange(0, strata * 2**16, strata, dtype=np.int64)
        x = np.concatenate([multiples, multiples + strata - 1, rng.integers(0, strata * 2**16, 10_000)])
        inverse = np.float32(1.0) / np.float32(strata)
        half = np.broadcast_to(inverse * np.float32(0.5), x.shape)
        factor = np.broadcast_to(inverse, x.shape)
        found = reference.fused_multiply_add(x.astype(np.float32), factor, half).astype(np.int64)
        np.testing.assert_array_equal(found, x // strata)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_lies_in_a_stratum_of_its_own(ranks: int) -> None:
    keys = [DitherKey.derive(1, 2, rank, 0, ranks) for rank in range(ranks)]
    numbers = np.stack([reference.dither(BUCKET, 32, 12345, key) for key in keys])
    strata = numbers.astype(np.int64) * ranks // 2**16
    assert np.array_equal(np.sort(strata, axis=0), np.broadcast_to(np.arange(ranks)[:, None], strata.shape))
    assert len({tuple(column) for column in strata.T}) == ranks  # the shift differs between coordinates
    together = np.corrcoef(numbers.astype(np.float64) % (2**16 / ranks))  # their places inside are independent
    assert np.abs(together - np.eye(ranks)).max() < 5 / math.sqrt(BUCKET)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    "codebook",
    [Codebook.uniform(4), power_codebook(3, 1.5), power_codebook(6, 0.7)],
    ids=["uniform", "convex", "concave"],
)
def test_every_rank_is_unbiased(codebook: Codebook, rank: int) -> None:
    """The mean over 3,000 exchanges of one rank of three is the gradient, for either sign."""
    values = np.random.default_rng(3).standard_normal(BUCKET).astype(np.float32)
    codec = Codec(single_slice_plan(BUCKET, codebook), {"other": codebook})
    contexts = [context(rank, counter=number, strata=3) for number in range(3000)]
    given = [torch.from_numpy(values)]
    draws = np.stack([codec.decode_mean([codec.encode(given, where)], [where])[0].numpy() for where in contexts])
    draws = draws.astype(np.float64)
    spread = draws.std(axis=0)
    moving = spread > 0
    gap = np.max(np.diff(codebook.levels)) * float(np.max(np.abs(values)))
    allowed = gap * 2.0 ** -(reference.fraction_bits(codebook.bits) + 1)
    error = np.maximum(np.abs(draws.mean(axis=0) - values)[moving] - allowed, 0)
    scores = error / (spread[moving] / math.sqrt(3000))
    assert scores.max() < 5
    assert np.sum(scores**2) < moving.sum() + 5 * math.sqrt(2 * moving.sum())


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("codebook", [Codebook.uniform(4), power_codebook(5, 1.5)], ids=["uniform", "convex"])
def test_the_means_variance_falls_for_unrelated_gradients(codebook: Codebook, ranks: int) -> None:
    """Compared with independent numbers, 1 - (1 - 1 / S^2) / 2 E[gap]^2 / E[gap^2] over coordinates uniform in (-1, 1).

    With equal gaps that is .625 for 2 ranks, .556 for 3, .531 for 4: the error of a rank in a wide gap is only partly
    cancelled by that of another in a narrow one.
    """
    gaps = np.diff(codebook.levels)
    wanted = 1 - (1 - 1 / ranks**2) / 2 * np.sum(gaps**2) ** 2 / np.sum(gaps**3)
    rng = np.random.default_rng(ranks)
    gradients = rng.uniform(-1, 1, (ranks, 400 * BUCKET)).astype(np.float32)
    ratio = mean_error(gradients, codebook, ranks, ranks, 5) / mean_error(gradients, codebook, ranks, 1, 5)
    assert ratio == pytest.approx(wanted, abs=0.01)


def test_the_means_variance_for_gaussian_and_for_equal_gradients() -> None:
    rng = np.random.default_rng(0)
    codebook = power_codebook(4, 1.5)
    gradients = rng.standard_normal((4, 400 * BUCKET)).astype(np.float32)
    ratio = mean_error(gradients, codebook, 4, 4, 5) / mean_error(gradients, codebook, 4, 1, 5)
    assert 0.5 < ratio < 0.66
    equal = np.stack([gradients[0]] * 4)
    ratio = mean_error(equal, codebook, 4, 4, 5) / mean_error(equal, codebook, 4, 1, 5)
    assert ratio == pytest.approx(1 / 4, abs=0.03)


def test_a_common_key_depends_on_everything_but_the_rank() -> None:
    def common(*arguments: int) -> tuple[int, int]:
        key = DitherKey.derive(*arguments)
        return key.common_first, key.common_second

    base = common(1, 2, 0, 0, 4)
    assert common(1, 2, 3, 0, 4) == base
    others = [common(2, 2, 0, 0, 4), common(1, 3, 0, 0, 4), common(1, 2, 0, 1, 4), common(1, 2, 0, 0, 3)]
    assert len({base, *others}) == 5
    positions = {DitherKey.derive(1, 2, rank, 0, 4).position for rank in range(4)}
    assert positions == set(range(4))
    assert {DitherKey.derive(1, counter, 0, 0, 3).position for counter in range(30)} == {0, 1, 2}
    assert DitherKey.derive(1, 2, 70, 0, 100).strata == MAX_STRATA
