#!/usr/bin/env python3
"""How long does encoding and decoding take, against copying the gradient and against other quantizers?

Times the CPU kernels in one thread (and in two) on Gaussian gradients of several sizes, bucket size 512, maximum norm.
Every round times everything, one after the other; medians over the rounds are compared, so that a machine whose speed
drifts treats all alike. Gradients smaller than the cache are timed several times in a row, copies and rivals too: code
and data are where they are in a training step, whose messages follow each other, and the second thread is awake. The
ratios of the first calls in each row, which come after other work (16 MB are read) and wake the second thread, stand
beside those of all calls, as "1M, first in a row". An encode or decode is a whole message: quantizing, packing, header
and checksum. The last measurement is of a message of 150 tensors, against the same coordinates in one tensor.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from launch.bench.message_digests import CODEBOOKS, power_codebook
from launch.bench.processors import NATIVE, PROCESSORS, processor_and_target, restart_for
from launch.bench.rivals import all_rivals
from launch.train.options import HelpFormatter, not_negative, positive
from launch.train.summary import command, write_json
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.wire import MessageContext
from qoda_kernels.worker_threads import WorkerThreads

SIZES = {"25M": 25_000_000, "1M": 1_000_000, "64K": 65_536}
ROUNDS = {"25M": 1, "1M": 2, "64K": 3}  # times the option
IN_A_ROW = {"25M": 1, "1M": 10, "64K": 10}  # calls of one operation
COPY = "copy of the gradient"


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one operation, of its first calls in a row, and the bits per coordinate of its message."""

    milliseconds: float
    first_milliseconds: float
    bits: float | None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="coordinates of the gradient")
    parser.add_argument("--rounds", type=positive, default=11, help="rounds at 25M; smaller sizes take more")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the gradient")
    parser.add_argument(
        "--target", choices=[NATIVE, *PROCESSORS], default=NATIVE, help="processor to compile the kernels for"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the ratios here too")
    return parser.parse_args(arguments)


WITH_TWO_THREADS = ("uniform, 4 bits", "codebook, 5 bits")
STRATIFIED = ("uniform, 4 bits", "codebook, 5 bits")


def our_operations(gradient: torch.Tensor, threads: int) -> dict[str, tuple[Callable[[], object], float]]:
    """Encode, decode, and decode-and-average of four messages, for every codebook."""
    operations: dict[str, tuple[Callable[[], object], float]] = {}
    suffix = "" if threads == 1 else f", {threads} threads"
    for name, codebook in CODEBOOKS.items():
        if threads > 1 and name not in WITH_TWO_THREADS:
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
        if threads == 1 and name in STRATIFIED:
            stratified = dataclasses.replace(contexts[0], strata=4)
            buffer = codec.encode([gradient], stratified)
            operations[f"{name}, stratified among 4 ranks: encode"] = (
                lambda c=codec, m=buffer, w=stratified: c.encode([gradient], w, m),
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


def measure(gradient: torch.Tensor, rounds: int, in_a_row: int) -> dict[str, Timing]:
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
    other_work = torch.ones(4_000_000)
    for _ in range(rounds):
        for name, (run, _) in operations.items():
            other_work.sum()
            for _ in range(in_a_row):
                begin = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begin)
    return {
        name: Timing(1e3 * statistics.median(seconds[name]), 1e3 * statistics.median(seconds[name][::in_a_row]), bits)
        for name, (_, bits) in operations.items()
    }


def first_in_a_row(timings: Mapping[str, Timing]) -> dict[str, Timing]:
    """The timings of first calls alone."""
    return {name: dataclasses.replace(one, milliseconds=one.first_milliseconds) for name, one in timings.items()}


def ratios(timings: dict[str, Timing]) -> dict[str, float | None]:
    """The figures that targets are set for; None where a rival could not run."""

    def over(first: str, second: str) -> float | None:
        if first not in timings or second not in timings:
            return None
        return timings[first].milliseconds / timings[second].milliseconds

    def added(first: str, second: str) -> float:
        return (timings[first].milliseconds - timings[second].milliseconds) / timings[COPY].milliseconds

    return {
        "memcpy_ms": timings[COPY].milliseconds,
        "uniform4_encode_over_memcpy": over("uniform, 4 bits: encode", COPY),
        "codebook5_encode_over_memcpy": over("codebook, 5 bits: encode", COPY),
        "codebook4_encode_over_memcpy": over("codebook, 4 bits: encode", COPY),
        "codebook8_encode_over_memcpy": over("codebook, 8 bits: encode", COPY),
        "uniform4_decode_over_memcpy": over("uniform, 4 bits: decode", COPY),
        "codebook5_decode_over_memcpy": over("codebook, 5 bits: decode", COPY),
        "codebook4_decode4_over_memcpy": over("codebook, 4 bits: decode 4 and average", COPY),
        "codebook5_decode4_over_memcpy": over("codebook, 5 bits: decode 4 and average", COPY),
        "codebook8_decode_over_memcpy": over("codebook, 8 bits: decode", COPY),
        "codebook8_decode4_over_memcpy": over("codebook, 8 bits: decode 4 and average", COPY),
        "rotated4_encode_over_memcpy": over("rotated, 4 bits: encode", COPY),
        "rotated4_decode_over_memcpy": over("rotated, 4 bits: decode", COPY),
        "uniform4_over_torch_qsgd": over("QSGD, 4 bits, torch operators: encode", "uniform, 4 bits: encode"),
        "codebook5_over_bucketize": over("16 levels, torch.bucketize: encode", "codebook, 5 bits: encode"),
        "codebook5_over_bitsandbytes": over("bitsandbytes, 8 bits: encode", "codebook, 5 bits: encode"),
        "threads2_over_threads1": over("codebook, 5 bits: encode", "codebook, 5 bits: encode, 2 threads"),
        "uniform4_threads2_over_threads1": over("uniform, 4 bits: encode", "uniform, 4 bits: encode, 2 threads"),
        "general_over_fast": over("codebook, 5 bits, general path: encode", "codebook, 5 bits: encode"),
        "exponential6_over_fast": over("exponential, 6 bits: encode", "codebook, 5 bits: encode"),
        "exponential8_over_fast": over("exponential, 8 bits: encode", "codebook, 5 bits: encode"),
        "exponential8_over_uniform4": over("exponential, 8 bits: encode", "uniform, 4 bits: encode"),
        "rotation_encode_added_over_memcpy": added("rotated, 4 bits: encode", "codebook, 4 bits: encode"),
        "rotation_decode_added_over_memcpy": added("rotated, 4 bits: decode", "codebook, 4 bits: decode"),
        "nearest_encode_added_over_memcpy": added("rotated to nearest, 4 bits: encode", "codebook, 4 bits: encode"),
        "stratified_over_independent": over(
            "codebook, 5 bits, stratified among 4 ranks: encode", "codebook, 5 bits: encode"
        ),
    }


def measure_many_tensors(rounds: int, seed: int) -> dict[str, float]:
    """Median milliseconds of messages of 150 tensors, and of one tensor with as many coordinates.

    100 weights of 4,096 and 50 exact biases of 64 coordinates. The difference is what a tensor costs on top.
    """
    generator = torch.Generator().manual_seed(seed)
    books = {"weight": power_codebook(5, 1.5), "bias": Codebook.exact()}
    shapes = [("weight", 4096)] * 100 + [("bias", 64)] * 50
    slices, offset = [], 0
    for index, (key, length) in enumerate(shapes):
        slices.append(Slice(f"p{index}", 0, length, torch.float32, key, offset))
        offset += length
    one = [Slice("p", 0, offset, torch.float32, "weight", 0)]
    seconds: dict[str, list[float]] = {}
    prepared = []
    for name, parts in (("150_tensors", slices), ("1_tensor", one)):
        codec = Codec(MessagePlan.build(parts, books), books)
        values = [torch.randn(part.length, generator=generator) for part in parts]
        context = MessageContext(0, 0, 0, 0, 0, 0, 0)
        message, out = codec.encode(values, context), [torch.empty_like(tensor) for tensor in values]
        prepared.append((f"{name}_encode_ms", lambda c=codec, v=values, w=context, m=message: c.encode(v, w, m)))
        prepared.append((f"{name}_decode_ms", lambda c=codec, w=context, m=message, o=out: c.decode_mean([m], [w], o)))
    for _ in range(rounds + 1):
        for name, run in prepared:
            begin = time.perf_counter()
            run()
            seconds.setdefault(name, []).append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(found[1:]) for name, found in seconds.items()}


