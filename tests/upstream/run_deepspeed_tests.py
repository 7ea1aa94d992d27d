"""Runs DeepSpeed's own ZeRO tests without our plug-in and with it, and says which fail only with it.

    git clone https://github.com/deepspeedai/DeepSpeed       # or any checkout that holds tests/unit
    python -m tests.upstream.run_deepspeed_tests DeepSpeed --bits 32

Not part of the continuous integration: it needs that checkout, of about the installed DeepSpeed's version (take its
folder `tests` alone, else its own `deepspeed` is what gets tested), and half an hour. The tests run on the CPU over
gloo, where some of them fail or skip anyway. At 32 bits nothing is quantized, and every test must end as it does
without the plug-in; at fewer bits those fail that compare with exact gradients. How the plug-in gets into the tests is
said in `deepspeed_site/sitecustomize.py`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.launcher import child_environment
from tests.upstream.deepspeed_site.sitecustomize import BITS_VARIABLE, COUNT_VARIABLE

_ZERO = "v1/zero/test_zero.py"
TESTS = (
    "v1/zero/test_zero_coalesce_grad_reduction.py",
    *(
        f"{_ZERO}::{name}"  # all of the file that are not about ZeRO 3 alone
        for name in (
            "TestGradientAllreduceOp",
            "TestGradientAllreduceOpTraining",
            "TestBF16OptimizerGradReduction",
            "TestZeroUnbalancedGradients",
            "TestZeroToFP32",
            "TestIncorectAllgatherBucketSize",
            "TestPartitionNcclAlignment",
            "TestZeroOffloadStage1",
            "TestZeroAdamOptimizerStepCount",
            "TestZeroFrozenWeights",
            "TestZeroOffloadOptim",
            "TestZeroPartitionCache",
            "TestEmptyParameterGroup",
        )
    ),
    "v1/moe/test_moe.py",
    "v1/zero/test_zero_cpu_offload_grad_accum.py",
    "v1/zero/test_zero2_offload_multi_backward.py",
)
SITE = Path(__file__).parent / "deepspeed_site"


@dataclass(frozen=True)
class Run:
    """What became of the tests of one file or class.

    Attributes:
        outcomes: by test: "passed", "failed", "error" or "skipped".
        compressed_steps: how many optimizer steps went through the plug-in, over all processes.
        seconds: of wall-clock time.
        output: the end of what pytest has printed.
    """

    outcomes: dict[str, str]
    compressed_steps: int
    seconds: float
    output: str

    def counts(self) -> dict[str, int]:
        """How many tests ended how."""
        return dict(Counter(self.outcomes.values()))


def run_tests(name: str, checkout: Path, bits: int | None, timeout: float, chosen: str | None = None) -> Run:
    """Run one file or class.

    Args:
        name: under tests/unit.
        checkout: root of a checkout of DeepSpeed.
        bits: of the plug-in; None for no plug-in.
        timeout: seconds.
        chosen: expression for pytest's -k.
    """
    tests = checkout.resolve() / "tests"
    with tempfile.TemporaryDirectory() as folder:
        counts, report = Path(folder, "counts"), Path(folder, "report.xml")
        environment = child_environment()
        environment |= {
            "PYTHONPATH": os.pathsep.join([str(SITE), str(tests), environment["PYTHONPATH"]]),
            "DS_ACCELERATOR": "cpu",
            "LOCAL_SIZE": "2",
            "DS_DISABLE_REUSE_DIST_ENV": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            BITS_VARIABLE: "none" if bits is None else str(bits),
            COUNT_VARIABLE: str(counts),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", "--rootdir", str(tests)]
        command += ["--junitxml", str(report), *(["-k", chosen] if chosen else []), str(tests / "unit" / name)]
        begin = time.monotonic()
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False
        )
        lines = counts.read_text().splitlines() if counts.is_file() else []
        outcomes = _outcomes(report)
    steps = sum(int(line.split()[1]) for line in lines)
    return Run(outcomes, steps, round(time.monotonic() - begin, 1), done.stdout[-6000:] + done.stderr[-2000:])


def _outcomes(report: Path) -> dict[str, str]:
    """How each test ended, from pytest's report."""
    words = {"failure": "failed", "error": "error", "skipped": "skipped"}
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        found[name] = next((words[child.tag] for child in case if child.tag in words), "passed")
    return found


def main() -> int:
    """Run the tests and print a table; returns how many end worse with the plug-in than without."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, help="root of a checkout of DeepSpeed")
    parser.add_argument("--bits", type=int, default=32, help="bits of the plug-in (default 32)")
    parser.add_argument(
        "--only", nargs="+", default=TESTS, metavar="TEST", help="tests to run (default all named here)"
    )
    parser.add_argument("-k", metavar="EXPRESSION", help="run only tests whose names fit, as pytest's -k")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds per file or class (default 3600)")
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    for name in arguments.only:
        plain, ours = (
            run_tests(name, arguments.checkout, bits, arguments.timeout, arguments.k) for bits in (None, arguments.bits)
        )
        worse = [test for test, end in ours.outcomes.items() if end != plain.outcomes.get(test) and end != "passed"]
        print(f"{name}\n  without: {plain.counts()}, {plain.seconds} s")
        print(f"  with:    {ours.counts()}, {ours.seconds} s, {ours.compressed_steps} steps through the plug-in")
        for test in worse:
            print(f"  {ours.outcomes[test]} only with the plug-in: {test}")
        if worse or not ours.outcomes:
            print(ours.output)
        sys.stdout.flush()
        results.append(
            {
                "tests": name,
                "bits": arguments.bits,
                "without": plain.counts(),
                "with": ours.counts(),
                "worse_with": worse,
                "compressed_steps": ours.compressed_steps,
                "fail_anyway": [test for test, end in plain.outcomes.items() if end in ("failed", "error")],
            }
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return sum(len(result["worse_with"]) for result in results)


if __name__ == "__main__":
    sys.exit(main())
