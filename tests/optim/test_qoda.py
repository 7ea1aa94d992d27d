"""What is QODA's own: rates, the first point, base rates, worker norms."""

from itertools import pairwise

import pytest
import torch

from hvd_qoda.errors import ConfigError
from hvd_qoda.optim import QODA, WorkerNorms


def one_parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def step_with(optimizer: QODA, parameter: torch.nn.Parameter, gradient: float) -> float:
    parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    return parameter.item()


def test_equal_rates_by_hand() -> None:
    p = one_parameter(1.0)
    optimizer = QODA([p], lr=2.0)
    # g_1 = 3: the change is 9; eta = gamma = 10^-1/2; X = 1 - 2 * 3 / sqrt(10), minus as much again.
    assert step_with(optimizer, p, 3.0) == pytest.approx(1 - 2 * 2 * 3 * 10**-0.5, rel=1e-14)
    # g_2 = 4: the change is 1 more; Y = -7.
    assert step_with(optimizer, p, 4.0) == pytest.approx(1 - 2 * (7 + 4) * 11**-0.5, rel=1e-14)
    assert optimizer.step_sizes() == pytest.approx({"gamma": 2 * 11**-0.5, "eta": 2 * 11**-0.5})


def test_separated_rates_by_hand() -> None:
    p = one_parameter(1.0)
    optimizer = QODA([p], rates="separated", q_hat=0.2)
    # gamma_2 = eta_2 = 1: their sums end at s = 0.
    assert step_with(optimizer, p, 3.0) == pytest.approx(1 - 3 - 3, rel=1e-14)
    # At t = 2 the sums hold s = 1: |g_1|^2 = 9 and |X_1 - X_2|^2 = 9.
    gamma, eta = 10**-0.3, 19**-0.5
    assert step_with(optimizer, p, 4.0) == pytest.approx(1 - 7 * eta - 4 * gamma, rel=1e-14)
    # At t = 3 also s = 2: |g_2|^2 = 16 and |X_2 - X_3|^2.
    move = (-3 + 7 * eta) ** 2
    gamma, eta = 26**-0.3, (35 + move) ** -0.5
    assert step_with(optimizer, p, 0.0) == pytest.approx(1 - 7 * eta, rel=1e-14)


def test_the_sums_run_over_all_groups() -> None:
    p, q = one_parameter(0.0), one_parameter(0.0)
    optimizer = QODA([{"params": [p]}, {"params": [q], "lr": 0.5}])
    p.grad, q.grad = torch.full_like(p, 3.0), torch.full_like(q, 4.0)
    optimizer.step()
    assert p.item() == pytest.approx(-2 * 3 * 26**-0.5, rel=1e-14)
    assert q.item() == pytest.approx(-4 * 26**-0.5, rel=1e-14)
    assert optimizer.step_sizes() == pytest.approx(
        {"gamma": 26**-0.5, "eta": 26**-0.5, "gamma/1": 0.5 * 26**-0.5, "eta/1": 0.5 * 26**-0.5}
    )


def test_the_base_rate_scales_the_whole_way_from_the_first_point() -> None:
    p = one_parameter(1.0)
    optimizer = QODA([p])
    step_with(optimizer, p, 3.0)
    optimizer.param_groups[0]["lr"] = 0.0
    assert step_with(optimizer, p, 3.0) == 1.0


@pytest.mark.parametrize("rates", ["equal", "separated"])
def test_a_changed_base_rate_moves_the_iterate_by_what_separated_rates_count(rates: str) -> None:
    p = one_parameter(1.0)
    optimizer = QODA([p], rates=rates)
    whole = [1.0]
    for number, lr in enumerate((1.0, 0.5, 2.0)):
        optimizer.param_groups[0]["lr"] = lr
        g = float(number + 1)
        half = step_with(optimizer, p, g)
        whole.append(half + optimizer.step_sizes()["gamma"] * g)
    moves = sum((after - before) ** 2 for before, after in pairwise(whole))
    expected = moves if rates == "separated" else 0.0
    assert optimizer.param_groups[0]["squared_moves"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rates", ["equal", "separated"])
def test_zero_gradients_before_the_first_real_step_change_nothing(rates: str) -> None:
    """Hosts step with zeros to have state made; what they broadcast afterwards must still become X_1."""
    p, q = one_parameter(5.0), one_parameter(1.0)
    optimizer, reference = QODA([p], rates=rates), QODA([q], rates=rates)
    step_with(optimizer, p, 0.0)
    assert int(optimizer.state[p]["step"]) == 0
    with torch.no_grad():
        p.copy_(q)
    for gradient in (1.0, 0.0, 2.0):
        assert step_with(optimizer, p, gradient) == step_with(reference, q, gradient)
    assert int(optimizer.state[p]["step"]) == 3


@pytest.mark.parametrize("rates", ["equal", "separated"])
def test_a_missing_gradient_counts_as_zero_once_the_parameter_takes_part(rates: str) -> None:
    p, q = one_parameter(5.0, 1.0), one_parameter(5.0, 1.0)
    others = one_parameter(1.0), one_parameter(1.0)
    optimizer, reference = QODA([p, others[0]], rates=rates), QODA([q, others[1]], rates=rates)
    for number in range(4):
        for one in (p, q, *others):
            one.grad = torch.full_like(one, 1.0 + number)
        if number % 2:
            p.grad, q.grad = None, torch.zeros_like(q)
        optimizer.step()
        reference.step()
    assert torch.equal(p, q)


def test_worker_norms_are_asked_once_per_step_and_scaled() -> None:
    p, calls = one_parameter(0.0), []

    def source() -> WorkerNorms:
        calls.append(1)
        return WorkerNorms(squared_norms=1.0, squared_changes=8.0, world_size=2)

    optimizer = QODA([p], sum_over="workers", worker_norms=source, gradient_scale=2.0)
    step_with(optimizer, p, 1.0)
    assert len(calls) == 1
    assert optimizer.step_sizes()["eta"] == pytest.approx(9**-0.5)
    assert "previous" not in optimizer.state[p]


def test_a_source_that_raises_leaves_everything_as_it_was() -> None:
    p = one_parameter(1.0)

    def source() -> WorkerNorms:
        raise RuntimeError("link down")

    optimizer = QODA([p], sum_over="workers", worker_norms=source, gradient_scale=1.0)
    with pytest.raises(RuntimeError, match="link down"):
        step_with(optimizer, p, 1.0)
    assert p.item() == 1.0
    assert int(optimizer.state[p]["step"]) == 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rates": "adaptive"}, "rates"),
        ({"sum_over": "nodes"}, "sum_over"),
        ({"q_hat": 0.3}, "q_hat"),
        ({"q_hat": 0.0}, "q_hat"),
    ],
)
def test_impossible_options_are_named(options: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        QODA([one_parameter(1.0)], **options)


def test_non_finite_gradients_are_not_hidden() -> None:
    p = one_parameter(1.0)
    optimizer = QODA([p])
    step_with(optimizer, p, float("nan"))
    assert torch.isnan(p).all()
