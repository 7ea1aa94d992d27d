"""Our optimizer, which exchanges gradients in fusion buffers while backward goes on: everything the stock one takes."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import nn

import hvd_qoda
from hvd_qoda.errors import ConfigError, QodaError, RankMismatchError, UnsupportedError
from hvd_qoda.optim import QODA
from hvd_qoda.step_account import CONTROL
from hvd_qoda.telemetry import Telemetry
from tests.horovod.test_gradients import Bag, Embeddings
from tests.horovod.test_optimizer_options import Branches
from tests.horovod.test_state import through_a_file
from tests.horovod.training import (
    ListSink,
    assert_gradients,
    bits_of,
    gather,
    gradients,
    local_gradients,
    loss_of,
    make_model,
    make_optimizer,
    make_qoda,
    one_step,
    train,
)
from tests.launcher import RankPool, run_ranks

SMALL_MB = 0.01  # the test model then has four buffers


def overlapping(
    model: nn.Module,
    compression: Any,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    lr: float = 0.1,
    **options: Any,
) -> Any:
    """Our optimizer, with small fusion buffers unless told otherwise."""
    options = {"fusion_buffer_mb": SMALL_MB, **options}
    return hvd_qoda.DistributedOptimizer(
        make(model.parameters(), lr=lr), model.named_parameters(), compression, model=model, **options
    )


# -- what arrives ----------------------------------------------------------------------------------------------------


def means_with(scale: float, options: dict[str, Any], passes: int = 1) -> list[bytes]:
    """Three steps whose gradients are `scale` times the codec's means, bit for bit, as under the stock optimizer."""
    options = dict(options)
    model = make_model()
    compression = make_qoda(model, exchange="allgather")
    if options.pop("group_by_layer", False):
        options["groups"] = [list(layer.parameters()) for layer in model if isinstance(layer, nn.Linear)]
    options["op"] = getattr(hvd, options.get("op", "Average"))
    optimizer = overlapping(model, compression, backward_passes_per_step=passes, **options)
    for step in range(3):
        own = local_gradients(model, lambda step=step: sum(loss_of(model, 10 * step + i) for i in range(passes)))
        optimizer.zero_grad()
        for i in range(passes):
            loss_of(model, 10 * step + i).backward()
        if passes > 1:  # sums of several passes are rounded in another order than those of `local_gradients`
            own = gradients(model)
        optimizer.synchronize()
        assert_gradients(model, compression, own, scale)
        with optimizer.skip_synchronize():
            optimizer.step()
    assert compression.step == 3
    return bits_of(model.parameters())


OPTIONS = [
    (1.0, {}),
    (1.0, {"fusion_buffer_mb": 100.0}),
    (0.0, {"op": "Sum"}),
    (1.0, {"gradient_predivide_factor": 3.0}),
    (1.0, {"groups": 2}),
    (0.0, {"op": "Sum", "group_by_layer": True}),
]


@pytest.mark.parametrize(("scale", "options"), OPTIONS)
def test_reduction_options_2(two_ranks: RankPool, scale: float, options: dict[str, Any]) -> None:
    results = two_ranks.run(means_with, scale or 2.0, options)
    assert results[0] == results[1]


@pytest.mark.parametrize(("scale", "options"), [OPTIONS[0], OPTIONS[5]])
def test_reduction_options_4(four_ranks: RankPool, scale: float, options: dict[str, Any]) -> None:
    results = four_ranks.run(means_with, scale or 4.0, options)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("passes", [2, 3])
def test_backward_passes_per_step(two_ranks: RankPool, passes: int) -> None:
    results = two_ranks.run(means_with, 1.0, {}, passes)
    assert results[0] == results[1]


def integers(shape: tuple[int, ...], dtype: torch.dtype, step: int) -> torch.Tensor:
    """Gradients whose sums and means over 2 or 4 ranks are exact in every dtype, whatever the order of additions."""
    generator = torch.Generator().manual_seed(100 * step + hvd.rank())
    return (4 * torch.randint(-8, 9, shape, generator=generator)).to(dtype)


MIXED = {
    "large": ((300, 401), torch.float32),
    "sixteen": ((64, 65), torch.float16),
    "empty": ((0, 5), torch.float32),
    "scalar": ((), torch.float32),
    "sixty_four": ((50, 30), torch.float64),
    "brain": ((20, 30), torch.bfloat16),
    "vector": ((77,), torch.float32),
}


