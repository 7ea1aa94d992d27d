#!/usr/bin/env python3
"""Record gradients of small networks in training, for `launch/bench/quantizers.py`.

Four networks: a convolutional one on MNIST, one on CIFAR-10, a Transformer that predicts the next character of a text,
and a WGAN with gradient penalty on MNIST (critic and generator together). K workers have batches of their own and
train with Adam on the mean of their gradients. At an early, a middle and a late step the gradients of all workers are
written, and those of the step before, from which a quantizer may learn. Networks without data are left out.
Recordings are made of the user's data and stay on this machine: `--out` is a directory for .npz files.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from launch.train.data import mnist
from launch.train.models import DigitNet
from launch.train.options import HelpFormatter, positive
from launch.train.summary import write_json
from qoda_kernels.registry import CodebookRegistry

MOMENTS = {"early": 10, "middle": 100, "late": 300}
_SEQUENCE = 64
_LATENT = 64
_PENALTY = 10.0


@dataclass(frozen=True)
class Task:
    """A network and its loss on one worker's batch."""

    model: nn.Module
    loss: Callable[[np.random.Generator], torch.Tensor]


class CharacterTransformer(nn.Module):
    """Two blocks of width 128 over at most 64 characters; about 0.4 million parameters."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 128)
        self.position = nn.Embedding(_SEQUENCE, 128)
        block = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.output = nn.Linear(128, characters)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Logits [n, length, characters] of the character after each; text int64 [n, length]."""
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.embedding(text) + self.position(torch.arange(length))
        logits: torch.Tensor = self.output(self.blocks(hidden, mask=mask, is_causal=True))
        return logits


def main(arguments: Sequence[str] | None = None) -> int:
    """Record every network for which there is data."""
    options = _parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    found = []
    for name, make in _tasks(options):
        torch.manual_seed(options.seed)
        task = make()
        record(task, name, options.out / f"{name}.npz", options.workers, options.seed)
        print(f"recorded {name}", flush=True)
        parameters = sum(parameter.numel() for parameter in task.model.parameters())
        found.append({"network": name, "parameters": parameters, "workers": options.workers, "steps": MOMENTS})
    if options.json is not None:
        write_json(options.json, found)
    if not found:
        print("nothing to record: give --data, --cifar or --text", file=sys.stderr)
    return 0 if found else 2


def record(task: Task, name: str, path: Path, workers: int, seed: int) -> None:
    """Train a network and write its recorded gradients, layer types included, to an .npz file."""
    registry = CodebookRegistry.build(task.model)
    names = [name for name, _ in task.model.named_parameters()]
    optimizer = torch.optim.Adam(task.model.parameters(), lr=1e-3 if name != "wgan" else 2e-4, betas=(0.5, 0.9))
    moments = {step + shift: (moment, shift) for moment, step in MOMENTS.items() for shift in (-1, 0)}
    arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {}
    generators = [np.random.default_rng([seed, worker]) for worker in range(workers)]
    for step in range(1, max(MOMENTS.values()) + 1):
        optimizer.zero_grad()
        before = [torch.zeros_like(parameter) for parameter in task.model.parameters()]
        for worker, generator in enumerate(generators):
            (task.loss(generator) / workers).backward()
            for key, parameter, total in zip(names, task.model.parameters(), before, strict=True):
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                if step in moments:
                    moment, shift = moments[step]
                    own = (gradient - total) * workers
                    arrays[f"{moment}/{shift}/{worker}/{key}"] = own.reshape(-1).numpy().copy()
                total.copy_(gradient)
        optimizer.step()
    types = {key: entry.layer_type for key, entry in registry.parameters.items()}
    np.savez(path, layer_types=np.array(json.dumps(types)), **arrays)  # type: ignore[arg-type]  # names are the keys


