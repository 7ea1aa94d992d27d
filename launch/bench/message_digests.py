#!/usr/bin/env python3
"""The codebooks of the codec's bench, and a digest of their messages: the same on every processor.

Prints a JSON object: for each codebook a digest of four messages of a million coordinates and of their mean. Among the
coordinates are zeros, subnormal numbers, and buckets with the largest and with non-finite values.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: make the project's folders importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "kernels"))

import numpy as np
import torch

from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.gaussian import nearest_codebook, stochastic_codebook
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.wire import MessageContext

RANKS = 4


def power_codebook(bits: int, exponent: float) -> Codebook:
    """Levels (j / s)^exponent: denser near zero for exponents above 1, as fitted levels are; denser near one below."""
    top = 2 ** (bits - 1) - 1
    return Codebook(bits, tuple(float((j / top) ** exponent) for j in range(top + 1)))


CODEBOOKS = {
    "uniform, 4 bits": Codebook.uniform(4),
    "codebook, 4 bits": power_codebook(4, 1.5),
    "codebook, 5 bits": power_codebook(5, 1.5),
    "codebook, 5 bits, general path": power_codebook(5, 0.7),
    "codebook, 8 bits": power_codebook(8, 1.5),
    "exponential, 6 bits": Codebook.exponential(6),
    "exponential, 8 bits": Codebook.exponential(8),
    "rotated, 4 bits": stochastic_codebook(4, 512, "fp32"),
    "rotated to nearest, 4 bits": nearest_codebook(4, False, 512, "fp32"),
}


def values_with_extremes(count: int, seed: int) -> torch.Tensor:
    """Values of many sizes, the same on every processor.

    Args:
        count: of them, a multiple of 1024.
        seed: of the values, and of which kind the non-finite ones are.
    """
    rng = np.random.default_rng(seed)
    # Only sums and products: logarithms and roots differ in their last bits between processors.
    values = rng.random(count, dtype=np.float32) * rng.random(count, dtype=np.float32) - np.float32(0.25)
    buckets = values.reshape(-1, 512)
    buckets *= np.ldexp(np.float32(1.0), rng.integers(-150, 127, (len(buckets), 1))).astype(np.float32)
    buckets[rng.random(buckets.shape) < 0.1] = 0.0
    buckets[::97, 5] = np.finfo(np.float32).max
    buckets[::89, 7] = np.float32(1e-45)
    buckets[13::101, 3] = [np.float32(np.nan), np.float32(np.inf), np.float32(-np.inf)][seed % 3]
    return torch.from_numpy(values)


def digests(count: int, seed: int = 0) -> dict[str, str]:
    """SHA-256 of the messages of all ranks and of their mean, for every codebook, in its first 16 hexadecimal digits.

    Args:
        count: coordinates, a multiple of 1024.
        seed: of the values.
    """
    tensors = [values_with_extremes(count, RANKS * seed + rank) for rank in range(RANKS)]
    contexts = [MessageContext(0, 0, rank, 0, 0, rank, 0) for rank in range(RANKS)]
    found = {}
    for name, book in CODEBOOKS.items():
        books = {"gradient": book}
        codec = Codec(MessagePlan.build([Slice("g", 0, count, torch.float32, "gradient", 0)], books), books)
        messages = [codec.encode([tensor], where) for tensor, where in zip(tensors, contexts, strict=True)]
        (mean,) = codec.decode_mean(messages, contexts)
        digest = hashlib.sha256()
        for part in (*messages, mean):
            digest.update(part.numpy().tobytes())
        found[name] = digest.hexdigest()[:16]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--count", type=int, default=1024 * 1024, help="coordinates, a multiple of 1024")
    parser.add_argument("--seed", type=int, default=0, help="of the values, not negative")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the object here too")
    options = parser.parse_args(arguments)
    text = json.dumps(digests(options.count, options.seed))
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
