"""Monotone games with known solutions, played by several workers whose dual vectors are noisy and quantized.

Two players on 20 coordinates each: min over x, max over y of  x'By + (mu/2)(|x|^2 - |y|^2), shifted so that the
solution is not the origin. Its operator is affine, F(z) = A (z - z*), monotone, and for mu > 0 strongly so.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

PLAYER = 20
DIMENSION = 2 * PLAYER


@dataclass(frozen=True)
class Game:
    matrix: Vector  # A, [d, d]
    solution: Vector  # z*, [d]

    def operator(self, point: Vector) -> Vector:
        return self.matrix @ (point - self.solution)

    def residual(self, point: Vector) -> float:
        """|F(z)|. For mu = 0 it is the gap over a ball of radius 1 around the solution: max <F(z), point - z>."""
        return float(np.linalg.norm(self.operator(point)))


def bilinear_game(seed: int, quadratic: float) -> Game:
    generator = np.random.default_rng(seed)
    # Singular values between 0.3 and 1: neither player's coordinates are nearly free.
    left, _ = np.linalg.qr(generator.standard_normal((PLAYER, PLAYER)))
    right, _ = np.linalg.qr(generator.standard_normal((PLAYER, PLAYER)))
    coupling = left @ np.diag(np.linspace(0.3, 1.0, PLAYER)) @ right
    identity = quadratic * np.eye(PLAYER)
    return Game(np.block([[identity, coupling], [-coupling.T, identity]]), generator.standard_normal(DIMENSION))


# One norm and one set of uniform levels for each of two layer types.
LAYER_TYPES = ((slice(0, 15), 15), (slice(15, DIMENSION), 3))


def quantize(vector: Vector, dither: Vector) -> Vector:
    """Unbiased stochastic rounding to uniform levels, each layer type by its own maximum."""
    rounded = np.zeros_like(vector)
    for coordinates, intervals in LAYER_TYPES:
        block = vector[coordinates]
        norm = np.abs(block).max()
        if norm > 0.0:
            levels = np.floor(np.abs(block) / norm * intervals + dither[coordinates])
            rounded[coordinates] = norm * np.sign(block) * levels / intervals
    return rounded


@dataclass(frozen=True)
class Oracle:
    """hatV_k(z): what each of K workers sends. Random numbers depend on seed, exchange and worker alone."""

    game: Game
    workers: int
    seed: int = 0
    absolute_noise: float = 0.0  # standard deviation added to every coordinate
    relative_noise: float = 0.0  # standard deviation of a factor around 1 on every coordinate
    quantized: bool = False

    def __call__(self, point: Vector, exchange: int) -> Vector:
        """Dual vectors of all workers, [K, d]."""
        return np.stack([self._one_worker(point, exchange, worker) for worker in range(self.workers)])

    def _one_worker(self, point: Vector, exchange: int, worker: int) -> Vector:
        generator = np.random.default_rng([self.seed, exchange, worker])
        exact = self.game.operator(point)
        sample = exact * (1.0 + self.relative_noise * generator.standard_normal(DIMENSION))
        sample = sample + self.absolute_noise * generator.standard_normal(DIMENSION)
        return quantize(sample, generator.random(DIMENSION)) if self.quantized else sample
