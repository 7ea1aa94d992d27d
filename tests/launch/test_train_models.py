"""The network: its size, and the images it takes."""

import pytest
import torch

from launch.train.models import SIZES, DigitNet, parameter_count, width_of


def test_the_medium_network_has_about_300000_parameters() -> None:
    assert parameter_count(DigitNet()) == 296_770


def test_sizes_grow() -> None:
    counts = [parameter_count(DigitNet(width_of(size))) for size in (*SIZES, "4")]
    assert counts == sorted(counts)
    assert counts[0] < 100_000 < 1_000_000 < counts[2]


@pytest.mark.parametrize("side", [8, 16, 28, 32])
@pytest.mark.parametrize("width", [0.1, 1.0])
def test_any_image_side_gives_ten_logits(side: int, width: float) -> None:
    assert DigitNet(width)(torch.zeros(3, 1, side, side)).shape == (3, 10)


@pytest.mark.parametrize("size", ["huge", "0", "-1", "nan", "65"])
def test_impossible_sizes_are_refused(size: str) -> None:
    with pytest.raises(ValueError, match="width factor"):
        width_of(size)


def test_equal_seeds_give_equal_weights() -> None:
    def weights() -> torch.Tensor:
        torch.manual_seed(5)
        return DigitNet().hidden.weight

    assert torch.equal(weights(), weights())
