#!/usr/bin/env python3
"""How much smaller is the error of the ranks' mean with stratified dither than with independent dither?

  python launch/bench/stratified.py --gradients recorded --json launch/results/stratified.json

Takes gradients of K workers that `launch/bench/record_gradients.py` has recorded. Each worker's is encoded as in a
step, with levels fitted to the gradients of the step before; the mean is decoded from the messages, whose sizes do not
depend on the dither. The error is the squared distance to the exact mean, over many draws of the random numbers, as a
part of the exact mean's squared norm. By `kernels/qoda_kernels/dither.py` unrelated gradients leave
1/2 + 1/(2 K^2) of the error of independent dither, and equal ones 1/K. The mean of all draws is compared with the exact
mean, too: without bias its squared distance is the error divided by the number of draws.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from hvd_qoda.exchange import Stamp
from launch.train.options import HelpFormatter, not_negative, positive
from launch.train.summary import write_json
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.levels import minimum_variance_levels
from qoda_kernels.statistics import statistics_class

DITHERS = ("independent", "stratified")
_Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Errors:
    """Of the mean of K messages, each as a part of the exact mean's squared norm.

    Attributes:
        single: mean over the draws of the squared distance to the exact mean.
        of_all: squared distance of the mean of all draws.
        message_bytes: of one rank's message.
    """

    single: float
    of_all: float
    message_bytes: int


def recorded(path: Path) -> Iterator[tuple[str, _Values, _Values]]:
    """Moment of training, gradients of the workers, and those of the step before: [workers, elements] each."""
    with np.load(path) as arrays:
        keys = [key.split("/", 3) for key in arrays.files if key != "layer_types"]
        names = list(dict.fromkeys(key[3] for key in keys))
        workers = sorted({int(key[2]) for key in keys})
        for moment in dict.fromkeys(key[0] for key in keys):
            now, before = (
                np.stack([np.concatenate([arrays[f"{moment}/{shift}/{w}/{name}"] for name in names]) for w in workers])
                for shift in (0, -1)
            )
            yield moment, now, before


def fitted(before: _Values, bits: int, bucket_size: int) -> Codebook:
    """Levels of minimum variance for the gradients of the step before, of all workers."""
    book = Codebook.uniform(bits, bucket_size=bucket_size)
    statistics_kind = statistics_class("histogram")
    gathered = statistics_kind.gather(before.reshape(-1), bucket_size, book.norm)
    levels = minimum_variance_levels(gathered, bits, previous=book.levels)
    return book.with_levels([float(level) for level in levels], 1)


def errors(gradients: _Values, book: Codebook, dither: str, draws: int, seed: int) -> Errors:
    """Errors of the mean with one dither.

    Args:
        gradients: [workers, elements].
        book: the codebook of all of them.
        dither: "independent" or "stratified".
        draws: how often the random numbers are drawn.
        seed: of the random numbers.
    """
    workers, elements = gradients.shape
    books = {"all": book}
    plan = MessagePlan.build([Slice("gradient", 0, elements, torch.float32, "all", 0)], books)
    codec = Codec(plan, books)
    exact = gradients.mean(axis=0, dtype=np.float64)
    norm = float(exact @ exact)
    total, distances = np.zeros(elements), []
    out = torch.empty(elements)
    for counter in range(draws):
        stamp = Stamp(seed, counter, 1, dither)
        contexts = [stamp.context(0, worker, 0, workers) for worker in range(workers)]
        messages = [
            codec.encode([torch.from_numpy(own)], context) for own, context in zip(gradients, contexts, strict=True)
        ]
        codec.decode_mean(messages, contexts, [out])
        mean = out.numpy().astype(np.float64)
        total += mean
        distances.append(float(np.square(mean - exact).sum()))
    of_all = float(np.square(total / draws - exact).sum())
    return Errors(statistics.fmean(distances) / norm, of_all / norm, plan.message_bytes)


def compared(options: argparse.Namespace, path: Path) -> Iterator[dict[str, Any]]:
    """A row for every moment of a recording."""
    for moment, gradients, before in recorded(path):
        book = fitted(before, options.bits, options.bucket_size)
        found = {dither: errors(gradients, book, dither, options.draws, options.seed) for dither in DITHERS}
        independent, stratified = (found[dither] for dither in DITHERS)
        workers = len(gradients)
        yield {
            "network": path.stem,
            "moment": moment,
            "elements": gradients.shape[1],
            "workers": workers,
            "draws": options.draws,
            "independent_error": independent.single,
            "stratified_error": stratified.single,
            "ratio": stratified.single / independent.single,
            "ratio_if_unrelated": 0.5 + 0.5 / workers**2,
            "bias_ratio": stratified.of_all * options.draws / stratified.single,
            "message_bytes": {dither: found[dither].message_bytes for dither in DITHERS},
        }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a table."""
    table = Table(title="relative squared error of the ranks' mean")
    for heading in ("network", "moment", "ranks", "independent", "stratified", "ratio", "theory", "draws x bias"):
        table.add_column(heading, justify="left" if heading in ("network", "moment") else "right")
    for row in rows:
        table.add_row(
            row["network"],
            row["moment"],
            str(row["workers"]),
            f"{row['independent_error']:.2e}",
            f"{row['stratified_error']:.2e}",
            f"{row['ratio']:.3f}",
            f"{row['ratio_if_unrelated']:.3f}",
            f"{row['bias_ratio']:.3f}",
        )
    console = Console(width=120)
    console.print(table)
    console.print("Theory: for unrelated gradients. draws x bias: 1 without bias, up to the number of draws with it.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--gradients", type=Path, required=True, help="folder of recorded .npz files")
    parser.add_argument("--bits", type=positive, default=5, help="width of our codes")
    parser.add_argument("--bucket-size", type=positive, default=512, help="coordinates that share one norm")
    parser.add_argument("--draws", type=positive, default=100, help="of the random numbers")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the random numbers")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows to this file")
    options = parser.parse_args(arguments)
    paths = sorted(options.gradients.glob("*.npz"))
    if not paths:
        print(f"stratified.py: there is no .npz file in {options.gradients}", file=sys.stderr)
        return 2
    rows = [row for path in paths for row in compared(options, path)]
    show(rows)
    if options.json is not None:
        given = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", "launch/bench/stratified.py", *given])
        write_json(options.json, {"command": command, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
