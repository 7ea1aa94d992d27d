"""The CPU kernels on processors that this machine is not: the same bits for every target, and code for arm64.

The machine's own kernels are what all other tests run. Here ranks of one exchange compile them for other processors and
keep them in one folder, like machines of different kinds that share a home folder.
"""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba.core import event
from numba.core.caching import IndexDataCacheFile
from numba.core.registry import cpu_target

from launch.bench.processors import PROCESSORS, environment_of, obstacle
from qoda_kernels import compilation
from qoda_kernels.codec import Codec
from tests.kernels.codebooks import codebook_for, context, rotated_codebook, single_slice_plan
from tests.launcher import RankPool

CODEBOOKS = (
    codebook_for("uniform", 4),
    codebook_for("minimum", 5, norm="l2"),
    codebook_for("general", 6),
    rotated_codebook("nearest", 3, 512),
)
"""Between them they use most of the vector code: searches of levels, norms, rotation, dither and its absence."""

TARGETS = [name for name in PROCESSORS if obstacle(name) is None]
END_OF_PART = "; end of part\n"
ARM64 = "aarch64-unknown-linux-gnu"
# Numba's own counting of references, as LLVM writes it for x86.
_OF_NUMBA = "llvm.x86.atomic.sub.cc.i64"


@dataclass(frozen=True)
class Report:
    """What a rank did.

    Attributes:
        target: name of the processor that it compiled for.
        messages: digest of messages and of what is decoded from them.
        means: digest of the means of an all-gather and of a reduce-scatter with the other ranks.
        files: with machine code, by name, that it wrote or read.
        compiled: number of functions that were compiled, not loaded from the disk.
    """

    target: str
    messages: str
    means: str
    files: frozenset[str]
    compiled: int


def digest_of_messages() -> str:
    """Digest of messages and of what is decoded from them."""
    digest = hashlib.sha256()
    values = torch.from_numpy(np.random.default_rng(5).standard_t(3, size=40_000).astype(np.float32))
    for codebook in CODEBOOKS:
        plan = single_slice_plan(values.numel(), codebook)
        codec = Codec(plan, {"other": codebook})
        message = codec.encode([values], context())
        (result,) = codec.decode_mean([message], [context()])
        digest.update(message.numpy().tobytes())
        digest.update(result.numpy().tobytes())
    return digest.hexdigest()


def digest_of_means() -> str:
    """Digest of the means of two exchanges with the other ranks."""
    from hvd_qoda.exchange import PendingExchanges, Stamp
    from hvd_qoda.schemes import make_exchange
    from hvd_qoda.torch_distributed import TorchTransport

    digest = hashlib.sha256()
    transport = TorchTransport(timeout_s=60.0)
    gradient = torch.from_numpy(np.random.default_rng(transport.rank).standard_t(3, size=20_000).astype(np.float32))
    books = {"other": CODEBOOKS[1]}
    plan = single_slice_plan(gradient.numel(), CODEBOOKS[1])
    for scheme in ("allgather", "reduce_scatter"):
        exchange = make_exchange(scheme, plan, books, transport, scheme)
        pending = PendingExchanges(60.0, "here")
        exchange.start([gradient], Stamp(1, 2, 0))
        pending.add(exchange)
        mean = torch.empty_like(gradient)
        pending.finish(exchange, [mean])
        assert float(mean.abs().sum()) > 0
        digest.update(mean.numpy().tobytes())
    return digest.hexdigest()


def recording(method: Callable[..., Any], files: set[str]) -> Callable[..., Any]:
    """A method of Numba's cache that notes the names of the files that it is called for."""

    def call(cache: Any, name: str, *data: Any) -> Any:
        files.add(name)
        return method(cache, name, *data)

    return call


def report() -> dict[str, Any]:
    """Code and exchange in this rank; returns the fields of a `Report`."""
    from qoda_kernels.cpu.checksums import byte_summer

    files: set[str] = set()
    for name in ("_save_data", "_load_data"):
        setattr(compilation._FilesByKey, name, recording(getattr(IndexDataCacheFile, name), files))
    with event.install_recorder("numba:compile") as recorder:
        byte_summer()  # else it is compiled within another kernel at the first start, and alone at the second
        messages, means = digest_of_messages(), digest_of_means()
    target = cpu_target.target_context.codegen().magic_tuple()[1]
    compiled = sum(each.is_start for _, each in recorder.buffer)
    return asdict(Report(target, messages, means, frozenset(files), compiled))


