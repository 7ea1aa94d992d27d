"""Where quantized gradients pay: predicted times by size of the model, bandwidth and number of ranks.

Predictions of the cost model, with the speed of this machine's codec (measured) and ring collectives over links of the
stated bandwidth and latency (assumed). Every cell shows the scheme that exchange="auto" would begin with and how much
faster than the host's own fp32 all-reduce the exchange is; the break-even is the bandwidth above which plain gradients
win. Started by horovodrun, the link among the ranks is measured as well, and the first lines say what is best here.
"""

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hvd_qoda.cost_model import (
    BUFFER_BYTES,
    Choice,
    CodecSpeed,
    Layout,
    Link,
    Ranks,
    break_even_bytes_per_s,
    choose,
)
from hvd_qoda.errors import ConfigError
from hvd_qoda.hosts import gather_hosts
from hvd_qoda.launched import launched_ranks
from hvd_qoda.measurement import fitted_codebook, measure_codec, measure_link
from hvd_qoda.transport import LocalTransport
from qoda_kernels.codebook import EXACT_BITS, Codebook
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.worker_threads import WorkerThreads, allotted_threads

__all__ = ["NAME", "SUMMARY", "add_options", "run", "show"]

NAME = "advise"
SUMMARY = "where quantized gradients pay, and what would be used here"

_ELEMENTS = (1_000_000, 2_600_000, 25_000_000, 110_000_000, 350_000_000)
_MBIT = (100.0, 500.0, 1000.0, 5000.0, 10_000.0, 25_000.0, 100_000.0)
_RANKS = (2, 4, 8, 16)
_BYTES_PER_MBIT = 1e6 / 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `hvd-qoda advise`."""
    parser.add_argument("--elements", type=int, nargs="+", default=list(_ELEMENTS), help="parameters of the model")
    parser.add_argument(
        "--mbit", type=float, nargs="+", default=list(_MBIT), help="bandwidth of each host's connection, in Mbit/s"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=list(_RANKS), help="numbers of ranks")
    parser.add_argument("--ranks-per-host", type=int, default=1, help="of them on each host")
    parser.add_argument("--latency-us", type=float, default=50.0, help="of one message, in microseconds")
    parser.add_argument("--bits", type=int, default=5, help="of a code word")
    parser.add_argument("--bucket-size", type=int, default=512, help="coordinates that share a norm")
    parser.add_argument(
        "--overlap-ms", type=float, default=0.0, help="backward pass that goes on while gradients are sent, in ms"
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """What `hvd-qoda advise` prints, as plain values, and its exit status.

    Raises:
        ConfigError: for impossible options.
    """
    _check(options)
    codebook = fitted_codebook(options.bits, options.bucket_size)
    threads = WorkerThreads(allotted_threads(os.environ))
    with launched_ranks() as transport:
        ranks = LocalTransport() if transport is None else transport
        codec = measure_codec(codebook, ranks, threads, elements=max(options.elements))
        cells = [
            cell
            for size in options.ranks
            for elements in options.elements
            for cell in _row(_layout(elements, codebook), Ranks(size, options.ranks_per_host), codec, options)
        ]
        found = {
            "kind": "prediction",
            "bits": options.bits,
            "latency_s": 1e-6 * options.latency_us,
            "overlap_s": 1e-3 * options.overlap_ms,
            "ranks_per_host": options.ranks_per_host,
            "threads": threads.count,
            "codec": asdict(codec),
            "cells": cells,
            "here": None,
        }
        if transport is not None:
            hosts = gather_hosts(transport)
            link = measure_link(transport, hosts)
            found["here"] = _here(hosts.ranks, link, codec, codebook, options)
            found["silent"] = transport.rank != 0
    return found, 0


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `run` has found: what follows from it, then the link at hand, then the tables."""
    for sentence in _conclusions(found):
        console.print(sentence)
    if found["here"] is not None:
        _show_here(found["here"], console)
    _show_predictions(found, console)


