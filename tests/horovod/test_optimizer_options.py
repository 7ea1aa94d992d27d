"""Every option of the stock optimizer gives what it promises; expected values are computed without Horovod."""

import warnings
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from tests.horovod.training import (
    assert_gradients,
    bits_of,
    expected_means,
    local_gradients,
    loss_of,
    make_model,
    make_optimizer,
    make_qoda,
    train,
)
from tests.launcher import RankPool

SCHEMES = ("allgather", "reduce_scatter")


def step_and_check(scale: float, scheme: str, passes: int = 1, **options: Any) -> list[bytes]:
    """Two steps of `passes` backward passes each; the gradients are `scale` times the codec's mean of their sums."""
    model = make_model()
    compressor = make_qoda(model, exchange=scheme)
    if options.pop("group_by_layer", False):
        options["groups"] = [list(layer.parameters()) for layer in model if isinstance(layer, nn.Linear)]
    optimizer = make_optimizer(model, compressor, backward_passes_per_step=passes, **options)
    for step in range(2):
        own = local_gradients(model, lambda step=step: sum(loss_of(model, 10 * step + i) for i in range(passes)))
        optimizer.zero_grad()
        for i in range(passes):
            loss_of(model, 10 * step + i).backward()
        optimizer.synchronize()
        if passes == 1:
            assert_gradients(model, compressor, own, scale)
        else:
            assert_accumulated(model, compressor, own, scale)
        with optimizer.skip_synchronize():
            optimizer.step()
    return bits_of(model.parameters())


def assert_accumulated(model: nn.Module, compressor: Any, own: dict[str, torch.Tensor], scale: float) -> None:
    """As `assert_gradients`, but sums of several passes may be rounded otherwise before they are quantized."""
    means = expected_means(compressor, own, compressor.step)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        off = ((parameter.grad - scale * means[name]).abs() > 1e-6).float().mean()
        assert off < 0.01, name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("scale", "options"),
    [
        (1.0, {"op": "Average"}),
        (4.0, {"op": "Sum"}),
        (1.0, {"op": "Average", "gradient_predivide_factor": 3.0}),
        (1.0, {"op": "Average", "groups": 2}),
        (4.0, {"op": "Sum", "groups": 3}),
        (1.0, {"op": "Average", "group_by_layer": True}),
    ],
)
def test_reduction_options(four_ranks: RankPool, scheme: str, scale: float, options: dict[str, Any]) -> None:
    results = four_ranks.run(step_and_check_named, scale, scheme, options)
    assert all(result == results[0] for result in results)


def step_and_check_named(scale: float, scheme: str, options: dict[str, Any], passes: int = 1) -> list[bytes]:
    options = dict(options)
    return step_and_check(scale, scheme, passes, op=getattr(hvd, options.pop("op", "Average")), **options)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("scale", "options"), [(1.0, {}), (2.0, {"op": "Sum"}), (1.0, {"groups": 2})])
def test_backward_passes_per_step(two_ranks: RankPool, scheme: str, scale: float, options: dict[str, Any]) -> None:
    results = two_ranks.run(step_and_check_named, scale, scheme, options, passes=3)
    assert results[0] == results[1]


def off_equals_stock(op: str) -> None:
    """With 32 bits everything is what it is without a compressor, bit for bit."""
    results = []
    for compress in (True, False):
        model = make_model()
        compression = make_qoda(model, bits=32) if compress else hvd.Compression.none
        optimizer = make_optimizer(model, compression, op=getattr(hvd, op))
        train(model, optimizer, range(4))
        results.append(bits_of(model.parameters()))
    assert results[0] == results[1]


@pytest.mark.parametrize("op", ["Average", "Sum"])
def test_exact_codebooks_are_horovods_own_all_reduce(two_ranks: RankPool, op: str) -> None:
    two_ranks.run(off_equals_stock, op)


def in_process_set(scheme: str, op: str) -> Any:
    """Two sets of two ranks train two models side by side."""
    sets = [hvd.add_process_set([0, 2]), hvd.add_process_set([1, 3])]
    try:
        mine = sets[hvd.rank() % 2]
        model = make_model()
        compressor = make_qoda(model, process_set=mine, exchange=scheme)
        optimizer = make_optimizer(model, compressor, process_set=mine, op=getattr(hvd, op))
        for step in range(3):
            own = local_gradients(model, lambda step=step: loss_of(model, step))
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.synchronize()
            assert_gradients(model, compressor, own, 2.0 if op == "Sum" else 1.0, process_set=mine)
            with optimizer.skip_synchronize():
                optimizer.step()
        return bits_of(model.parameters())
    finally:
        hvd.barrier()
        for process_set in sets:
            hvd.remove_process_set(process_set)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("op", ["Average", "Sum"])
