"""The ranks that `faults.py` starts: each trains a small model by one front end, until a fault ends it if there is one.

All of a program stands in functions, as in most tutorials, so that model and optimizer die with their locals.

Started as a program this is a nursery: it imports what the front ends need once, and forks a process for every rank
that it is told to start, because imports take longer than a run. A rank ends as any Python program does, by leaving its
main function or with the exception that reached it.

On signals, which `faults.py` sends: SIGUSR1 raises `InjectedError` in the main thread; SIGUSR2 shuts down all TCP
connections of the process; SIGQUIT writes the stacks of all threads.
"""

import datetime
import faulthandler
import itertools
import json
import os
import random
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.wire import MessageContext

DDP = "DDP hook"
STOCK = "stock Horovod"
OVERLAPPING = "overlapping Horovod optimizer"
ZERO = {f"DeepSpeed ZeRO {stage}": stage for stage in range(4)}
FRONTS = (STOCK, OVERLAPPING, DDP, *ZERO)

ENDED = "ended"  # a line of the nursery: this word, then the number of a process and its exit status
STARTED = "started"  # likewise: a process has been started
SAVE_EVERY = 4
_POLL_S = 0.01


class InjectedError(Exception):
    """The exception that a rank is made to raise."""


@dataclass(frozen=True)
class RankOrder:
    """What one rank does.

    Attributes:
        front: one of `FRONTS`.
        folder: where it leaves its marks, shared by the ranks of a run.
        rank: its number.
        ranks: how many there are.
        seed: of what differs from run to run: exchange, model, and when levels change.
        timeout_s: of our exchanges.
        steps: after which it ends in good order; 0 to train until a fault.
        environment: variables that the host's launcher would set.
    """

    front: str
    folder: str
    rank: int
    ranks: int
    seed: int
    timeout_s: float
    steps: int
    environment: dict[str, str]

    @property
    def numbers(self) -> Iterable[int]:
        """Of the steps."""
        return range(1, self.steps + 1) if self.steps else itertools.count(1)

    def mark(self, name: str, text: str = "") -> None:
        """Leave a file that is complete or absent."""
        path = Path(self.folder, f"rank-{self.rank}.{name}")
        partial = path.with_suffix(".partial")
        partial.write_text(text)
        partial.rename(path)

    def qoda(self) -> dict[str, Any]:
        """Keys of our configuration, drawn by the seed."""
        draw = random.Random(self.seed)
        return {
            "exchange": draw.choice(["allgather", "reduce_scatter", "by_bytes"]),
            "update_levels": {"at": [2, 3], "every": draw.choice([2, 5])},
            "error_feedback": draw.random() < 0.3,
            "fusion_buffer_mb": 0.1,
            "timeout_s": self.timeout_s,
        }