def _conclusions(found: dict[str, Any]) -> list[str]:
    """The answer, a sentence for each size of the model where the link was measured, else for each number of ranks."""
    if found["here"] is not None:
        return [_conclusion_here(row, found["here"]) for row in found["here"]["rows"]]
    sentences = []
    cells = found["cells"]
    for size in dict.fromkeys(cell["ranks"] for cell in cells):
        limits = [cell["break_even_mbit"] for cell in cells if cell["ranks"] == size]
        if None in limits:
            told = "always pay" if set(limits) == {None} else "pay on every link for some of these models"
        elif max(limits) == 0.0:
            told = "never pay"
        else:
            told = f"pay on links up to {_bandwidth(min(limits))} to {_bandwidth(max(limits))}, by the model's size"
        sentences.append(f"{size} ranks: {found['bits']} bits {told}.")
    return [*sentences, "To measure the link at hand: horovodrun -np K -H HOSTS hvd-qoda advise"]


def _conclusion_here(row: dict[str, Any], here: dict[str, Any]) -> str:
    """What to do with a model of one size on the measured link."""
    size, best = f"{_count(row['elements'])} parameters", row["scheme"]
    plain, chosen = row["seconds"]["off"], row["seconds"][best]
    if best == "off":
        fastest = min((row["seconds"][name], name) for name in here["schemes"] if name != "off")
        return (
            f"{size}: leave gradients alone, this link is faster than coding "
            f"({1e3 * plain:.3g} ms; the next best, {fastest[1]}, would take {1e3 * fastest[0]:.3g} ms)."
        )
    return f'{size}: exchange="{best}" takes {1e3 * chosen:.3g} ms, {plain / chosen:.2g} times as fast as fp32.'


def _show_here(here: dict[str, Any], console: Console) -> None:
    table = Table(title=f"Here: {here['ranks']} ranks on {here['hosts']} host(s), link measured")
    for name in ("parameters", "best", "buffers", *here["schemes"]):
        table.add_column(name, justify="right")
    for row in here["rows"]:
        times = [f"{1e3 * row['seconds'][scheme]:.3g} ms" for scheme in here["schemes"]]
        table.add_row(_count(row["elements"]), row["scheme"], f"{row['buffer_bytes'] / 2**20:g} MiB", *times)
    console.print(table)


def _show_predictions(found: dict[str, Any], console: Console) -> None:
    codec = found["codec"]
    console.print(
        f"Prediction for {found['bits']} bits, latency {1e6 * found['latency_s']:g} us, "
        f"{1e3 * found['overlap_s']:g} ms of backward pass to hide behind. Codec on this machine, "
        f"{found['threads']} thread(s): {_rate(codec['encode_s'])} encode, {_rate(codec['decode_s'])} decode."
    )
    cells = found["cells"]
    bandwidths = list(dict.fromkeys(cell["mbit"] for cell in cells))
    for size in dict.fromkeys(cell["ranks"] for cell in cells):
        table = Table(title=f"{size} ranks: scheme, and speed-up of the exchange over plain fp32")
        table.add_column("parameters", justify="right")
        for mbit in bandwidths:
            table.add_column(_bandwidth(mbit), justify="right")
        table.add_column("break-even", justify="right")
        for elements in dict.fromkeys(cell["elements"] for cell in cells):
            row = [cell for cell in cells if (cell["ranks"], cell["elements"]) == (size, elements)]
            shown = [f"{_SHORT[cell['scheme']]} {cell['speedup']:.2f}" for cell in row]
            table.add_row(_count(elements), *shown, _bandwidth(row[0]["break_even_mbit"]))
        console.print(table)
    console.print(", ".join(f"{short}: {name}" for name, short in _SHORT.items() if name != "fp16"))


