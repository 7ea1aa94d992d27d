"""A small model trained with DistributedDataParallel and our hook, in one rank."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hvd_qoda import ddp


class Net(nn.Module):
    """Two convolutions (one of them of channels-last strides), a norm, two linear layers, and one that may rest."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3)
        self.second = nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(32)
        self.hidden = nn.Linear(32 * 16, 160)
        self.spare = nn.Linear(160, 160)
        self.out = nn.Linear(160, 10)

    def forward(self, images: torch.Tensor, spare: bool = True) -> torch.Tensor:
        x = self.norm(self.second(self.first(images).relu())).relu()
        x = self.hidden(x.flatten(1)).relu()
        return self.out(self.spare(x).relu() if spare else x)


class Run:
    """A model, its optimizer, and the hook's state (None: DDP's own all-reduce)."""

    def __init__(self, options: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32, **wrap: Any) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.model = Net().to(dtype)
        self.ddp = DistributedDataParallel(self.model, **wrap)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.state: ddp.QodaState | None = None
        if options is not None:
            self.register(ddp.QodaState(self.ddp, **options))

    def register(self, state: ddp.QodaState) -> None:
        self.state = state
        self.ddp.register_comm_hook(state, ddp.comm_hook)

    def loss(self, step: int, micro: int = 0, **forward: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * step + 100 * micro + dist.get_rank())
        labels = torch.randint(10, (8,), generator=generator)
        images = torch.randn(8, 1, 8, 8, generator=generator) + labels[:, None, None, None] / 5
        output = self.ddp(images.to(self.dtype), **forward)
        return nn.functional.cross_entropy(output.float(), labels)

    def step(self, step: int, **forward: Any) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(step, **forward)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def bits(self) -> bytes:
        """All parameters; buffers differ, as every rank has its own batch statistics."""
        return b"".join(p.detach().float().numpy().tobytes() for p in self.model.parameters())

    def gradients(self) -> torch.Tensor:
        return torch.cat([p.grad.detach().float().flatten() for p in self.model.parameters() if p.grad is not None])
