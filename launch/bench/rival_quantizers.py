"""Other quantizers of gradients, for comparison of their errors: what each decodes to, and what it would send.

Every function takes one tensor (float32 [n]), a code width and a random generator, and returns the decoded tensor and
the number of bits of its message with fixed-length codes, scales included. They are written for clearness, not speed.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import norm as normal

Float32Array = npt.NDArray[np.float32]
Quantizer = Callable[[Float32Array, int, np.random.Generator], tuple[Float32Array, float]]

_BUCKET = 512
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=np.float32)


def blocks(values: Float32Array, size: int) -> Float32Array:
    """Rows of `size` values, the last one filled up with zeros."""
    rows = np.zeros(-(-values.size // size) * size, dtype=np.float32)
    rows[: values.size] = values
    return rows.reshape(-1, size)


def min_max(values: Float32Array, bits: int, rng: np.random.Generator) -> tuple[Float32Array, float]:
    """Stochastic rounding to 2^bits points between each bucket's minimum and maximum (torch_cgx): two fp32 a bucket."""
    count = -(-values.size // _BUCKET)
    filled = np.concatenate([values, np.repeat(values[-1:], count * _BUCKET - values.size)]).reshape(count, _BUCKET)
    low = filled.min(axis=1, keepdims=True)
    step = (filled.max(axis=1, keepdims=True) - low) / (2**bits - 1)
    step[step == 0] = 1.0
    codes = np.minimum(np.floor((filled - low) / step + rng.random(filled.shape)), 2**bits - 1)
    return (low + codes * step).astype(np.float32).reshape(-1)[: values.size], values.size * bits + 64 * count


def uniform8(values: Float32Array, bits: int, rng: np.random.Generator) -> tuple[Float32Array, float]:
    """256 equal cells over 6 standard deviations to either side, decoded as the mean of each cell (hivemind)."""
    centre, deviation = values.mean(), values.std() or np.float32(1.0)
    codes = np.clip(np.rint((values - centre) / (6 * deviation) * 128) + 128, 0, 255).astype(np.int64)
    return _cell_means(values, codes), values.size * 8 + 32 * 256


def quantile8(values: Float32Array, bits: int, rng: np.random.Generator) -> tuple[Float32Array, float]:
    """256 cells of equal weight, decoded as the mean of each cell (hivemind)."""
    edges = np.quantile(values, np.arange(1, 256) / 256)
    return _cell_means(values, np.searchsorted(edges, values)), values.size * 8 + 32 * 256


def _cell_means(values: Float32Array, codes: npt.NDArray[np.int64]) -> Float32Array:
    count = np.maximum(np.bincount(codes, minlength=256), 1)
    means = np.bincount(codes, values.astype(np.float64), minlength=256) / count
    return means[codes].astype(np.float32)


def bitsandbytes_dynamic(values: Float32Array, bits: int, rng: np.random.Generator) -> tuple[Float32Array, float]:
    """Blockwise 8 bits with the dynamic map (bitsandbytes itself), blocks of 256, fp32 scales."""
    from bitsandbytes import functional

    codes, state = functional.quantize_blockwise(torch.from_numpy(values), blocksize=256)
    decoded = functional.dequantize_blockwise(codes, state).numpy()
    return decoded.astype(np.float32), values.size * 8 + 32 * -(-values.size // 256)


def bitsandbytes_nf4(values: Float32Array, bits: int, rng: np.random.Generator) -> tuple[Float32Array, float]:
    """NormalFloat, 4 bits (bitsandbytes itself), blocks of 64, fp32 scales."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(torch.from_numpy(values), blocksize=64, quant_type="nf4")
    decoded = functional.dequantize_4bit(codes, state).reshape(-1).numpy()
    return decoded.astype(np.float32), values.size * 4 + 32 * -(-values.size // 64)


def fp8(values: Float32Array, bits: int, rng: np.random.Generator) -> tuple[Float32Array, float]:
    """Cast to float8 (4 exponent, 3 mantissa bits), one scale for the tensor."""
    scale = float(np.abs(values).max()) / 448.0 or 1.0
    return (torch.from_numpy(values / scale).to(torch.float8_e4m3fn).float() * scale).numpy(), values.size * 8 + 32


def mxfp4(values: Float32Array, bits: int, rng: np.random.Generator) -> tuple[Float32Array, float]:
    """MXFP4: 32 values of 4 bits (2 exponent, 1 mantissa) with a power of two as scale; stochastic rounding."""
    rows = blocks(values, 32)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    # The smallest power of two that leaves no value beyond 6, so that the rounding has no bias.
    scale = np.exp2(np.ceil(np.log2(np.maximum(largest, 2.0**-126) / 6.0)))
    return _four_bits(rows, scale, rng)[: values.size], values.size * 4 + 8 * len(rows)


def nvfp4(values: Float32Array, bits: int, rng: np.random.Generator) -> tuple[Float32Array, float]:
    """NVFP4: 16 values of 4 bits with an 8-bit float (E4M3) as scale, and one fp32 for the tensor; stochastic."""
    rows = blocks(values, 16)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    whole = float(largest.max()) / (6.0 * 448.0) or 1.0
    wanted = torch.from_numpy(largest / 6.0 / whole)
    scale = wanted.to(torch.float8_e4m3fn).float()
    above = (scale.to(torch.float8_e4m3fn).view(torch.uint8) + 1).view(torch.float8_e4m3fn).float()
    scale = torch.where(scale < wanted, above, scale).numpy() * whole  # rounded up: no value beyond 6
    scale[scale == 0] = 1.0
    return _four_bits(rows, scale.astype(np.float32), rng)[: values.size], values.size * 4 + 8 * len(rows) + 32


def _four_bits(rows: Float32Array, scale: Float32Array, rng: np.random.Generator) -> Float32Array:
    magnitudes = np.minimum(np.abs(rows) / scale, _E2M1[-1])
    above = np.clip(np.searchsorted(_E2M1, magnitudes, side="right"), 1, 7)
    low, high = _E2M1[above - 1], _E2M1[above]
    rounded = np.where(rng.random(rows.shape) < (magnitudes - low) / (high - low), high, low)
    return (np.sign(rows) * rounded * scale).astype(np.float32).reshape(-1)


def eden(values: Float32Array, bits: int, rng: np.random.Generator) -> tuple[Float32Array, float]:
    """Random signs, Hadamard transform, Lloyd-Max rounding, and a scale that makes it unbiased (EDEN, 2108.08842).

    Blocks of 512, one fp32 scale each; one bit is DRIVE. A generator of one's own for each worker gives separate
    rotations, equal generators a common one.
    """
    rows = blocks(values, _BUCKET)
    signs = rng.choice(np.array([-1.0, 1.0], dtype=np.float32), size=_BUCKET)
    rotated = hadamard(rows * signs)
    length = np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
    length[length == 0] = 1.0
    centres = _lloyd_max(bits)
    codes = np.searchsorted((centres[1:] + centres[:-1]) / 2, rotated * (np.sqrt(_BUCKET) / length))
    found = centres[codes]
    product = (rotated * found).sum(axis=1, keepdims=True)
    scale = np.divide(length**2, product, out=np.zeros_like(length), where=product > 0)
    decoded = hadamard((found * scale).astype(np.float32)) * signs
    return decoded.astype(np.float32).reshape(-1)[: values.size], rows.size * bits + 32 * len(rows)


def hadamard(rows: Float32Array) -> Float32Array:
    """Orthonormal Walsh-Hadamard transform of each row; the length is a power of two."""
    size = rows.shape[1]
    result = rows.astype(np.float32)
    width = 1
    while width < size:
        pairs = result.reshape(-1, size // (2 * width), 2, width)
        result = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(-1, size)
        width *= 2
    return result / np.float32(np.sqrt(size))


@cache
def _lloyd_max(bits: int) -> npt.NDArray[np.float64]:
    """Points of least squared error for a standard normal variable, float64 [2^bits]."""
    count = 2**bits
    centres = normal.ppf((np.arange(count) + 0.5) / count)
    for _ in range(2000):
        edges = np.concatenate([[-np.inf], (centres[1:] + centres[:-1]) / 2, [np.inf]])
        centres = -np.diff(normal.pdf(edges)) / np.diff(normal.cdf(edges))
    return np.asarray(centres)


RIVALS: dict[str, tuple[Quantizer, tuple[int, ...]]] = {
    "min-max (torch_cgx)": (min_max, tuple(range(2, 9))),
    "Uniform8 (hivemind)": (uniform8, (8,)),
    "Quantile8 (hivemind)": (quantile8, (8,)),
    "fp8 cast": (fp8, (8,)),
    "MXFP4, stochastic": (mxfp4, (4,)),
    "NVFP4, stochastic": (nvfp4, (4,)),
    "EDEN": (eden, tuple(range(1, 9))),
}
"""Name -> function, and the code widths that it has; those of bitsandbytes only where that is installed."""

if find_spec("bitsandbytes") is not None:
    RIVALS["dynamic (bitsandbytes)"] = (bitsandbytes_dynamic, (8,))
    RIVALS["nf4 (bitsandbytes)"] = (bitsandbytes_nf4, (4,))
