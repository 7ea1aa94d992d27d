#!/usr/bin/env python3
"""What learning the levels costs: gathering statistics, and computing levels, bits and code tables at an update.

Trains the byte Transformer of `launch/train/language_model.py` for a few steps on random text, one process, to time a
step and to have its gradients; then times what `hvd_qoda.level_updates` does with these. Printed: the share of training
time at the default schedule, over the first 2,000 steps (two updates) and over each 10,000 after that (one update).
The exchange of the statistics is not in it: its bytes per update are, to be compared with those of the gradients.
Times are processor seconds of this process, one thread by default, so other load on the machine hardly disturbs them.
"""

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from hvd_qoda.config import QodaConfig, UpdateLevels
from hvd_qoda.level_updates import LevelUpdates
from hvd_qoda.transport import LocalTransport
from launch.bench.processors import processor_and_target
from launch.train.options import HelpFormatter, positive
from launch.train.summary import write_json
from launch.train.text import VOCABULARY
from launch.train.transformer import Transformer

_CONTEXT = 64
_WAYS: dict[str, dict[str, Any]] = {
    "adaptive, per type": {},
    "adaptive, per layer": {"codebooks": "per_layer"},
    "tnq, per type": {"levels": "tnq"},
    "bits auto, per layer": {"bits": "auto", "codebooks": "per_layer"},
    "the same, rotated": {"bits": "auto", "codebooks": "per_layer", "rotation": "hadamard", "rounding": "nearest"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    logging.disable(logging.WARNING)
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = Transformer(options.width, options.layers, 4, _CONTEXT)
    step_s = _training_step(model, options.batch_size, options.steps)
    numel = sum(parameter.numel() for parameter in model.parameters())
    print(f"{numel:,} parameters, {1e3 * step_s:.1f} ms per step of training")
    rows = [{"way": way, **_update(model, QodaConfig(**keys), step_s)} for way, keys in _WAYS.items()]
    for row in rows:
        print(
            f"{row['way']:22s} {1e3 * row['gather_s']:7.2f} ms per sampled step, {1e3 * row['update_s']:7.1f} ms per "
            f"update, {row['statistics_bytes']:,} bytes; {row['share_of_first_2000']:.3%} of the first 2,000 steps, "
            f"{row['share_of_10000']:.3%} of 10,000"
        )
    if options.json is not None:
        settings = {"parameters": numel, "step_s": step_s, "threads": options.threads, "batch_size": options.batch_size}
        write_json(options.json, {"settings": {**settings, **processor_and_target()}, "rows": rows})
    return 0


def _training_step(model: torch.nn.Module, batch_size: int, steps: int) -> float:
    """Median processor seconds of forward, backward and Adam; leaves the last step's gradients in the model."""
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randint(VOCABULARY, (batch_size, _CONTEXT + 1))).backward()
        optimizer.step()

    return _median(step, steps)


def _update(model: torch.nn.Module, config: QodaConfig, step_s: float) -> dict[str, Any]:
    schedule = UpdateLevels()
    registry = config.build_registry(model)
    transport = LocalTransport()
    updates = LevelUpdates(schedule, registry)
    first = schedule.at[0]
    gradients = {name: p.grad.reshape(-1) for name, p in model.named_parameters() if p.grad is not None}
    sampled = first - 1
    updates.begin_step(sampled, registry, transport)

    def gather() -> None:
        for name, gradient in gradients.items():
            if updates.wants(sampled, registry.parameters[name].codebook):
                updates.gather(name, gradient, registry)
        updates.end_step(sampled, registry, transport)

    gather_s = _median(gather, 5)
    state = updates.state_dict()

    def update() -> None:
        updates.load_state_dict({**state, "begun": sampled})
        updates.begin_step(first, registry, transport)

    update_s = _median(update, 3)
    update()
    assert updates.take_learnt()
    statistics_bytes = sum(8 * len(array) for array in state["merged"].values())
    cost = schedule.samples * gather_s + update_s
    return {
        "gather_s": gather_s,
        "update_s": update_s,
        "statistics_bytes": statistics_bytes,
        "share_of_first_2000": len(schedule.at) * cost / (2000 * step_s),
        "share_of_10000": cost / (10_000 * step_s),
    }


def _median(action: Callable[[], None], times: int) -> float:
    action()  # compiles, and fills caches
    seconds = []
    for _ in range(times):
        begin = time.process_time()
        action()
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--width", type=positive, default=256, help="of the Transformer")
    parser.add_argument("--layers", type=positive, default=4, help="of the Transformer")
    parser.add_argument("--batch-size", type=positive, default=8, help="windows of 64 bytes in a step")
    parser.add_argument("--steps", type=positive, default=10, help="of training that are timed")
    parser.add_argument("--threads", type=positive, default=1, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0, help="of weights and text")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