def test_process_sets(four_ranks: RankPool, scheme: str, op: str) -> None:
    results = four_ranks.run(in_process_set, scheme, op)
    assert results[0] == results[2]
    assert results[1] == results[3]
    assert results[0] != results[1]


def only_some_ranks_train() -> list[bytes]:
    """Ranks outside the set make optimizer and compressor too, and step alone, as Horovod allows."""
    chosen = hvd.add_process_set([1, 2])
    try:
        model = make_model()
        compressor = make_qoda(model, process_set=chosen)
        optimizer = make_optimizer(model, compressor, process_set=chosen)
        train(model, optimizer, range(3))
        assert compressor.step == (3 if chosen.included() else 0)
        return bits_of(model.parameters())
    finally:
        hvd.barrier()
        hvd.remove_process_set(chosen)


def test_ranks_outside_the_process_set_train_alone(four_ranks: RankPool) -> None:
    results = four_ranks.run(only_some_ranks_train)
    assert results[1] == results[2]
    assert results[0] != results[1]
    assert results[0] != results[3]


class Branches(nn.Module):
    """Each rank and step uses another branch: gradients are missing, and hooks fire in another order on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(40, 40) for _ in range(4))
        self.order = [0, 1, 2, 3]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in self.order:
            x = torch.tanh(self.branches[index](x))
        return x


def with_missing_gradients(scheme: str, set_to_none: bool) -> list[bytes]:
    model = Branches()
    compressor = make_qoda(model, exchange=scheme)
    optimizer = make_optimizer(model, compressor)
    for step in range(4):
        rank = hvd.rank()
        model.order = {0: [0, 1, 2], 1: [2, 1, 0], 2: [3, 0], 3: [0, 3, 2, 1]}[(rank + step) % 4]
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(10 * step + rank))
        own = local_gradients(model, lambda x=x: model(x).square().sum())
        torch.optim.Optimizer.zero_grad(optimizer, set_to_none=set_to_none)
        model(x).square().sum().backward()
        optimizer.synchronize()
        assert_gradients(model, compressor, own)
        with optimizer.skip_synchronize():
            optimizer.step()
    assert compressor.step == 4
    return bits_of(model.parameters())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_horovod_hook_order_and_missing_gradients_differ_between_ranks(
    four_ranks: RankPool, scheme: str, set_to_none: bool
) -> None:
    results = four_ranks.run(with_missing_gradients, scheme, set_to_none)
    assert all(result == results[0] for result in results)


def clipped() -> list[bytes]:
    """The documented pattern for clipping: synchronize, clip, step without synchronizing; and the host's warning."""
    model = make_model()
    optimizer = make_optimizer(model, make_qoda(model))
    for step in range(3):
        optimizer.zero_grad()
        (100 * loss_of(model, step)).backward()
        optimizer.synchronize()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1
        with optimizer.skip_synchronize():
            optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss_of(model, 9).backward()
        optimizer.synchronize()
        optimizer.step()  # exchanges once more
    assert any("without" in str(warning.message) for warning in caught)
    return bits_of(model.parameters())


def test_synchronize_then_step_without_synchronize(two_ranks: RankPool) -> None:
    results = two_ranks.run(clipped)
    assert results[0] == results[1]


def every_synchronize_is_an_exchange() -> int:
    """Quantizing the same gradients twice gives other random numbers: the counter advances with every exchange."""
    model = make_model()
    compressor = make_qoda(model)
    optimizer = make_optimizer(model, compressor)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            pass  # the step is skipped, as loss scaling does
        found.append(model[0].weight.grad.clone())
    assert not torch.equal(found[0], found[1])
    assert torch.allclose(found[0], found[1], atol=0.2 * float(found[0].abs().max()))
    return compressor.step


def test_random_key_counter_advances_with_skipped_steps(two_ranks: RankPool) -> None:
    assert two_ranks.run(every_synchronize_is_an_exchange) == [2, 2]