def exact_mixture(op: str, fusion_buffer_mb: float) -> dict[str, int]:
    """At 32 bits everything is exact, for all dtypes together; returns the collectives of the second step."""
    model = Bag({name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in MIXED.items()})
    compression = make_qoda(model, bits=32)
    options = {"op": getattr(hvd, op), "fusion_buffer_mb": fusion_buffer_mb}
    optimizer = overlapping(model, compression, **options)
    for step in range(2):
        before = compression.traffic
        wanted = {name: integers(shape, dtype, step) for name, (shape, dtype) in MIXED.items()}
        optimizer.zero_grad()
        model.loss(wanted).backward()
        optimizer.synchronize()
        for name, parameter in model.named_parameters():
            total = sum(part.double() for part in gather(wanted[name], name))
            expected = (total if op == "Sum" else total / hvd.size()).to(parameter.dtype)
            assert parameter.grad is not None
            assert parameter.grad.dtype == expected.dtype
            assert torch.equal(parameter.grad, expected), name
        with optimizer.skip_synchronize():
            optimizer.step()
    return dict((compression.traffic - before).calls)


@pytest.mark.parametrize("op", ["Average", "Sum"])
def test_exact_gradients_of_any_dtype_travel_together(two_ranks: RankPool, four_ranks: RankPool, op: str) -> None:
    # Two ranks: one message, an all-reduce of float64, a roll call.
    assert two_ranks.run(exact_mixture, op, 100.0) == [{"all_gather": 1, "all_reduce": 2}] * 2
    # More ranks: all-reduces of float32, float16 and float64, a roll call; and bfloat16, which Horovod cannot reduce.
    assert four_ranks.run(exact_mixture, op, 100.0) == [{"all_gather": 1, "all_reduce": 4}] * 4
    four_ranks.run(exact_mixture, op, SMALL_MB)


def exact_equals_stock(make: str, **settings: Any) -> list[bytes]:
    results = []
    for ours in (True, False):
        model = make_model()
        wrap = overlapping if ours else make_optimizer
        compression = make_qoda(model, **settings) if ours else hvd.Compression.none
        optimizer = wrap(model, compression, getattr(torch.optim, make))
        train(model, optimizer, range(4))
        results.append(bits_of(model.parameters()))
    assert results[0] == results[1]
    return results[0]


@pytest.mark.parametrize(("make", "settings"), [("SGD", {"bits": 32}), ("Adam", {"exchange": "off"})])
def test_32_bits_are_stock_training_bit_for_bit(two_ranks: RankPool, make: str, settings: dict[str, Any]) -> None:
    results = two_ranks.run(exact_equals_stock, make, **settings)
    assert results[0] == results[1]


def reduce_scatter_is_near(steps: int = 3, exchange: str = "reduce_scatter") -> list[bytes]:
    """Shares are those of a buffer, so bits differ from the stock route's; the error is that of two quantizations.

    Nothing is left to Horovod's own all-reduce: with three ranks or more it adds in an order that depends on time.
    """
    model = make_model()
    compression = make_qoda(model, exchange=exchange, layers=({"name": "*", "bits": 5},))
    optimizer = overlapping(model, compression)
    for step in range(steps):
        own = local_gradients(model, lambda step=step: loss_of(model, step))
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.synchronize()
        for name, parameter in model.named_parameters():
            mean = sum(gather(own[name], name)) / hvd.size()
            assert parameter.grad is not None
            assert (parameter.grad - mean).norm() <= 0.3 * mean.norm(), name
        with optimizer.skip_synchronize():
            optimizer.step()
    return bits_of(model.parameters())


def test_hierarchical_exchange(two_ranks: RankPool) -> None:
    results = two_ranks.run(reduce_scatter_is_near, exchange="hierarchical")
    assert results[0] == results[1]


def test_reduce_scatter(four_ranks: RankPool) -> None:
    results = four_ranks.run(reduce_scatter_is_near)
    assert all(result == results[0] for result in results)
    assert four_ranks.run(reduce_scatter_is_near)[0] == results[0]


def test_non_contiguous_gradients(two_ranks: RankPool) -> None:
    two_ranks.run(with_layouts)


