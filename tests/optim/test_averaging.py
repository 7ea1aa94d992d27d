"""The averaged iterate: its values, swapping it in, and getting the bits back."""

import copy

import pytest
import torch

from hvd_qoda.errors import ConfigError, UnsupportedError
from hvd_qoda.optim import QODA, QGenX

CLASSES = [QODA, QGenX]
Averaging = type[QODA] | type[QGenX]


def parameters_of(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((2, 3), (4,))]


def steps(optimizer: QODA | QGenX, parameters: list[torch.nn.Parameter], count: int) -> list[list[torch.Tensor]]:
    """Take steps; returns the points X_{t+1/2}."""
    generator, points = torch.Generator().manual_seed(1), []

    def gradients() -> None:
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

    for _ in range(count):
        gradients()
        if isinstance(optimizer, QGenX):
            optimizer.extrapolate()
            gradients()
        points.append([parameter.detach().clone() for parameter in parameters])
        optimizer.step()
    return points


@pytest.mark.parametrize("cls", CLASSES)
def test_within_the_context_the_model_holds_the_mean_of_its_points(cls: Averaging) -> None:
    parameters = parameters_of()
    optimizer = cls(parameters)
    points = steps(optimizer, parameters, 7)
    kept = [parameter.detach().clone() for parameter in parameters]
    addresses = [parameter.data_ptr() for parameter in parameters]
    with optimizer.averaged_parameters():
        for index, parameter in enumerate(parameters):
            expected = torch.stack([point[index].double() for point in points]).mean(dim=0)
            torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)
            assert not torch.equal(parameter, kept[index])
    assert all(torch.equal(parameter, before) for parameter, before in zip(parameters, kept, strict=True))
    assert addresses == [parameter.data_ptr() for parameter in parameters]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_look_at_the_average_does_not_change_the_run(cls: Averaging) -> None:
    looked, plain = parameters_of(torch.bfloat16), parameters_of(torch.bfloat16)
    optimizer, reference = cls(looked), cls(plain)
    steps(optimizer, looked, 3)
    steps(reference, plain, 3)
    with pytest.raises(KeyError), optimizer.averaged_parameters():
        raise KeyError("an evaluation that fails")
    steps(optimizer, looked, 3)
    steps(reference, plain, 3)
    assert all(torch.equal(one, other) for one, other in zip(looked, plain, strict=True))


@pytest.mark.parametrize("cls", CLASSES)
def test_the_average_can_be_copied_elsewhere(cls: Averaging) -> None:
    parameters = parameters_of()
    optimizer = cls(parameters)
    before = [torch.zeros_like(parameter) for parameter in parameters]
    optimizer.copy_averaged_to(before)
    assert all(torch.equal(copied, parameter) for copied, parameter in zip(before, parameters, strict=True))

    steps(optimizer, parameters, 3)
    targets = copy.deepcopy(parameters)
    optimizer.copy_averaged_to(targets)
    with optimizer.averaged_parameters():
        assert all(torch.equal(copied, parameter) for copied, parameter in zip(targets, parameters, strict=True))
    for wrong in (targets[:1], [*targets, targets[0]], targets[::-1]):
        with pytest.raises(ConfigError, match="of equal shape"):
            optimizer.copy_averaged_to(wrong)


@pytest.mark.parametrize("cls", CLASSES)
def test_steps_and_nesting_inside_the_context_are_refused(cls: Averaging) -> None:
    parameters = parameters_of()
    optimizer = cls(parameters)
    steps(optimizer, parameters, 1)
    with optimizer.averaged_parameters():
        with pytest.raises(UnsupportedError, match="step"):
            optimizer.step(lambda: 0.0)
        with pytest.raises(UnsupportedError, match="averaged_parameters"), optimizer.averaged_parameters():
            pass
        if isinstance(optimizer, QGenX):
            with pytest.raises(UnsupportedError, match="extrapolate"):
                optimizer.extrapolate()
    steps(optimizer, parameters, 1)


@pytest.mark.parametrize("cls", CLASSES)
def test_without_average_there_is_no_buffer_and_a_clear_error(cls: Averaging) -> None:
    parameters = parameters_of()
    optimizer = cls(parameters, average=False)
    steps(optimizer, parameters, 1)
    assert all("average" not in state for state in optimizer.state.values())
    with pytest.raises(UnsupportedError, match="average=True"), optimizer.averaged_parameters():
        pass
    with pytest.raises(UnsupportedError, match="average=True"):
        optimizer.copy_averaged_to(parameters)
