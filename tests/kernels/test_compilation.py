"""When kernels are compiled: at the first use, once, with a line in the log; never by an import."""

import ast
import fcntl
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numba import types
from numba.core.caching import IndexDataCacheFile

import qoda_kernels
from qoda_kernels import compilation
from qoda_kernels.compiled_sources import digest_of
from qoda_kernels.cpu.arguments import FLOAT32
from qoda_kernels.cpu.checksums import byte_summer
from qoda_kernels.cpu.compilation import DIGEST, compile_kernel
from qoda_kernels.cpu.decoding import decoder
from qoda_kernels.cpu.encoding import encoder
from qoda_kernels.cpu.norms import max_magnitude

KERNELS = Path(qoda_kernels.__file__).parent
ON_THE_HOST = "RoundingTable", "fraction_bits", "inverse_root"  # what makes tables, and numbers in a kernel's closure
SOURCE = """
from numba import njit

@njit(cache=True)
def double(x):
    return x + x
"""


def imported(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_log_says_when_a_kernel_is_compiled_and_not_when_it_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kernel.py"
    path.write_text(SOURCE)
    signature = types.int64(types.int64)
    with caplog.at_level(logging.INFO, logger="qoda_kernels"):
        assert compile_kernel(imported(path, "kernel").double, signature, "doubles").owner(21) == 42
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "compiling the CPU kernel that doubles; once on this machine, some seconds"
    assert lines[1].startswith("the CPU kernel that doubles is ready after ")
    assert len(lines) == 2
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="qoda_kernels"):
        assert compile_kernel(imported(path, "kernel").double, signature, "doubles").owner(21) == 42  # from the disk
    assert not caplog.records


def test_kernels_are_kept_for_the_process() -> None:
    assert encoder(4, 32, "uniform", FLOAT32, False) is encoder(4, 32, "uniform", FLOAT32, False)
    assert decoder(4, 32, FLOAT32, "loads") is decoder(4, 32, FLOAT32, "loads")


def test_an_import_compiles_nothing_and_leaves_out_what_is_slow_to_load() -> None:
    """Numba's events tell of every compilation; the CUDA target and the hosts are not loaded."""
    program = """
import sys
from numba.core import event

with event.install_recorder("numba:compile") as recorder:
    import hvd_qoda
    import qoda_kernels.codec
assert not recorder.buffer, recorder.buffer
slow = {"numba.cuda", "horovod", "deepspeed", "wandb", "transformers"} & set(sys.modules)
assert not slow, slow
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_digest_tells_of_every_source_and_of_every_constant(tmp_path: Path) -> None:
    module = ModuleType("module")
    module.__file__ = str(tmp_path / "module.py")
    constants = ModuleType("constants")
    (tmp_path / "folder").mkdir()
    digests = set()
    for name, text in (("module.py", "a"), ("module.py", "b"), ("folder/one.py", "a"), ("folder/two.py", "a")):
        (tmp_path / name).write_text(text)
        digests.add(digest_of(tmp_path / "folder", [module], [constants]))
    for value in (1, np.uint32(1), np.uint32(2)):
        constants.ANSWER = value  # type: ignore[attr-defined]
        digests.add(digest_of(tmp_path / "folder", [module], [constants]))
    assert len(digests) == 7
    constants.function = print  # type: ignore[attr-defined]
    (tmp_path / "folder" / "text.md").write_text("a")
    assert digest_of(tmp_path / "folder", [module], [constants]) in digests


def test_kernels_are_kept_in_files_that_bear_their_digest() -> None:
    """Numba itself goes by the time stamp of the file in which a kernel is written, and by nothing else."""
    kernels = encoder(4, 32, "uniform", FLOAT32, False).owner, byte_summer().owner, max_magnitude
    for kernel, name in zip(kernels, ("encode", "sum_bytes", "max_magnitude"), strict=True):
        assert f".{name}_{DIGEST}-" in kernel._cache._cache_file._index_name


def test_cuda_kernels_are_kept_in_files_that_bear_their_digest() -> None:
    """Numba itself goes by the time stamp of the file in which a kernel is written, and by nothing else."""
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (extra [cuda])")
    from numba.cuda.dispatcher import CUDACache

    from qoda_kernels.cuda import SIGNATURES
    from qoda_kernels.cuda.compilation import DIGEST as DIGEST_OF_CUDA

    for name, (function, _) in SIGNATURES.items():
        assert f".{name}_{DIGEST_OF_CUDA}-" in CUDACache(function)._cache_file._index_name


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_kernels_take_from_elsewhere_only_what_their_digest_tells_of(target: str) -> None:
    """Code of their folder and of `word32`, and the constants of `kernel_constants` and `records`."""
    wrong = [
        f"{path.name}: {node.module}.{alias.name}"
        for path in (KERNELS / target).glob("*.py")
        if path.name not in ("records.py", "compilation.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("qoda_kernels")
        if not str(node.module).startswith((f"qoda_kernels.{target}", "qoda_kernels.kernel_constants"))
        for alias in node.names
        if alias.name not in ("word32", "kernel_constants", *ON_THE_HOST)
    ]
    assert wrong == []


def test_other_processes_neither_write_nor_read_kernels_that_are_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that write at the same time would keep one kernel under the other's name."""
    path = tmp_path / "kernel.py"
    decorator = "from qoda_kernels.compilation import cached_kernel"
    path.write_text(SOURCE.replace("from numba import njit", decorator).replace("njit(cache=True)", "cached_kernel"))
    seen: list[tuple[str, bool, bool]] = []

    def may_lock(folder: str, operation: int) -> bool:
        with (Path(folder) / "qoda_kernels.lock").open("r+") as lock:  # another open file, so like another process
            try:
                fcntl.flock(lock, operation | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def watched(kind: type, name: str) -> Callable[..., Any]:
        method = getattr(kind, name)

        def call(file: Any, *args: object) -> Any:
            folder = file._cache_path
            seen.append((name, may_lock(folder, fcntl.LOCK_SH), may_lock(folder, fcntl.LOCK_EX)))
            return method(file, *args)

        return call

    for kind, name in ((compilation._FilesByKey, "save"), (IndexDataCacheFile, "load")):
        monkeypatch.setattr(kind, name, watched(kind, name))
    for _ in range(2):
        double = imported(path, "kernel").double
        double.compile(types.int64(types.int64))
        assert double(21) == 42
    assert seen == [("load", True, False), ("save", False, False), ("load", True, False)]


def test_without_locks_kernels_are_kept_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.INFO, logger="qoda_kernels"), compilation._locked(tmp_path, fcntl.LOCK_EX):
        assert "without a lock" in caplog.text


