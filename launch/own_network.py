"""A network namespace with nothing but a loopback interface, whose counter tells what one program's ranks send.

A program runs itself again behind `UNSHARE`, there calls `bring_loopback_up`, and starts its ranks on this machine.
"""

import fcntl
import shutil
import socket
import struct
import subprocess

from launch.virtual_hosts import interface_bytes

__all__ = ["UNSHARE", "bring_loopback_up", "loopback_bytes", "may_make_a_network"]

UNSHARE = ("unshare", "--map-root-user", "--net")
"""What a command line begins with to run in a network of its own."""


def may_make_a_network() -> bool:
    """Whether this user on this machine may."""
    if shutil.which(UNSHARE[0]) is None:
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0


def bring_loopback_up() -> None:
    """What `ip link set lo up` does."""
    get_flags, set_flags, up = 0x8913, 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = struct.unpack("16sh", fcntl.ioctl(control, get_flags, struct.pack("16sh", b"lo", 0)))[1]
        fcntl.ioctl(control, set_flags, struct.pack("16sh", b"lo", flags | up))


def loopback_bytes() -> int:
    """Bytes that the loopback interface of this network has sent, packet headers and acknowledgements included."""
    return interface_bytes(interface="lo")[1]
