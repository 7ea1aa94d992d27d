"""The record of the single workers' norms."""

import dataclasses

import pytest

from hvd_qoda.optim import WorkerNorms


def test_terms_are_scaled_by_the_squares_of_workers_and_gradient_scale() -> None:
    norms = WorkerNorms(squared_norms=32.0, squared_changes=8.0, world_size=4)
    assert norms.norm_term() == 2.0
    assert norms.change_term() == 0.5
    assert norms.norm_term(gradient_scale=3.0) == 18.0
    assert norms.change_term(gradient_scale=0.5) == 0.125


def test_norms_are_immutable() -> None:
    norms = WorkerNorms(1.0, 1.0, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        norms.world_size = 2


@pytest.mark.parametrize("values", [(-1.0, 0.0, 1), (0.0, -1.0, 1), (0.0, 0.0, 0)])
def test_impossible_norms_are_refused(values: tuple[float, float, int]) -> None:
    with pytest.raises(ValueError, match=r"WorkerNorms"):
        WorkerNorms(*values)
