#!/usr/bin/env python3
"""Does every finite gradient decode to finite values, within a gap, and without bias?

A case is one bucket of one dtype: any bits that are finite, from the smallest subnormal number to the largest one, in
several forms (`FORMS`). It is encoded by two ranks and decoded, alone and as their mean, with codebooks in turns. It
fails

- where a decoded value, or the mean, is not finite;
- where a decoded value is further from its coordinate than the widest gap times the bucket's norm (with rotated
  buckets: where its error is longer than that gap times norm times the root of the bucket's size).

Beyond that, results may differ by half the distance of two neighbours of the dtype, to which they are rounded. The bias
is tested over all cases of a codebook and form together: of the coordinates' errors, weighted with their signs, the sum
must be within five standard errors and what `reference.py` allows. A sum that is not fails all cases behind it. What is
known to be biased is left out of that test (`reference.py`, `gaussian.py`): rotated buckets near the largest number,
and, rounded to nearest, those with few values that are not zero.
"""

import argparse
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from launch.train.options import HelpFormatter, not_negative, positive
from launch.train.summary import command, write_json
from qoda_kernels import reference
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.gaussian import nearest_codebook, stochastic_codebook
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.wire import MessageContext

Float64Array = npt.NDArray[np.float64]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CODEBOOKS = {
    "uniform, max": Codebook.uniform(4, bucket_size=128),
    "uniform, max, bf16 norms": Codebook.uniform(4, bucket_size=128, norm_format="bf16"),
    "uniform, l2": Codebook.uniform(4, bucket_size=128, norm="l2"),
    "uniform, l2, bf16 norms": Codebook.uniform(4, bucket_size=128, norm="l2", norm_format="bf16"),
    "exponential, max, bf16 norms": Codebook.exponential(4, bucket_size=128, norm_format="bf16"),
    "rotated, to nearest": nearest_codebook(4, False, 512, "fp32"),
    "rotated, to nearest, bf16 norms": nearest_codebook(4, False, 512, "bf16"),
    "rotated, stochastic": stochastic_codebook(4, 512, "fp32"),
    "rotated, stochastic, bf16 norms": stochastic_codebook(4, 512, "bf16"),
}
FORMS = ("any bits", "one size", "equal", "single", "largest", "subnormal")
BATCH = 2000  # cases that are encoded at a time
SENDERS = 2


@dataclass
class Tally:
    """What was found of one codebook and form.

    Attributes:
        cases: buckets.
        failed: of them, those with a value that is not finite or out of bounds.
        error: sum of the coordinates' errors, in gaps, weighted with their signs.
        variance: what the levels let expect of it.
        allowed: bias that `reference.py` allows.
    """

    cases: int = 0
    failed: int = 0
    error: float = 0.0
    variance: float = 0.0
    allowed: float = 0.0

    @property
    def score(self) -> float:
        """Standard errors that the sum of errors lies beyond what is allowed."""
        beyond = max(0.0, abs(self.error) - self.allowed)
        return beyond / self.variance**0.5 if self.variance > 0 else 0.0 if beyond == 0 else np.inf

    @property
    def failures(self) -> int:
        """Failed cases; all of them where the mean error is beyond five standard errors."""
        return self.cases if self.score > 5.0 else self.failed


@dataclass
class Found:
    """The tallies of one dtype, by codebook and form."""

    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        """Buckets of all codebooks."""
        return sum(tally.cases for tally in self.tallies.values())

    @property
    def failed(self) -> int:
        """Those of them that failed."""
        return sum(tally.failures for tally in self.tallies.values())

    @property
    def largest_score(self) -> float:
        """The largest of the tallies' scores."""
        return max(tally.score for tally in self.tallies.values())


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--cases", type=positive, default=10_000, help="buckets of each dtype")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the gradients")
    parser.add_argument("--seed", type=not_negative, default=0, help="other seeds, other cases")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows here too")
    return parser.parse_args(arguments)


