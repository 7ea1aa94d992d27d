"""Other ways to make gradients small, written as their users would, for comparison in benchmarks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Rival:
    """One rival's encoder and decoder on a gradient that they hold.

    Attributes:
        name: how tables call it.
        bits: bits per coordinate that it would send, scales included.
        encode: makes its message.
        decode: gives the gradient back from the last message, or None where that is not compared.
    """

    name: str
    bits: float
    encode: Callable[[], object]
    decode: Callable[[], object] | None


def unpacked_qsgd(gradient: torch.Tensor, levels: int = 127) -> Rival:
    """QSGD with one norm for the whole tensor and one byte per coordinate, as in GRACE."""
    message: list[torch.Tensor] = []

    def encode() -> None:
        norm = gradient.norm()
        scaled = gradient.abs() * (levels / norm)
        low = scaled.floor()
        codes = low + (torch.rand_like(scaled) < scaled - low)
        message[:] = [(codes * gradient.sign()).to(torch.int8), norm]

    return Rival("QSGD, int8, unpacked", 8.0, encode, lambda: message[0].float() * (message[1] / levels))


def bucket_qsgd(gradient: torch.Tensor, bucket_size: int = 512) -> Rival:
    """4-bit QSGD by buckets with the maximum norm, packed two to a byte, in torch operators."""
    buckets = gradient[: gradient.numel() // bucket_size * bucket_size].view(-1, bucket_size)
    message: list[torch.Tensor] = []

    def encode() -> None:
        norms = buckets.abs().amax(dim=1, keepdim=True)
        magnitudes = (buckets.abs() * (7.0 / norms) + torch.rand_like(buckets)).floor().clamp_(max=7).to(torch.uint8)
        codes = magnitudes | ((buckets < 0).to(torch.uint8) << 3)
        message[:] = [codes[:, ::2] | (codes[:, 1::2] << 4), norms]

    total = torch.zeros_like(buckets)

    def decode() -> None:
        packed, norms = message
        codes = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)
        signed = (codes & 7).float() * torch.where(codes >= 8, -1.0, 1.0)
        total.add_(signed * (norms / 7.0))

    return Rival("QSGD, 4 bits, torch operators", 4 + 32 / bucket_size, encode, decode)


def bucketize(gradient: torch.Tensor, bucket_size: int = 512) -> Rival:
    """Stochastic rounding to 16 non-uniform levels with torch.bucketize, not packed."""
    buckets = gradient[: gradient.numel() // bucket_size * bucket_size].view(-1, bucket_size)
    levels = (torch.arange(16) / 15) ** 1.5

    def encode() -> torch.Tensor:
        normalised = buckets.abs() / buckets.abs().amax(dim=1, keepdim=True)
        index = (torch.bucketize(normalised, levels, right=True) - 1).clamp_(0, 14)
        low = levels[index]
        up = torch.rand_like(normalised) * (levels[index + 1] - low) < normalised - low
        return ((index + up) | ((buckets < 0).long() << 4)).to(torch.uint8)

    return Rival("16 levels, torch.bucketize", 8.0, encode, None)


def half(gradient: torch.Tensor) -> Rival:
    """Cast to float16, as Horovod's own compressor does."""
    message: list[torch.Tensor] = []

    def encode() -> None:
        message[:] = [gradient.half()]

    return Rival("float16 cast", 16.0, encode, lambda: message[0].float())


def powersgd(gradient: torch.Tensor, rank: int = 4) -> Rival:
    """The arithmetic of PowerSGD (arXiv 1905.13727) on a square matrix: two products and an orthogonalisation."""
    side = int(gradient.numel() ** 0.5)
    matrix = gradient[: side * side].view(side, side)
    basis = torch.randn(side, rank)
    message: list[torch.Tensor] = []

    def encode() -> None:
        left, _ = torch.linalg.qr(matrix @ basis)
        message[:] = [left, matrix.T @ left]

    return Rival(f"PowerSGD, rank {rank}", 64 * rank / side, encode, lambda: message[0] @ message[1].T)


def zstandard(gradient: torch.Tensor) -> Rival | None:
    """zstd, level 1, on the raw float32 bytes; None where the package is missing."""
    try:
        import zstandard as library
    except ImportError:
        return None
    raw = np.ascontiguousarray(gradient.numpy()).view(np.uint8)
    compressor, decompressor = library.ZstdCompressor(level=1), library.ZstdDecompressor()
    message = [compressor.compress(raw)]

    def encode() -> None:
        message[:] = [compressor.compress(raw)]

    return Rival("zstd-1", 8 * len(message[0]) / gradient.numel(), encode, lambda: decompressor.decompress(message[0]))


def bitsandbytes(gradient: torch.Tensor) -> Rival | None:
    """Bitsandbytes' blockwise 8-bit quantization; None where the package is missing."""
    try:
        from bitsandbytes import functional
    except ImportError:
        return None
    message: list[object] = []

    def encode() -> None:
        message[:] = functional.quantize_blockwise(gradient)

    return Rival(
        "bitsandbytes, 8 bits", 8 + 32 / 4096, encode, lambda: functional.dequantize_blockwise(message[0], message[1])
    )


def all_rivals(gradient: torch.Tensor) -> list[Rival]:
    """Every rival that can run here."""
    found = [unpacked_qsgd, bucket_qsgd, bucketize, half, powersgd, zstandard, bitsandbytes]
    return [rival for rival in (make(gradient) for make in found) if rival is not None]