def with_layouts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3)).to(memory_format=torch.channels_last)
    compression = make_qoda(model, exchange="allgather")
    optimizer = overlapping(model, compression)
    generator = torch.Generator().manual_seed(hvd.rank())
    for layout in (
        torch.randn(16, 16, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        torch.randn(16, 1, 1, 1, generator=generator).expand(16, 16, 3, 3),
    ):
        own = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
        own["1.weight"] = layout.clone()
        for key, parameter in model.named_parameters():
            parameter.grad = layout if key == "1.weight" else own[key].clone()
        optimizer.synchronize()
        assert_gradients(model, compression, own)
        optimizer.zero_grad()


# -- how it travels --------------------------------------------------------------------------------------------------


def collectives_of_a_step(scheme: str, fusion_buffer_mb: float) -> tuple[int, int, dict[str, int]]:
    """Number of buffers, of those that hold something to quantize, and of collectives of every kind."""
    model = make_model()
    compression = make_qoda(model, exchange=scheme)
    optimizer = overlapping(model, compression, fusion_buffer_mb=fusion_buffer_mb)
    train(model, optimizer, range(2))
    before = compression.traffic
    train(model, optimizer, [2])
    buffers, registry = optimizer.fusion_buffers(), compression.registry
    quantized = [
        any(not registry.codebooks[registry.parameters[name].codebook].is_exact for name in names) for names in buffers
    ]
    return len(buffers), sum(quantized), dict((compression.traffic - before).calls)


@pytest.mark.parametrize(("fusion_buffer_mb", "buffers", "quantized"), [(100.0, 1, 1), (SMALL_MB, 4, 2)])
def test_one_collective_for_each_buffer_and_phase(
    two_ranks: RankPool, fusion_buffer_mb: float, buffers: int, quantized: int
) -> None:
    roll_call = {"all_reduce": 1}
    for found in two_ranks.run(collectives_of_a_step, "allgather", fusion_buffer_mb):
        assert found == (buffers, quantized, {"all_gather": buffers, **roll_call})
    # Buffers with nothing to quantize are gathered: between two ranks that takes the fewest bytes.
    for found in two_ranks.run(collectives_of_a_step, "reduce_scatter", fusion_buffer_mb):
        assert found == (buffers, quantized, {"all_to_all": quantized, "all_gather": buffers, **roll_call})


def events_of_a_step() -> list[str]:
    """What happens in a step: buffers that are encoded and sent, layers that backward has gone through."""
    model = make_model()
    compression = make_qoda(model)
    optimizer = overlapping(model, compression)
    train(model, optimizer, range(2))
    events: list[str] = []
    for number, buffer in enumerate(optimizer._gradient_exchange._buffers):
        (message,) = buffer.parcels
        start, finish = message.exchange.start, message.exchange.finish

        def started(*arguments: Any, start: Any = start, number: int = number) -> None:
            start(*arguments)
            events.append(f"sent {number}")

        def finished(*arguments: Any, finish: Any = finish, number: int = number) -> None:
            events.append(f"finished {number}")
            finish(*arguments)

        message.exchange.start, message.exchange.finish = started, finished
    for name, layer in model.named_children():
        layer.register_full_backward_hook(lambda *_, name=name: events.append(f"layer {name}"))
    loss_of(model, 2).backward()
    events.append("backward ended")
    optimizer.step()
    return events


def test_buffers_are_sent_while_backward_goes_on(two_ranks: RankPool) -> None:
    for events in two_ranks.run(events_of_a_step):
        sent = [event for event in events if event.startswith("sent")]
        assert sent == [f"sent {number}" for number in range(len(sent))]
        ended = events.index("backward ended")
        assert events.index("sent 1") < events.index("layer 1") < events.index(sent[-1]) < ended
        assert all(events.index(event) > ended for event in events if event.startswith("finished"))


class Backwards(nn.Module):
    """Layers used in the reverse order of their registration, so that the usual order of gradients is the wrong one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in reversed(self.layers):
            x = torch.tanh(layer(x))
        return x[:, :7]


def order_is_observed() -> tuple[list[tuple[str, ...]], list[bytes]]:
    model = Backwards()
    compression = make_qoda(model, worker_norms=True)
    optimizer = overlapping(model, compression)
    norms = []
    for step in range(4):
        train(model, optimizer, [step])
        norms.append(compression.worker_norms())
    # The vectors before survive that buffers are made anew: norms are those of the stock route.
    stock = Backwards()
    compressor = make_qoda(stock, worker_norms=True)
    stock_optimizer = make_optimizer(stock, compressor)
    for step in range(4):
        train(stock, stock_optimizer, [step])
        wanted = compressor.worker_norms()
        assert norms[step].squared_norms == pytest.approx(wanted.squared_norms, rel=1e-9)
        assert norms[step].squared_changes == pytest.approx(wanted.squared_changes, rel=1e-9)
    return optimizer.fusion_buffers(), bits_of(model.parameters())


def test_buffers_follow_the_order_of_the_first_backward(two_ranks: RankPool) -> None:
    results = two_ranks.run(order_is_observed)
    assert results[0] == results[1]
    names = [name for buffer in results[0][0] for name in buffer]
    assert [name for name in names if name.endswith("weight")] == [f"layers.{i}.weight" for i in range(5)]


# -- gradients that are missing, or come in another order ------------------------------------------------------------


def with_missing_gradients(scheme: str, set_to_none: bool) -> list[bytes]:
    model = Branches()
    compression = make_qoda(model, exchange=scheme)
    optimizer = overlapping(model, compression)
    for step in range(4):
        rank = hvd.rank()
        model.order = {0: [0, 1, 2], 1: [2, 1, 0], 2: [3, 0], 3: [0, 3, 2, 1]}[(rank + step) % 4]
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(10 * step + rank))
        own = local_gradients(model, lambda x=x: model(x).square().sum())
        optimizer.zero_grad(set_to_none=set_to_none)
        model(x).square().sum().backward()
        optimizer.synchronize()
        if scheme == "allgather":
            assert_gradients(model, compression, own)
        with optimizer.skip_synchronize():
            optimizer.step()
    return bits_of(model.parameters())


@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_hook_order_and_missing_gradients_differ_between_ranks(
    four_ranks: RankPool, scheme: str, set_to_none: bool
) -> None:
    results = four_ranks.run(with_missing_gradients, scheme, set_to_none)
    assert all(result == results[0] for result in results)


def sparse_embeddings(sparse_as_dense: bool, told: bool) -> list[bytes]:
    """Sparse gradients, some of which are missing on some ranks."""
    model, dense = Embeddings(), Embeddings(sparse=False)
    compression = make_qoda(model if told else model.named_parameters(), exchange="allgather", bits=8)
    optimizer = hvd_qoda.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        fusion_buffer_mb=SMALL_MB,
    )
    for step in range(3):
        used = {0: "abc", 1: "ab", 2: "bc"}[(step + hvd.rank()) % 3] if told else "abc"
        optimizer.zero_grad()
        dense.zero_grad()
        dense.load_state_dict(model.state_dict())
        dense.loss(step, used).backward()
        model.loss(step, used).backward()
        optimizer.synchronize()
        for name, parameter in model.named_parameters():
            gradient = dict(dense.named_parameters())[name].grad
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            mean = sum(gather(gradient, name)) / hvd.size()
            assert parameter.grad is not None
            assert parameter.grad.is_sparse == (name != "matrix")
            tolerance = 0.02 if sparse_as_dense or not told or name == "matrix" else 1e-6
            assert (parameter.grad.to_dense() - mean).norm() <= tolerance * mean.norm(), name
        with optimizer.skip_synchronize():
            optimizer.step()
    return bits_of(model.parameters())


@pytest.mark.parametrize(("sparse_as_dense", "told"), [(True, True), (False, True), (False, False)])
def test_sparse_embeddings(two_ranks: RankPool, sparse_as_dense: bool, told: bool) -> None:
    results = two_ranks.run(sparse_embeddings, sparse_as_dense, told)
    assert results[0] == results[1]


def frozen_thawed_and_added() -> list[bytes]:
    """Parameters are frozen, thawed, and added, equally on all ranks."""
    model = make_model()
    for parameter in model[2].parameters():
        parameter.requires_grad = False
    compression = make_qoda(model, exchange="allgather")
    head = list(model[4].parameters())
    body = [parameter for parameter in model.parameters() if all(parameter is not p for p in head)]
    optimizer = hvd_qoda.DistributedOptimizer(
        torch.optim.SGD(body, lr=0.1), compression=compression, fusion_buffer_mb=SMALL_MB
    )
    trained = {name for name in ("0.weight", "0.bias")}

    def step_and_check(step: int) -> None:
        wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss_of(model, step), list(wanted.values()))
        own = {name: gradient for name, gradient in zip(wanted, found, strict=True) if name in trained}
        model.zero_grad()
        loss_of(model, step).backward()
        optimizer.synchronize()
        for name, gradient in own.items():
            mean = sum(gather(gradient, name)) / hvd.size()
            assert wanted[name].grad is not None
            assert (wanted[name].grad - mean).norm() <= 0.3 * mean.norm(), name
        with optimizer.skip_synchronize():
            optimizer.step()
        assert {name for names in optimizer.fusion_buffers() for name in names} >= trained

    step_and_check(0)
    for parameter in model[2].parameters():
        parameter.requires_grad = True
    trained |= {"2.weight", "2.bias"}
    step_and_check(1)
    optimizer.add_param_group({"params": head, "lr": 0.01})
    trained |= {"4.weight", "4.bias"}
    step_and_check(2)
    for parameter in model[0].parameters():
        parameter.requires_grad = False
    trained -= {"0.weight", "0.bias"}
    step_and_check(3)
    return bits_of(model.parameters())


def test_parameters_may_be_frozen_thawed_and_added(two_ranks: RankPool) -> None:
    results = two_ranks.run(frozen_thawed_and_added)
    assert results[0] == results[1]


# -- the optimizer's methods -----------------------------------------------------------------------------------------


def methods() -> list[bytes]:
    """Clipping, warnings, what is refused between backward() and step(), another number of passes."""
    model = make_model()
    optimizer = overlapping(model, make_qoda(model), torch.optim.Adam, lr=0.01)
    assert isinstance(optimizer, torch.optim.Adam)
    assert type(optimizer).__name__ == "Adam"
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2):
            optimizer.zero_grad()
            (100 * loss_of(model, step)).backward()
            with pytest.raises(QodaError, match=r"zero_grad\(\) was called after"):
                optimizer.zero_grad()
            optimizer.synchronize()
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.1
            with optimizer.skip_synchronize():
                optimizer.step()
            scheduler.step()
    assert called == ["before"] * 2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / 4)
    loss_of(model, 2).backward()
    optimizer.synchronize()
    with pytest.warns(UserWarning, match="skip_synchronize"):
        optimizer.step()  # exchanges once more
    loss_of(model, 3).backward()
    with pytest.raises(QodaError, match=r"computed more than 1 times.*backward_passes_per_step"):
        loss_of(model, 3).backward()
    optimizer.step()
    optimizer.set_backward_passes_per_step(2)
    optimizer.zero_grad()
    loss_of(model, 4).backward()
    assert not optimizer._gradient_exchange._in_step
    loss_of(model, 5).backward()
    assert optimizer._gradient_exchange._in_step
    optimizer.step()
    loss_of(model, 6).backward()
    optimizer.step()  # early
    return bits_of(model.parameters())


def test_methods(two_ranks: RankPool) -> None:
    results = two_ranks.run(methods)
    assert results[0] == results[1]


def with_closure(name: str) -> list[bytes]:
    """What a closure computes is exchanged, however often the optimizer calls it."""
    model = make_model()
    make = torch.optim.SGD if name == "SGD" else partial(torch.optim.LBFGS, max_iter=4)
    optimizer = overlapping(model, make_qoda(model, bits=8), make)
    losses = []
    for _ in range(3):

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            # An optimizer that decides by the loss must see the same one on all ranks.
            return hvd.allreduce(loss.detach(), name="loss")

        losses.append(float(optimizer.step(closure)))
    assert losses[-1] < losses[0]
    loss_of(model, 9).backward()
    optimizer.step(lambda: torch.tensor(0.0)) if name == "SGD" else optimizer.synchronize()
    return bits_of(model.parameters())


@pytest.mark.parametrize("name", ["SGD", "LBFGS"])
def test_closures(two_ranks: RankPool, name: str) -> None:
    results = two_ranks.run(with_closure, name)
    assert results[0] == results[1]


def thrown_away(scheme: str) -> list[bytes]:
    """load_state_dict() between backward() and step(), with gradients missing on one rank."""
    model = Branches()
    compression = make_qoda(model, exchange=scheme)
    optimizer = overlapping(model, compression, torch.optim.Adam)

    def backward(step: int, order: list[int]) -> None:
        model.order = order
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(10 * step + hvd.rank()))
        model(x).square().sum().backward()

    backward(0, [0, 1, 2, 3])
    optimizer.step()
    optimizer.zero_grad()
    saved = copy.deepcopy(optimizer.state_dict())
    backward(1, [0, 1, 2, 3] if hvd.rank() == 0 else [0, 2])
    optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    backward(2, [3, 2, 1, 0])
    optimizer.step()
    assert compression.step == 3
    return bits_of(model.parameters())


@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
def test_load_state_dict_between_backward_and_step(two_ranks: RankPool, scheme: str) -> None:
    results = two_ranks.run(thrown_away, scheme)
    assert results[0] == results[1]


def broadcast() -> list[bytes]:
    """State from rank 0, where only rank 0 has any: Horovod then makes the others' by a step without an exchange."""
    model = make_model(seed=hvd.rank())
    optimizer = overlapping(model, make_qoda(model), torch.optim.Adam)
    if hvd.rank() == 0:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        super(type(optimizer), optimizer).step()
        optimizer.zero_grad()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer.zero_grad()
    train(model, optimizer, range(2))
    state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    return bits_of([*model.parameters(), *state])


def test_broadcast_of_optimizer_state(two_ranks: RankPool) -> None:
    results = two_ranks.run(broadcast)
    assert results[0] == results[1]


def wrapped_again() -> list[bytes]:
    """Another optimizer for the same model and compression takes over; the one before does nothing any more."""
    model = make_model()
    compression = make_qoda(model)
    first = overlapping(model, compression)
    train(model, first, range(2))
    second = overlapping(model, compression, torch.optim.Adam, lr=0.01)
    train(model, second, range(2, 4))
    with pytest.raises(QodaError, match="another optimizer has taken over"):
        first.step()
    assert compression.step == 4
    return bits_of(model.parameters())


def test_another_optimizer_takes_over(two_ranks: RankPool) -> None:
    results = two_ranks.run(wrapped_again)
    assert results[0] == results[1]


# -- state, records, ranks -------------------------------------------------------------------------------------------

UPDATES = {"at": (4, 9), "every": None, "samples": 3}


def new_run(scheme: str, worker_norms: bool) -> tuple[nn.Module, Any, Any]:
    model = Backwards()
    compression = make_qoda(model, exchange=scheme, update_levels=UPDATES, worker_norms=worker_norms)
    return model, compression, overlapping(model, compression, torch.optim.Adam, lr=0.01)


def resumed(scheme: str, worker_norms: bool) -> None:
    """Eleven steps at once, and eleven in two runs: the same parameters, levels and norms."""
    model, compression, optimizer = new_run(scheme, worker_norms)
    train(model, optimizer, range(11))
    expected = (bits_of(model.parameters()), compression.registry.digest, compression.step)
    norms = compression.worker_norms() if worker_norms else None
    assert compression.registry.version == 2

    model, compression, optimizer = new_run(scheme, worker_norms)
    train(model, optimizer, range(5))
    state = through_a_file(compression.state_dict())
    parameters, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())

    model, compression, optimizer = new_run(scheme, worker_norms)
    model.load_state_dict(parameters)
    optimizer.load_state_dict(moments)
    compression.load_state_dict(state)
    train(model, optimizer, range(5, 11))
    assert (bits_of(model.parameters()), compression.registry.digest, compression.step) == expected
    if worker_norms:
        assert compression.worker_norms() == norms


