#!/usr/bin/env python3
"""Test accuracy on MNIST with heavy-tailed quantizers: the table of TQSGD (arXiv 2402.01798), at our code words.

Eight clients with batches of their own train a small convolutional network of AlexNet's shape for 300 iterations of SGD
with momentum on the mean of their gradients, quantized to 3 bits. The clients run one after the other in this process;
their messages are encoded and decoded by the real codec. Methods:

    fp32        not quantized
    QSGD        uniform levels up to each client's largest magnitude per layer type; nothing is clipped
    NQSGD       the same with the papers' non-uniform density
    TUQ, TNQ, TBQ   clipped; alpha by the papers' fixed point, refitted from all clients' magnitudes
    ours-adaptive       levels of least variance in buckets of 512
    ours-stratified     the same, the clients' random numbers stratified
    ours-rotation       buckets of 512 rotated at random, rounded to nearest, EDEN's scale
    ours-tnq-feedback   TNQ, expected optimum, with error feedback
    ours-rotation-feedback        ours-rotation with error feedback
    ours-least-squares-feedback   the same without EDEN's scale: the biased codebook of least squared error

The papers' s is 2^b - 1 intervals without a point at 0; code words here have a true zero and 2^b - 2 intervals. The
paper does not give batch size, learning rate and how often alpha is fitted: see the options; the learning rate was
chosen on fp32 alone. Finished runs are kept in the file `--runs` and not repeated, so the work can be done in pieces.
Published: QSGD 88.58, NQSGD 89.19, TQSGD (TUQ) 90.05, TNQSGD (TNQ) 90.65 %.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from launch.train.data import Dataset, Examples, load_dataset
from launch.train.options import HelpFormatter, positive
from launch.train.summary import write_json
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.gaussian import relative_error
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.magnitudes import MagnitudeStatistics
from qoda_kernels.registry import CodebookRegistry, LayerSettings
from qoda_kernels.statistics import HistogramStatistics
from qoda_kernels.tails import TailSettings, fit_tail, truncation
from qoda_kernels.wire import MessageContext

_MEANS = ("accuracy_at_a_third", "last_losses", "relative_error")
_UNCLIPPED = {"QSGD": "tuq", "NQSGD": "tnq"}
_SETTINGS: dict[str, dict[str, Any]] = {
    "TUQ": {"levels": "tuq"},
    "TNQ": {"levels": "tnq"},
    "TBQ": {"levels": "tbq"},
    "ours-adaptive": {"levels": "adaptive"},
    "ours-stratified": {"levels": "adaptive"},
    "ours-rotation": {"rotation": "hadamard", "rounding": "nearest"},
    "ours-tnq-feedback": {"levels": "tnq"},
    "ours-rotation-feedback": {"rotation": "hadamard", "rounding": "nearest"},
    "ours-least-squares-feedback": {"rotation": "hadamard", "rounding": "nearest"},
}
METHODS = ("fp32", *_UNCLIPPED, *_SETTINGS)
_BATCH = 1000
_LAST = 50  # iterations whose losses are averaged


class SmallAlexNet(nn.Sequential):
    """Five convolutions and three linear layers, as AlexNet has, for 28 x 28 pixels; 170,618 parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(48, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(288, 256),
            nn.ReLU(),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )
        for layer in self:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)


