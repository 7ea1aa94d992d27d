"""Start a training program under horovodrun on this machine, watch it, and end it whatever happens."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

STEPS_FILE = "steps.jsonl"
SUMMARY_FILE = "summary.json"
LOG_FILE = "output.log"
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 15.0
_TAIL_LINES = 40
_LOOPBACK = "lo"
_FROM_RANK = re.compile(r"\[\d+\]<std(out|err)>:")


class JobError(RuntimeError):
    """A run that failed or took too long; the message ends with the end of its output."""


@dataclass(frozen=True)
class Job:
    """A program to run on `ranks` processes of this machine, which writes its records to `run_dir`.

    `hosts` are names of this machine with numbers of ranks, such as "localhost:2,127.0.0.1:2", which Horovod takes for
    different machines; None: one.
    """

    program: Path
    arguments: tuple[str, ...]
    ranks: int
    run_dir: Path
    timeout_seconds: float = 900.0
    hosts: str | None = None

    def command(self) -> list[str]:
        """What is executed."""
        launcher = [horovodrun(), "--gloo", "--network-interfaces", _LOOPBACK, "-np", str(self.ranks)]
        launcher += [] if self.hosts is None else ["-H", self.hosts]
        return [*launcher, sys.executable, str(self.program), *self.arguments, "--run-dir", str(self.run_dir)]


def horovodrun() -> str:
    """The launcher installed beside this Python, or the one on the PATH; raises JobError where there is none."""
    beside = Path(sys.executable).with_name("horovodrun")
    found = str(beside) if beside.is_file() else shutil.which("horovodrun")
    if found is None:
        raise JobError(
            "horovodrun is not installed: run launch/setup.sh, or launch/build_horovod.sh for your environment"
        )
    return found


def run_job(job: Job, on_step: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Run `job` to its end, calling `on_step` with each step's record; returns its summary.

    Raises JobError with the end of the output where a process fails or the time is over. Ends all processes that it
    started, also when it is interrupted.
    """
    job.run_dir.mkdir(parents=True, exist_ok=True)
    for old in (STEPS_FILE, SUMMARY_FILE):
        (job.run_dir / old).unlink(missing_ok=True)
    log = job.run_dir / LOG_FILE
    deadline = time.monotonic() + job.timeout_seconds
    records = _new_records(job.run_dir / STEPS_FILE)
    with log.open("wb") as output, _process(job, output) as process:
        while process.poll() is None:
            _hand_on(records, on_step)
            if time.monotonic() > deadline:
                raise JobError(_failure(job, log, f"did not end within {job.timeout_seconds:.0f} s"))
            time.sleep(_POLL_SECONDS)
    _hand_on(records, on_step)
    if process.returncode != 0:
        raise JobError(_failure(job, log, f"ended with exit status {process.returncode}"))
    summary: dict[str, Any] = json.loads((job.run_dir / SUMMARY_FILE).read_text())
    return summary


@contextmanager
def interrupt_on_terminate() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that what is running gets cleaned up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _process(job: Job, output: Any) -> Iterator[subprocess.Popen[bytes]]:
    threads = str(max(1, (os.cpu_count() or 1) // job.ranks))
    environment = {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads, **os.environ}
    # A session of its own, so that Ctrl-C reaches this program alone and the ranks end in one orderly way.
    process = subprocess.Popen(
        job.command(),
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask horovodrun to end its ranks; kill it if it does not (its helpers then end the ranks by themselves)."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _hand_on(records: Iterator[dict[str, Any] | None], on_step: Callable[[dict[str, Any]], None] | None) -> None:
    for record in records:
        if record is None:
            return
        if on_step is not None and record["event"] == "step":
            on_step(record)


def _new_records(path: Path) -> Iterator[dict[str, Any] | None]:
    """Records as they are appended to `path`; None whenever there is no further whole line yet. Never ends."""
    position = 0
    while True:
        text = b""
        if path.is_file():
            with path.open("rb") as file:
                file.seek(position)
                text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        position += len(whole)
        for line in whole.splitlines():
            yield json.loads(line)
        yield None


def _failure(job: Job, log: Path, what: str) -> str:
    lines = log.read_text(errors="replace").splitlines()
    # horovodrun prefixes what ranks print; what it adds itself after a failure is a long traceback of its own.
    shown = [line for line in lines if _FROM_RANK.match(line)] or lines
    quoted = "\n".join(f"  | {line}" for line in shown[-_TAIL_LINES:]) or "  | (no output)"
    return f"{' '.join(job.command())}\n{what}. The end of its output ({log}):\n{quoted}"


def program_path(name: str) -> Path:
    """The program `name` of this directory."""
    return Path(__file__).resolve().with_name(name)