def _tasks(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Task]]]:
    wanted = options.only
    if options.data is not None:
        yield from _if_wanted(wanted, "mnist-convolutional", lambda: _mnist_task(options.data, options.batch_size))
    if options.cifar is not None:
        yield from _if_wanted(wanted, "cifar10-convolutional", lambda: _cifar_task(options.cifar, options.batch_size))
    if options.text is not None:
        yield from _if_wanted(wanted, "text-transformer", lambda: _text_task(options.text, options.batch_size))
    if options.data is not None:
        yield from _if_wanted(wanted, "mnist-wgan", lambda: _wgan_task(options.data, options.batch_size))


def _if_wanted(wanted: str | None, name: str, make: Callable[[], Task]) -> Iterator[tuple[str, Callable[[], Task]]]:
    if wanted in (None, name):
        yield name, make


def _mnist_task(directory: Path, batch_size: int) -> Task:
    examples = mnist(directory).train
    return _classification(DigitNet(1.0), examples.images, examples.labels, batch_size)


def _cifar_task(path: Path, batch_size: int) -> Task:
    """CIFAR-10 from an .npz file with `images` uint8 [n, 32, 32, 3] and `labels`."""
    with np.load(path) as file:
        images = torch.from_numpy(file["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        labels = torch.from_numpy(file["labels"].astype(np.int64))
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    return _classification(model, images, labels, batch_size)


def _classification(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> Task:
    def loss(generator: np.random.Generator) -> torch.Tensor:
        chosen = torch.from_numpy(generator.integers(len(labels), size=batch_size))
        return F.cross_entropy(model(images[chosen]), labels[chosen])

    return Task(model, loss)


def _text_task(path: Path, batch_size: int) -> Task:
    content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    characters, codes = np.unique(content, return_inverse=True)
    text = torch.from_numpy(codes.astype(np.int64))
    model = CharacterTransformer(len(characters))

    def loss(generator: np.random.Generator) -> torch.Tensor:
        starts = generator.integers(len(text) - _SEQUENCE - 1, size=batch_size)
        batch = torch.stack([text[start : start + _SEQUENCE + 1] for start in starts])
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    return Task(model, loss)


def _wgan_task(directory: Path, batch_size: int) -> Task:
    images = mnist(directory).train.images
    generator_net = nn.Sequential(
        nn.Linear(_LATENT, 64 * 49),
        nn.ReLU(),
        nn.Unflatten(1, (64, 7, 7)),
        nn.ConvTranspose2d(64, 32, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, 2, 1),
    )
    critic = nn.Sequential(
        nn.Conv2d(1, 32, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(64 * 49, 1),
    )
    model = nn.ModuleDict({"generator": generator_net, "critic": critic})

    def loss(generator: np.random.Generator) -> torch.Tensor:
        """Both players' losses; each player's gradient is its own, as with simultaneous steps."""
        real = images[torch.from_numpy(generator.integers(len(images), size=batch_size))]
        noise = torch.from_numpy(generator.standard_normal((batch_size, _LATENT)).astype(np.float32))
        fake = generator_net(noise)
        share = torch.from_numpy(generator.random((batch_size, 1, 1, 1)).astype(np.float32))
        between = (share * real + (1 - share) * fake.detach()).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        penalty = ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
        critic_loss = critic(fake.detach()).mean() - critic(real).mean() + _PENALTY * penalty
        for parameter in critic.parameters():
            parameter.requires_grad_(False)
        generator_loss = -critic(fake).mean()
        for parameter in critic.parameters():
            parameter.requires_grad_(True)
        total: torch.Tensor = critic_loss + generator_loss
        return total

    return Task(model, loss)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with the MNIST files")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 images and labels, .npz")
    parser.add_argument("--text", type=Path, help="a text file")
    parser.add_argument("--out", type=Path, required=True, help="directory for the recordings")
    parser.add_argument("--only", help="record this network alone")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write names and sizes to this file")
    parser.add_argument("--workers", type=positive, default=4, help="number of workers, K")
    parser.add_argument("--batch-size", type=positive, default=16, help="examples of a worker")
    parser.add_argument("--seed", type=int, default=0, help="of networks and batches")
    return parser


if __name__ == "__main__":
    sys.exit(main())
