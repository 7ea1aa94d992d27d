"""Squared norms over a model."""

import math

import pytest
import torch

from hvd_qoda.optim.norms import SquaredNorm


def norm_of(*tensors: torch.Tensor) -> float:
    squared = SquaredNorm()
    for tensor in tensors:
        squared.add(tensor)
    return squared.value()


def test_all_elements_count_whatever_shape_and_dtype() -> None:
    tensors = [torch.full((3, 2), 2.0), torch.tensor(3.0, dtype=torch.bfloat16), torch.zeros(0), torch.ones(4).double()]
    assert norm_of(*tensors) == pytest.approx(24.0 + 9.0 + 4.0, rel=1e-15)
    assert norm_of() == 0.0


def test_float32_sums_neither_lose_digits_nor_overflow() -> None:
    many = torch.full((1_000_000,), 0.1)
    exact = 1_000_000 * float(many[0]) ** 2
    assert norm_of(many) == pytest.approx(exact, rel=1e-10)
    assert norm_of(torch.full((4,), 1e30)) == pytest.approx(4e60, rel=1e-6)
    assert norm_of(torch.full((4,), 1e-30)) == pytest.approx(4e-60, rel=1e-6)


def test_non_finite_elements_show() -> None:
    assert math.isinf(norm_of(torch.ones(3), torch.tensor([math.inf])))
    assert math.isnan(norm_of(torch.tensor([math.nan]), torch.ones(3)))
