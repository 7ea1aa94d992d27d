"""Delays packets in a process of its own, for kernels without netem: a pair of TAP devices and what lies between.

Packets that a host sends through its device are handed on when their delay has passed; what comes from the bridge is
handed on at once. The kernel may pass packets of up to 64 KiB in one piece (TCP segmentation is left to the device, and
there is none), so this keeps up with a few Gbit/s at the cost of a share of one core.
"""

import ctypes
import errno
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from collections.abc import Sequence

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TAP, _NO_PACKET_INFORMATION, _VIRTUAL_HEADER = 0x0002, 0x1000, 0x4000
_OFFLOADS = 0x01 | 0x02 | 0x04  # checksums, TCP over IPv4 and IPv6
_LARGEST_PACKET = 2**16 + 256
_CLONE_NEWNET = 0x40000000
_LOST = {errno.EIO, errno.EAGAIN, errno.ENOBUFS}  # the device is down, or full


def open_device(name: str, process: int | None = None) -> int:
    """Make a TAP device and return the descriptor of its packets.

    Args:
        name: of the device.
        process: a process in whose network namespace it is to be; None for the caller's own.

    Raises:
        OSError: without the kernel's TUN driver, or without privileges.
    """
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        if process is not None:
            there = os.open(f"/proc/{process}/ns/net", os.O_RDONLY)
            try:
                _enter(there)
            finally:
                os.close(there)
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        flags = _TAP | _NO_PACKET_INFORMATION | _VIRTUAL_HEADER
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(device, _TUNSETOFFLOAD, _OFFLOADS)
        return device
    finally:
        _enter(own)
        os.close(own)


def relay(hosts: Sequence[int], ports: Sequence[int], delay_s: float) -> None:
    """Carry packets between pairs of descriptors, for ever.

    Args:
        hosts: descriptors of the hosts' devices.
        ports: of the devices at the bridge, in the same order.
        delay_s: of what the hosts send.
    """
    other = {**dict(zip(hosts, ports, strict=True)), **dict(zip(ports, hosts, strict=True))}
    sent_by_host = set(hosts)
    waiting: deque[tuple[float, int, bytes]] = deque()
    while True:
        pause = None if not waiting else max(0.0, waiting[0][0] - time.monotonic())
        readable, _, _ = select.select(list(other), [], [], pause)
        now = time.monotonic()
        for device in readable:
            for _ in range(16):  # then the others' turn
                packet = _read(device)
                if packet is None:
                    break
                if device in sent_by_host:
                    waiting.append((now + delay_s, other[device], packet))
                else:
                    _write(other[device], packet)
        while waiting and waiting[0][0] <= time.monotonic():
            _, device, packet = waiting.popleft()
            _write(device, packet)


def _read(device: int) -> bytes | None:
    try:
        return os.read(device, _LARGEST_PACKET)
    except BlockingIOError:
        return None


def _write(device: int, packet: bytes) -> None:
    try:
        os.write(device, packet)
    except OSError as error:  # like any device, this one loses packets that it cannot take
        if error.errno not in _LOST:
            raise


def _enter(namespace: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def main(arguments: Sequence[str]) -> int:
    """`packet_delay.py SECONDS DEVICE PROCESS PORT...`: one device, in that process's namespace, per port."""
    delay_s, device = float(arguments[0]), arguments[1]
    pairs = list(zip(arguments[2::2], arguments[3::2], strict=True))
    hosts = [open_device(device, int(process)) for process, _ in pairs]
    ports = [open_device(port) for _, port in pairs]
    print("ready", flush=True)
    relay(hosts, ports, delay_s)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
