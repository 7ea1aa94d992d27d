#!/usr/bin/env python3
"""Run a distributed job on several hosts that this one machine plays, with limited links and exact byte counters.

  python launch/sandbox.py --hosts 4 --mbit 500 --host horovod -- python launch/train/mnist.py --steps 100
  python launch/sandbox.py --hosts 2 --mbit 100 --host torch -- python train_with_ddp.py

The command runs once per rank, as under horovodrun or torchrun, with the environment that these give it. Every host is
a network namespace of its own; the hosts are joined by a bridge and reach nothing else, and nothing reaches them. It
needs Linux, iproute2 and util-linux, and root or unprivileged user namespaces. Everything lives in namespaces that the
kernel removes when this program ends, on signals and errors too.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.virtual_hosts import BRIDGE_ADDRESS, INTERFACE, Network, SandboxError, VirtualHosts

TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "mount": "util-linux"}
CANNOT_RUN = 2
_INSIDE = "HVD_QODA_SANDBOX_INSIDE"
_GRACE_S = 2.0
_PORT = 29500


@dataclass(frozen=True)
class Job:
    """What runs in the sandbox.

    Attributes:
        command: of every rank.
        network: the hosts.
        host: whose ranks they are: "horovod" or "torch".
        ranks_per_host: ranks on every host.
        timeout_s: seconds after which the job is stopped; 0: never.
    """

    command: tuple[str, ...]
    network: Network
    host: str = "horovod"
    ranks_per_host: int = 1
    timeout_s: float = 0.0


@dataclass(frozen=True)
class Result:
    """What became of a job.

    Attributes:
        exit_codes: of every rank; negative: killed by that signal.
        seconds: from the first rank's start to the last one's end.
        sent_bytes: that each host's interface has sent, packet headers included.
        delayed_by: see `VirtualHosts.delayed_by`.
        output: lines of all ranks, each behind its rank in brackets.
    """

    exit_codes: tuple[int, ...]
    seconds: float
    sent_bytes: tuple[int, ...]
    delayed_by: str | None
    output: str = ""


def obstacle() -> str | None:
    """Why no sandbox can be made here and what to do; None if it can."""
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if not sys.platform.startswith("linux"):
        return "network namespaces are a feature of Linux"
    if missing:
        return f"install {' and '.join(missing)}"
    outcome = subprocess.run([*_unshare(), "true"], capture_output=True, text=True, timeout=30, check=False)
    if outcome.returncode == 0:
        return None
    return (
        f"no privileges for network namespaces ({outcome.stderr.strip()}). Run as root (sudo); or allow unprivileged "
        "user namespaces: `sysctl -w kernel.unprivileged_userns_clone=1` (Debian), `sysctl -w "
        "kernel.apparmor_restrict_unprivileged_userns=0` (Ubuntu), user.max_user_namespaces above 0; or in a container "
        "add the capabilities SYS_ADMIN and NET_ADMIN (`docker run --privileged`)"
    )


def run_job(job: Job, show: Callable[[str], None] | None = None) -> Result:
    """Run a job in a new sandbox.

    Args:
        job: the job.
        show: called with every line of output as it comes.

    Raises:
        SandboxError: if no sandbox can be made here, or the job did not end in time.
    """
    reason = obstacle()
    if reason is not None:
        raise SandboxError(reason)
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        (Path(folder) / "job.json").write_text(json.dumps(asdict(job)))
        command = [*_unshare(), sys.executable, str(Path(__file__).resolve())]
        process = subprocess.Popen(
            command,
            env={**os.environ, _INSIDE: folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        lines: list[str] = []
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if show is not None:
                    show(line.rstrip("\n"))
            code = process.wait()
        finally:
            process.kill()  # and with it, by --kill-child, everything inside
            process.wait()
        written = Path(folder) / "result.json"
        if not written.exists():
            raise SandboxError("".join(lines[-20:]).strip() or f"the sandbox ended with status {code}")
        found = json.loads(written.read_text())
    if "error" in found:
        raise SandboxError(found["error"])
    sent = tuple(found["sent_bytes"])
    return Result(tuple(found["exit_codes"]), found["seconds"], sent, found["delayed_by"], "".join(lines))


def _unshare() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def _die_with_parent() -> None:
    """In the child, before it becomes the sandbox: ask the kernel for SIGKILL when this program dies."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _inside(folder: Path) -> int:
    """The first process of the sandbox: sets the hosts up, runs the ranks, and writes the result."""
    fields = json.loads((folder / "job.json").read_text())
    network = Network(**fields.pop("network"))
    job = Job(network=network, command=tuple(fields.pop("command")), **fields)
    try:
        hosts = VirtualHosts(network, folder)
        found: dict[str, Any] = _run_ranks(job, hosts)
    except SandboxError as error:
        found = {"error": str(error)}
    unfinished = folder / "result.json.part"
    unfinished.write_text(json.dumps(found))
    unfinished.rename(folder / "result.json")
    return 0