class Clients:
    """What the clients' gradients become on their way to the mean."""

    def __init__(self, model: nn.Module, method: str, options: argparse.Namespace) -> None:
        self._method = method
        self._options = options
        tails = TailSettings("expected" if method.startswith("ours") else "fixed_point")
        settings = _SETTINGS.get(method, {"levels": "tuq"})
        self.registry = CodebookRegistry.build(model, LayerSettings(options.bits, tails=tails, **settings))
        entries = self.registry.parameters.items()
        self.quantized = [name for name, entry in entries if not self.registry.codebooks[entry.codebook].is_exact]
        self._slices = [
            Slice(name, 0, entry.numel, torch.float32, entry.codebook, entry.offset)
            for name, entry in entries
            if name in self.quantized
        ]
        self._fits: dict[str, Any] = {}
        self._residuals: dict[tuple[int, str], torch.Tensor] = {}
        self.sent_bits = 0.0
        self._squared_errors: list[float] = []

    @property
    def relative_error(self) -> float:
        """Squared error of the mean over the clients, of the mean's square; mean over the iterations so far."""
        return statistics.fmean(self._squared_errors) if self._squared_errors else 0.0

    def mean(self, gradients: Sequence[Mapping[str, torch.Tensor]], step: int, seed: int) -> dict[str, torch.Tensor]:
        """Mean over the clients of what their messages decode to; parameters that travel exact are not quantized."""
        count = len(gradients)
        total = {name: sum(own[name] for own in gradients) / count for name in gradients[0]}
        if self._method == "fp32":
            self.sent_bits += 32.0
            return total  # type: ignore[return-value]  # the sum of tensors is a tensor
        corrected = [
            {name: self._corrected(rank, name, own) for name in self.quantized} for rank, own in enumerate(gradients)
        ]
        if step % self._options.refit_every == 0 or step == 0:
            self._refit(corrected)
        decoded = []
        for rank, own in enumerate(corrected):
            books = self._books_of_client(own)
            plan = MessagePlan.build(self._slices, books)
            codec = Codec(plan, books)
            strata = count if self._method == "ours-stratified" else 1
            context = MessageContext(seed, step, rank, 0, 0, rank, 0, strata)
            message = codec.encode([own[name] for name in self.quantized], context)
            decoded.append(dict(zip(self.quantized, codec.decode_mean([message], [context]), strict=True)))
            if self._method == "ours-least-squares-feedback":
                for name in self.quantized:
                    decoded[-1][name] *= _least_squares_scale(books[self.registry.parameters[name].codebook])
            self.sent_bits += 8.0 * message.numel() / plan.coordinates / count
            if self._method.endswith("feedback"):
                for name in self.quantized:
                    self._residuals[rank, name] = own[name] - decoded[-1][name]
        error = power = 0.0
        for name in self.quantized:
            mean = sum(parts[name] for parts in decoded) / count
            mean = mean.view(gradients[0][name].shape)  # type: ignore[union-attr]  # as above
            error += float(((mean - total[name]) ** 2).sum())
            power += float((total[name] ** 2).sum())  # type: ignore[union-attr]  # as above
            total[name] = mean
        self._squared_errors.append(error / power if power > 0.0 else 0.0)
        return total  # type: ignore[return-value]  # as above

    def _corrected(self, rank: int, name: str, own: Mapping[str, torch.Tensor]) -> torch.Tensor:
        flat = own[name].reshape(-1)
        residual = self._residuals.get((rank, name))
        return flat if residual is None else flat + residual

    def _refit(self, gradients: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Learn from all clients' gradients of this iteration, as ranks do at an update of the levels."""
        gathered: dict[str, Any] = {}
        for key in self.registry.adaptive_keys:
            kind: Any = MagnitudeStatistics if self.registry.settings[key].clips else HistogramStatistics
            names = [name for name in self.quantized if self.registry.parameters[name].codebook == key]
            parts = [kind.gather(own[name].numpy(), 512, "max") for own in gradients for name in names]
            gathered[key] = kind.merge_in_order(parts)
        if self._method in _UNCLIPPED:
            self._fits = {key: fit_tail(merged).model for key, merged in gathered.items()}
        elif gathered:
            self.registry = self.registry.updated(gathered)

    def _books_of_client(self, own: Mapping[str, torch.Tensor]) -> dict[str, Codebook]:
        books = dict(self.registry.codebooks)
        for key, model in self._fits.items():
            names = [name for name in self.quantized if self.registry.parameters[name].codebook == key]
            largest = max(float(own[name].abs().max()) for name in names)
            if largest > 0.0:
                found = truncation(model, _UNCLIPPED[self._method], self._options.bits, clip=largest)  # type: ignore[arg-type]  # a scheme
                books[key] = books[key].with_levels(found.levels.tolist(), 1, largest)
        return books


def _least_squares_scale(book: Codebook) -> float:
    """By what decoded values of rotated buckets are multiplied for the least squared error; norms could carry it.

    EDEN's scale S makes <x, S q> = |x|^2 with an expected error e |x|^2, so |S q|^2 = (1 + e) |x|^2: the least error of
    c S q is at c = 1 / (1 + e), and is e / (1 + e).
    """
    return 1.0 / (1.0 + relative_error(book))


def train(method: str, seed: int, dataset: Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """One run.

    Returns:
        Its test accuracy at the end and after a third of the iterations, the mean training loss of the last ones, the
        error of the mean gradient, and the bits that a client sends per quantized coordinate.
    """
    torch.manual_seed(seed)
    model = SmallAlexNet()
    clients = Clients(model, method, options)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4)
    shares = _shares(dataset.train, options.clients, options.skew, seed)
    batches = [np.random.default_rng([seed, rank]) for rank in range(options.clients)]
    losses: list[float] = []
    early = 0.0
    for step in range(options.iterations):
        gradients = []
        for rank, share in enumerate(shares):
            batch = dataset.train.select(share[batches[rank].integers(len(share), size=options.batch_size)])
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch.images), batch.labels)
            loss.backward()
            losses.append(loss.item())
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        mean = clients.mean(gradients, step, seed)
        for name, parameter in model.named_parameters():
            parameter.grad = mean[name]
        optimizer.step()
        if step + 1 == max(1, options.iterations // 3):
            early = 100.0 * _accuracy(model, dataset.test)
    accuracy = 100.0 * _accuracy(model, dataset.test)
    return {
        "method": method,
        "seed": seed,
        "accuracy": accuracy,
        "accuracy_at_a_third": early,
        "last_losses": statistics.fmean(losses[-_LAST * options.clients :]),
        "relative_error": clients.relative_error,
        "bits_on_wire": clients.sent_bits / options.iterations,
    }


def _shares(train_examples: Examples, clients: int, skew: float, seed: int) -> list[np.ndarray[Any, Any]]:
    """Which examples each client has: a random part, `skew` of it sorted by label."""
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(len(train_examples))
    cut = int(skew * len(order))
    by_label = order[:cut][np.argsort(train_examples.labels.numpy()[order[:cut]], kind="stable")]
    parts = zip(np.array_split(by_label, clients), np.array_split(order[cut:], clients), strict=True)
    return [np.concatenate(part) for part in parts]


def _accuracy(model: nn.Module, test: Examples) -> float:
    with torch.no_grad():
        right = sum(
            int((model(test.images[i : i + _BATCH]).argmax(1) == test.labels[i : i + _BATCH]).sum())
            for i in range(0, len(test), _BATCH)
        )
    return right / len(test)


def table(runs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Mean and standard error of each method's accuracy, in per cent."""
    rows = []
    for method in METHODS:
        of_method = sorted((run for run in runs if run["method"] == method), key=lambda run: run["seed"])
        scores = [run["accuracy"] for run in of_method]
        if not scores:
            continue
        error = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
        rows.append(
            {
                "method": method,
                "bits": 32 if method == "fp32" else settings["bits"],
                "bits_on_wire": statistics.fmean(run["bits_on_wire"] for run in of_method),
                "seeds": [run["seed"] for run in of_method],
                "accuracy_mean": statistics.fmean(scores),
                "accuracy_se": error,
                **{name: statistics.fmean(run[name] for run in of_method) for name in _MEANS},
                "settings": dict(settings),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the runs that are missing, print the table, write it."""
    options = _parser().parse_args(arguments)
    dataset = load_dataset(options.data)
    names = ("clients", "bits", "iterations", "batch_size", "lr", "refit_every", "skew")
    settings = {"data": dataset.name, **{name: getattr(options, name) for name in names}}
    runs: list[dict[str, Any]] = []
    if options.runs is not None and options.runs.exists():
        kept = json.loads(options.runs.read_text())
        if kept["settings"] != settings:
            print(f"{options.runs} holds runs with other settings: {kept['settings']}", file=sys.stderr)
            return 2
        runs = kept["runs"]
    for seed in options.seeds:
        for method in options.methods:
            if any((run["method"], run["seed"]) == (method, seed) for run in runs):
                continue
            runs.append(train(method, seed, dataset, options))
            print(runs[-1], flush=True)
            if options.runs is not None:
                write_json(options.runs, {"settings": settings, "runs": runs})
    rows = table(runs, settings)
    for row in rows:
        error = "" if row["accuracy_se"] is None else f" +- {row['accuracy_se']:.2f}"
        print(
            f"{row['method']:20s} {row['bits_on_wire']:6.2f} bits  {row['accuracy_mean']:.2f}{error} %  "
            f"after a third {row['accuracy_at_a_third']:.2f} %  loss {row['last_losses']:.4f}  "
            f"error of the mean gradient {row['relative_error']:.3f}"
        )
    if options.json is not None:
        write_json(options.json, rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", default="digits", help="directory with the MNIST files, or digits")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="which to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of networks, batches and random rounding")
    parser.add_argument("--seed", dest="seeds", nargs=1, type=int, default=argparse.SUPPRESS, help="one seed alone")
    parser.add_argument("--clients", type=positive, default=8, help="number of clients")
    parser.add_argument("--bits", type=int, default=3, help="code width")
    parser.add_argument("--iterations", type=positive, default=300, help="steps of SGD")
    parser.add_argument("--batch-size", type=positive, default=8, help="examples of a client in an iteration")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate; momentum is 0.9, weight decay 5e-4")
    parser.add_argument("--refit-every", type=positive, default=20, help="iterations between fits of alpha and levels")
    parser.add_argument("--skew", type=float, default=0.0, help="share of the examples dealt to clients by label")
    parser.add_argument("--runs", type=Path, help="file of finished runs, read and written")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
