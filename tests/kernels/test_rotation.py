"""Rotated buckets: the rotation itself, how far messages are unbiased, and how large their errors are."""

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.errors import CodebookError, PlanError
from qoda_kernels.gaussian import level_probabilities, lloyd_max_levels, nearest_codebook, relative_error
from qoda_kernels.rotation import RotationKey, rotate, rotate_back
from tests.kernels.codebooks import context, rotated_codebook, round_trip, single_slice_plan
from tests.kernels.reference_codec import ReferenceCodec

KEY = RotationKey.derive(1, 2, 0)
Float32Array = npt.NDArray[np.float32]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 31, 100, 128, 257, 511, 512, 777, 1023, 1024])
def test_the_rotation_is_orthonormal_and_linear_and_has_an_inverse(length: int) -> None:
    rng = np.random.default_rng(length)
    values, others = rng.standard_normal((2, length)).astype(np.float32)
    rotated = rotate(values, 2**32 - 5, KEY)
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(values), rel=1e-5)
    assert float(rotated @ rotate(others, 2**32 - 5, KEY)) == pytest.approx(float(values @ others), abs=1e-3)
    np.testing.assert_allclose(rotate_back(rotated, 2**32 - 5, KEY), values, atol=1e-5)


def test_every_coordinate_of_a_whole_bucket_is_spread_over_it() -> None:
    for place in (0, 17, 511):
        single = np.zeros(512, dtype=np.float32)
        single[place] = 1.0
        np.testing.assert_allclose(np.abs(rotate(single, 0, KEY)), 512**-0.5, rtol=1e-5)


def test_exchanges_phases_and_buckets_are_rotated_differently() -> None:
    values = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    keys = [
        RotationKey.derive(seed, counter, phase)
        for seed, counter, phase in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))
    ]
    found = [rotate(values, 0, key) for key in keys] + [rotate(values, c, keys[0]) for c in (512, 2**32)]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert abs(float(one @ other)) < 5 * math.sqrt(512)


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_are_lloyds_and_maxs(bits: int) -> None:
    """Each level is the mean of what is rounded to it; the errors are those of Max's table (1960)."""
    levels, spread = lloyd_max_levels(bits)
    draws = np.abs(np.random.default_rng(bits).standard_normal(2_000_000))
    places = np.array(levels) * spread
    nearest = np.searchsorted((places[1:] + places[:-1]) / 2, draws)
    for index in range(0, places.size, max(1, places.size // 4)):
        own = draws[nearest == index]
        assert own.mean() == pytest.approx(places[index], abs=5 * own.std() / math.sqrt(own.size) + 1e-6)
    known = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}
    book = nearest_codebook(bits, False, 512, "fp32")
    error = relative_error(book)
    if bits in known:
        assert error / (1 + error) == pytest.approx(known[bits], rel=3e-3)
    np.testing.assert_allclose(level_probabilities(book), np.bincount(nearest) / draws.size, atol=2e-3)


def gradient(kind: str, length: int) -> Float32Array:
    rng = np.random.default_rng(5)
    draws = {
        "normal": rng.standard_normal(length),
        "laplace": rng.laplace(size=length),
        "t3": rng.standard_t(3, length),
    }
    return draws[kind].astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "laplace", "t3"])
@pytest.mark.parametrize(
    ("rounding", "bits"), [("nearest", 4), ("nearest", 2), ("nearest, uniform", 5), ("stochastic", 5)]
)
def test_the_error_is_the_predicted_one_whatever_the_distribution(kind: str, rounding: str, bits: int) -> None:
    values = gradient(kind, 200 * 512)
    codebook = rotated_codebook(rounding, bits, 512)
    error = np.sum((round_trip(values, codebook) - values) ** 2.0) / np.sum(values**2.0)
    assert error == pytest.approx(relative_error(codebook), rel=0.05)


@pytest.mark.parametrize("length", [512, 300, 40])
@pytest.mark.parametrize(("rounding", "bits"), [("nearest", 4), ("nearest", 2), ("stochastic", 4)])
def test_messages_are_unbiased(rounding: str, bits: int, length: int) -> None:
    """The mean over 2,000 exchanges is the gradient: over rotations, and where rounding is random for each of them.

    Of the standardised deviations of so many coordinates, the mean square lies within five standard deviations of 1; a
    relative bias of a percent would move it by 0.02 n / error.
    """
    values = gradient("laplace", length)
    codec = Codec(single_slice_plan(length, codebook := rotated_codebook(rounding, bits, 512)), {"other": codebook})
    given = [torch.from_numpy(values)]
    contexts = [context(counter=number) for number in range(2000)]
    draws = np.stack([codec.decode_mean([codec.encode(given, where)], [where])[0].numpy() for where in contexts])
    deviations = (draws.mean(axis=0, dtype=np.float64) - values) / (draws.std(axis=0) / math.sqrt(len(contexts)))
    if rounding == "stochastic":
        assert np.mean(deviations**2) < 1 + 5 * math.sqrt(2 / length)
    # Hadamard matrices are not all rotations: the bias that is left is far below the error of one message.
    bias = np.sum((draws.mean(axis=0, dtype=np.float64) - values) ** 2)
    one = np.mean(np.sum((draws - values) ** 2.0, axis=1))
    assert bias < one / 2000 * (1 + 5 * math.sqrt(2 / length)) + 2e-3 * one