def table_of(size: str, timings: dict[str, Timing]) -> Table:
    table = Table("operation", title=f"{size} coordinates, one thread unless said otherwise", title_justify="left")
    for column in ("ms", "x copy", "bits per coordinate"):
        table.add_column(column, justify="right")
    copy = timings[COPY].milliseconds
    for name, timing in timings.items():
        bits = "" if timing.bits is None else f"{timing.bits:.2f}"
        table.add_row(name, f"{timing.milliseconds:.3f}", f"{timing.milliseconds / copy:.2f}", bits)
    return table


def machine() -> dict[str, float | str | None]:
    """What else ran when the measurement began, on what, for what the kernels were compiled, and the command."""
    return {
        "command": command(),
        "processors": float(os.cpu_count() or 1),
        "load_average_of_the_minute_before": os.getloadavg()[0],
        **processor_and_target(),
        "torch": torch.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    restart_for(options.target)
    torch.set_num_threads(1)
    console = Console()
    results: dict[str, Mapping[str, float | str | None]] = {"machine": machine()}
    for size in options.sizes:
        gradient = torch.randn(SIZES[size], generator=torch.Generator().manual_seed(options.seed))
        timings = measure(gradient, options.rounds * ROUNDS[size], IN_A_ROW[size])
        console.print(table_of(size, timings))
        results[size] = ratios(timings)
        if IN_A_ROW[size] > 1:
            results[f"{size}, first in a row"] = ratios(first_in_a_row(timings))
    results["150 tensors"] = measure_many_tensors(options.rounds * 30, options.seed)
    for size, figures in results.items():
        shown = {name: round(value, 3) for name, value in figures.items() if isinstance(value, float)}
        console.print(size, shown)
    if options.json is not None:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
