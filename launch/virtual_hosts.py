"""Hosts on this machine that have only a bridge in common: network namespaces with rate limits and byte counters.

Linux only. To be used inside a network, mount and PID namespace of its own (`sandbox.py` makes it): then nothing here
can leave it, and the kernel removes everything when its first process ends, however that comes about.

Every host is a network, UTS and mount namespace with one interface, `e0`, whose other end is a port of the bridge.
Its outgoing rate is limited on e0, its incoming rate on the port; the delay is added to what it sends, by the kernel's
netem, or where the kernel lacks it by `packet_delay.py`.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "e0"
_BRIDGE = "bridge0"
_SUBNET = "10.77.0"
BRIDGE_ADDRESS = f"{_SUBNET}.254"
MAX_HOSTS = 253
_START_TIMEOUT_S = 10.0
_CONGESTION_CONTROL = "cubic"  # Linux's own default; this machine's may be another one
_AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
_LEAST_BURST_BYTES = 2**17  # two of the longest packets that TCP hands down: a shorter burst would cut them up


class SandboxError(Exception):
    """The hosts cannot be set up; the message says what is missing."""


@dataclass(frozen=True)
class Network:
    """What connects the hosts.

    Attributes:
        hosts: how many.
        mbit: 10^6 bits per second that a host can send, and as many that it can receive; 0: no limit.
        delay_ms: milliseconds by which everything that a host sends is delayed.
    """

    hosts: int
    mbit: float = 0.0
    delay_ms: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.hosts <= MAX_HOSTS:
            raise SandboxError(f"hosts must be 1 to {MAX_HOSTS}, got {self.hosts}")
        if self.mbit < 0 or self.delay_ms < 0:
            raise SandboxError(f"mbit and delay_ms must not be negative, got {self.mbit:g} and {self.delay_ms:g}")


class VirtualHosts:
    """The hosts of a network, up and connected; they live as long as the surrounding PID namespace.

    Args:
        network: what connects them.
        scratch: folder for their hosts file.

    Raises:
        SandboxError: if the kernel lacks what they need.
    """

    def __init__(self, network: Network, scratch: Path) -> None:
        self._network = network
        self.names = [f"host{number}" for number in range(1, network.hosts + 1)]
        self.addresses = [f"{_SUBNET}.{number}" for number in range(1, network.hosts + 1)]
        hosts_file = scratch / "hosts"
        lines = [f"{address} {name}" for address, name in zip(self.addresses, self.names, strict=True)]
        hosts_file.write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        _run("ip", "link", "set", "lo", "up")
        _run("ip", "link", "add", _BRIDGE, "type", "bridge")
        _run("ip", "link", "set", _BRIDGE, "up")
        _run("ip", "address", "add", f"{BRIDGE_ADDRESS}/24", "dev", _BRIDGE)
        self._keepers = [_keeper(name, hosts_file) for name in self.names]
        self._delays_by_kernel = not network.delay_ms or _has_netem()
        if not self._delays_by_kernel:
            self._relay = self._start_relay()
        for number, (keeper, address) in enumerate(zip(self._keepers, self.addresses, strict=True), start=1):
            self._connect(number, keeper, address)

    @property
    def delayed_by(self) -> str | None:
        """What delays packets: "netem", "packet_delay.py" (which takes a share of a core), or None."""
        if not self._network.delay_ms:
            return None
        return "netem" if self._delays_by_kernel else "packet_delay.py"

    def start(
        self, host: int, command: Sequence[str], environment: Mapping[str, str], folder: str | None = None
    ) -> "subprocess.Popen[str]":
        """Start a command on a host, counted from 0; its output, errors included, comes through a pipe."""
        return subprocess.Popen(
            [*self._on(host), *command],
            env=dict(environment),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def sent_bytes(self) -> list[int]:
        """Bytes that every host has sent so far: the kernel's count for its interface, packet headers included."""
        return [interface_bytes(f"/proc/{keeper.pid}/net/dev")[1] for keeper in self._keepers]

    def _on(self, host: int) -> list[str]:
        return ["nsenter", "--target", str(self._keepers[host].pid), "--net", "--uts", "--mount", "--"]

    def _connect(self, number: int, keeper: "subprocess.Popen[bytes]", address: str) -> None:
        port = f"port{number}"
        inside = self._on(number - 1)
        if self._delays_by_kernel:
            _run("ip", "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", str(keeper.pid))
        _run("ip", "link", "set", port, "master", _BRIDGE, "up")
        _run(*inside, "ip", "address", "add", f"{address}/24", "dev", INTERFACE)
        _run(*inside, "ip", "link", "set", "lo", "up")
        _run(*inside, "ip", "link", "set", INTERFACE, "up")
        if _CONGESTION_CONTROL in _AVAILABLE.read_text().split():
            # For the route, because the kernel lets a namespace choose only some algorithms as its default.
            route = [f"{_SUBNET}.0/24", "dev", INTERFACE, "src", address, "congctl", _CONGESTION_CONTROL]
            _run(*inside, "ip", "route", "replace", *route, "proto", "kernel", "scope", "link")
        self._limit(inside, INTERFACE, self._network.delay_ms if self._delays_by_kernel else 0.0)
        self._limit([], port, 0.0)

    def _start_relay(self) -> "subprocess.Popen[bytes]":
        """What delays packets where the kernel cannot."""
        program = Path(__file__).with_name("packet_delay.py")
        pairs = [(str(keeper.pid), f"port{number}") for number, keeper in enumerate(self._keepers, start=1)]
        devices = [word for pair in pairs for word in pair]
        command = [sys.executable, str(program), str(self._network.delay_ms / 1e3), INTERFACE, *devices]
        return _started(command, "packet_delay.py", "it needs the kernel's TUN driver, /dev/net/tun")

    def _limit(self, where: Sequence[str], device: str, delay_ms: float) -> None:
        parent = ["root"]
        if self._network.mbit:
            bits = self._network.mbit * 1e6
            burst = max(_LEAST_BURST_BYTES, round(bits / 8 * 0.004))
            limit = ["rate", f"{round(bits)}bit", "burst", f"{burst}b", "latency", "100ms"]
            _run(*where, "tc", "qdisc", "add", "dev", device, "root", "handle", "1:", "tbf", *limit)
            parent = ["parent", "1:1"]
        if delay_ms:
            netem = ["netem", "delay", f"{delay_ms}ms", "limit", "100000"]
            _run(*where, "tc", "qdisc", "add", "dev", device, *parent, *netem)


