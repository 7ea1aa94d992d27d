#!/usr/bin/env python3
"""How many bits per coordinate does entropy coding save, and how fast is it?

Quantizes gradients of three distributions (bucket size 512, maximum norm) with uniform 4-bit levels and with 5-bit
levels of minimum variance, then codes the packed codes. Huffman and ANS use the level counts of another gradient of the
same distribution, as a training step uses those of earlier steps; Elias gamma uses none. zstd (level 1) is timed where
the package zstandard is installed, ANS where constriction is. Speeds are CPU time of one thread, in 10^9 bytes of the
fp32 gradient per second, best of the rounds; norms are not counted. In the alternating protocol the gradient is one of
three types of equal size, which each symbol tells anew: its entropy is larger by log2(3) bits a symbol; its length is
the mean over the types.
"""

import argparse
import importlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from launch.bench.processors import processor_and_target
from launch.train.options import HelpFormatter, not_negative, positive
from launch.train.summary import command, write_json
from qoda_kernels import bit_streams, entropy
from qoda_kernels.ans import AnsCode
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.coded_message import CodeOfSlices
from qoda_kernels.entropy_reference import codes_per_symbol
from qoda_kernels.errors import CodebookError
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.levels import minimum_variance_levels
from qoda_kernels.statistics import HistogramStatistics
from qoda_kernels.wire import MessageContext

BUCKET_SIZE = 512
LANES = 32
SAMPLE = 1 << 20  # coordinates of the gradient that levels and weights come from
COPY = "copy of the gradient"
ALTERNATING = "alternating, 3 types"

ByteArray = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Result:
    """One row: bits per coordinate (None for the copy), and speeds in GB/s of fp32 input."""

    bits: float | None
    over_entropy: float | None
    encode: float
    decode: float


@dataclass(frozen=True)
class Case:
    """Entropy of one gradient and codebook in bits per coordinate, and what each method gives."""

    entropy: float
    methods: dict[str, Result]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--elements", type=positive, default=25_000_000, help="coordinates of the gradient")
    parser.add_argument("--rounds", type=positive, default=5, help="rounds of which the best counts")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the gradients")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table here too")
    return parser.parse_args(arguments)


def draw(distribution: str, size: int, rng: np.random.Generator) -> Float32Array:
    """Gradient of one distribution."""
    if distribution == "Gaussian":
        return rng.standard_normal(size, dtype=np.float32)
    values = rng.laplace(size=size) if distribution == "Laplace" else rng.standard_t(3, size)
    return values.astype(np.float32)


def quantize(values: Float32Array, codebook: Codebook, seed: int) -> ByteArray:
    """Lane-planar codes of a gradient."""
    books = {"gradient": codebook}
    plan = MessagePlan.build([Slice("gradient", 0, values.size, torch.float32, "gradient", 0)], books)
    message = Codec(plan, books).encode([torch.from_numpy(values)], MessageContext(seed, 0, 0, 0, 0, 0, 0))
    begin = plan.segments[0].codes_begin
    return message.numpy()[begin : begin + plan.segments[0].codes_bytes]