_SHORT = {"off": "off", "fp16": "16", "allgather": "AG", "reduce_scatter": "RS", "hierarchical": "H"}


def _check(options: argparse.Namespace) -> None:
    positive = {
        "--elements": options.elements,
        "--mbit": options.mbit,
        "--ranks": options.ranks,
        "--ranks-per-host": [options.ranks_per_host],
    }
    for name, values in positive.items():
        for value in values:
            if not (0 < value < math.inf):
                raise ConfigError(f"{name} {value:g}: must be positive")
    for name, value in {"--latency-us": options.latency_us, "--overlap-ms": options.overlap_ms}.items():
        if not (0 <= value < math.inf):
            raise ConfigError(f"{name} {value:g}: must not be negative")
    if options.bits == EXACT_BITS:
        raise ConfigError("--bits 32: that is no compression; 2 to 8")


def _layout(elements: int, codebook: Codebook) -> Layout:
    whole = Slice("gradient", 0, elements, torch.float32, "all", 0)
    return Layout.of([MessagePlan.build([whole], {"all": codebook})])


def _row(layout: Layout, ranks: Ranks, codec: CodecSpeed, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One model among so many ranks, at every bandwidth."""
    overlap_s, latency_s = 1e-3 * options.overlap_ms, 1e-6 * options.latency_us
    even = break_even_bytes_per_s(layout, ranks, codec, latency_s, overlap_s, BUFFER_BYTES)
    cells = []
    for mbit in options.mbit:
        link = Link.of(ranks, latency_s, mbit * _BYTES_PER_MBIT)
        choice = choose(layout, ranks, link, codec, overlap_s, buffers=BUFFER_BYTES)
        plain, best = choice.of("off"), choice.best
        cells.append(
            {
                "ranks": ranks.size,
                "elements": layout.elements,
                "mbit": mbit,
                "scheme": best.scheme,
                "buffer_bytes": best.buffer_bytes,
                "seconds": best.seconds,
                "off_s": plain.seconds,
                "speedup": plain.seconds / best.seconds if best.seconds else 1.0,
                "break_even_mbit": None if math.isinf(even) else even / _BYTES_PER_MBIT,
            }
        )
    return cells


def _here(
    ranks: Ranks, link: Link, codec: CodecSpeed, codebook: Codebook, options: argparse.Namespace
) -> dict[str, Any]:
    """The same on the measured link."""
    rows: list[dict[str, Any]] = []
    schemes: Sequence[str] = ranks.schemes
    for elements in options.elements:
        layout = _layout(elements, codebook)
        choice = choose(layout, ranks, link, codec, 1e-3 * options.overlap_ms, buffers=BUFFER_BYTES)
        every: Choice = choose(
            layout, ranks, link, codec, 1e-3 * options.overlap_ms, schemes=schemes, buffers=BUFFER_BYTES
        )
        rows.append(
            {
                "elements": elements,
                "scheme": choice.best.scheme,
                "buffer_bytes": choice.best.buffer_bytes,
                "seconds": {scheme: every.of(scheme).seconds for scheme in schemes},
            }
        )
    return {
        "ranks": ranks.size,
        "hosts": ranks.hosts,
        "link": link.to_dict(),
        "schemes": list(schemes),
        "rows": rows,
    }


def _count(elements: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if elements >= size:
            return f"{elements / size:g}{unit}"
    return str(elements)


def _bandwidth(mbit: float | None) -> str:
    if mbit is None:
        return "always pays"
    if mbit == 0.0:
        return "never pays"
    for factor, unit in ((1e6, "Tbit/s"), (1e3, "Gbit/s")):
        if mbit >= factor:
            return f"{mbit / factor:.3g} {unit}"
    return f"{mbit:.3g} Mbit/s"


def _rate(seconds: float) -> str:
    """Gigabytes of float32 in a second."""
    return f"{4e-9 / seconds:.3g} GB/s" if seconds > 0 else "too fast to measure"