@pytest.fixture(scope="module")
def two_starts(tmp_path_factory: pytest.TempPathFactory) -> Sequence[list[Report]]:
    """Reports of a rank for each target: of ranks that find no compiled kernels, and of ranks started behind them."""
    folder = tmp_path_factory.mktemp("kernels")
    starts = []
    for _ in range(2):
        with RankPool(
            len(TARGETS), {"NUMBA_CACHE_DIR": str(folder)}, host="torch", of_each=[*map(environment_of, TARGETS)]
        ) as ranks:
            starts.append([Report(**fields) for fields in ranks.run(report, timeout=500.0)])
    return starts


on_x86 = pytest.mark.skipif(not TARGETS, reason="the targets are x86-64 processors")


@on_x86
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_the_same_bits_for_every_target(two_starts: Sequence[list[Report]]) -> None:
    """Many processors have no AVX-512, and some no AVX and no fused multiply-add: levels are looked up otherwise."""
    here = digest_of_messages()
    for start in two_starts:
        assert [each.target for each in start] == [PROCESSORS[name].name for name in TARGETS]
        assert {each.target: each.messages for each in start} == dict.fromkeys(TARGETS, here)
        assert len({each.means for each in start}) == 1


@on_x86
@pytest.mark.distributed
def test_each_target_loads_the_code_that_was_compiled_for_it(two_starts: Sequence[list[Report]]) -> None:
    first, second = two_starts
    assert all(each.compiled > 0 for each in first)
    assert [each.compiled for each in second] == [0] * len(TARGETS)
    # What is a part of another kernel is written, but not read.
    assert all(later.files and later.files <= earlier.files for earlier, later in zip(first, second, strict=True))
    together = set().union(*(each.files for each in first))
    assert len(together) == sum(len(each.files) for each in first) > 0


def print_code() -> None:
    """What Numba hands to LLVM for two kernels."""
    from qoda_kernels.cpu.arguments import FLOAT32
    from qoda_kernels.cpu.decoding import decoder
    from qoda_kernels.cpu.encoding import encoder

    for kernel in (encoder(5, 64, "minimum", FLOAT32, False), decoder(5, 64, FLOAT32, "loads")):
        (compiled,) = kernel.owner.overloads.values()
        print(compiled.library.get_llvm_str(), END_OF_PART)


def code_for_a_processor_like_arm64(cache: Path) -> list[str]:
    """The parts that `print_code` prints for one that has no extension but a fused multiply-add, as arm64 always has.

    Code in the cache would not be printed, so it is empty.
    """
    code = f"import runpy; runpy.run_path({__file__!r})['print_code']()"
    environment = {
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "+fma",
        "NUMBA_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split(END_OF_PART)[:-1]


@pytest.mark.skipif("haswell" not in TARGETS, reason="this processor has no fused multiply-add of x86-64")
def test_the_kernels_compile_for_arm64_to_vector_code_without_contraction(tmp_path: Path) -> None:
    """A fused multiply-add that is not meant would give other bits than the reference."""
    from llvmlite import binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(ARM64).create_target_machine(cpu="generic", opt=2)
    fused = []
    for text in code_for_a_processor_like_arm64(tmp_path):
        assert set(re.findall(r"llvm\.x86\.[\w.]+", text)) <= {_OF_NUMBA}
        # What the kernels mean to fuse is set apart, and must not be made of a product and a sum.
        text = text.replace("llvm.fma.", "fused_on_purpose_").replace(_OF_NUMBA, "numba_decrease_count")
        text = re.sub(r'target triple = ".*"', f'target triple = "{ARM64}"', text)
        text = re.sub(r'target datalayout = ".*"', f'target datalayout = "{machine.target_data}"', text)
        assembly = machine.emit_assembly(llvm.parse_assembly(text))
        fused.append("fused_on_purpose_" in assembly)
        assert not re.findall(r"\bf(?:n?m(?:add|sub)|ml[as])\b.*", assembly)
        assert len(re.findall(r"\bv\d+\.4s\b", assembly)) > 100
    assert fused == [True, False]  # searches of levels fuse, decoding does not
