#!/usr/bin/env python3
"""Biased compression with error feedback inside QODA, on monotone games: an open question of the paper, measured.

Two players, min over x, max over y of x'By + (mu/2)(|x|^2 - |y|^2) about a solution z* that is not the origin; K
workers see its operator with shifts of their own that cancel in the mean, as with data of different distributions, and
with noise: none, absolute (standard deviation 0.1 on every coordinate) or relative (a factor about 1). QODA (equal
rates) takes one exchange a step. Workers send

    exact               fp32 vectors
    adaptive            3 bits, levels of least variance, unbiased
    tnq                 3 bits, clipped (TNQ), biased
    top-k               a twentieth of the coordinates with the largest magnitudes, biased
    ... + feedback      what a message left out is added to the next vector

tnq and adaptive go through the real codec, their levels learnt anew every 50 steps. Printed: |F| at the average of the
iterates (of which the paper speaks) and at the last one, relative to |F| at the start, means over the seeds; of the
base rates tried, the best one for each method.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_qoda.optim import QODA
from launch.train.options import HelpFormatter, positive
from launch.train.summary import write_json
from qoda_kernels.codec import Codec
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.magnitudes import MagnitudeStatistics
from qoda_kernels.registry import CodebookRegistry, LayerRule, LayerSettings
from qoda_kernels.statistics import HistogramStatistics
from qoda_kernels.wire import MessageContext

Vector = NDArray[np.float64]
PLAYER = 128
DIMENSION = 2 * PLAYER
METHODS = ("exact", "adaptive", "adaptive + feedback", "tnq", "tnq + feedback", "top-k", "top-k + feedback")
NOISES = {"none": (0.0, 0.0), "absolute": (0.1, 0.0), "relative": (0.0, 0.3)}
_BITS = 3
_KEPT = DIMENSION // 20
_REFIT = 50
_SHIFT = 0.5  # standard deviation of a worker's own shift of the operator, per coordinate


@dataclass(frozen=True)
class Game:
    """F(z) = A (z - z*), and the workers' shifts of it, which add up to zero."""

    matrix: Vector
    solution: Vector
    shifts: Vector

    @classmethod
    def make(cls, seed: int, quadratic: float, workers: int) -> "Game":
        """A game with singular values of B between 0.3 and 1."""
        generator = np.random.default_rng([seed, 7])
        left, _ = np.linalg.qr(generator.standard_normal((PLAYER, PLAYER)))
        right, _ = np.linalg.qr(generator.standard_normal((PLAYER, PLAYER)))
        coupling = left @ np.diag(np.linspace(0.3, 1.0, PLAYER)) @ right
        own = quadratic * np.eye(PLAYER)
        shifts = _SHIFT * generator.standard_normal((workers, DIMENSION))
        return cls(
            np.block([[own, coupling], [-coupling.T, own]]),
            generator.standard_normal(DIMENSION),
            shifts - shifts.mean(axis=0),
        )

    def operator(self, point: Vector) -> Vector:
        """F."""
        return np.asarray(self.matrix @ (point - self.solution))


class Messages:
    """What arrives of the workers' vectors."""

    def __init__(self, method: str, workers: int, seed: int) -> None:
        self._kind, _, feedback = method.partition(" + ")
        self._residuals = np.zeros((workers, DIMENSION)) if feedback else None
        self._seed = seed
        named = [("z", torch.zeros(DIMENSION))]
        levels = self._kind if self._kind in ("adaptive", "tnq") else "uniform"
        rules = (LayerRule(name="z", as_type="dual_vector"),)
        settings = LayerSettings(_BITS, bucket_size=DIMENSION, levels=levels)
        self._registry = CodebookRegistry.build(named, settings, rules, min_numel=0)

    def exchange(self, vectors: Vector, step: int) -> Vector:
        """The decoded vectors, [K, d]."""
        corrected = vectors if self._residuals is None else vectors + self._residuals
        sent = self._sent(corrected, step)
        if self._residuals is not None:
            self._residuals = corrected - sent
        return sent

    def _sent(self, vectors: Vector, step: int) -> Vector:
        if self._kind == "exact":
            return vectors.astype(np.float32).astype(np.float64)
        if self._kind == "top-k":
            sent = np.zeros_like(vectors)
            largest = np.argpartition(np.abs(vectors), -_KEPT, axis=1)[:, -_KEPT:]
            np.put_along_axis(sent, largest, np.take_along_axis(vectors, largest, axis=1), axis=1)
            return sent
        narrow = vectors.astype(np.float32)
        if step % _REFIT == 0:
            self._learn(narrow)
        (entry,) = self._registry.parameters.values()
        whole = [Slice("z", 0, DIMENSION, torch.float32, entry.codebook, 0)]
        plan = MessagePlan.build(whole, self._registry.codebooks)
        codec = Codec(plan, self._registry.codebooks)
        decoded = []
        for rank, vector in enumerate(narrow):
            context = MessageContext(self._seed, step, rank, 0, self._registry.version, rank, 0)
            message = codec.encode([torch.from_numpy(vector)], context)
            decoded.append(codec.decode_mean([message], [context])[0].double().numpy())
        return np.stack(decoded)

    def _learn(self, vectors: NDArray[np.float32]) -> None:
        (key,) = self._registry.adaptive_keys
        kind: Any = MagnitudeStatistics if self._kind == "tnq" else HistogramStatistics
        merged = kind.merge_in_order([kind.gather(vector, DIMENSION, "max") for vector in vectors])
        if merged.squared_norm > 0.0:
            self._registry = self._registry.updated({key: merged})