@pytest.mark.parametrize(("scheme", "worker_norms"), [("allgather", True), ("reduce_scatter", False)])
def test_resume_is_exact(two_ranks: RankPool, scheme: str, worker_norms: bool) -> None:
    two_ranks.run(resumed, scheme, worker_norms)


def elastic() -> list[bytes]:
    """TorchState keeps optimizer and compression: back after a failure within a step, and rank 0's state for all."""
    model, compression, optimizer = new_run("reduce_scatter", worker_norms=True)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, compression=compression, batch=0)
    state.sync()
    train(model, optimizer, range(3))
    state.save()
    train(model, optimizer, range(3, 5))
    expected = bits_of(model.parameters())
    loss_of(model, 5).backward()
    state.restore()
    assert compression.step == 3
    optimizer.zero_grad()
    train(model, optimizer, range(3, 5))
    assert bits_of(model.parameters()) == expected
    state.sync()
    train(model, optimizer, range(5, 7))
    return bits_of(model.parameters())


def test_elastic_state(two_ranks: RankPool) -> None:
    results = two_ranks.run(elastic)
    assert results[0] == results[1]


def recorded(scheme: str) -> tuple[list[Any], int, int]:
    sink = ListSink()
    model = make_model(width=300)
    with Telemetry([sink], rank=hvd.rank()) as telemetry:
        updates = {"at": (3, 6), "every": 4, "samples": 2}
        compression = make_qoda(
            model, telemetry=telemetry, update_levels=updates, measure_error_every=3, exchange=scheme
        )
        optimizer = overlapping(model, compression, fusion_buffer_mb=0.1)
        train(model, optimizer, range(7))
    return sink.records, compression.traffic.sent_bytes, len(optimizer.fusion_buffers())


