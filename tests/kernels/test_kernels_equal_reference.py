"""The Numba CPU kernels give the bits of the NumPy reference."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qoda_kernels import codec, reference
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.cpu.arguments import BFLOAT16, FLOAT16
from qoda_kernels.cpu.half_precision import round_values, widen_values
from qoda_kernels.cpu.level_tables import kernel_table
from qoda_kernels.cpu.target import bits_in_registers
from qoda_kernels.fastest_method import search_methods
from qoda_kernels.gaussian import nearest_codebook, stochastic_codebook
from tests.kernels.codebooks import DTYPES, codebook_for, context, methods_of, rotated_codebook, single_slice_plan
from tests.kernels.reference_codec import name_of

# Every (bits, method) with every dtype once and both tile widths: each combination costs a second of compilation.
_BUCKETS = {torch.float32: 512, torch.float16: 384, torch.bfloat16: 256}
VARIANTS = [
    (bits, method, DTYPES[(bits + index) % 3] if index else torch.float32, (bits + index) % 4 == 0)
    for bits in range(2, 9)
    for index, method in enumerate(methods_of(bits))
] + [(5, "minimum", torch.float16, False), (5, "minimum", torch.bfloat16, True), (8, "uniform", torch.bfloat16, False)]


def gradient(length: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Gradient with buckets of very different size, zeros, repeated magnitudes and some non-finite values."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-30 if dtype != torch.float16 else -5, 4, size=length // 200 + 1)
    values = rng.standard_normal(length) * np.repeat(scale, 200)[:length]
    values[rng.random(length) < 0.1] = 0.0
    values[rng.random(length) < 0.05] = -values[0] if length else 0.0
    if length and seed % 3 == 0:
        values[rng.integers(length)] = [np.nan, np.inf, -np.inf][seed % 9 // 3]
    if length and seed % 5 == 0:
        values[: length // 3] = 0.0
    return torch.from_numpy(values.astype(np.float32)).to(dtype)


def check_against_reference(
    length: int, codebook: Codebook, dtype: torch.dtype, coordinate: int, seed: int, strata: int = 1
) -> None:
    plan = single_slice_plan(length, codebook, dtype, start=coordinate % 97, offset=coordinate)
    codec = Codec(plan, {"other": codebook})
    segment = plan.segments[0]
    contexts = [context(rank, strata=strata) for rank in range(3)]
    tensors = [gradient(length, dtype, seed + rank) for rank in range(3)]
    messages = [codec.encode([tensor], where) for tensor, where in zip(tensors, contexts, strict=True)]
    expected = []
    for tensor, message, where in zip(tensors, messages, contexts, strict=True):
        place = segment.slice.coordinate, where.key(), where.rotation_key(), name_of(dtype)
        norms, codes = reference.quantize(tensor.float().numpy(), codebook, *place)
        data = message.numpy()
        norm_words = norms.astype("<u4" if codebook.norm_format == "fp32" else "<u2").view(np.uint8)
        np.testing.assert_array_equal(data[segment.begin : segment.codes_begin], norm_words)
        packed = reference.pack(codes, codebook.bits, codebook.format.lanes)
        np.testing.assert_array_equal(data[segment.codes_begin : segment.codes_begin + segment.codes_bytes], packed)
        np.testing.assert_array_equal(reference.unpack(packed, length, codebook.bits, codebook.format.lanes), codes)
        expected.append((norms, codes))
    mean = codec.decode_mean(messages, contexts)[0]
    decoded = segment.slice.coordinate, contexts[0].rotation_key(), name_of(dtype)
    wanted = reference.decode_mean(expected, codebook, np.float32(1 / 3), *decoded)
    if dtype == torch.bfloat16:
        np.testing.assert_array_equal(mean.view(torch.uint16).numpy(), reference.bfloat16_bits(wanted))
    else:
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(mean.view(bits), torch.from_numpy(wanted).to(dtype).view(bits))


@pytest.mark.parametrize(("bits", "method", "dtype", "narrow"), VARIANTS)
def test_every_variant(bits: int, method: str, dtype: torch.dtype, narrow: bool) -> None:
    bucket_size = 128 if narrow else _BUCKETS[dtype]
    for index, length in enumerate((0, 1, 7, 8, 255, 256, 511, 512, 513, 1000, 2048, 3071)):
        norm, norm_format = (("max", "fp32"), ("l2", "bf16"), ("l2", "fp32"), ("max", "bf16"))[index % 4]
        codebook = codebook_for(method, bits, bucket_size=bucket_size, norm=norm, norm_format=norm_format)
        assert reference.rounding_table(codebook).method == (method if method in ("uniform", "minimum") else "search")
        check_against_reference(length, codebook, dtype, coordinate=2**32 - 700 * (index % 3), seed=index)


@pytest.mark.parametrize("method", ["registers", "cells", "gathered cells", "search"])
@pytest.mark.parametrize("bits", [3, 5, 6, 8])
def test_every_way_to_find_an_interval(monkeypatch: pytest.MonkeyPatch, bits: int, method: str) -> None:
    """The one that is the fastest on this processor is what the other tests run."""
    if method not in (*search_methods(bits), "search"):
        pytest.skip(f"this processor does not find {2 ** (bits - 1)} levels by {method}")
    monkeypatch.setattr(codec, "search_method", lambda bits: method)
    for index, length in enumerate((7, 512, 1000, 3071)):
        check_against_reference(length, codebook_for("general", bits), torch.float32, coordinate=5 * index, seed=index)


@pytest.mark.parametrize("way", ["registers", "loads", "gathers"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_way_to_look_up_levels(monkeypatch: pytest.MonkeyPatch, bits: int, way: str) -> None:
    if way == "registers" and not bits_in_registers():
        pytest.skip("this processor cannot look up in registers")
    monkeypatch.setattr(codec, "look_up_way", lambda bits: way)
    for index, length in enumerate((7, 512, 1000, 3071)):
        check_against_reference(length, Codebook.uniform(bits), torch.float32, coordinate=5 * index, seed=index)


@pytest.mark.parametrize(("bits", "method", "dtype"), [(3, "minimum", torch.float32), (4, "uniform", torch.float32)])
@pytest.mark.parametrize(("clip", "norm_format"), [(2.7, "fp32"), (0.013, "bf16"), (1e-29, "fp32"), (1e20, "bf16")])
def test_codebooks_that_clip(bits: int, method: str, dtype: torch.dtype, clip: float, norm_format: str) -> None:
    codebook = codebook_for(method, bits, bucket_size=512, norm_format=norm_format, clip=clip)
    for seed, length in enumerate((1, 513, 3071, 4000)):
        check_against_reference(length, codebook, dtype, coordinate=77, seed=seed)


def test_clipping_sends_the_last_level_and_signals_what_is_not_finite() -> None:
    codebook = Codebook.uniform(4, bucket_size=128, clip=0.5)
    values = torch.zeros(4 * 128)
    values[:4] = torch.tensor([3e38, -7.0, 0.5, -1e-3])
    values[128], values[256] = float("nan"), float("-inf")
    codec = Codec(single_slice_plan(values.numel(), codebook), {"other": codebook})
    message = codec.encode([values], context())
    decoded = codec.decode_mean([message], [context()])[0]
    assert decoded[:3].tolist() == [0.5, -0.5, 0.5]
    assert abs(decoded[3]) <= 0.5 / 7 + 1e-6
    assert torch.isnan(decoded[128:384]).all()
    assert (decoded[4:128] == 0).all()
    assert (decoded[384:] == 0).all()
    segment = codec.plan.segments[0]
    norms = message[segment.begin : segment.codes_begin].view(torch.float32)
    assert norms[0] == 0.5
    assert norms[3] == 0.0


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_exponential_levels_are_found_by_their_exponents(bits: int) -> None:
    codebook = Codebook.exponential(bits)
    table = reference.rounding_table(codebook)
    assert table.method == ("minimum" if bits <= 5 else "search")
    assert kernel_table(table, "minimum" if bits <= 5 else "cells").levels.size <= 2**bits
    check_against_reference(5000, codebook, torch.float32, coordinate=3, seed=1)


@pytest.mark.parametrize(
    ("bits", "method", "dtype", "narrow"),
    [(4, "uniform", torch.float32, False), (5, "minimum", torch.bfloat16, True), (8, "general", torch.float16, False)],
)
def test_stratified_random_numbers(bits: int, method: str, dtype: torch.dtype, narrow: bool) -> None:
    codebook = codebook_for(method, bits, bucket_size=128 if narrow else 512)
    for index, strata in enumerate((2, 3, 4, 7, 63, 64, 1000)):
        check_against_reference(1600 + 7 * index, codebook, dtype, 2**32 - 700 * (index % 3), index, strata)


ROTATED = [
    (2, 512, torch.float32, "nearest"),
    (4, 512, torch.float32, "nearest"),
    (5, 128, torch.float16, "nearest, uniform"),
    (8, 1024, torch.bfloat16, "nearest"),
    (4, 512, torch.bfloat16, "stochastic"),
    (5, 1024, torch.float32, "stochastic"),
    (7, 256, torch.float16, "stochastic"),
]


@pytest.mark.parametrize(("bits", "bucket_size", "dtype", "rounding"), ROTATED)
def test_rotated_buckets(bits: int, bucket_size: int, dtype: torch.dtype, rounding: str) -> None:
    for index, length in enumerate((0, 1, 2, 7, 33, 255, 256, 513, 1000, 1023, 1024, 2048, 3071)):
        norm_format = ("fp32", "bf16")[index % 2]
        codebook = rotated_codebook(rounding, bits, bucket_size, norm_format)
        check_against_reference(length, codebook, dtype, coordinate=2**32 - 700 * (index % 3), seed=index)


@pytest.mark.parametrize("scale", [1e38, 1e-30, 2.0**-140])
def test_rotated_buckets_of_extreme_size(scale: float) -> None:
    """Neither overflow nor subnormal numbers make a difference, nor does what overflows when ranks are added."""
    values = (np.random.default_rng(0).standard_normal(700).clip(-3, 3) * scale).astype(np.float32)
    for codebook in (nearest_codebook(4, False, 512, "fp32"), stochastic_codebook(5, 1024, "fp32")):
        codec = Codec(single_slice_plan(values.size, codebook), {"other": codebook})
        contexts = [context(rank) for rank in range(3)]
        messages = [codec.encode([torch.from_numpy(values)], where) for where in contexts]
        decoded = codec.decode_mean(messages, contexts, scale=1.0)[0].numpy()
        rotation = contexts[0].rotation_key()
        parts = [reference.quantize(values, codebook, 0, where.key(), rotation) for where in contexts]
        wanted = reference.decode_mean(parts, codebook, np.float32(1.0), 0, rotation)
        np.testing.assert_array_equal(decoded.view(np.uint32), wanted.view(np.uint32))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    length=st.integers(0, 20_000),
    variant=st.sampled_from([v for v in VARIANTS if v[2] == torch.float32]),
    bucket_units=st.integers(1, 32),
    norm=st.sampled_from(["max", "l2"]),
    norm_format=st.sampled_from(["fp32", "bf16"]),
    coordinate=st.integers(0, 2**48),
    seed=st.integers(0, 10**6),
)
def test_any_layout(
    length: int,
    variant: tuple[int, str, torch.dtype, bool],
    bucket_units: int,
    norm: str,
    norm_format: str,
    coordinate: int,
    seed: int,
) -> None:
    bits, method, dtype, narrow = variant
    bucket_size = 128 if narrow else 256 * bucket_units
    codebook = codebook_for(method, bits, bucket_size=bucket_size, norm=norm, norm_format=norm_format)
    check_against_reference(length, codebook, dtype, coordinate, seed)


def test_subnormal_norms_and_half_precision_extremes() -> None:
    """Norms down to the smallest float32, and every finite float16, are widened and rounded like the reference's."""
    codebook = Codebook.uniform(4, bucket_size=256)
    tiny = (np.random.default_rng(0).standard_normal(256) * 40).round().astype(np.float32) * np.float32(2.0**-149)
    plan = single_slice_plan(256, codebook)
    codec = Codec(plan, {"other": codebook})
    decoded = codec.decode_mean([codec.encode([torch.from_numpy(tiny)], context())], [context()])[0]
    keys = context().key(), context().rotation_key()
    norms, codes = reference.quantize(tiny, codebook, 0, *keys)
    wanted = reference.decode_mean([(norms, codes)], codebook, np.float32(1.0), 0, keys[1])
    np.testing.assert_array_equal(decoded.numpy(), wanted)
    assert np.abs(decoded.numpy()).max() > 0

    every_half = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    halves = every_half[torch.isfinite(every_half)].contiguous()
    for norm_part in (halves, halves[halves.abs() < 2**-13].contiguous()):
        codec = Codec(single_slice_plan(norm_part.numel(), codebook, torch.float16), {"other": codebook})
        message = codec.encode([norm_part], context())
        norms, codes = reference.quantize(norm_part.float().numpy(), codebook, 0, *keys, "float16")
        segment = codec.plan.segments[0]
        np.testing.assert_array_equal(message[segment.begin : segment.codes_begin].numpy().view(np.uint32), norms)
        np.testing.assert_array_equal(
            message[segment.codes_begin :][: segment.codes_bytes], reference.pack(codes, 4, 32)
        )


