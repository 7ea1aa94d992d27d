"""Runs functions in real ranks, of Horovod or of torch.distributed, on the loopback interface of this machine.

Several checks share one set of processes:

    with RankPool(2) as ranks:
        results = ranks.run(check_something, 3, bits=5)      # a list: each rank's return value, in rank order

`check_something(3, bits=5)` runs in every rank, after `horovod.torch.init()`; with `RankPool(2, host="torch")` after
`torch.distributed.init_process_group("gloo")`, and without Horovod. It must be a top-level function of a
module (a test file will do); arguments and results travel by pickle. An exception in any rank raises `RankError` in the
caller, with the ranks' tracebacks. A rank that does not answer in time is stopped, with all others, and `RankError`
shows where each of them was. After an error the pool starts new processes for the next call.

New ranks are forked from processes that have imported torch, the host and `hvd_qoda` (`tests.fork_server`): a pool of
its own costs a test a fraction of a second. What a rank imports beyond that, it imports anew: give `imports` for what
takes long, such as DeepSpeed. Tests that need nothing special still share those of their folder (`tests.shared_ranks`).

`run_ranks(function, size, ...)` is a pool for one call. `horovodrun(["python", "x.py"], size)` runs a whole program
under the real `horovodrun --gloo` and returns its output. All of them stop only the processes that they have started.
"""

import contextlib
import dataclasses
import faulthandler
import importlib.util
import inspect
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn

from tests.fork_server import ForkedProcess, can_fork, server_of

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 90.0
DEFAULT_TIMEOUT_S = 120.0
_TRACEBACK_GRACE_S = 1.0


def heed_interrupts() -> None:
    """For `preexec_fn` of `subprocess.Popen`: else what a shell has started in the background ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class RankError(AssertionError):
    """A rank raised, died, or did not answer in time; the message holds each rank's report."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one call in one rank."""

    value: Any = None
    error: str | None = None  # "TypeName: message"
    report: str = ""  # the traceback