def gradients(form: str, dtype: torch.dtype, buckets: int, size: int, rng: np.random.Generator) -> torch.Tensor:
    """Finite values of one form, [buckets, size]."""
    info = torch.finfo(dtype)
    exponents = np.log2(info.smallest_normal * info.eps), np.log2(info.max)
    shape = buckets, size
    if form == "any bits":
        words = torch.from_numpy(rng.integers(0, 2 ** (8 * dtype.itemsize), shape, dtype=np.uint32))
        values = words.view(dtype) if dtype.itemsize == 4 else words.to(torch.uint16).view(dtype)
        return torch.where(torch.isfinite(values), values, torch.zeros_like(values))
    power = 2.0 ** rng.uniform(*exponents, (buckets, 1))
    if form == "one size":
        draws = rng.standard_normal(shape) * power
    elif form == "equal":
        draws = np.broadcast_to(power, shape) * rng.choice([-1.0, 1.0], shape)
    elif form == "single":
        draws = np.where(np.arange(size) == rng.integers(size, size=(buckets, 1)), power, 0.0)
    elif form == "largest":
        draws = rng.uniform(-1, 1, shape) * 2.0 ** rng.integers(-2, 1, (buckets, 1)) * info.max
        draws[:, 0] = info.max
    else:
        draws = rng.integers(-40, 41, shape) * float(info.smallest_normal * info.eps)
    return torch.from_numpy(np.clip(draws, info.min, info.max)).to(dtype)


def true_norms(message: torch.Tensor, codec: Codec, book: Codebook, dtype: str) -> Float64Array:
    """Norms of a message's buckets, in float64."""
    segment = codec.plan.segments[0]
    stored = message[segment.begin : segment.codes_begin].numpy()
    words = stored.view("<u4" if book.norm_format == "fp32" else "<u2")
    largest = np.float32(np.inf) if book.rotation != "none" else reference.LARGEST[dtype]
    pairs = [reference.norm_of_word(int(word), book.norm_format, largest) for word in words]
    return np.array([float(norm) * float(power) for norm, power in pairs])


def half_neighbour_distance(values: Float64Array, dtype: torch.dtype) -> Float64Array:
    """Half the distance of two neighbours of a dtype around values: the largest error of rounding to it."""
    info = torch.finfo(dtype)
    return np.maximum(np.abs(values) * info.eps, info.smallest_normal * info.eps) / 2