def test_rounding_to_nearest_is_biased_where_hardly_anything_differs_from_zero() -> None:
    """What `levels="best"` avoids: rotated, a bucket of two values has four, and the smaller one is rounded away."""
    values = np.zeros(512, dtype=np.float32)
    values[0], values[1] = 1.0, 0.05
    draws = [round_trip(values, rotated_codebook("nearest", 4, 512), counter=number) for number in range(50)]
    assert abs(np.mean(draws, axis=0)[1]) < 0.01
    draws = [round_trip(values, rotated_codebook("stochastic", 4, 512), counter=number) for number in range(400)]
    assert abs(np.mean(draws, axis=0)[1] - 0.05) < 5 * np.std(draws, axis=0)[1] / 20


def test_a_random_rounding_is_unbiased_for_one_rotation_too() -> None:
    """One exchange, 2,000 ranks: only the rounding is random."""
    values, codebook = gradient("t3", 512), rotated_codebook("stochastic", 3, 512)
    codec = Codec(single_slice_plan(512, codebook), {"other": codebook})
    contexts = [context(rank) for rank in range(2000)]
    messages = [codec.encode([torch.from_numpy(values)], where) for where in contexts]
    draws = np.stack([codec.decode_mean([m], [where])[0].numpy() for m, where in zip(messages, contexts, strict=True)])
    deviations = (draws.mean(axis=0, dtype=np.float64) - values) / (draws.std(axis=0) / math.sqrt(len(contexts)))
    assert np.mean(deviations**2) < 1 + 5 * math.sqrt(2 / 512)
    together = codec.decode_mean(messages, contexts)[0].numpy()
    np.testing.assert_allclose(together, draws.mean(axis=0, dtype=np.float64), atol=1e-4)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_zeros_stay_zeros_and_what_is_not_finite_stays_in_its_bucket(rounding: str) -> None:
    values = np.random.default_rng(0).standard_normal(4 * 512 + 100).astype(np.float32)
    values[512:1024] = 0.0
    values[1500], values[-1] = np.inf, np.nan
    decoded = round_trip(values, rotated_codebook(rounding, 4, 512))
    assert not decoded[512:1024].any()
    assert np.isnan(decoded[1024:1536]).all()
    assert np.isnan(decoded[2048:]).all()
    assert np.isfinite(np.delete(decoded, np.r_[1024:1536, 2048 : values.size])).all()


def test_messages_of_different_exchanges_are_not_summed() -> None:
    codebook = rotated_codebook("nearest", 4, 512)
    codec = Codec(single_slice_plan(512, codebook), {"other": codebook})
    contexts = [context(0, counter=1), context(1, counter=2)]
    messages = [codec.encode([torch.randn(512)], where) for where in contexts]
    with pytest.raises(PlanError, match="rotated differently"):
        codec.decode_mean(messages, contexts)


def test_separate_rotations_are_turned_back_one_by_one() -> None:
    """As the reference does for each message alone; the mean of equal gradients then loses nearly all but 1/K."""
    codebook = rotated_codebook("nearest", 3, 512)
    plan = single_slice_plan(20_000, codebook)
    codec = Codec(plan, {"other": codebook})
    values = torch.from_numpy(np.random.default_rng(3).standard_t(3, 20_000).astype(np.float32))
    errors = {}
    for rotations in ("common", "separate"):
        contexts = [dataclasses.replace(context(rank), rotations=rotations) for rank in range(4)]
        messages = [codec.encode([values], where) for where in contexts]
        (mean,) = codec.decode_mean(messages, contexts)
        errors[rotations] = float(((mean - values) ** 2).sum() / (values**2).sum())
    reference_codec = ReferenceCodec(plan, {"other": codebook})
    total = torch.zeros(20_000)
    for message, where in zip(messages, contexts, strict=True):
        np.testing.assert_array_equal(reference_codec.encode([values], where), message)
        total += reference_codec.decode_mean([message], where, scale=1.0)[0]
    np.testing.assert_array_equal((total * 0.25).numpy().view(np.uint32), mean.numpy().view(np.uint32))
    assert errors["separate"] < 0.3 * errors["common"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotation": "fourier"}, "rotation must be one of"),
        ({"rotation": "hadamard", "bucket_size": 384}, "rotated buckets have 128, 256, 512, 1024"),
        ({"rotation": "hadamard", "clip": 1.0}, "does not clip"),
        ({"rounding": "nearest", "norm": "l2", "spread": 1.0}, "needs rotation"),
        ({"rotation": "hadamard", "rounding": "nearest", "spread": 1.0}, 'norm "l2"'),
        (
            {"rotation": "hadamard", "rounding": "nearest", "norm": "l2", "spread": 20.0},
            "no bucket is rounded to zeros",
        ),
        ({"spread": 1.0}, "only codebooks that round to nearest"),
    ],
)
def test_impossible_codebooks_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(CodebookError, match=message):
        Codebook.uniform(4, **fields)
