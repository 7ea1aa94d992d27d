"""What a device codec must do, for every way to run it: on a GPU, or on the PTX machine."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import pytest
import torch

from qoda_kernels.codebook import Codebook
from qoda_kernels.device_codec import DeviceCodec
from qoda_kernels.errors import PlanError, WireError
from qoda_kernels.layout import HEADER_BYTES, MessagePlan, Slice
from qoda_kernels.statistics import HistogramStatistics
from qoda_kernels.wire import MessageContext
from tests.kernels.codebooks import DTYPES as DTYPES
from tests.kernels.codebooks import codebook_for, context, rotated_codebook
from tests.kernels.extremes import FORMS, extreme
from tests.kernels.reference_codec import ReferenceCodec
from tests.kernels.test_kernels_equal_reference import gradient

Part = tuple[str, int, torch.dtype]
_BITS_VIEWS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Device(Protocol):
    """Where a device codec runs."""

    def codec(self, plan: MessagePlan, codebooks: Mapping[str, Codebook]) -> DeviceCodec:
        """A codec of a plan."""
        ...

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a CPU tensor on the device, at a multiple of 16 bytes."""
        ...

    def synchronise(self) -> None:
        """Wait until the device is done."""
        ...


def plan_of(parts: Sequence[Part], codebooks: Mapping[str, Codebook], coordinate: int = 0) -> MessagePlan:
    slices = []
    for index, (key, length, dtype) in enumerate(parts):
        slices.append(Slice(f"layer{index}", 0, length, dtype, key, coordinate))
        coordinate += length
    return MessagePlan.build(slices, codebooks)


def gradients_of(parts: Sequence[Part], seed: int, codebooks: Mapping[str, Codebook]) -> list[torch.Tensor]:
    """Quantized parts with zeros, tiny and non-finite buckets; exact parts finite: NaN's bits are the processor's."""
    tensors = []
    for index, (key, length, dtype) in enumerate(parts):
        if codebooks[key].is_exact:
            tensors.append(torch.randn(length, generator=torch.Generator().manual_seed(seed + index)).to(dtype))
        else:
            tensors.append(gradient(length, dtype, seed + index))
    return tensors


def extremes_of(parts: Sequence[Part], seed: int, codebooks: Mapping[str, Codebook]) -> list[torch.Tensor]:
    """Finite gradients of extreme size, of another form for every part and rank."""
    rng = np.random.default_rng(seed)
    forms = [FORMS[(index + seed) % len(FORMS)] for index in range(len(parts))]
    return [extreme(length, dtype, form, rng) for (_, length, dtype), form in zip(parts, forms, strict=True)]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    view = _BITS_VIEWS[one.dtype.itemsize]
    return one.dtype == other.dtype and torch.equal(one.cpu().view(view), other.cpu().view(view))


def check_against_codec(
    device: Device,
    parts: Sequence[Part],
    codebooks: Mapping[str, Codebook],
    *,
    senders: int = 3,
    coordinate: int = 0,
    seed: int = 1,
    scale: float | None = None,
    strata: int = 1,
    make: Callable[..., list[torch.Tensor]] = gradients_of,
) -> None:
    """Messages and means have the bits of `Codec`, twice in a row; no byte of a message is left as it was."""
    plan = plan_of(parts, codebooks, coordinate)
    twin, codec = ReferenceCodec(plan, codebooks), device.codec(plan, codebooks)
    for counter in (3, 2**32 + 1):
        contexts = [context(rank, counter=counter, strata=strata) for rank in range(senders)]
        messages = []
        for rank, where in enumerate(contexts):
            values = make(parts, seed + 10 * rank, codebooks)
            expected = twin.encode(values, where)
            out = device.place(torch.full((plan.message_bytes,), 255, dtype=torch.uint8))
            got = codec.encode([device.place(tensor) for tensor in values], where, out)
            assert got is out
            assert torch.equal(got.cpu(), expected)
            messages.append(got)
        wanted = twin.decode_mean([message.cpu() for message in messages], contexts[0], scale)
        results = [device.place(torch.full_like(tensor, 7.0)) for tensor in wanted]
        for result, want in zip(codec.decode_mean(messages, contexts, results, scale), wanted, strict=True):
            assert same_bits(result, want)
    device.synchronise()
    codec.check()