def test_records_explain_every_byte_and_levels_are_updated(four_ranks: RankPool) -> None:
    for records, sent_bytes, buffers in four_ranks.run(recorded, "reduce_scatter"):
        assert buffers > 1
        assert [record.step for record in records] == list(range(1, 8))
        assert sum(record.sent_bytes for record in records) == pytest.approx(sent_bytes, abs=len(records))
        by_type = {entry.layer_type: entry for entry in records[1].layer_types}
        assert set(by_type) == {"feed_forward", "output", "bias", CONTROL}
        body = by_type["feed_forward"]
        assert (body.bits, body.coordinates) == (5, 40 * 300 + 300 * 300)
        assert body.raw_bytes == body.coordinates * 4 * 2 * 3 // 4
        assert 5.0 < 8 * body.sent_bytes / body.coordinates / 1.5 < 5.4
        errors = [{e.layer_type: e.relative_error for e in r.layer_types} for r in records]
        assert [e["feed_forward"] is not None for e in errors] == [True, False, False, True, False, False, True]
        assert errors[0]["bias"] == 0.0
        assert 1e-4 < errors[0]["feed_forward"] < 0.2
        assert [record.registry_version for record in records] == [0, 0, 1, 1, 1, 2, 2]


def qoda_over_workers() -> list[list[float]]:
    torch.manual_seed(0)
    model = nn.Linear(40, 40, bias=False)
    compression = make_qoda(model, worker_norms=True)
    wrapped = QODA(
        model.parameters(), lr=0.5, sum_over="workers", gradient_scale=1.0, worker_norms=compression.worker_norms
    )
    optimizer = hvd_qoda.DistributedOptimizer(wrapped, model=model, compression=compression)
    for step in range(5):
        optimizer.zero_grad()
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(10 * step + hvd.rank()))
        model(x).square().mean().backward()
        optimizer.step()
    assert optimizer.step_sizes()
    return model.weight.tolist()