ENCODES = """
import logging
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
import torch
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.wire import MessageContext

books = {"all": Codebook.uniform(4)}
codec = Codec(MessagePlan.build([Slice("w", 0, 700, torch.float32, "all", 0)], books), books)
where = MessageContext(0, 0, 0, 0, 0, 0, 0)
message = codec.encode([torch.ones(700)], where)
assert (codec.decode_mean([message], [where])[0] == 1).all()
"""
NOWHERE = """
from numba.core.caching import FunctionCache
FunctionCache._impl_class._locator_classes = []
"""
DISK_IS_FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
"""


def encoded_with(begin: str, cache: Path) -> list[str]:
    """What a process that encodes with a cache folder of its own says, after some lines of its own."""
    ran = subprocess.run(
        [sys.executable, "-c", begin + ENCODES],
        env=os.environ
        | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stderr.splitlines()


@pytest.mark.parametrize("begin", [NOWHERE, DISK_IS_FULL], ids=["no folder", "full disk"])
def test_without_a_place_for_compiled_kernels_a_line_says_so(tmp_path: Path, begin: str) -> None:
    lines = encoded_with(begin, tmp_path)
    assert 1 <= len(lines) <= 2  # kernels lie in two folders
    for line in lines:
        assert line.startswith("WARNING compiled kernels are not kept on disk")
        assert "NUMBA_CACHE_DIR" in line


def test_damaged_files_of_compiled_kernels_are_replaced(tmp_path: Path) -> None:
    assert encoded_with("", tmp_path) == []
    for number, file in enumerate(path for path in sorted(tmp_path.rglob("*.nb?")) if path.is_file()):
        content = file.read_bytes()
        file.write_bytes([b"", content[: len(content) // 2], b"\x80\x05damaged."][number % 3])
    lines = encoded_with("", tmp_path)
    assert 1 <= len(lines) <= 2
    assert all("cannot be read" in line for line in lines)
    assert encoded_with("", tmp_path) == []


def test_without_locks_nobody_gets_code_that_was_compiled_for_another_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find an empty index, and write at the same time: one entry is lost, neither is wrong."""
    files = {name: compilation._FilesByKey(str(tmp_path), "kernel", "stamp") for name in ("znver3", "generic")}
    keys = {name: ((types.int64,), ("x86_64-unknown-linux-gnu", name, ""), ("code", "closure")) for name in files}
    for name, file in files.items():
        monkeypatch.setattr(file, "_load_index", dict)
        file.save(keys[name], f"code for {name}")
    monkeypatch.undo()
    assert [file.load(keys[name]) for name, file in files.items()] == [None, "code for generic"]
    files["znver3"].save(keys["znver3"], "code for znver3")
    assert [file.load(keys[name]) for name, file in files.items()] == ["code for znver3", "code for generic"]
    files["znver3"].save(keys["znver3"], "code for znver3")  # the same file once more
    assert len(list(tmp_path.glob("*.nbc"))) == 2