def test_fused_multiply_add_of_the_reference_is_correctly_rounded() -> None:
    from fractions import Fraction

    rng = np.random.default_rng(1)
    a, x = rng.standard_normal((2, 3000)).astype(np.float32)
    b = (-(a.astype(np.float64) * x) * (1 + rng.choice([0, 1e-8, 1e-4, 1.0], 3000))).astype(np.float32)
    found = reference.fused_multiply_add(a, x, b)
    for index in range(a.size):
        exact = Fraction(float(a[index])) * Fraction(float(x[index])) + Fraction(float(b[index]))
        below, above = np.nextafter(found[index], -np.inf), np.nextafter(found[index], np.inf)
        error = abs(Fraction(float(found[index])) - exact)
        assert error <= abs(Fraction(float(below)) - exact)
        assert error <= abs(Fraction(float(above)) - exact)


def test_rounding_to_bfloat16_is_torchs_with_one_nan() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    words[:6] = [0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 0x80000000]
    values = words.view(np.float32)
    found = np.empty(values.size, dtype=np.uint16)
    round_values(values, BFLOAT16, found)
    np.testing.assert_array_equal(found, reference.bfloat16_bits(values))
    is_nan = np.isnan(values)
    assert set(found[is_nan]) == {0x7FC0}
    wanted = torch.from_numpy(values[~is_nan]).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(found[~is_nan], wanted)