def test_qoda_with_sum_over_workers(two_ranks: RankPool) -> None:
    results = two_ranks.run(qoda_over_workers)
    assert results[0] == results[1]


def residuals() -> list[bytes]:
    """Error feedback works as under the stock optimizer: the same residuals, the same parameters."""
    found = []
    for ours in (True, False):
        model = make_model()
        compression = make_qoda(model, error_feedback=True, exchange="allgather")
        optimizer = overlapping(model, compression) if ours else make_optimizer(model, compression)
        train(model, optimizer, range(4))
        residual = compression.error_feedback.residual("2.weight")
        assert residual is not None
        assert residual.norm() > 0
        found.append((bits_of(model.parameters()), bits_of([residual])))
    assert found[0] == found[1]
    return found[0][0]


def test_error_feedback(two_ranks: RankPool) -> None:
    results = two_ranks.run(residuals)
    assert results[0] == results[1]


def in_process_set(op: str, given_to_optimizer: bool) -> list[bytes]:
    """Ranks 1 and 2 train together, the others alone."""
    chosen = hvd.add_process_set([1, 2])
    try:
        model = make_model()
        compression = make_qoda(model, process_set=None if given_to_optimizer else chosen, exchange="allgather")
        options = {"process_set": chosen} if given_to_optimizer else {}
        optimizer = overlapping(model, compression, op=getattr(hvd, op), **options)
        for step in range(3):
            own = local_gradients(model, lambda step=step: loss_of(model, step))
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.synchronize()
            if chosen.included():
                assert_gradients(model, compression, own, 2.0 if op == "Sum" else 1.0, process_set=chosen)
            with optimizer.skip_synchronize():
                optimizer.step()
        assert compression.step == (3 if chosen.included() else 0)
        return bits_of(model.parameters())
    finally:
        hvd.barrier()
        hvd.remove_process_set(chosen)


