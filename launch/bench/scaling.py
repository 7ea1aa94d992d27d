#!/usr/bin/env python3
"""Prediction, not measurement: how much faster an exchange gets on 8 to 1,024 workers at 1 to 400 Gbit/s.

The cost model's time of a plain fp32 all-reduce over that of the scheme that it would choose (allgather,
reduce_scatter, hierarchical or off), for one worker per connection unless --ranks-per-host says otherwise. The speed of
the codec is given: by default an estimate for a data-centre GPU from bytes and instruction counts (--encode-ns,
--decode-ns, --call-us), or with --measure-cpu that of this machine's CPU codec, measured. Nothing here was run on so
many workers.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
import torch

from hvd_qoda.cost_model import BUFFER_BYTES, CodecSpeed, Layout, Link, Ranks, choose
from hvd_qoda.measurement import fitted_codebook, measure_codec
from hvd_qoda.transport import LocalTransport
from launch.train.options import HelpFormatter, positive
from launch.train.summary import write_json
from qoda_kernels.layout import MessagePlan, Slice

WORKERS = (8, 16, 32, 64, 128, 256, 512, 1024)
GBIT = (1.0, 5.0, 10.0, 25.0, 100.0, 200.0, 400.0)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--elements", type=positive, default=25_000_000, help="parameters of the model")
    parser.add_argument("--bits", type=int, choices=range(2, 9), default=5, help="of a code word")
    parser.add_argument("--workers", type=positive, nargs="+", default=list(WORKERS), help="numbers of workers")
    parser.add_argument("--gbit", type=float, nargs="+", default=list(GBIT), help="of each host's connection")
    parser.add_argument("--ranks-per-host", type=positive, default=1, help="workers that share a connection")
    parser.add_argument("--latency-us", type=float, default=5.0, help="of one message")
    parser.add_argument("--encode-ns", type=float, default=0.004, help="of the codec, for each coordinate")
    parser.add_argument("--decode-ns", type=float, default=0.003, help="for each coordinate of each message")
    parser.add_argument("--call-us", type=float, default=30.0, help="for each call of the codec: launches of kernels")
    parser.add_argument("--measure-cpu", action="store_true", help="take the speed of this machine's CPU codec instead")
    parser.add_argument("--seed", type=int, default=0, help="accepted like everywhere; a prediction draws nothing")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the predictions here too")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw them into this PNG file")
    return parser.parse_args(arguments)


def codec_speed(options: argparse.Namespace) -> tuple[CodecSpeed, str]:
    """The codec's speed, and where it comes from."""
    if options.measure_cpu:
        return measure_codec(fitted_codebook(options.bits), LocalTransport()), "CPU codec, one thread, measured"
    speed = CodecSpeed(
        1e-9 * options.encode_ns,
        1e-9 * options.decode_ns,
        call_s=1e-6 * options.call_us,
        pass_s=1e-9 * options.decode_ns,
    )
    return speed, "GPU codec, estimated"


def predictions(options: argparse.Namespace, codec: CodecSpeed) -> list[dict[str, Any]]:
    """One row for each number of workers and bandwidth."""
    books = {"all": fitted_codebook(options.bits)}
    layout = Layout.of([MessagePlan.build([Slice("g", 0, options.elements, torch.float32, "all", 0)], books)])
    rows = []
    for workers in options.workers:
        ranks = Ranks(workers, options.ranks_per_host)
        for gbit in options.gbit:
            link = Link.of(ranks, 1e-6 * options.latency_us, gbit * 1e9 / 8)
            choice = choose(layout, ranks, link, codec, buffers=BUFFER_BYTES)
            plain = choice.of("off")
            rows.append(
                {
                    "workers": workers,
                    "gbit": gbit,
                    "scheme": choice.best.scheme,
                    "predicted_s": choice.best.seconds,
                    "fp32_predicted_s": plain.seconds,
                    "predicted_speedup": plain.seconds / choice.best.seconds,
                }
            )
    return rows


def draw(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """A line for each bandwidth into a PNG file."""
    figure, axes = plt.subplots(figsize=(8.0, 4.8), layout="constrained")
    colours = plt.get_cmap("viridis")
    bandwidths = sorted({row["gbit"] for row in rows})
    for index, gbit in enumerate(bandwidths):
        own = [row for row in rows if row["gbit"] == gbit]
        colour = colours(0.9 * index / max(1, len(bandwidths) - 1))
        axes.plot(
            [row["workers"] for row in own],
            [row["predicted_speedup"] for row in own],
            "o-",
            color=colour,
            label=f"{gbit:g} Gbit/s",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["workers"] for row in rows}), labels=sorted({row["workers"] for row in rows}))
    axes.set_ylim(bottom=0)
    axes.axhline(1.0, color="#8a8a8a", linewidth=0.8)
    axes.set_xlabel("workers")
    axes.set_ylabel("predicted speed-up of the exchange over fp32")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    codec, source = codec_speed(options)
    rows = predictions(options, codec)
    print(f"PREDICTION (cost model; nothing was run on so many workers). {source}.")
    print(f"{'workers':>8} {'Gbit/s':>8} {'scheme':>16} {'exchange':>12} {'fp32':>12} {'speed-up':>9}")
    for row in rows:
        print(
            f"{row['workers']:>8} {row['gbit']:>8g} {row['scheme']:>16} {1e3 * row['predicted_s']:>9.3g} ms "
            f"{1e3 * row['fp32_predicted_s']:>9.3g} ms {row['predicted_speedup']:>9.2f}"
        )
    if options.json is not None:
        given = {key: value for key, value in vars(options).items() if key not in ("json", "plot")}
        content = {
            "kind": "prediction",
            "command": " ".join(
                ["python launch/bench/scaling.py", *(sys.argv[1:] if arguments is None else arguments)]
            ),
            "codec": {"source": source, **asdict(codec)},
            "options": given,
            "rows": rows,
        }
        write_json(options.json, content)
    if options.plot is not None:
        elements = f"{options.elements / 1e6:g}M"
        draw(options.plot, rows, f"Prediction of the cost model: {elements} parameters, {options.bits} bits, {source}")


if __name__ == "__main__":
    main()