def check_every_variant(device: Device, bits: int, method: str) -> None:
    """One code width and rounding method with all dtypes, norms, norm formats, tile widths and tails."""
    codebooks, parts = {}, []
    for index, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        for narrow in (False, True):
            norm, norm_format = (("max", "fp32"), ("l2", "bf16"), ("l2", "fp32"), ("max", "bf16"))[
                (index + 2 * narrow) % 4
            ]
            size = (128, 384, 640)[index] if narrow else (512, 256, 2048)[index]
            key = f"{dtype}{narrow}"
            codebooks[key] = codebook_for(method, bits, bucket_size=size, norm=norm, norm_format=norm_format)
            parts += [(key, length, dtype) for length in (1, 255, 0, 1543)]
    check_against_codec(device, parts, codebooks, coordinate=2**32 - 9000, senders=2)


def check_clipping(device: Device, bits: int, method: str) -> None:
    """Codebooks with a clip value in place of norms: within, far beyond, and so small that it is scaled up."""
    codebooks, parts = {}, []
    for index, (clip, norm_format) in enumerate(((2.7, "fp32"), (0.013, "bf16"), (1e-29, "fp32"))):
        codebooks[str(index)] = codebook_for(method, bits, bucket_size=512, norm_format=norm_format, clip=clip)
        parts += [(str(index), length, (torch.float32, torch.bfloat16)[index % 2]) for length in (1, 1543)]
    check_against_codec(device, parts, codebooks, senders=2)


def check_extremes(device: Device, seed: int, rotates: bool) -> None:
    """The largest and the smallest numbers of every dtype, alone and beside ordinary ones, as means and as sums."""
    if rotates:
        codebooks = {
            f"{rounding}{norm_format}": rotated_codebook(rounding, 4, 256, norm_format)
            for rounding, norm_format in (("nearest", "fp32"), ("stochastic", "bf16"))
        }
    else:
        codebooks = {
            f"{norm}{norm_format}": codebook_for("minimum", 4, bucket_size=256, norm=norm, norm_format=norm_format)
            for norm, norm_format in (("max", "bf16"), ("l2", "fp32"), ("l2", "bf16"))
        }
        codebooks["clip"] = Codebook.uniform(4, bucket_size=256, clip=1e20, norm_format="bf16")
    parts = [(key, length, dtype) for key in codebooks for length, dtype in zip((300, 700, 256), DTYPES, strict=True)]
    for scale in (None, 1.0):
        check_against_codec(device, parts, codebooks, senders=2, seed=seed, scale=scale, make=extremes_of)


def check_stratified(device: Device, bits: int, method: str, strata: int) -> None:
    """Random numbers that are stratified among the ranks, in both tile widths and tails, beyond 2^32 coordinates."""
    codebooks = {
        "wide": codebook_for(method, bits, bucket_size=512),
        "narrow": codebook_for(method, bits, bucket_size=128, norm="l2", norm_format="bf16"),
    }
    parts = [(key, length, dtype) for key in codebooks for length, dtype in ((1543, DTYPES[0]), (300, DTYPES[2]))]
    check_against_codec(device, parts, codebooks, coordinate=2**32 - 1000, senders=2, strata=strata)


def check_rotated(device: Device, rounding: str, bits: int, bucket_size: int, strata: int = 1) -> None:
    """Rotated buckets with all dtypes, norm formats and tails, between others that are not rotated."""
    codebooks = {
        f"{bucket_size}{norm_format}": rotated_codebook(rounding, bits, bucket_size, norm_format)
        for norm_format in ("fp32", "bf16")
    }
    codebooks["plain"] = codebook_for("minimum", 5, norm="l2")
    lengths = (1, 3 * bucket_size - 1, 0, bucket_size, bucket_size + 300)
    parts = [
        (key, length, DTYPES[(index + number) % 3])
        for index, key in enumerate(codebooks)
        for number, length in enumerate(lengths)
    ]
    check_against_codec(device, parts, codebooks, coordinate=2**32 - 1500, senders=2, strata=strata)


