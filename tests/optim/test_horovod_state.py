"""The optimizers in two real Horovod ranks: wrapping, broadcast of fresh and resumed state, equal bits on all ranks."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hvd_qoda.errors import UnsupportedError
from hvd_qoda.optim import QODA, QGenX, QODAdam, WorkerNorms
from tests.launcher import RankPool

pytest.importorskip("horovod.torch")
pytestmark = pytest.mark.distributed

SIZE = 2
# Two groups with their own base rates; options that must survive the wrapping.
CASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "equal": (QODA, {"rates": "equal"}),
    "separated": (QODA, {"rates": "separated", "q_hat": 0.125}),
    "workers": (QODA, {"sum_over": "workers", "gradient_scale": 1.0}),
    "no_average": (QODA, {"average": False}),
    "qodadam": (QODAdam, {"weight_decay": 0.01}),
    "qgenx": (QGenX, {"world_size": SIZE}),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(SIZE) as pool:
        yield pool


class GatheredNorms:
    """Worker norms of uncompressed gradients: what the compressor's own source will do with its messages."""

    def __init__(self) -> None:
        self.local: dict[torch.nn.Parameter, torch.Tensor] = {}
        self.previous: dict[torch.nn.Parameter, torch.Tensor] = {}

    def keep(self, parameter: torch.nn.Parameter) -> None:
        self.local[parameter] = parameter.grad.clone()

    def __call__(self) -> WorkerNorms:
        import horovod.torch as hvd

        zero = torch.zeros(())
        norms = sum(float((g.double() ** 2).sum()) for g in self.local.values())
        changes = sum(
            float(((g.double() - self.previous.get(p, zero).double()) ** 2).sum()) for p, g in self.local.items()
        )
        self.previous = dict(self.local)
        gathered = hvd.allgather(torch.tensor([[norms, changes]], dtype=torch.float64), name="worker_norms")
        totals = gathered.sum(dim=0).tolist()
        return WorkerNorms(totals[0], totals[1], hvd.size())


def new_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    model[0].bias.requires_grad_(False)
    return model


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def new_optimizer(case: str, model: torch.nn.Module, wrapped: bool = True) -> Any:
    import horovod.torch as hvd

    cls, options = CASES[case]
    options = dict(options)
    if options.get("sum_over") == "workers":
        norms = GatheredNorms()
        options["worker_norms"] = norms
        for parameter in trainable_parameters(model):
            parameter.register_post_accumulate_grad_hook(norms.keep)
    parameters = list(model.parameters())
    optimizer = cls([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.02}], lr=0.05, **options)
    return hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters()) if wrapped else optimizer


def backward(model: torch.nn.Module, optimizer: Any, number: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * number + rank)
    optimizer.zero_grad()
    loss = model(torch.randn(8, 6, generator=generator)).square().sum()
    loss.backward()
    return loss.detach()


def train(model: torch.nn.Module, optimizer: Any, first: int, count: int) -> None:
    import horovod.torch as hvd

    for number in range(first, first + count):
        backward(model, optimizer, 2 * number, hvd.rank())
        if not isinstance(optimizer, QGenX):
            optimizer.step()
            continue
        optimizer.synchronize()
        optimizer.extrapolate()
        backward(model, optimizer, 2 * number + 1, hvd.rank())
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()


def fingerprint(model: torch.nn.Module, optimizer: Any) -> tuple[Any, ...]:
    """Everything that ranks must agree on, as bytes and exact numbers."""
    parameters = [p.detach().flatten().view(torch.uint8).numpy().tobytes() for p in model.parameters()]
    saved = optimizer.state_dict()
    state = [
        (index, name, value.flatten().view(torch.uint8).numpy().tobytes())
        for index, entries in saved["state"].items()
        for name, value in sorted(entries.items())
    ]
    options = [{name: value for name, value in group.items() if name != "params"} for group in saved["param_groups"]]
    return parameters, state, options


def broadcast(model: torch.nn.Module, optimizer: Any) -> None:
    import horovod.torch as hvd

    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)


def fresh_run(case: str, state_first: bool = False) -> tuple[tuple[Any, ...], list[int]]:
    """Training from scratch; also the step counters after the broadcast."""
    import horovod.torch as hvd

    # Rank 0's weights are those that count.
    model = new_model(seed=hvd.rank())
    optimizer = new_optimizer(case, model)
    if state_first:
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    broadcast(model, optimizer)
    steps = [int(state["step"]) for state in optimizer.state.values()]
    train(model, optimizer, first=0, count=5)
    return fingerprint(model, optimizer), steps


