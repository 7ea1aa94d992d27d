"""The processes of a run as the training loop sees them: who am I, and small exact exchanges outside the steps."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import horovod.torch as hvd
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Ranks:
    """This process's place among the run's processes."""

    rank: int
    size: int
    local_size: int

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes and prints."""
        return self.rank == 0


def start_ranks() -> Ranks:
    """Initialise Horovod; alone, without horovodrun, that gives one rank."""
    hvd.init()
    return Ranks(hvd.rank(), hvd.size(), hvd.local_size())


def share_cores(ranks: Ranks, threads: int) -> int:
    """Set torch's threads so that the ranks of this host do not want more than its cores; returns the number set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = threads or max(1, cores // ranks.local_size)
    torch.set_num_threads(chosen)
    return chosen


def gather_rows(values: Sequence[float], ranks: Ranks, name: str) -> NDArray[np.float64]:
    """Every rank's `values` (the same number on each), float64 [ranks, values], in rank order."""
    row = torch.tensor([list(values)], dtype=torch.float64)
    gathered: NDArray[np.float64] = hvd.allgather(row, name=name).numpy() if ranks.size > 1 else row.numpy()
    return gathered


def wait_for_all(ranks: Ranks, name: str) -> None:
    """Return once every rank has come here."""
    gather_rows([0.0], ranks, name)


def parameters_digest(model: nn.Module) -> bytes:
    """SHA-256 of the names and the bits of all parameters and buffers, 32 bytes."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def replicas_identical(model: nn.Module, ranks: Ranks) -> bool:
    """Whether all ranks hold the same model, bit for bit; every rank gets the same answer."""
    own = np.frombuffer(parameters_digest(model), dtype=np.uint8).astype(np.float64)
    digests = gather_rows(own.tolist(), ranks, "replicas.digest")
    return bool((digests == digests[0]).all())
