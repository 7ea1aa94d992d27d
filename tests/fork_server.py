"""Processes that have imported what ranks need, and become ranks by forking: importing takes seconds, forking does not.

    process = server_of(environment, ["torch", "horovod.torch"], rank).fork(environment, connection, log)

The new process has this environment and these two open files, and runs `tests.launcher.serve`. It is as if started
anew: a server has imported modules and done nothing else, so no library has read the variables of a rank, has threads
or has made connections. Variables that libraries read while they are imported have servers of their own.

For each set of imports there are two servers, of which the ranks of a pool are forked in turn: strings hash differently
in them, so that neighbouring ranks go through sets in different orders, as in a real job.

A server ends when this process does.
"""

import importlib
import itertools
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_ROOT = Path(__file__).resolve().parent.parent
_READ_BY_IMPORTS = ("NUMBA_", "OMP_", "MKL_", "KMP_", "PYTHON", "LD_", "DS_", "CUDA_", "TORCH_")
_MOST_BYTES = 2**17  # of an environment, on its way to a server
_SERVERS: dict[tuple[object, ...], "Server"] = {}  # for as long as this process lives


class ForkedProcess:
    """A process that is not our child, as far as `subprocess.Popen` could do the same with it."""

    def __init__(self, pid: int) -> None:
        try:
            self._pidfd: int | None = os.pidfd_open(pid)
        except ProcessLookupError:  # it has ended already
            self._pidfd = None

    def wait(self, timeout: float | None = None) -> None:
        """Until it ends.

        Raises:
            subprocess.TimeoutExpired: if it does not within so many seconds.
        """
        if self._pidfd is None:
            return
        if not select.select([self._pidfd], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a forked rank", timeout or 0.0)
        os.close(self._pidfd)
        self._pidfd = None

    def send_signal(self, number: int) -> None:
        """Nothing happens if it has ended."""
        if self._pidfd is not None and not select.select([self._pidfd], [], [], 0)[0]:
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def can_fork() -> bool:
    """Whether this system has what servers need: Linux does."""
    return hasattr(os, "pidfd_open") and hasattr(socket, "SOCK_SEQPACKET")


def server_of(environment: Mapping[str, str], imports: Sequence[str], number: int) -> "Server":
    """The server for a rank, which need not have imported everything yet.

    Args:
        environment: the rank's.
        imports: modules that the rank is to find imported.
        number: of the rank.
    """
    read = tuple(sorted((k, v) for k, v in environment.items() if k.startswith(_READ_BY_IMPORTS)))
    key = (number % 2, tuple(imports), read)
    server = _SERVERS.get(key)
    if server is None or not server.is_alive:
        server = _SERVERS[key] = Server(environment, imports)
    return server


class Server:
    """The near end of a server: a process with these variables that imports these modules."""

    def __init__(self, environment: Mapping[str, str], imports: Sequence[str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the server lives
        command = [sys.executable, "-m", "tests.fork_server", str(theirs.fileno()), *imports]
        with theirs:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                pass_fds=[theirs.fileno()],
                stdout=self._log,
                stderr=self._log,
                cwd=_ROOT,
                start_new_session=True,  # Ctrl-C is for us, who then end it
            )

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def fork(self, environment: Mapping[str, str], connection: int, log: int) -> ForkedProcess:
        """A new process that runs `tests.launcher.serve`.

        Args:
            environment: all of its variables.
            connection: file descriptor of its end of a pipe.
            log: file descriptor of what it prints to.

        Raises:
            RuntimeError: if the imports have failed.
        """
        request = pickle.dumps(dict(environment))
        try:
            socket.send_fds(self._control, [request], [connection, log])
            answer = self._control.recv(32)
        except OSError:
            answer = b""
        if not answer:
            self._log.seek(0)
            raise RuntimeError("the server of ranks has ended:\n" + self._log.read().decode(errors="replace")[-4000:])
        return ForkedProcess(int(answer))


def _become_rank(request: bytes, connection: int, log: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(pickle.loads(request))
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    from tests import launcher

    launcher.serve(connection)


def main(control: int, imports: Sequence[str]) -> None:
    """Import, then fork whenever asked to; returns in the forked processes, too, when they are done."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for what is forked
    for name in imports:
        importlib.import_module(name)
    with socket.socket(fileno=control) as asked:
        for _ in itertools.count():
            request, files, *_ = socket.recv_fds(asked, _MOST_BYTES, 2)
            if not request:
                return
            pid = os.fork()
            if pid == 0:
                break
            for file in files:
                os.close(file)
            asked.send(str(pid).encode())
    _become_rank(request, *files)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
