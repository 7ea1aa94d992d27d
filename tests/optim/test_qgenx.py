"""What is Q-GenX's own: two phases, the factor K, the guard against unfinished exchanges."""

import pytest
import torch

from hvd_qoda.errors import ConfigError, UnsupportedError
from hvd_qoda.optim import QGenX, WorkerNorms


def one_parameter(value: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor([value], dtype=torch.float64))


def test_one_step_by_hand() -> None:
    p = one_parameter(1.0)
    optimizer = QGenX([p], lr=0.5, world_size=2)
    p.grad = torch.full_like(p, 3.0)
    optimizer.extrapolate()
    assert p.item() == pytest.approx(1 - 0.5 * 2 * 3)
    p.grad = torch.full_like(p, 4.0)
    optimizer.step()
    gamma = 2 * (1 + 4 * 1.0) ** -0.5
    assert p.item() == pytest.approx(1 - 0.5 * gamma * 4, rel=1e-14)
    assert optimizer.step_sizes() == pytest.approx({"gamma": 0.5 * gamma, "eta": 0.5 * gamma})
    p.grad = torch.full_like(p, 1.0)
    optimizer.extrapolate()
    assert p.item() == pytest.approx(1 - 0.5 * gamma * 5, rel=1e-14)


def test_a_changed_base_rate_does_not_move_the_point_where_the_gradient_was_taken() -> None:
    p = one_parameter(1.0)
    optimizer = QGenX([p])
    for gradient in (2.0, 3.0):
        p.grad = torch.full_like(p, gradient)
        optimizer.extrapolate() if gradient == 2.0 else optimizer.step()
    here = p.item()
    optimizer.param_groups[0]["lr"] = 0.25
    p.grad = torch.full_like(p, 1.0)
    optimizer.extrapolate()
    assert p.item() == pytest.approx(here - 0.25 * 2**-0.5, rel=1e-14)


def test_worker_norms_are_asked_once_per_step() -> None:
    p, calls = one_parameter(1.0), []

    def source() -> WorkerNorms:
        calls.append(1)
        return WorkerNorms(squared_norms=100.0, squared_changes=3.0, world_size=2)

    optimizer = QGenX([p], world_size=2, sum_over="workers", gradient_scale=1.0, worker_norms=source)
    p.grad = torch.ones_like(p)
    optimizer.extrapolate()
    assert not calls
    optimizer.step()
    assert len(calls) == 1
    assert optimizer.step_sizes()["gamma"] == pytest.approx(2 * (1 + 3) ** -0.5)


def test_phases_out_of_order_are_refused() -> None:
    p = one_parameter(1.0)
    optimizer = QGenX([p])
    p.grad = torch.ones_like(p)
    with pytest.raises(UnsupportedError, match="extrapolate"):
        optimizer.step()
    optimizer.extrapolate()
    with pytest.raises(UnsupportedError, match="twice"):
        optimizer.extrapolate()
    optimizer.step()
    with pytest.raises(UnsupportedError, match="extrapolate"):
        optimizer.step()


def test_a_closure_after_extrapolate_is_called_once() -> None:
    p, calls = one_parameter(1.0), []
    optimizer = QGenX([p])
    p.grad = torch.ones_like(p)
    optimizer.extrapolate()

    def closure() -> float:
        calls.append(p.item())
        p.grad = torch.ones_like(p)
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert calls == [0.0]


def test_a_source_that_counts_other_workers_is_an_error() -> None:
    p = one_parameter(1.0)
    optimizer = QGenX(
        [p], world_size=4, sum_over="workers", gradient_scale=1.0, worker_norms=lambda: WorkerNorms(1.0, 1.0, 2)
    )
    p.grad = torch.ones_like(p)
    optimizer.extrapolate()
    with pytest.raises(ConfigError, match=r"world_size=4.*counts 2 workers"):
        optimizer.step()


@pytest.mark.parametrize("world_size", [0, -1, 1.5])
def test_impossible_world_sizes_are_refused(world_size: float) -> None:
    with pytest.raises(ConfigError, match="world_size"):
        QGenX([one_parameter(1.0)], world_size=world_size)


def test_gradients_that_are_still_being_exchanged_are_refused() -> None:
    p = one_parameter(1.0)
    optimizer = QGenX([p])
    p.grad = torch.ones_like(p)
    optimizer._handles = {p: "an exchange that backward has started"}
    with pytest.raises(UnsupportedError, match="synchronize"):
        optimizer.extrapolate()
    optimizer._handles = {}
    optimizer.extrapolate()
    optimizer._handles = {p: "another"}
    with pytest.raises(UnsupportedError, match="synchronize"):
        optimizer.step()


def test_a_parameter_that_gets_its_first_gradient_in_the_second_phase() -> None:
    p, q = one_parameter(1.0), one_parameter(5.0)
    optimizer = QGenX([p, q])
    p.grad = torch.ones_like(p)
    optimizer.extrapolate()
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    assert q.item() == pytest.approx(5 - 2**-0.5)
    assert int(optimizer.state[q]["step"]) == 1
