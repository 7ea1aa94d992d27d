"""Networks, and their backward passes replayed: recorded gradients, released at the times of a stated GPU.

A recording is one real forward and backward pass on this machine, on synthetic data. It gives every parameter's
gradient, and when in the backward pass it was there, as a part of the whole. A replay waits through the forward pass
and then releases the gradients at those parts of the stated backward time: while a GPU would be computing, this
machine's cores are free, as they would be there. What hooks on gradients see is a backward pass like any other, except
that nothing is copied: a parameter's gradient is the recording itself, so the next step releases what the exchange has
made of it. Times do not depend on the values.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["NETWORKS", "Network", "Replay", "record"]


@dataclass(frozen=True)
class Network:
    """A network to train.

    Attributes:
        name: what tables call it.
        forward_ms: of the stated GPU.
        backward_ms: of the stated GPU.
        computed_by: which GPU that is, and where the times come from.
    """

    name: str
    forward_ms: float
    backward_ms: float
    computed_by: str

    def build(self, seed: int) -> nn.Module:
        """The network; its `forward()` without arguments returns a loss on synthetic data."""
        torch.manual_seed(seed)
        return _Gan() if self.name == "wgan" else _Transformer()


NETWORKS: Mapping[str, Network] = {
    "wgan": Network("wgan", 7.0, 13.0, "estimate: 0.28 TFLOP a step (64 images), RTX 3090 at 40 % of its 35.6 TFLOP/s"),
    "transformer": Network(
        "transformer",
        14.5,
        29.0,
        "estimate: 0.62 TFLOP a step (4,096 tokens), RTX 3090 at 40 % of its 35.6 TFLOP/s",
    ),
}


class _Gan(nn.Module):
    """Generator and critic of a WGAN on 32 x 32 images, with about as many parameters as the one of QODA's paper."""

    def __init__(self) -> None:
        super().__init__()
        width = 128
        self.first = nn.Linear(width, width * 16)
        self.generator = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(8)])
        self.image = nn.Conv2d(width, 3, 3, padding=1)
        self.critic_first = nn.Conv2d(3, width, 3, padding=1)
        self.critic = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(7)])
        self.last = nn.Sequential(nn.Linear(width, 900), nn.ReLU(), nn.Linear(900, 1))

    def forward(self) -> torch.Tensor:
        flow = self.first(torch.randn(2, 128)).view(2, 128, 4, 4)
        for number, layer in enumerate(self.generator):
            if number % 3 == 0:
                flow = nn.functional.interpolate(flow, scale_factor=2.0)
            flow = flow + layer(torch.relu(flow))
        flow = self.critic_first(torch.tanh(self.image(torch.relu(flow))))
        for number, layer in enumerate(self.critic):
            flow = flow + layer(torch.relu(flow))
            if number % 2:
                flow = nn.functional.avg_pool2d(flow, 2)
        loss: torch.Tensor = self.last(flow.mean(dim=(2, 3))).mean()
        return loss


class _Transformer(nn.Module):
    """Eight layers of width 512: 25.2 million parameters, embeddings left out."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 8)

    def forward(self) -> torch.Tensor:
        loss: torch.Tensor = self.layers(torch.randn(1, 16, 512)).square().mean()
        return loss


@dataclass(frozen=True)
class Recording:
    """One parameter's part of a backward pass.

    Attributes:
        gradient: its gradient.
        part: of the backward pass that had gone by when the gradient was there, 0 to 1.
    """

    gradient: torch.Tensor
    part: float


def record(model: nn.Module) -> dict[str, Recording]:
    """Run a network once; its gradients by parameter, in the order in which they came."""
    came: dict[str, float] = {}

    def note(name: str) -> Any:
        def came_now(_: torch.Tensor) -> None:
            came[name] = time.perf_counter()

        return came_now

    model.forward().backward()  # the first pass compiles and allocates
    model.zero_grad(set_to_none=True)
    hooks = [p.register_post_accumulate_grad_hook(note(name)) for name, p in model.named_parameters()]
    loss = model.forward()
    begin = time.perf_counter()
    loss.backward()
    seconds = time.perf_counter() - begin
    for hook in hooks:
        hook.remove()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    order = sorted(came, key=lambda name: came[name])
    return {
        name: Recording(gradient.clone(), (came[name] - begin) / seconds)
        for name in order
        if (gradient := gradients[name]) is not None
    }


class Replay:
    """A network whose passes are replayed.

    Args:
        model: the network; its parameters get the gradients.
        recordings: see `record`.
        forward_s: seconds of a forward pass.
        backward_s: seconds of a backward pass.
    """

    def __init__(
        self, model: nn.Module, recordings: Mapping[str, Recording], forward_s: float, backward_s: float
    ) -> None:
        parameters = dict(model.named_parameters())
        # Backward goes through what forward has made from the end.
        self._steps = [(parameters[name], recordings[name]) for name in reversed(recordings)]
        self._forward_s, self._backward_s = forward_s, backward_s
        self.began = 0.0

    def forward(self) -> torch.Tensor:
        """A loss whose `backward` releases the gradients."""
        flow = torch.zeros((), requires_grad=True)
        for parameter, recording in self._steps:
            flow = _Release.apply(flow, parameter, recording, self)
        time.sleep(self._forward_s)
        return flow

    def backward(self, loss: torch.Tensor) -> None:
        """Release the gradients; ends when the stated backward pass does."""
        self.began = time.perf_counter()
        loss.backward()
        self.wait(1.0)

    def wait(self, part: float) -> None:
        """Wait until so much of the backward pass has gone by."""
        time.sleep(max(0.0, self.began + part * self._backward_s - time.perf_counter()))


class _Release(torch.autograd.Function):
    """Gives a parameter its recorded gradient when it is time."""

    @staticmethod
    def forward(
        ctx: Any, flow: torch.Tensor, parameter: torch.Tensor, recording: Recording, of: Replay
    ) -> torch.Tensor:
        ctx.recording, ctx.of = recording, of
        return flow.clone()

    @staticmethod
    def backward(ctx: Any, flow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        ctx.of.wait(ctx.recording.part)
        return flow, ctx.recording.gradient.detach(), None, None
