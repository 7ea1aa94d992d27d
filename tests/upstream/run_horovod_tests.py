"""Runs Horovod's own optimizer tests with our compressor substituted.

    git clone https://github.com/horovod/horovod            # or any checkout that holds test/parallel/test_torch.py
    python -m tests.upstream.run_horovod_tests horovod

Not part of the continuous integration: it needs that checkout, because Horovod's source distribution holds no tests; an
environment in which Horovod runs; and the root of this repository as working directory. Every test runs by itself under
`horovodrun -np 2 --gloo`, because Horovod's tests start Horovod and shut it down, which aborts when repeated in one
process, with and without our compressor. Warnings stay on: one test counts them. How the compressor gets into the tests
is said in `horovod_plugin.py`. `--plain` runs the same tests without it, to see what fails anyway.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from tests.launcher import horovodrun
from tests.upstream.horovod_plugin import BITS_VARIABLE, EXCHANGE_VARIABLE, ROUTE_VARIABLE

TESTS = (
    "test_force_allreduce",
    "test_dynamic_requires_grad",
    "test_gradient_clipping",
    "test_optimizer_process_sets",
    "test_no_named_parameters",
    "test_optimizer_no_named_parameters",
    "test_missing_named_parameters",
    "test_duplicate_names",
    "test_broadcast_state",
    "test_broadcast_state_options",
    "test_broadcast_state_no_grad",
    "test_sparse_embeddings",
    "test_synchronize_step_warning",
)
PLUGIN = "tests.upstream.horovod_plugin"


def run_test(
    name: str, checkout: Path, size: int, exchange: str | None, route: str, bits: int, timeout: float
) -> dict[str, Any]:
    """Run one test; returns its outcome on every rank, and what went through the compressor.

    Args:
        name: of the test.
        checkout: root of a checkout of Horovod.
        size: number of ranks.
        exchange: of the compressor; None for no compressor.
        route: "stock" for Horovod's optimizer, "overlap" for ours.
        bits: of the compressor.
        timeout: seconds.
    """
    path = checkout.resolve() / "test" / "parallel" / "test_torch.py"
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", PLUGIN]
    command += ["--rootdir", str(checkout.resolve()), f"{path}::TorchTests::{name}"]
    environment = {BITS_VARIABLE: str(bits), EXCHANGE_VARIABLE: exchange or "", ROUTE_VARIABLE: route}
    begin = time.monotonic()
    done = horovodrun(command, size, timeout, environment)
    passed = len(re.findall(r"\b1 passed", done.stdout))
    steps = [int(count) for count in re.findall(r"compressed steps: (\d+)", done.stdout)]
    return {
        "test": name,
        "passed": passed == size and done.returncode == 0,
        "skipped": len(re.findall(r"\b1 skipped", done.stdout)) == size,
        "compressed_steps": steps,
        "seconds": round(time.monotonic() - begin, 1),
        "output": done.stdout,
    }


def main() -> int:
    """Run the tests and print a table; returns the number of failed ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, help="root of a checkout of Horovod")
    parser.add_argument("--size", type=int, default=2, help="number of ranks (default 2)")
    parser.add_argument("--exchange", default="by_bytes", choices=["auto", "allgather", "reduce_scatter", "by_bytes"])
    parser.add_argument("--route", default="stock", choices=["stock", "overlap"], help="whose optimizer exchanges")
    parser.add_argument("--bits", type=int, default=5, help="bits of the compressor (default 5)")
    parser.add_argument("--plain", action="store_true", help="run the tests without our compressor")
    parser.add_argument(
        "--only", nargs="+", default=TESTS, metavar="TEST", help="tests to run (default all named here)"
    )
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds per test (default 300)")
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    results = []
    for name in arguments.only:
        exchange = None if arguments.plain else arguments.exchange
        options = (exchange, arguments.route, arguments.bits, arguments.timeout)
        result = run_test(name, arguments.checkout, arguments.size, *options)
        results.append(result)
        word = "passed" if result["passed"] else "skipped" if result["skipped"] else "FAILED"
        print(
            f"{word:8} {name:40} {result['seconds']:6.1f} s   compressed steps {result['compressed_steps']}", flush=True
        )
        if word == "FAILED":
            print(result["output"])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))
    return sum(not result["passed"] and not result["skipped"] for result in results)


if __name__ == "__main__":
    sys.exit(main())
