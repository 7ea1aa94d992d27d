#!/usr/bin/env python3
"""Train a convolutional network on handwritten digits under Horovod, with or without compressed gradients.

  horovodrun -np 2 python launch/train/mnist.py --data data/MNIST --epochs 2 --bits 5

Without horovodrun it trains with one process, and then exchanges nothing. Records go to the run directory: steps.jsonl
(one line per step), summary.json, checkpoints. A run resumed with --resume gives the bits of one that never stopped,
if the options that decide the result are the same (else it says which differ).
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from hvd_qoda.errors import QodaError
from hvd_qoda.sinks import JsonLinesSink, WandbSink, read_steps
from hvd_qoda.telemetry import Telemetry
from launch.train.checkpoint import CheckpointError
from launch.train.data import DataError, load_dataset
from launch.train.evaluation import evaluate
from launch.train.job import STEPS_FILE, SUMMARY_FILE
from launch.train.models import parameter_count
from launch.train.options import Options, parse_options
from launch.train.progress import reporter
from launch.train.ranks import Ranks, parameters_digest, replicas_identical, share_cores, start_ranks
from launch.train.summary import layer_type_summary, traffic_summary, write_everywhere
from launch.train.training import Training, checkpoints_of, prepare, restore, train

_TRAIN_LOSS_EXAMPLES = 10_000


def make_telemetry(options: Options, ranks: Ranks) -> Telemetry:
    """Records of steps: JSON lines in the run directory, and Weights & Biases if asked for."""
    sinks: list[JsonLinesSink | WandbSink] = [JsonLinesSink(options.run_dir / STEPS_FILE)]
    if options.wandb != "disabled":
        sinks.append(WandbSink(mode=options.wandb, project=options.wandb_project, directory=options.run_dir))
    return Telemetry(sinks, rank=ranks.rank, config={**options.as_json(), "ranks": ranks.size})


def final_scores(training: Training) -> dict[str, float]:
    """Loss and accuracy at the end, equal on all ranks; a collective call: every rank must make it."""
    test = evaluate(training.model, training.dataset.test, training.ranks, "test")
    examples = training.dataset.train.first(_TRAIN_LOSS_EXAMPLES)
    fitted = evaluate(training.model, examples, training.ranks, "train")
    return {
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "train_loss": fitted.loss,
        "train_accuracy": fitted.accuracy,
    }


def summarise(training: Training, scores: dict[str, float], threads: int, started_at: int) -> dict[str, Any]:
    """The run's summary, with this rank's records; a collective call."""
    options, ranks, dataset = training.options, training.ranks, training.dataset
    identical = replicas_identical(training.model, ranks)
    summary: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "options": options.as_json(),
        "dataset": dataset.name,
        "ranks": ranks.size,
        "threads_per_rank": threads,
        "parameters": parameter_count(training.model),
        "steps": training.steps,
        "started_at_step": started_at,
        **scores,
        "replicas_identical": identical,
        "model_sha256": parameters_digest(training.model).hex(),
    }
    if ranks.is_first:
        records = read_steps(options.run_dir / STEPS_FILE)
        summary |= traffic_summary(records)
        summary["bits_per_coordinate"] = training.gradients.bits_per_coordinate(records, ranks.size)
        summary["layer_types"] = layer_type_summary(records)
    return summary


def prepare_run_dir(options: Options) -> None:
    """Make the run directory; refuse one where a new run would mix its checkpoints with an old run's."""
    options.run_dir.mkdir(parents=True, exist_ok=True)
    checkpoints = checkpoints_of(options.run_dir)
    if options.resume is None and checkpoints.is_dir() and any(checkpoints.iterdir()):
        raise CheckpointError(
            f"{checkpoints} holds checkpoints of an earlier run: go on from them with --resume {options.run_dir}, "
            "choose another --run-dir, or remove them"
        )


def run(options: Options) -> int:
    """The whole run on this rank; returns the process's exit status."""
    ranks = start_ranks()
    threads = share_cores(ranks, options.threads)
    dataset = load_dataset(options.data)
    if ranks.is_first:
        prepare_run_dir(options)
        if ranks.size == 1 and options.compression != "none":
            print("one process: nothing is exchanged, so nothing is compressed", flush=True)
    with make_telemetry(options, ranks) as telemetry:
        training = prepare(options, ranks, dataset, telemetry)
        done = restore(training, options.resume) if options.resume else 0
        with reporter("training", training.steps, done, visible=ranks.is_first) as progress:
            train(training, done, progress)
        scores = final_scores(training)
        telemetry.log(
            step=training.steps,
            test_accuracy=scores["test_accuracy"],
            test_loss=scores["test_loss"],
            train_accuracy=scores["train_accuracy"],
            train_loss=scores["train_loss"],
        )
    summary = summarise(training, scores, threads, done)
    if ranks.is_first:
        write_everywhere((options.run_dir / SUMMARY_FILE, options.json), summary)
        print(
            f"test accuracy {summary['test_accuracy']:.2%}, training loss {summary['train_loss']:.5f}, "
            f"{summary['bytes_sent_per_step']:,.0f} bytes sent per step, summary in {options.run_dir / SUMMARY_FILE}",
            flush=True,
        )
        if not summary["replicas_identical"]:
            print("the ranks hold different parameters at the end: this is an error", file=sys.stderr, flush=True)
    return 0 if summary["replicas_identical"] else 1


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(__doc__ or "", argv)
    try:
        return run(options)
    except (CheckpointError, DataError, QodaError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
