"""Text as bytes, for the language model: where it comes from, and which windows each rank sees."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from launch.train.data import DataError

__all__ = ["VOCABULARY", "Text", "load_text"]

VOCABULARY = 256  # bytes
SHIPPED = "scikit-learn's descriptions of its data sets"
_SUFFIXES = (".txt", ".md", ".rst")
_HELD_OUT = 0.1


@dataclass(frozen=True)
class Text:
    """A text, and the end of it that is not trained on; uint8 tensors."""

    name: str
    train: torch.Tensor
    test: torch.Tensor

    def batch(self, step: int, rank: int, size: int, context: int, seed: int) -> torch.Tensor:
        """Windows of the training text: int64 [size, context + 1]; a function of its arguments."""
        generator = np.random.default_rng((seed, step, rank))
        starts = generator.integers(0, len(self.train) - context, size)
        return torch.stack([self.train[start : start + context + 1] for start in starts.tolist()]).long()

    def test_windows(self, context: int, most: int = 64) -> torch.Tensor:
        """At most `most` consecutive windows of the held-out text: int64 [n, context + 1]."""
        count = min(most, (len(self.test) - 1) // context)
        return torch.stack([self.test[i * context : (i + 1) * context + 1] for i in range(count)]).long()


def load_text(folder: Path | None) -> Text:
    """The .txt, .md and .rst files of a folder and the folders in it; without one, a text that scikit-learn ships.

    Raises DataError where there are none, or too little text.
    """
    if folder is None:
        import sklearn.datasets

        folder, name = Path(sklearn.datasets.__file__).parent / "descr", SHIPPED
    else:
        name = str(folder)
    files = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
    content = b"\n".join(path.read_bytes() for path in files)
    if len(content) < 10_000:
        raise DataError(
            f"{folder} holds {len(content)} bytes of text in files {', '.join(_SUFFIXES)}; 10,000 are needed"
        )
    everything = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    kept = int(len(everything) * (1 - _HELD_OUT))
    return Text(name, everything[:kept], everything[kept:])
