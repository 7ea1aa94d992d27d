"""Random layouts, codebooks, gradients and damage: the fast codec against the reference.

As a program it runs as many cases as wanted: `python -m tests.kernels.fuzz --cases 100000`. A case is one plan of up to
four segments, encoded by up to three senders and decoded. Every message and every mean must have the reference's bits,
and a damaged message must be a WireError; so it is with entropy-coded messages, whose values must be the same.
"""

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qoda_kernels.codebook import EXACT_BITS, Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.coded_message import CodedMessages
from qoda_kernels.errors import WireError
from qoda_kernels.gaussian import nearest_codebook
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.wire import MessageContext
from qoda_kernels.worker_threads import WorkerThreads
from tests.kernels.codebooks import DTYPES, codebook_for, context, methods_of
from tests.kernels.reference_codec import ReferenceCodec
from tests.kernels.test_kernels_equal_reference import gradient

BITS_VIEWS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for; `is_narrow` is for tiles of 16 lanes; `rotation` one of ROTATIONS."""

    bits: int
    method: str
    dtype: torch.dtype
    is_narrow: bool
    is_stratified: bool
    rotation: str = "none"

    def codebook(self, rng: np.random.Generator) -> Codebook:
        """A codebook of the variant."""
        if self.rotation != "none":
            size = 128 if self.is_narrow else self.wide_size
            norm_format = str(rng.choice(["fp32", "bf16"]))
            if self.rotation != "stochastic":
                return nearest_codebook(self.bits, self.rotation == "nearest, uniform", size, norm_format)
            fields = {"norm": str(rng.choice(["max", "l2"])), "rotation": "hadamard", "norm_format": norm_format}
            return codebook_for(self.method, self.bits, bucket_size=size, **fields)
        units = rng.choice([1, 3, 5, 31]) if self.is_narrow else rng.choice([2, 4, 6, 8, 64])
        norm = str(rng.choice(["max", "l2"]))
        clip = float(10.0 ** rng.uniform(-25, 25)) if norm == "max" and rng.random() < 0.2 else 0.0
        return codebook_for(
            self.method,
            self.bits,
            bucket_size=128 * int(units),
            norm=norm,
            norm_format=str(rng.choice(["fp32", "bf16"])),
            clip=clip,
        )

    @property
    def wide_size(self) -> int:
        """Bucket size of rotated buckets: with tiles of 32 lanes every size has a kernel of its own."""
        return (256, 512, 1024)[self.bits % 3]


ROTATIONS = ("none", "stochastic", "nearest", "nearest, uniform")
ALL_VARIANTS = [
    Variant(bits, method, dtype, is_narrow, is_stratified)
    for bits in range(2, 9)
    for method in methods_of(bits)
    for dtype in DTYPES
    for is_narrow in (False, True)
    for is_stratified in (False, True)
] + [
    Variant(bits, method, dtype, is_narrow, is_stratified, rotation)
    for bits in range(2, 9)
    for dtype in DTYPES
    for is_narrow in (False, True)
    for is_stratified in (False, True)
    for rotation in ROTATIONS[1:]
    for method in (methods_of(bits) if rotation == "stochastic" else ("",))
]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have equal dtypes and bits."""
    view = BITS_VIEWS[one.dtype.itemsize]
    return one.dtype == other.dtype and torch.equal(one.view(view), other.view(view))


