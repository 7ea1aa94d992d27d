"""The host's side of a launch, without a GPU: Numba compiles, links and loads a kernel with a driver that writes down
what is launched (`recording_driver.cpp`).

It shows that the installed numba-cuda and cuda-bindings still work as `cuda_launch.py` uses them, that arguments arrive
where the kernel reads them, and that launches need no current context and leave the thread's as it was.
"""

import ctypes
import gc
import os
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (extra [cuda])")

ROOT = Path(__file__).resolve().parents[2]


def test_a_launch_arrives_at_the_driver(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    source = Path(__file__).with_name("recording_driver.cpp")
    build = [compiler, "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(source), "-ldl"]
    subprocess.run(build, check=True, timeout=120)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr


def launch_and_look() -> None:
    """In a process of its own, whose driver is the recording one."""
    from cuda.bindings import driver

    from qoda_kernels.cuda_launch import cuda_kernel
    from qoda_kernels.errors import KernelError

    recorder = ctypes.CDLL("libcuda.so.1")
    recorder.last_launch.restype = ctypes.c_char_p
    arguments = (2**63 + 1, 2, 2**32 - 1, 4, 0, 6, 0.1, 8)
    words = [*arguments[:6], struct.unpack("<I", struct.pack("<f", 0.1))[0], arguments[7]]

    def check(index: int) -> None:
        cuda_kernel("decode_mean", index).launch(300 + index, 64, 4096, arguments)
        name, *found = recorder.last_launch().decode().split()
        assert "decode_mean" in name
        assert found[:10] == f"device {index} grid {300 + index} block 256 shared 64 stream 4096".split()
        assert [int(word) for word in found[10:]] == words

    def context() -> int:
        return int(driver.cuCtxGetCurrent()[1])

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: cuda_kernel("decode_mean", 0), range(2))
    assert first is second
    gc.collect()  # Numba must not unload it
    check(0)
    assert context() == 0  # a thread that had no context has none afterwards
    with ThreadPoolExecutor(1) as thread:
        thread.submit(check, 0).result()
    other = driver.cuDevicePrimaryCtxRetain(1)[1]
    driver.cuCtxSetCurrent(other)
    check(0)
    check(1)
    assert cuda_kernel("decode_mean", 0) is not cuda_kernel("decode_mean", 1)
    with pytest.raises(KernelError, match="refused the kernel decode_mean: CUDA_ERROR"):
        cuda_kernel("decode_mean", 0).launch(1, 10**6, 0, arguments)
    assert context() == int(other)


if __name__ == "__main__":
    launch_and_look()