def two_optimizers(shared: bool) -> list[list[bytes]]:
    """Generator and critic in turns, with a compressor each, or one for both."""
    models = [make_model(seed) for seed in (0, 1)]
    both = nn.ModuleDict({"generator": models[0], "critic": models[1]})
    if shared:
        compressor = make_qoda(both)
        compressors = [compressor, compressor]
    else:
        compressors = [make_qoda(model, name=name) for name, model in both.items()]
    optimizers = []
    for (name, model), compressor in zip(both.items(), compressors, strict=True):
        named = [(f"{name}.{key}", p) for key, p in model.named_parameters()]
        optimizers.append(
            hvd.DistributedOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=named, compression=compressor
            )
        )
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, [step])
    # Both backward passes first: exchanges of both are under way together.
    for step in range(3, 6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for model in models:
            loss_of(model, step).backward()
        for optimizer in optimizers[:: 1 if step % 2 else -1]:
            optimizer.step()
    return [bits_of(model.parameters()) for model in models]


@pytest.mark.parametrize("shared", [False, True])
def test_two_optimizers_in_turns(two_ranks: RankPool, shared: bool) -> None:
    results = two_ranks.run(two_optimizers, shared)
    assert results[0] == results[1]


def update_due_in_the_second_optimizers_step() -> tuple[list[int], bytes]:
    """Every second step begins while gradients of the other optimizer are under way; the update is due then."""
    models = [make_model(seed) for seed in (0, 1)]
    both = nn.ModuleDict({"generator": models[0], "critic": models[1]})
    compressor = make_qoda(both, update_levels={"at": (4,), "every": None, "samples": 2})
    first, second = [
        hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            named_parameters=[(f"{name}.{key}", p) for key, p in model.named_parameters()],
            compression=compressor,
        )
        for name, model in both.items()
    ]
    versions = []
    for step in range(4):
        for model in models[:: 1 if hvd.rank() == 0 else -1]:
            loss_of(model, 2 * step).backward()
        first.step()
        first.zero_grad()
        loss_of(models[0], 2 * step + 1).backward()
        versions += [compressor.step, compressor.registry.version]
        first.step()
        second.step()
        first.zero_grad()
        second.zero_grad()
    return versions, compressor.registry.digest


def test_an_update_due_while_another_optimizers_gradients_are_under_way_comes_next(two_ranks: RankPool) -> None:
    results = two_ranks.run(update_due_in_the_second_optimizers_step)
    assert results[0] == results[1]
    assert results[0][0] == [2, 0, 4, 0, 6, 1, 8, 1]


def host_throws_a_step_away() -> list[bytes]:
    """Stock Horovod's load_state_dict forgets gradients under way; the next step must not mix with them."""
    model = make_model()
    compressor = make_qoda(model, exchange="reduce_scatter")
    optimizer = make_optimizer(model, compressor, torch.optim.Adam)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    loss_of(model, 2).backward()
    optimizer.load_state_dict(saved)
    own = local_gradients(model, lambda: loss_of(model, 3))
    optimizer.zero_grad()
    loss_of(model, 3).backward()
    optimizer.synchronize()
    assert_gradients(model, compressor, own)
    assert compressor.step == 4
    return bits_of(model.parameters())


def test_optimizer_load_state_dict_between_backward_and_step(two_ranks: RankPool) -> None:
    results = two_ranks.run(host_throws_a_step_away)
    assert results[0] == results[1]


def frozen_and_thawed() -> list[bytes]:
    """Parameters that need no gradient for a while are left out, and join again."""
    model = make_model()
    compressor = make_qoda(model)
    optimizer = make_optimizer(model, compressor)
    train(model, optimizer, range(2))
    for parameter in model[0].parameters():
        parameter.requires_grad = False
    for step in range(2, 4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    for parameter in model[0].parameters():
        parameter.requires_grad = True
    train(model, optimizer, range(4, 6))
    return bits_of(model.parameters())


def test_frozen_parameters(two_ranks: RankPool) -> None:
    results = two_ranks.run(frozen_and_thawed)
    assert results[0] == results[1]


def from_named_parameters() -> None:
    model = make_model()
    compressor = make_qoda(model.named_parameters())
    optimizer = make_optimizer(model, compressor)
    own = local_gradients(model, lambda: loss_of(model, 0))
    loss_of(model, 0).backward()
    optimizer.synchronize()
    assert_gradients(model, compressor, own)


def test_compressor_from_named_parameters(two_ranks: RankPool) -> None:
    two_ranks.run(from_named_parameters)
