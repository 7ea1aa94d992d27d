"""What all three optimizers promise their hosts: state, groups, closures, dtypes, refusals."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_qoda.errors import ConfigError, UnsupportedError
from hvd_qoda.optim import QODA, QGenX, QODAdam, WorkerNorms

Build = Callable[..., torch.optim.Optimizer]
# At module level, so that optimizers can be pickled.
BUILDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "equal": (QODA, {"rates": "equal"}),
    "separated": (QODA, {"rates": "separated"}),
    "no_average": (QODA, {"average": False}),
    "qodadam": (QODAdam, {"lr": 0.01, "weight_decay": 0.1}),
    "qgenx": (QGenX, {"world_size": 2}),
}


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest) -> Build:
    cls, options = BUILDS[request.param]
    return lambda params, **more: cls(params, **{**options, **more})


def new_parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 4), (5,), ())]


def set_gradients(parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = parameter.detach() * 0.5 + noise.to(parameter.dtype)


def advance(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], first: int, count: int) -> None:
    """`count` steps whose gradients depend on the point and on the number of the step."""
    for number in range(first, first + count):
        set_gradients(parameters, 2 * number)
        if isinstance(optimizer, QGenX):
            optimizer.extrapolate()
            set_gradients(parameters, 2 * number + 1)
        optimizer.step()


def bits(tensors: list[torch.nn.Parameter]) -> list[bytes]:
    return [tensor.detach().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_going_on_from_a_state_dict_gives_the_same_bits(build: Build, dtype: torch.dtype) -> None:
    parameters = new_parameters(dtype)
    optimizer = build([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.3}])
    advance(optimizer, parameters, first=0, count=4)

    saved = through_file(optimizer.state_dict())
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = build([{"params": copies[:1]}, {"params": copies[1:]}])
    resumed.load_state_dict(saved)

    advance(optimizer, parameters, first=4, count=4)
    advance(resumed, copies, first=4, count=4)
    assert bits(parameters) == bits(copies)
    assert resumed.step_sizes() == optimizer.step_sizes()
    for mine, other in zip(parameters, copies, strict=True):
        for name, value in optimizer.state[mine].items():
            assert value.dtype == resumed.state[other][name].dtype
            assert torch.equal(value, resumed.state[other][name]), name


def test_a_state_dict_taken_between_the_phases_of_qgenx_is_complete() -> None:
    parameters = new_parameters()
    optimizer = QGenX(parameters)
    advance(optimizer, parameters, first=0, count=2)
    set_gradients(parameters, 100)
    optimizer.extrapolate()
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = QGenX(copies)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    for one, held in ((optimizer, parameters), (resumed, copies)):
        set_gradients(held, 101)
        one.step()
    assert bits(parameters) == bits(copies)


def test_two_optimizers_loaded_from_one_dictionary_share_nothing(build: Build) -> None:
    parameters = new_parameters()
    optimizer = build(parameters)
    advance(optimizer, parameters, first=0, count=2)
    saved = optimizer.state_dict()
    other = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = build(other)
    resumed.load_state_dict(saved)
    before = copy.deepcopy(resumed.state_dict()["state"])
    advance(optimizer, parameters, first=2, count=2)
    for index, state in before.items():
        for name, value in state.items():
            assert torch.equal(value, resumed.state_dict()["state"][index][name])


def test_state_exists_from_construction_on(build: Build) -> None:
    """Horovod broadcasts by name what each rank holds: a fresh rank must hold what a resumed one does."""
    parameters = new_parameters()
    optimizer = build(parameters)
    fresh = optimizer.state_dict()
    names = {index: {name: value.shape for name, value in state.items()} for index, state in fresh["state"].items()}
    assert len(names) == len(parameters)
    assert all(int(state["step"]) == 0 for state in fresh["state"].values())
    options = [set(group) for group in fresh["param_groups"]]
    advance(optimizer, parameters, first=0, count=3)
    after = optimizer.state_dict()
    assert names == {
        index: {name: value.shape for name, value in state.items()} for index, state in after["state"].items()
    }
    assert options == [set(group) for group in after["param_groups"]]
    for state in after["state"].values():
        assert all(isinstance(value, torch.Tensor) for value in state.values())
    for group in after["param_groups"]:
        assert all(isinstance(value, (bool, int, float, str, tuple, list, type(None))) for value in group.values())


def test_an_optimizer_built_from_the_groups_of_another_keeps_its_options(build: Build) -> None:
    """hvd.DistributedOptimizer hands nothing but `param_groups` to the class it builds."""
    reference, parameters = new_parameters(), new_parameters()
    optimizer = build(parameters, lr=0.2)
    wrapped = type(optimizer)(optimizer.param_groups)
    advance(build(reference, lr=0.2), reference, first=0, count=5)
    advance(wrapped, parameters, first=0, count=5)
    assert bits(parameters) == bits(reference)


def test_rebuilding_after_steps_starts_afresh(build: Build) -> None:
    parameters = new_parameters()
    optimizer = build(parameters)
    advance(optimizer, parameters, first=0, count=3)
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    rebuilt, fresh = type(optimizer)(optimizer.param_groups), build(copies)
    advance(rebuilt, parameters, first=3, count=3)
    advance(fresh, copies, first=3, count=3)
    assert bits(parameters) == bits(copies)


def test_the_first_point_is_taken_at_the_first_step(build: Build) -> None:
    """Parameters are broadcast after the optimizer was built."""
    reference = new_parameters()
    parameters = [torch.nn.Parameter(torch.full_like(parameter, 7.0)) for parameter in reference]
    optimizer = build(parameters)
    with torch.no_grad():
        for parameter, value in zip(parameters, reference, strict=True):
            parameter.copy_(value)
    advance(optimizer, parameters, first=0, count=3)
    advance(build(reference), reference, first=0, count=3)
    assert bits(parameters) == bits(reference)


def test_groups_with_equal_options_are_one_model(build: Build) -> None:
    together, apart = new_parameters(), new_parameters()
    advance(build(together), together, first=0, count=5)
    optimizer = build(apart[:1])
    optimizer.add_param_group({"params": apart[1:]})
    advance(optimizer, apart, first=0, count=5)
    assert bits(together) == bits(apart)


def test_a_group_added_later_joins_the_sums_of_the_model(build: Build) -> None:
    parameters = new_parameters()
    optimizer = build(parameters[:2])
    advance(optimizer, parameters[:2], first=0, count=3)
    held = bits(parameters[2:])
    optimizer.add_param_group({"params": parameters[2:]})
    assert bits(parameters[2:]) == held
    sizes = optimizer.step_sizes()
    assert sizes["gamma/1"] == sizes["gamma"]
    advance(optimizer, parameters, first=3, count=2)
    assert bits(parameters[2:]) != held
    assert int(optimizer.state[parameters[2]]["step"]) == 2
    sizes = optimizer.step_sizes()
    assert sizes["eta/1"] == sizes["eta"]


def test_closures_return_their_loss_and_see_gradients_enabled(build: Build) -> None:
    parameters = new_parameters(torch.float64)
    targets = [torch.ones_like(parameter) for parameter in parameters]
    optimizer = build(parameters, lr=0.05)
    losses = []

    def closure() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = sum(((p - target) ** 2).sum() for p, target in zip(parameters, targets, strict=True))
        loss.backward()
        losses.append(loss.item())
        return losses[-1]

    returned = [optimizer.step(closure) for _ in range(30)]
    calls = 2 if isinstance(optimizer, QGenX) else 1
    assert returned == losses[::calls]
    assert returned[-1] < 0.9 * returned[0]


def test_a_closure_and_separate_calls_give_the_same_bits(build: Build) -> None:
    separate, closed = new_parameters(), new_parameters()
    advance(build(separate), separate, first=0, count=3)
    optimizer, seeds = build(closed), iter(range(100))

    def closure() -> float:
        set_gradients(closed, next(seeds))
        if not isinstance(optimizer, QGenX):
            next(seeds)
        return 0.0

    for _ in range(3):
        optimizer.step(closure)
    assert bits(closed) == bits(separate)


def test_without_any_gradient_nothing_changes(build: Build) -> None:
    parameters = new_parameters()
    optimizer, held = build(parameters), bits(parameters)
    if isinstance(optimizer, QGenX):
        optimizer.extrapolate()
    optimizer.step()
    assert bits(parameters) == held
    assert all(int(state["step"]) == 0 for state in optimizer.state.values())


def test_parameters_without_gradient_stay_until_they_have_one(build: Build) -> None:
    parameters = new_parameters()
    optimizer, held = build(parameters), bits(parameters[1:])
    advance(optimizer, parameters[:1], first=0, count=3)
    assert bits(parameters[1:]) == held
    advance(optimizer, parameters, first=3, count=1)
    assert bits(parameters[1:]) != held


def test_frozen_parameters_have_no_state_and_stay_and_may_be_thawed(build: Build) -> None:
    parameters = new_parameters()
    parameters[1].requires_grad_(False)
    optimizer, held = build(parameters), bits(parameters[1:2])
    assert parameters[1] not in optimizer.state
    advance(optimizer, [parameters[0], parameters[2]], first=0, count=2)
    assert bits(parameters[1:2]) == held
    parameters[1].requires_grad_(True)
    assert len(optimizer.state_dict()["state"]) == 3
    advance(optimizer, parameters, first=2, count=2)
    assert bits(parameters[1:2]) != held

    parameters[0].requires_grad_(False)
    parameters[0].grad, held = None, bits(parameters[:1])
    advance(optimizer, parameters[1:], first=4, count=2)
    assert bits(parameters[:1]) == held


def test_empty_and_non_contiguous_parameters(build: Build) -> None:
    empty = torch.nn.Parameter(torch.zeros(0, 3))
    transposed = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    plain = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t().contiguous())
    optimizer = build([empty, transposed])
    reference = build([plain])
    advance(optimizer, [empty, transposed], first=0, count=3)
    advance(reference, [plain], first=0, count=3)
    assert torch.equal(transposed, plain)
    assert transposed.stride() == (1, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_keep_float32_state(build: Build, dtype: torch.dtype) -> None:
    parameters, exact = new_parameters(dtype), new_parameters(dtype)
    wide = [torch.nn.Parameter(parameter.detach().float()) for parameter in exact]
    optimizer, reference = build(parameters), build(wide)
    # The same gradients for both, whatever the rounding of the points.
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        for narrow, other in zip(parameters, wide, strict=True):
            narrow.grad = torch.randn(narrow.shape, generator=generator).to(dtype)
            other.grad = narrow.grad.float()
        for one in (optimizer, reference):
            if isinstance(one, QGenX):
                one.extrapolate()
            one.step()
    for narrow, other in zip(parameters, wide, strict=True):
        assert narrow.dtype == dtype
        for name, value in optimizer.state[narrow].items():
            if name not in ("step", "average"):
                assert value.dtype == torch.float32
                assert torch.equal(value, reference.state[other][name]), name
        if not isinstance(optimizer, QODAdam):
            # The point follows from float32 state, so roundings do not pile up.
            assert torch.equal(narrow, other.to(dtype))


def test_mixed_dtypes_in_one_model(build: Build) -> None:
    parameters = [*new_parameters(torch.float64), *new_parameters(torch.float32), *new_parameters(torch.bfloat16)]
    optimizer = build(parameters)
    advance(optimizer, parameters, first=0, count=3)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in parameters)
    assert optimizer.state[parameters[0]]["step"].dtype == torch.int64


def test_sparse_gradients_are_refused_before_anything_changes(build: Build) -> None:
    dense, sparse = torch.nn.Parameter(torch.ones(3)), torch.nn.Embedding(4, 2, sparse=True)
    optimizer = build([dense, *sparse.parameters()])
    (dense.sum() + sparse(torch.tensor([1, 1])).sum()).backward()
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UnsupportedError, match="sparse=False"):
        optimizer.extrapolate() if isinstance(optimizer, QGenX) else optimizer.step()
    assert torch.equal(dense, torch.ones(3))
    assert str(state) == str(optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_other_dtypes_are_refused(build: Build, dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedError, match=str(dtype)):
        build([torch.zeros(2, dtype=dtype)])


def test_zero_grad_sets_to_none_or_zero(build: Build) -> None:
    parameters = new_parameters()
    optimizer = build(parameters)
    set_gradients(parameters, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(bool((parameter.grad == 0).all()) for parameter in parameters)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in parameters)


def test_schedulers_change_the_base_rate(build: Build) -> None:
    parameters = new_parameters()
    optimizer = build(parameters, lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    advance(optimizer, parameters, first=0, count=1)
    before = optimizer.step_sizes()
    scheduler.step()
    after = optimizer.step_sizes()
    assert after == pytest.approx({name: 0.5 * value for name, value in before.items()})


def test_copies_and_pickles_go_on_alike(build: Build) -> None:
    parameters = new_parameters()
    optimizer = build(parameters)
    advance(optimizer, parameters, first=0, count=3)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        held = [parameter for group in twin.param_groups for parameter in group["params"]]
        mine = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
        reference = build(mine)
        reference.load_state_dict(optimizer.state_dict())
        advance(twin, held, first=3, count=2)
        advance(reference, mine, first=3, count=2)
        assert bits(held) == bits(mine)


def test_state_follows_parameters_that_a_host_exchanges(build: Build) -> None:
    """ZeRO puts flat partitions into the groups; state of tensors that are gone must not stay."""
    parameters = new_parameters()
    optimizer = build(parameters)
    partition = torch.nn.Parameter(torch.ones(8))
    optimizer.param_groups[0]["params"] = [partition]
    optimizer.forget_state_of_others()
    advance(optimizer, [partition], first=0, count=1)
    assert list(optimizer.state) == [partition]
    assert len(optimizer.state_dict()["state"]) == 1


def test_state_of_a_group_that_is_hidden_during_a_step_stays(build: Build) -> None:
    """ZeRO steps one group at a time."""
    parameters = new_parameters()
    optimizer = build([{"params": parameters[:1]}, {"params": parameters[1:]}])
    advance(optimizer, parameters, first=0, count=1)
    before = {name: value.clone() for name, value in optimizer.state[parameters[1]].items()}
    groups = optimizer.param_groups
    optimizer.param_groups = groups[:1]
    advance(optimizer, parameters[:1], first=1, count=1)
    optimizer.param_groups = groups
    for name, value in optimizer.state[parameters[1]].items():
        assert torch.equal(value, before[name])


def test_loading_the_state_of_another_optimizer_is_an_error(build: Build) -> None:
    parameters = new_parameters()
    optimizer = build(parameters)
    other = torch.optim.SGD(parameters, lr=0.1)
    with pytest.raises(ConfigError, match="lack"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf")])
def test_impossible_rates_are_refused(build: Build, lr: float) -> None:
    with pytest.raises(ConfigError, match="lr"):
        build(new_parameters(), lr=lr)


def test_a_refused_group_is_not_added(build: Build) -> None:
    parameters = new_parameters()
    optimizer = build(parameters[:1])
    with pytest.raises(ConfigError, match="lr"):
        optimizer.add_param_group({"params": parameters[1:], "lr": -1.0})
    with pytest.raises(UnsupportedError):
        optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.int32)]})
    assert len(optimizer.param_groups) == 1
    advance(optimizer, parameters[:1], first=0, count=1)


@pytest.mark.parametrize("cls", [QODA, QGenX])
def test_sum_over_workers_needs_a_source(cls: type[QODA] | type[QGenX]) -> None:
    with pytest.raises(UnsupportedError, match="worker_norms"):
        cls(new_parameters(), sum_over="workers")


@pytest.mark.parametrize("cls", [QODA, QGenX])
def test_sum_over_workers_needs_the_gradients_scale(cls: type[QODA] | type[QGenX]) -> None:
    with pytest.raises(ConfigError, match="gradient_scale"):
        cls(new_parameters(), sum_over="workers", worker_norms=lambda: WorkerNorms(2.0, 1.0, 1))


@pytest.mark.parametrize("cls", [QODA, QGenX])
def test_the_source_of_norms_survives_wrapping_and_loading_and_is_not_saved(cls: type[QODA] | type[QGenX]) -> None:
    parameters, calls = new_parameters(), []

    def source() -> WorkerNorms:
        calls.append(len(calls))
        return WorkerNorms(2.0, 1.0, 1)

    first = cls(parameters, sum_over="workers", gradient_scale=1.0, worker_norms=source)
    optimizer = cls(first.param_groups)
    advance(optimizer, parameters, first=0, count=2)
    saved = through_file(optimizer.state_dict())
    assert all("worker_norms" not in group for group in saved["param_groups"])
    optimizer.load_state_dict(saved)
    advance(optimizer, parameters, first=2, count=1)
    assert len(calls) == 3

    with pytest.raises(UnsupportedError, match="worker_norms"):
        cls(new_parameters()).load_state_dict(saved)


@pytest.mark.parametrize("cls", [QODA, QGenX])
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_impossible_gradient_scales_are_refused(cls: type[QODA] | type[QGenX], scale: float) -> None:
    with pytest.raises(ConfigError, match="gradient_scale"):
        cls(new_parameters(), gradient_scale=scale)


@pytest.mark.parametrize("cls", [QODA, QGenX])
def test_model_wide_options_are_one_value(cls: type[QODA] | type[QGenX]) -> None:
    parameters = new_parameters()
    with pytest.raises(ConfigError, match="average"):
        cls([{"params": parameters[:1]}, {"params": parameters[1:], "average": False}])
