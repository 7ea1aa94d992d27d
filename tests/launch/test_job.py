"""Runs started by other programs: watched, reported when they fail, ended when interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("horovod.torch")

from launch.train.job import LOG_FILE, STEPS_FILE, SUMMARY_FILE, Job, JobError, run_job
from tests.launcher import heed_interrupts

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, os, sys, time
from pathlib import Path
run_dir = Path(sys.argv[sys.argv.index("--run-dir") + 1])
rank = int(os.environ["HOROVOD_RANK"])
(run_dir / f"pid-{{rank}}").write_text(str(os.getpid()))
{body}
"""
WRITES_RECORDS = f"""
if rank == 0:
    with open(run_dir / "{STEPS_FILE}", "w") as file:
        print(json.dumps({{"event": "start"}}), file=file)
        for step in range(3):
            print(json.dumps({{"event": "step", "step": step}}), file=file, flush=True)
    (run_dir / "{SUMMARY_FILE}").write_text(json.dumps({{"ranks": int(os.environ["HOROVOD_SIZE"])}}))
"""

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


def job(tmp_path: Path, body: str, timeout_seconds: float = 60.0) -> Job:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(body=body))
    return Job(program, (), 2, tmp_path / "run", timeout_seconds)


def living(run_dir: Path) -> list[int]:
    """Those of the ranks' processes that still run."""
    numbers = [int(path.read_text()) for path in run_dir.glob("pid-*")]
    assert len(numbers) == 2
    return [number for number in numbers if Path(f"/proc/{number}/cmdline").is_file()]


def test_records_are_handed_on_and_the_summary_returned(tmp_path: Path) -> None:
    seen: list[int] = []
    summary = run_job(job(tmp_path, WRITES_RECORDS), lambda record: seen.append(record["step"]))
    assert seen == [0, 1, 2]
    assert summary == {"ranks": 2}


def test_a_failing_rank_is_reported_with_its_output(tmp_path: Path) -> None:
    body = "if rank == 1: raise RuntimeError('the reason')\ntime.sleep(60)"
    with pytest.raises(JobError, match=r"(?s)ended with exit status.*the reason") as caught:
        run_job(job(tmp_path, body))
    assert "horovod/runner" not in str(caught.value), "horovodrun's own traceback hides the rank's"
    assert living(tmp_path / "run") == []


def test_a_run_that_takes_too_long_is_ended_and_reported(tmp_path: Path) -> None:
    body = "print('still at it', flush=True)\ntime.sleep(600)"
    with pytest.raises(JobError, match=r"(?s)did not end within 8 s.*still at it"):
        run_job(job(tmp_path, body, timeout_seconds=8.0))
    assert living(tmp_path / "run") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_all_processes_end_when_the_demo_is_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    run_dir = tmp_path / "demo"
    command = [sys.executable, "launch/train/demo.py", "--steps", "100000", "--run-dir", str(run_dir)]
    with (tmp_path / "output").open("wb") as output:
        demo = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )
        try:
            steps = run_dir / "fp32" / STEPS_FILE
            deadline = time.monotonic() + 150
            while not (steps.is_file() and steps.stat().st_size > 4000):
                assert demo.poll() is None, (tmp_path / "output").read_text()
                assert time.monotonic() < deadline, (run_dir / "fp32" / LOG_FILE).read_text()
                time.sleep(0.1)
            ranks = training_processes(run_dir)
            assert len(ranks) >= 2
            demo.send_signal(number)
            assert demo.wait(timeout=40) == 130
        finally:
            if demo.poll() is None:
                os.killpg(demo.pid, signal.SIGKILL)
                demo.wait()
                for pid in training_processes(run_dir):
                    os.kill(pid, signal.SIGKILL)
    assert training_processes(run_dir) == []
    assert "interrupted" in (tmp_path / "output").read_text()


def training_processes(run_dir: Path) -> list[int]:
    """Processes whose command line names `run_dir`, but for the demo itself."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            arguments = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if str(run_dir).encode() in arguments and b"demo.py" not in arguments:
            found.append(int(entry.name))
    return found


def test_records_cut_in_the_middle_of_a_line_wait_for_the_rest(tmp_path: Path) -> None:
    body = f"""
if rank == 0:
    with open(run_dir / "{STEPS_FILE}", "w") as file:
        for part in ('{{"event": "step", ', '"step": 5}}', chr(10)):
            print(part, end="", file=file, flush=True)
            time.sleep(0.5)
    (run_dir / "{SUMMARY_FILE}").write_text("{{}}")
"""
    seen: list[str] = []
    run_job(job(tmp_path, body.replace("{{", "{").replace("}}", "}")), lambda record: seen.append(json.dumps(record)))
    assert [json.loads(text)["step"] for text in seen] == [5]
