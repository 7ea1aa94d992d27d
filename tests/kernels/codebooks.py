"""Codebooks and gradients that the kernel tests share."""

import numpy as np
import numpy.typing as npt
import torch

from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.gaussian import nearest_codebook, stochastic_codebook
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.wire import MessageContext

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def power_codebook(bits: int, exponent: float, **fields: object) -> Codebook:
    """Codebook with levels (j / s)^exponent: gaps grow for exponents above 1 and shrink below."""
    top = 2 ** (bits - 1) - 1
    return Codebook(bits, tuple(float((j / top) ** exponent) for j in range(top + 1)), **fields)


def codebook_for(method: str, bits: int, **fields: object) -> Codebook:
    """Codebook whose rounding table has a given method ("uniform", "minimum"), or that must be searched.

    Levels to be searched lie anywhere ("general"), or two of them too close to each other for cells ("close").
    """
    if method == "uniform":
        return Codebook.uniform(bits, **fields)
    if method == "close":
        levels = list(power_codebook(bits, 0.7).levels)
        levels[-2] = levels[-3] * (1 + 2.0**-14)
        return Codebook(bits, tuple(levels), **fields)
    return power_codebook(bits, 1.5 if method == "minimum" else 0.7, **fields)


def methods_of(bits: int) -> tuple[str, ...]:
    """Kinds of `codebook_for` that exist at a code width: two bits have one codebook only, wide codes are searched."""
    if bits == 2:
        return ("uniform",)
    return ("uniform", "minimum", "general") if bits <= 5 else ("uniform", "general", "close")


def rotated_codebook(rounding: str, bits: int, bucket_size: int, norm_format: str = "fp32") -> Codebook:
    """Codebook of rotated buckets: rounding "stochastic", "nearest", or "nearest, uniform"."""
    if rounding == "stochastic":
        return stochastic_codebook(bits, bucket_size, norm_format)
    return nearest_codebook(bits, rounding == "nearest, uniform", bucket_size, norm_format)


def single_slice_plan(
    length: int, codebook: Codebook, dtype: torch.dtype = torch.float32, start: int = 0, offset: int = 0
) -> MessagePlan:
    """Plan of one slice."""
    return MessagePlan.build([Slice("weight", start, length, dtype, "other", offset)], {"other": codebook})


def context(rank: int = 0, **fields: int) -> MessageContext:
    """Context of a rank's message in an ordinary all-gather."""
    values = {"seed": 7, "counter": 3, "phase": 0, "registry_version": 0, "source": rank, "destination": 0, **fields}
    return MessageContext(rank=rank, **values)


def round_trip(values: npt.NDArray[np.float32], codebook: Codebook, **fields: int) -> npt.NDArray[np.float32]:
    """Values of one slice after encoding and decoding by the fast kernels."""
    codec = Codec(single_slice_plan(values.size, codebook), {"other": codebook})
    message = codec.encode([torch.from_numpy(values)], context(**fields))
    return codec.decode_mean([message], [context(**fields)])[0].numpy()
