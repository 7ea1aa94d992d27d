"""Images with labels, and which of them each rank sees at each step.

Two sources: scikit-learn's handwritten digits, which travel with that library, and the MNIST files of a directory.
"""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

DIGITS = "digits"
_DIGITS_TEST_EXAMPLES = 360
_DIGITS_SPLIT_SEED = 20240
_DIGITS_SIDE = 16
_IDX_BYTES = 0x08
_MNIST_MEAN, _MNIST_STD = 0.1307, 0.3081


class DataError(ValueError):
    """Data that is missing or damaged; the message says where it was looked for."""


@dataclass(frozen=True)
class Examples:
    """Images, float32 [n, 1, side, side], normalised; labels, int64 [n], 0 to 9."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def select(self, indices: NDArray[np.int64] | Sequence[int]) -> "Examples":
        """The examples at `indices`, in that order."""
        chosen = torch.tensor(np.asarray(indices, dtype=np.int64))
        return Examples(self.images[chosen], self.labels[chosen])

    def first(self, count: int) -> "Examples":
        """At most `count` examples from the front (views, no copy)."""
        return Examples(self.images[:count], self.labels[:count])


@dataclass(frozen=True)
class Dataset:
    """A fixed division into training and test examples; it does not depend on any seed of a run."""

    name: str
    train: Examples
    test: Examples


def load_dataset(source: str) -> Dataset:
    """Read `"digits"` (scikit-learn's) or the MNIST files below the directory `source`.

    Raises DataError where the directory lacks the four files, or one of them is damaged.
    """
    return digits() if source == DIGITS else mnist(Path(source))


def digits() -> Dataset:
    """scikit-learn's 1,797 digits, enlarged from 8x8 to 16x16 (bilinear): 1,437 to train on, 360 to test on."""
    raw = load_digits()
    pixels = torch.from_numpy(np.asarray(raw.images, dtype=np.float32)).unsqueeze(1) / 16.0
    pixels = torch.nn.functional.interpolate(pixels, size=(_DIGITS_SIDE, _DIGITS_SIDE), mode="bilinear")
    pixels = (pixels - pixels.mean()) / pixels.std()
    everything = Examples(pixels, torch.from_numpy(np.asarray(raw.target, dtype=np.int64)))
    order = np.random.default_rng(_DIGITS_SPLIT_SEED).permutation(len(everything))
    test, train = order[:_DIGITS_TEST_EXAMPLES], order[_DIGITS_TEST_EXAMPLES:]
    return Dataset(DIGITS, everything.select(train), everything.select(test))


def mnist(directory: Path) -> Dataset:
    """MNIST (LeCun et al.) from its four IDX files, packed (.gz) or not, in `directory`, raw/, MNIST/ or MNIST/raw/."""
    train = _mnist_examples(directory, "train")
    test = _mnist_examples(directory, "t10k")
    return Dataset("mnist", train, test)


def _mnist_examples(directory: Path, part: str) -> Examples:
    images = read_idx(_find(directory, f"{part}-images-idx3-ubyte"))
    labels = read_idx(_find(directory, f"{part}-labels-idx1-ubyte"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(
            f"{part} images of shape {images.shape} do not fit labels of shape {labels.shape} below {directory}"
        )
    pixels = (torch.from_numpy(images).unsqueeze(1).float() / 255.0 - _MNIST_MEAN) / _MNIST_STD
    return Examples(pixels, torch.from_numpy(labels.astype(np.int64)))


def _find(directory: Path, name: str) -> Path:
    below = ("", "raw", "MNIST", "MNIST/raw")
    for folder in below:
        for ending in ("", ".gz"):
            candidate = directory / folder / (name + ending)
            if candidate.is_file():
                return candidate
    raise DataError(f"{name} (or {name}.gz) is not in {directory}, nor in its {', '.join(below[1:])}")


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of bytes in an IDX file; magic number, sizes big-endian, then the values.

    Raises DataError where the magic number, the element type or the length is not that of an array of bytes.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(content) < 4 or content[0] != 0 or content[1] != 0 or content[2] != _IDX_BYTES:
        raise DataError(f"{path} is not an IDX file of bytes: it starts with {content[:4].hex()}")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise DataError(f"{path} ends within its header of {start} bytes")
    shape = tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=dimensions, offset=4))
    expected = int(np.prod(shape, dtype=np.int64))
    if len(content) - start != expected:
        raise DataError(f"{path} holds {len(content) - start} values, its header promises {shape} = {expected}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()


@dataclass(frozen=True)
class BatchSchedule:
    """Which training examples a rank sees at a step: a function of its fields alone, so resuming needs only the step.

    Every epoch has its own order, the same on all ranks; ranks take disjoint parts of it. The end of an epoch that does
    not fill a batch on every rank is left out, so all ranks do the same number of steps.
    """

    examples: int
    batch_size: int
    rank: int
    ranks: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.rank < self.ranks:
            raise DataError(f"batch size {self.batch_size}, rank {self.rank} of {self.ranks}: impossible")
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{self.ranks} ranks x batch size {self.batch_size} exceed the {self.examples} training examples: "
                "choose a smaller --batch-size"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in one pass over the training examples."""
        return self.examples // (self.batch_size * self.ranks)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Indices of the training examples, int64 [batch_size], for `step` (counted from 0)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = (position * self.ranks + self.rank) * self.batch_size
        return _epoch_order(self.examples, self.seed, epoch)[start : start + self.batch_size]


@lru_cache(maxsize=2)
def _epoch_order(examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    order = np.random.default_rng([seed, epoch]).permutation(examples)
    order.flags.writeable = False
    return order