def _run_ranks(job: Job, hosts: VirtualHosts) -> dict[str, Any]:
    with _environments(job, hosts) as environments:
        begin = time.monotonic()
        before = hosts.sent_bytes()
        ranks = [
            hosts.start(rank // job.ranks_per_host, job.command, environment)
            for rank, environment in enumerate(environments)
        ]
        pumps = [threading.Thread(target=_pump, args=(number, rank)) for number, rank in enumerate(ranks)]
        for pump in pumps:
            pump.start()
        late = _wait(ranks, job.timeout_s)
        for pump in pumps:
            pump.join()
        seconds = time.monotonic() - begin
        sent = [after - first for after, first in zip(hosts.sent_bytes(), before, strict=True)]
    if late:
        raise SandboxError(f"the job did not end within {job.timeout_s:g} s; ranks {late} were still running")
    codes = [rank.returncode for rank in ranks]
    return {"exit_codes": codes, "seconds": seconds, "sent_bytes": sent, "delayed_by": hosts.delayed_by}


def _wait(ranks: Sequence["subprocess.Popen[str]"], timeout_s: float) -> list[int]:
    """Wait for all ranks; one that fails, or the deadline, ends the others. Returns the ranks that were late."""
    deadline = time.monotonic() + timeout_s if timeout_s else float("inf")
    failed = False
    while None in (codes := [rank.poll() for rank in ranks]) and time.monotonic() < deadline:
        if any(codes) and not failed:
            failed = True
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(0.05)
    late = [number for number, rank in enumerate(ranks) if rank.poll() is None]
    for number in late:
        ranks[number].kill()
    for rank in ranks:
        rank.wait()
    return [] if failed else late


def _pump(number: int, rank: "subprocess.Popen[str]") -> None:
    assert rank.stdout is not None
    for line in rank.stdout:
        sys.stdout.write(f"[{number}] {line}")
        sys.stdout.flush()


@contextlib.contextmanager
def _environments(job: Job, hosts: VirtualHosts) -> Any:
    """The environment of every rank, and what its launcher would keep running."""
    inherited = {key: value for key, value in os.environ.items() if key != _INSIDE}
    if job.host == "torch":
        yield [{**inherited, **own} for own in _torch_environments(job, hosts)]
        return
    try:
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
        from horovod.runner.http.http_server import RendezvousServer
    except ImportError as error:
        raise SandboxError(f"--host horovod needs Horovod (launch/build_horovod.sh): {error}") from None
    size = job.network.hosts * job.ranks_per_host
    slots = get_host_assignments(parse_hosts(",".join(f"{name}:{job.ranks_per_host}" for name in hosts.names)), size)
    server = RendezvousServer(0)
    port = server.start()  # in this process, which the hosts reach at the bridge
    server.init(slots)
    try:
        yield [{**inherited, **_horovod_environment(slot, port)} for slot in slots]
    finally:
        server.stop()


def _horovod_environment(slot: Any, port: int) -> Mapping[str, str]:
    return {
        "HOROVOD_HOSTNAME": str(slot.hostname),
        "HOROVOD_RANK": str(slot.rank),
        "HOROVOD_SIZE": str(slot.size),
        "HOROVOD_LOCAL_RANK": str(slot.local_rank),
        "HOROVOD_LOCAL_SIZE": str(slot.local_size),
        "HOROVOD_CROSS_RANK": str(slot.cross_rank),
        "HOROVOD_CROSS_SIZE": str(slot.cross_size),
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": BRIDGE_ADDRESS,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_GLOO_IFACE": INTERFACE,
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
    }


def _torch_environments(job: Job, hosts: VirtualHosts) -> list[dict[str, str]]:
    size = job.network.hosts * job.ranks_per_host
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank % job.ranks_per_host),
            "LOCAL_WORLD_SIZE": str(job.ranks_per_host),
            "GROUP_RANK": str(rank // job.ranks_per_host),
            "MASTER_ADDR": hosts.addresses[0],
            "MASTER_PORT": str(_PORT),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "NCCL_SOCKET_IFNAME": INTERFACE,
        }
        for rank in range(size)
    ]


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    if _INSIDE in os.environ:
        return _inside(Path(os.environ.pop(_INSIDE)))
    from launch.train.options import HelpFormatter, not_negative, positive  # torch takes seconds

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--hosts", type=positive, default=2, help="number of hosts")
    parser.add_argument("--ranks-per-host", type=positive, default=1, help="ranks on every host")
    parser.add_argument("--mbit", type=float, default=0.0, help="10^6 bits per second of each link; 0: no limit")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="delay of what a host sends")
    parser.add_argument("--host", choices=("horovod", "torch"), default="horovod", help="what the ranks use")
    parser.add_argument("--timeout-s", type=float, default=0.0, help="stop the job after this many seconds; 0: never")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write exit codes, seconds and bytes to this file")
    parser.add_argument("--seed", type=not_negative, default=0, help="given to the ranks as PYTHONHASHSEED")
    parser.add_argument("command", nargs="+", help="of every rank; put -- in front of it")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    os.environ["PYTHONHASHSEED"] = str(options.seed)
    try:
        network = Network(options.hosts, options.mbit, options.delay_ms)
        job = Job(tuple(options.command), network, options.host, options.ranks_per_host, options.timeout_s)
        result = run_job(job, lambda line: print(line, flush=True))
    except SandboxError as error:
        print(f"sandbox.py: {error}", file=sys.stderr)
        return CANNOT_RUN
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(f"{result.seconds:.1f} s; bytes sent by each host: {', '.join(f'{sent:,}' for sent in result.sent_bytes)}")
    if options.json is not None:
        from launch.train.summary import write_json

        fields = {key: value for key, value in asdict(result).items() if key != "output"}
        write_json(options.json, {**fields, "job": asdict(job)})
    return max((abs(code) for code in result.exit_codes), default=0)


if __name__ == "__main__":
    sys.exit(main())
