"""Processors that the CPU kernels can be compiled for on this machine, by the variables that Numba reads."""

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llvmlite import binding as llvm

from qoda_kernels.cpu.target import target

NATIVE = "native"


@dataclass(frozen=True)
class Processor:
    """What to compile for.

    Attributes:
        name: as LLVM calls it.
        features: that the kernels look for, as LLVM calls them.
        stands_for: which machines have it.
    """

    name: str
    features: tuple[str, ...]
    stands_for: str


PROCESSORS: Mapping[str, Processor] = {
    "znver3": Processor("znver3", ("avx", "avx2", "fma", "bmi", "bmi2", "f16c"), "AMD Zen 3: AVX2, no AVX-512"),
    "haswell": Processor(
        "haswell", ("avx", "avx2", "fma", "bmi", "bmi2", "f16c"), "Intel from 2013 on, before AVX-512"
    ),
    "x86-64-v2": Processor(
        "x86-64-v2", ("sse3", "ssse3", "sse4.1", "sse4.2", "popcnt"), "what many virtual machines show"
    ),
    "generic": Processor("generic", (), "every x86-64 processor"),
}


def environment_of(name: str) -> dict[str, str]:
    """The variables that make Numba compile for a target of PROCESSORS; none for NATIVE.

    Both are needed: without features Numba takes those of this machine, whatever the name, and the kernels go by them.
    """
    if name == NATIVE:
        return {}
    processor = PROCESSORS[name]
    return {
        "NUMBA_CPU_NAME": processor.name,
        "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in processor.features),
    }


def obstacle(name: str) -> str | None:
    """Why code for a target cannot run here, or None if it can."""
    if name == NATIVE:
        return None
    if platform.machine() != "x86_64":
        return f"this is {platform.machine()}"
    here = llvm.get_host_cpu_features()
    missing = [feature for feature in PROCESSORS[name].features if not here.get(feature)]
    return f"this processor lacks {', '.join(missing)}" if missing else None


def restart_for(name: str) -> None:
    """Start this program once more, compiling for a target; returns in a process that does so already.

    Raises:
        SystemExit: where code for the target cannot run here.
    """
    wanted = environment_of(name)
    if all(os.environ.get(variable) == value for variable, value in wanted.items()):
        return
    reason = obstacle(name)
    if reason is not None:
        raise SystemExit(f"--target {name}: {reason}")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})


def processor_and_target() -> dict[str, str]:
    """For files of results: this machine's processor, and the one that the CPU kernels are compiled for here."""
    return {"processor": processor_here(), "target": target()[1]}


def processor_here() -> str:
    """The name that this machine's processor gives itself, with what LLVM calls it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({llvm.get_host_cpu_name()})"
