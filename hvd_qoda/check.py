"""What is installed and works here: versions, the codec's kernels, hosts, GPU; and the link where a launcher is used.

Exit status 1 if something that is installed does not work. Started by horovodrun it also times the link:
horovodrun -np 4 -H node1:2,node2:2 hvd-qoda check
"""

import argparse
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hvd_qoda.codec_device import checked_problem
from hvd_qoda.cost_model import CodecSpeed
from hvd_qoda.gradient_codec import runtime_of
from hvd_qoda.hosts import gather_hosts
from hvd_qoda.launched import launched_ranks
from hvd_qoda.measurement import fitted_codebook, measure_codec, measure_link
from hvd_qoda.transport import LocalTransport, Transport
from qoda_kernels import __version__
from qoda_kernels.codebook import Codebook
from qoda_kernels.cpu.target import left_out, target, vector_extension
from qoda_kernels.fastest_method import look_up_way, search_method
from qoda_kernels.registry import COMPRESSIBLE_DTYPES
from qoda_kernels.wire import WIRE_VERSION
from qoda_kernels.worker_threads import WorkerThreads, allotted_threads

__all__ = ["NAME", "SUMMARY", "add_options", "run", "show"]

NAME = "check"
SUMMARY = "what is installed and works here"

_TITLES = {"horovod": "Horovod", "deepspeed": "DeepSpeed"}
_PACKAGES = ("torch", "numpy", "numba", "horovod", "deepspeed", "wandb", "tensorboard", "numba-cuda")
_EXPECTED = {
    "AVX-512": "the codec's full speed",
    "AVX2": "uniform levels at full speed, fitted ones at about half of it",
    "AVX": "fitted levels at a fraction of full speed",
    "SSE": "fitted levels at a fraction of full speed",
    "NEON": "the same bits, at a speed that is only known from the codec's line below",
}
_SPEED = {"avx512f": "AVX-512", "avx2": "AVX2", "fma": "fused multiply-add"}
_IMPORT_TIMEOUT_S = 120.0
_CODEC_MEASUREMENTS = 5  # the middle one counts: a machine that does other work makes single ones several times as slow


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `hvd-qoda check`."""
    parser.add_argument("--bits", type=int, choices=range(2, 9), default=5, help="code width for the codec's speed")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """What `hvd-qoda check` prints, as plain values, and its exit status."""
    threads = WorkerThreads(allotted_threads(os.environ))
    with launched_ranks() as transport:
        ranks = LocalTransport() if transport is None else transport
        codecs = _codec_speeds(options.bits, ranks, threads)
        # One rank speaks for all.
        hosts = {"horovod": _horovod(), "deepspeed": _deepspeed()} if ranks.rank == 0 else {}
        found: dict[str, Any] = {
            "hvd_qoda": __version__,
            "wire_version": WIRE_VERSION,
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in _PACKAGES},
            "hosts": hosts,
            "processor": _processor(options.bits),
            "gpus": _gpus(),
            "coding_on_gpus": _coding_on_gpus(options.bits),
            "codec": {
                "bits": options.bits,
                "threads": threads.count,
                **asdict(codecs[len(codecs) // 2]),
                "fastest_encode_s": codecs[0].encode_s,
                "slowest_encode_s": codecs[-1].encode_s,
            },
            "link": None,
        }
        if transport is not None:
            where = gather_hosts(transport)
            found["link"] = {
                "ranks": transport.size,
                "ranks_of_hosts": list(where.counts),
                "measured": measure_link(transport, where).to_dict(),
            }
            found["silent"] = transport.rank != 0
    found["verdict"] = _verdict(found)
    return found, 1 if any(host["problem"] for host in hosts.values()) else 0


def _codec_speeds(bits: int, ranks: Transport, threads: WorkerThreads) -> list[CodecSpeed]:
    """The codec's speed several times over, the fastest encoder first."""
    codebook = fitted_codebook(bits)
    speeds = [
        measure_codec(codebook, ranks, threads, name=f"hvd_qoda.codec_speed.{number}")
        for number in range(_CODEC_MEASUREMENTS)
    ]
    return sorted(speeds, key=lambda speed: speed.encode_s)


