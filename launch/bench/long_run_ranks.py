"""What one rank of `long_run.py` does: train a small model for very many steps, and watch its own process."""

import gc
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import nn

ROW = "ROW "
STOCK = "stock Horovod"
OVERLAPPING = "overlapping Horovod optimizer"
DDP = "DDP hook"
DEEPSPEED = "DeepSpeed ZeRO 2"
FRONTS = (STOCK, OVERLAPPING, DDP, DEEPSPEED)
BITS = 4
# Levels change in the warm-up; then every step is the same.
LEVELS = {"at": [3, 10], "every": None}
Step = Callable[[torch.Tensor], None]
Gather = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class Usage:
    """What a process holds."""

    memory_bytes: int
    descriptors: int
    threads: int

    @classmethod
    def now(cls) -> "Usage":
        """Resident memory, open files and threads of this process."""
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return cls(resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 8))


def _loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(x).square().mean()
    return loss


def _horovod(front: str) -> tuple[nn.Module, Step, Gather]:
    import horovod.torch as hvd

    import hvd_qoda

    hvd.init()
    model = _model()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    compression = hvd_qoda.Compression.qoda(model, bits=BITS, update_levels=LEVELS)
    make = hvd.DistributedOptimizer if front == STOCK else hvd_qoda.DistributedOptimizer
    optimizer = make(sgd, named_parameters=model.named_parameters(), compression=compression)

    def step(x: torch.Tensor) -> None:
        optimizer.zero_grad()
        _loss(model, x).backward()
        optimizer.step()

    return model, step, lambda value: list(hvd.allgather_object(value))


def _gather(value: Any) -> list[Any]:
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def _ddp() -> tuple[nn.Module, Step, Gather]:
    from torch.nn.parallel import DistributedDataParallel

    from hvd_qoda import ddp

    torch.distributed.init_process_group("gloo")
    model = DistributedDataParallel(_model())
    state = ddp.QodaState(model, bits=BITS, update_levels=LEVELS)
    model.register_comm_hook(state, ddp.comm_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(x: torch.Tensor) -> None:
        optimizer.zero_grad()
        _loss(model, x).backward()
        optimizer.step()

    return model, step, _gather


def _deepspeed() -> tuple[nn.Module, Step, Gather]:
    from launch.train.torch_processes import prepare_processes

    prepare_processes(1)
    import deepspeed

    import ds_plugin  # noqa: F401  # hooks itself into DeepSpeed

    torch.distributed.init_process_group("gloo")
    configuration = {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "qoda": {"bits": BITS, "update_levels": LEVELS},
    }
    model = _model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=configuration)

    def step(x: torch.Tensor) -> None:
        engine.backward(_loss(engine, x))
        engine.step()

    return model, step, _gather


def _digest(model: nn.Module) -> str:
    data = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    return hashlib.sha256(data).hexdigest()


def main(arguments: Sequence[str]) -> int:
    """`long_run_ranks.py FRONT EXCHANGES WARM_UP SECONDS SEED`: at most so many steps, in at most so many seconds."""
    front, (exchanges, warm_up, seconds, seed) = arguments[0], map(int, arguments[1:5])
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, step, gather = {DDP: _ddp, DEEPSPEED: _deepspeed}.get(front, lambda: _horovod(front))()
    generator = torch.Generator().manual_seed(seed)
    rank = int(os.environ.get("RANK", os.environ.get("HOROVOD_RANK", "0")))
    x = torch.randn(4, 24, generator=generator) + rank
    for _ in range(warm_up):
        step(x)
    gather(0.0)  # what the first one needs does not count
    before, begin, done = Usage.now(), time.perf_counter(), 0
    while done < exchanges:
        for _ in range(min(500, exchanges - done)):
            step(x)
        done += min(500, exchanges - done)
        if done < exchanges and max(gather(time.perf_counter() - begin)) > seconds:
            break
    elapsed, after = time.perf_counter() - begin, Usage.now()
    usages = gather(
        (
            after.memory_bytes - before.memory_bytes,
            after.descriptors - before.descriptors,
            after.threads - before.threads,
        )
    )
    digests = gather(_digest(model))
    if rank == 0:
        memory, descriptors, threads = (max(column) for column in zip(*usages, strict=True))
        row = {
            "front": front,
            "exchanges": done + warm_up,
            "memory_growth_bytes": memory,
            "descriptors_growth": descriptors,
            "threads_growth": threads,
            "ranks_identical": len(set(digests)) == 1,
            "warm_up": warm_up,
            "seconds": elapsed,
        }
        print(ROW + json.dumps(row), flush=True)
    if torch.distributed.is_initialized():
        from launch.train.torch_processes import end_processes

        end_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
