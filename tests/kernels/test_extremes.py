"""Gradients of the largest and the smallest numbers: finite, unbiased, and equal in the reference and the kernels."""

import dataclasses

import numpy as np
import pytest
import torch

from qoda_kernels import reference
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from tests.kernels.codebooks import DTYPES, context, rotated_codebook, round_trip, single_slice_plan
from tests.kernels.extremes import FORMS, extreme
from tests.kernels.reference_codec import ReferenceCodec

LARGEST = np.finfo(np.float32).max
SMALLEST = np.float32(2.0**-149)
CODEBOOKS = {
    "max": Codebook.uniform(4),
    "max, bf16": Codebook.uniform(4, norm_format="bf16"),
    "l2": Codebook.uniform(4, norm="l2"),
    "l2, bf16": Codebook.uniform(4, norm="l2", norm_format="bf16"),
    "clipped beyond float16": Codebook.uniform(4, clip=1e20, norm_format="bf16"),
    "rotated, to nearest": rotated_codebook("nearest", 4, 512),
    "rotated, to nearest, bf16": rotated_codebook("nearest", 4, 512, "bf16"),
    "rotated, stochastic": rotated_codebook("stochastic", 4, 512),
    "rotated, stochastic, bf16": rotated_codebook("stochastic", 4, 512, "bf16"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(CODEBOOKS))
def test_extreme_buckets_have_the_references_bits_and_finite_means(name: str, dtype: torch.dtype) -> None:
    """Messages of buckets of every size beside each other; their sum may overflow, as any sum."""
    book = CODEBOOKS[name]
    for case in range(2 * len(FORMS)):
        rng = np.random.default_rng(case)
        length = int(rng.choice([1, 40, 512, 1300]))
        plan = single_slice_plan(length, book, dtype)
        codec, twin = Codec(plan, {"other": book}), ReferenceCodec(plan, {"other": book})
        contexts = [context(rank, counter=case) for rank in range(1 + case % 3)]
        values = [extreme(length, dtype, FORMS[(case + rank * (case % 2)) % len(FORMS)], rng) for rank in range(3)]
        messages = [codec.encode([own], where) for own, where in zip(values, contexts, strict=False)]
        for message, own, where in zip(messages, values, contexts, strict=False):
            assert torch.equal(message, twin.encode([own], where))
        for scale in (None, 1.0):
            (found,) = codec.decode_mean(messages, contexts, scale=scale)
            (wanted,) = twin.decode_mean(messages, contexts[0], scale)
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(found.view(bits), wanted.view(bits))
            assert scale is not None or torch.isfinite(found).all()


@pytest.mark.parametrize("name", ["max", "max, bf16", "l2", "l2, bf16"])
@pytest.mark.parametrize("size", [SMALLEST, 5 * SMALLEST, np.float32(2.0**-130), np.float32(2.0**-99), LARGEST])
def test_extreme_buckets_are_unbiased(name: str, size: np.float32) -> None:
    """The mean over 2,000 draws, but for what results are rounded to: float32, half a subnormal number at most."""
    values = (np.random.default_rng(0).uniform(-1, 1, 512) * size).astype(np.float32)
    values[0] = size
    draws = round_trip(np.tile(values, 2000), CODEBOOKS[name]).reshape(2000, 512).astype(np.float64)
    assert np.isfinite(draws).all()
    wide = values.astype(np.float64)
    norm = np.sqrt(np.sum(wide**2)) if "l2" in name else np.abs(wide).max()
    error = np.abs(draws.mean(axis=0) - values)
    gap = min(norm * (1 + 2.0**-7), LARGEST) / 7  # bf16 norms are rounded up
    assert np.all(error <= 5 * gap / 2 / np.sqrt(2000) + 2.0**-150 + gap * 2.0 ** -(reference.fraction_bits(4) + 1))
    assert np.abs(draws - values).max() <= gap * (1 + 1e-5) + 2.0**-149


def test_rotated_subnormal_buckets_do_not_vanish() -> None:
    """One subnormal number, spread over a bucket by the rotation, comes back: its parts are no float32 numbers."""
    values = np.zeros(512, dtype=np.float32)
    values[3] = 7 * SMALLEST
    draws = [round_trip(values, CODEBOOKS["rotated, stochastic"], counter=counter)[3] for counter in range(400)]
    assert np.mean(draws, dtype=np.float64) == pytest.approx(7 * SMALLEST, rel=0.1)


def test_the_mean_of_largest_numbers_is_finite_and_their_sum_infinite() -> None:
    for ranks in (3, 7):
        codec = Codec(single_slice_plan(512, book := Codebook.uniform(4)), {"other": book})
        contexts = [context(rank) for rank in range(ranks)]
        messages = [codec.encode([torch.full((512,), float(LARGEST))], where) for where in contexts]
        assert (codec.decode_mean(messages, contexts)[0] == float(LARGEST)).all()
        assert torch.isinf(codec.decode_mean(messages, contexts, scale=1.0)[0]).all()


def test_the_mean_of_rotations_of_their_own_is_finite_too() -> None:
    """Each message is decoded alone, and the sum of what they decode to must not overflow."""
    codec = Codec(single_slice_plan(512, book := CODEBOOKS["rotated, stochastic"]), {"other": book})
    contexts = [dataclasses.replace(context(rank), rotations="separate") for rank in range(5)]
    messages = [codec.encode([torch.full((512,), float(LARGEST))], where) for where in contexts]
    (mean,) = codec.decode_mean(messages, contexts)
    assert torch.isfinite(mean).all()
    assert float(mean.mean()) > 0.5 * float(LARGEST)


def test_one_rank_with_tiny_gradients_beside_one_with_huge_ones() -> None:
    codec = Codec(single_slice_plan(512, book := Codebook.uniform(4)), {"other": book})
    tiny, huge = torch.full((512,), 2.0**-140), torch.full((512,), 2.0**120)
    contexts = [context(rank) for rank in range(2)]
    for pair, wanted in (((tiny, huge), 2.0**119), ((tiny, tiny), 2.0**-140), ((tiny, tiny * 0), 2.0**-141)):
        messages = [codec.encode([values], where) for values, where in zip(pair, contexts, strict=True)]
        assert (codec.decode_mean(messages, contexts)[0] == wanted).all()
