"""What DeepSpeed's tests of its 1-bit optimizers asked for, before both were removed, asked of compressed gradients.

Training in fp32 and fp16 is in test_stages.py and test_half_precision.py, resuming in test_checkpoints.py.
"""

import os
from typing import Any

import pytest
import torch
from torch import nn

import ds_plugin
from hvd_qoda.exchange import Stamp
from qoda_kernels.codec import Codec
from qoda_kernels.layout import MessagePlan, Slice
from tests.deepspeed.training import VOCABULARY, Model, batches, configuration, digest, engine_of, train_steps, weights
from tests.launcher import RankPool

STAGES = (0, 1, 2, 3)


class WithUnusedParts(Model):
    """A layer that no gradient reaches, and a parameter without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(64, 64)
        self.empty = nn.Parameter(torch.zeros(0))


def with_unused_parts() -> list[tuple[bool, str]]:
    results = []
    rank = torch.distributed.get_rank()
    for stage in STAGES:
        model = WithUnusedParts()
        if stage == 3:
            del model.empty  # DeepSpeed itself cannot part it
        before = model.unused.weight.detach().clone()
        config = configuration(stage, "fp32", {"bits": 5}, optimizer={"type": "QODAdam", "params": {"lr": 1e-3}})
        with engine_of(config, model) as engine:
            train_steps(engine, batches(rank), 3)
            end = weights(engine)
            parts = dict(zip((n for n, _ in engine.module.named_parameters()), _split(engine, end), strict=True))
            results.append((torch.equal(parts["unused.weight"], before.double().flatten()), digest(end)))
    return results


def _split(engine: Any, flat: torch.Tensor) -> list[torch.Tensor]:
    return list(flat.split([getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()]))


def test_layers_without_gradients_and_empty_parameters(two_ranks: RankPool) -> None:
    ranks = two_ranks.run(with_unused_parts)
    for stage in STAGES:
        assert ranks[0][stage][0], f"ZeRO {stage}: a layer without gradients has moved"
        assert ranks[0][stage][1] == ranks[1][stage][1]


def masked() -> list[float]:
    """The largest change of embedding rows that no batch holds; in the 1-bit tests this was a mask of the momentum."""
    results = []
    rank = torch.distributed.get_rank()
    for stage in STAGES:
        model = Model()
        before = model.embedding.weight.detach().clone()[VOCABULARY:]
        sgd = {"type": "SGD", "params": {"lr": 0.5, "momentum": 0.9}}
        config = configuration(stage, "fp32", {"bits": 3}, optimizer=sgd, zero_allow_untested_optimizer=True)
        with engine_of(config, model) as engine:
            train_steps(engine, batches(rank), 4)
            rows = _split(engine, weights(engine))[0].view(-1, before.shape[1])[VOCABULARY:]
            results.append(float((rows - before).abs().max()))
    return results


def test_coordinates_whose_gradients_are_zero_stay_exactly_where_they_are(two_ranks: RankPool) -> None:
    assert two_ranks.run(masked)[0] == [0.0, 0.0, 0.0, 0.0]


def after_an_overflow(folder: str, stage: int) -> tuple[bool, int]:
    """A checkpoint that was saved right after a step that overflowed."""
    rank = torch.distributed.get_rank()
    config = configuration(stage, "fp16", {"bits": 5})
    with engine_of(config) as engine:
        data = batches(rank)
        train_steps(engine, data, 2)
        engine.backward(engine(next(data)) * float("inf"))
        engine.step()
        engine.save_checkpoint(folder)
        train_steps(engine, data, 2)
        uninterrupted = digest(weights(engine))
    with engine_of(config) as engine:
        data = batches(rank)
        engine.load_checkpoint(folder)
        for _ in range(3):
            next(data)
        train_steps(engine, data, 2)
        return digest(weights(engine)) == uninterrupted, engine.skipped_steps


@pytest.mark.parametrize("stage", [0, 2])
def test_a_checkpoint_after_an_overflow(two_ranks: RankPool, tmp_path: os.PathLike[str], stage: int) -> None:
    for same, skipped in two_ranks.run(after_an_overflow, str(tmp_path), stage):
        assert same
        assert skipped == 1


def one_step_of_sgd() -> tuple[bool, bool]:
    """One step without ZeRO, and the same from plain torch and the codec's definition."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    lr = 0.25
    sgd = {"type": "SGD", "params": {"lr": lr}}
    config = configuration(0, "fp32", {"bits": 4, "seed": 9}, optimizer=sgd, gradient_clipping=0.0)
    batch = next(batches(rank))

    oracle = Model()
    gradients = torch.autograd.grad(oracle(batch), list(oracle.parameters()))
    everybody: list[Any] = [None] * size
    torch.distributed.all_gather_object(everybody, [gradient.flatten() for gradient in gradients])
    with engine_of(config) as engine:
        registry = ds_plugin.reducer_of(engine).registry
        engine.backward(engine(batch))
        engine.step()
        found = [parameter.detach().clone() for parameter in engine.module.parameters()]
    slices = [
        Slice(entry.name, 0, entry.numel, torch.float32, entry.codebook, entry.offset)
        for entry in registry.parameters.values()
    ]
    codec = Codec(MessagePlan.build(slices, registry.codebooks), registry.codebooks)
    contexts = [Stamp(seed=9, counter=1, registry_version=0).context(0, source, 0) for source in range(size)]
    messages = [codec.encode(own, context) for own, context in zip(everybody, contexts, strict=True)]
    sums = codec.decode_mean(messages, contexts, scale=1.0)
    expected = [
        parameter.detach() - lr * (total.view(parameter.shape) * (1.0 / size))
        for parameter, total in zip(oracle.parameters(), sums, strict=True)
    ]
    exact = [
        parameter.detach() - lr * torch.stack([own[i] for own in everybody]).mean(0).view(parameter.shape)
        for i, parameter in enumerate(oracle.parameters())
    ]
    same = all(torch.allclose(one, other, rtol=0, atol=1e-7) for one, other in zip(found, expected, strict=True))
    return same, all(torch.allclose(one, other, rtol=0, atol=1e-7) for one, other in zip(found, exact, strict=True))


def test_a_step_is_what_plain_torch_and_the_codec_make_of_it(two_ranks: RankPool) -> None:
    for same, unquantized in two_ranks.run(one_step_of_sgd):
        assert same
        assert not unquantized