def oracle(game: Game, noise: str, seed: int) -> Callable[[Vector, int], Vector]:
    """The workers' vectors at a point, [K, d]; a function of point and step."""
    absolute, relative = NOISES[noise]

    def sample(point: Vector, step: int) -> Vector:
        generator = np.random.default_rng([seed, step])
        shape = game.shifts.shape
        exact = game.operator(point) * (1.0 + relative * generator.standard_normal(shape))
        return exact + absolute * generator.standard_normal(shape) + game.shifts

    return sample


def play(game: Game, noise: str, method: str, steps: int, seed: int, lr: float) -> tuple[float, float]:
    """|F| at the averaged and at the last iterate, relative to that at the origin, where the game starts."""
    parameter = torch.nn.Parameter(torch.zeros(DIMENSION, dtype=torch.float64))
    optimizer = QODA([parameter], lr=lr)
    sample, messages = oracle(game, noise, seed), Messages(method, len(game.shifts), seed)
    for step in range(steps):
        vectors = sample(parameter.detach().numpy(), step)
        parameter.grad = torch.from_numpy(messages.exchange(vectors, step).mean(axis=0))
        last = parameter.detach().numpy().copy()
        optimizer.step()
    average = torch.zeros(DIMENSION, dtype=torch.float64)
    optimizer.copy_averaged_to([average])
    start = float(np.linalg.norm(game.operator(np.zeros(DIMENSION))))
    return tuple(float(np.linalg.norm(game.operator(point))) / start for point in (average.numpy(), last))  # type: ignore[return-value]  # of two


@dataclass(frozen=True)
class Row:
    """Means over the seeds."""

    game: str
    noise: str
    method: str
    lr: float
    steps: int
    averaged: float
    last: float


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """All games, noises and methods."""
    for name, quadratic in (("bilinear", 0.0), ("bilinear + quadratic", 0.05)):
        for noise in NOISES:
            for method in options.methods:
                for lr in options.lr:
                    found = [
                        play(Game.make(seed, quadratic, options.workers), noise, method, options.steps, seed, lr)
                        for seed in options.seeds
                    ]
                    averaged, last = np.mean(found, axis=0)
                    yield Row(name, noise, method, lr, options.steps, float(averaged), float(last))


def summary(found: Sequence[Row]) -> str:
    """Of each game, noise and method the base rate with the smallest |F| at the average."""
    lines = []
    for key in dict.fromkeys((row.game, row.noise, row.method) for row in found):
        best = min((row for row in found if (row.game, row.noise, row.method) == key), key=lambda row: row.averaged)
        lines.append(
            f"{best.game:22s} {best.noise:9s} {best.method:20s} lr {best.lr:<4g} "
            f"average {best.averaged:.2e}  last {best.last:.2e}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Play, print, write."""
    logging.disable(logging.WARNING)
    options = _parser().parse_args(arguments)
    settings = {"workers": options.workers, "seeds": options.seeds, "dimension": DIMENSION, "bits": _BITS}
    found = []
    for row in rows(options):
        found.append(row)
        if options.json is not None:
            write_json(options.json, {"settings": settings, "rows": [asdict(each) for each in found]})
    print(summary(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="which to play")
    parser.add_argument("--steps", type=positive, default=2000, help="number of exchanges")
    parser.add_argument("--workers", type=positive, default=4, help="number of workers, K")
    parser.add_argument("--lr", nargs="+", type=float, default=[1.0, 4.0, 16.0], help="base rates of QODA; 1: paper's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of games, noise and rounding")
    parser.add_argument("--seed", dest="seeds", nargs=1, type=int, default=argparse.SUPPRESS, help="one seed alone")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