class RankPool:
    """`size` ranks of this machine, kept for several calls.

    Args:
        size: number of ranks.
        environment: variables added to the ranks' environment.
        prefix: command put in front of each rank's, e.g. ["ip", "netns", "exec", "x"].
        host: "horovod", or "torch" for torch.distributed with gloo.
        hosts: names of this machine with numbers of ranks, such as "localhost:2,127.0.0.1:2", which Horovod then takes
            for different machines; by default one name.
        imports: modules that ranks find imported already, beside torch, the host and `hvd_qoda`.
        of_each: variables added to the environment of each rank alone, in rank order.
    """

    def __init__(
        self,
        size: int,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        host: Literal["horovod", "torch"] = "horovod",
        hosts: str | None = None,
        imports: Sequence[str] = (),
        of_each: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self.size = size
        self._of_each = of_each or [{}] * size
        self._imports = ["torch", *(["horovod.torch"] if host == "horovod" else []), "hvd_qoda", *imports]
        self._host = host
        self._hosts = hosts or f"{socket.gethostname()}:{size}"
        self._environment = dict(environment or {})
        self._prefix = list(prefix)
        self._ranks: list[_Rank] = []
        self._rendezvous: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = DEFAULT_TIMEOUT_S, **kwargs: Any
    ) -> list[Any]:
        """Call a function in every rank and return what each of them returned.

        Raises:
            RankError: if any rank raised, died or did not finish within `timeout` seconds.
        """
        outcomes = self.outcomes(function, *args, timeout=timeout, **kwargs)
        if any(outcome.error for outcome in outcomes):
            lines = [f"rank {k}: {o.error or 'ok'}" for k, o in enumerate(outcomes)]
            reports = dict.fromkeys(o.report for o in outcomes if o.error)  # equal ones once
            raise RankError("\n".join([*lines, *reports]))
        return [outcome.value for outcome in outcomes]

    def outcomes(
        self, function: Callable[..., Any], *args: Any, timeout: float = DEFAULT_TIMEOUT_S, **kwargs: Any
    ) -> list[Outcome]:
        """Like `run`, but exceptions that the function raised come back as `Outcome.error`; the pool then starts anew.

        Raises:
            RankError: if a rank died or did not finish within `timeout` seconds.
        """
        if not self._ranks:
            self._start()
        call = pickle.dumps((str(inspect.getsourcefile(function)), function.__qualname__, args, kwargs))
        for rank in self._ranks:
            rank.connection.send_bytes(call)
        outcomes = self._collect(time.monotonic() + timeout, function.__qualname__)
        if any(outcome.error for outcome in outcomes):
            self.close()  # a rank that has raised may have left collectives unanswered
        return outcomes

    def close(self) -> None:
        """Stop the ranks; they are started again by the next call."""
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.connection.send_bytes(b"")
        for rank in self._ranks:
            rank.stop(grace_s=10.0)
        self._ranks = []
        if self._rendezvous is not None:
            self._rendezvous.stop()
            self._rendezvous = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        host = self._horovod_variables() if self._host == "horovod" else self._torch_variables()
        environments = [
            {**child_environment(), **variables, **self._environment, **own}
            for variables, own in zip(host, self._of_each, strict=True)
        ]
        if can_fork() and not self._prefix:
            for number, environment in enumerate(environments):
                server_of(environment, self._imports, number)  # all of them import at the same time
        for number, environment in enumerate(environments):
            self._ranks.append(_Rank(number, environment, self._prefix, self._imports))
        self._collect(time.monotonic() + START_TIMEOUT_S, f"initialisation of {self._host}")

    def _torch_variables(self) -> list[dict[str, str]]:
        """Environment of every rank of torch.distributed; they meet at a file, which needs no free port."""
        self._folder = tempfile.TemporaryDirectory()
        meeting = f"file://{self._folder.name}/meeting"
        return [
            {"RANK": str(k), "WORLD_SIZE": str(self.size), "TEST_INIT_METHOD": meeting, "GLOO_SOCKET_IFNAME": "lo"}
            for k in range(self.size)
        ]

    def _horovod_variables(self) -> list[dict[str, str]]:
        """Environment of every Horovod rank."""
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
        from horovod.runner.http.http_server import RendezvousServer

        self._rendezvous = RendezvousServer(0)
        slots = get_host_assignments(parse_hosts(self._hosts), self.size)
        port = self._rendezvous.start()
        self._rendezvous.init(slots)
        return [
            {
                "HOROVOD_HOSTNAME": str(slot.hostname),
                "HOROVOD_RANK": str(slot.rank),
                "HOROVOD_SIZE": str(slot.size),
                "HOROVOD_LOCAL_RANK": str(slot.local_rank),
                "HOROVOD_LOCAL_SIZE": str(slot.local_size),
                "HOROVOD_CROSS_RANK": str(slot.cross_rank),
                "HOROVOD_CROSS_SIZE": str(slot.cross_size),
                "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
                "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
                "HOROVOD_GLOO_IFACE": "lo",
                "HOROVOD_CONTROLLER": "gloo",
                "HOROVOD_CPU_OPERATIONS": "gloo",
            }
            for slot in slots
        ]

    def _collect(self, deadline: float, what: str) -> list[Outcome]:
        """One outcome of each rank."""
        outcomes: dict[int, Outcome] = {}
        waiting = {rank.connection: k for k, rank in enumerate(self._ranks)}
        while waiting:
            answered = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not answered:
                self._give_up(f"{what}: ranks {sorted(waiting.values())} did not finish in time", outcomes)
            for connection in answered:
                number = waiting.pop(connection)
                try:
                    outcomes[number] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    self._give_up(f"{what}: rank {number} died", outcomes)
        return [outcomes[k] for k in range(self.size)]

    def _give_up(self, reason: str, outcomes: Mapping[int, Outcome]) -> NoReturn:
        for rank in self._ranks:
            rank.show_stack()
        time.sleep(_TRACEBACK_GRACE_S)
        for rank in self._ranks:
            rank.stop(grace_s=0.0)
        logs = "\n".join(f"--- rank {k}\n{rank.log()}" for k, rank in enumerate(self._ranks))
        self.close()
        answers = "\n".join(f"rank {k}: {o.error or 'ok'}\n{o.report}" for k, o in outcomes.items())
        raise RankError(f"{reason}\n{answers}\n{logs}")


