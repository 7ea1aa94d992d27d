"""Loss and accuracy of a model over examples that all ranks divide among themselves."""

from dataclasses import dataclass

import torch
from torch import nn

from launch.train.data import Examples
from launch.train.ranks import Ranks, gather_rows

_BATCH = 250


@dataclass(frozen=True)
class Score:
    """Mean cross entropy in nats, and the share of examples classified rightly."""

    loss: float
    accuracy: float


def evaluate(model: nn.Module, examples: Examples, ranks: Ranks, name: str) -> Score:
    """Score `model` on `examples`, each rank taking every size-th one; all ranks get the same result."""
    own = examples.select(range(ranks.rank, len(examples), ranks.size))
    loss, right = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(own), _BATCH):
            labels = own.labels[start : start + _BATCH]
            logits = model(own.images[start : start + _BATCH])
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(dim=1) == labels).sum())
    model.train()
    total = gather_rows([loss, right, len(own)], ranks, f"evaluate.{name}").sum(axis=0)
    return Score(loss=float(total[0] / total[2]), accuracy=float(total[1] / total[2]))