@pytest.mark.parametrize(("op", "given_to_optimizer"), [("Average", True), ("Sum", False)])
def test_process_sets(four_ranks: RankPool, op: str, given_to_optimizer: bool) -> None:
    results = four_ranks.run(in_process_set, op, given_to_optimizer)
    assert results[1] == results[2]
    assert len({b"".join(result) for result in results}) == 3


def disagreeing_buffers() -> str:
    model = make_model()
    optimizer = overlapping(model, make_qoda(model), fusion_buffer_mb=0.01 if hvd.rank() == 0 else 1.0)
    with pytest.raises(RankMismatchError) as caught:
        one_step(model, optimizer)
    return str(caught.value)


def test_ranks_with_other_buffers_find_out(two_ranks: RankPool) -> None:
    for message in two_ranks.run(disagreeing_buffers):
        assert "parameters of fusion buffer: 0" in message


def joined() -> str:
    model = make_model()
    optimizer = overlapping(model, make_qoda(model, name="joined"))
    train(model, optimizer, range(2))
    message = "joined"
    if hvd.rank() == 0:
        with pytest.raises(UnsupportedError) as caught:
            train(model, optimizer, [2])
        message = str(caught.value)
    hvd.join()
    return message


def test_join_is_refused(two_ranks: RankPool) -> None:
    message, other = two_ranks.run(joined)
    assert "hvd.join()" in message
    assert other == "joined"