class _Rank:
    """One process, and the pipe to it."""

    def __init__(
        self, number: int, environment: Mapping[str, str], prefix: Sequence[str], imports: Sequence[str]
    ) -> None:
        self.connection, theirs = Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the rank lives
        self._process: subprocess.Popen[bytes] | ForkedProcess
        with theirs:
            if can_fork() and not prefix:
                self._process = server_of(environment, imports, number).fork(
                    environment, theirs.fileno(), self._log.fileno()
                )
                return
            command = [*prefix, sys.executable, "-m", "tests.launcher", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, env=dict(environment), pass_fds=[theirs.fileno()], stdout=self._log, stderr=self._log, cwd=ROOT
            )

    def show_stack(self) -> None:
        """Ask a living rank to write its stack into its log."""
        self._process.send_signal(signal.SIGUSR1)

    def stop(self, grace_s: float) -> None:
        """Wait for the process, then kill it."""
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.connection.close()

    def log(self, limit: int = 4000) -> str:
        """The end of what the rank has printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-limit:]


def run_ranks(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    timeout: float = DEFAULT_TIMEOUT_S,
    environment: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call a function in `size` new ranks and return what each of them returned; see `RankPool.run`."""
    with RankPool(size, environment) as ranks:
        return ranks.run(function, *args, timeout=timeout, **kwargs)


def horovodrun(
    command: Sequence[str], size: int, timeout: float = 120.0, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program under `horovodrun -np size --gloo`; its output is captured, its exit status not checked.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds; all of its processes are stopped.
    """
    launcher = Path(sys.executable).with_name("horovodrun")
    full = [str(launcher), "-np", str(size), "--gloo", "--network-interface", "lo", *command]
    process = subprocess.Popen(
        full,
        env={**child_environment(), **(environment or {})},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # horovodrun passes it on to its ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(full, process.returncode, output, "")


def child_environment() -> dict[str, str]:
    """This process's environment, set up for ranks: one thread each, the checkout importable."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "HOROVOD_DYNAMIC_PROCESS_SETS": "1",
    }


def serve(file: int) -> None:
    """A rank's main loop: answer the calls that come through a pipe, until an empty one."""
    with contextlib.suppress(EOFError):
        _serve(Connection(file))


def _serve(connection: Connection) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    modules: dict[str, ModuleType] = {}
    with connection:
        outcome = _attempt(_initialise)
        connection.send_bytes(pickle.dumps(outcome))
        while call := connection.recv_bytes():
            path, name, args, kwargs = pickle.loads(call)
            outcome = _attempt(partial(_call, modules, path, name, args, kwargs))
            connection.send_bytes(pickle.dumps(outcome))
    _shut_down()


def _initialise() -> None:
    import torch

    torch.set_num_threads(1)
    meeting = os.environ.get("TEST_INIT_METHOD")
    if meeting is None:
        import horovod.torch as hvd

        hvd.init()
    else:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)


def _shut_down() -> None:
    if "TEST_INIT_METHOD" in os.environ:
        import torch

        torch.distributed.destroy_process_group()
    else:
        import horovod.torch as hvd

        hvd.shutdown()


def _call(modules: dict[str, ModuleType], path: str, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return getattr(_load(modules, path), name)(*args, **kwargs)


def _load(modules: dict[str, ModuleType], path: str) -> ModuleType:
    if path not in modules:
        name = f"rank_module_{Path(path).stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(path)
        modules[path] = module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return modules[path]


def _attempt(call: Callable[[], Any]) -> Outcome:
    try:
        value = call()
        pickle.dumps(value)
    except Exception as error:  # whatever a test function raises must reach the test
        return Outcome(error=f"{type(error).__name__}: {error}", report=traceback.format_exc())
    return Outcome(value=value)


if __name__ == "__main__":
    # Outcomes are pickled by the name under which the caller knows their class.
    from tests import launcher

    launcher.serve(int(sys.argv[1]))