class Net(nn.Module):
    """Linear layers, with buffers that the host broadcasts; as many kinds of waits as a model has."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(64, 128)]
        for _ in range(3):
            layers += [nn.BatchNorm1d(128) if norm else nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 128)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.layers(x).square().mean()
        return loss


def run_rank(order: RankOrder) -> None:
    """Train until a fault or to the end; leaves `ready` before the first step and `error` with whatever ends it.

    Raises:
        Exception: whatever ends the training.
    """
    os.environ.update(order.environment)
    try:
        _prepare_for_faults()
        if order.front == DDP:
            _train_ddp(order)
        elif order.front in ZERO:
            _train_deepspeed(order, ZERO[order.front])
        else:
            _train_horovod(order)
    except Exception as error:
        order.mark("error", json.dumps({"type": type(error).__name__, "text": str(error)[:2000]}))
        raise


def _train_ddp(order: RankOrder) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from hvd_qoda import ddp

    # DDP's own collectives, of buffers for example, have the deadline of its group.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=order.timeout_s))
    draw = random.Random(order.seed + 1)
    unused = draw.random() < 0.3
    models = []
    for number in range(2 if draw.random() < 0.2 else 1):
        model = DistributedDataParallel(Net(norm=draw.random() < 0.5), find_unused_parameters=unused)
        state = ddp.QodaState(model, name=str(number), **order.qoda())
        model.register_comm_hook(state, ddp.comm_hook)
        models.append((model, state, torch.optim.SGD(model.parameters(), 0.01)))
    order.mark("ready")
    for step in order.numbers:
        for model, state, optimizer in models:
            _step(model, optimizer, order, step)
            if step % SAVE_EVERY == 0 and order.rank == 0 and not order.qoda()["error_feedback"]:
                _save(order, {"model": model.state_dict(), "qoda": state.state_dict()})
    dist.destroy_process_group()


def _train_horovod(order: RankOrder) -> None:
    import horovod.torch as hvd

    import hvd_qoda

    hvd.init()
    model = Net(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    compression = hvd_qoda.Compression.qoda(model, **order.qoda())
    make = hvd.DistributedOptimizer if order.front == STOCK else hvd_qoda.DistributedOptimizer
    wrapped: Any = make(optimizer, named_parameters=model.named_parameters(), compression=compression)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    order.mark("ready")
    for step in order.numbers:
        _step(model, wrapped, order, step)
        if step % SAVE_EVERY == 0 and order.rank == 0 and not order.qoda()["error_feedback"]:
            _save(order, {"model": model.state_dict(), "qoda": compression.state_dict()})


def _train_deepspeed(order: RankOrder, stage: int) -> None:
    import deepspeed

    import ds_plugin  # noqa: F401  # installs itself

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    qoda = {key: value for key, value in order.qoda().items() if key != "fusion_buffer_mb"}
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100, "reduce_bucket_size": 30000},
        "qoda": qoda,
    }
    deepspeed.init_distributed("gloo", timeout=datetime.timedelta(seconds=order.timeout_s), verbose=False)
    model = Net(norm=False)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    order.mark("ready")
    for step in order.numbers:
        engine.backward(engine(_batch(order, step)))
        engine.step()
        if step % SAVE_EVERY == 0:
            engine.save_checkpoint(str(Path(order.folder, "checkpoints")), tag=f"step-{step}")
    if order.seed % 2:  # programs do the one or the other
        torch.distributed.destroy_process_group()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, order: RankOrder, step: int) -> None:
    optimizer.zero_grad()
    model(_batch(order, step)).backward()
    optimizer.step()


def _batch(order: RankOrder, step: int) -> torch.Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(1000 * step + order.rank))


def _save(order: RankOrder, state: dict[str, Any]) -> None:
    """As a careful program does: written beside, then renamed."""
    path = Path(order.folder, "checkpoint.pt")
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.rename(path)


# -- faults within a rank ----------------------------------------------------------------------------------------------


def _prepare_for_faults() -> None:
    faulthandler.register(signal.SIGQUIT, all_threads=True)

    def raise_error(_signal: int, _frame: FrameType | None) -> None:
        raise InjectedError("an exception of the program's own")

    signal.signal(signal.SIGUSR1, raise_error)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # in the threads to come, too

    def lose_connections() -> None:
        signal.sigwait({signal.SIGUSR2})
        shut_down_connections()

    # A thread, because the main thread may be where no signal handler runs.
    threading.Thread(target=lose_connections, daemon=True).start()


def shut_down_connections() -> None:
    """Shut down every TCP connection of this process, as a network that fails does."""
    for name in os.listdir("/proc/self/fd"):
        try:
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # no socket
            continue
        with connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                try:
                    if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        continue
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:  # it is shut down already
                    continue


# -- the nursery -------------------------------------------------------------------------------------------------------


def serve(front: str) -> Callable[[], None] | None:
    """Start ranks as standard input says, a line of JSON each, and tell on standard output how they end.

    Args:
        front: whose modules are to be imported.

    Returns:
        In a forked process what it is to do now; None in the nursery, after the end of its input.
    """
    _import_for(front)
    print(json.dumps(["imported"]), flush=True)
    living: set[int] = set()
    lines = b""
    open_input = True
    while open_input or living:
        if open_input and select.select([0], [], [], _POLL_S)[0]:
            more = os.read(0, 2**16)
            open_input = bool(more)
            *orders, lines = (lines + more).split(b"\n")
            for text in orders:
                order = RankOrder(**json.loads(text))
                child = os.fork()
                if child == 0:
                    return _become(order)
                living.add(child)
                print(json.dumps([STARTED, order.folder, order.rank, child]), flush=True)
        elif not open_input:
            time.sleep(_POLL_S)
        for child in list(living):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                living.remove(child)
                print(json.dumps([ENDED, child, os.waitstatus_to_exitcode(status)]), flush=True)
    return None


def _become(order: RankOrder) -> Callable[[], None]:
    """Make a forked process a rank's."""
    log = os.open(Path(order.folder, f"rank-{order.rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    return lambda: run_rank(order)


def order_line(order: RankOrder) -> bytes:
    """What tells a nursery to start this rank."""
    return json.dumps(asdict(order)).encode() + b"\n"


def _import_for(front: str) -> None:
    """Everything that takes time and starts no thread: modules, and the kernels of this machine."""
    torch.set_num_threads(1)
    if front == DDP:
        import hvd_qoda.ddp
    elif front in ZERO:
        import deepspeed  # noqa: F401

        import ds_plugin  # noqa: F401
    else:
        import horovod.torch  # noqa: F401

        import hvd_qoda  # noqa: F401
    gradient = torch.ones(1000)
    books = {"gradient": Codebook(5, tuple(j / 15 for j in range(16)))}
    plan = MessagePlan.build([Slice("g", 0, 1000, gradient.dtype, "gradient", 0)], books)
    codec = Codec(plan, books)
    context = MessageContext(0, 0, 0, 0, 0, 0, 0)
    codec.decode_mean([codec.encode([gradient], context)], [context])


if __name__ == "__main__":
    rank_program = serve(sys.argv[1])
    if rank_program is not None:
        rank_program()