def check_exact_segments(device: Device) -> None:
    codebooks = {"off": Codebook.exact(), "on": Codebook.uniform(4)}
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    parts = [("off", length, dtype) for dtype in dtypes for length in (1, 2, 3, 0, 1023, 1025, 2051)]
    check_against_codec(device, [*parts[:9], ("on", 700, torch.float16), *parts[9:]], codebooks, scale=0.7)


def check_non_finite_exact_values(device: Device) -> None:
    codebooks = {"off": Codebook.exact()}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        plan = plan_of([("off", 40, dtype)], codebooks)
        values = torch.linspace(-3, 3, 40).to(dtype)
        values[3], values[7], values[11] = float("nan"), float("inf"), float("-inf")
        codec = device.codec(plan, codebooks)
        out = device.place(torch.zeros(plan.message_bytes, dtype=torch.uint8))
        result = device.place(torch.zeros(40, dtype=dtype))
        message = codec.encode([device.place(values)], context(), out)
        codec.decode_mean([message], [context()], [result])
        torch.testing.assert_close(result.cpu(), values, rtol=0, atol=0, equal_nan=True)


def check_several_codebooks_of_all_methods(device: Device) -> None:
    """The tables of many codebooks lie behind each other in shared memory."""
    codebooks = {
        f"{method}{bits}": codebook_for(method, bits)
        for bits, method in (
            (3, "close"),
            (5, "minimum"),
            (8, "close"),
            (8, "uniform"),
            (2, "uniform"),
            (4, "minimum"),
        )
    }
    parts = [(key, 300 + 100 * index, torch.float32) for index, key in enumerate([*codebooks, *codebooks])]
    check_against_codec(device, parts, codebooks)


def check_messages_of_many_senders(device: Device) -> None:
    """More senders than lanes of a warp, and a payload of several pieces."""
    check_against_codec(
        device, [("other", 9000, torch.float32)], {"other": Codebook.uniform(8, bucket_size=4096)}, senders=34
    )


def check_damage(device: Device, seed: int) -> None:
    """Any damaged word makes every result NaN, raises once at the next call, and the call after that is good again."""
    rng = np.random.default_rng(seed)
    codebooks = {"on": codebook_for("minimum", 5), "off": Codebook.exact()}
    parts = [
        ("on", 3000, torch.float32),
        ("off", 9, torch.float64),
        ("on", 2500, torch.bfloat16),
        ("off", 3, torch.float16),
    ]
    plan = plan_of(parts, codebooks)
    codec = device.codec(plan, codebooks)
    contexts = [context(rank) for rank in range(3)]
    twin = ReferenceCodec(plan, codebooks)
    good = [twin.encode(gradients_of(parts, 1 + rank, codebooks), contexts[rank]) for rank in range(3)]
    results = tuple(device.place(torch.zeros(length, dtype=dtype)) for _, length, dtype in parts)
    broken = [message.clone() for message in good]
    which = int(rng.integers(3))
    place = int(rng.integers(HEADER_BYTES)) if seed % 2 else int(rng.integers(HEADER_BYTES, plan.message_bytes))
    broken[which][place] ^= 1 << int(rng.integers(8))
    codec.decode_mean([device.place(message) for message in broken], contexts, results)
    device.synchronise()
    assert all(torch.isnan(result).all() for result in results)
    with pytest.raises(WireError, match=f"message from source {which}: "):
        codec.decode_mean([device.place(message) for message in good], contexts, results)
    codec.decode_mean([device.place(message) for message in good], contexts, results)
    for result, want in zip(results, twin.decode_mean(good, contexts[0]), strict=True):
        assert same_bits(result, want)
    device.synchronise()
    codec.check()


