"""What the tests do in every rank: small models under real DeepSpeed engines."""

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

# Else the first engine compiles it, which takes minutes; the CPU's collectives work without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# DeepSpeed refuses fp16 where oneDNN has no fp16 arithmetic: on all but the newest Intel processors. PyTorch computes
# it on every processor, so that what is tested does not depend on this one.
get_accelerator().is_fp16_supported = lambda: True

import ds_plugin  # noqa: E402
from hvd_qoda.traffic import Traffic  # noqa: E402

deepspeed.utils.logging.set_log_level_from_string("error")
logging.getLogger("deepspeed").setLevel(logging.ERROR)

VOCABULARY = 96
WIDTH = 64


class Model(nn.Module):
    """Embedding, attention, feed-forward, norms, output: every kind of slice, sizes that no rank count divides."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY + 1, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.linear1 = nn.Linear(WIDTH, 161)
        self.linear2 = nn.Linear(161, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY + 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.linear2(torch.relu(self.linear1(self.norm(x))))
        logits = self.head(x[:, :-1])
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def batches(rank: int, micro_batch: int = 4, seed: int = 0) -> Iterator[torch.Tensor]:
    """Token sequences that count upwards from a random start, of this rank: learnable, different on every rank."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    while True:
        start = torch.randint(VOCABULARY, (micro_batch, 1), generator=generator)
        step = torch.randint(1, 3, (micro_batch, 1), generator=generator)
        yield (start + step * torch.arange(12)) % VOCABULARY


def configuration(stage: int = 0, dtype: str = "fp32", qoda: Mapping[str, Any] | None = None, **more: Any) -> dict:
    """A DeepSpeed configuration; `zero_optimization` is merged, everything else replaced."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100, **more.pop("zero_optimization", {})}
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "zero_optimization": zero,
        **more,
    }
    if dtype == "bf16":
        values["bf16"] = {"enabled": True}
    if dtype == "fp16":
        values["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 1000, "hysteresis": 1}
    if qoda is not None:
        values["qoda"] = dict(qoda)
    return copy.deepcopy(values)


def make_engine(config: Mapping[str, Any], model: nn.Module | None = None, **arguments: Any) -> Any:
    model = Model() if model is None else model
    if "optimizer" not in arguments:
        arguments.setdefault("model_parameters", model.parameters())
    engine, *_ = deepspeed.initialize(model=model, config=dict(config), **arguments)
    return engine


def train_steps(engine: Any, data: Iterator[torch.Tensor], steps: int) -> list[float]:
    """The losses of this rank, one per optimizer step (its last micro-batch)."""
    losses = []
    for _ in range(steps):
        for _ in range(engine.gradient_accumulation_steps()):
            loss = engine(next(data))
            engine.backward(loss)
            engine.step()
        losses.append(float(loss))
    return losses


def weights(engine: Any) -> torch.Tensor:
    """All parameters of the model, gathered where ZeRO 3 has parted them, as the exact float64 vector."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return torch.cat([p.detach().double().flatten().clone() for p in engine.module.parameters()])


def digest(values: torch.Tensor) -> str:
    return hashlib.blake2b(values.numpy().tobytes(), digest_size=8).hexdigest()


@contextmanager
def engine_of(config: Mapping[str, Any], model: nn.Module | None = None, **arguments: Any) -> Iterator[Any]:
    engine = make_engine(config, model, **arguments)
    try:
        yield engine
    finally:
        engine.destroy()


def run(
    config: Mapping[str, Any],
    steps: int = 8,
    make_model: Callable[[], nn.Module] = Model,
    data_seed: int = 0,
) -> dict[str, Any]:
    """Train a model; what came of it on this rank."""
    rank = torch.distributed.get_rank()
    with engine_of(config, make_model()) as engine:
        losses = train_steps(engine, batches(rank, seed=data_seed), steps)
        compressed = "qoda" in config
        traffic = ds_plugin.reducer_of(engine).traffic if compressed else Traffic()
        return {
            "losses": losses,
            "weights": weights(engine),
            "digest": digest(weights(engine)),
            "skipped": engine.skipped_steps,
            "norm": float(engine.get_global_grad_norm() or 0.0),
            "traffic": dict(traffic.sent),
            "calls": dict(traffic.calls),
            "step": ds_plugin.reducer_of(engine).step if compressed else 0,
        }


def run_all(configs: Sequence[Mapping[str, Any]], **arguments: Any) -> list[dict[str, Any]]:
    return [run(config, **arguments) for config in configs]


def error_of(call: Callable[[], Any]) -> str:
    """Type and message of the exception that a call raises in this rank."""
    try:
        call()
    except Exception as error:  # whatever it is: the test compares it
        return f"{type(error).__name__}: {error}"
    return "none"


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())
