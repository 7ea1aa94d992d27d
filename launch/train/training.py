"""The training loop: an ordinary Horovod loop, with records, checkpoints and an exact resume."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from hvd_qoda.telemetry import Telemetry
from launch.train.checkpoint import CheckpointError, check_same_run, load_checkpoint, save_checkpoint
from launch.train.data import BatchSchedule, Dataset
from launch.train.gradients import GradientPath, gradient_path
from launch.train.models import DigitNet, width_of
from launch.train.optimizers import build_optimizer, step_sizes
from launch.train.options import Options
from launch.train.progress import Reporter
from launch.train.ranks import Ranks


@dataclass(frozen=True)
class Training:
    """Everything that takes part in a run. Build it with `prepare`."""

    options: Options
    ranks: Ranks
    dataset: Dataset
    batches: BatchSchedule
    steps: int
    model: nn.Module
    gradients: GradientPath
    optimizer: torch.optim.Optimizer
    telemetry: Telemetry


def prepare(options: Options, ranks: Ranks, dataset: Dataset, telemetry: Telemetry) -> Training:
    """Build model, compression and optimizer, equal on all ranks.

    Raises DataError where the batches do not fit the data, and what the compression raises for options it refuses.
    """
    batches = BatchSchedule(len(dataset.train), options.batch_size, ranks.rank, ranks.size, options.seed)
    steps = options.steps or max(1, math.ceil((options.epochs or 1.0) * batches.steps_per_epoch))
    torch.manual_seed(options.seed)
    model = DigitNet(width_of(options.model_size))
    gradients = gradient_path(options, model, build_optimizer(options, model), telemetry)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    # From here on the ranks' random numbers differ, as a model with dropout would need.
    torch.manual_seed(options.seed * ranks.size + ranks.rank + 1)
    return Training(options, ranks, dataset, batches, steps, model, gradients, gradients.optimizer, telemetry)


def train(training: Training, done: int, reporter: Reporter) -> None:
    """Do the steps after the first `done` ones, one record each, and the checkpoints that fall between."""
    every = training.options.checkpoint_every
    for step in range(done + 1, training.steps + 1):
        loss = one_step(training, step)
        reporter.show(step, loss)
        if every and (step % every == 0 or step == training.steps):
            save(training, step)


def one_step(training: Training, step: int) -> float:
    """Step number `step`, from 1: forward, backward, exchange, update; returns this rank's loss before it, in nats."""
    batch = training.dataset.train.select(training.batches.indices(step - 1))
    sent = training.gradients.sent_bytes()
    began = time.perf_counter()
    training.optimizer.zero_grad()
    loss = nn.functional.cross_entropy(training.model(batch.images), batch.labels)
    loss.backward()
    training.optimizer.step()
    milliseconds = (time.perf_counter() - began) * 1e3
    value = float(loss.detach())
    training.telemetry.log(
        step=step,
        step_sizes=step_sizes(training.optimizer),
        loss=value,
        step_ms=milliseconds,
        bytes_sent=training.gradients.sent_bytes() - sent,
    )
    return value


def checkpoints_of(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def save(training: Training, step: int) -> Path:
    """Write a checkpoint from which `restore` goes on after `step` steps."""
    shared: dict[str, Any] = {
        "options": training.options.decides_result(),
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
    }
    own: dict[str, Any] = {
        "gradients": training.gradients.state_dict(),
        "telemetry": training.telemetry.state_dict(),
        "random": torch.get_rng_state(),
    }
    return save_checkpoint(checkpoints_of(training.options.run_dir), step, training.ranks, shared, own)


def restore(training: Training, path: Path) -> int:
    """Load the checkpoint at `path`; returns the number of steps done.

    Raises CheckpointError where it is missing, of a run with other options, or leaves no step to do.
    """
    shared, own = load_checkpoint(path, training.ranks)
    check_same_run(shared["options"], training.options.decides_result())
    if shared["step"] >= training.steps:
        raise CheckpointError(
            f"the checkpoint was written after {shared['step']} steps and {training.steps} are asked for: none is left"
        )
    training.model.load_state_dict(shared["model"])
    training.optimizer.load_state_dict(shared["optimizer"])
    training.gradients.load_state_dict(own["gradients"])
    training.telemetry.load_state_dict(own["telemetry"])
    torch.set_rng_state(own["random"])
    return int(shared["step"])
