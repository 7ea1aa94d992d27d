"""How the CPU's kernels are compiled, and kept on disk where several processes may compile at the same time."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache

_LOCK = "qoda_kernels.lock"
_LOG = logging.getLogger(__name__)


def cached_kernel(function: Callable[..., Any]) -> Any:
    """`numba.njit` for this package's kernels: without the GIL, with NumPy's divisions, cached on disk.

    Numba's own cache is an index of numbered files. Two processes that add different kernels to one index at the same
    time may give both the same number; whoever looks for the one then runs the machine code of the other.
    """
    dispatcher = njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = _SharedCache(function)
    return dispatcher


def folder_of(kernel: Any) -> Path | None:
    """Folder in which a kernel of `cached_kernel` is kept, which exists; None if it is not kept."""
    folder = Path(kernel._cache.cache_path)
    return folder if folder.is_dir() else None


class _SharedCache(FunctionCache):
    """Numba's cache of a function; one process at a time writes, and nobody reads what is half written."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with _locked(Path(self.cache_path), fcntl.LOCK_SH):
            return super().load_overload(sig, target_context)

    def save_overload(self, sig: Any, data: Any) -> None:
        with _locked(Path(self.cache_path), fcntl.LOCK_EX):
            super().save_overload(sig, data)


@contextlib.contextmanager
def _locked(folder: Path, operation: int) -> Iterator[None]:
    """Hold the lock of a folder among all processes of this machine; without it where the file system has no locks."""
    with contextlib.ExitStack() as held:
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            held.callback(os.close, lock)
            fcntl.flock(lock, operation)
            # Closing is not enough: a process forked meanwhile holds the lock too.
            held.callback(fcntl.flock, lock, fcntl.LOCK_UN)
        except OSError as error:
            _report_once(folder, str(error))
        yield


@cache
def _report_once(folder: Path, reason: str) -> None:
    _LOG.info("compiled kernels in %s are kept without a lock (%s)", folder, reason)
