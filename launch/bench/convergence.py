#!/usr/bin/env python3
"""Does training with compressed gradients end where training with fp32 gradients ends? Several seeds, in one table.

Trains the network of launch/train/mnist.py under horovodrun on this machine: fp32 gradients and compressed ones over
both exchanges, with independent and with stratified dither, stepped by QODAdam; and fp32 gradients stepped by Adam, to
compare the optimizers. Runs of one seed start from the same weights and see the same batches. Writes every run's scores
and loss curve as JSON and draws them. With --np 4 --hosts localhost:2,127.0.0.1:2 the ranks lie as if on two hosts, and
QODAdam is compared over all exchanges, the hierarchical one among them.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hvd_qoda.sinks import read_steps
from launch.bench.convergence_plot import draw_scores
from launch.train.job import STEPS_FILE, SUMMARY_FILE, Job, JobError, interrupt_on_terminate, program_path, run_job
from launch.train.options import HelpFormatter, not_negative, parse_options, positive, steps_list
from launch.train.summary import write_everywhere
from qoda_kernels.registry import LEVEL_SCHEMES

_RESULTS = Path(__file__).resolve().parents[1] / "results"
_SCORES = ("train_loss", "test_loss", "test_accuracy", "bytes_sent_per_step")
ADAM, FP32, ALL_GATHER, REDUCE_SCATTER = "Adam, fp32", "QODAdam, fp32", "QODAdam, all-gather", "QODAdam, reduce-scatter"
HIERARCHICAL = "QODAdam, hierarchical"
STRATIFIED = {ALL_GATHER: f"{ALL_GATHER}, stratified", REDUCE_SCATTER: f"{REDUCE_SCATTER}, stratified"}
_POINTS = 40  # of a loss curve, each the mean of equally many steps


@dataclass(frozen=True)
class Case:
    """One way to train: its name and the options that make it."""

    name: str
    options: tuple[str, ...]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", default="digits", metavar="DIR", help="directory with the MNIST files, or 'digits'")
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="runs of each kind")
    parser.add_argument("--seed", type=not_negative, default=0, help="the first of the seeds; the others follow it")
    parser.add_argument("--np", type=positive, default=2, metavar="N", dest="ranks", help="ranks of each run")
    parser.add_argument("--hosts", metavar="NAME:N,...", help="names of this machine, to be taken for hosts of N ranks")
    parser.add_argument("--steps", type=positive, default=400, help="optimizer steps of each run")
    parser.add_argument("--batch-size", type=positive, default=64, help="examples per rank and step")
    parser.add_argument("--bits", type=int, choices=range(2, 9), default=5, help="bits of the compressed runs")
    parser.add_argument("--levels", choices=LEVEL_SCHEMES, default="adaptive", help="their quantization levels")
    parser.add_argument(
        "--update-levels-at",
        type=steps_list,
        default=(20, 150),
        metavar="STEPS",
        help="when adaptive levels are fitted",
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of all runs")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/convergence"), help="where the runs' records go")
    parser.add_argument(
        "--reuse", action="store_true", help="take over runs of equal options that --run-dir holds from an earlier call"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="scores; None: launch/results/convergence-DATA.json")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="picture; None: launch/results/convergence-DATA.png")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help="longest time for one run")
    return parser.parse_args(arguments)


def cases(arguments: argparse.Namespace) -> tuple[Case, ...]:
    """The ways to train that are compared."""
    at = ",".join(str(step) for step in arguments.update_levels_at)
    compressed = ["--optimizer", "qodadam", "--compression", "qoda", "--bits", str(arguments.bits)]
    compressed += ["--levels", arguments.levels, "--update-levels-at", at, "--update-levels-every", "0"]
    if arguments.hosts is not None:
        return (
            Case(FP32, ("--optimizer", "qodadam", "--compression", "none")),
            Case(ALL_GATHER, (*compressed, "--exchange", "allgather")),
            Case(REDUCE_SCATTER, (*compressed, "--exchange", "reduce_scatter")),
            Case(HIERARCHICAL, (*compressed, "--exchange", "hierarchical")),
        )
    return (
        Case(ADAM, ("--optimizer", "adam", "--compression", "none")),
        Case(FP32, ("--optimizer", "qodadam", "--compression", "none")),
        Case(ALL_GATHER, (*compressed, "--exchange", "allgather")),
        Case(STRATIFIED[ALL_GATHER], (*compressed, "--exchange", "allgather", "--dither", "stratified")),
        Case(REDUCE_SCATTER, (*compressed, "--exchange", "reduce_scatter")),
        Case(STRATIFIED[REDUCE_SCATTER], (*compressed, "--exchange", "reduce_scatter", "--dither", "stratified")),
    )


def earlier_summary(job: Job) -> dict[str, Any] | None:
    """The summary that this very job has left in its run directory, if it was run to its end before."""
    path = job.run_dir / SUMMARY_FILE
    if not path.is_file():
        return None
    summary: dict[str, Any] = json.loads(path.read_text())
    options = parse_options("", [*job.arguments, "--run-dir", str(job.run_dir)]).as_json()
    same = summary["options"] == json.loads(json.dumps(options)) and summary["ranks"] == job.ranks
    return summary if same else None


def run_case(case: Case, seed: int, arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """One run; returns its scores."""
    common = ["--data", arguments.data, "--steps", str(arguments.steps), "--batch-size", str(arguments.batch_size)]
    common += ["--learning-rate", str(arguments.learning_rate), "--seed", str(seed)]
    folder = arguments.run_dir / f"{case.name.replace(', ', '-').lower()}-seed{seed}"
    options = (*common, *case.options)
    job = Job(program_path("mnist.py"), options, arguments.ranks, folder, arguments.timeout, arguments.hosts)
    summary = earlier_summary(job) if arguments.reuse else None
    if summary is None:
        task = progress.add_task(f"{case.name}, seed {seed}", total=arguments.steps)
        try:
            summary = run_job(job, lambda record: progress.update(task, completed=record["step"]))
        finally:
            progress.remove_task(task)
    if not summary["replicas_identical"]:
        raise JobError(f"{case.name}, seed {seed}: the ranks hold different parameters at the end")
    kept = {key: summary[key] for key in (*_SCORES, "dataset", "parameters", "step_ms")}
    return {"seed": seed, **kept, "loss_curve": loss_curve(folder)}


def loss_curve(folder: Path) -> list[float]:
    """A run's loss at the steps, rank 0's batches: means of up to `_POINTS` groups of steps that follow each other."""
    losses = [float(record.scalars["loss"]) for record in read_steps(folder / STEPS_FILE)]
    group = max(1, len(losses) // _POINTS)
    return [statistics.fmean(losses[at : at + group]) for at in range(0, len(losses), group)]


def statistics_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Per score: mean, standard deviation (of the sample, 0 for one run), least and largest value over the seeds."""
    result = {}
    for score in _SCORES:
        values = [float(run[score]) for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        result[score] = {"mean": statistics.fmean(values), "std": spread, "min": min(values), "max": max(values)}
    return result


def judge(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, bool]:
    """What the runs say: is the mean loss with compression within fp32's range, and QODAdam as accurate as Adam?"""
    verdicts = {}
    for name in scores:
        if name in (ADAM, FP32):
            continue
        for score in ("train_loss", "test_loss"):
            within = scores[name][score]["mean"] <= scores[FP32][score]["max"]
            verdicts[f"{name}: mean {score} is not above the range of fp32"] = within
    if ADAM in scores:
        accurate = scores[FP32]["test_accuracy"]["mean"] >= scores[ADAM]["test_accuracy"]["mean"]
        verdicts["QODAdam's mean test accuracy is at least Adam's"] = accurate
    return verdicts


def paired_differences(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Per case and score: mean over the seeds of its difference from QODAdam with fp32, and that mean's standard error.

    Runs of one seed share weights and batches, so these differences scatter less than the scores themselves.
    """
    result: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in runs:
        result[name] = {}
        for score in _SCORES[:3]:
            pairs = zip(runs[name], runs[FP32], strict=True)
            differences = [float(one[score]) - float(other[score]) for one, other in pairs]
            error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
            result[name][score] = {"mean": statistics.fmean(differences), "standard_error": error}
    return result


def table(result: Mapping[str, Any]) -> Table:
    """The comparison as it is printed."""
    drawn = Table(
        title=result["title"], caption="mean ± standard deviation over the seeds, and least .. largest", show_lines=True
    )
    drawn.add_column("")
    for heading in ("training loss", "test loss", "test accuracy", "bytes/step"):
        drawn.add_column(heading, justify="right")
    for name, case in result["cases"].items():
        scores = case["scores"]
        drawn.add_row(
            name,
            _range(scores["train_loss"], "{:.4f}"),
            _range(scores["test_loss"], "{:.4f}"),
            _range(scores["test_accuracy"], "{:.2%}"),
            f"{scores['bytes_sent_per_step']['mean']:,.0f}",
        )
    return drawn


def _range(values: Mapping[str, float], form: str) -> str:
    mean, spread, least, largest = (form.format(values[key]) for key in ("mean", "std", "min", "max"))
    return f"{mean} ± {spread}\n{least} .. {largest}"


def _described(differences: Mapping[str, Mapping[str, float | None]]) -> str:
    parts = []
    for score, difference in differences.items():
        error = difference["standard_error"]
        spread = "" if error is None else f" ± {error:.5f}"
        parts.append(f"{score} {difference['mean']:+.5f}{spread}")
    return ", ".join(parts)


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run every case with every seed; returns what is written as JSON."""
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runs: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases(arguments)}
    with Progress(*columns, console=console) as progress:
        everything = progress.add_task("runs", total=len(seeds) * len(runs))
        for seed in seeds:
            for case in cases(arguments):
                runs[case.name].append(run_case(case, seed, arguments, progress))
                progress.advance(everything)
    first = runs[FP32][0]
    scores = {name: statistics_of(of_case) for name, of_case in runs.items()}
    hosts = "" if arguments.hosts is None else f" on {arguments.hosts.count(',') + 1} hosts"
    return {
        "command": shlex.join(["launch/bench/convergence.py", *sys.argv[1:]]),
        "title": f"{first['dataset']}, {first['parameters']:,} parameters, {arguments.ranks} ranks{hosts}, "
        f"{arguments.steps} steps, {arguments.bits} bits, {arguments.seeds} seeds",
        "cases": {
            case.name: {"options": list(case.options), "scores": scores[case.name], "runs": runs[case.name]}
            for case in cases(arguments)
        },
        "differences_from_qodadam_fp32": paired_differences(runs),
        "verdicts": judge(scores),
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    console = Console()
    try:
        with interrupt_on_terminate():
            result = measure(arguments, console)
    except JobError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the run that was going on has been ended")
        return 130
    dataset = result["cases"][FP32]["runs"][0]["dataset"]
    scores = arguments.json or _RESULTS / f"convergence-{dataset}.json"
    picture = arguments.plot or _RESULTS / f"convergence-{dataset}.png"
    write_everywhere((scores,), result)
    draw_scores(picture, result["title"], {name: case["runs"] for name, case in result["cases"].items()}, FP32)
    console.print(table(result))
    for name, differences in result["differences_from_qodadam_fp32"].items():
        if name != FP32:
            console.print(f"{name}, minus {FP32}, seed by seed: {_described(differences)}")
    for verdict, holds in result["verdicts"].items():
        console.print(f"{'yes' if holds else 'NO '}  {verdict}")
    console.print(f"scores {scores}\nplot   {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
