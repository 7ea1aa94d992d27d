"""A few hundred cases of `fuzz.py`; it is a program for as many as one likes."""

import dataclasses

import pytest
import torch

from qoda_kernels import codec
from qoda_kernels.cpu.level_tables import KernelTable
from qoda_kernels.reference import RoundingTable
from tests.kernels.fuzz import Variant, run

# Kernels that other tests compile too.
VARIANTS = [
    Variant(4, "uniform", torch.float32, False, False),
    Variant(5, "minimum", torch.float16, False, False),
    Variant(8, "close", torch.float32, False, False),
    Variant(4, "uniform", torch.float32, False, True),
    Variant(5, "minimum", torch.bfloat16, True, True),
    Variant(4, "", torch.float32, False, False, "nearest"),
    Variant(5, "minimum", torch.float32, False, True, "stochastic"),
]


def test_random_cases_have_the_references_bits() -> None:
    assert run(300, 12345, VARIANTS) == 300


def test_a_wrong_kernel_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the line of a codebook's last interval is half an index too high."""
    right = codec.kernel_table

    def wrong(table: RoundingTable, method: str) -> KernelTable:
        found = right(table, method)
        lines = found.lines.copy()
        lines[[-3, -1]] += 2.0**12  # it stands there twice
        return dataclasses.replace(found, lines=lines)

    monkeypatch.setattr(codec, "kernel_table", wrong)
    with pytest.raises(AssertionError, match="messages differ"):
        run(40, 7, VARIANTS[2:3])
