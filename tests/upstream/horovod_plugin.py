"""Pytest plugin for `run_horovod_tests.py`: Horovod's own tests get our compressor where they name none.

- `hvd.DistributedOptimizer` is wrapped: every optimizer made without `compression` quantizes all of its parameters,
  small ones and biases included, at the bits and by the exchange that the environment variables below say (no exchange:
  nothing is wrapped), under Horovod's optimizer or ours. At the end the number of steps that went through our
  compressor is printed, so that a test cannot pass by not using it.
- The package `mock`, which Horovod's helpers import, is Python's own `unittest.mock`.
- `torch.optim.Muon` is hidden: it takes matrices only, which breaks Horovod's loops over all optimizers.
"""

import functools
import os
import sys
import unittest.mock
from typing import Any

import horovod.torch as hvd
import torch

from hvd_qoda.compression import Compression
from hvd_qoda.distributed_optimizer import DistributedOptimizer
from hvd_qoda.horovod import QodaCompressor

BITS_VARIABLE, EXCHANGE_VARIABLE = "HVD_QODA_UPSTREAM_BITS", "HVD_QODA_UPSTREAM_EXCHANGE"
ROUTE_VARIABLE = "HVD_QODA_UPSTREAM_ROUTE"  # "stock" or "overlap"

_made: list[QodaCompressor] = []
_original = hvd.DistributedOptimizer


@functools.wraps(_original)
def _with_our_compressor(optimizer: Any, named_parameters: Any = None, compression: Any = None, **options: Any) -> Any:
    named = None if named_parameters is None else list(named_parameters)
    if compression is None:
        groups = enumerate(optimizer.param_groups)
        unnamed = [(f"group{i}.{j}", p) for i, group in groups for j, p in enumerate(group["params"])]
        compression = hvd.Compression.none
        # Names that Horovod itself refuses are left for it to refuse.
        if named is None or len({name for name, _ in named}) == len(named):
            compression = Compression.qoda(
                unnamed if named is None else named,
                process_set=options.get("process_set"),
                layers=[{"name": "*", "bits": int(os.environ[BITS_VARIABLE])}],
                exchange=os.environ[EXCHANGE_VARIABLE],
            )
            _made.append(compression)
        if os.environ.get(ROUTE_VARIABLE) == "overlap" and compression in _made:
            return DistributedOptimizer(optimizer, named, compression, **options)
    return _original(optimizer, named_parameters=named, compression=compression, **options)


def pytest_configure() -> None:
    """Substitute before any test module is imported."""
    sys.modules.setdefault("mock", unittest.mock)
    if os.environ.get(EXCHANGE_VARIABLE):
        hvd.DistributedOptimizer = _with_our_compressor
    muon = getattr(torch.optim, "Muon", None)
    if muon is not None:
        muon.__module__ = "hidden"  # Horovod's loops look for optimizers of torch.optim


def pytest_unconfigure() -> None:
    """Tell how much of the test went through our compressor."""
    print(f"compressors: {len(_made)}, compressed steps: {sum(compressor.step for compressor in _made)}")
