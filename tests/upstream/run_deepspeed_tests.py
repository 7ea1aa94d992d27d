"""Runs DeepSpeed's own ZeRO tests with our plug-in substituted.

    git clone https://github.com/deepspeedai/DeepSpeed       # or any checkout that holds tests/unit
    python -m tests.upstream.run_deepspeed_tests DeepSpeed --bits 32

Not part of the continuous integration: it needs that checkout, of about the installed DeepSpeed's version (take its
folder `tests` alone, else its own `deepspeed` is what gets tested). The tests run on the CPU over gloo. At 32 bits
nothing is quantized, and they must pass; at fewer bits those fail that compare with exact gradients. `--plain` runs the
same tests without the plug-in, to see what fails anyway. How the plug-in gets into the tests is said in
`deepspeed_site/sitecustomize.py`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.launcher import child_environment
from tests.upstream.deepspeed_site.sitecustomize import BITS_VARIABLE, COUNT_VARIABLE

TESTS = (
    "v1/zero/test_zero_coalesce_grad_reduction.py",
    "v1/zero/test_zero.py::TestGradientAllreduceOp",
    "v1/zero/test_zero.py::TestGradientAllreduceOpTraining",
    "v1/zero/test_zero.py::TestBF16OptimizerGradReduction",
    "v1/zero/test_zero.py::TestZeroUnbalancedGradients",
    "v1/zero/test_zero.py::TestZeroToFP32",
    "v1/zero/test_zero.py::TestIncorectAllgatherBucketSize",
    "v1/zero/test_zero.py::TestPartitionNcclAlignment",
)
SITE = Path(__file__).parent / "deepspeed_site"


def run_tests(name: str, checkout: Path, bits: int | None, timeout: float, chosen: str | None = None) -> dict[str, Any]:
    """Run one file or class; returns what became of its tests, and what went through the plug-in.

    Args:
        name: under tests/unit.
        checkout: root of a checkout of DeepSpeed.
        bits: of the plug-in; None for no plug-in.
        timeout: seconds.
        chosen: expression for pytest's -k.
    """
    tests = checkout.resolve() / "tests"
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder, "counts")
        environment = child_environment()
        environment |= {
            "PYTHONPATH": os.pathsep.join([str(SITE), str(tests), environment["PYTHONPATH"]]),
            "DS_ACCELERATOR": "cpu",
            "LOCAL_SIZE": "2",
            "DS_DISABLE_REUSE_DIST_ENV": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            BITS_VARIABLE: "" if bits is None else str(bits),
            COUNT_VARIABLE: str(counts),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", "--rootdir", str(tests)]
        begin = time.monotonic()
        done = subprocess.run(
            [*command, *(["-k", chosen] if chosen else []), str(tests / "unit" / name)],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        lines = counts.read_text().splitlines() if counts.is_file() else []
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    return {
        "tests": name,
        **{word: found.get(word, 0) for word in ("passed", "failed", "skipped", "error")},
        "compressed_steps": sum(int(line.split()[1]) for line in lines),
        "seconds": round(time.monotonic() - begin, 1),
        "output": done.stdout[-6000:] + done.stderr[-2000:],
    }


def main() -> int:
    """Run the tests and print a table; returns the number of failed ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, help="root of a checkout of DeepSpeed")
    parser.add_argument("--bits", type=int, default=32, help="bits of the plug-in (default 32)")
    parser.add_argument("--plain", action="store_true", help="run the tests without the plug-in")
    parser.add_argument(
        "--only", nargs="+", default=TESTS, metavar="TEST", help="tests to run (default all named here)"
    )
    parser.add_argument("-k", metavar="EXPRESSION", help="run only tests whose names fit, as pytest's -k")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds per file or class (default 1800)")
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    results = []
    for name in arguments.only:
        bits = None if arguments.plain else arguments.bits
        result = run_tests(name, arguments.checkout, bits, arguments.timeout, arguments.k)
        results.append(result)
        print(" ".join(f"{key}={value}" for key, value in result.items() if key != "output"), flush=True)
        if result["failed"] or result["error"]:
            print(result["output"])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))
    return sum(result["failed"] + result["error"] for result in results)


if __name__ == "__main__":
    sys.exit(main())