def _verdict(found: dict[str, Any]) -> list[str]:
    """What follows from the rest, a sentence each: what can be used, what cannot, and whether compression can pay."""
    hosts = found["hosts"]
    ready = [_TITLES[name] for name, host in hosts.items() if found["packages"][name] and not host["problem"]]
    broken = [_TITLES[name] for name, host in hosts.items() if host["problem"]]
    absent = [_TITLES[name] for name in hosts if not found["packages"][name]]
    sentences = [f"Ready: {', '.join([*ready, 'DistributedDataParallel'])}."]
    if broken:
        sentences.append(f"Broken: {', '.join(broken)}, see above.")
    if absent:
        sentences.append(f"Not installed: {', '.join(absent)}.")
    # Coding and decoding once must take less time than sending the saved bytes does.
    codec = found["codec"]
    saved_bits = 32 - codec["bits"]
    mbit = saved_bits / max(codec["encode_s"] + codec["decode_s"], 1e-12) / 1e6
    sentences.append(
        f"Coding on this CPU costs less time than it saves between two hosts whose link is slower than about "
        f"{mbit / 1000:.2g} Gbit/s; hvd-qoda advise says more."
    )
    return sentences


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `run` has found."""
    table = Table(title=f"hvd-qoda {found['hvd_qoda']}, wire version {found['wire_version']}", show_header=False)
    table.add_row("Python", found["python"])
    for name, number in found["packages"].items():
        table.add_row(name, number or "not installed")
    for name, host in found["hosts"].items():
        table.add_row(f"{name} works", host["problem"] or host["says"])
        for warning in host["warnings"]:
            table.add_row(f"{name} warns", warning)
    table.add_row("processor", _processor_line(found["processor"]))
    if found["processor"]["warning"]:
        table.add_row("processor warns", found["processor"]["warning"])
    table.add_row("GPUs", ", ".join(found["gpus"]) or "none that torch can use")
    for index, problem in enumerate(found["coding_on_gpus"]):
        said = "passed the self check: same bits as the CPU" if problem is None else f"no, the CPU does it: {problem}"
        table.add_row(f"coding on GPU {index}", said)
    codec = found["codec"]
    table.add_row(
        f"codec, {codec['bits']} bits",
        f"{1e9 * codec['encode_s']:.2f} ns to encode a coordinate, {1e9 * codec['decode_s']:.2f} ns to decode one, "
        f"{codec['threads']} thread(s); middle of {_CODEC_MEASUREMENTS} measurements, which lie from "
        f"{1e9 * codec['fastest_encode_s']:.2f} to {1e9 * codec['slowest_encode_s']:.2f} ns to encode",
    )
    console.print(table)
    for sentence in found["verdict"]:
        console.print(sentence)
    if found["link"] is None:
        console.print("Not started by a launcher, so no link was measured. Under it: horovodrun -np K hvd-qoda check")
        return
    link = found["link"]
    counts = ", ".join(map(str, link["ranks_of_hosts"]))
    table = Table(title=f"Link among {link['ranks']} ranks; on each host: {counts}")
    for column in ("collective", "empty", "each further", "bandwidth of a rank"):
        table.add_column(column, justify="right")
    for name, cost in link["measured"].items():
        per_byte = cost["seconds_per_byte"]
        bandwidth = f"{8e-9 / per_byte:.3g} Gbit/s" if per_byte > 0 else "too fast to measure"
        table.add_row(name, f"{1e3 * cost['fixed_s']:.3g} ms", f"{1e3 * cost['each_s']:.3g} ms", bandwidth)
    console.print(table)


def _processor(bits: int) -> dict[str, Any]:
    """What the kernels are compiled to, and the methods that were the fastest here for fitted levels."""
    extension, numbers = vector_extension()
    return {
        "target": target()[1],
        "vectors": extension,
        "numbers_at_once": numbers,
        "search": search_method(bits),
        "look_up": look_up_way(bits),
        "warning": _warning_of_numba(),
    }


def _warning_of_numba() -> str | None:
    """What Numba's variables do to the kernels that a user might not expect."""
    chosen = [variable for variable in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES") if variable in os.environ]
    unused = [name for feature, name in _SPEED.items() if feature in left_out()]
    if unused:
        reason = " and ".join(chosen) or "Numba's setting NUMBA_ENABLE_AVX"
        return f"{', '.join(unused)} of this processor not used because of {reason}: slower, the same bits"
    if chosen == ["NUMBA_CPU_NAME"]:
        return (
            "NUMBA_CPU_NAME is set without NUMBA_CPU_FEATURES: Numba takes the features of this processor, whatever "
            "the name"
        )
    return None


def _processor_line(processor: dict[str, Any]) -> str:
    expected = _EXPECTED[processor["vectors"]]
    return (
        f"{processor['vectors']}, {processor['numbers_at_once']} numbers at once ({processor['target']}): {expected}; "
        f"levels are found in {processor['search']}, looked up in {processor['look_up']}"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _horovod() -> dict[str, Any]:
    program = (
        "import horovod.torch as h; "
        "print(*[n for n in ('gloo', 'mpi', 'nccl') if getattr(h, n + '_built')()], sep=', ')"
    )
    return _host("horovod", program, "built with {}", "build it with launch/build_horovod.sh")


def _deepspeed() -> dict[str, Any]:
    return _host(
        "deepspeed", "import ds_plugin; print(ds_plugin.__name__)", "the plug-in {} imports", "see its message"
    )


def _host(package: str, program: str, says: str, advice: str) -> dict[str, Any]:
    """Try a host in a process of its own: a broken one may take the interpreter with it."""
    if find_spec(package) is None:
        return {"says": "not installed", "problem": None, "warnings": []}
    # Ranks of a job do not pass their places on: the child is no member of it.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HOROVOD_", "OMPI_", "PMI_"))}
    try:
        outcome = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=_IMPORT_TIMEOUT_S,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"says": None, "problem": f"importing it took more than {_IMPORT_TIMEOUT_S:g} s", "warnings": []}
    lines = outcome.stdout.strip().splitlines()
    complaints = outcome.stderr.strip().splitlines()
    # For example that torch is of another version than the one it was built for.
    warnings = list(dict.fromkeys(line.strip() for line in complaints if "warn" in line.lower()))
    if outcome.returncode == 0 and lines:
        return {"says": says.format(lines[-1]), "problem": None, "warnings": warnings}
    reason = (complaints or [f"exit status {outcome.returncode}"])[-1]
    return {"says": None, "problem": f"does not work: {reason}; {advice}", "warnings": warnings}


def _coding_on_gpus(bits: int) -> list[str | None]:
    """For every GPU why it cannot code gradients, or None if it can."""
    runtimes = [runtime_of(torch.device("cuda", index)) for index in range(len(_gpus()))]
    books = [fitted_codebook(bits), Codebook.exact()]
    return [None if each is None else checked_problem(each, books, COMPRESSIBLE_DTYPES) for each in runtimes]


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
