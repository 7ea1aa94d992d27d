#!/usr/bin/env python3
"""How long until a process that imports hvd_qoda has encoded its first gradient?

Every run is a new interpreter that imports torch, then hvd_qoda, then encodes a gradient and decodes it, each for the
first time. The first run fills Numba's cache on disk where it is empty, and is not counted; of the others the medians
are given. With `--compile` one more run has an empty cache, in a temporary folder.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.console import Console

from launch.bench.processors import processor_and_target
from launch.train.options import HelpFormatter, not_negative, positive
from launch.train.summary import command, write_json

COORDINATES = 1_000_000
_PROGRAM = """
import json, sys, time

begin = time.perf_counter()
import torch
with_torch = time.perf_counter()
import hvd_qoda
imported = time.perf_counter()
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.wire import MessageContext
from qoda_kernels.worker_threads import WorkerThreads

bits, coordinates, seed, threads = map(int, sys.argv[1:])
gradient = torch.randn(coordinates, generator=torch.Generator().manual_seed(seed))
top = 2 ** (bits - 1) - 1
books = {"gradient": Codebook(bits, tuple(float((j / top) ** 1.5) for j in range(top + 1)))}
plan = MessagePlan.build([Slice("g", 0, coordinates, gradient.dtype, "gradient", 0)], books)
context = MessageContext(0, 0, 0, 0, 0, 0, 0)
ready = time.perf_counter()
codec = Codec(plan, books, WorkerThreads(threads))
message = codec.encode([gradient], context)
encoded = time.perf_counter()
codec.decode_mean([message], [context])
decoded = time.perf_counter()
codec.encode([gradient], context)
again = time.perf_counter()
print(json.dumps({
    "import_torch_s": with_torch - begin,
    "import_hvd_qoda_s": imported - with_torch,
    "first_encode_s": encoded - ready,
    "first_decode_s": decoded - encoded,
    "second_encode_s": again - decoded,
}))
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--rounds", type=positive, default=9, help="processes that are timed")
    parser.add_argument("--bits", type=positive, default=5, help="of the codebook")
    parser.add_argument("--threads", type=positive, default=2, help="of the codec")
    parser.add_argument("--compile", action="store_true", help="time a process with an empty cache too")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the gradient")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the seconds here too")
    return parser.parse_args(arguments)


def one_process(options: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, float]:
    """Seconds of each step in a new interpreter; raises `CalledProcessError` where it fails."""
    numbers = [str(number) for number in (options.bits, COORDINATES, options.seed, options.threads)]
    command = [sys.executable, "-c", _PROGRAM, *numbers]
    printed = subprocess.run(command, env=dict(environ), stdout=subprocess.PIPE, check=True, text=True).stdout
    seconds: dict[str, float] = json.loads(printed)
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    places = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    runs = [one_process(options, environ) for _ in range(options.rounds + 1)][1:]
    results: dict[str, dict[str, float]] = {
        "warm_cache": {name: statistics.median(run[name] for run in runs) for name in runs[0]},
        "warm_cache_slowest": {name: max(run[name] for run in runs) for name in runs[0]},
    }
    if options.compile:
        with tempfile.TemporaryDirectory() as folder:
            results["empty_cache"] = one_process(options, {**environ, "NUMBA_CACHE_DIR": folder})
    console = Console()
    for name, seconds in results.items():
        console.print(name, {step: round(value, 3) for step, value in seconds.items()})
    if options.json is not None:
        write_json(options.json, {"command": command(), **processor_and_target(), **results})


if __name__ == "__main__":
    main()
