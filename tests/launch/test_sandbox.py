"""Several hosts on this machine: limits hold, bytes are counted, and nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import sandbox
from launch.sandbox import Job, run_job
from launch.virtual_hosts import Network, SandboxError, interface_bytes
from tests.launcher import heed_interrupts

pytestmark = pytest.mark.timed

ROOT = Path(__file__).resolve().parents[2]
REASON = sandbox.obstacle()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=f"no sandbox here: {REASON}")

SEND = """
import os, socket, time
rank = int(os.environ["RANK"])
print("name", socket.gethostname(), socket.gethostbyname(socket.gethostname()), flush=True)
if rank == 0:
    with socket.create_server((os.environ["MASTER_ADDR"], 29500)) as server:
        peer, _ = server.accept()
        begin, received = time.monotonic(), 0
        while part := peer.recv(2**20):
            received += len(part)
        print("received", received, time.monotonic() - begin)
else:
    for _ in range(100):
        try:
            with socket.create_connection((os.environ["MASTER_ADDR"], 29500)) as peer:
                peer.sendall(bytes(AMOUNT))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
"""
AMOUNT = 5_000_000


@needs_namespaces
def test_rate_and_bytes() -> None:
    program = SEND.replace("AMOUNT", str(AMOUNT))
    result = run_job(Job((sys.executable, "-c", program), Network(2, mbit=100.0), "torch", timeout_s=60.0))
    assert result.exit_codes == (0, 0), result.output
    assert "[0] name host1 10.77.0.1" in result.output
    assert "[1] name host2 10.77.0.2" in result.output
    received, seconds = next(line.split()[2:] for line in result.output.splitlines() if "received" in line)
    assert int(received) == AMOUNT
    # The limit lets a burst of 64 KiB through at once; a busy machine may be slower than its link.
    assert 0.9 < float(seconds) / (AMOUNT * 8 / 100e6) < 2.0
    assert AMOUNT < result.sent_bytes[1] < 1.02 * AMOUNT
    assert result.sent_bytes[0] < 0.1 * AMOUNT  # acknowledgements


ECHO = """
import os, socket, time
address = (os.environ["MASTER_ADDR"], 29500)
if os.environ["RANK"] == "0":
    with socket.create_server(address) as server:
        peer, _ = server.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while part := peer.recv(100):
            peer.sendall(part)
else:
    for _ in range(100):
        try:
            peer = socket.create_connection(address)
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    trips = []
    for _ in range(20):
        begin = time.monotonic()
        peer.sendall(b"x")
        peer.recv(1)
        trips.append(time.monotonic() - begin)
    print("least", min(trips))
"""


@needs_namespaces
@pytest.mark.parametrize("mbit", [0.0, 100.0])
def test_delay(mbit: float) -> None:
    result = run_job(Job((sys.executable, "-c", ECHO), Network(2, mbit, delay_ms=5.0), "torch", timeout_s=60.0))
    assert result.exit_codes == (0, 0), result.output
    assert result.delayed_by in ("netem", "packet_delay.py")
    least = float(next(line.split()[2] for line in result.output.splitlines() if "least" in line))
    assert 0.010 <= least < 0.020  # both ends' delays


@needs_namespaces
def test_hosts_reach_nothing_else() -> None:
    program = (
        "import socket\n"
        "print(sorted(name for _, name in socket.if_nameindex()))\n"
        "try: socket.create_connection(('192.0.2.1', 80), 1)\n"
        "except OSError as error: print(error.strerror)"
    )
    result = run_job(Job((sys.executable, "-c", program), Network(1), "torch", timeout_s=60.0))
    assert "[0] ['e0', 'lo']" in result.output
    assert "Network is unreachable" in result.output


@needs_namespaces
def test_a_failing_rank_ends_the_job(tmp_path: Path) -> None:
    program = "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)"
    path = tmp_path / "result.json"
    command = [sys.executable, "launch/sandbox.py", "--host", "torch", "--json", str(path), "--"]
    begin = time.monotonic()
    outcome = subprocess.run(
        [*command, sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert time.monotonic() - begin < 30.0
    assert outcome.returncode == 9, outcome.stderr  # SIGKILL of the other rank
    assert json.loads(path.read_text())["exit_codes"] == [-9, 7]


@needs_namespaces
def test_a_late_job_is_an_error() -> None:
    with pytest.raises(SandboxError, match=r"did not end within 1 s; ranks \[0, 1\] were still running"):
        run_job(Job(("sleep", "60"), Network(2), "torch", timeout_s=1.0))


@needs_namespaces
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_after_a_signal(number: signal.Signals) -> None:
    seconds = f"{12345 + number}.{os.getpid()}"  # of a sleep that no other process has
    before = interfaces()
    command = [sys.executable, "launch/sandbox.py", "--host", "torch", "--", "sh", "-c", f"echo up; sleep {seconds}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)
    assert process.stdout is not None
    assert "up" in process.stdout.readline()
    assert comes_to_be(True, seconds)  # the shell says "up" before it starts the sleep
    process.send_signal(number)
    process.wait(20)
    assert comes_to_be(False, seconds)
    assert interfaces() == before


def comes_to_be(wanted: bool, seconds: str) -> bool:
    """Whether within 10 s a process sleeps, or none does."""
    deadline = time.monotonic() + 10.0
    while sleeping(seconds) != wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    return sleeping(seconds) == wanted


def sleeping(seconds: str) -> bool:
    """Whether a process of that command line is left."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().split(b"\0")[:2] == [b"sleep", seconds.encode()]:
                return True
        except OSError:  # it has just ended
            continue
    return False


def interfaces() -> list[str]:
    return sorted(line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:])


def test_without_privileges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "TOOLS", {})
    monkeypatch.setattr(sandbox, "_unshare", lambda: ["false"])
    with pytest.raises(SandboxError, match=r"no privileges for network namespaces .* Run as root \(sudo\)"):
        run_job(Job(("true",), Network(1)))


def test_without_the_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "TOOLS", {"no-such-tool": "iproute2"})
    assert sandbox.obstacle() == "install iproute2"


def test_impossible_networks() -> None:
    with pytest.raises(SandboxError, match="hosts must be 1 to 253, got 300"):
        Network(300)
    with pytest.raises(SandboxError, match="must not be negative"):
        Network(2, mbit=-1.0)
    with pytest.raises(SandboxError, match="no interface 'none'"):
        interface_bytes(interface="none")
