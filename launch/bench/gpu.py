#!/usr/bin/env python3
"""How fast is the CUDA codec? Beside the device-to-device copy, torch-operator QSGD, bitsandbytes and an fp16 cast.

Needs a CUDA GPU. Prints one table: medians in microseconds, and for encoding and decoding the share of the copy's
bandwidth (bytes read and written in a second). Times are from CUDA events around many calls: those of small sizes are
times between launches. "host" is the time until a call returns, with an idle device; a step encodes one message and
decodes and averages several.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: make the project's folders importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "kernels"))

import torch
from rich.console import Console
from rich.table import Table

from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.wire import MessageContext

SIZES = {"25M": 25_000_000, "1M": 1_000_000, "64K": 65_536}
BUCKET_SIZE = 512
CALLS = 20


@dataclass(frozen=True)
class Row:
    """One measured operation."""

    size: str
    operation: str
    microseconds: float
    share_of_copy: float | None
    host_microseconds: float | None = None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table as JSON as well")
    parser.add_argument("--seed", type=int, default=0, help="of the gradients")
    parser.add_argument("--senders", type=int, default=4, metavar="K", help="messages that are decoded and averaged")
    parser.add_argument("--repeats", type=int, default=15, help="measurements of which the median is shown")
    return parser.parse_args(arguments)


def codebooks() -> dict[str, Codebook]:
    """What is measured: uniform 4-bit, codebooks of 5 bits (lines) and 8 bits (bisection)."""
    grown = {bits: tuple((j / (2 ** (bits - 1) - 1)) ** 1.5 for j in range(2 ** (bits - 1))) for bits in (5, 8)}
    return {
        "uniform 4-bit": Codebook.uniform(4, bucket_size=BUCKET_SIZE),
        "codebook 5-bit": Codebook(5, grown[5], bucket_size=BUCKET_SIZE),
        "codebook 8-bit": Codebook(8, grown[8], bucket_size=BUCKET_SIZE),
    }


def model_of_150_tensors() -> list[int]:
    """Lengths like those of a residual network: 50 weights, each with two small vectors."""
    return [length for block in range(50) for length in (36_864 * (1 + block // 5), 256, 256)]


def microseconds(call: Callable[[], object], repeats: int) -> float:
    """Median time on the device of one call."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / CALLS)
    return statistics.median(times)


def host_microseconds(call: Callable[[], object], repeats: int) -> float:
    """Median time on the host until one call returns, with an idle device."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(times)


def measure_codec(
    size: str, lengths: Sequence[int], name: str, codebook: Codebook, bandwidth: float, arguments: argparse.Namespace
) -> list[Row]:
    """Encode one message, and decode and average several, of tensors of some lengths."""
    from qoda_kernels.device_codec import DeviceCodec

    device = torch.device("cuda", torch.cuda.current_device())
    slices, offset = [], 0
    for index, length in enumerate(lengths):
        slices.append(Slice(f"tensor{index}", 0, length, torch.float32, "all", offset))
        offset += length
    plan = MessagePlan.build(slices, {"all": codebook})
    codec = DeviceCodec(plan, {"all": codebook}, device)
    values = tuple(torch.randn(length, device=device) for length in lengths)
    results = tuple(torch.empty_like(tensor) for tensor in values)
    contexts = [MessageContext(0, 0, rank, 0, 0, rank, 0) for rank in range(arguments.senders)]
    messages = [codec.encode(values, context) for context in contexts]
    out = torch.empty_like(messages[0])
    counters = itertools.count(1)

    def encode() -> None:
        codec.encode(values, MessageContext(0, next(counters), 0, 0, 0, 0, 0), out)

    def decode() -> None:
        codec.decode_mean(messages, contexts, results)

    def step() -> None:
        encode()
        decode()

    rows = []
    encoded, decoded = 4 * offset + plan.message_bytes, 4 * offset + arguments.senders * plan.message_bytes
    for operation, call, moved in (
        ("encode", encode, encoded),
        (f"decode and average {arguments.senders}", decode, decoded),
        ("step", step, encoded + decoded),
    ):
        time_on_device = microseconds(call, arguments.repeats)
        share = moved / time_on_device / bandwidth
        host = host_microseconds(call, arguments.repeats)
        rows.append(Row(size, f"{name}: {operation}", time_on_device, share, host))
    torch.cuda.synchronize()
    codec.check()
    return rows


def torch_qsgd(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Bucket-wise QSGD with torch's operators, packed two codes a byte."""
    buckets = torch.nn.functional.pad(values, (0, -values.numel() % BUCKET_SIZE)).view(-1, BUCKET_SIZE)
    norms = buckets.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    steps = 2 ** (bits - 1) - 1
    levels = torch.floor(buckets.abs() / norms * steps + torch.rand_like(buckets)).clamp_max(steps).to(torch.uint8)
    codes = (levels | (buckets < 0).to(torch.uint8) << (bits - 1)).view(-1)
    return codes[::2] | codes[1::2] << 4


def measure_rivals(size: str, values: torch.Tensor, repeats: int) -> list[Row]:
    """Other ways to make gradients smaller, on the same tensor."""
    rows = [
        Row(size, "fp16 cast", microseconds(lambda: values.half(), repeats), None),
        Row(size, "torch-operator QSGD 4-bit", microseconds(lambda: torch_qsgd(values, 4), repeats), None),
    ]
    try:
        from bitsandbytes import functional

        time_on_device = microseconds(lambda: functional.quantize_blockwise(values), repeats)
    except (ImportError, RuntimeError) as error:  # not installed, or not built for this version of CUDA
        print(f"no figure for bitsandbytes: {error}", file=sys.stderr)
        return rows
    return [*rows, Row(size, "bitsandbytes blockwise 8-bit", time_on_device, None)]


def measure(arguments: argparse.Namespace) -> list[Row]:
    """All rows of the table."""
    torch.manual_seed(arguments.seed)
    layouts = {**{size: [length] for size, length in SIZES.items()}, "150 tensors": model_of_150_tensors()}
    rows = []
    for size, lengths in layouts.items():
        values = torch.randn(sum(lengths), device="cuda")
        target = torch.empty_like(values)

        def copy(target: torch.Tensor = target, values: torch.Tensor = values) -> None:
            target.copy_(values)

        copy_time = microseconds(copy, arguments.repeats)
        rows.append(Row(size, "device-to-device copy", copy_time, 1.0))
        rows += measure_rivals(size, values, arguments.repeats)
        for name, codebook in codebooks().items():
            rows += measure_codec(size, lengths, name, codebook, 8 * values.numel() / copy_time, arguments)
    return rows


def show(rows: Sequence[Row]) -> None:
    table = Table(title=f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}")
    for heading in ("size", "operation", "µs", "of the copy's bandwidth", "host µs"):
        table.add_column(heading, justify="left" if heading in ("size", "operation") else "right")
    for row in rows:
        share = "" if row.share_of_copy is None else f"{100 * row.share_of_copy:.0f} %"
        host = "" if row.host_microseconds is None else f"{row.host_microseconds:.1f}"
        table.add_row(row.size, row.operation, f"{row.microseconds:.1f}", share, host)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if not torch.cuda.is_available():
        print("gpu.py needs a CUDA GPU and a CUDA build of torch; there is none here", file=sys.stderr)
        return 1
    if importlib.util.find_spec("numba_cuda") is None:
        print("gpu.py needs numba-cuda: pip install 'hvd-qoda[cuda]'", file=sys.stderr)
        return 1
    rows = measure(options)
    show(rows)
    if options.json:
        description = {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(description, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