def interleaved(scheme: str) -> list[bytes]:
    """Users' operations without names, which Horovod matches by the number of operations before: see the transport."""
    model = make_model()
    compression = make_qoda(model, exchange=scheme, worker_norms=True)
    optimizer = overlapping(model, compression)
    for step in range(5):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        averages = [hvd.allreduce(loss.detach())]
        loss.backward()
        averages.append(hvd.allreduce(loss.detach()))
        optimizer.synchronize()
        averages.append(hvd.allreduce(loss.detach()))
        with optimizer.skip_synchronize():
            optimizer.step()
        assert all(torch.equal(average, averages[0]) for average in averages)
    return bits_of(model.parameters())


@pytest.mark.distributed
def test_unnamed_operations_between_backward_and_step() -> None:
    results = run_ranks(interleaved, 2, "allgather", timeout=90)  # new ranks, which have started equally many
    assert results[0] == results[1]


def alone() -> None:
    """One rank: with Horovod's elastic training there are hooks, else not; by default a compression is made."""
    model = make_model()
    optimizer = hvd_qoda.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    losses = train(model, optimizer, range(20))
    assert losses[-1] < losses[0]
    assert optimizer._compression.step == 20


def test_one_elastic_rank() -> None:
    run_ranks(alone, 1, environment={"HOROVOD_ELASTIC": "1"})


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"op": hvd.Adasum}, UnsupportedError, "op=hvd.Average"),
        ({"op": hvd.Sum, "gradient_predivide_factor": 2.0}, ConfigError, "op=hvd.Average only"),
        ({"backward_passes_per_step": 0}, ConfigError, "at least 1"),
        ({"fusion_buffer_mb": 0.0}, ConfigError, "larger than 0"),
        ({"groups": 0}, ConfigError, "groups=0"),
        ({"groups": [[torch.zeros(2)]]}, ConfigError, "does not know"),
        ({"compression": hvd.Compression.fp16}, ConfigError, "hvd.DistributedOptimizer"),
        ({"named_parameters": [("a", torch.zeros(2))]}, ConfigError, "lacks parameters"),
        ({"named_parameters": [("a", torch.zeros(2)), ("a", torch.zeros(2))]}, ConfigError, "given twice: a"),
        ({"named_parameters": [torch.zeros(2)]}, ConfigError, "tuples"),
    ],
)
def test_impossible_arguments_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(error, match=words):
        hvd_qoda.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **{"model": model, **options})


def unknown_parameters() -> None:
    model = make_model()
    with pytest.raises(UnsupportedError, match=r"shape \(96, 40\).*does not know"):
        hvd_qoda.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), compression=make_qoda(make_model()))
    model = make_model()
    compression = make_qoda(model)
    optimizer = overlapping(model, compression)
    with pytest.raises(QodaError, match=r"belongs to an hvd_qoda.DistributedOptimizer"):
        one_step(model, make_optimizer(model, compression))
    assert optimizer.state_dict()


def test_parameters_and_compressions_of_others_are_refused(two_ranks: RankPool) -> None:
    two_ranks.run(unknown_parameters)
