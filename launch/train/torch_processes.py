"""The processes of a run over torch.distributed: how they share the cores of a machine, and how they end."""

import os
import sys
import time
from collections.abc import Callable

import torch

from hvd_qoda.errors import QodaError
from launch.train.data import DataError

_SECONDS_TO_LET_GO = 0.2


def prepare_processes(threads: int) -> None:
    """Share the cores out; on a machine without accelerator keep DeepSpeed from compiling collectives of its own.

    Args:
        threads: of torch, per process; 0 for an equal share of the machine's cores.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
    os.environ.setdefault("LOCAL_SIZE", local)  # how many devices DeepSpeed's CPU accelerator has
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // int(local)))
    if not torch.cuda.is_available():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def exit_status(run: Callable[[], int]) -> int:
    """Run a program's part in this process to its end, and leave torch.distributed.

    Args:
        run: the part; returns the process's exit status.

    Returns:
        What it returned; 2 after an error of ours, which is printed.
    """
    try:
        return run()
    except (DataError, QodaError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        end_processes()


def end_processes() -> None:
    """Leave torch.distributed, so that this process can end at once; the last call of a program.

    A thread of Gloo's drops the tensors of a collective some time after the collective is done, and needs the
    interpreter for that. If the interpreter ends meanwhile, PyTorch (2.13) aborts the process: "terminate called
    without an active exception" (pull request 179291 of pytorch/pytorch). Asleep, this thread leaves it to Gloo's.
    """
    if not torch.distributed.is_initialized():
        return
    torch.distributed.destroy_process_group()
    time.sleep(_SECONDS_TO_LET_GO)
