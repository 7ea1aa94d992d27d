#!/usr/bin/env python3
"""Train a convolutional network on handwritten digits with DistributedDataParallel and quantized gradients.

  torchrun --nproc-per-node 2 launch/train/ddp.py --steps 200 --bits 5

Shows the three lines that a script needs: the hook's state, the hook, and the state in the checkpoint. A run resumed
with --resume gives the bits of one that never stopped.
"""

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hvd_qoda import ddp
from launch.train.data import DIGITS, BatchSchedule, Dataset, load_dataset
from launch.train.models import DigitNet
from launch.train.options import EXCHANGES, HelpFormatter, not_negative, positive
from launch.train.summary import write_json
from launch.train.torch_processes import exit_status


def train(options: argparse.Namespace, dataset: Dataset) -> dict[str, Any]:
    """Train, and return what the run came to; the same on every rank but for the times."""
    torch.manual_seed(options.seed)
    model = DistributedDataParallel(DigitNet())
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    state = None
    if options.compression == "qoda":
        state = ddp.QodaState(model, bits=options.bits, exchange=options.exchange, seed=options.seed)
        model.register_comm_hook(state, ddp.comm_hook)
    done = 0
    if options.resume is not None:
        saved = torch.load(options.resume, weights_only=True)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["steps"]
        if state is not None:
            state.load_state_dict(saved["hook"])
    rank, size = dist.get_rank(), dist.get_world_size()
    schedule = BatchSchedule(len(dataset.train), options.batch_size, rank, size, options.seed)
    losses, seconds = [], []
    for step in range(done, options.steps):
        begin = time.perf_counter()
        batch = dataset.train.select(schedule.indices(step))
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(batch.images), batch.labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - begin)
    if options.save is not None and rank == 0:
        kept = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "steps": options.steps}
        torch.save({**kept, "hook": None if state is None else state.state_dict()}, options.save)
    bits = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    digests: list[Any] = [None] * size
    dist.all_gather_object(digests, hashlib.sha256(bits).hexdigest())
    with torch.no_grad():
        right = (model.module(dataset.test.images).argmax(dim=1) == dataset.test.labels).float().mean()
    return {
        "ranks": size,
        "steps": options.steps,
        "test_accuracy": float(right),
        "last_loss": losses[-1] if losses else None,
        "bytes_sent_per_step": None if state is None else state.traffic.sent_bytes / max(1, len(losses)),
        "step_ms": 1000 * statistics.median(seconds) if seconds else None,
        "replicas_identical": len(set(digests)) == 1,
        "model_sha256": digests[0],
    }


def run(options: argparse.Namespace) -> int:
    """The whole run on this rank; returns the process's exit status."""
    summary = train(options, load_dataset(options.data))
    if dist.get_rank() == 0:
        for key, value in summary.items():
            print(f"{key}: {value}")
        if options.json is not None:
            write_json(options.json, {"command": "torchrun " + " ".join(sys.argv), **summary})
    return 0 if summary["replicas_identical"] else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", default=DIGITS, help="folder with MNIST's four files, or 'digits' (scikit-learn's)")
    parser.add_argument("--steps", type=positive, default=200, help="optimizer steps")
    parser.add_argument("--batch-size", type=positive, default=32, help="examples per rank and step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--compression", choices=("none", "qoda"), default="qoda", help="none: DDP's own all-reduce")
    parser.add_argument("--bits", type=int, default=5, help="width of a code, 2 to 8; 32: not quantized")
    parser.add_argument("--exchange", choices=EXCHANGES, default="auto", help="how the messages travel")
    parser.add_argument("--save", type=Path, metavar="PATH", help="write a checkpoint here at the end")
    parser.add_argument("--resume", type=Path, metavar="PATH", help="go on from this checkpoint")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the summary to this file")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the weights, the batches and the rounding")
    options = parser.parse_args(arguments)
    if not dist.is_torchelastic_launched():
        print("ddp.py: run it under torchrun: torchrun --nproc-per-node 2 launch/train/ddp.py", file=sys.stderr)
        return 2
    dist.init_process_group("gloo")
    return exit_status(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