def best_seconds(operations: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Least CPU time of each operation; every round runs each of them once."""
    best = [float("inf")] * len(operations)
    for _ in range(rounds):
        for index, operation in enumerate(operations):
            begin = time.process_time()
            operation()
            best[index] = min(best[index], time.process_time() - begin)
    return best


def coded_bytes(code: CodeOfSlices, packed: ByteArray) -> int:
    """Bytes that codes take."""
    return code.encode(packed, LANES, np.zeros(code.maximum_bytes(packed.size), dtype=np.uint8))


def measure_code(code: CodeOfSlices, packed: ByteArray, rounds: int) -> tuple[int, float, float]:
    """Bytes, and seconds to encode and to decode."""
    out = np.zeros(code.maximum_bytes(packed.size), dtype=np.uint8)
    restored = np.zeros_like(packed)
    size = code.encode(packed, LANES, out)
    encode, decode = best_seconds(
        [lambda: code.encode(packed, LANES, out), lambda: code.decode(out[:size], LANES, restored)], rounds
    )
    return size, encode, decode


def measure_zstd(packed: ByteArray, bits: int, rounds: int) -> tuple[int, float, float] | None:
    """The same for zstd at level 1, given one code a byte for free; nothing where it is not installed."""
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        return None
    codes = bit_streams.unpack(packed, bits, LANES)
    codes[codes == 1 << (bits - 1)] = 0
    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    compressed = compressor.compress(codes.data)
    encode, decode = best_seconds(
        [lambda: compressor.compress(codes.data), lambda: decompressor.decompress(compressed)], rounds
    )
    return len(compressed), encode, decode


def measure(values: Float32Array, earlier: Float32Array, codebook: Codebook, options: argparse.Namespace) -> Case:
    """All methods on one gradient and codebook."""
    bits = codebook.bits
    packed = quantize(values, codebook, options.seed)
    weights = bit_streams.count_levels(
        quantize(earlier, codebook, options.seed + 1), earlier.size, bits, LANES
    ).tolist()
    counts = bit_streams.count_levels(packed, values.size, bits, LANES)
    limit = entropy.coordinate_entropy(counts / values.size)
    shared = entropy.alternating_protocol({name: (bits, weights, values.size) for name in "abc"})
    codes: dict[str, CodeOfSlices] = {
        "Huffman (main)": entropy.huffman(bits, weights),
        ALTERNATING: shared["a"],
        "Elias gamma": entropy.elias_gamma(bits),
    }
    try:
        codes["ANS (constriction)"] = AnsCode.of_weights(bits, weights)
    except CodebookError:
        Console(stderr=True).print("constriction is not installed: no ANS")
    measured = {name: measure_code(code, packed, options.rounds) for name, code in codes.items()}
    # Of words of equal weight the first type's are the longer ones: the mean over the types is the protocol's length.
    _, *seconds = measured[ALTERNATING]
    measured[ALTERNATING] = (sum(coded_bytes(code, packed) for code in shared.values()) // len(shared), *seconds)
    zstd = measure_zstd(packed, bits, options.rounds)
    if zstd is not None:
        measured["zstd-1"] = zstd
    gigabytes = 4 * values.size / 1e9
    target = np.empty_like(values)
    (copy,) = best_seconds([lambda: np.copyto(target, values)], options.rounds)
    results = {COPY: Result(None, None, gigabytes / copy, gigabytes / copy)}
    for name, (size, encode, decode) in measured.items():
        length = 8 * size / values.size
        own_limit = limit + math.log2(3) / codes_per_symbol(bits) if name == ALTERNATING else limit
        results[name] = Result(length, length / own_limit - 1, gigabytes / encode, gigabytes / decode)
    return Case(limit, results)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    rng = np.random.default_rng(options.seed)
    console = Console()
    document: dict[str, object] = {}
    for distribution in ("Gaussian", "Laplace", "Student t3"):
        values = draw(distribution, options.elements, rng)
        earlier = draw(distribution, min(SAMPLE, options.elements), rng)
        fitted = minimum_variance_levels(HistogramStatistics.gather(earlier, BUCKET_SIZE, "max"), 5)
        codebooks = {"uniform 4-bit": Codebook.uniform(4), "codebook 5-bit": Codebook(5, tuple(fitted.tolist()))}
        for name, codebook in codebooks.items():
            found = measure(values, earlier, codebook, options)
            table = Table(title=f"{distribution}, {name}: entropy {found.entropy:.3f} bits per coordinate")
            for heading in ("method", "bits", "over entropy", "encode GB/s", "decode GB/s"):
                table.add_column(heading, justify="left" if heading == "method" else "right")
            for method, result in found.methods.items():
                length = "" if result.bits is None else f"{result.bits:.3f}"
                excess = "" if result.over_entropy is None else f"{100 * result.over_entropy:.1f} %"
                table.add_row(method, length, excess, f"{result.encode:.2f}", f"{result.decode:.2f}")
            console.print(table)
            document[f"{distribution}, {name}"] = asdict(found)
    if options.json is not None:
        write_json(options.json, {"command": command(), **processor_and_target(), "cases": document})
    return 0


if __name__ == "__main__":
    sys.exit(main())