def damaged(message: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A copy with one kind of damage; now and then it changes nothing."""
    result = message.clone()
    place = int(rng.integers(message.numel()))
    kind = rng.integers(5)
    if kind == 0:
        result[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        words = result.view(torch.int32)
        first, second = (int(rng.integers(words.numel())) for _ in range(2))
        words[[first, second]] = words[[second, first]]
    elif kind == 2:
        result[place : place + int(rng.integers(1, 400))] = int(rng.integers(256))
    elif kind == 3:
        result = result[: -int(rng.integers(1, message.numel()))]
    else:
        other = int(rng.integers(message.numel()))
        result[place:] = torch.roll(result[place:], other)
    return result


def check_coded(
    plan: MessagePlan,
    codebooks: Mapping[str, Codebook],
    values: Sequence[torch.Tensor],
    where: MessageContext,
    rng: np.random.Generator,
) -> None:
    """A message, entropy-coded with random codes, is restored; a damaged one is a WireError."""
    books = {
        key: dataclasses.replace(book, weights=tuple(rng.integers(0, 2**20, len(book.levels)).tolist()))
        if book.may_be_coded
        else book
        for key, book in codebooks.items()
    }
    codec = Codec(plan, books)
    coded = CodedMessages(codec, books)
    message = codec.encode(values, where)
    buffer = torch.full((coded.maximum_bytes,), 255, dtype=torch.uint8)
    sent = buffer[: coded.shorten(message, where, buffer)].clone()
    place = torch.empty_like(message)
    restored = codec.decode_mean([coded.restore(sent, where, place)], [where])
    for one, two in zip(restored, codec.decode_mean([message], [where]), strict=True):
        assert torch.allclose(one, two, rtol=0.0, atol=0.0, equal_nan=True), f"coding changed a value: {books}, {plan}"
    broken = damaged(sent, rng)
    if broken.shape == sent.shape and torch.equal(broken, sent):
        return
    try:
        codec.decode_mean([coded.restore(broken, where, place)], [where])
    except WireError:
        return
    raise AssertionError(f"damage of a coded message was not noticed: {books}, {plan}, {where}")


def run_case(variants: Sequence[Variant], rng: np.random.Generator) -> None:
    """One random case; raises AssertionError with what differs."""
    is_stratified = bool(rng.integers(2)) and any(variant.is_stratified for variant in variants)
    usable = [variant for variant in variants if variant.is_stratified == is_stratified]
    codebooks, slices = {}, []
    coordinate = int(rng.integers(2**48)) if rng.integers(2) else 2**32 - int(rng.integers(3000))
    for index in range(int(rng.integers(1, 5))):
        if rng.random() < 0.2:
            book, dtype = Codebook.exact(), (*DTYPES, torch.float64)[rng.integers(4)]
        else:
            variant = usable[rng.integers(len(usable))]
            book, dtype = variant.codebook(rng), variant.dtype
        limit = int(rng.choice([3, 300, min(3 * book.bucket_size, 2000)]))
        length, start = int(rng.integers(limit + 1)), int(rng.integers(1000))
        codebooks[f"type{index}"] = book
        slices.append(Slice(f"layer{index}", start, length, dtype, f"type{index}", coordinate))
        coordinate += start + length
    plan = MessagePlan.build(slices, codebooks)
    codec, twin = Codec(plan, codebooks, WorkerThreads(int(rng.integers(1, 4)))), ReferenceCodec(plan, codebooks)

    senders = int(rng.integers(1, 4))
    strata = int(rng.choice([2, 3, 4, 7, 64, 1000])) if is_stratified else 1
    counter, seed = int(rng.integers(2**40)), int(rng.integers(2**63))
    contexts = [context(rank, counter=counter, seed=seed, strata=strata) for rank in range(senders)]
    messages = []
    for where in contexts:
        values = []
        for part in slices:
            numbers = int(rng.integers(10**6))
            if codebooks[part.codebook].bits == EXACT_BITS:
                generator = torch.Generator().manual_seed(numbers)
                values.append(torch.randn(part.length, generator=generator).to(part.dtype))
            else:
                values.append(gradient(part.length, part.dtype, numbers))
        message = codec.encode(values, where, torch.full((plan.message_bytes,), 255, dtype=torch.uint8))
        assert torch.equal(message, twin.encode(values, where)), f"messages differ: {codebooks}, {slices}, {where}"
        messages.append(message)
    scale = None if rng.integers(2) else float(rng.uniform(-2, 2))
    means = zip(
        codec.decode_mean(messages, contexts, scale=scale), twin.decode_mean(messages, contexts[0], scale), strict=True
    )
    for part, (found, wanted) in zip(slices, means, strict=True):
        assert same_bits(found, wanted), f"means of {part.parameter} differ: {codebooks}, {slices}, {contexts}"

    check_coded(plan, codebooks, values, contexts[-1], rng)
    which = int(rng.integers(senders))
    broken = [damaged(message, rng) if index == which else message for index, message in enumerate(messages)]
    if broken[which].shape != messages[which].shape or not torch.equal(broken[which], messages[which]):
        try:
            codec.decode_mean(broken, contexts)
        except WireError:
            return
        raise AssertionError(f"damage was not noticed: {codebooks}, {slices}, {contexts}")


def run(cases: int, seed: int, variants: Sequence[Variant] = ALL_VARIANTS) -> int:
    """Random cases, each from its own seed, so that a failing one can be repeated; returns how many were run."""
    for case in range(cases):
        try:
            run_case(variants, np.random.default_rng([seed, case]))
        except Exception as error:
            error.add_note(f"case {case} of seed {seed}")
            raise
    return cases


def main() -> None:
    """Run as many cases as wanted, and say how many there were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other cases (default 0)")
    parser.add_argument("--variants", type=int, default=40, help="kernels to draw from, for compiling takes time")
    options = parser.parse_args()
    chosen = np.random.default_rng(options.seed).permutation(len(ALL_VARIANTS))[: options.variants]
    begin = time.perf_counter()
    count = run(options.cases, options.seed, [ALL_VARIANTS[index] for index in chosen])
    seconds = time.perf_counter() - begin
    print(f"{count} cases of seed {options.seed}, {len(chosen)} kernels: all bits equal, {seconds:.0f} s")


if __name__ == "__main__":
    main()