def uninterrupted_and_resumed(case: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The resumed run loads its checkpoint on rank 0 alone, as Horovod's own examples do."""
    import horovod.torch as hvd

    model = new_model(seed=hvd.rank())
    optimizer = new_optimizer(case, model)
    broadcast(model, optimizer)
    train(model, optimizer, first=0, count=3)
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    source = optimizer.param_groups[0].get("worker_norms")
    messages = [source.previous[parameter] for parameter in trainable_parameters(model)] if source else []
    train(model, optimizer, first=3, count=3)

    again = new_model(seed=10 + hvd.rank())
    resumed = new_optimizer(case, again)
    if hvd.rank() == 0:
        again.load_state_dict(weights)
        resumed.load_state_dict(saved)
    broadcast(again, resumed)
    if source:
        # Each rank's last message is the source's own state, and each rank restores its own.
        resumed.param_groups[0]["worker_norms"].previous = dict(zip(trainable_parameters(again), messages, strict=True))
    train(again, resumed, first=3, count=3)
    return fingerprint(model, optimizer), fingerprint(again, resumed)


def closure_run() -> tuple[Any, ...]:
    """Q-GenX with a closure: it ends with the exchange, and the step itself exchanges nothing."""
    import horovod.torch as hvd

    model = new_model(seed=hvd.rank())
    optimizer = new_optimizer("qgenx", model)
    broadcast(model, optimizer)
    calls = iter(range(100))

    def closure() -> torch.Tensor:
        loss = backward(model, optimizer, next(calls), hvd.rank())
        optimizer.synchronize()
        return loss

    for _ in range(5):
        with optimizer.skip_synchronize():
            optimizer.step(closure)
    return fingerprint(model, optimizer)


def closure_without_exchange() -> str:
    import horovod.torch as hvd

    model = new_model(seed=0)
    optimizer = new_optimizer("qgenx", model)
    try:
        with optimizer.skip_synchronize():
            optimizer.step(lambda: backward(model, optimizer, 0, hvd.rank()))
    except UnsupportedError as error:
        optimizer.synchronize()
        return str(error)
    return "no error"


def one_process_run(case: str) -> list[bytes]:
    """The same training without Horovod's optimizer: gradients of both ranks averaged by hand."""
    import horovod.torch as hvd

    model = new_model(seed=0)
    optimizer = new_optimizer(case, model, wrapped=False)
    trainable = trainable_parameters(model)

    def mean_gradients(number: int) -> None:
        gradients = []
        for rank in range(hvd.size()):
            backward(model, optimizer, number, rank)
            gradients.append([parameter.grad.clone() for parameter in trainable])
        for parameter, pair in zip(trainable, zip(*gradients, strict=True), strict=True):
            parameter.grad = (pair[0] + pair[1]) * 0.5

    for number in range(5):
        mean_gradients(2 * number)
        if isinstance(optimizer, QGenX):
            optimizer.extrapolate()
            mean_gradients(2 * number + 1)
        optimizer.step()
    return fingerprint(model, optimizer)[0]


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_hold_the_same_bits_after_training(ranks: RankPool, case: str) -> None:
    (one, steps), (other, other_steps) = ranks.run(fresh_run, case)
    assert one == other
    assert set(steps + other_steps) == {0}, "broadcasting ran a step"
    if case != "workers":  # gathering norms takes both ranks
        assert one[0] == ranks.run(one_process_run, case)[0]


@pytest.mark.parametrize("case", CASES)
def test_optimizer_state_may_be_broadcast_before_the_parameters(ranks: RankPool, case: str) -> None:
    expected = ranks.run(fresh_run, case)[0][0]
    assert ranks.run(fresh_run, case, state_first=True) == [(expected, [0, 0, 0])] * SIZE


@pytest.mark.parametrize("case", CASES)
def test_resuming_on_rank_0_and_broadcasting_goes_on_exactly(ranks: RankPool, case: str) -> None:
    for uninterrupted, resumed in ranks.run(uninterrupted_and_resumed, case):
        assert resumed == uninterrupted


def test_qgenx_with_a_closure_that_ends_with_the_exchange(ranks: RankPool) -> None:
    expected = ranks.run(fresh_run, "qgenx")[0][0]
    assert ranks.run(closure_run) == [expected] * SIZE


def test_qgenx_refuses_a_closure_without_exchange(ranks: RankPool) -> None:
    assert all("synchronize()" in message for message in ranks.run(closure_without_exchange))