def check_batch(
    name: str, form: str, dtype: str, buckets: int, coordinate: int, rng: np.random.Generator, tally: Tally
) -> None:
    """Encode and decode buckets of one form with one codebook, and count what is wrong."""
    book, kind = CODEBOOKS[name], DTYPES[dtype]
    size = book.bucket_size
    plan = MessagePlan.build([Slice("gradient", 0, buckets * size, kind, "all", coordinate)], {"all": book})
    codec = Codec(plan, {"all": book})
    counter = int(rng.integers(2**40))
    contexts = [MessageContext(0, counter, rank, 0, 0, rank, 0) for rank in range(SENDERS)]
    given = [gradients(form, kind, buckets, size, rng) for _ in contexts]
    messages = [codec.encode([values.flatten()], where) for values, where in zip(given, contexts, strict=True)]
    mean = codec.decode_mean(messages, contexts)[0].view(buckets, size)
    decoded = codec.decode_mean(messages[:1], contexts[:1])[0].view(buckets, size)
    is_bad = ~(torch.isfinite(mean) & torch.isfinite(decoded)).all(dim=1).numpy()

    values, result = given[0].double().numpy(), decoded.double().numpy()
    norms = true_norms(messages[0], codec, book, dtype)[:, None]
    levels = np.array(book.levels, dtype=np.float64)
    room = half_neighbour_distance(values, kind) + half_neighbour_distance(result, kind)
    is_rotated = book.rotation != "none"
    with np.errstate(invalid="ignore", over="ignore"):
        error = result - values
        if is_rotated:
            last = book.spread * levels[-1] if book.rounding == "nearest" else 1.0
            # Rounded to nearest, what lies beyond the last level is lowered to it: the length itself bounds the error.
            length = np.sqrt((values**2).sum(axis=1, keepdims=True))
            widest = np.diff(levels).max() * norms * size**0.5 + (length if book.rounding == "nearest" else 0.0)
            is_bad |= np.sqrt((error**2).sum(axis=1)) > last * widest[:, 0] * 1.01 + np.sqrt((room**2).sum(axis=1))
        else:
            is_bad |= (np.abs(error) > np.diff(levels).max() * norms * (1 + 1e-5) + room).any(axis=1)
    tally.cases += buckets
    tally.failed += int(is_bad.sum())

    usable = (norms[:, 0] > 0) & ~is_bad
    if is_rotated:  # the error along the gradient, which any other error only adds noise to
        largest = np.abs(values).max(axis=1)
        usable &= (largest > 0) & (largest < float(reference.LARGEST[dtype]) / 64)
        usable &= (np.abs(values) > largest[:, None] / 100).sum(axis=1) > (20 if book.rounding == "nearest" else 0)
        scaled = values[usable] / largest[usable, None]
        power = (scaled**2).sum(axis=1)
        errors = (error[usable] / largest[usable, None] * scaled).sum(axis=1) / power
        tally.error += float(errors.sum())
        tally.variance += float((errors**2).sum())
        tally.allowed += float((room[usable] / largest[usable, None]).max(axis=1, initial=0.0).sum()) + 5e-3 * len(
            power
        )
        return
    u = np.abs(values[usable]) / norms[usable]
    index = np.clip(np.searchsorted(levels, u, side="right") - 1, 0, levels.size - 2)
    gap = np.diff(levels)[index]
    share = np.clip((u - levels[index]) / gap, 0.0, 1.0)
    scaled_error = error[usable] * np.sign(values[usable]) / norms[usable] / gap
    tally.error += float(scaled_error.sum())
    tally.variance += float((share * (1 - share)).sum())
    fixed_point = 2.0 ** -(reference.fraction_bits(book.bits) + 1)
    rounding = room[usable] / norms[usable] / gap
    tally.allowed += float((fixed_point + 1e-6 / gap + rounding)[share > 0].sum()) if share.size else 0.0


def batches(cases: int) -> Iterator[tuple[str, str, int]]:
    """Codebook, form and number of cases of each batch."""
    pairs = [(name, form) for form in FORMS for name in CODEBOOKS]
    for number, (name, form) in enumerate(pairs):
        left = cases // len(pairs) + (number < cases % len(pairs))
        while left > 0:
            yield name, form, min(BATCH, left)
            left -= BATCH


def measure(dtype: str, cases: int, seed: int) -> Found:
    """All cases of one dtype."""
    rng, found, coordinate = np.random.default_rng([seed, zlib.crc32(dtype.encode())]), Found(), 0
    for name, form, buckets in batches(cases):
        tally = found.tallies.setdefault((name, form), Tally())
        check_batch(name, form, dtype, buckets, coordinate, rng, tally)
        coordinate += buckets * CODEBOOKS[name].bucket_size
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; the exit status is 1 where a case failed."""
    options = parse_arguments(arguments)
    rows, console = [], Console()
    table = Table("dtype", "cases", "failed", "largest score of the bias (5 fails)")
    for dtype in options.dtypes:
        found = measure(dtype, options.cases, options.seed)
        rows.append(
            {"dtype": dtype, "cases": found.cases, "failed": found.failed, "largest_bias_score": found.largest_score}
        )
        table.add_row(dtype, f"{found.cases:,}", f"{found.failed:,}", f"{found.largest_score:.2f}")
        for (name, form), tally in found.tallies.items():
            if tally.failures:
                console.print(
                    f"{dtype}, {name}, {form}: {tally.failed} of {tally.cases}, score of the bias {tally.score:.1f}"
                )
    console.print(table)
    if options.json is not None:
        write_json(options.json, {"command": command(), "rows": rows})
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