def check_the_wrong_message_is_named(device: Device) -> None:
    codebooks = {"on": Codebook.uniform(4)}
    plan = plan_of([("on", 600, torch.float32)], codebooks)
    codec = device.codec(plan, codebooks)
    message = device.place(ReferenceCodec(plan, codebooks).encode([torch.randn(600)], context()))
    result = [device.place(torch.zeros(600))]
    for fields, words in (
        ({"counter": 4}, "exchange counter is 3, expected 4"),
        ({"registry_version": 2}, "registry version is 0, expected 2"),
        ({"phase": 1}, "digest"),
        ({"source": 1}, "message from source 1: digest"),
    ):
        wrong: MessageContext = dataclasses.replace(context(), **fields)
        codec.decode_mean([message], [wrong], result)
        device.synchronise()
        with pytest.raises(WireError, match=words):
            codec.check()


def check_what_does_not_fit_is_refused(device: Device) -> None:
    codebooks = {"on": Codebook.uniform(4)}
    plan = plan_of([("on", 600, torch.float32)], codebooks)
    codec = device.codec(plan, codebooks)
    with pytest.raises(PlanError, match="layer0"):
        codec.encode([device.place(torch.zeros(599))], context())
    with pytest.raises(PlanError, match="2 tensors for a plan of 1"):
        codec.encode([device.place(torch.zeros(600))] * 2, context())
    with pytest.raises(PlanError, match="multiple of 16"):
        codec.encode([device.place(torch.zeros(600))], context(), device.place(torch.zeros(9, dtype=torch.uint8)))
    with pytest.raises(PlanError, match="one context a message"):
        codec.decode_mean([], [])
    with pytest.raises(WireError, match="multiple of 16"):
        codec.decode_mean(
            [device.place(torch.zeros(64, dtype=torch.uint8))], [context()], [device.place(torch.zeros(600))]
        )
    many = {f"{index}": codebook_for("close", 8, bucket_size=128) for index in range(40)}
    with pytest.raises(PlanError, match="shared memory"):
        device.codec(plan_of([(key, 5, torch.float32) for key in many], many), many)


def check_statistics(device: Device) -> None:
    """Sums over the cells are those of `HistogramStatistics.gather`, to the resolution of the weights."""
    codebooks = {
        "wide": Codebook.uniform(4),
        "l2": Codebook.uniform(3, bucket_size=256, norm="l2"),
        "off": Codebook.exact(),
    }
    parts = [
        ("wide", 5000, torch.float32),
        ("off", 50, torch.float32),
        ("l2", 3000, torch.float32),
        ("wide", 700, torch.float16),
    ]
    generator = torch.Generator().manual_seed(3)
    values = [
        (torch.randn(n, generator=generator) ** 3 * 10.0**index).to(dtype) for index, (_, n, dtype) in enumerate(parts)
    ]
    values[0][:600] = 0.0
    values[0][1000] = float("inf")
    values[2][::7] = 0.0
    values[0][700:705] *= 1e-9
    codec = device.codec(plan_of(parts, codebooks), codebooks)
    placed = [device.place(tensor) for tensor in values]
    gathered = codec.gather_statistics(placed)
    assert list(gathered) == ["wide", "l2"]
    for key, found in gathered.items():
        book = codebooks[key]
        wanted = HistogramStatistics.merge_in_order(
            [
                HistogramStatistics.gather(tensor.float().numpy(), book.bucket_size, book.norm)
                for tensor, part in zip(values, parts, strict=True)
                if part[0] == key
            ]
        )
        assert (found.bucket_count, found.skipped_buckets) == (wanted.bucket_count, wanted.skipped_buckets)
        np.testing.assert_array_equal(found.cells[:, 0] > 0, wanted.cells[:, 0] > 0)
        np.testing.assert_allclose(found.cells, wanted.cells, rtol=1e-5, atol=1e-12 * wanted.weight)
    again = codec.gather_statistics(placed)
    assert all(np.array_equal(again[key].cells, gathered[key].cells) for key in gathered)
