"""How the CPU's kernels are compiled, and kept on disk where several processes may compile at the same time."""

import contextlib
import fcntl
import hashlib
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile

_LOCK = "qoda_kernels.lock"
_NOT_KEPT = (
    "compiled kernels are not kept on disk: {}. Every process compiles them anew, some seconds for each kernel; "
    "let the environment variable NUMBA_CACHE_DIR name a folder that can be written to"
)
_DAMAGED = pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError, TypeError, KeyError
"""What reading a damaged index raises."""

_LOG = logging.getLogger(__name__)


def cached_kernel(function: Callable[..., Any]) -> Any:
    """`numba.njit` for this package's kernels: without the GIL, with NumPy's divisions, cached on disk.

    Numba's own cache is an index of numbered files. Two processes that add different kernels to one index at the same
    time may give both the same number; whoever looks for the one then runs the machine code of the other. Kernels for
    different processors share an index too. So files are named after what is in them, and one process at a time writes.
    """
    dispatcher = njit(nogil=True, error_model="numpy")(function)
    try:
        dispatcher._cache = _SharedCache(function)
    except RuntimeError:  # Numba finds no folder: common in containers
        _report_once(_NOT_KEPT.format("there is no folder that can be written to"))
    return dispatcher


def folder_of(kernel: Any) -> Path | None:
    """Folder in which a kernel of `cached_kernel` is kept; None if it is not kept."""
    path = kernel._cache.cache_path
    return None if path is None or not Path(path).is_dir() else Path(path)


class _FilesByKey(IndexDataCacheFile):
    """Numba's files of a function, whose numbers follow from signature, processor and closure, and are not counted.

    Where a file system has no locks, an entry of the index may get lost; then the kernel is compiled once more.
    """

    def save(self, key: Any, data: Any) -> None:
        """Keep compiled code under a key."""
        overloads = self._load_index()
        number = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
        overloads[key] = name = self._data_name(number)
        self._save_index(overloads)
        self._save_data(name, data)


class _SharedCache(FunctionCache):
    """Numba's cache of a function; one process at a time writes, and nobody reads what is half written."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _FilesByKey(locator.get_cache_path(), self._impl.filename_base, locator.get_source_stamp())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            with _locked(Path(self.cache_path), fcntl.LOCK_SH):
                return super().load_overload(sig, target_context)
        except Exception as error:  # a damaged file can make unpickling and Numba's rebuilding raise anything
            _LOG.debug("%s cannot be read", self._cache_file, exc_info=error)
            _report_once(f"some compiled kernels in {self.cache_path} cannot be read: compiling them anew")
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        for is_begun_anew in (False, True):
            try:
                with _locked(Path(self.cache_path), fcntl.LOCK_EX):
                    if is_begun_anew:
                        self.flush()
                    super().save_overload(sig, data)
                return
            except _DAMAGED:
                continue  # to what Numba cannot read it cannot add
            except OSError as error:
                _report_once(_NOT_KEPT.format(f"{self.cache_path} cannot be written to ({error.strerror})"))
                return
        _report_once(_NOT_KEPT.format(f"files in {self.cache_path} are damaged, also when they are written anew"))


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
            _report_once(f"compiled kernels in {folder} are kept without a lock ({error.strerror})", logging.INFO)
        yield


@cache
def _report_once(message: str, level: int = logging.WARNING) -> None:
    _LOG.log(level, "%s", message)