def test_float16_is_widened_and_rounded_as_numpy_does() -> None:
    """Every float16, and float32 numbers around every midpoint of two of them; one NaN."""
    every = np.arange(2**16, dtype=np.uint16)
    wide = np.empty(every.size, dtype=np.float32)
    widen_values(every, FLOAT16, wide)
    is_nan = np.isnan(every.view(np.float16))
    np.testing.assert_array_equal(np.isnan(wide), is_nan)
    wanted = every.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(wide[~is_nan].view(np.uint32), wanted[~is_nan].view(np.uint32))

    finite = np.sort(wanted[np.isfinite(wanted)])
    middle = (finite[:-1].astype(np.float64) + finite[1:]).astype(np.float32) / np.float32(2)
    values = np.concatenate([middle, np.nextafter(middle, np.float32(9e9)), np.nextafter(middle, np.float32(-9e9))])
    extremes = np.array([65519.996, 65520, 65536, 1e30, -1e30, np.inf, -np.inf, 1e-30, -0.0], dtype=np.float32)
    values = np.concatenate([finite, values, extremes])
    found = np.empty(values.size, dtype=np.uint16)
    round_values(values, FLOAT16, found)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found, values.astype(np.float16).view(np.uint16))
    found = np.empty(1, dtype=np.uint16)
    round_values(np.array([-np.nan], dtype=np.float32), FLOAT16, found)
    assert found[0] == 0x7E00


def test_a_position_and_its_random_number_are_rounded_once() -> None:
    """Every coordinate is one whose product with the scale is rounded to another number if done by itself.

    That changes the code of one coordinate in 2^16, which other tests have too few coordinates to notice.
    """
    candidates = np.random.default_rng(0).uniform(0, 1, 2**21).astype(np.float32)
    product = candidates.astype(np.float64) * (7 << reference.fraction_bits(4))
    chosen = candidates[np.rint(product) != np.rint(product.astype(np.float32))]
    values = np.resize(chosen, 2**19)
    values[::512] = 1.0  # the norm of each bucket
    codebook = Codebook.uniform(4)
    plan, where = single_slice_plan(values.size, codebook), context()
    message = Codec(plan, {"other": codebook}).encode([torch.from_numpy(values)], where)
    segment = plan.segments[0]
    _, codes = reference.quantize(values, codebook, segment.slice.coordinate, where.key(), where.rotation_key())
    packed = reference.pack(codes, 4, codebook.format.lanes)
    found = message.numpy()[segment.codes_begin : segment.codes_begin + segment.codes_bytes]
    np.testing.assert_array_equal(found, packed)
