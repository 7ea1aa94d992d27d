"""QODA, Q-GenX and optimistic Adam written down from their formulas, with every iterate kept and every sum taken anew.

The index of a list is the index in the formula: entry t of `half` is X_{t+1/2}; entries that the formulas do not use
hold None. Exchanges are counted from 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Sampler = Callable[[Vector, int], Vector]  # point, exchange -> [K, d]


@dataclass(frozen=True)
class Trajectory:
    half: list[Vector]  # X_{t+1/2}, t = 1..T
    whole: list[Vector]  # X_t, t = 1..T+1
    next_half: Vector  # X_{T+3/2} (QODA only: what the model holds after T steps)
    gamma: list[float]  # gamma_t, t = 1..T+1
    eta: list[float]

    @property
    def average(self) -> Vector:
        return np.mean(self.half, axis=0)


def squared(vectors: Vector, sum_over: str) -> float:
    """|.|^2 of the vectors of all workers, [K, d]: of their mean, or sum_k |.|^2 / K^2."""
    if sum_over == "mean":
        return float(np.sum(np.mean(vectors, axis=0) ** 2))
    return float(np.sum(vectors**2)) / len(vectors) ** 2


def qoda(sampler: Sampler, x1: Vector, steps: int, *, lr: float, rates: str, sum_over: str, q_hat: float) -> Trajectory:
    X = [None, x1]  # X[t]
    Y = [None, np.zeros_like(x1)]  # Y[t]
    hatV = [np.zeros_like(sampler(x1, 0))]  # hatV[t] = the K vectors hatV_{k,t+1/2}
    half = [None]
    gamma, eta = [None], [None]

    def learning_rates(t: int) -> tuple[float, float]:
        if rates == "equal":
            changes = sum(squared(hatV[s] - hatV[s - 1], sum_over) for s in range(1, t))
            return (1 + changes) ** -0.5, (1 + changes) ** -0.5
        norms = sum(squared(hatV[s], sum_over) for s in range(1, t - 1))
        moves = sum(float(np.sum((X[s] - X[s + 1]) ** 2)) for s in range(1, t - 1))
        return (1 + norms) ** (q_hat - 0.5), (1 + norms + moves) ** -0.5

    gamma_t, eta_t = learning_rates(1)
    gamma.append(lr * gamma_t)
    eta.append(lr * eta_t)
    for t in range(1, steps + 1):
        half.append(X[t] - gamma[t] * np.mean(hatV[t - 1], axis=0))
        hatV.append(sampler(half[t], t - 1))
        Y.append(Y[t] - np.mean(hatV[t], axis=0))
        gamma_t, eta_t = learning_rates(t + 1)
        gamma.append(lr * gamma_t)
        eta.append(lr * eta_t)
        X.append(x1 + eta[t + 1] * Y[t + 1])
    next_half = X[steps + 1] - gamma[steps + 1] * np.mean(hatV[steps], axis=0)
    return Trajectory(half[1:], X[1:], next_half, gamma[1:], eta[1:])


def qgenx(sampler: Sampler, x1: Vector, steps: int, *, lr: float, sum_over: str) -> Trajectory:
    X = [None, x1]
    Y = [None, np.zeros_like(x1)]
    at_whole, at_half = [None], [None]  # hatV_{k,t} and hatV_{k,t+1/2}
    half = [None]
    workers = len(sampler(x1, 0))

    def learning_rate(t: int) -> float:
        changes = sum(workers**2 * squared(at_whole[s] - at_half[s], sum_over) for s in range(1, t))
        return lr * workers * (1 + changes) ** -0.5

    gamma = [None, learning_rate(1)]
    for t in range(1, steps + 1):
        at_whole.append(sampler(X[t], 2 * t - 2))
        half.append(X[t] - gamma[t] * np.mean(at_whole[t], axis=0))
        at_half.append(sampler(half[t], 2 * t - 1))
        Y.append(Y[t] - np.mean(at_half[t], axis=0))
        gamma.append(learning_rate(t + 1))
        X.append(x1 + gamma[t + 1] * Y[t + 1])
    return Trajectory(half[1:], X[1:], X[steps + 1], gamma[1:], gamma[1:])


def optimistic_adam(
    gradients: Vector, p: Vector, *, a: float, beta1: float, beta2: float, eps: float, weight_decay: float = 0.0
) -> Vector:
    """p <- p - 2 a u_t + a u_{t-1} for the given gradients [T, d]; the decay acts on Z = p + a u_{t-1}."""
    m = v = before = np.zeros_like(p)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        u = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        p = p - 2 * a * u + a * before - a * weight_decay * (p + a * before)
        before = u
    return p
