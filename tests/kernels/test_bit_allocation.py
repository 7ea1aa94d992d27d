"""The knapsack over layers and code widths, against brute force."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qoda_kernels.bit_allocation import UNITS, Candidate, allocate
from qoda_kernels.errors import CodebookError


def total(layers, plan, field: str) -> float:  # type: ignore[no-untyped-def]
    return math.fsum(getattr(layer[index], field) for layer, index in zip(layers, plan, strict=True))


def brute_force(layers, budget: str, limit: float) -> float:  # type: ignore[no-untyped-def]
    """The least total of the other quantity among all plans within the limit."""
    kept, wanted = ("error", "size") if budget == "variance" else ("size", "error")
    plans = itertools.product(*(range(len(layer)) for layer in layers))
    fitting = [total(layers, plan, wanted) for plan in plans if total(layers, plan, kept) <= limit]
    return min(fitting)


def random_layers(seed: int, count: int, whole_errors: bool = False) -> list[list[Candidate]]:
    rng = np.random.default_rng(seed)
    layers = []
    for _ in range(count):
        numel, scale, tail = int(rng.integers(10, 1000)), float(rng.lognormal(0, 2)), float(rng.uniform(2.5, 4.5))
        errors = [scale * numel * tail ** (-bits) for bits in range(2, 7)]
        if whole_errors:
            errors = [float(rng.integers(0, 200)) for _ in errors]
        layers.append([Candidate(bits, numel * bits, error) for bits, error in zip(range(2, 7), errors, strict=True)])
    return layers


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from(["variance", "bytes"]))
def test_plans_keep_the_budget_and_are_as_good_as_brute_force(seed: int, count: int, budget: str) -> None:
    layers = random_layers(seed, count)
    kept = "error" if budget == "variance" else "size"
    limit = total(layers, [2] * count, kept)
    plan = allocate(layers, budget, limit)
    assert total(layers, plan, kept) <= limit * (1 + 1e-9)
    found = total(layers, plan, "size" if budget == "variance" else "error")
    # The shares are rounded up to units, so compare with what brute force does with a limit that much smaller.
    assert found <= brute_force(
        layers, budget, max(limit * (1 - count / UNITS), total(layers, _cheapest(layers, kept), kept))
    ) * (1 + 1e-12)
    assert found >= brute_force(layers, budget, limit * (1 + 1e-9)) * (1 - 1e-12)
    assert plan == allocate(layers, budget, limit)


def _cheapest(layers, kept: str) -> list[int]:  # type: ignore[no-untyped-def]
    return [min(range(len(layer)), key=lambda c, layer=layer: getattr(layer[c], kept)) for layer in layers]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_whole_units_are_exact(seed: int, count: int) -> None:
    layers = random_layers(seed, count, whole_errors=True)
    limit = float(max(total(layers, _cheapest(layers, "error"), "error"), 150.0))
    plan = allocate(layers, "variance", limit, units=int(limit))
    assert total(layers, plan, "error") <= limit
    assert total(layers, plan, "size") == brute_force(layers, "variance", limit)


def test_the_variance_budget_of_equal_widths_never_costs_more_bytes() -> None:
    layers = random_layers(3, 40)
    uniform = [3] * 40
    plan = allocate(layers, "variance", total(layers, uniform, "error"))
    assert total(layers, plan, "size") < 0.95 * total(layers, uniform, "size")
    plan = allocate(layers, "bytes", total(layers, uniform, "size"))
    assert total(layers, plan, "error") < 0.8 * total(layers, uniform, "error")
    assert len(set(plan)) > 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from(["variance", "bytes"]))
def test_a_known_plan_is_never_beaten_by_rounding(seed: int, count: int, budget: str) -> None:
    layers = random_layers(seed, count)
    kept, wanted = ("error", "size") if budget == "variance" else ("size", "error")
    known = [2] * count
    limit = total(layers, known, kept)
    plan = allocate(layers, budget, limit, known=known)
    assert total(layers, plan, kept) <= limit * (1 + 1e-9)
    assert total(layers, plan, wanted) <= total(layers, known, wanted) * (1 + 1e-12)


def test_impossible_budgets_and_layers_are_refused() -> None:
    layers = random_layers(1, 3)
    with pytest.raises(CodebookError, match="cannot be kept"):
        allocate(layers, "bytes", 10)
    with pytest.raises(CodebookError, match="at least one candidate"):
        allocate([[]], "bytes", 10)
    with pytest.raises(CodebookError, match="finite"):
        allocate(layers, "variance", math.nan)
    assert allocate(layers, "bytes", total(layers, [0, 0, 0], "size"), units=7) == (0, 0, 0)
