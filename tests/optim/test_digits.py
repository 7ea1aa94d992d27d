"""QODAdam beside Adam on a small network and real data: the same initial weights, batches, rate and number of steps."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from hvd_qoda.optim import QODAdam

SEEDS, STEPS, BATCH, HELD_OUT = 5, 600, 64, 500
# One-sided 95 % point of Student's distribution with SEEDS - 1 degrees of freedom.
STUDENT = 2.132


def accuracy(make: type[torch.optim.Optimizer], seed: int, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = make(model.parameters(), lr=1e-3)
    batches = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        chosen = torch.randint(HELD_OUT, len(targets), (BATCH,), generator=batches)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
    with torch.no_grad():
        return (model(inputs[:HELD_OUT]).argmax(dim=1) == targets[:HELD_OUT]).double().mean().item()


def test_qodadam_is_as_accurate_as_adam_after_the_same_steps() -> None:
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    inputs, targets = torch.tensor(data.data[order] / 16.0, dtype=torch.float32), torch.tensor(data.target[order])
    found = {
        make: np.array([accuracy(make, seed, inputs, targets) for seed in range(SEEDS)])
        for make in (QODAdam, torch.optim.Adam)
    }
    difference = found[QODAdam] - found[torch.optim.Adam]
    error = difference.std(ddof=1) / np.sqrt(SEEDS)
    assert found[QODAdam].mean() > 0.94
    assert difference.mean() >= -STUDENT * error, f"QODAdam {found[QODAdam]}, Adam {found[torch.optim.Adam]}"
    # Noise alone must not be what lets it pass.
    assert STUDENT * error == pytest.approx(0.0, abs=0.015)
