#!/usr/bin/env python3
"""Train a network on handwritten digits twice under Horovod, with fp32 gradients and with 5-bit ones, and compare.

Both runs start from the same weights and see the same batches. Bytes are those that one rank sends per step: counted at
the collective calls, headers, norms and padding included (all-reduce: 2 (K-1)/K of the payload, all-gather: K-1 times,
all-to-all: (K-1)/K). Bits per coordinate: what one hop carries of the compressed layers, divided by their coordinates.

On one machine the ranks talk over loopback, which costs next to nothing, so the step time shows the cost of encoding
and decoding and not what a network would save.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hvd_qoda.sinks import read_steps
from launch.train.job import STEPS_FILE, SUMMARY_FILE, Job, JobError, interrupt_on_terminate, program_path, run_job
from launch.train.options import EXCHANGES, OPTIMIZERS, HelpFormatter, not_negative, positive
from launch.train.plots import compare_runs
from launch.train.summary import write_everywhere
from qoda_kernels.codebook import EXACT_BITS
from qoda_kernels.registry import LEVEL_SCHEMES

PLOT_FILE = "demo.png"
_FP32, _QODA = "fp32", "qoda"
_MEASURE_ERROR_EVERY = 5


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--np", type=positive, default=2, metavar="N", dest="ranks", help="ranks to start on this machine"
    )
    parser.add_argument("--steps", type=positive, default=300, help="optimizer steps of each run")
    parser.add_argument("--batch-size", type=positive, default=32, help="examples per rank and step")
    parser.add_argument("--data", default="digits", metavar="DIR", help="directory with the MNIST files, or 'digits'")
    parser.add_argument("--model-size", default="medium", help="small, medium, large, or a width factor")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="qodadam", help="optimizer of both runs")
    parser.add_argument(
        "--bits", type=int, choices=range(2, 9), default=5, help="bits per coordinate of the second run"
    )
    parser.add_argument("--levels", choices=LEVEL_SCHEMES, default="adaptive", help="its quantization levels")
    parser.add_argument(
        "--exchange", choices=EXCHANGES, default="by_bytes", help="which collectives carry its messages"
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="where records, table and plot go")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table's numbers there as well")
    parser.add_argument("--seed", type=not_negative, default=0, help="of weights, order of data and random rounding")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="longest time for one run")
    return parser.parse_args(arguments)


def update_steps(steps: int) -> str:
    """When adaptive levels are fitted in a run of so many steps: soon, and once more when gradients have changed."""
    return ",".join(str(step) for step in sorted({max(1, steps // 15), max(1, steps // 3)}))


def job(name: str, arguments: argparse.Namespace) -> Job:
    """The run called `name`: fp32 or qoda."""
    common = ["--data", arguments.data, "--model-size", arguments.model_size, "--steps", str(arguments.steps)]
    common += ["--batch-size", str(arguments.batch_size), "--optimizer", arguments.optimizer]
    common += ["--seed", str(arguments.seed)]
    special = ["--compression", "none"]
    if name == _QODA:
        special = ["--compression", "qoda", "--bits", str(arguments.bits), "--levels", arguments.levels]
        special += ["--exchange", arguments.exchange]
        special += ["--update-levels-at", update_steps(arguments.steps), "--update-levels-every", "0"]
        special += ["--measure-error-every", str(_MEASURE_ERROR_EVERY)]
    return Job(
        program_path("mnist.py"), (*common, *special), arguments.ranks, arguments.run_dir / name, arguments.timeout
    )


def run_both(arguments: argparse.Namespace, console: Console) -> dict[str, dict[str, Any]]:
    """Run fp32, then qoda, with a bar for each; returns their summaries by name."""
    titles = {_FP32: "Horovod, fp32 gradients", _QODA: f"Horovod, {arguments.bits}-bit gradients"}
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("training loss {task.fields[loss]:>7}"),
        TimeElapsedColumn(),
    )
    summaries: dict[str, dict[str, Any]] = {}
    with Progress(*columns, console=console) as progress:
        for name, title in titles.items():
            task = progress.add_task(title, total=arguments.steps, loss="-")

            def show(record: dict[str, Any], task: Any = task) -> None:
                progress.update(task, completed=record["step"], loss=f"{record['scalars']['loss']:.4f}")

            summaries[name] = run_job(job(name, arguments), show)
    return summaries


def combine(summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The demo's summary: both runs, and what the second saves."""
    fp32, qoda = summaries[_FP32], summaries[_QODA]
    sent = qoda["bytes_sent_per_step"]
    return {
        _FP32: fp32,
        _QODA: qoda,
        "bits_per_coordinate": qoda["bits_per_coordinate"],
        "compression_ratio": fp32["bytes_sent_per_step"] / sent if sent else None,
        "replicas_identical": fp32["replicas_identical"] and qoda["replicas_identical"],
    }


