#!/usr/bin/env python3
"""How long does encoding and decoding take, against copying the gradient and against other quantizers?

Times the CPU kernels in one thread (and in two) on Gaussian gradients of several sizes, bucket size 512, maximum norm.
Every round times everything once, one after the other; medians over the rounds are compared, so that a machine whose
speed drifts treats all alike. An encode or decode is a whole message: quantizing, packing, header and checksum.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from launch.bench.rivals import all_rivals
from launch.train.options import HelpFormatter, not_negative, positive
from launch.train.summary import write_json
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.wire import MessageContext
from qoda_kernels.worker_threads import WorkerThreads

SIZES = {"25M": 25_000_000, "1M": 1_000_000, "64K": 65_536}
COPY = "copy of the gradient"


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one operation, and the bits per coordinate of its message."""

    milliseconds: float
    bits: float | None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="coordinates of the gradient")
    parser.add_argument("--rounds", type=positive, default=11, help="rounds at 25M; smaller sizes take more")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the gradient")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the ratios here too")
    return parser.parse_args(arguments)


def convex_codebook(bits: int) -> Codebook:
    """Levels (j/s)^1.5, denser near zero, as fitted levels are."""
    top = 2 ** (bits - 1) - 1
    return Codebook(bits, tuple(float((j / top) ** 1.5) for j in range(top + 1)))


def concave_codebook(bits: int) -> Codebook:
    """Levels (j/s)^0.7, denser near one: the general path."""
    top = 2 ** (bits - 1) - 1
    return Codebook(bits, tuple(float((j / top) ** 0.7) for j in range(top + 1)))


CODEBOOKS = {
    "uniform, 4 bits": Codebook.uniform(4),
    "codebook, 4 bits": convex_codebook(4),
    "codebook, 5 bits": convex_codebook(5),
    "codebook, 5 bits, general path": concave_codebook(5),
    "codebook, 8 bits": convex_codebook(8),
}


def our_operations(gradient: torch.Tensor, threads: int) -> dict[str, tuple[Callable[[], object], float]]:
    """Encode, decode, and decode-and-average of four messages, for every codebook."""
    operations: dict[str, tuple[Callable[[], object], float]] = {}
    suffix = "" if threads == 1 else f", {threads} threads"
    for name, codebook in CODEBOOKS.items():
        if threads > 1 and name not in ("uniform, 4 bits", "codebook, 5 bits"):
            continue
        books = {"gradient": codebook}
        plan = MessagePlan.build([Slice("g", 0, gradient.numel(), gradient.dtype, "gradient", 0)], books)
        codec = Codec(plan, books, WorkerThreads(threads))
        contexts = [MessageContext(0, 0, rank, 0, 0, rank, 0) for rank in range(4)]
        messages = [codec.encode([gradient], where) for where in contexts]
        out = [torch.empty_like(gradient)]
        bits = 8 * plan.message_bytes / gradient.numel()
        operations[f"{name}: encode{suffix}"] = (
            lambda c=codec, m=messages[0], w=contexts[0]: c.encode([gradient], w, m),
            bits,
        )
        operations[f"{name}: decode{suffix}"] = (
            lambda c=codec, m=messages[:1], w=contexts[:1], o=out: c.decode_mean(m, w, o),
            bits,
        )
        operations[f"{name}: decode 4 and average{suffix}"] = (
            lambda c=codec, m=messages, w=contexts, o=out: c.decode_mean(m, w, o),
            bits,
        )
    return operations


def measure(gradient: torch.Tensor, rounds: int) -> dict[str, Timing]:
    """Median time of every operation on one gradient."""
    source, target = gradient.numpy(), np.empty_like(gradient.numpy())
    operations: dict[str, tuple[Callable[[], object], float | None]] = {
        COPY: (lambda: np.copyto(target, source), 32.0),
        **our_operations(gradient, 1),
        **our_operations(gradient, 2),
    }
    for rival in all_rivals(gradient):
        operations[f"{rival.name}: encode"] = (rival.encode, rival.bits)
        if rival.decode is not None:
            rival.encode()
            operations[f"{rival.name}: decode"] = (rival.decode, rival.bits)
    for run, _ in operations.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(rounds):
        for name, (run, _) in operations.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: Timing(1e3 * statistics.median(seconds[name]), bits) for name, (_, bits) in operations.items()}


def ratios(timings: dict[str, Timing]) -> dict[str, float | None]:
    """The figures that targets are set for; None where a rival could not run."""

    def over(first: str, second: str) -> float | None:
        if first not in timings or second not in timings:
            return None
        return timings[first].milliseconds / timings[second].milliseconds

    return {
        "memcpy_ms": timings[COPY].milliseconds,
        "uniform4_encode_over_memcpy": over("uniform, 4 bits: encode", COPY),
        "codebook5_encode_over_memcpy": over("codebook, 5 bits: encode", COPY),
        "codebook8_encode_over_memcpy": over("codebook, 8 bits: encode", COPY),
        "uniform4_decode_over_memcpy": over("uniform, 4 bits: decode", COPY),
        "codebook5_decode_over_memcpy": over("codebook, 5 bits: decode", COPY),
        "uniform4_over_torch_qsgd": over("QSGD, 4 bits, torch operators: encode", "uniform, 4 bits: encode"),
        "codebook5_over_bucketize": over("16 levels, torch.bucketize: encode", "codebook, 5 bits: encode"),
        "codebook5_over_bitsandbytes": over("bitsandbytes, 8 bits: encode", "codebook, 5 bits: encode"),
        "threads2_over_threads1": over("codebook, 5 bits: encode", "codebook, 5 bits: encode, 2 threads"),
        "general_over_fast": over("codebook, 5 bits, general path: encode", "codebook, 5 bits: encode"),
    }


def table_of(size: str, timings: dict[str, Timing]) -> Table:
    table = Table("operation", title=f"{size} coordinates, one thread unless said otherwise", title_justify="left")
    for column in ("ms", "x copy", "bits per coordinate"):
        table.add_column(column, justify="right")
    copy = timings[COPY].milliseconds
    for name, timing in timings.items():
        bits = "" if timing.bits is None else f"{timing.bits:.2f}"
        table.add_row(name, f"{timing.milliseconds:.3f}", f"{timing.milliseconds / copy:.2f}", bits)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(1)
    console = Console()
    results = {}
    for size in options.sizes:
        gradient = torch.randn(SIZES[size], generator=torch.Generator().manual_seed(options.seed))
        rounds = options.rounds * {"25M": 1, "1M": 5, "64K": 30}[size]
        timings = measure(gradient, rounds)
        console.print(table_of(size, timings))
        results[size] = ratios(timings)
    for size, figures in results.items():
        console.print(size, {name: round(value, 3) for name, value in figures.items() if value is not None})
    if options.json is not None:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