def interface_bytes(path: str = "/proc/net/dev", interface: str = INTERFACE) -> tuple[int, int]:
    """Bytes received and sent by an interface so far, by the kernel's count.

    Args:
        path: the kernel's table: by default that of the calling process's network namespace.
        interface: its name.

    Raises:
        SandboxError: if there is no such interface.
    """
    for line in Path(path).read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            fields = counters.split()
            return int(fields[0]), int(fields[8])
    raise SandboxError(f"no interface {interface!r} here: run this inside launch/sandbox.py")


def _keeper(name: str, hosts_file: Path) -> "subprocess.Popen[bytes]":
    """A process that does nothing but hold a host's namespaces."""
    script = 'mount --bind "$1" /etc/hosts && hostname "$2" && echo ready && exec sleep infinity'
    command = ["unshare", "--net", "--uts", "--mount", "sh", "-c", script, "sh", str(hosts_file), name]
    return _started(command, name, "")


def _started(command: Sequence[str], what: str, hint: str) -> "subprocess.Popen[bytes]":
    """A process that has said that it is ready."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    if process.stdout.readline() != b"ready\n":
        reason = process.stderr.read().decode(errors="replace").strip()
        raise SandboxError(f"{what} could not be started: {reason}. {hint}".strip())
    return process


def _has_netem() -> bool:
    """Whether the kernel can delay packets itself."""
    device = ["dev", "lo", "root"]
    tried = subprocess.run(["tc", "qdisc", "add", *device, "netem", "delay", "1ms"], capture_output=True, check=False)
    if tried.returncode == 0:
        _run("tc", "qdisc", "delete", *device)
    return tried.returncode == 0


def _run(*command: str) -> None:
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=_START_TIMEOUT_S, check=False)
    if outcome.returncode != 0:
        raise SandboxError(f"`{' '.join(command)}` failed: {outcome.stderr.strip() or outcome.stdout.strip()}")