def described(run: dict[str, Any]) -> str:
    """The job in a line."""
    return f"{run['dataset']}, {run['parameters']:,} parameters, {run['ranks']} ranks, {run['steps']} steps"


def compressed_and_exact(layer_types: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The layer types that are quantized, and those that travel as they are."""
    compressed = {name: entry for name, entry in layer_types.items() if entry["bits"] < EXACT_BITS}
    exact = {name: entry for name, entry in layer_types.items() if name not in compressed and entry["coordinates"] > 0}
    return dict(sorted(compressed.items(), key=lambda item: -item[1]["coordinates"])), exact


def table(summary: dict[str, Any], bits: int) -> Table:
    """The comparison as it is printed."""
    fp32, qoda = summary[_FP32], summary[_QODA]
    drawn = Table(title=described(fp32), caption_justify="left")
    drawn.add_column("")
    drawn.add_column("Horovod fp32", justify="right")
    drawn.add_column(f"qoda, {bits} bits", justify="right")
    for name, form, key in (
        ("test accuracy", "{:.2%}", "test_accuracy"),
        ("training loss at the end (nats)", "{:.5f}", "train_loss"),
        ("bytes sent per rank and step", "{:,.0f}", "bytes_sent_per_step"),
    ):
        drawn.add_row(name, _number(fp32[key], form), _number(qoda[key], form))
    drawn.add_row("compression ratio", "1", _number(summary["compression_ratio"], "{:.2f}"))
    bits_sent = _number(summary["bits_per_coordinate"], "{:.3f}")
    drawn.add_row("bits per coordinate, compressed layers [1]", "-", bits_sent)
    drawn.add_row("step time, median, ms [2]", f"{fp32['step_ms']:.1f}", f"{qoda['step_ms']:.1f}")
    drawn.add_section()
    compressed, exact = compressed_and_exact(qoda["layer_types"])
    for layer_type, entry in compressed.items():
        error = _number(entry["relative_error"], "{:.5f}")
        drawn.add_row(f"error [3], {layer_type} ({entry['coordinates']:,} values)", "0", error)
    values = sum(entry["coordinates"] for entry in exact.values())
    drawn.add_row(f"error [3], sent as fp32 ({values:,} values)", "0", "0")
    drawn.add_section()
    drawn.add_row("all ranks hold the same bits", _yes(fp32["replicas_identical"]), _yes(qoda["replicas_identical"]))
    drawn.caption = (
        "[1] Sent in one hop, norms and headers included.\n"
        "[2] Loopback saves no network time: the difference is what coding costs.\n"
        "[3] |Q(v) - v|² / |v|² of rank 0's gradients, mean over the steps measured."
    )
    return drawn


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    console = Console()
    errors = Console(stderr=True)
    try:
        with interrupt_on_terminate():
            summary = combine(run_both(arguments, console))
    except JobError as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        errors.print("interrupted; the runs that were going on have been ended")
        return 130
    run_dir: Path = arguments.run_dir
    runs = {
        "Horovod fp32": read_steps(run_dir / _FP32 / STEPS_FILE),
        f"qoda, {arguments.bits} bits": read_steps(run_dir / _QODA / STEPS_FILE),
    }
    title = f"{described(summary[_FP32])}, optimizer {arguments.optimizer}"
    compare_runs(
        run_dir / PLOT_FILE,
        title,
        runs,
        compressed=f"qoda, {arguments.bits} bits",
    )
    write_everywhere((run_dir / SUMMARY_FILE, arguments.json), summary)
    console.print(table(summary, arguments.bits))
    console.print(f"records   {run_dir / _FP32 / STEPS_FILE}\n          {run_dir / _QODA / STEPS_FILE}")
    console.print(f"summary   {run_dir / SUMMARY_FILE}\nplot      {run_dir / PLOT_FILE}")
    return 0 if summary["replicas_identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
